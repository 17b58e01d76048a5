"""Rewinding: one dense network, its first steps again to the bit, chains of tickets, what the report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import tickets
from sparselth.cli.main import run
from sparselth.config import Cell, Recipe
from sparselth.engine.dense import init_weights
from sparselth.errors import UsageError
from sparselth.experiments.rewinding import RewindingConfig
from sparselth.models import get_model
from sparselth.report import rewinding as report
from sparselth.runs import RunRecord, cell_path, read
from sparselth.streams import stream

LENET = get_model("lenet-300-100")
TRAINED = "--dataset mnist5k --model lenet-300-100 --steps 60 --eval-every 30 --eval-images 100 --cosine"
TINY = [*TRAINED.split(), "--workers", "1", "--quiet", "--rate", "0.5"]


def config(**changes: Any) -> RewindingConfig:
    values: dict[str, Any] = {
        "model": "lenet-300-100",
        "dataset": "mnist5k",
        "device": "cpu",
        "eval_images": 100,
        "recipe": Recipe(steps=60, lr=1.2e-3),
        "rewind": (20, 0),
        "levels": (2,),
    }
    return RewindingConfig(**values | changes)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    out = tmp_path_factory.mktemp("runs") / "rewinding"
    words = "rewinding --seeds 0 --levels 2 --rewind 0,20 --out"
    assert run([*words.split(), str(out), *TINY]) == 0
    return read(out)


def content(record: RunRecord, arm: str, level: int) -> tickets.Content:
    return tickets.read(cell_path(record.path, Cell(0, arm, level)), LENET.params)[0]


def test_cells_and_what_they_wait_for() -> None:
    some = config(seeds=(4,), reinits=2)
    assert some.rewind == (0, 20)
    found = {(cell.arm, cell.level, cell.draw): cell for cell in some.cells()}
    assert set(found) == {
        ("dense", 0, 0),
        ("start-20", 0, 0),
        *((f"ticket-{k}", level, 0) for k in (0, 20) for level in (1, 2)),
        *((f"reinit-{k}", 2, draw) for k in (0, 20) for draw in (0, 1)),
    }
    dense, start = Cell(4, "dense", 0), Cell(4, "start-20", 0)
    assert some.needs(dense) == some.needs(start) == ()
    assert some.needs(Cell(4, "ticket-0", 1)) == (dense,)
    assert some.needs(Cell(4, "ticket-20", 1)) == (start, dense)
    assert some.needs(Cell(4, "ticket-20", 2)) == (start, Cell(4, "ticket-20", 1))
    assert some.needs(Cell(4, "reinit-20", 2, 1)) == (Cell(4, "ticket-20", 1),)
    once = replace(some, one_shot=True, levels=(2, 3))
    assert {cell.level for cell in once.cells()} == {0, 2, 3}
    assert once.needs(Cell(4, "ticket-20", 3)) == (start, dense)


def test_dense_and_its_first_steps_are_those_of_imp(record: RunRecord, tmp_path: Path) -> None:
    """Dense, the weights of step 20, the first mask, and what tickets start from, to the bit."""
    words = "imp --seeds 0 --levels 1 --arms ticket --rewind 20 --out"
    assert run([*words.split(), str(tmp_path / "imp"), *TINY]) == 0
    imp = read(tmp_path / "imp")
    dense, first = content(imp, "ticket", 0), content(imp, "ticket", 1)
    assert dense.rewound is not None
    np.testing.assert_array_equal(content(record, "dense", 0).weights, dense.weights)
    np.testing.assert_array_equal(content(record, "start-20", 0).weights, dense.rewound)
    size = LENET.params.mask_size
    for k in (0, 20):
        mask, begun = first.mask, content(record, f"ticket-{k}", 1).rewound
        np.testing.assert_array_equal(content(record, f"ticket-{k}", 1).mask, mask)
        weights = init_weights(LENET, stream(0, "ticket", 0, "init")).numpy() if k == 0 else dense.rewound
        assert begun is not None
        np.testing.assert_array_equal(begun[:size], weights[:size] * mask)
        np.testing.assert_array_equal(begun[size:], weights[size:])


def test_each_step_has_a_chain_of_its_own_and_reinit_its_masks(record: RunRecord) -> None:
    masks = {k: content(record, f"ticket-{k}", 2).mask for k in (0, 20)}
    assert (masks[0] != masks[20]).any()
    for k, mask in masks.items():
        before, after = content(record, f"ticket-{k}", 1), mask
        for spec in LENET.weights:
            size, stays = np.abs(before.weights[spec.span]), after[spec.span]
            assert size[stays].min() >= size[before.mask[spec.span] & ~stays].max()
        fresh = content(record, f"reinit-{k}", 2)
        np.testing.assert_array_equal(fresh.mask, mask)
        assert fresh.rewound is None
    steps = {(e["arm"], e["step"]) for e in record.evaluations if e["level"] == 2}
    assert steps == {
        (f"{kind}-{k}", step) for kind in ("ticket", "reinit") for k in (0, 20) for step in (30, 60)
    }
    ticket = tickets.load(cell_path(record.path, Cell(0, "ticket-20", 2)))
    assert ticket.header["rewind_step"] == 20
    kept = torch.cat([p.flatten() for p in ticket.rewound().parameters()])
    assert torch.count_nonzero(kept) < 0.3 * kept.numel()


def test_points_and_table(record: RunRecord) -> None:
    told = record.config.told(record)
    assert {(p["arm"], p["level"], p["rewind_step"]) for p in told} == {
        ("dense", 0, 0),
        *((f"{kind}-{k}", 2, k) for kind in ("ticket", "reinit") for k in (0, 20)),
    }
    text = record.config.table(record)
    assert "it is open from which step on tickets beat reinit, with 1 seed" in " ".join(text.split())
    (row, _) = record.config.summary(record)
    assert row["ticket"]["mean"] - row["reinit"]["mean"] == pytest.approx(row["minus"]["reinit"]["mean"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rewind": (0, 60)}, "`rewind` 0,60: expected different steps from 0 to 59"),
        ({"rewind": (5, 5)}, "`rewind` 5,5: expected different steps"),
        ({"rewind": ()}, "`rewind` : expected different steps"),
        ({"levels": (0, 1)}, "`levels` 0,1: expected different levels from 1 to 100"),
        ({"score": "movement"}, "`score` movement: compares with the weights of one rewind step"),
        ({"levels": (80,)}, "`levels` 80: level 52 would prune nothing"),
    ],
)
def test_what_makes_no_experiment(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        config(**changes).check()


def said(leads: dict[int, list[float]]) -> str:
    """The sentence where tickets of step k are that far above fresh weights of 0.9, dense at 0.95."""
    plan = config(rewind=tuple(leads), seeds=(0, 1, 2, 3), dataset="mnist", eval_images=0)
    points = [{"arm": "dense", "level": 0, "seed": seed, report.ACCURACY: 0.95} for seed in range(4)]
    for k, gaps in leads.items():
        for seed, gap in enumerate(gaps):
            at = {"level": 2, "seed": seed}
            points.append(at | {"arm": f"ticket-{k}", report.ACCURACY: 0.9 + gap})
            points.append(at | {"arm": f"reinit-{k}", report.ACCURACY: 0.9})
    record: Any = SimpleNamespace(config=plan, points=points)
    return report.sentence(record)


def test_the_sentence_by_hand() -> None:
    """t of three degrees of freedom: 3.182; the second: sd 0.002, so 0.02 ± 0.0032; Holm asks more of two."""
    nothing, wins = [0.01, -0.01, 0.02, -0.02], [0.018, 0.022, 0.018, 0.022]
    found = said({0: nothing, 5: wins, 9: wins})
    assert "tickets beat reinit at step 5 (+2.00 ± 0.37 pp) and later; before, it is open at step 0" in found
    assert "(+0.00 ± 2.91 pp)" in found
    assert "3.00 ± 0.37 pp below dense" in found
    assert "tickets beat reinit from the first step on, at step 0 (+2.00" in said({0: wins, 5: wins})
    assert "tickets are not clearly above reinit: at step 0 (+0.00" in said({0: nothing, 5: nothing})
    assert "beat reinit at step 0 (+2.00 ± 0.37 pp); it is open at step 5" in said({0: wins, 5: nothing})
    assert "not all is measured yet" in said({0: wins, 5: []})
    assert "with 2 seeds" in said({0: wins[:2]})
