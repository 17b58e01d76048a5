"""Which cells come next: those that can start, in batches.

For IMP these are the tickets of all seeds, because everything waits for them, and beside them what else can
start, the controls.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any

from sparselth.config import Cell
from sparselth.experiments.base import Experiment


class Agenda:
    """Which cells come next: of those that can start, the most urgent.

    A finished cell counts once all that it needs is finished too: what was computed from a file that is to be
    computed again may have to follow it.
    """

    def __init__(self, config: Experiment, finished: Iterable[Cell], without: Iterable[Cell] = ()) -> None:
        """Cells `without` a result are not computed; nor can be those that need one of them."""
        self.config, self.held, self.without = config, set(finished), set(without)
        self.done: set[Cell] = set()
        self.order = {cell: i for i, cell in enumerate(config.cells())}
        self.missing = {cell: len(set(config.needs(cell))) for cell in self.order}  # of what a cell needs
        self.after: dict[Cell, list[Cell]] = {}  # who needs a cell
        for cell in self.order:
            for need in set(config.needs(cell)):
                self.after.setdefault(need, []).append(cell)
        self.ready: list[tuple[Any, int, Cell]] = []
        for cell in [cell for cell, missing in self.missing.items() if not missing]:
            self._can_start(cell)

    def next(self, limit: int = 1, idle: int = 1) -> list[Cell]:
        """Take up to `limit` cells that can start, the share of one of `idle` workers; none when all wait."""
        return [heappop(self.ready)[2] for _ in range(min(limit, -(-len(self.ready) // idle)))]

    def back(self, cells: Iterable[Cell]) -> None:
        """Cells that were taken and could not be computed."""
        for cell in (cell for cell in cells if cell not in self.without):
            heappush(self.ready, (self.config.urgency(cell), self.order[cell], cell))

    def finished(self, cells: Iterable[Cell], again: Iterable[Cell] = ()) -> None:
        """Cells that were computed, and finished ones that must be computed again because of them."""
        self.held.difference_update(again)
        for cell in cells:
            self._done(cell)

    def _can_start(self, cell: Cell) -> None:
        if cell in self.held:
            self._done(cell)
        else:
            self.back([cell])

    def _done(self, cell: Cell) -> None:
        """Count a cell, and what was finished and waited for nothing else."""
        counted = [cell]
        for one in counted:
            self.done.add(one)
            for other in self.after.get(one, ()):
                self.missing[other] -= 1
                if self.missing[other]:
                    continue
                if other in self.held:
                    counted.append(other)
                else:
                    self.back([other])


def widest(config: Experiment) -> int:
    """The most cells that can be computed at one time."""
    agenda, most = Agenda(config, ()), 0
    while cells := agenda.next(10**9):
        most = max(most, len(cells))
        agenda.finished(cells)
    return most
