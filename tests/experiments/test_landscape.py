"""Slices, lines and sharpness around the networks of a run: what is told, from where, and what follows."""

from __future__ import annotations

import re
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparselth import tickets
from sparselth.cli.main import run
from sparselth.config import Cell
from sparselth.data.batches import Resident
from sparselth.errors import SparselthError, UsageError
from sparselth.experiments.base import Finished, Place
from sparselth.experiments.landscape import LandscapeConfig
from sparselth.files import load_arrays
from sparselth.report import landscape as report
from sparselth.report import landscape_figures as figures
from sparselth.report.stats import Gap
from sparselth.runs import RunRecord, cell_path, read

SOURCE = "imp --model lenet-300-100 --dataset mnist5k --steps 60 --eval-every 60 --eval-images 200 --rate 0.5"
WORDS = ["--grid", "5", "--images", "200", "--workers", "1", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "imp"
    words = [
        "--arms",
        "ticket,random-mask",
        "--levels",
        "2",
        "--seeds",
        "0-2",
        "--workers",
        "1",
        "--quiet",
        "--out",
        str(out),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparselth.experiments.imp.ImpConfig.draw", lambda self, record, folder: None)
        assert run([*SOURCE.split(), *words]) == 0
    return out


@pytest.fixture(scope="module")
def record(source: Path) -> RunRecord:
    out = source.with_name("landscape")
    assert run(["landscape", str(source), *WORDS, "--level", "0,2", "--out", str(out)]) == 0
    return read(out)


def test_points_have_what_was_asked(record: RunRecord) -> None:
    some = record.config
    assert record.complete
    assert some.arms == ("ticket", "random-mask")
    told = {(p["seed"], p["arm"], p["level"]): p for p in some.told(record)}
    assert {*told} == {
        (seed, *where) for seed in (0, 1, 2) for where in (("ticket", 0), ("ticket", 2), ("random-mask", 2))
    }
    for (seed, arm, level), p in told.items():
        grid = np.array(p["grid"])
        assert grid.shape == (5, 5)
        assert grid[2, 2] == pytest.approx(p["loss"], rel=1e-4)
        arrays, _ = load_arrays(cell_path(record.path, Cell(seed, arm, level)))
        np.testing.assert_allclose(arrays["grid"], grid, rtol=1e-5)
        places = np.stack(np.meshgrid(arrays["side"], arrays["side"], indexing="ij"), -1)
        near = np.linalg.norm(places, axis=-1) <= 0.5
        assert near.sum() == 5
        assert p["rise"] == pytest.approx(float(grid[near].mean() - grid[2, 2]), rel=1e-3, abs=1e-5)
        assert p["largest_eigenvalue"] == max(p["eigenvalues"]) > 0
        assert p["weights_remaining"] == pytest.approx(some.imp.remaining()[level])
        if not level:
            assert "to" not in p
            continue
        end = told[seed, "ticket", 0 if arm == "ticket" else level]
        assert p["to"] == ("dense" if arm == "ticket" else "ticket")
        assert 1 - p["error"][0] == pytest.approx(p["test_accuracy"], abs=1e-9)
        assert 1 - p["error"][-1] == pytest.approx(end["test_accuracy"], abs=1e-9)
        assert 1 - p["train_error"][-1] == pytest.approx(end["train_accuracy"], abs=1e-9)
        assert p["barrier"] == pytest.approx(max(p["error"]) - (p["error"][0] + p["error"][-1]) / 2)


def test_losses_are_those_of_the_trained_network(record: RunRecord, source: Path, digits: Resident) -> None:
    import torch
    import torch.nn.functional as F

    from sparselth.models.torch import network

    cell = Cell(1, "random-mask", 2)
    model = record.config.network
    content, _ = tickets.read(cell_path(source, cell), model.params)
    x, y = (torch.cat(part) for part in zip(*digits.training_first(1, 200), strict=True))
    output = network(model, torch.from_numpy(content.weights)).double().eval()(x.double()).detach()
    (point,) = (p for p in record.points if Cell.of(p) == cell)
    assert point["loss"] == pytest.approx(float(F.cross_entropy(output, y)), rel=1e-5)
    assert point["train_accuracy"] == pytest.approx(float((output.argmax(1) == y).double().mean()))


def test_directions_of_a_seed_are_the_same_for_all(record: RunRecord) -> None:
    """So where two masks agree, filters of the same length go the same way; another seed's go another."""
    import torch

    from sparselth.engine.many import direction
    from sparselth.params import matrix
    from sparselth.streams import stream

    params = record.config.network.params
    weights = torch.ones(params.size)
    full = params.full_mask()
    half = full.clone()
    half[::2] = False
    whole, some = (
        direction(params, weights, m, stream(0, "landscape", 0, "direction/0")) for m in (full, half)
    )
    spec = params.weights[0]
    one, other = (matrix(spec, found)[0] for found in (whole, some))
    kept = matrix(spec, half)[0]
    torch.testing.assert_close(one[kept] / one[kept].norm(), other[kept] / other[kept].norm())
    assert not other[~kept].any()


def test_a_stopped_cell_is_computed_again_to_the_same_bits(
    record: RunRecord, digits: Resident, tmp_path: Path
) -> None:
    (tmp_path / "cells").mkdir()
    place, cell = Place(tmp_path, digits, {}), Cell(0, "ticket", 2)
    asks = iter(range(10**6))
    assert record.config.compute([cell], replace(place, should_stop=lambda: next(asks) > 3)) is None
    assert not [*(tmp_path / "cells").iterdir()]
    found = []
    for _ in range(2):
        (done,) = record.config.compute([cell], place) or ()
        assert isinstance(done, Finished)
        found.append(cell_path(tmp_path, cell).read_bytes())
    assert found[0] == found[1]
    (there,) = (p for p in record.points if Cell.of(p) == cell)
    assert done.line["largest_eigenvalue"] == pytest.approx(there["largest_eigenvalue"], rel=1e-4)


def test_a_run_goes_on_with_more_and_draws(record: RunRecord, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["landscape", str(source), *WORDS, "--seeds", "0", "--out", str(out)]
    assert run([*words, "--arms", "ticket"]) == 0
    assert "nothing is said of flatter" in " ".join(read(out).config.table(read(out)).split())
    assert run([*words, "--arms", "ticket,random-mask", "--resume"]) == 0
    more = read(out)
    assert [p["arm"] for p in more.points] == ["ticket", "random-mask"]
    assert {p["level"] for p in more.points} == {2}  # 25 % are nearest to a fifth
    text = " ".join(more.config.table(more).split())
    assert "it is open with 1 seed whether the ticket's minimum is flatter" in text
    for name in ("slices", "eigenvalues", "lines"):
        for kind in ("png", "svg"):
            assert (out / "figures" / f"{name}.{kind}").stat().st_size > 5000


# ---- what is said


def test_ratios_are_paired_by_seed(record: RunRecord) -> None:
    found = {(p["seed"], p["arm"]): p["largest_eigenvalue"] for p in record.points if p["level"]}
    logs = [log(found[seed, "ticket"] / found[seed, "random-mask"]) for seed in (0, 1, 2)]
    gap = report.ratio(record, 2, "random-mask")
    assert gap is not None
    assert gap.mean == pytest.approx(np.mean(logs))
    assert gap.half == pytest.approx(4.302653 * np.std(logs, ddof=1) / 3**0.5)
    (row,) = (row for row in record.config.summary(record) if row["arm"] == "random-mask")
    assert row["ticket_eigenvalue_ratio"]["mean"] == pytest.approx(exp(gap.mean))
    nothing = replace(record, points=[])
    assert report.ratio(nothing, 2, "random-mask") is None
    assert nothing.config.table(nothing)


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (Gap(log(0.5), 0.1, 5), "At 25.1 % the ticket's minimum is flatter: the largest eigenvalue is 0.50"),
        (Gap(log(2.0), 0.1, 5), "At 25.1 % the ticket's minimum is sharper: the largest eigenvalue is 2.00"),
        (Gap(log(1.1), 0.1, 5), "At 25.1 % it is open whether the ticket's minimum is flatter: the largest"),
    ],
)
def test_sentences(record: RunRecord, monkeypatch: pytest.MonkeyPatch, gap: Gap, said: str) -> None:
    monkeypatch.setattr(report, "ratio", lambda record, level, arm: gap)
    assert report.sentence(record).startswith(said)


def test_several_levels_are_a_figure_and_are_read_at_once(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "levels.svg" in [file.name for file in figures.draw(record, tmp_path)]
    assert figures.draw(record, tmp_path) == []
    (tmp_path / "levels.svg").unlink()  # as an older version left it
    assert "levels.svg" in [file.name for file in figures.draw(record, tmp_path)]
    # t of -3 from five seeds: a two-sided p of 0.04, which stands alone and not beside another
    monkeypatch.setattr(report, "ratio", lambda record, level, arm: Gap(-0.3, 0.1, 5))
    assert "the ticket's minimum is flatter" in report.sentence(record)
    assert "read at once" in record.config.table(record)
    places = [(0, "ticket"), (1, "random-mask"), (2, "random-mask")]
    monkeypatch.setattr(report, "rows", lambda record: places)
    assert report.sentence(record).count("it is open whether the ticket's minimum is flatter") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": ("reinit",)}, "has no finished seed 0 reinit level 2; it has tickets of seeds 0,1,2 up to"),
        ({"arms": ()}, "`arms` : expected different arms"),
        (
            {"level": (3,)},
            "has no finished seed 0 ticket level 3; it has tickets of seeds 0,1,2 up to level 2",
        ),
        ({"seeds": (7,)}, "has no finished seed 7 ticket level 0"),
        ({"grid": 6}, "`grid` 6: expected an odd number from 3 to 501"),
        ({"grid": 0, "images": None}, "`grid` 0: expected an odd number from 3 to 501"),
        ({"radius": 0.0}, "`radius` 0: expected a positive number"),
        ({"arms": ("random-mask",), "level": (0,)}, "`arms` random-mask: level 0 is the dense network"),
    ],
)
def test_mistakes(source: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((UsageError, SparselthError), match=re.escape(said)):
        LandscapeConfig(source=str(source), **changes).check()


def test_a_run_of_something_else_is_refused(record: RunRecord) -> None:
    with pytest.raises(UsageError, match="expected one of imp"):
        LandscapeConfig(source=str(record.path))
    with pytest.raises(UsageError, match="expected the folder of a run of imp"):
        LandscapeConfig().check()


def test_defaults_follow_the_source(source: Path) -> None:
    some = LandscapeConfig(source=str(source))
    assert (some.grid, some.images, some.level, some.seeds) == (51, 1000, (2,), (0, 1, 2))
    assert some.dataset == "mnist5k"
    assert (some.seconds(some.cells()[0]) or 0) > 10
