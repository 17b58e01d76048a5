"""What a cell of `connectivity` computes: the start of a training, a copy that goes on from it, a line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparselth import pruning, tickets
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Chunk, Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.many import Many, barrier, line
from sparselth.engine.paths import choose
from sparselth.engine.state import Job, Stopped
from sparselth.experiments.base import Diverged, Finished, Place
from sparselth.experiments.jobs import finished, job, train
from sparselth.files import Arrays, save_arrays
from sparselth.models import Model
from sparselth.runs import cell_path
from sparselth.streams import stream

SCHEMA = "sparselth.line/1"
TIMED = 0.3  # seconds at least that a line is looked along to foretell what it takes


class Connectivity(Protocol):
    """Of `connectivity.ConnectivityConfig`, what is needed here."""

    @property
    def model(self) -> str: ...
    @property
    def network(self) -> Model: ...
    @property
    def dataset(self) -> str: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def kernels(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def points(self) -> int: ...
    @property
    def line_images(self) -> int | None: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    def cells(self) -> list[Cell]: ...
    def rungs(self) -> list[dict[str, int]]: ...
    def kind(self, cell: Cell) -> str: ...
    def step_of(self, cell: Cell) -> int: ...
    def other(self, cell: Cell, kind: str, level: int = 0, draw: int = 0) -> Cell: ...


@dataclass(frozen=True, kw_only=True)
class Begun(Recipe):
    """The first steps of a recipe, at its learning rates."""

    whole: Recipe

    def lr_at(self, step: int) -> float:
        return self.whole.lr_at(step)


def compute(
    config: Connectivity, cells: Sequence[Cell], place: Place
) -> Sequence[Finished | Diverged] | None:
    """Cells one kind after the other; those that train together may lie side by side."""

    def finish(
        model: Model, one: Job, place: Place, where: dict[str, Any], at_early_stop: float, final: float
    ) -> Finished:
        """Each with its own rewind step, whoever trains beside it."""
        return finished(model, one, place, where | _where(config, one.who), at_early_stop, final)

    found = list[Finished | Diverged]()
    copies = [cell for cell in cells if config.kind(cell) == "from"]
    if copies:
        jobs = [
            job(cell, place, config.recipe, start(config, cell, place), config.step_of(cell), None)
            for cell in copies
        ]
        where = _where(config, copies[0])
        done = train(config.network, jobs, config.recipe, config.kernels, place, where, finish)
        if done is None:
            return None
        found += done
    for cell in cells:
        kind = config.kind(cell)
        if kind == "from":
            continue
        done = _begin(config, cell, place) if kind == "start" else _path(config, cell, place)
        if done is None:
            return found or None
        found += done
    return found


def _where(config: Connectivity, cell: Cell) -> dict[str, Any]:
    where = {"model": config.model, "dataset": config.dataset, "config": config.digest}
    return where | {"cell": cell.key, "rewind_step": config.step_of(cell)}


def start(config: Connectivity, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
    """The mask [M] of a start or a copy, and the weights [P] that it goes on from."""
    model, k = config.network, config.step_of(cell)
    if not k or config.kind(cell) == "start":
        weights = init_weights(model, stream(cell.seed, "ticket", 0, "init"))
    else:
        begun, _ = tickets.read(cell_path(place.run, config.other(cell, "start")), model.params)
        weights = torch.from_numpy(begun.weights)
    mask = model.params.full_mask()
    if cell.level:
        file = cell_path(place.run, config.other(cell, "from", cell.level - 1))
        before, _ = tickets.read(file, model.params)
        trained, mask = (torch.from_numpy(array).to(config.device) for array in (before.weights, before.mask))
        takes = choose(config.kernels, config.device).magnitude_threshold.takes
        mask = pruning.prune(
            model.params,
            trained[: model.params.mask_size].abs(),
            mask,
            config.rungs()[cell.level],
            "triton" if takes == "triton" else "reference",
        ).cpu()
    return mask, weights


def _begin(config: Connectivity, cell: Cell, place: Place) -> list[Finished | Diverged] | None:
    """Train to a rewind step; all steps of a seed lie on one path, whose draws are of no step."""
    k, recipe = config.step_of(cell), config.recipe
    begun = Begun(**vars(recipe) | {"steps": k, "whole": recipe})
    one = job(cell, place, begun, start(config, cell, place), 0, None)
    one.draws = Cell(cell.seed, "start", 0)
    return train(config.network, [one], begun, config.kernels, place, _where(config, cell))


def _looks(config: Connectivity, data: Resident, seed: int) -> tuple[Many, list[Sequence[Chunk]], Tensor]:
    """What looks along lines, the test and the training images that it looks at, and the points of a line."""
    assert config.line_images is not None
    many = Many(config.network, data, seed, config.kernels)
    places = torch.linspace(0, 1, config.points, dtype=torch.float64, device="cpu").float()
    looked = [many.test(config.line_images), many.training(config.line_images)]
    return many, looked, places.to(data.device)


def seconds_of_lines(config: Connectivity, data: Resident) -> dict[Cell, float]:
    """What cells that look along lines take: the time of some lots of images on one, times their number."""
    many, looked, places = _looks(config, data, config.seeds[0])
    weights = init_weights(config.network, stream(config.seeds[0], "ticket", 0, "init")).to(data.device)
    clock, asked = time.perf_counter if data.device == "cuda" else time.process_time, list[float]()

    def enough() -> bool:
        """Asked before every lot."""
        if data.device == "cuda":
            torch.cuda.synchronize()
        asked.append(clock())
        return len(asked) > 2 and asked[-1] - asked[0] > TIMED

    for _ in range(1 if data.held_bytes else 2):  # images in files are decoded the first time
        asked.clear()
        with suppress(Stopped):
            many.measure(config.points, line(weights, weights, places), looked, enough)
    lots = len(many.settles) + sum(map(len, looked))
    together = next(end for _, end in many.parts(config.points))
    each = median(end - began for began, end in pairwise(asked)) / together
    seconds = config.points * lots * each
    lines = [cell for cell in config.cells() if config.kind(cell) == "path"]
    return {cell: seconds * (1 + (cell.level > 0)) for cell in lines}  # and one to the dense network


def _path(config: Connectivity, cell: Cell, place: Place) -> list[Finished | Diverged] | None:
    """The error along the line between two copies, and between the dense network and the ticket."""
    assert place.data is not None
    model, k, began = config.network, config.step_of(cell), time.process_time()

    def ends(level: int, draw: int = 0) -> tickets.Content:
        return tickets.read(cell_path(place.run, config.other(cell, "from", level, draw)), model.params)[0]

    left, right = ends(cell.level), ends(cell.level, 1)
    lines = {"": (left, right)} | ({"dense_": (ends(0), left)} if cell.level else {})
    many, looked, places = _looks(config, place.data, cell.seed)
    said: dict[str, Any] = {"rewind_step": k}
    kept = model.params.kept(torch.from_numpy(left.mask))
    said |= {"weights_remaining": sum(kept.values()) / model.params.prunable}
    said |= {
        f"{name}_images": sum(len(y) if many.one_by_one else int(y.shape[2]) for _, y in chunks)
        for name, chunks in zip(("test", "train"), looked, strict=True)
    }
    arrays: Arrays = {"places": places.cpu().numpy()}
    for name, pair in lines.items():
        first, last = (torch.from_numpy(end.weights).to(place.data.device) for end in pair)
        make = line(first, last, places)
        try:
            found = many.measure(config.points, make, looked, place.should_stop)
        except Stopped:
            return None
        for lot, (losses, accuracies) in zip(("", "train_"), found, strict=True):
            errors = [1 - accuracy for accuracy in accuracies]
            said[f"{name}{lot}instability" if not name else f"{lot}dense_barrier"] = barrier(errors)
            said[f"{name}{lot}error"] = errors
            if not name and not lot:
                said["final_accuracy"] = (accuracies[0] + accuracies[-1]) / 2
            arrays[f"{name}{lot}error"], arrays[f"{name}{lot}loss"] = np.array(errors), np.array(losses)
        if not name:
            trained = slice(model.params.trained_size)
            said["distance"] = float((first[trained].double() - last[trained].double()).norm())
    header = {"schema": SCHEMA, "config": config.digest, "cell": cell.key, "rewind_step": k}
    save_arrays(cell_path(place.run, cell), arrays, header)
    seconds = time.process_time() - began
    timings = {"train_seconds": seconds, "step_seconds": 0.0, "clock": "processor"}
    return [Finished(cell, said, [], timings)]
