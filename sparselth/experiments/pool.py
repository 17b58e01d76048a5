"""Batches of cells over workers: processes of this machine and, under torchrun or srun, of other ranks.

Only this process writes the run's lines; a worker writes the files of its cells, then reports. Where networks
are split, cells go to teams of workers: the first of a team leads and reports, from the others errors alone
are heard. A batch for which memory is short is halved. A signal asks workers to save; one that cannot within
GRACE, because a step is long, is killed with its team: the cells go on from their last checkpoint.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from sparselth import signals
from sparselth.cluster import torchrun
from sparselth.config import Cell
from sparselth.data import Images
from sparselth.diverged import in_need
from sparselth.engine.team import Parted, Seat
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
CAUSE = 2.0  # seconds in which the end of a worker is seen behind the errors of its team


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
        split: int = 1,
    ) -> None:
        own = ranks.share(workers, 0) if ranks else workers
        super().__init__(Work(config, images, run, break_even), own)
        self.config, self.workers, self.ranks, self.split = config, workers, ranks, split
        self.hands: list[Hand] = []

    def __enter__(self) -> Self:
        super().__enter__()
        pairs = enumerate(zip(self.connections, self.processes, strict=True))
        of = " of rank 0" if self.ranks else ""
        self.hands = [Hand(f"worker {number}{of}", *pair) for number, pair in pairs]
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
        """Measure what a batch of up to `limit` networks costs a worker, and how many fit into memory."""
        self.hands[0].connection.send((limit, self.split))
        kind, value = _received(self.hands[0])
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
        busy: dict[int, list[Cell]] = {}  # by team, which is one worker unless networks are split
        saving: set[int] = set()  # teams that have come to an end of a step and write checkpoints
        saved, cut, lost, told, passed_on = 0, 0, 0, False, False
        failure: BaseException | None = None
        caught: list[tuple[str, float]] = []

        def ask(name: str) -> None:
            caught.append((name, time.monotonic()))
            self.stop.value = True

        with signals.asked_to_stop(ask), self._teams() as teams:
            while True:
                for worker, hands in enumerate(teams):
                    if worker in busy or self.stop.value:
                        continue
                    if not (cells := agenda.next(limit, len(teams) - len(busy))):
                        break
                    busy[worker] = cells
                    watcher.started(worker, cells)
                    for hand in hands:
                        with suppress(OSError):  # the next receive tells how the worker ended
                            hand.connection.send(cells)
                if not busy:
                    break
                ready = wait([one for w in busy for hand in teams[w] for one in hand.awaited], timeout=0.25)
                watcher.tick()
                if watcher.stopped_by and not caught:
                    ask(watcher.stopped_by)
                if self.ranks and self.stop.value and not passed_on:
                    self.ranks.stop()
                    passed_on = True
                if caught and time.monotonic() - caught[0][1] > GRACE:
                    for worker in busy.keys() - saving:
                        for hand in teams[worker]:
                            hand.kill()
                        cut += len(busy.pop(worker))
                    if busy and not told:
                        watcher.stopping()
                        told = True
                heard = [(w, h) for w in busy for h in teams[w] if h.connection in ready or h.ended]
                for worker, hand in heard:
                    if worker not in busy:  # another of its team has ended it
                        continue
                    kind, value = _received(hand)
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
                            failure, self.stop.value = failure or _cause(value, teams[worker]), True
        if failure:
            raise failure
        if folder.missing:
            raise stopped(folder, caught[0][0] if caught else "its caller", saved, cut, lost)
        folder.complete()

    @contextmanager
    def _teams(self) -> Iterator[list[list[Hand]]]:
        """The workers by the networks that they train; where these are several each is told its seat."""
        starts = range(0, len(self.hands) - self.split + 1, self.split)
        found = [self.hands[start : start + self.split] for start in starts]
        if self.split == 1:
            yield found
            return
        with tempfile.TemporaryDirectory(prefix="sparselth-") as folder:
            for team, hands in enumerate(found):
                store: str | tuple[str, int] = f"{folder}/{team}"
                name, names = f"team/{team}", tuple(hand.name for hand in hands)
                if self.ranks:
                    store, name = self.ranks.group.shared(name)
                for rank, hand in enumerate(hands):
                    with suppress(OSError):
                        hand.connection.send(Seat(store, name, names, rank))
            yield found


def _received(hand: Hand) -> tuple[str, Any]:
    """What a worker says next, or that it has ended."""
    try:
        message: tuple[str, Any] = hand.connection.recv()
    except (EOFError, OSError):  # also in the middle of a message, or a host that is gone
        return "failed", SparselthError(
            f"{hand.name} ended without a result{hand.how()}; what is finished is kept, "
            "continue with `resume`"
        )
    return message


def _cause(error: BaseException, hands: list[Hand]) -> BaseException:
    """Why a team has failed: of several errors the one that was before the others. The team is ended."""
    until = time.monotonic() + CAUSE
    while isinstance(error, Parted) and (left := until - time.monotonic()) > 0:
        ready = wait([one for hand in hands for one in hand.awaited], left)
        for hand in [hand for hand in hands if hand.connection in ready or hand.ended]:
            kind, value = _received(hand)
            if kind == "failed" and not isinstance(value, Parted):
                error = value
    for hand in hands if len(hands) > 1 else ():
        hand.kill()
    return error


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
