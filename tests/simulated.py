"""An experiment whose cells cost nothing: chains of numbers, each computed from the file of the one before.

For tests of run folders, and as a plugin: `sparselth --plugin tests/simulated.py simulated --levels 100`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparselth.config import Cell, at_least, option
from sparselth.experiments.agenda import Agenda
from sparselth.experiments.base import Experiment, Finished, Place, register
from sparselth.files import load_arrays, save_arrays
from sparselth.runs import RunRecord, cell_path, open_run
from sparselth.tickets import SCHEMA

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Simulated(Experiment):
    """Chains of numbers."""

    name = "simulated"
    machine = 0  # another one computes other numbers
    chains: tuple[int, ...] = option((0, 1), "One chain each.", extends=True)
    levels: int = option(3, "Numbers of a chain after the first.", at_least(0), extends=True)
    rate: float = option(0.5, "What a number is of the one before.")

    def cells(self) -> list[Cell]:
        return [Cell(chain, "number", level) for chain in self.chains for level in range(self.levels + 1)]

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        return (Cell(cell.seed, "number", cell.level - 1),) if cell.level else ()

    def compute(self, cells: Sequence[Cell], place: Place) -> list[Finished] | None:
        found = []
        for cell in cells:
            numbers = np.arange(1.0 + cell.seed + self.machine, 9.0 + cell.seed, dtype=np.float32)[:7]
            for need in self.needs(cell):
                arrays, header = load_arrays(cell_path(place.run, need))
                assert header["cell"] == need.key
                numbers = arrays["numbers"] * np.float32(self.rate) + 1
            header = {"schema": SCHEMA, "cell": cell.key, "config": self.digest}
            save_arrays(cell_path(place.run, cell), {"numbers": numbers}, header)
            who = {"seed": cell.seed, "arm": cell.arm, "level": cell.level, "draw": cell.draw}
            evaluations = [
                who | {"step": step, "partial": float(numbers[:step].sum())} for step in range(STEPS)
            ]
            times = {"train_seconds": 0.1, "step_seconds": 0.1 / STEPS}
            found.append(Finished(cell, {"total": float(numbers.sum())}, evaluations, times))
        return found

    def table(self, record: RunRecord) -> str:
        return "\n".join(f"{p['seed']:>5} {p['level']:>5} {p['total']:.6g}" for p in record.points)


if __name__ != "simulated":  # a plugin; tests make it known where they want it
    register(Simulated)


def compute(path: Path, config: Simulated, resume: bool = True, stop: int = 10**9) -> tuple[int, str]:
    """What `run` does, without processes: how many cells were computed, and which damage was named."""
    count = 0
    with open_run(path, config, {"break_even": {}}, resume) as folder:
        agenda = Agenda(config, folder.finished)
        while count < stop and (cells := agenda.next()):
            done = config.compute(cells, Place(path, None, {}))
            assert done is not None
            agenda.finished(cells, folder.add(done))
            count += len(cells)
        if count and len(folder.finished) == len(config.cells()):
            folder.complete()
        return count, folder.damage
