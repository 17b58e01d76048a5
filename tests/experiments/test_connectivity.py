"""Instability: whose draws differ, where copies start, what a line is, how a run goes on, what is said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import pruning, tickets
from sparselth.cli.main import run
from sparselth.config import Cell, Recipe, config_from_json
from sparselth.data.batches import Batches, Resident
from sparselth.engine.state import Job, State
from sparselth.errors import UsageError
from sparselth.experiments import connectivity_jobs
from sparselth.experiments.base import Finished, Place
from sparselth.experiments.connectivity import ConnectivityConfig
from sparselth.files import load_arrays
from sparselth.report import connectivity as report
from sparselth.report import connectivity_figures
from sparselth.report.stats import Gap
from sparselth.runs import RunRecord, cell_path, read
from sparselth.train import fit

Cli = Callable[..., tuple[int, str, str]]
WORDS = (
    "connectivity --dataset mnist5k --steps 60 --eval-every 30 --rewind 0,20 --points 5 --line-images 200 "
    "--eval-images 200"
)
SHORT = [*WORDS.split(), "--workers", "1", "--quiet"]


def config(**changes: Any) -> ConnectivityConfig:
    values: dict[str, Any] = {
        "model": "lenet-300-100",
        "dataset": "mnist5k",
        "device": "cpu",
        "eval_images": 100,
        "recipe": Recipe(steps=60, lr=1.2e-3, eval_every=30, cosine=True),
        "rewind": (0, 20),
    }
    return ConnectivityConfig(**values | changes)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    out = tmp_path_factory.mktemp("runs") / "connectivity"
    assert run([*SHORT, "--seeds", "0-2", "--levels", "0,2", "--rate", "0.5", "--out", str(out)]) == 0
    return read(out)


def test_copies_are_two_where_a_line_is_asked_for() -> None:
    cells = config(seeds=(4,), levels=(0, 2), rewind=(0, 20)).cells()
    arms = {(cell.arm, cell.level, cell.draw) for cell in cells}
    assert len(arms) == len(cells)
    assert arms == {
        ("start-20", 0, 0),
        *((f"from-{k}", level, draw) for k in (0, 20) for level in (0, 2) for draw in (0, 1)),
        *((f"from-{k}", 1, 0) for k in (0, 20)),
        *((f"path-{k}", level, 0) for k in (0, 20) for level in (0, 2)),
    }


def test_what_cells_wait_for() -> None:
    some = config(levels=(0, 2))
    assert some.needs(Cell(0, "from-0", 0, 1)) == ()
    assert some.needs(Cell(0, "from-20", 0, 1)) == (Cell(0, "start-20", 0),)
    assert set(some.needs(Cell(0, "from-20", 2, 1))) == {Cell(0, "start-20", 0), Cell(0, "from-20", 1)}
    ends = {Cell(0, "from-20", 2), Cell(0, "from-20", 2, 1)}
    assert set(some.needs(Cell(0, "path-20", 2))) == {*ends, Cell(0, "from-20", 0)}
    assert set(some.needs(Cell(0, "path-0", 0))) == {Cell(0, "from-0", 0), Cell(0, "from-0", 0, 1)}


def test_lines_are_priced_by_some_lots_of_their_images(
    digits: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 s a lot: five points that are looked at together, on three lots of test and of training images."""
    some, ticks = config(seeds=(0, 1), levels=(0, 2), points=5, line_images=600), count()
    monkeypatch.setattr(connectivity_jobs, "TIMED", 1.5)
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    found = some.beforehand(digits)
    assert found == {
        Cell(seed, f"path-{k}", level): 6.0 * (2 if level else 1)
        for seed in (0, 1)
        for k in (0, 20)
        for level in (0, 2)
    }
    assert next(ticks) == 3  # after 2 s, and then no more
    assert {some.start_step(cell) for cell in found} == {60}


def test_copies_see_images_in_orders_of_their_own(digits: Resident) -> None:
    batches = Batches(digits, [Cell(0, "from-20", 0, draw) for draw in (0, 1)], 60, "crop-flip")
    one, other = batches.draw(0)
    n = len(digits.images)
    assert not torch.equal(one, other)
    seen = [set((order % n).flatten().tolist()) for order in (one, other)]
    assert len(seen[0] ^ seen[1]) < 120  # of the images behind the last full batch
    moved, (twin, _) = one // n, Batches(digits, [Cell(0, "from-20", 0, 0)] * 2, 60, "crop-flip").draw(0)
    assert not torch.equal(moved, other // n)
    assert torch.equal(one, twin)


@pytest.mark.parametrize("kernels", ["auto", "autograd"])
def test_steps_of_a_seed_lie_on_one_path(digits: Resident, tmp_path: Path, kernels: str) -> None:
    some = config(rewind=(0, 10, 25), kernels=kernels)
    (tmp_path / "cells").mkdir()
    place, found = Place(tmp_path, digits.sample(100), {}), {}
    for k in (10, 25):
        (done,) = some.compute([Cell(1, f"start-{k}", 0)], place) or ()
        assert isinstance(done, Finished)
        found[k] = tickets.read(cell_path(tmp_path, done.cell), some.network.params)[0].weights
    mask, weights = some.start(Cell(1, "from-0", 0), place)
    state = State.start(weights[None], some.recipe)
    job = Job(Cell(1, "x", 0), state, mask, keep_step=10, draws=Cell(1, "start", 0))
    asked = iter(range(10**6))
    fit(
        some.network,
        digits.sample(100),
        [job],
        some.recipe,
        kernels=kernels,
        should_stop=lambda: next(asked) > 24,
    )
    assert state.step == 25
    assert np.array_equal(state.weights[0].numpy(), found[25])
    assert state.kept_weights is not None
    assert np.array_equal(state.kept_weights[0].numpy(), found[10])


def test_tickets_keep_the_largest_and_go_back(record: RunRecord) -> None:
    some, params = record.config, record.config.network.params
    rungs = some.rungs()
    begun = tickets.read(cell_path(record.path, Cell(0, "start-20", 0)), params)[0]
    place = Place(record.path, None, {})
    before = tickets.read(cell_path(record.path, Cell(0, "from-20", 0)), params)[0]
    for level in (1, 2):
        mask, weights = some.start(Cell(0, "from-20", level), place)
        assert np.array_equal(weights.numpy(), begun.weights)
        assert params.kept(mask) == rungs[level]
        trained = torch.from_numpy(before.weights)[: params.mask_size].abs()
        kept = pruning.prune(params, trained, torch.from_numpy(before.mask), rungs[level], "reference")
        assert torch.equal(mask, kept)
        before = tickets.read(cell_path(record.path, Cell(0, "from-20", level)), params)[0]
        assert np.array_equal(before.mask, mask.numpy())
        assert not before.weights[: params.mask_size][~before.mask].any()
    twin = tickets.read(cell_path(record.path, Cell(0, "from-20", 2, 1)), params)[0]
    assert np.array_equal(twin.mask, before.mask)
    assert not np.array_equal(twin.weights, before.weights)


def test_copies_beside_each_other_write_what_they_write_alone(
    record: RunRecord, digits: Resident, tmp_path: Path
) -> None:
    """Their files too, to the byte: each says the rewind step that it began at."""
    some, together = record.config, [Cell(0, "from-0", 0), Cell(0, "from-20", 0)]
    (tmp_path / "cells").mkdir()
    begun = Cell(0, "start-20", 0)
    copy(cell_path(record.path, begun), cell_path(tmp_path, begun))
    assert some.compute(together, Place(tmp_path, digits, {}))
    for cell, k in zip(together, (0, 20), strict=True):
        file = cell_path(tmp_path, cell)
        assert tickets.read(file, some.network.params)[1]["rewind_step"] == k
        assert some.compute([cell], Place(tmp_path, digits, {})) is not None
    before = {cell: cell_path(tmp_path, cell).read_bytes() for cell in together}
    assert some.compute(together, Place(tmp_path, digits, {}))
    assert before == {cell: cell_path(tmp_path, cell).read_bytes() for cell in together}


def test_a_line_from_a_copy_to_itself_has_no_barrier(
    record: RunRecord, digits: Resident, tmp_path: Path
) -> None:
    """And ends are what the copies reached."""
    some, params = record.config, record.config.network.params
    cell, ends = Cell(0, "path-0", 0), [Cell(0, "from-0", 0, draw) for draw in (0, 1)]
    (tmp_path / "cells").mkdir()
    content, head = tickets.read(cell_path(record.path, ends[0]), params)
    for end in ends:
        where = {name: head[name] for name in ("model", "dataset", "config", "rewind_step")}
        tickets.save(cell_path(tmp_path, end), params, content, **where, cell=end.key)
    (done,) = some.compute([cell], Place(tmp_path, digits, {})) or ()
    assert isinstance(done, Finished)
    assert done.line["instability"] == done.line["train_instability"] == done.line["distance"] == 0.0
    (real,) = (p for p in record.points if Cell.of(p) == cell)
    assert real["distance"] > 0
    accuracies = [p["final_accuracy"] for p in record.points if Cell.of(p) in ends]
    assert [1 - real["error"][i] for i in (0, -1)] == pytest.approx(accuracies, abs=1e-9)


def test_points_have_what_was_asked(record: RunRecord) -> None:
    assert record.complete
    some = record.config
    told = some.told(record)
    assert [(p["seed"], p["rewind_step"], p["level"]) for p in told] == [
        (seed, k, level) for seed in (0, 1, 2) for k in (0, 20) for level in (0, 2)
    ]
    for p in told:
        errors = np.array(p["error"])
        assert len(errors) == len(p["train_error"]) == 5
        assert p["instability"] == pytest.approx(max(errors) - (errors[0] + errors[-1]) / 2)
        assert p["test_images"] == p["train_images"] == 200
        assert p["weights_remaining"] == pytest.approx(some.remaining()[p["level"]])
        assert ("dense_barrier" in p) == (p["level"] > 0)
        arrays, head = load_arrays(cell_path(record.path, Cell.of(p)))
        assert head["schema"] == connectivity_jobs.SCHEMA
        assert np.array_equal(arrays["error"], errors)
    assert config_from_json(json.loads((record.path / "config.json").read_text())) == some


def test_a_stopped_copy_goes_on_to_the_same_bits(record: RunRecord, digits: Resident, tmp_path: Path) -> None:
    some, places = record.config, list[Place]()
    for name in ("whole", "stopped"):
        for folder in ("cells", "checkpoints"):
            (tmp_path / name / folder).mkdir(parents=True)
        places.append(Place(tmp_path / name, digits, {}))
    whole, stopped = places
    for cell, asks in ((Cell(2, "start-20", 0), 8), (Cell(2, "from-20", 0, 1), 30)):
        asked = iter(range(10**6))
        assert some.compute([cell], whole)
        assert some.compute([cell], replace(stopped, should_stop=lambda a=asked, n=asks: next(a) > n)) is None
        assert [file.stem for file in (stopped.run / "checkpoints").iterdir()] == [cell.key]
        assert some.compute([cell], stopped)
        (stopped.run / "checkpoints" / f"{cell.key}.safetensors").unlink()
        assert cell_path(stopped.run, cell).read_bytes() == cell_path(whole.run, cell).read_bytes()


def test_a_run_goes_on_with_more(record: RunRecord, tmp_path: Path, figures: bool) -> None:
    out = tmp_path / "run"
    few = [*SHORT, "--seeds", "0", "--levels", "0", "--out", str(out)]
    assert run([*few, "--rate", "0.5"]) == 0
    first = {p["seed"]: p for p in read(out).config.told(read(out)) if p["rewind_step"] == 20}
    assert (
        run(
            [
                *SHORT,
                "--seeds",
                "0",
                "--levels",
                "0,1",
                "--rate",
                "0.5",
                "--rewind",
                "0,20,40",
                "--resume",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    more = read(out)
    assert len(more.config.told(more)) == 6
    same = next(p for p in more.config.told(more) if (p["rewind_step"], p["level"]) == (20, 0))
    other = next(p for p in record.config.told(record) if (p["rewind_step"], p["level"]) == (20, 0))
    assert same["error"] == first[0]["error"] == other["error"]
    for name in ("lines", "instability"):
        for kind in ("png", "svg"):
            assert (out / "figures" / f"{name}.{kind}").stat().st_size > 5000
    for make, curves in ((connectivity_figures._lines, 3), (connectivity_figures._instability, 2)):
        drawn = make(more)
        assert drawn is not None
        words = [text.get_text() for text in drawn.legends[0].get_texts()]
        rest = words.index("test")  # in a column of its own, behind the curves
        assert rest % (len(words) // drawn.legends[0]._ncols) == 0
        assert len([word for word in words[:rest] if word.strip()]) == curves


# ---- what is said


def test_words_follow_from_intervals() -> None:
    assert report.word(Gap(0.010, 0.001, 5)) == "stable"
    assert report.word(Gap(0.030, 0.001, 5)) == "unstable"
    assert (
        report.word(Gap(0.019, 0.001, 5)) == report.word(Gap(0.001, None, 2)) == report.word(None) == "open"
    )


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ((0.001, 0.001), "Dense networks are stable from the first step on: instability 0.10 ± "),
        (
            (0.2, 0.001),
            "Dense networks are stable from step 20 on: instability 0.10 ± 0.28 % at step 20, still 20.00 ± ",
        ),
        (
            (0.0201, 0.001),
            "Dense networks are stable from step 20 on: instability 0.10 ± 0.28 % at step 20, before it is "
            "open, 2.01 ± 0.28 % at step 0.",
        ),
        ((0.001, 0.2), "Dense networks are not stable by step 20: instability 20.00 ± "),
        ((0.2, 0.0201), "Whether dense networks are stable is open: instability 20.00 ± "),
    ],
)
def test_sentences(record: RunRecord, monkeypatch: Any, means: tuple[float, float], said: str) -> None:
    gaps = dict(zip((0, 20), means, strict=True))
    monkeypatch.setattr(report, "rise", lambda record, k, level, field="": Gap(gaps[k], 0.001, 5))
    assert report.sentence(record).startswith(said)


def test_the_table_and_its_json(record: RunRecord) -> None:
    text, rows = " ".join(record.config.table(record).split()), record.config.summary(record)
    assert text.count("start-") == 0
    for said in ("ense networks are", "ickets at 25", "Between dense and ticket"):
        assert said in text
    assert len(rows) == 4
    for row in rows:
        mean = np.mean(
            [
                p["instability"]
                for p in record.config.told(record)
                if (p["level"], p["rewind_step"]) == (row["level"], row["rewind_step"])
            ]
        )
        assert row["instability"]["mean"] == pytest.approx(mean)
        assert row["instability"]["half_width"] >= 1 / 200
    one = replace(record, points=[p for p in record.points if p["seed"] == 0])
    assert "open, with 1 seed" in one.config.table(one)
    nothing = replace(record, points=[])
    assert "not measured yet" in nothing.config.table(nothing)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewind": (0, 60)}, "`rewind` 0,60: expected different steps from 0 to 59"),
        ({"rewind": ()}, "`rewind` : expected different steps"),
        ({"levels": (1, 1)}, "`levels` 1,1: expected different levels"),
        ({"levels": (0, 90), "rate": 0.9}, "`levels` 0,90: level 12 would prune nothing"),
        ({"rate": 1.0}, "`rate` 1: expected a number between 0 and 1"),
        ({"line_images": 0}, "`line_images` 0: expected 1 or more"),
        ({"points": 2}, "`points` 2: expected 3 or more"),
        ({"points": 0, "line_images": None}, "`points` 0: expected 3 or more"),
    ],
)
def test_mistakes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        config(**changes).check()


def test_defaults_follow_the_recipe() -> None:
    assert config(rewind=None).rewind == (0, 1, 6)
    assert ConnectivityConfig().rewind == (0, 100, 500)
    assert ConnectivityConfig().line_images == 10_000
    assert config().line_images == 1000
    whole = ConnectivityConfig()
    assert sum(whole.recipe.steps - whole.start_step(cell) for cell in whole.cells()) < 1.3 * 5000 * 90
