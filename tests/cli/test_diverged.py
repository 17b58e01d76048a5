"""A network that diverges: left as it is and named, with the cells that need it; the others go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sparselth.config import Cell, Recipe
from sparselth.experiments import imp as imps
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.run import run
from sparselth.runs import read

Cli = Callable[..., tuple[int, str, str]]
FLAGS = (
    "imp --model lenet-300-100 --dataset mnist5k --steps 20 --levels 2 --seeds 0-1 --arms ticket,reinit -q"
)
BAD = Cell(1, "ticket", 1)
SAID = "seed 1 ticket level 1: training diverged before step 20 (validation loss "


def blow_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = imps.start_weights

    def weights(config: ImpConfig, place: Place, cell: Cell) -> Tensor:
        return real(config, place, cell) * (1e25 if cell == BAD else 1.0)

    monkeypatch.setattr(imps, "start_weights", weights)


@pytest.mark.parametrize("more", ["", "--replicas 8 --workers 1 --kernels reference"], ids=["alone", "batch"])
def test_the_others_go_on_and_reports_say_what_is_missing(
    more: str,
    figures: bool,
    cli: Cli,
    run_contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*FLAGS.split(), *more.split()]
    assert cli(*words, "--out", "well")[0] == 0
    blow_up(monkeypatch)
    code, out, err = cli(*words, "--out", "runs/bad")
    assert code == 3
    (line,) = err.strip().splitlines()
    assert line.startswith(f"sparselth: {SAID}")
    assert "use a smaller --lr" in line
    needy = "not computed, because they need what diverged: seed 1 ticket level 2, reinit level 2"
    assert line.endswith(needy)
    assert needy in " ".join(out.split())
    assert SAID in " ".join(out.split())
    assert "1 of 10 cells diverged: 7 of 10 cells are there" in " ".join(out.split())
    assert (tmp_path / "runs/bad/figures/accuracy.png").exists()
    assert not list((tmp_path / "runs/bad/checkpoints").iterdir())

    # everything else has the bits of a run in which nothing diverged
    well, bad = (run_contents(tmp_path / name) for name in ("well", "runs/bad"))
    files = [name for name in bad if name.startswith("cells/")]
    assert len(files) == 7
    assert all(bad[name] == well[name] for name in files)
    lines = bad["cells.jsonl"].splitlines()
    assert [line for line in well["cells.jsonl"].splitlines() if line in lines] == lines

    code, shown, _ = cli("show", "runs/bad")
    assert code == 0
    assert needy in " ".join(shown.split())
    document = json.loads(cli("show", "runs/bad", "--json")[1])
    assert document["complete"]
    assert len(document["points"]) == 7
    (diverged,) = document["diverged"]
    assert Cell.of(diverged) == BAD
    assert diverged["why"].replace("`lr`", "--lr") in line
    assert [Cell.of(cell).key for cell in document["not_computed"]] == ["seed1-ticket-02", "seed1-reinit-02"]
    assert "finished; 1 diverged" in " ".join(cli("ls", "runs")[1].split())
    (row,) = json.loads(cli("ls", "runs", "--json")[1])["runs"]
    assert (row["finished"], row["diverged"]) == (7, 1)

    # going on computes nothing, and says the same
    def compute(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(ImpConfig, "compute", compute)
    assert cli(*words, "--out", "runs/bad", "--resume") == (3, out, err)
    assert cli(*words, "--out", "runs/bad") == (3, out, err)
    assert run_contents(tmp_path / "runs/bad") == bad


def test_a_run_that_goes_on_has_the_same_bits_beside_what_diverged(
    cli: Cli,
    run_contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    blow_up(monkeypatch)
    assert cli(*FLAGS.split(), "--out", "run")[0] == 3
    expected = run_contents(tmp_path / "run")
    for lost in ("cells/seed0-ticket-01.safetensors", "cells/seed1-ticket-00.safetensors"):
        (tmp_path / "run" / lost).unlink()
    assert cli(*FLAGS.split(), "--out", "run", "--resume")[0] == 3
    assert run_contents(tmp_path / "run") == expected
    monkeypatch.setattr(ImpConfig, "draw", lambda *_: None)
    for damage in (b"null", b'{"seed": [], "arm": 1, "level": {}, "draw": 0, "why": 1}'):
        (tmp_path / "run/diverged/seed1-ticket-01.json").write_bytes(damage)  # then it diverges again
        assert cli(*FLAGS.split(), "--out", "run", "--resume")[0] == 3
        assert run_contents(tmp_path / "run") == expected


def test_a_run_in_which_everything_diverges(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*FLAGS.split(), "--lr", "1e6", "--out", "run", "--json")
    assert code == 3
    document = json.loads(out)
    assert (document["points"], len(document["diverged"]), len(document["not_computed"])) == ([], 2, 8)
    assert "seed 0 ticket level 0: training diverged before step 20" in err
    assert "seed 0 ticket levels 1-2, reinit levels 1-2; seed 1 ticket levels 1-2, reinit levels 1-2" in err
    code, out, err = cli("show", "run")
    assert (code, err) == (0, "")
    assert "2 of 10 cells diverged: 0 of 10 cells are there" in " ".join(out.split())


def test_progress_says_when_a_network_diverges(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    blow_up(monkeypatch)
    code, _, err = cli(*FLAGS.removesuffix(" -q").split(), "--out", "run")
    assert code == 3
    (line,) = [line for line in err.splitlines() if line.startswith(SAID)]
    assert line.endswith("use a smaller --lr; 2 cells that need it are not computed")


def test_in_python_it_is_a_warning_and_in_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ImpConfig(
        model="lenet-300-100", dataset="mnist5k", levels=1, seeds=(0,), recipe=Recipe(steps=10, lr=1e6)
    )
    with pytest.warns(UserWarning, match="seed 0 ticket level 0: training diverged before step 10"):
        record = run(config, out=tmp_path / "run", workers=1)
    assert record.complete
    assert [Cell.of(line) for line in record.diverged] == [Cell(0, "ticket", 0)]
    assert len(record.not_computed) == 3
    assert read(tmp_path / "run") == record
