"""docs/extending.md: its files as they stand there, through the command line and the library."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparselth import registry, sparse
from sparselth.config import EXPERIMENTS, config_from_json
from sparselth.data import DATASETS
from sparselth.errors import SparselthError
from sparselth.exchange import FORMATS
from sparselth.experiments.arms import ARMS
from sparselth.experiments.base import Experiment
from sparselth.experiments.run import run
from sparselth.frozen import METHODS
from sparselth.models import MODELS
from sparselth.registry import load_plugin
from sparselth.runs import read_config
from sparselth.scores import SCORES
from sparselth.sparse.forms import FORMS
from sparselth.tickets import load_ticket, save_ticket

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
Cli = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Use:
    """How a file of the page is used: in which list its thing is, and a run of so many cells."""

    listed: str
    name: str
    command: str
    cells: int


TINY = "--seeds 0 --steps 20 --workers 1"
LENET = f"imp --model lenet-300-100 --dataset mnist5k --levels 1 {TINY}"
USES = {
    "narrow.py": Use("models", "narrow-16", f"imp --model narrow-16 --levels 1 --arms ticket {TINY}", 2),
    "stripes.py": Use("datasets", "stripes", f"{LENET} --dataset stripes --arms ticket", 2),
    "saliency.py": Use("scores", "saliency", f"{LENET} --score saliency --arms ticket,reinit", 3),
    "signs.py": Use("arms", "signs", f"{LENET} --arms ticket,signs", 3),
    "by_size.py": Use(
        "methods",
        "by-size",
        f"strong by-size --model lenet-300-100 --dataset mnist5k --arms ticket {TINY}",
        1,
    ),
    "halves.py": Use(
        "experiments", "halves", f"halves --model lenet-300-100 --dataset mnist5k --levels 2 {TINY}", 3
    ),
}


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to forget every plugin; what a test registers is forgotten behind it."""
    known = (MODELS, DATASETS, SCORES, ARMS, METHODS, EXPERIMENTS, FORMS, FORMATS)
    before = [dict(each) for each in known]

    def call() -> None:
        for each, things in zip(known, before, strict=True):
            monkeypatch.setattr(each, "things", dict(things))  # type: ignore[union-attr]
        monkeypatch.setattr(registry, "_plugins", {})

    call()
    return call


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files of the page, which is the working folder."""
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_new_thing_is_one_file_of_10_to_40_lines() -> None:
    assert set(BLOCKS) == {*USES, "read_inputs.py", "npz.py"}
    for name, code in BLOCKS.items():
        assert 10 <= len(code.splitlines()) <= 40, name
    rows = re.findall(r"^\| (.+?) \| (`.+?) \| (.*?) \|", PAGE, re.MULTILINE)
    assert len(rows) == len(BLOCKS) + 1  # and a command
    for thing, inside, outside in rows:
        paths = re.findall(r"`(\S+?)`", inside)
        assert len(paths) == (2 if thing.startswith("command") else 1)
        assert outside == ("-" if thing.startswith("command") else "one file")
        for path in paths:
            found = ROOT / "sparselth" / path
            assert found.parent.is_dir() if "NAME" in path else found.is_file()


@pytest.mark.parametrize("file", USES)
def test_a_file_through_the_command_line_and_the_library(
    file: str,
    files: Path,
    cli: Cli,
    document: Callable[..., dict[str, Any]],
    forget: Callable[[], None],
    run_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    use = USES[file]
    words = [*use.command.split(), "--plugin", file]

    # known only with its file
    assert use.name not in [row["name"] for row in document("ls", use.listed)[use.listed]]
    code, _, err = cli(*use.command.split())
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"unknown {'command' if use.listed == 'experiments' else use.listed[:-1]} {use.name!r}" in err
    assert use.name in [row["name"] for row in document("--plugin", file, "ls", use.listed)[use.listed]]
    assert f"{use.name} " in cli("ls", use.listed)[1]

    # flags and the price
    code, out, _ = cli(words[0], "--help")
    assert code == 0
    for field in EXPERIMENTS[words[0]].__dataclass_fields__.values():
        if field.metadata.get("help") and not field.metadata.get("argument"):
            assert f"--{field.name.replace('_', '-')} " in out
    plan = document(*words, "--dry-run")
    assert plan["schema"] == f"sparselth.{words[0]}-plan/1"
    assert plan["cells"] == use.cells
    assert plan["seconds"] > 0

    # a run, its progress, table, folder and document
    code, out, err = cli(*words, "--out", "run")
    assert code == 0, err
    assert "\nprice    about" in err
    assert f"[{use.cells}/{use.cells}] seed 0 " in err
    assert " %: test " in err
    assert ("width  keep %  left %  " if words[0] == "strong" else "level  left %  ") in out
    shown_table = cli("show", "run")[1]
    assert shown_table in out
    shown = document("show", "run")
    assert shown["schema"] == f"sparselth.{words[0]}/1"
    assert shown["complete"] is True
    assert len(shown["points"]) == use.cells
    assert "finished" in cli("ls", "runs", "--out", ".")[1]

    # resumed, to the same bits; and without the file in one line
    before = run_contents(Path("run"))
    cell = max(Path("run", "cells").iterdir())
    cell.unlink()
    assert cli(words[0], "--resume", "--out", "run", "--quiet")[0] == 0
    assert cell.exists()
    assert run_contents(Path("run")) == before
    forget()
    for again in ([words[0], "--resume", "--out", "run"], ["show", "run"]):
        code, out, err = cli(*again)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert f"run: was begun with --plugin {files / file}; give it again" in err

    # the same by the library
    load_plugin(files / file)
    config = config_from_json(json.loads(Path("run", "config.json").read_text()))
    assert isinstance(config, Experiment)
    record = run(config, out=Path("library"), workers=1)
    assert record.complete
    assert record.config == read_config(Path("run"))
    assert run_contents(Path("library")) == before
    title, *_ = record.config.table(record).splitlines()
    assert title in shown_table


def test_a_form_through_convert_and_bench(files: Path, document: Callable[..., dict[str, Any]]) -> None:
    assert "read-inputs" not in [row["name"] for row in document("ls", "forms")["forms"]]
    model = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 7)).eval()
    with torch.no_grad():
        model[0].weight[:, 5:] = 0
    x = torch.randn(6, 48)
    load_plugin(files / "read_inputs.py")
    converted = sparse.convert(model, None, x, compact=False)
    assert all("read-inputs" in layer.times for layer in converted.report.layers)
    assert torch.allclose(converted(x), model(x), atol=1e-6)
    asked = ("bench", "--shape", "64x512", "--batch", "16", "--dtype", "fp32", "--all", "--quick")
    rows = document(*asked, "--plugin", "read_inputs.py")["rows"]
    (row,) = [row for row in rows if row["implementation"] == "read-inputs"]
    assert row["median_s"] > 0
    assert row["max_rel_error"] < 1e-5
    assert "read-inputs" in [row["name"] for row in document("ls", "forms")["forms"]]


def test_a_format_through_export_and_import(files: Path, cli: Cli) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    masks = {"0.weight": torch.rand(6, 8) < 0.3}
    ticket = load_ticket(save_ticket("t", model, masks, model.state_dict()))
    words = ["--plugin", "npz.py", "--out"]
    assert cli("ticket", "export", "t", "--to", "npz", *words, "x.npz")[0] == 0
    assert cli("ticket", "import", "x.npz", "--from", "npz", *words, "back")[0] == 0
    back = load_ticket("back")
    assert back.masks == ticket.masks
    assert all(torch.equal(tensor, back.snapshot[name]) for name, tensor in ticket.snapshot.items())
    assert "numpy's npz" in cli("ls", "formats", *words[:2])[1]


def test_spawned_workers_know_plugins(
    files: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    """As on CUDA: their configuration and data set are of classes and functions that plugins made."""
    plugins = [word for file in USES for word in ("--plugin", file)]
    words = ["halves", *plugins, "--model", "narrow-16", "--dataset", "stripes", "--quiet", *TINY.split()]
    assert cli(*words, "--out", "forked")[0] == 0
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr("sparselth.experiments.processes.multiprocessing.get_context", lambda _: context)
    code, _, err = cli(*words, "--out", "spawned")
    assert code == 0, err
    assert run_contents(Path("forked")) == run_contents(Path("spawned"))


def test_an_installed_package_names_its_module(files: Path, environment: dict[str, str]) -> None:
    info = files / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparselth]\nsigns = signs\nhalves = halves\n")
    environment["PYTHONPATH"] = f"{files}:{environment['PYTHONPATH']}"
    command = [sys.executable, "-m", "sparselth", "ls", "arms"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "signs           the ticket's mask, one magnitude a layer" in done.stdout
    command = [sys.executable, "-m", "sparselth", "halves", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Prune by magnitude before any training" in done.stdout


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "expected a Python file"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        (
            BLOCKS["signs.py"].replace('"signs"', '"ticket"'),
            "arm 'ticket': there is one of that name already",
        ),
    ],
)
def test_a_plugin_that_does_not_load_is_one_line(
    content: str | None, says: str, files: Path, cli: Cli
) -> None:
    file = files / "bad.py"
    if content is not None:
        file.write_text(content)
    code, out, err = cli("ls", "arms", "--plugin", str(file))
    assert code in (1, 2)
    assert (out, len(err.splitlines())) == ("", 1)
    assert f"--plugin {file}: " in err
    assert says in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("labels[1000:]\n", "labels[:1000]\n"), "expected 200 labels from 0 to 1"),
        (("dtype=np.uint8", "dtype=np.int64"), "expected bytes [1000, 1, 28, 28], got int64"),
        (("labels = draw", "labels = 1 + draw"), "expected 1,000 labels from 0 to 1 for its images"),
        (("draw = np", "draw = nowhere"), "NameError: name 'nowhere' is not defined"),
    ],
)
def test_a_data_set_that_is_not_what_it_says_is_one_line(
    change: tuple[str, str], says: str, files: Path, cli: Cli
) -> None:
    assert change[0] in BLOCKS["stripes.py"]
    (files / "stripes.py").write_text(BLOCKS["stripes.py"].replace(*change))
    code, _, err = cli(*USES["stripes.py"].command.split(), "--quiet", "--plugin", "stripes.py")
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"dataset stripes: {says}" in err


def test_a_plugin_is_loaded_once(files: Path) -> None:
    load_plugin(files / "signs.py")
    load_plugin(Path("signs.py"))
    assert list(ARMS).count("signs") == 1
    with pytest.raises(SparselthError, match="expected a Python file"):
        load_plugin(files)
