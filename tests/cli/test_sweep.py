"""`sparselth sweep`: its flags, its table, its JSON, its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from inline import Inline

from sparselth.cli import sweep as command
from sparselth.cli.experiment import parameters
from sparselth.cluster import price
from sparselth.cluster.executor import How
from sparselth.cluster.grid import Grid
from sparselth.cluster.local import Local
from sparselth.cluster.price import Cost
from sparselth.config import EXPERIMENTS
from sparselth.experiments.base import get_experiment

Cli = Callable[..., tuple[int, str, str]]
TINY = "--model lenet-300-100 --dataset mnist5k --seeds 0-2 --levels 1 --steps 60 --arms ticket"
RATES = f"sweep imp --grid rate=0.2,0.5 {TINY} --eval-images 250 --out sweep"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inline:
    """Runs are computed in this process, in a folder of the test's."""
    executor = Inline()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_executor", lambda flags: executor)
    monkeypatch.setattr(price, "cost", lambda planned, how: Cost({"rate=0.2": 90.0, "rate=0.5": 30.0}, 60.0))
    return executor


def test_table_show_json_figure_and_going_on(cli: Cli, here: Inline) -> None:
    code, out, err = cli(*RATES.split())
    assert code == 0
    assert "[2/2] rate=0.5: 6 cells in " in err
    assert "imp over rate 0.2, 0.5: 2 points, 2 of 2 runs finished" in out
    assert "rate=0.2" in out
    assert "of the weights, the sparsest that all points reach: rate=" in " ".join(out.split())
    assert "\nwall     " in out
    assert out.rstrip().endswith("sweep    sweep")
    assert max(map(len, out.splitlines())) <= 80
    assert Path("sweep/figures/sweep.png").exists()
    code, shown, _ = cli("show", "sweep")
    assert code == 0
    assert shown.partition("\nfigures")[0] in out
    document = json.loads(cli("show", "sweep", "--json")[1])
    assert document["schema"] == "sparselth.sweep/1"
    assert document["complete"] is True
    assert len(document["points"]) == 12
    assert document["points"][0]["grid"] == {"rate": 0.2}
    assert {one["seed"] for one in document["points"]} == {0, 1, 2}
    assert [len(one["levels"]) for one in document["summary"]] == [2, 2]
    assert document["best"]["minus"][0]["difference"]["seeds"] == 3
    assert cli("show", "sweep/rate=0.5")[0] == 0
    assert cli("show", "sweep", "--masks")[0] == 2
    listed = " ".join(cli("ls", "runs", "--out", ".")[1].split())
    assert listed == "sweep sweep of imp over rate, 2 points: finished"
    assert "rate=0.5 lenet-300-100 on mnist5k" in " ".join(cli("ls", "runs", "--out", "sweep")[1].split())
    code, _, _ = cli("sweep", "imp", "--out", "sweep", "--resume", "--grid", "rate=0.2,0.5,0.9")
    assert code == 0
    assert here.taken == ["rate=0.2", "rate=0.5", "rate=0.9"]
    assert json.loads(cli("show", "sweep", "--json")[1])["settings"]["seeds"] == [0, 1, 2]


def test_networks_of_a_file_s_are_swept_and_shown_without_it(cli: Cli, here: Inline) -> None:
    Path("net.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    words = TINY.replace("lenet-300-100", "net.py:make").replace("0-2", "0")
    code, out, _ = cli("sweep", "imp", "--grid", "lr=0.01,0.1", *words.split(), "--out", "sweep")
    assert code == 0
    Path("net.py").unlink()
    code, shown, _ = cli("show", "sweep")
    assert code == 0
    assert shown.partition("\nfigures")[0] in out


def test_a_failed_run_is_told_and_ends_with_1(cli: Cli, here: Inline) -> None:
    here.dying["rate=0.5"] = 2
    code, out, err = cli(*RATES.split())
    assert code == 1
    assert "failed: rate=0.5: its worker ended without a result" in out
    assert "1 of 2 runs failed (rate=0.5: its worker ended without a result); --resume tries" in err
    listed = " ".join(cli("ls", "runs", "--out", ".")[1].split())
    assert listed.endswith("2 points: 1 of 2 runs finished; 1 failed, --resume goes on")
    (row,) = json.loads(cli("ls", "runs", "--out", ".", "--json")[1])["runs"]
    assert row == {"run": "sweep", "experiment": "imp", "axes": {"rate": [0.2, 0.5]}, "cells": 12} | {
        "finished": 6,
        "diverged": 0,
        "failed": 1,
    }
    code, out, _ = cli(*RATES.split(), "--resume")
    assert code == 0
    assert "failed" not in out


def test_one_json_document_and_nothing_else(cli: Cli, here: Inline) -> None:
    code, out, err = cli(*RATES.split(), "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["wall"]["computed"] == 2


def test_what_a_user_must_know_is_said_to_the_quiet_too(
    cli: Cli, here: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a run: that another data set is taken, or that networks train one after another."""

    def planned(*_: Any, note: Callable[[str], None], **__: Any) -> None:
        note("NOT using MNIST")
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselth.cluster.sweep.plan", planned)
    code, out, err = cli(*RATES.split(), "--quiet")
    assert (code, out) == (130, "")
    assert "NOT using MNIST" in err


def test_dry_run_writes_nothing(cli: Cli, here: Inline, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = cli(*RATES.split(), "--dry-run")
    assert (code, out) == (0, "")
    assert "points   rate=0.2; rate=0.5" in err
    assert "price    about 1 min 0 s on 2 workers; all runs together 2 min 0 s, the longest" in err
    assert not Path("sweep").exists()
    planned = json.loads(cli(*RATES.split(), "--dry-run", "--json")[1])
    assert planned["schema"] == "sparselth.sweep-plan/1"
    assert planned["cells"] == 12
    assert (planned["price"]["wall"], planned["price"]["together"]) == (60.0, 120.0)
    assert planned["price"]["runs"]["rate=0.2"] == 90.0
    assert planned["missing"] == ["rate=0.2", "rate=0.5"]
    busy = Cost({"rate=0.2": 90.0, "rate=0.5": 30.0}, 180.0, 3.0)
    monkeypatch.setattr(price, "cost", lambda planned, how: busy)
    said = " ".join(cli(*RATES.split(), "--dry-run")[2].split())
    assert "about 3 min 0 s on 2 workers, 1 min 0 s without others here; all runs" in said
    monkeypatch.setattr(price, "cost", lambda planned, how: None)
    assert "price not known" in " ".join(cli(*RATES.split(), "--dry-run")[2].split())


def test_what_is_usual_of_a_data_set_yields_to_axes_and_to_the_sweep_that_goes_on(
    cli: Cli, here: Inline
) -> None:
    here.number = 1

    def planned(words: str) -> list[dict[str, Any]]:
        code, out, err = cli("sweep", "imp", *words.split(), "--dry-run", "--json", "--quiet")
        assert code == 0, err
        return [run["config"] for run in json.loads(out)["runs"]]

    models = planned("--dataset mnist1d --grid model=mnist1d-mlp")
    assert [one["model"] for one in models] == ["mnist1d-mlp"]
    levels = planned("--dataset mnist1d --grid levels=1,2")
    assert [(one["model"], one["levels"]) for one in levels] == [("mnist1d-mlp", 1), ("mnist1d-mlp", 2)]
    words = "--dataset mnist1d --levels 1 --seeds 0 --steps 20 --arms ticket --grid rate=0.2 --out sweep"
    assert cli("sweep", "imp", *words.split(), "--quiet")[0] == 0
    (again,) = planned("--dataset mnist1d --out sweep --resume")
    assert (again["levels"], again["seeds"]) == (1, [0])


def test_how_a_sweep_was_begun_is_how_it_goes_on(
    cli: Cli, here: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU --deterministic chooses the kernels, and a run goes on with no others."""
    words = [*RATES.split(), "--quiet"]
    assert cli(*words, "--deterministic", "--replicas", "2")[0] == 0
    asked = list[How]()

    def caught(grid: Grid, **more: Any) -> Any:
        asked.append(more["how"])
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselth.cluster.sweep.sweep", caught)
    cli("sweep", "imp", "--out", "sweep", "--resume", "--quiet")
    cli("sweep", "imp", "--out", "sweep", "--resume", "--replicas", "3", "--quiet")
    assert asked == [How(None, 2, True), How(None, 3, True)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("imp --grid rat=0.1", "did you mean 'rate'"),
        ("imp --grid rate", "--grid rate: expected a setting and its values"),
        ("imp --grid rate=0.1,x", "--grid rate: 'x' is not a valid float"),
        ("imp --grid rate=0.1 --grid rate=0.2", "an axis is given twice"),
        ("imp --grid scope=layr", "--grid scope: 'layr' is not one of 'layer', 'global'"),
        ("imp --grid rate=2", "--rate 2: expected a number between 0 and 1"),
        ("imp --grid rate=0.1 --rate 0.2", "is given as --rate, too"),
        ("imp", "expected an axis at least"),
        ("im --grid rate=0.1", "did you mean 'imp'"),
        ("imp --grid rate=0.1 --address auto", "--address: has no effect with --executor local"),
    ],
)
def test_what_is_wrong_is_one_line_of_usage(words: str, said: str, cli: Cli) -> None:
    code, out, err = cli("sweep", *words.split(), "--quiet")
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_flags_and_those_of_a_sweep(name: str) -> None:
    made = command.command(get_experiment(name))
    names = {param.name for param in made.params}
    theirs = {param.name for param in parameters(get_experiment(name))} - set(command.OTHERS)
    own = {"axes", "executor", "address", "workers", "out", "resume", "dry_run"}
    assert names == theirs | own
    words = [word for param in made.params if isinstance(param, click.Option) for word in param.opts]
    assert len(words) == len(set(words))


def test_values_are_those_that_the_flag_takes() -> None:
    imp, strong = get_experiment("imp"), get_experiment("strong")
    assert command.axis(imp, "rewind=2ep,5") == ("rewind", ["2ep", 5])
    assert command.axis(imp, "one-shot=true,false") == ("one_shot", [True, False])
    assert command.axis(imp, "arms=ticket;ticket,reinit") == ("arms", [("ticket",), ("ticket", "reinit")])
    assert command.axis(imp, "lr=1e-2,0.1") == ("lr", [0.01, 0.1])
    assert command.axis(strong, "keep=0.5;0.1,0.3") == ("keep", [(0.5,), (0.1, 0.3)])


def test_every_flag_of_the_sweep_reaches_the_library(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dict[str, Any]()

    def caught(grid: Grid, **more: Any) -> Any:
        asked.update(more, grid=grid)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparselth.cluster.sweep.sweep", caught)
    words = "--grid rate=0.1 --lr 0.5 --recipe paper --workers 3 --out there --resume --replicas 4"
    code, _, err = cli("sweep", "imp", *words.split(), "--deterministic", "--data-dir", ".")
    assert code == 130
    assert "before anything was computed" in err
    assert asked["executor"] == Local(3)
    assert (asked["out"], asked["resume"]) == (Path("there"), True)
    assert (asked["how"].replicas, asked["how"].deterministic) == (4, True)
    assert asked["how"].data_dir == str(tmp_path)
    assert asked["grid"] == Grid("imp", {"rate": [0.1]}, {"lr": 0.5}, "paper")
    cli("sweep", "imp", "--grid", "rate=0.1", "--executor", "ray", "--address", "host:1")
    assert (asked["executor"].name, asked["executor"].address) == ("ray", "host:1")
