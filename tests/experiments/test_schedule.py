"""Schedules of pruning: their counts by hand, what each cell starts from, stopping, the recommendation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import tickets
from sparselth.config import Cell, Recipe
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.engine.state import Job, State
from sparselth.errors import UsageError
from sparselth.experiments.base import Finished, Place
from sparselth.experiments.schedule import Plan, ScheduleConfig, by_layer
from sparselth.experiments.schedule_jobs import _prune, start
from sparselth.models import get_model
from sparselth.report import schedule as report
from sparselth.runs import RunRecord, cell_path, checkpoint_path, read

Cli = Callable[..., tuple[int, str, str]]
LENET = get_model("lenet-300-100").params
RECIPE = Recipe(steps=40, lr=1.2e-3, eval_every=4)


def config(**values: Any) -> ScheduleConfig:
    found: dict[str, Any] = {"dataset": "mnist5k", "seeds": (0,), "recipe": RECIPE, "device": "cpu"}
    return ScheduleConfig(**found | values)


def place(run: Path, stop: Callable[[], bool] = lambda: False) -> Place:
    return Place(run, Resident(load("mnist5k", Path()), "cpu", 500), {}, should_stop=stop)


def test_all_schedules_keep_equally_many() -> None:
    for keep in (0.5, 0.1, 0.031):
        some = config(keep=keep)
        total = round(keep * 266_200)
        for arm, ladder in some.ladders.items():
            assert sum(ladder[0].values()) == 266_200
            assert sum(ladder[-1].values()) == total, arm
            assert all(
                all(after[name] <= before[name] for name in before) for before, after in pairwise(ladder)
            )


def test_rounds_by_hand() -> None:
    ladder = config(keep=0.3, rates=(0.5,)).ladder(Plan("rounds", 0.5, "global"))
    assert ladder == [{"all": 266_200}, {"all": 133_100}, {"all": 79_860}]
    ladder = config(keep=0.3).ladder(Plan("rounds", 0.2, "layer"))
    assert ladder[1] == {"fc1.weight": 188_160, "fc2.weight": 24_000, "fc3.weight": 900}
    assert len(ladder) == 7  # 0.8^5 is 0.328, 0.8^6 is 0.262
    assert ladder[-1] == by_layer(LENET, 79_860, {})


def test_layers_keep_what_rounds_of_a_fifth_leave() -> None:
    found = by_layer(LENET, round(0.21074 * 266_200), {})  # of seven rounds: 0.8^7 and 0.9^7
    share = 0.8**7
    assert found["fc1.weight"] / 235_200 == pytest.approx(share, rel=0.005)
    assert found["fc2.weight"] / 30_000 == pytest.approx(share, rel=0.005)
    assert found["fc3.weight"] / 1_000 == pytest.approx(0.9**7, rel=0.005)


def test_cubic_by_hand() -> None:
    some = config(keep=0.1)
    assert some.prune_steps == [4, 8, 12, 16, 20, 24, 28]
    whole, last = 266_200, 26_620
    assert some.cubic(4, "global") == {"all": whole}
    assert some.cubic(16, "global") == {"all": last + round((whole - last) / 8)}  # half way: (1/2)^3
    assert some.cubic(28, "global") == some.cubic(39, "global") == {"all": last}


def test_steps_that_are_spent() -> None:
    some = config(rates=(0.5,), rewind=10)
    assert some.spent(Cell(0, "dense", 0)) == 40
    assert some.spent(Cell(0, "one-shot-layer", 1)) == 40 + 30
    assert some.spent(Cell(0, "rounds-0.5-layer", 3)) == 40 + 3 * 30
    assert some.spent(Cell(0, "cubic-global", 1)) == some.spent(Cell(0, "erk", 1)) == 40


@pytest.fixture
def record(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "mnist5k", "--seeds", "0", "--steps", "40", "--eval-every", "4", "--rates", "0.5"]
    code, _, err = cli("schedule", *words, "--keep", "0.2", "--rewind", "3", "--out", "run", "--quiet")
    assert code == 0, err
    return read(Path("run"))


def test_every_cell_keeps_and_starts_from_what_it_says(record: RunRecord, cli: Cli) -> None:
    some, params = record.config, LENET

    def there(arm: str, level: int) -> tickets.Content:
        return tickets.read(cell_path(Path("run"), Cell(0, arm, level)), params)[0]

    rewound, at = there("dense", 0).rewound, place(Path("run"))
    assert rewound is not None
    for arm, ladder in some.ladders.items():
        for level in range(1, len(ladder)):
            content = there(arm, level)
            kept = params.kept(torch.from_numpy(content.mask))
            wanted = ladder[level]
            assert (sum(kept.values()) if "all" in wanted else kept) == (wanted.get("all") or wanted), arm
            assert not content.weights[: params.mask_size][~content.mask].any()
            if arm.startswith(("one-shot", "rounds")):
                before = there(*(("dense", 0) if level == 1 else (arm, level - 1)))
                mask, weights = start(some, Cell(0, arm, level), at)
                np.testing.assert_array_equal(weights.numpy(), rewound)
                np.testing.assert_array_equal(mask.numpy(), content.mask)
                sizes = np.abs(before.weights[: params.mask_size])
                if arm.endswith("global"):
                    assert sizes[content.mask].min() >= sizes[before.mask & ~content.mask].max()
    shares = {
        name: n / s.numel
        for s in params.weights
        for name, n in [(s.name, params.kept(torch.from_numpy(there("erk", 1).mask))[s.name])]
    }
    assert shares["fc3.weight"] == 1.0  # Erdős and Rényi's keep small layers whole
    assert shares["fc1.weight"] < 0.2 < shares["fc2.weight"]
    points = json.loads(cli("show", "run", "--json")[1])["points"]
    fields = {"schedule", "rate", "seed", "weights_remaining", "training_steps", "final_accuracy"}
    assert all(fields <= p.keys() for p in points)
    assert {p["training_steps"] for p in points if p["schedule"] == "one-shot"} == {40 + 37}
    assert (Path("run/figures/schedule.svg")).exists()
    assert "is open: 1 seed of some give no interval" in " ".join(cli("show", "run")[1].split())


def test_pruning_within_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    some, cell = config(keep=0.2), Cell(0, "cubic-layer", 1)
    for name in ("whole", "parts"):
        (tmp_path / name / "cells").mkdir(parents=True)
        (tmp_path / name / "checkpoints").mkdir()
    (whole,) = some.compute([cell], place(tmp_path / "whole")) or ()
    assert isinstance(whole, Finished)
    after, parts = 7, 0
    found = None
    while found is None:
        asked = iter(range(10**6))

        def stop(asked: Any = asked, after: int = after) -> bool:
            return next(asked) >= after

        found = some.compute([cell], place(tmp_path / "parts", stop))
        parts += 1
        assert found is not None or checkpoint_path(tmp_path / "parts", cell).exists()
        after += 3
        assert parts < 30
    assert parts > 2
    assert isinstance(found[0], Finished)
    assert found[0].line == whole.line
    files = [cell_path(tmp_path / name, cell).read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    # early stop looks only at what has the mask of the end
    assert whole.line["early_stop_step"] >= some.prune_steps[-1]


def test_what_is_dropped_leaves_neither_weight_nor_moment() -> None:
    some, cell = config(keep=0.2), Cell(0, "cubic-global", 1)
    mask, weights = start(some, cell, place(Path("none")))
    state = State.start(weights[None], some.recipe)
    for moment in state.moments:
        moment.fill_(1.0)
    state.best_loss = 0.1
    one = Job(cell, state, mask)
    _prune(some, one, some.cubic(16, "global"))
    gone, size = ~one.mask, LENET.mask_size
    assert int(one.mask.sum()) == some.cubic(16, "global")["all"]
    assert not state.weights[0, :size][gone].any()
    for moment in state.moments:
        assert not moment[0, :size][gone].any()
        assert (moment[0, :size][one.mask] == 1).all()
        assert (moment[0, size:] == 1).all()
    assert weights[:size][one.mask].abs().min() >= weights[:size][mask & gone].abs().max()
    assert (state.best_loss, state.best_step) == (float("inf"), 0)


def made(values: dict[str, list[float]]) -> RunRecord:
    """A run whose schedules have these accuracies by seed."""
    some = replace(config(rates=(0.5,), scopes=("global",)), seeds=(0, 1, 2))
    points = [
        {"seed": seed, "arm": arm, "level": 1, "draw": 0, "last": True, "final_accuracy": accuracy}
        | {"weights_remaining": 0.1, "training_steps": steps}
        for arm, (steps, *found) in values.items()
        for seed, accuracy in enumerate(found)
    ]
    return RunRecord(Path("run"), some, points, [])


DENSE = [40, 0.90, 0.91, 0.89]


def test_the_recommendation_is_the_cheapest_that_is_surely_as_good() -> None:
    values = {
        "dense": DENSE,
        "cubic-global": [40, 0.80, 0.81, 0.79],
        "one-shot-global": [80, 0.899, 0.910, 0.889],
        "rounds-0.5-global": [200, 0.90, 0.91, 0.89],
    }
    text = report.sentence(made(values))
    assert text.startswith("To 10 % of the weights take one shot, over all layers: 89.93")
    assert "against the best, 50 % a round, over all layers, which takes 2.5 times as many" in text
    front = report.front(report.rows(made(values)))
    assert [row.arm for row in front] == ["cubic-global", "one-shot-global", "rounds-0.5-global"]
    # where seeds disagree none of the cheaper ones is surely as good
    text = report.sentence(made(values | {"one-shot-global": [80, 0.95, 0.80, 0.94]}))
    assert "take 50 % a round" in text
    assert "of the cheaper ones none is surely within" in text
    # what is dearer and worse lies on no front
    front = report.front(report.rows(made(values | {"rounds-0.5-global": [200, 0.7, 0.7, 0.7]})))
    assert [row.arm for row in front] == ["cubic-global", "one-shot-global"]
    assert "open: 2 seeds" in report.sentence(made({"dense": DENSE, "cubic-global": [40, 0.8, 0.8]}))


def test_mistakes_are_told(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="`keep` 1: all weights would be kept; keep fewer"):
        config(keep=0.9999999).check()
    with pytest.raises(UsageError, match=r"`rewind` 40: expected a step from 0 to 39"):
        config(rewind=40).check()
    with pytest.raises(UsageError, match="cubic prunes as it evaluates"):
        config(recipe=replace(RECIPE, eval_every=40)).check()
    config(recipe=replace(RECIPE, eval_every=40), schedules=("one-shot",)).check()
    with pytest.raises(UsageError, match="a layer would keep no weight"):
        config(keep=1e-5).check()
    code, _, err = cli("schedule", "--schedules", "rouns", "--quiet")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "unknown schedule 'rouns': did you mean 'rounds'?" in err
