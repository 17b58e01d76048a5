"""Runs that are killed: whatever the moment, the files in the end are those of a run left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from sparselth.cli.main import main
from sparselth.files import load_arrays

FLAGS = "imp --model lenet-300-100 --dataset mnist5k --levels 2 --steps 250 --rewind 50 --quiet --resume"
SEEDS = "0-1"  # SIGKILL comes at two workers of two seeds, signals to save come at one seed: half the cells
Contents = Callable[[Path], dict[str, bytes]]


def launch(folder: Path, seeds: str = SEEDS) -> BaseProcess:
    """The command in a process of its own, forked from a server that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparselth.experiments.pool", "sparselth.report.figures"])
    words = [*FLAGS.split(), "--seeds", seeds, "--out", str(folder)]
    process = context.Process(target=main, args=(words,))
    process.start()
    return process


def complete(folder: Path, seeds: str = SEEDS) -> None:
    process = launch(folder, seeds)
    process.join(120)
    assert process.exitcode == 0


def finished_cells(folder: Path) -> int:
    file = folder / "cells.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(folder.with_name("warm-up"))
    began = time.monotonic()
    complete(folder)
    return folder, time.monotonic() - began


@pytest.fixture(scope="module")
def of_one_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-seed") / "run"
    complete(folder, "0")
    return folder


def test_sigkill_at_twenty_random_moments(
    undisturbed: tuple[Path, float], tmp_path: Path, run_contents: Contents
) -> None:
    expected, seconds = run_contents(undisturbed[0]), undisturbed[1]
    moments, kills, number = random.Random(0), 0, 0
    folder = tmp_path / "0"
    while kills < 20:
        process = launch(folder)
        process.join(moments.uniform(0.05, 0.7 * seconds))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join(10)
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        else:  # it came through: check it, and go on killing another one
            assert process.exitcode == 0
            assert run_contents(folder) == expected
            number += 1
            folder = tmp_path / str(number)
    complete(folder)
    assert run_contents(folder) == expected
    assert not list((folder / "checkpoints").iterdir())


def interrupted(folder: Path, number: int, moments: random.Random) -> bool:
    """Signal a run again and again until it is through; whether a cell was cut that had evaluated."""
    cut = False
    while True:
        before, process = finished_cells(folder), launch(folder, "0")
        while process.is_alive() and finished_cells(folder) < before + 2:
            time.sleep(0.01)
        process.join(moments.uniform(0, 0.4))  # of the third of a second that a cell takes
        if not process.is_alive():
            assert process.exitcode == 0
            return cut
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode in (130, 0)
        saved = [load_arrays(file)[1] for file in (folder / "checkpoints").glob("*.safetensors")]
        cut |= any(header["evaluations"] for header in saved)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(
    number: signal.Signals, of_one_seed: Path, tmp_path: Path, run_contents: Contents
) -> None:
    moments = random.Random(number)
    for run in range(20):  # when a cell is cut is chance: as many runs as it takes to cut one late
        folder = tmp_path / f"run-{run}"
        cut = interrupted(folder, number, moments)
        assert run_contents(folder) == run_contents(of_one_seed)
        if cut:
            return
    pytest.fail("no cell was cut after its first evaluation")


def test_a_dead_worker_is_named_and_the_run_goes_on_later(
    of_one_seed: Path, tmp_path: Path, run_contents: Contents
) -> None:
    folder = tmp_path / "run"
    process = launch(folder, "0")
    while not (folder / "cells.jsonl").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    process.join(30)
    assert process.exitcode == 1
    complete(folder, "0")
    assert run_contents(folder) == run_contents(of_one_seed)


def test_a_run_under_way_is_not_run_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = launch(folder, "0")
    while not (folder / "cells.jsonl").exists():
        time.sleep(0.01)
    second = launch(folder, "0")
    second.join(60)
    assert second.exitcode == 1
    first.join(60)
    assert first.exitcode == 0
