"""Shared by all tests: one thread, a small real data set, runs of a few seconds."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of a kernel

from sparselth.cli.main import run
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.neurons import NeuronsConfig
from sparselth.experiments.strong import StrongConfig
from sparselth.kernels._triton import INTERPRET
from sparselth.runs import RunRecord, read

if INTERPRET:
    from lean_interpreter import lean

    lean()
torch.set_num_threads(1)  # and so no thread pool that a forked worker would inherit
settings.register_profile("default", deadline=None, derandomize=True)
# a fault is noticed or not; which is the smallest case that shows it does not matter
settings.register_profile(
    "mutants", deadline=None, derandomize=True, max_examples=20, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported: no collection looks through it, nor copies it in a fork


@pytest.fixture(scope="session")
def digits() -> Resident:
    """The 5,000 digits inside the package, in evaluation batches of 250."""
    return Resident(load("mnist5k", Path()), "cpu", 250)


@pytest.fixture(scope="session")
def few() -> Resident:
    """A few of them, for Triton's interpreter: 56 to train on, 8 to validate, 10 to test."""
    images = load("mnist5k", Path())
    sizes = {"train_images": 64, "train_labels": 64, "test_images": 10, "test_labels": 10}
    cut: dict[str, Any] = {name: getattr(images, name)[:size] for name, size in sizes.items()}
    return Resident(replace(images, **cut), "cpu", 6)


@pytest.fixture
def figures() -> bool:
    """For tests in which runs of `imp` draw their figures; these take longer than a tiny run."""
    return True


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether runs of `imp` go without their figures, because the test does not ask for `figures`."""
    with pytest.MonkeyPatch.context() as patch:  # its own, so that a test's is undone in the test's order
        if without := "figures" not in request.fixturenames:
            for experiment in (ImpConfig, StrongConfig, NeuronsConfig):
                patch.setattr(experiment, "draw", lambda self, record, folder: None)
        yield without


@pytest.fixture
def imp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunRecord]:
    """`imp("--levels", "2")`: a tiny run by the command line, read back; asserts exit code 0."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str, out: str = "run", steps: int = 100) -> RunRecord:
        words = ["imp", "--model", "lenet-300-100", "--dataset", "mnist5k", "--seeds", "0,1", "--quiet"]
        assert run([*words, "--out", out, "--steps", str(steps), *flags]) == 0
        return read(Path(out))

    return call


@pytest.fixture(scope="session")
def made_before() -> dict[tuple[bool, *tuple[str, ...]], Path]:
    return {}


@pytest.fixture
def finished(
    imp: Callable[..., RunRecord],
    made_before: dict[tuple[bool, *tuple[str, ...]], Path],
    undrawn: bool,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., RunRecord]:
    """`finished("--levels", "2")`: the run of `imp`, to read or damage; computed once for all tests."""

    def call(*flags: str) -> RunRecord:
        if (key := (undrawn, *flags)) not in made_before:
            record = imp(*flags)
            made_before[key] = tmp_path_factory.mktemp("finished") / "run"
            shutil.copytree(record.path, made_before[key])
            return record
        shutil.copytree(made_before[key], tmp_path / "run")
        return read(Path("run"))

    return call


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cli("ls", "models")`: (exit code, stdout, stderr) of a command in this process."""

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(args))
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run that must not depend on when it was stopped: metrics, masks, weights."""
    names = ("config.json", "cells.jsonl", "evaluations.jsonl")
    files = [folder / name for name in names] + sorted((folder / "cells").iterdir())
    files += sorted((folder / "diverged").glob("*.json"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def run_contents() -> Callable[[Path], dict[str, bytes]]:
    return contents


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment for subprocesses: this checkout's package, no data folder."""
    here = Path(__file__).resolve().parents[1]
    kept = {k: v for k, v in os.environ.items() if k != "SPARSELTH_DATA"}
    return kept | {"PYTHONPATH": str(here)}


@pytest.fixture
def document(cli: Callable[..., tuple[int, str, str]]) -> Callable[..., dict[str, Any]]:
    """The one JSON document a command prints on stdout."""

    def call(*args: str) -> dict[str, Any]:
        code, out, _ = cli(*args, "--json")
        assert code == 0
        parsed: dict[str, Any] = json.loads(out)
        return parsed

    return call
