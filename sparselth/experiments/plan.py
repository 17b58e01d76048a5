"""The plan of a run, and who is told how it goes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselth.config import Cell
from sparselth.data import Images
from sparselth.experiments.base import Diverged, Experiment, Finished
from sparselth.experiments.price import Price
from sparselth.experiments.training import Training


@dataclass(frozen=True)
class Plan:
    """What will be done, where, and, once it is measured, at which price."""

    config: Experiment  # with the data set and the device that are taken
    images: Images | None
    path: Path
    why: str  # this device
    workers: int  # of all ranks
    limit: int  # networks in a batch, at most
    environment: dict[str, Any]
    finished: frozenset[Cell] = frozenset()
    lost: frozenset[Cell] = frozenset()  # that have diverged, or need one that has
    price: Price | None = None  # of experiments that train
    ranks: int = 1  # processes that torchrun or srun started for it
    split: int = 1  # workers that train a network together

    @property
    def seconds(self) -> float | None:
        """When the last missing cell will be finished, beside whoever else is busy here."""
        done = self.finished | self.lost
        if not isinstance(self.config, Training):
            costs = [self.config.seconds(cell) for cell in self.config.cells() if cell not in done]
            known = [cost for cost in costs if cost is not None]
            unknown = len(known) < len(costs)
            return None if unknown or not known else max(*known, sum(known) / self.workers)
        if self.price is None:
            return None
        alone = self.price.run_seconds(self.config, done, self.workers // self.split, self.limit)
        return alone * self.price.slowdown(self.workers)

    @property
    def bytes(self) -> int | None:
        """Memory of all workers."""
        if self.price is None or not isinstance(self.config, Training):
            return None
        return self.price.run_bytes(self.config, self.workers, self.limit)


class Watcher:
    """Who is told about a run; this one only warns, and does not ask what the run will cost."""

    prices = False  # whether `begin` wants a price: to measure it takes a second or two
    stopped_by = ""  # who asks the run to save and to stop, as a signal does

    def note(self, text: str) -> None:
        """Something that a user must know, such as that another data set is taken."""
        warnings.warn(text, stacklevel=2)

    def begin(self, plan: Plan) -> AbstractContextManager[Watcher]:
        """The plan, before the cells that are missing; within the context is told about these."""
        return nullcontext(self)

    def complete(self, plan: Plan) -> None:
        """All cells are finished, nothing is computed."""

    def started(self, worker: int, cells: Sequence[Cell]) -> None:
        """A worker begins with cells."""

    def evaluated(
        self, worker: int, cells: Sequence[Cell], step: int, accuracy: float, steps_per_second: float
    ) -> None:
        """Networks that train together stand at a step; accuracy is the mean on the validation images."""

    def finished(self, worker: int, done: Finished) -> None:
        """A cell is recorded."""

    def again(self, cells: Sequence[Cell]) -> None:
        """Finished cells are open again: what they were computed from came out otherwise."""

    def diverged(self, worker: int, done: Diverged, without: Sequence[Cell]) -> None:
        """A cell has no result; those `without` need it and are not computed."""
        self.note(f"{done.cell}: {done.why}" + f"; {len(without)} cells need it" * bool(without))

    def stopping(self) -> None:
        """A signal came, and checkpoints take longer than a second to write."""

    def halved(self, cells: int, limit: int) -> None:
        """Memory was short for as many cells at once; now there are `limit` at most."""

    def tick(self) -> None:
        """A quarter of a second has passed, or something has happened."""
