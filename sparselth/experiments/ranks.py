"""A run over the ranks of a group: rank 0 has the run, the others have workers for it.

Each rank starts workers, on its GPU if it has one, which call rank 0 on lines of their own; they are sent and
report what rank 0's own do. A rank reads the data set itself. All see one file system.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from sparselth import data, machine, signals
from sparselth.cluster import torchrun
from sparselth.cluster.torchrun import Group, Listener
from sparselth.errors import SparselthError
from sparselth.experiments.processes import Hand, Processes
from sparselth.experiments.worker import Work


@dataclass(frozen=True)
class Task:
    """What rank 0 sends another: the work without its images, what these are, how many workers to start."""

    work: Work
    dataset: tuple[str, str] | None  # name, digest
    data_dir: Path | None
    workers: int


class Ranks:
    """The other ranks, as rank 0 sees them: called, told to stop, left."""

    def __init__(self, group: Group, data_dir: Path | None) -> None:
        group.check()
        self.group, self.data_dir = group, data_dir
        self.lines: dict[int, Connection] = {}  # by rank
        self.hosts: dict[int, str] = {}
        self.hands: dict[tuple[int, int], Hand] = {}  # by rank and number there

    def share(self, workers: int, rank: int) -> int:
        """How many of all workers a rank has."""
        return workers // self.group.size + (rank < workers % self.group.size)

    def call(self, work: Work, workers: int) -> list[Hand]:
        """Have the others start their share of so many workers; these by rank, once all are there.

        SparselthError where a rank does not come, or says why it has none.
        """
        listener = self.group.call()
        with listener.socket:
            until = time.monotonic() + torchrun.COME
            while len(self.lines) < self.group.size - 1:
                if not wait([listener.socket], max(0.0, until - time.monotonic())):
                    there = {0, *self.lines}
                    lack = ", ".join(str(r) for r in range(self.group.size) if r not in there)
                    raise SparselthError(f"rank {lack} did not come within {torchrun.COME:.0f} s")
                self._accept(listener)
            images = work.images
            for rank, line in self.lines.items():
                line.send(
                    Task(
                        replace(work, images=None, run=work.run.absolute()),
                        (images.spec.name, images.digest) if images else None,
                        self.data_dir,
                        self.share(workers, rank),
                    )
                )
            while len(self.hands) < workers - self.share(workers, 0):
                ready = wait([listener.socket, *self.lines.values()])
                for rank, line in self.lines.items():
                    if line in ready:  # it says nothing else by now
                        raise self._why(rank, line)
                if listener.socket in ready:
                    self._accept(listener)
        return [self.hands[place] for place in sorted(self.hands)]

    def _accept(self, listener: Listener) -> None:
        if (found := listener.accept()) is None:
            return
        connection, (rank, worker, host) = found
        if worker is None:
            self.lines[rank], self.hosts[rank] = connection, host
        else:
            self.hands[rank, worker] = Hand(f"worker {worker} of rank {rank} on {host}", connection)

    def _why(self, rank: int, line: Connection) -> SparselthError:
        try:
            why = str(line.recv())
        except (EOFError, OSError):
            why = "ended before it had workers"
        return SparselthError(f"rank {rank} on {self.hosts[rank]}: {why}")

    def stop(self) -> None:
        """Ask the workers of the others to save."""
        self._tell("stop")

    def leave(self, patience: float) -> None:
        """Let the others end their workers, waiting so many seconds for them."""
        for hand in self.hands.values():
            with suppress(OSError):
                hand.connection.send(None)
        self._tell(patience)
        for connection in (*self.lines.values(), *(hand.connection for hand in self.hands.values())):
            connection.close()

    def _tell(self, what: str | float) -> None:
        for line in self.lines.values():
            with suppress(OSError):
                line.send(what)


def follow(group: Group) -> int:
    """What a rank above 0 does for its life: nothing, or workers of its own; its exit code."""
    try:
        if (dial := group.awaited()) is None:
            return 0
        signals.ignored()  # rank 0 has them, too, and tells when to stop
    except KeyboardInterrupt:
        return signals.CODE
    try:
        rank0 = dial.connect()
        task: Task = rank0.recv()
        try:
            work = _with_images(task)
            with Processes(work, task.workers, dial) as processes:
                processes.end(_dismissed(rank0, processes))
        except SparselthError as error:
            rank0.send(error)
        except Exception as error:
            rank0.send(RuntimeError(f"{type(error).__name__}: {error}"))
    except (EOFError, OSError):
        pass  # rank 0 has gone, and says why
    return 0


def _with_images(task: Task) -> Work:
    """The work with the images that this rank reads; SparselthError where it cannot do it as rank 0 does."""
    work = task.work
    if not (work.run / "config.json").is_file():
        raise SparselthError(f"{work.run} is not seen there: choose an `out` that all ranks see")
    if work.config.device == "cuda" and machine.choose_device("auto")[0] != "cuda":
        raise SparselthError("finds no GPU of its own: start as many ranks a host as it has GPUs")
    if task.dataset is None:
        return work
    name, digest = task.dataset
    images = data.resolve(name, task.data_dir, lambda _: None)
    if images.digest != digest:
        raise SparselthError(f"reads other images as {name} than rank 0")
    return replace(work, images=images)


def _dismissed(rank0: Connection, processes: Processes) -> float:
    """Pass on what rank 0 says until it lets go: the seconds that workers have to end.

    Rank 0 is told of workers that end: it may still wait for their call.
    """
    sentinels = {process.sentinel: number for number, process in enumerate(processes.processes)}
    try:
        while True:
            for ready in wait([rank0, *sentinels]):
                if ready is not rank0:
                    rank0.send(SparselthError(f"worker {sentinels.pop(ready)} ended as it began"))
                elif (told := rank0.recv()) != "stop":
                    return float(told)
                else:
                    processes.stop.value = True
    except (EOFError, OSError):
        return 0.0
