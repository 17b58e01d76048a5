"""Batches of cells over workers: processes of this machine and, under torchrun or srun, of other ranks.

Only this process writes the run's lines; a worker writes the files of its cells, then reports. A batch for
which memory is short is halved. A signal asks workers to save; one that cannot within GRACE, because a step
is long, is killed: its cells go on from their last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from sparselth import signals
from sparselth.cluster import torchrun
from sparselth.config import Cell
from sparselth.data import Images
from sparselth.diverged import in_need
from sparselth.errors import Interrupted, SparselthError
from sparselth.experiments.agenda import Agenda
from sparselth.experiments.base import Diverged, Experiment
from sparselth.experiments.plan import Watcher
from sparselth.experiments.price import Price
from sparselth.experiments.processes import Hand, Processes
from sparselth.experiments.ranks import Ranks
from sparselth.experiments.worker import Work
from sparselth.machine import cores
from sparselth.runs import RunFolder, checkpoint_path

GRACE = 1.2  # seconds from a signal until a worker must have come to an end of a step or of a chunk of images


class Pool(Processes):
    """The workers of one run: processes of this machine, and those of other ranks; use it as a context."""

    def __init__(
        self,
        config: Experiment,
        images: Images | None,
        run: Path,
        workers: int,
        break_even: Mapping[str, float],
        ranks: Ranks | None = None,
    ) -> None:
        own = ranks.share(workers, 0) if ranks else workers
        super().__init__(Work(config, images, run, break_even), own)
        self.config, self.workers, self.ranks = config, workers, ranks
        self.hands: list[Hand] = []

    def __enter__(self) -> Self:
        super().__enter__()
        pairs = enumerate(zip(self.connections, self.processes, strict=True))
        self.hands = [Hand(f"worker {number}", *pair) for number, pair in pairs]
        if self.ranks:
            try:
                self.hands += self.ranks.call(self.work, self.workers)
            except BaseException:
                self.end(0.0)
                raise
        return self

    def end(self, patience: float) -> None:
        if self.ranks:
            self.ranks.leave(patience)
        super().end(patience)

    def price(self, limit: int) -> tuple[Price, int]:
        """Measure what a batch of up to `limit` networks costs, and how many fit into memory."""
        self.hands[0].connection.send(limit)
        kind, value = self._receive(0)
        if kind == "failed":
            raise value
        price, fits = value
        assert isinstance(price, Price)
        return price, fits

    def run(self, folder: RunFolder, watcher: Watcher, limit: int = 1) -> None:
        """Compute every cell that is missing, up to `limit` in a batch; cells that diverge are recorded.

        Raises Interrupted after a signal, or what a cell raised.
        """
        agenda = Agenda(self.config, folder.finished, folder.diverged)
        busy: dict[int, list[Cell]] = {}
        saving: set[int] = set()  # workers that have come to an end of a step and write checkpoints
        saved, cut, lost, told, passed_on = 0, 0, 0, False, False
        failure: BaseException | None = None
        caught: list[tuple[str, float]] = []

        def ask(name: str) -> None:
            caught.append((name, time.monotonic()))
            self.stop.value = True

        with signals.asked_to_stop(ask):
            while True:
                for worker, hand in enumerate(self.hands):
                    if worker in busy or self.stop.value:
                        continue
                    if not (cells := agenda.next(limit, sum(w not in busy for w in range(len(self.hands))))):
                        break
                    busy[worker] = cells
                    watcher.started(worker, cells)
                    with suppress(OSError):  # the next receive tells how the worker ended
                        hand.connection.send(cells)
                if not busy:
                    break
                ready = wait([one for w in busy for one in self.hands[w].awaited], timeout=0.25)
                watcher.tick()
                if watcher.stopped_by and not caught:
                    ask(watcher.stopped_by)
                if self.ranks and self.stop.value and not passed_on:
                    self.ranks.stop()
                    passed_on = True
                if caught and time.monotonic() - caught[0][1] > GRACE:
                    for worker in busy.keys() - saving:
                        self.hands[worker].kill()
                        cut += len(busy.pop(worker))
                    if busy and not told:
                        watcher.stopping()
                        told = True
                for worker in [w for w in busy if self.hands[w].connection in ready or self.hands[w].ended]:
                    kind, value = self._receive(worker)
                    match kind:
                        case "evaluated":
                            watcher.evaluated(worker, *value)
                        case "stopping":
                            saving.add(worker)
                        case "stopped":
                            cells = busy.pop(worker)
                            kept = sum(checkpoint_path(folder.path, cell).exists() for cell in cells)
                            saved, lost = saved + kept, lost + len(cells) - kept
                        case "memory":
                            cells = busy.pop(worker)
                            limit = max(1, min(limit, len(cells) // 2))
                            agenda.back(cells)
                            watcher.halved(len(cells), limit)
                        case "finished":
                            del busy[worker]
                            found = [done for done in value if not isinstance(done, Diverged)]
                            again = folder.add(found)
                            agenda.finished([done.cell for done in found], again)
                            for done in found:
                                watcher.finished(worker, done)
                            if again:
                                watcher.again(again)
                            for done in value:
                                if isinstance(done, Diverged):
                                    folder.diverge(done.cell, done.why)
                                    without = in_need(self.config, folder.finished, {done.cell})
                                    watcher.diverged(worker, done, without)
                        case "failed":
                            del busy[worker]
                            failure, self.stop.value = failure or value, True
        if failure:
            raise failure
        if folder.missing:
            raise stopped(folder, caught[0][0] if caught else "its caller", saved, cut, lost)
        folder.complete()

    def _receive(self, worker: int) -> tuple[str, Any]:
        hand = self.hands[worker]
        try:
            message: tuple[str, Any] = hand.connection.recv()
        except (EOFError, OSError):  # also in the middle of a message, or a host that is gone
            return "failed", SparselthError(
                f"{hand.name} ended without a result{hand.how()}; what is finished is kept, "
                "continue with `resume`"
            )
        return message


def stopped(folder: RunFolder, who: str, saved: int = 0, cut: int = 0, lost: int = 0) -> Interrupted:
    """How a run stands that a signal has ended: cells that are finished, `saved`, `cut` within a step, and
    `lost`, which have no checkpoints."""
    total = len(folder.config.cells())
    if not folder.missing:
        return Interrupted(
            f"stopped by {who}; all cells are finished in {folder.path}, figures may be missing; the same "
            "command draws them"
        )
    said = f"{len(folder.finished)} of {total} cells are finished"
    said += f", {saved} under way are saved" if saved else ""
    said += f", {lost} under way will begin again" if lost else ""
    said += f", {cut} under way were cut and go on from their last checkpoint if any" if cut else ""
    return Interrupted(f"stopped by {who}; {said} in {folder.path}; continue with `resume`")


def available_workers(device: str) -> int:
    """One per core that is this process's; one for a GPU."""
    return torchrun.share_of(cores()) if device == "cpu" else 1
