"""Runs that are killed: whatever the moment, the files in the end are those of a run left alone.

A few moments of every kind; `make kill-test` tries SPARSELTH_KILLS of them, and as many drawn in time, and
prints them.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from forks import Break, Ended, ask, command, kill_parent, kill_self, small
from sparselth.experiments import jobs
from sparselth.files import load_arrays

KILLS = int(os.environ.get("SPARSELTH_KILLS", "0"))
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
COLOURS = '''
"""A few coloured squares of noise, for networks that take 3 x 32 x 32."""
import numpy as np
from sparselth.data import DatasetSpec, register

def read(folder):
    draw = np.random.default_rng(0)
    labels = draw.integers(10, size=140)
    images = draw.integers(128, size=(140, 3, 32, 32)) + 12 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return images[:120], labels[:120], images[120:], labels[120:]

register(DatasetSpec(name="colours", title="coloured noise", shape=(3, 32, 32), classes=10,
    mean=(0.4,) * 3, std=(0.2,) * 3, n_train=120, n_test=20, read=read))
'''
NET = '''
"""A network of a user's, which drops out and counts its batches."""
from torch import nn

def make(classes):
    return nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(256, classes))
'''
Contents = Callable[[Path], dict[str, bytes]]


@dataclass(frozen=True)
class Kind:
    """A run to kill, how many kills of a test and of `make kill-test` are its own, and its files."""

    flags: str
    kills: int
    share: float
    every: int = 10


KINDS = {
    "chains": Kind(
        "imp --model narrow-16 --plugin narrow.py --dataset stripes --plugin stripes.py --levels 2 --seeds 0 "
        "--arms ticket,reinit --steps 30 --rewind 5 --batch-size 20 --workers 2",
        *(6, 0.25),
    ),
    "strong": Kind(
        "strong iterand --model narrow-16 --plugin narrow.py --dataset stripes --plugin stripes.py --seeds 0 "
        "--keep 0.3 --width 0.5,1 --steps 30 --every 7 --eval-every 10 --batch-size 20 --workers 2",
        *(3, 0.25),
    ),
    "plug-in": Kind(
        "halves --plugin halves.py --plugin stripes.py --plugin narrow.py --model narrow-16 "
        "--dataset stripes --seeds 0 --workers 2 --steps 30 --batch-size 20",
        *(3, 0.25),
    ),
    "module": Kind(
        "imp --model net.py:make --plugin stripes.py --dataset stripes --levels 1 --seeds 0 --rewind 5 "
        "--steps 30 --eval-every 10 --batch-size 20 --workers 2",
        *(3, 0.25),
    ),
    "resnet20": Kind(
        "imp --plugin colours.py --model resnet20 --dataset colours --levels 1 --seeds 0 --workers 1 "
        "--arms ticket --steps 4 --batch-size 4",
        *(2, 0.25, 2),
    ),
}


@pytest.fixture
def start(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """`start("run", at=...)`: the run of the test's kind, begun or resumed in a folder."""
    kind = KINDS[getattr(request, "param", "chains")]
    monkeypatch.chdir(tmp_path)
    for name, text in (FILES | {"colours.py": COLOURS, "net.py": NET}).items():
        Path(name).write_text(text)

    def call(out: str, at: Break | None = None, **more: object) -> Ended:
        words = [*kind.flags.split(), "--quiet", "--resume", "--out", str(tmp_path / out)]
        prepare = more.pop("prepare", partial(small, kind.every))
        return command(words, at, prepare=prepare, **more)  # type: ignore[arg-type]

    return call


def whole(ended: Ended) -> bool:
    assert "Traceback" not in ended.err, ended.err
    return ended.code == 0


@pytest.mark.parametrize(("start", "kind"), [(name, name) for name in KINDS], indirect=["start"])
def test_whatever_is_killed_at_whatever_event_nothing_is_lost(
    start: Callable[..., Ended], kind: str, tmp_path: Path, run_contents: Contents
) -> None:
    """The command at an event of its own or of a worker's, or a worker at one of its own."""
    counted = start("alone", count=True)
    assert whole(counted), counted.err
    expected = run_contents(tmp_path / "alone")
    found = dict.fromkeys(("parent", "worker"), 0)
    for role in found:
        processes = {pid for of, _, pid in counted.events if of == role}
        each = [
            sum(n for (_, _, pid), n in counted.events.items() if pid == process) for process in processes
        ]
        found[role] = max(each)
    draw, ways = random.Random(kind), (("parent", kill_self), ("worker", kill_self), ("worker", kill_parent))
    kills = max(KINDS[kind].kills, round(KILLS * KINDS[kind].share))
    tried, runs = [], 0
    while len(tried) < kills:
        role, act = ways[len(tried) % 3]
        number = draw.randint(1, found[role])
        ended = start(f"run{runs}", Break(role, number, act))
        if ended.code == 0:  # it came through: this run had less to do
            assert run_contents(tmp_path / f"run{runs}") == expected
            runs += 1
            continue
        tried.append(f"{act.__name__} at event {number} of the {role}")
        if act is kill_self and role == "worker":
            assert ended.code == 1
            assert "killed by signal 9" in one_line(ended)
        else:
            assert ended.code == -signal.SIGKILL
    assert whole(start(f"run{runs}"))
    assert run_contents(tmp_path / f"run{runs}") == expected
    assert not list((tmp_path / f"run{runs}" / "checkpoints").iterdir())
    say(f"{kind}: {kills} kills over {runs + 1} runs, of {found} events; 0 lost", tried)


@pytest.mark.skipif(not KILLS, reason="make kill-test")
@pytest.mark.parametrize(("start", "kind"), [(name, name) for name in KINDS], indirect=["start"])
def test_whenever_a_run_is_killed_nothing_is_lost(
    start: Callable[..., Ended], kind: str, tmp_path: Path, run_contents: Contents
) -> None:
    """SIGKILL at random moments, as the machine has them."""
    drawn = partial(small, KINDS[kind].every, draws=True)
    seconds = start("alone", Break("parent", 1, lambda _: None), prepare=drawn).after
    expected = run_contents(tmp_path / "alone")
    draw, tried, runs = random.Random(kind), [], 0
    while len(tried) < round(KILLS * KINDS[kind].share):
        moment = draw.uniform(0.02, seconds)
        ended = start(f"run{runs}", kill_after=moment, prepare=drawn)
        if ended.code == 0:
            assert run_contents(tmp_path / f"run{runs}") == expected
            runs += 1
        else:
            assert ended.code == -signal.SIGKILL
            tried.append(f"{moment:.3f} s")
    assert whole(start(f"run{runs}"))
    assert run_contents(tmp_path / f"run{runs}") == expected
    say(
        f"{kind}: SIGKILL at {len(tried)} moments of up to {seconds:.2f} s over {runs + 1} runs; 0 lost",
        tried,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_130(
    number: signal.Signals, start: Callable[..., Ended], tmp_path: Path, run_contents: Contents
) -> None:
    def told(parent: int) -> None:
        ask(number)(parent)
        time.sleep(0.2)  # a cell may end within one turn of the core that the command waits for

    assert whole(start("alone"))
    cut = 0
    # also between the last step and its evaluation, and on the test images
    events = [("step", 1 + 10 * (number % 3)), ("step", 27), ("images", 2), ("images", 9), ("message", 3)]
    for kind, place in events if number == signal.SIGINT else events[:2]:
        ended = start("run", Break("worker", place, told, kind))
        assert ended.code in (130, 0)
        if ended.code == 130:
            said = one_line(ended)
            assert f"stopped by {number.name}; {finished(tmp_path / 'run')} of 5 cells are finished" in said
            assert "continue with --resume" in said
            saved = [*(tmp_path / "run" / "checkpoints").iterdir()]
            assert (f"{len(saved)} under way are saved" in said) == bool(saved)
            cut += any(load_arrays(file)[1]["evaluations"] for file in saved)
    assert cut
    assert whole(start("run"))
    assert run_contents(tmp_path / "run") == run_contents(tmp_path / "alone")


def test_steps_that_are_long_save_in_between(
    start: Callable[..., Ended], tmp_path: Path, run_contents: Contents
) -> None:
    def prepare() -> None:
        small(100)
        jobs.PAUSE_SECONDS = 0.0  # before every step

    assert whole(start("alone", prepare=partial(small, 100)))
    ended = start("run", Break("worker", 7, kill_self, "step"), prepare=prepare)
    assert ended.code == 1
    saved = [
        load_arrays(file)[1]["step"] for file in (tmp_path / "run" / "checkpoints").glob("*.safetensors")
    ]
    assert 6 in saved
    assert whole(start("run", prepare=prepare))
    assert run_contents(tmp_path / "run") == run_contents(tmp_path / "alone")


def small_memory(_: int) -> None:
    """In a worker: hardly a page more than it has, and one batch that takes more than can lie free in it."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
    bytearray(1 << 36)


def test_a_worker_without_memory_is_one_line_and_the_run_goes_on_later(
    start: Callable[..., Ended], tmp_path: Path, run_contents: Contents
) -> None:
    assert whole(start("alone"))
    for number in (1, 15):
        folder = f"run{number}"
        ended = start(folder, Break("worker", number, small_memory, "step"))
        assert ended.code == 1
        assert "out of memory" in one_line(ended)
        assert "--resume" in ended.err
        assert whole(start(folder))
        assert run_contents(tmp_path / folder) == run_contents(tmp_path / "alone")


def test_a_run_under_way_is_not_run_twice(start: Callable[..., Ended], tmp_path: Path) -> None:
    def second(_: int) -> None:
        ended = start("run")
        (tmp_path / "second").write_text(f"{ended.code} {ended.err}")

    assert whole(start("run", Break("parent", 3, second, "message")))
    assert (tmp_path / "second").read_text().startswith("1 sparselth: ")


def finished(folder: Path) -> int:
    file = folder / "cells.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def one_line(ended: Ended) -> str:
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("sparselth: ")
    return lines[0]


def say(what: str, tried: list[str]) -> None:
    if KILLS:
        print(f"\n{what}\n  " + "; ".join(tried))
