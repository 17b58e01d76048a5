"""Arms: what they change of a ticket's mask and weights, and where they start; each level has one mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparselth import pruning, tickets
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.errors import UsageError
from sparselth.experiments.arms import ARMS, Arm, register
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig, find_mask, start_weights
from sparselth.models import get_model
from sparselth.runs import RunRecord, cell_path
from sparselth.scores import SCORES
from sparselth.streams import stream

LENET = get_model("lenet-300-100")


def generator() -> torch.Generator:
    return stream(0, "any", 1, "any")


FIRST_ARMS = ("ticket", "reinit", "random-mask", "random-reinit")


@pytest.mark.parametrize("name", FIRST_ARMS)
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
        ("lr-rewind", True): 30,
        ("finetune", True): 30,
        ("last-rate", True): 30,
        ("continue", True): 30,
        ("signed-reinit", True): 0,
        ("constant-signs", True): 30,
    }
    assert {plan.keep_step(cell) for cell in plan.cells() if cell.level == 0} == {30}
    assert {plan.keep_step(cell) for cell in plan.cells() if cell.level} == {None}


def test_what_each_arm_prunes_and_goes_on_from(config: Callable[..., ImpConfig]) -> None:
    plan = config(arms=tuple(ARMS), levels=3)
    for arm in ARMS:
        chain = [plan.pruned(Cell(0, arm, level)) for level in (1, 2, 3)]
        own = "continue" if arm == "continue" else "ticket"
        assert chain == [Cell(0, "ticket", 0), Cell(0, own, 1), Cell(0, own, 2)]
        assert [plan.needs(Cell(0, arm, level)) for level in (1, 2, 3)] == [(cell,) for cell in chain]
    once = config(arms=tuple(ARMS), levels=3, one_shot=True)
    assert {once.pruned(Cell(0, arm, 3)) for arm in ARMS} == {Cell(0, "ticket", 0)}
    assert {arm for arm in ARMS if ARMS[arm].goes_on} == {"lr-rewind", "finetune", "continue"}


def test_starts_are_trained_weights_or_rewound_ones_or_their_signs(
    config: Callable[..., ImpConfig], digits: Resident, tmp_path: Path
) -> None:
    plan, place, params = config(arms=tuple(ARMS)), Place(tmp_path, digits, {}), LENET.params
    (tmp_path / "cells").mkdir()
    full, drawn = params.full_mask(), init_weights(LENET, generator())
    trained = init_weights(LENET, stream(1, "any", 1, "any"))
    content = tickets.Content(full.numpy(), trained.numpy(), drawn.numpy())
    tickets.save(cell_path(tmp_path, Cell(0, "ticket", 0)), params, content, model=LENET.name)
    found = {arm: start_weights(plan, place, Cell(0, arm, 1)) for arm in ARMS}
    for arm in ("lr-rewind", "finetune", "continue"):
        assert torch.equal(found[arm], trained)
    for arm in ("ticket", "last-rate"):
        assert torch.equal(found[arm], drawn)
    fresh = init_weights(LENET, stream(0, "signed-reinit", 1, "init"))
    for spec in params.weights:
        signs, layer = drawn[spec.span].sign(), found["signed-reinit"][spec.span]
        assert torch.equal(layer.sign(), signs)
        assert torch.equal(layer.abs(), fresh[spec.span].abs())
        layer = found["constant-signs"][spec.span]
        assert torch.equal(layer.sign(), signs)
        size = drawn[spec.span].double().square().mean().sqrt()
        torch.testing.assert_close(layer.abs().double(), size.expand(len(layer)), rtol=1e-5, atol=0)


def test_the_last_learning_rate_is_that_of_the_last_step(config: Callable[..., ImpConfig]) -> None:
    recipe = Recipe(steps=100, lr=0.3, warmup=10, lr_drops=(40, 80))
    plan = config(arms=tuple(ARMS), recipe=recipe)
    for arm in ARMS:
        rates = {plan.recipe_of(Cell(0, arm, 1)).lr_at(step) for step in range(100)}
        if arm in ("finetune", "last-rate"):
            assert rates == {recipe.lr_at(99)}
            assert min(rates) == pytest.approx(0.003)
        else:
            assert plan.recipe_of(Cell(0, arm, 1)) == recipe
    assert plan.recipe_of(Cell(0, "ticket", 0)) == recipe
    with pytest.raises(UsageError, match="`arms` finetune: trains at the last learning rate, which `cosine`"):
        config(arms=("ticket", "finetune"), recipe=replace(recipe, cosine=True)).check()


def test_a_run_of_arms_that_are_not_rewound(imp: Callable[..., RunRecord]) -> None:
    """`continue` prunes what it trained itself, others what the ticket trained; one batch has two rates."""
    words = "--levels 2 --seeds 0 --arms ticket,lr-rewind,finetune,continue --lr-drops 30 --replicas 4"
    record = imp(*words.split(), "--workers", "1", steps=60)
    assert record.complete
    read = {
        (arm, level): tickets.read(cell_path(record.path, Cell(0, arm, level)), LENET.params)[0]
        for arm in record.config.arms
        for level in range(0 if arm == "ticket" else 1, 3)
    }
    for level in (1, 2):
        mask = read["ticket", level].mask
        for arm in ("lr-rewind", "finetune"):
            assert (read[arm, level].mask == mask).all()
            assert (read[arm, level].weights != read["ticket", level].weights).any()
        assert (read["lr-rewind", level].weights != read["finetune", level].weights).any()
    assert (read["continue", 1].mask == read["ticket", 1].mask).all()
    assert (read["continue", 2].mask != read["ticket", 2].mask).any()
    for spec in LENET.weights:
        stays, size = read["continue", 2].mask[spec.span], abs(read["continue", 1].weights[spec.span])
        gone = read["continue", 1].mask[spec.span] & ~stays
        assert size[stays].min() >= size[gone].max()


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
