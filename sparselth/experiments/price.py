"""What cells that train cost on a device: measured here, or recorded there.

`Price` goes through the same agenda as the run, with the times of one device, so the plan that is foretold
is the plan that runs.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import fsum, prod
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from sparselth import machine
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.autograd import takes_autograd
from sparselth.engine.choose import prepare, trains_alone
from sparselth.engine.memory import free_memory, is_out_of_memory, resident_bytes
from sparselth.engine.paths import choose
from sparselth.errors import SparselthError
from sparselth.experiments.agenda import Agenda, widest
from sparselth.experiments.training import Training
from sparselth.files import read_json
from sparselth.machine import RESULTS
from sparselth.models import Add, BatchNorm, Layer, MaxPool, Model
from sparselth.models.module import ModuleModel

LONG: dict[str, Any] = {"steps": 20_000, "eval_every": 20_000, "lr_drops": (), "warmup": 0}
STRETCH = 5  # least steps between looks at the clock
TIMED = 0.3  # seconds that steps are timed
LOOK = 0.5  # seconds of an evaluation up to which all images of it are looked at
CONTEXT = 5 * 10**8  # device memory that CUDA and its libraries take


@dataclass(frozen=True)
class Price:
    """What cells cost on a device; on a CPU in processor time, which does not count who else has its cores.

    `batches` are seconds of a dense step by number of replicas, from 1 on, `validation` those of a dense
    evaluation; `levels` and `looks` are the shares of them that a step and an evaluation take by level, where
    sparse layers cost less. `before` is what cells take before they train, or instead. While it was measured,
    others had `busy` of the `cores`.
    """

    batches: dict[int, float]
    levels: tuple[float, ...]
    validation: dict[int, float]
    looks: tuple[float, ...]
    test_share: float  # test images of an evaluation for a validation image of one
    fixed_bytes: int  # of a worker, without replicas
    replica_bytes: int
    overhead_seconds: float = 0.0  # of a batch, beside steps and evaluations
    busy: float = 0.0
    cores: int = 1
    before: Mapping[Cell, float] = field(default_factory=dict)

    def batch_seconds(self, config: Training, cells: list[Cell]) -> float:
        before = fsum(self.before.get(cell, 0.0) for cell in cells)
        return before + sum(self._parts(config, cells)) + self.overhead_seconds

    def _parts(self, config: Training, cells: list[Cell]) -> tuple[float, float]:
        """Seconds of the steps of a batch, and of its evaluations."""
        recipe, rungs = config.recipe, [config.rung(cell) for cell in cells]
        steps = recipe.steps - min(config.start_step(cell) for cell in cells)
        if not steps and self.before.keys() >= set(cells):
            return 0.0, 0.0  # they train no network
        evaluations = -(-steps // recipe.eval_every) + 2 * self.test_share
        trained, looked = (
            _line(dense, len(cells)) * fmean(shares[rung] for rung in rungs)
            for dense, shares in ((self.batches, self.levels), (self.validation, self.looks))
        )
        return steps * trained, evaluations * looked

    def evaluation_share(self, config: Training, finished: Collection[Cell]) -> float:
        """The share of evaluations in the time of the cells that are missing, in [0, 1]."""
        missing = [cell for cell in config.cells() if cell not in finished]
        parts = [(self.before.get(cell, 0.0), *self._parts(config, [cell])) for cell in missing]
        sums = [fsum(part) for part in zip(*parts, strict=True)] or [0.0]
        return sums[-1] / (fsum(sums) or 1.0)

    def slowdown(self, workers: int) -> float:
        """How much longer workers take beside others who go on as they are, cores being shared evenly."""
        return max(1.0, (min(workers, self.cores) + self.busy) / self.cores) if self.busy else 1.0

    def run_seconds(self, config: Training, finished: Iterable[Cell], workers: int, limit: int) -> float:
        """When the last batch ends, by going through the schedule; on a machine of its own."""
        agenda, clock, busy = Agenda(config, finished), 0.0, list[tuple[float, int, list[Cell]]]()
        for number in range(10**9):
            while len(busy) < workers and (cells := agenda.next(limit, workers - len(busy))):
                seconds = self.batch_seconds(config, cells)
                heapq.heappush(busy, (clock + seconds, number * workers + len(busy), cells))
            if not busy:
                break
            clock, _, cells = heapq.heappop(busy)
            agenda.finished(cells)
        return clock

    def run_bytes(self, config: Training, workers: int, limit: int) -> int:
        return workers * (self.fixed_bytes + min(limit, widest(config)) * self.replica_bytes)


def replica_bytes(model: Model, recipe: Recipe) -> int:
    """Device memory of one replica of a batch: its state, and the activations of a step and an evaluation."""
    moments = 2 if recipe.optimizer == "adam" else 1
    # weights, best weights, moments, and gradients where a convolution writes them; masks are a bit a weight
    floats = model.params.size * (2 + moments + model.convolves + 1 / 32)
    numbers, chunk = [prod(shape) for shape in model.shapes], model.evaluation_batch
    if model.needs_autograd and not isinstance(model, ModuleModel):
        kept = numbers[0] + sum(_kept(node.op) * n for node, n in zip(model.nodes, numbers[1:], strict=True))
        return int(
            4 * (floats + max(recipe.batch_size * (kept + 3 * max(numbers)), 4 * chunk * max(numbers)))
        )
    # a layer's output, its gradient and what a pool or a loss holds beside them
    floats += recipe.batch_size * 4 * sum(numbers) + chunk * (2 * sum(numbers) + numbers[0])
    return int(4 * floats)


def _kept(op: Layer) -> int:
    """Floats that torch keeps for the gradient for each number that a layer of a graph puts out.

    A batch norm keeps what it reads, which is the output of what is before it.
    """
    return {BatchNorm: 0, Add: 0, MaxPool: 3}.get(type(op), 1)  # of a pool places, too, int64


def recorded(device: str, config: Training) -> tuple[str, Price]:
    """A device's name and its prices, from the results that `bench/gpu_check.py` wrote there.

    `device` is a part of its name, as in bench/results/nvidia-h200.json, or the path of such a file.
    """
    folder = Path(__file__).resolve().parents[2] / "bench" / "results"
    file = Path(device)
    if not file.is_file():
        files = [found for found in sorted(folder.glob("*.json")) if device.lower() in found.stem]
        if not files:
            known = ", ".join(sorted(f.stem for f in folder.glob("*.json"))) or "none"
            raise SparselthError(
                f"`price_on` {device}: nothing was recorded on such a device (recorded: {known}); "
                "bench/gpu_check.py, run there, records it"
            )
        timed = [f for f in files if b'"train_step"' in f.read_bytes()]
        file = min(timed or files, key=lambda f: len(f.name))
    try:
        data = read_json(file, RESULTS)
        rows = [r for r in data["times"] if r["op"] == "train_step" and r["ours"] and "wrong" not in r]
        name = str(data["device"].get("name") or data["device"]["cpu"])
        found = {kind: _recorded_line(rows, kind, config) for kind in ("step", "evaluation")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise SparselthError(f"`price_on` {device}: {file} cannot be read ({error})") from error
    if not all(found.values()):
        recipe = config.recipe
        known = ", ".join(sorted({f"{row['model']} with {row['optimizer']}" for row in rows})) or "no step"
        raise SparselthError(
            f"`price_on` {device}: {file.name} has no steps of {config.model} with {recipe.optimizer} and "
            f"batches of {recipe.batch_size}; it has {known}"
        )
    model = config.network
    levels = (1.0,) * len(config.rungs())  # on a GPU all networks are dense
    return name, Price(
        *(found["step"], levels, found["evaluation"], levels, 2.0, 2 * 10**9),
        replica_bytes(model, config.recipe),
    )


def _recorded_line(rows: list[dict[str, Any]], kind: str, config: Training) -> dict[int, float]:
    """Seconds by number of replicas."""
    recipe = config.recipe
    wanted = config.model, recipe.optimizer, recipe.batch_size, kind
    found = {
        int(row["replicas"]): float(min(way["median_s"] for way in row["ways"].values()))
        for row in rows
        if (row["model"], row["optimizer"], row["batch_size"], row["kind"]) == wanted
    }
    if not all(0 < seconds < math.inf and replicas > 0 for replicas, seconds in found.items()):
        raise ValueError(f"a time or a number of replicas of its {kind}s is none")
    return found


def _line(points: dict[int, float], x: int) -> float:
    """Seconds at x replicas: between two measured points on their line, beyond the last in proportion."""
    sizes = sorted(points)
    if x <= sizes[0]:
        return points[sizes[0]]
    for low, high in pairwise(sizes):
        if x <= high:
            return points[low] + (points[high] - points[low]) * (x - low) / (high - low)
    return points[sizes[-1]] * x / sizes[-1]


def measured(
    config: Training, data: Resident, break_even: Mapping[str, float], limit: int, split: int = 1
) -> tuple[Price, int]:
    """Time a few steps of one dense network and of as many as train at once, and, where sparse is cheaper,
    of sparse ones; and an evaluation of each, or a batch of it where all takes long. Nothing of it is kept.
    Also how many replicas fit into memory. With `split` it is a worker's share of these, and what workers
    send each other is not counted.
    """
    each = replica_bytes(config.widest, _share(config.recipe, split))
    limit = min(limit, widest(config))
    if data.device == "cuda":
        limit = max(1, min(limit, int(0.9 * torch.cuda.mem_get_info()[0] / each)))
    overhead = 0.0
    cuda = data.device == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    neighbours = machine.Neighbours()

    def timed(rung: int, replicas: int) -> tuple[float, float]:
        """Seconds of a step of all, over TIMED of them, and of an evaluation."""
        nonlocal overhead
        sampled = [config.sample(rung, draw, data.device) for draw in range(replicas)]
        model, _, recipe = sampled[0]
        jobs, recipe = [job for _, job, _ in sampled], replace(_share(recipe, split), **LONG)
        some = data.sample(data.chunk)
        began = clock()
        steps = prepare(model, some, jobs, recipe, config.kernels, break_even)
        steps.advance(0, 1, lambda: False)
        steps.measure()
        overhead = clock() - began
        stretch = max(STRETCH, steps.many)
        began, taken = clock(), 1
        while taken + stretch < recipe.steps and clock() - began < TIMED:
            taken += steps.advance(taken, stretch if taken > 1 else 1, lambda: False)
            if cuda:
                torch.cuda.synchronize()
        spent, began = clock() - began, clock()
        steps.measure()
        looked = (clock() - began) * data.n_validated / some.n_validated
        if looked < LOOK and not cuda:  # a batch alone stays in the caches
            some.look_at(data.n_validated)
            steps.measure()
            began = clock()
            steps.measure()
            looked = clock() - began
        return spent / (taken - 1), looked / split

    batches, validation = dict[int, float](), dict[int, float]()
    batches[1], validation[1] = timed(0, 1)
    paths = choose(config.kernels, data.device)
    alone = trains_alone(paths, data.device)
    if takes_autograd(config.widest, paths):  # modules of which several are asked for can train so
        alone = not isinstance(config.widest, ModuleModel)
    while limit > 1 and not alone:  # alone, a batch takes what its replicas take one after another
        try:
            batches[limit], validation[limit] = timed(0, limit)
            break
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        limit //= 2
    dense_overhead = overhead if cuda else 0.0
    timed_rungs, left = config.timed_rungs(bool(break_even)), config.remaining()
    found = [(batches[1], validation[1]), *(timed(rung, 1) for rung in timed_rungs[1:])]
    shares = [[one / times[0] for one in times] for times in zip(*found, strict=True)]
    if len(timed_rungs) < len(left):
        # from sparse to dense, as np.interp wants its points
        known = [left[rung] for rung in timed_rungs[::-1]]
        shares = [np.interp(left, known, some[::-1]).tolist() for some in shares]
    levels, looks = map(tuple, shares)
    fixed = data.held_bytes + CONTEXT if cuda else resident_bytes()
    test_share = data.n_tested / data.n_validated
    price = Price(batches, levels, validation, looks, test_share, fixed, each, dense_overhead)
    price = replace(price, before=config.beforehand(data))
    if not cuda:
        price = replace(price, busy=neighbours.cores_taken(), cores=machine.cores())
    return price, limit


def _share(recipe: Recipe, split: int) -> Recipe:
    """The recipe with the largest share of a batch that one of so many workers has."""
    return replace(recipe, batch_size=-(-recipe.batch_size // split))
