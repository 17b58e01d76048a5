"""Which cells come next: those that can start, in batches.

For IMP these are the tickets of all seeds, because everything waits for them, and beside them what else can
start, the controls.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparselth.config import Cell
from sparselth.experiments.base import Experiment


class Agenda:
    """Which cells come next: of those that can start, the most urgent."""

    def __init__(self, config: Experiment, finished: Iterable[Cell]) -> None:
        self.config, self.done = config, set(finished)
        self.open = [cell for cell in config.cells() if cell not in self.done]
        self._sort()

    def __len__(self) -> int:
        return len(self.open)

    def next(self, limit: int = 1) -> list[Cell]:
        """Take up to `limit` cells that can start; none when all wait for others."""
        ready = [cell for cell in self.open if self.done.issuperset(self.config.needs(cell))]
        for cell in ready[:limit]:
            self.open.remove(cell)
        return ready[:limit]

    def back(self, cells: Iterable[Cell]) -> None:
        """Cells that were taken and could not be computed."""
        self.open += cells
        self._sort()

    def finished(self, cells: Iterable[Cell]) -> None:
        self.done.update(cells)

    def _sort(self) -> None:
        self.open.sort(key=self.config.urgency)


def widest(config: Experiment) -> int:
    """The most cells that can be computed at one time."""
    agenda, most = Agenda(config, ()), 0
    while cells := agenda.next(10**9):
        most = max(most, len(cells))
        agenda.finished(cells)
    return most
