"""SIGINT, SIGTERM and SIGUSR1 in every phase of a run: an answer soon, and the truth."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from forks import Break, Ended, ask, command, small
from sparselth import data
from sparselth.data.batches import Batches
from sparselth.engine import break_even
from sparselth.engine.compressed import CompressedForward
from sparselth.experiments import jobs, pool, worker
from sparselth.experiments.imp import ImpConfig

LONG = 60.0  # seconds that something takes
FLAGS = (
    "imp --model lenet-300-100 --dataset mnist5k --levels 1 --seeds 0 --arms ticket --workers 1 --steps 30"
)


def slow(owner: Any, name: str, seconds: float = LONG, calls: int = 1) -> None:
    """In the fork: something takes long from that call on."""
    small(compressed=False)
    real, count = getattr(owner, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count >= calls:
            sys.audit("kill.slow")
            time.sleep(seconds)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def stopped(folder: Path, prepare: Callable[[], None], role: str, act: Any, *flags: str) -> Ended:
    """A run that something happens to where it is slow."""
    words = [*FLAGS.split(), "--out", str(folder), *flags]
    return command(words, Break(role, 1, act, "slow"), prepare)


PHASES: dict[str, tuple[Any, str, str]] = {
    "data": (partial(slow, data, "resolve"), "parent", " before anything was computed"),
    "break-even": (partial(slow, break_even, "break_even"), "parent", " before anything was computed"),
    "price": (partial(slow, worker, "measured"), "worker", "; 0 of 2 cells are finished in {run}"),
    "step": (
        partial(slow, Batches, "index", calls=25),
        "worker",
        "; 0 of 2 cells are finished, 1 under way were cut and go on from their last checkpoint if any in "
        "{run}",
    ),
    "evaluation": (
        partial(slow, CompressedForward, "sums", seconds=0.3, calls=2),
        "worker",
        "; 0 of 2 cells are finished, 1 under way are saved in {run}",
    ),
    "figures": (partial(slow, ImpConfig, "draw"), "parent", "; all cells are finished in {run}"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_is_answered_with_the_truth(phase: str, tmp_path: Path) -> None:
    prepare, role, said = PHASES[phase]
    number = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1][len(phase) % 3]
    quiet = [] if phase == "price" else ["--quiet"]
    ended = stopped(tmp_path / "run", prepare, role, ask(number), *quiet)
    assert ended.code == 130
    assert ended.after < LONG / 3
    line = ended.err.strip().splitlines()[-1]
    assert line.startswith(f"sparselth: stopped by {number.name}{said.format(run=tmp_path / 'run')}")
    assert ("--resume" in line) == (phase in ("price", "step", "evaluation"))
    saved = [*(tmp_path / "run").glob("checkpoints/*.safetensors")]
    assert bool(saved) == (phase in ("step", "evaluation"))  # the step's is of an evaluation before


@pytest.mark.parametrize("phase", ["data", "price"])
def test_a_dry_run_keeps_nothing_and_says_so(phase: str, tmp_path: Path) -> None:
    prepare, role, _ = PHASES[phase]
    ended = stopped(tmp_path / "run", prepare, role, ask(signal.SIGINT), "--dry-run")
    assert ended.code == 130
    assert ended.after < LONG / 3
    assert ended.err.strip().splitlines()[-1] == "sparselth: stopped by SIGINT; a dry run keeps nothing"
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice(parent: int) -> None:
        ask(signal.SIGINT)(parent)
        time.sleep(0.3)
        ask(signal.SIGINT)(parent)

    ended = stopped(tmp_path / "run", PHASES["step"][0], "worker", twice, "--quiet")
    assert (ended.code, ended.err) == (130, "")


def test_one_signal_to_a_process_and_to_its_group_is_one(tmp_path: Path) -> None:
    """As `timeout` sends it."""

    def twice(parent: int) -> None:
        ask(signal.SIGTERM)(parent)
        time.sleep(0.01)
        ask(signal.SIGTERM)(parent)

    ended = stopped(tmp_path / "run", PHASES["evaluation"][0], "worker", twice, "--quiet")
    assert ended.code == 130
    assert "1 under way are saved" in ended.err


def test_checkpoints_that_take_long_are_said_and_awaited(tmp_path: Path) -> None:
    def prepare() -> None:
        slow(jobs, "save_state", seconds=1.0)
        jobs.CHECKPOINT_SECONDS = LONG
        pool.GRACE = 0.1

    words = [*FLAGS.split(), "--out", str(tmp_path / "run")]
    ended = command(words, Break("worker", 2, ask(signal.SIGINT), "message"), prepare)
    assert ended.code == 130
    assert "writing checkpoints; another signal ends at once" in ended.err
    assert "1 under way are saved" in ended.err
