"""Commands in forks of this process, which has torch loaded, and what befalls them at a chosen event.

An event is what a process is about to do: open, rename or remove a file of the run, send a message to parent
or worker, take a training step, look at images of an evaluation. Audit hooks see files; the rest is made to
tell.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sparselth.cli.main import run
from sparselth.data.batches import Batches
from sparselth.engine import autograd, break_even
from sparselth.engine.batch import DenseForward
from sparselth.engine.compressed import CompressedForward
from sparselth.engine.side_by_side import Replicas
from sparselth.experiments import jobs
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.strong import StrongConfig
from sparselth.models import MODELS, Model, get_model
from sparselth.registry import load_plugin

FILES = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"}
CALLS: list[tuple[Any, str, str]] = [
    (Connection, "send", "message"),
    (Batches, "index", "step"),
    (DenseForward, "sums", "images"),
    (CompressedForward, "sums", "images"),
    (autograd, "sums", "images"),
    (Replicas, "sums", "images"),
]
TIMEOUT = 120.0
Act = Callable[[int], None]  # given the process id of the command


@dataclass(frozen=True)
class Break:
    """`act` at the event of that number, from 1, of the parent or of each worker; of one kind if named."""

    role: str
    number: int
    act: Act
    kind: str = ""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, or minus the signal that killed it."""

    code: int
    out: str
    err: str
    after: float  # seconds since the break
    events: Counter[tuple[str, str, int]]  # role, kind and process → how many, where they were counted


def kill_self(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_parent(parent: int) -> None:
    """From a worker, which goes on until the system ends it."""
    os.kill(parent, signal.SIGKILL)


def ask(number: int) -> Act:
    """A signal to the command alone."""
    return lambda parent: os.kill(parent, number)


def nothing() -> None:
    """Nothing is changed in the fork."""


def small(every: int = 10, compressed: bool = True, draws: bool = False) -> None:
    """In the fork: evaluations and checkpoints after a few steps, compressed layers, no figures."""
    if (file := Path("narrow.py")).exists():
        load_plugin(file)
    for name in {"lenet-300-100", "resnet20", "narrow-16"} & {*MODELS}:
        recipes = get_model(name).recipes
        assert isinstance(recipes, dict)
        recipes |= {key: replace(recipe, eval_every=every) for key, recipe in recipes.items()}
    jobs.CHECKPOINT_SECONDS = 0.0
    if not draws:
        for experiment in (ImpConfig, StrongConfig):
            experiment.draw = lambda *_: None  # type: ignore[method-assign]

    def measured(model: Model, *_: object) -> dict[str, float]:
        return {s.name: 2.0 * compressed for s in model.weights}

    break_even.break_even = measured


def command(
    words: Sequence[str],
    at: Break | None = None,
    prepare: Callable[[], None] = nothing,
    count: bool = False,
    kill_after: float | None = None,
) -> Ended:
    """Run a command in a fork, kill it after so many seconds if asked, wait for it and all it has started."""
    folder = words[words.index("--out") + 1]
    out, err, log = (tempfile.TemporaryFile() for _ in range(3))  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    if not (pid := os.fork()):
        code = 99
        try:
            os.setpgid(0, 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
            prepare()
            for owner, name, kind in CALLS:
                setattr(owner, name, _telling(getattr(owner, name), kind))
            if at or count:
                sys.addaudithook(partial(_heard, _Place(os.getpid(), folder, at, log.fileno())))
            code = run(list(words))
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    try:
        if not _ends(pid, TIMEOUT if kill_after is None else kill_after):
            assert kill_after is not None, f"{words} takes more than {TIMEOUT:g} s"
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended = time.monotonic()
        _alone(pid)
    finally:
        for left in group(pid):
            os.kill(left, signal.SIGKILL)
    texts = []
    for file in (out, err, log):
        file.seek(0)
        texts.append(file.read().decode())
        file.close()
    events, acted = Counter[tuple[str, str, int]](), ended
    for role, kind, rest in (line.split() for line in texts[2].splitlines()):
        if role == "break":
            acted = float(rest)
        else:
            events[role, kind, int(rest)] += 1
    return Ended(code, texts[0], texts[1], ended - acted, events)


class _Place:
    """Which event is awaited, and how many have come in this process."""

    def __init__(self, parent: int, folder: str, at: Break | None, log: int) -> None:
        self.parent, self.folder, self.at, self.log = parent, folder, at, log
        self.process, self.number = parent, 0


def _heard(place: _Place, event: str, args: tuple[Any, ...]) -> None:
    if event in FILES:
        path = args[0]
        if not isinstance(path, str | bytes | os.PathLike) or place.folder not in os.fsdecode(path):
            return
        event = f"{event}:{os.path.relpath(os.fsdecode(path), place.folder).split('/')[0].split('.')[0]}"
    elif event.startswith("kill."):
        event = event.removeprefix("kill.")
    else:
        return
    pid = os.getpid()
    role = "parent" if pid == place.parent else "worker"
    if not place.at:
        os.write(place.log, f"{role} {event} {pid}\n".encode())
        return
    if role != place.at.role or place.at.kind not in ("", event):
        return
    if pid != place.process:
        place.process, place.number = pid, 0
    place.number += 1
    if place.number == place.at.number:
        os.write(place.log, f"break {event} {time.monotonic()}\n".encode())
        place.at.act(place.parent)


def _telling(real: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        sys.audit(f"kill.{kind}")
        return real(*args, **kwargs)

    return call


def _ends(pid: int, seconds: float) -> bool:
    """Whether a child ends within so many seconds."""
    handle = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = bool(poll.poll(1000 * seconds))
    os.close(handle)
    return ended


def group(leader: int) -> list[int]:
    """The processes of a group that are not dead."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, members = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if members == str(leader) and state not in "ZX":
            found.append(int(file.parent.name))
    return found


def _alone(leader: int) -> None:
    """Nothing of a command that has ended may go on computing."""
    until = time.monotonic() + 10
    while left := group(leader):
        assert time.monotonic() < until, f"processes {left} outlive their command"
        time.sleep(0.01)
