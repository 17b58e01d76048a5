"""What a sweep will take: steps are timed here, once for all runs whose steps are alike."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum

import numpy as np

from sparselth.cluster.executor import How
from sparselth.cluster.store import Run, record_of
from sparselth.cluster.sweep import Planned
from sparselth.config import Cell
from sparselth.experiments.plan import Plan
from sparselth.experiments.run import plan, priced
from sparselth.experiments.training import Training
from sparselth.machine import choose_device

# what changes nothing of how long a dense step takes: of an experiment, and of a recipe
OF_CELLS = {"rate", "rewind"}
OF_RATES = {"lr", "momentum", "weight_decay", "warmup", "lr_drops", "cosine"}


@dataclass(frozen=True)
class Cost:
    """Seconds of a sweep."""

    runs: dict[str, float]  # of each missing run, on a worker of its own
    wall: float  # until the last of them ends
    slowdown: float = 1.0  # of the wall time by others who are busy here

    @property
    def together(self) -> float:
        return fsum(self.runs.values())


def cost(planned: Planned, how: How) -> Cost | None:
    """What the missing runs take on the sweep's workers, beside whoever else is busy here.

    None where it cannot be told: of GPUs that are not in this machine, or of an experiment without a price.
    """
    if planned.device == "cuda" and choose_device("auto")[0] != "cuda":
        return None
    lots, seconds, slowdown = dict[str, list[Run]](), dict[str, float](), 1.0
    for run in planned.missing:
        lots.setdefault(_steps(run), []).append(run)
    for lot in lots.values():
        if not isinstance(lot[0].config, Training):
            found = {run.name: _untrained(run, _finished(planned, run)) for run in lot}
            if None in found.values():
                return None
            seconds |= {name: one for name, one in found.items() if one is not None}
            continue
        # whose last level is the sparsest has the levels of the others between its own
        sparsest = min(lot, key=lambda run: run.config.remaining()[-1])
        timed = _timed(sparsest, how)
        assert timed.price is not None
        slowdown = max(slowdown, timed.price.slowdown(planned.workers))
        seconds |= {run.name: _trained(run, timed, _finished(planned, run)) for run in lot}
    alone = wall([seconds[run.name] for run in planned.missing], planned.workers)
    return Cost(seconds, slowdown * alone, slowdown)


def wall(seconds: Sequence[float], workers: int) -> float:
    """When the last of these ends, begun in this order, each by the first of so many workers that is free."""
    ends = [0.0] * workers
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def _steps(run: Run) -> str:
    """What tells the steps of a run from those of another."""
    data = {name: v for name, v in run.config.identity().items() if name not in run.config.extends()}
    data = {name: value for name, value in data.items() if name not in OF_CELLS}
    if recipe := data.get("recipe"):
        data["recipe"] = {name: value for name, value in recipe.items() if name not in OF_RATES}
    return json.dumps([run.config.name, data], sort_keys=True)


def _timed(run: Run, how: How) -> Plan:
    planned = plan(
        run.config,
        data_dir=how.data_dir,
        workers=1,
        replicas=how.replicas,
        deterministic=how.deterministic,
        note=_unheard,
    )
    return priced(replace(planned, environment=planned.environment | {"break_even": run.break_even}))


def _trained(run: Run, timed: Plan, finished: set[Cell]) -> float:
    """Seconds of a run whose steps were timed of another: its levels lie between those of that one."""
    config, theirs, price = run.config, timed.config, timed.price
    assert isinstance(config, Training)
    assert isinstance(theirs, Training)
    assert price is not None
    known = sorted(zip(theirs.remaining(), price.levels, price.looks, strict=True))
    left, *shares = zip(*known, strict=True)
    levels, looks = (tuple(np.interp(config.remaining(), left, some).tolist()) for some in shares)
    config = replace(config, eval_images=theirs.eval_images)
    return replace(price, levels=levels, looks=looks).run_seconds(config, finished, 1, timed.limit)


def _untrained(run: Run, finished: set[Cell]) -> float | None:
    costs = [run.config.seconds(cell) for cell in run.config.cells() if cell not in finished]
    known = [one for one in costs if one is not None]
    return fsum(known) if len(known) == len(costs) else None


def _finished(planned: Planned, run: Run) -> set[Cell]:
    """Cells of a run that are finished already."""
    record = record_of(planned.path, run)
    return {Cell.of(point) for point in record.points} if record else set()


def _unheard(text: str) -> None:
    """What a user must know was said when the sweep was planned."""
