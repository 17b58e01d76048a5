"""Arms: what they change of a ticket's mask and weights, and where they start; each level has one mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparselth import pruning, tickets
from sparselth.config import Cell
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.errors import UsageError
from sparselth.experiments.arms import ARMS, Arm, register
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig, find_mask
from sparselth.models import get_model
from sparselth.runs import cell_path
from sparselth.scores import SCORES
from sparselth.streams import stream

LENET = get_model("lenet-300-100")


def generator() -> torch.Generator:
    return stream(0, "any", 1, "any")


@pytest.mark.parametrize("name", list(ARMS))
def test_an_arm_keeps_counts_and_starts_at_the_rewind_step_unless_fresh(name: str) -> None:
    arm, params = ARMS[name], LENET.params
    mask = params.full_mask()
    mask[: params.mask_size // 2] = False
    rewound = torch.arange(params.size, dtype=torch.float32)
    found = arm.mask(params, mask, generator())
    same = name in ("ticket", "reinit")
    assert torch.equal(found, mask if same else pruning.shuffle(params, mask, generator()))
    assert torch.equal(found, mask) == same
    weights = arm.weights(LENET, lambda: rewound, generator())
    fresh = name in ("reinit", "random-reinit")
    assert torch.equal(weights, init_weights(LENET, generator()) if fresh else rewound)
    assert arm.start_step(30) == (0 if fresh else 30)


def test_where_a_cell_starts(config: Callable[..., ImpConfig]) -> None:
    plan = config(rewind=30, arms=tuple(ARMS))
    starts = {(cell.arm, cell.level > 0): plan.start_step(cell) for cell in plan.cells()}
    assert starts.pop(("ticket", False)) == 0
    assert starts == {
        ("ticket", True): 30,
        ("reinit", True): 0,
        ("random-mask", True): 30,
        ("random-reinit", True): 0,
    }
    assert {plan.keep_step(cell) for cell in plan.cells() if cell.level == 0} == {30}
    assert {plan.keep_step(cell) for cell in plan.cells() if cell.level} == {None}


def test_names_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARMS, "things", dict(ARMS.items()))
    mine = Arm("mine", "what it means")
    assert register(mine) is mine is ARMS["mine"]
    assert (mine.name, mine.meaning) == ("mine", "what it means")
    with pytest.raises(UsageError, match="arm 'ticket': there is one of that name already"):
        register(Arm("ticket", "another"))


@pytest.mark.parametrize("score", list(SCORES))
def test_a_score_gives_all_arms_of_a_level_one_mask(
    score: str, config: Callable[..., ImpConfig], digits: Resident, tmp_path: Path
) -> None:
    """Its batch and its draws are the ticket's, another of every level."""
    plan, place, params = config(score=score, one_shot=True), Place(tmp_path, digits, {}), LENET.params
    (tmp_path / "cells").mkdir()
    weights, full = init_weights(LENET, generator()), params.full_mask()
    content = tickets.Content(full.numpy(), weights.numpy(), weights.numpy())
    tickets.save(cell_path(tmp_path, Cell(0, "ticket", 0)), params, content, model=LENET.name)
    first = find_mask(plan, place, Cell(0, "ticket", 1))
    assert torch.equal(find_mask(plan, place, Cell(0, "reinit", 1, 3)), first)
    assert torch.equal(find_mask(plan, place, Cell(0, "ticket", 1)), first)
    assert params.kept(first) == plan.rungs()[1]
    second = find_mask(plan, place, Cell(0, "ticket", 2))
    if score == "magnitude":
        assert not (second & ~first).any()
        kept, gone = weights[: params.mask_size][first], weights[: params.mask_size][full & ~first]
        assert kept.abs().mean() > 2 * gone.abs().mean()
    elif SCORES[score].start or score == "synflow":
        # nothing moved: a rewound weight is what it was, and ties go by index; synflow looks at no image
        assert not (second & ~first).any()
    else:
        assert (second & ~first).any()
