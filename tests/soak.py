"""A long run: cells that cost nothing, stopped, gone on with, damaged; what it leaves behind.

    python tests/soak.py --cells 100000     `make soak`

Prints what was tried, what each took, and what was lost; exit code 1 where anything was.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from math import inf
from pathlib import Path

from simulated import Simulated

from sparselth.cli.main import run as command
from sparselth.config import EXPERIMENTS
from sparselth.errors import Interrupted
from sparselth.experiments.base import Finished
from sparselth.experiments.plan import Watcher
from sparselth.experiments.run import run
from sparselth.runs import cell_path

CHAINS = 100
PER_CELL = 2_000  # bytes that a parent may take for a cell: its name, its checksum, its place in the agenda
SECONDS = (
    30.0  # of the processor that `show`, `ls` and `resume` of a finished run may take, whoever else is there
)


def rss(pid: int | str = "self") -> int:
    """Resident bytes of a process, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def handles() -> set[str]:
    """Open files of this process, and shared memory that bears its number, as Python's and torch's does."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{file.name} {file.readlink()}")
        except OSError:  # the folder itself
            continue
    return found | {file.name for file in Path("/dev/shm").glob(f"*{os.getpid()}*")}


class Heard(Watcher):
    """Measures memory along the way; stops the run with SIGTERM after `stop` cells."""

    def __init__(self, stop: int = 0) -> None:
        self.count, self.stop = 0, stop
        self.parent: list[int] = []
        self.workers: list[int] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finished(self, worker: int, done: Finished) -> None:
        self.count += 1
        if self.count == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.count % 100 == 0:
            self.parent.append(rss())
            self.workers.append(sum(rss(child.pid) for child in multiprocessing.active_children()))


@dataclass
class Soak:
    """What is tried on one run folder, and what was lost."""

    path: Path
    config: Simulated
    seconds: float  # of this process that what computes nothing may take
    lost: list[str] = field(default_factory=list)

    @property
    def cells(self) -> int:
        return len(self.config.cells())

    @contextmanager
    def tried(self, what: str, computes: bool = False) -> Iterator[None]:
        began, own = time.perf_counter(), time.process_time()
        yield
        took, own = time.perf_counter() - began, time.process_time() - own
        print(f"{took:8.2f} s, {own:7.2f} of this process  {what}", flush=True)
        self.must(computes or own <= self.seconds, f"{what}: more than {self.seconds:.0f} s")

    def must(self, right: bool, what: str) -> None:
        if not right:
            self.lost.append(what)
            print(f"    LOST  {what}", flush=True)

    def go_on(self, stop: int = 0) -> Heard:
        heard = Heard(stop)
        try:
            run(self.config, out=self.path, resume=True, workers=2, replicas=100, watcher=heard)
            self.must(not stop, "SIGTERM did not stop it")
        except Interrupted:
            self.must(bool(stop), "it was interrupted by nobody")
        return heard

    def bits(self) -> str:
        digest = hashlib.sha256()
        for file in [self.path / "cells.jsonl", self.path / "evaluations.jsonl"]:
            digest.update(file.read_bytes())
        for cell in self.config.cells():
            digest.update(cell_path(self.path, cell).read_bytes())
        return digest.hexdigest()

    def said(self, *words: str) -> str:
        out = StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            code = command([*words])
        self.must(code == 0, f"sparselth {' '.join(words)}: exit code {code}: {out.getvalue()[-200:]}")
        return out.getvalue()


def soak(folder: Path, cells: int, seconds: float = inf) -> list[str]:
    """Compute so many cells in all ways; what was lost, in words."""
    chains = min(CHAINS, max(2, cells // 20))
    config = Simulated(chains=tuple(range(chains)), levels=cells // chains - 1)
    one = Soak(folder / "run", config, seconds)
    total = one.cells
    before = handles()
    with one.tried(f"{total // 3:,} of {total:,} cells on two workers, then SIGTERM", computes=True):
        first = one.go_on(stop=total // 3)
    with one.tried("the rest after it", computes=True):
        second = one.go_on()
    one.must(
        first.count + second.count == total, f"{first.count} + {second.count} cells computed, not {total}"
    )
    for name, sizes, rest in (
        ("parent", second.parent, PER_CELL * second.count), ("workers", second.workers, 0)
    ):  # fmt: skip
        tenth = sizes[len(sizes) // 10 :] or [0]
        grown = max(tenth) - tenth[0]
        print(f"            {name}: {tenth[0] / 1e6:.0f} MB, then up to {grown / 1e6:+.1f} MB", flush=True)
        one.must(grown <= rest + 16e6, f"{name}: grew by {grown / 1e6:.0f} MB")
    bits = one.bits()
    with one.tried("resume of the finished run"):
        one.must(one.go_on().count == 0, "a finished cell was computed again")
    with one.tried("show"):
        one.must(one.said("show", str(one.path)).count("\n") == total, "show has other lines")
    with one.tried("ls runs"):
        one.must("finished" in one.said("ls", "runs", "--out", str(folder)), "ls says it is not finished")
    bad = [config.cells()[i * total // 7] for i in range(7)]
    for cell in bad:
        content = bytearray(cell_path(one.path, cell).read_bytes())
        content[len(content) // 2] ^= 1
        cell_path(one.path, cell).write_bytes(content)
    with one.tried("seven files damaged, resume", computes=True):
        heard = one.go_on()
    one.must(heard.count == 7, f"{heard.count} cells computed for 7 damaged files")
    one.must(len(heard.notes) == 1, f"{len(heard.notes)} notes of damage")
    one.must(one.bits() == bits, "other bits after damage")
    gc.collect()
    one.must(not multiprocessing.active_children(), "a worker is left")
    left = handles() - before
    one.must(not left, f"left behind: {', '.join(sorted(left))}")
    print(f"{total:,} cells, {len(one.lost)} losses", flush=True)
    return one.lost


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cells", type=int, default=100_000)
    EXPERIMENTS.add(Simulated.name, Simulated)
    with tempfile.TemporaryDirectory() as folder:
        return bool(soak(Path(folder), parser.parse_args().cells, SECONDS))


if __name__ == "__main__":
    sys.exit(main())
