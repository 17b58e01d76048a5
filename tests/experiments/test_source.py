"""Experiments about a finished run: what they read of it, remember of it, and refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparselth.config import EXPERIMENTS, Cell, option
from sparselth.errors import SparselthError, UsageError
from sparselth.experiments.base import Experiment, Finished, Place
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.run import run
from sparselth.experiments.source import FromRun
from sparselth.files import save_arrays
from sparselth.runs import RunRecord, cell_path, read

Cli = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True, kw_only=True)
class Reader(FromRun):
    """Says how many weights the tickets of a run keep."""

    name = "reader"
    seeds: tuple[int, ...] = option(None, "Seeds.", extends=True)
    levels: int = option(1, "Levels.", extends=True)

    def take(self, imp: ImpConfig) -> None:
        if self.seeds is None:
            object.__setattr__(self, "seeds", imp.seeds)

    def cells(self) -> list[Cell]:
        return [Cell(seed, "kept", level) for seed in self.seeds for level in range(1, self.levels + 1)]

    def source_cells(self) -> list[Cell]:
        return [Cell(cell.seed, "ticket", cell.level) for cell in self.cells()]

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished]:
        done = []
        for cell in cells:
            found = self.ticket(Cell(cell.seed, "ticket", cell.level))
            assert found.rewound is not None
            save_arrays(cell_path(place.run, cell), {"rewound": found.rewound}, {})
            line = {"kept": int(found.mask.sum()), "total": float(np.abs(found.weights).sum())}
            done.append(Finished(cell, line, [], {}))
        return done

    def table(self, record: RunRecord) -> str:
        return "\n".join(f"{p['level']} {p['kept']}" for p in record.points)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"reader": Reader})


@pytest.fixture
def source(finished: Callable[..., RunRecord]) -> RunRecord:
    return finished("--levels", "2", "--arms", "ticket")


def test_masks_weights_and_their_start_are_those_of_the_run(source: RunRecord, cli: Cli) -> None:
    code, _, err = cli("reader", "run", "--levels", "2", "--out", "read", "--quiet")
    assert code == 0, err
    points = {(p["seed"], p["level"]): p for p in read(Path("read")).points}
    assert len(points) == 4
    for p in source.points:
        if p["level"]:
            assert points[p["seed"], p["level"]]["kept"] == sum(p["kept"].values())
    config = read(Path("read")).config
    model = source.config.network
    found = config.ticket(Cell(1, "ticket", 2))
    first = config.ticket(Cell(1, "ticket", 1))
    for spec in model.params.weights:
        mask = source.mask(1, 2, spec.name).ravel()
        np.testing.assert_array_equal(found.mask[spec.span], mask)
        assert (found.weights[spec.span][mask] != 0).mean() > 0.9
    assert found.rewound is not None
    assert first.rewound is not None
    np.testing.assert_array_equal(found.rewound, first.rewound)  # before the mask
    assert config.imp == source.config


def test_a_run_goes_on_with_its_source_alone(source: RunRecord, cli: Cli) -> None:
    assert cli("reader", "run", "--out", "read", "--quiet")[0] == 0
    # elsewhere it is the same run, and more of it may be asked for
    Path("run").rename("moved")
    code, _, err = cli("reader", "moved", "--levels", "2", "--out", "read", "--resume", "--quiet")
    assert code == 0, err
    assert len(read(Path("read")).points) == 4
    assert read(Path("read")).config.source == "moved"
    shutil.rmtree("moved")
    assert cli("show", "read")[0] == 0  # it says what it was read from by itself


def test_another_source_is_refused_in_a_line(
    source: RunRecord, imp: Callable[..., RunRecord], cli: Cli
) -> None:
    assert cli("reader", "run", "--out", "read", "--quiet")[0] == 0
    imp("--levels", "2", "--arms", "ticket", "--rate", "0.3", out="other")
    code, out, err = cli("reader", "other", "--out", "read", "--resume", "--quiet")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "holds a run with another source (run, " in err
    assert "there, other, " in err
    # of the same configuration, but its tickets came out otherwise
    shutil.rmtree("other")
    shutil.copytree("run", "other")
    shutil.rmtree("run")
    config = Reader(source="other", levels=1)
    sums = [entry.replace("seed0-ticket-01 ", "seed0-ticket-01 0") for entry in config.source_files]
    with pytest.raises(SparselthError, match="another ticket seed0-ticket-01 of its source"):
        run(
            Reader(source="other", source_config=config.source_config, source_files=tuple(sums)),
            out="read", resume=True,
        )  # fmt: skip


def test_a_ticket_that_was_changed_is_refused(source: RunRecord) -> None:
    config = Reader(source="run", levels=2)
    file = cell_path(Path("run"), Cell(0, "ticket", 2))
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(
        SparselthError, match=r"seed0-ticket-02\.safetensors: is not the ticket that this run"
    ):
        config.ticket(Cell(0, "ticket", 2))
    with pytest.raises(SparselthError, match="is not what was written; continue its run with `resume`"):
        Reader(source="run", levels=2)
    file.unlink()
    with pytest.raises(SparselthError, match=r"seed0-ticket-02\.safetensors: cannot be read"):
        config.ticket(Cell(0, "ticket", 2))


def test_what_is_no_source_is_told_in_a_line(source: RunRecord, cli: Cli, tmp_path: Path) -> None:
    said = {
        (): "reader: expected the folder of a run of imp",
        ("nowhere",): "nowhere: not a run folder",
        (
            "run",
            "--levels",
            "3",
        ): "run: has no finished seed 0 ticket level 3; it has tickets of seeds 0,1 up to level 2",
        ("run", "--seeds", "0,7"): "run: has no finished seed 7 ticket level 0",
    }
    for words, text in said.items():
        code, out, err = cli("reader", *words, "--quiet")
        assert (code in (1, 2), out, len(err.splitlines())) == (True, "", 1), err
        assert text in err
    assert cli("reader", "run", "--out", "read", "--quiet")[0] == 0
    assert "is a run of reader; expected one of imp" in cli("reader", "read", "--quiet")[2]
    assert " RUN" in cli("reader", "--help")[1].splitlines()[0]


def test_a_flag_in_place_of_an_argument(source: RunRecord, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Reader):
        """Reads by a flag."""

        name = "other-reader"
        source: str = option("", "Folder of a run of `imp`.", also="from")

    monkeypatch.setitem(EXPERIMENTS.things, "other-reader", Other)
    assert cli("other-reader", "--from", "run", "--out", "a", "--quiet")[0] == 0
    assert cli("other-reader", "--source", "run", "--out", "a", "--quiet")[0] == 0
    assert "--from, --source" in cli("other-reader", "--help")[1]
    assert isinstance(read(Path("a")).config, Experiment)
    with pytest.raises(UsageError, match="other-reader: expected the folder"):
        Other().check()
    assert torch.is_tensor(torch.from_numpy(read(Path("a")).config.ticket(Cell(0, "ticket", 1)).weights))
