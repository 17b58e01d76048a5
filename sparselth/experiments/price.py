"""Which cells train next, in which batches, and what they will cost.

`Agenda` hands out batches: the tickets of all seeds, because everything waits for them, and beside them
what else can start, the controls. `Price` goes through the same agenda with the times of one device, so the
plan that is foretold is the plan that runs.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from sparselth.config import FRESH, ImpConfig, Recipe, Replica
from sparselth.errors import SparselthError
from sparselth.models import Model, get_model


class Agenda:
    """Which cells come next: tickets first, then by level."""

    def __init__(self, config: ImpConfig, finished: Iterable[Replica]) -> None:
        self.config, self.done = config, set(finished)
        self.open = [who for who in config.replicas() if who not in self.done]
        self._sort()

    def __len__(self) -> int:
        return len(self.open)

    def next(self, limit: int = 1) -> list[Replica]:
        """Take up to `limit` cells that can start; none when all wait for others."""
        ready = [who for who in self.open if needs(self.config, who) in self.done | {None}]
        for who in ready[:limit]:
            self.open.remove(who)
        return ready[:limit]

    def back(self, cells: Iterable[Replica]) -> None:
        """Cells that were taken and could not be trained."""
        self.open += cells
        self._sort()

    def finished(self, cells: Iterable[Replica]) -> None:
        self.done.update(cells)

    def _sort(self) -> None:
        self.open.sort(key=lambda who: (who.arm != "ticket", who.level))


def needs(config: ImpConfig, who: Replica) -> Replica | None:
    """The cell that must be finished before `who` can start."""
    if who.level == 0:
        return None
    return Replica(who.seed, "ticket", 0 if config.one_shot else who.level - 1)


@dataclass(frozen=True)
class Price:
    """What cells cost on a device.

    `batches` are seconds of a dense step by number of replicas, from 1 on; `levels` is the share of it that
    a step takes by level, where sparse layers cost less. Images are those of an evaluation.
    """

    batches: dict[int, float]
    levels: tuple[float, ...]
    validation: dict[int, float]
    test_share: float  # test images for a validation image
    fixed_bytes: int  # of a worker, without replicas
    replica_bytes: int
    overhead_seconds: float = 0.0  # of a batch, beside steps and evaluations

    def batch_seconds(self, config: ImpConfig, cells: list[Replica]) -> float:
        recipe = config.recipe
        share = sum(self.levels[who.level] for who in cells) / len(cells)
        steps = recipe.steps - min(_start(config, who) for who in cells)
        evaluations = -(-steps // recipe.eval_every) + 2 * self.test_share
        seconds = steps * _line(self.batches, len(cells)) + evaluations * _line(self.validation, len(cells))
        return seconds * share + self.overhead_seconds

    def run_seconds(self, config: ImpConfig, finished: Iterable[Replica], workers: int, limit: int) -> float:
        """When the last batch ends, by going through the schedule."""
        agenda, clock, busy = Agenda(config, finished), 0.0, list[tuple[float, int, list[Replica]]]()
        for number in range(10**9):
            while len(busy) < workers and (cells := agenda.next(limit)):
                seconds = self.batch_seconds(config, cells)
                heapq.heappush(busy, (clock + seconds, number * workers + len(busy), cells))
            if not busy:
                break
            clock, _, cells = heapq.heappop(busy)
            agenda.finished(cells)
        return clock

    def run_bytes(self, config: ImpConfig, workers: int, limit: int) -> int:
        return workers * (self.fixed_bytes + min(limit, widest(config)) * self.replica_bytes)


def widest(config: ImpConfig) -> int:
    """The most cells that can train at one time."""
    agenda, most = Agenda(config, ()), 0
    while cells := agenda.next(10**9):
        most = max(most, len(cells))
        agenda.finished(cells)
    return most


def replica_bytes(model: Model, recipe: Recipe) -> int:
    """Device memory of one replica of a batch: its state, and the activations of a step and an evaluation."""
    moments = 2 if recipe.optimizer == "adam" else 1
    # weights, best weights, moments, and gradients where a convolution writes them; masks are a bit a weight
    floats = model.params.size * (2 + moments + model.convolves + 1 / 32)
    numbers = [prod(shape) for shape in model.shapes]
    chunk = model.evaluation_batch
    # a layer's output, its gradient and what a pool or a loss holds beside them
    floats += recipe.batch_size * 4 * sum(numbers) + chunk * (2 * sum(numbers) + numbers[0])
    return int(4 * floats)


def recorded(device: str, config: ImpConfig) -> tuple[str, Price]:
    """A device's name and its prices, from the results that `bench/gpu_check.py` wrote there.

    `device` is a part of its name, as in bench/results/nvidia-h200.json, or the path of such a file.
    """
    folder = Path(__file__).resolve().parents[2] / "bench" / "results"
    file = Path(device)
    if not file.is_file():
        files = sorted(folder.glob(f"*{device.lower()}*.json"))
        if not files:
            known = ", ".join(sorted(f.stem for f in folder.glob("*.json"))) or "none"
            raise SparselthError(
                f"--price-on {device}: nothing was recorded on such a device (recorded: {known}); "
                "bench/gpu_check.py, run there, records it"
            )
        timed = [f for f in files if '"train_step"' in f.read_text()]
        file = min(timed or files, key=lambda f: len(f.name))
    try:
        data = json.loads(file.read_text())
        rows = [r for r in data["times"] if r["op"] == "train_step" and r["ours"] and "wrong" not in r]
        name = str(data["device"].get("name") or data["device"]["cpu"])
        found = {kind: _recorded_line(rows, kind, config) for kind in ("step", "evaluation")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparselthError(f"--price-on {device}: {file} cannot be read ({error})") from error
    if not all(found.values()):
        recipe = config.recipe
        known = ", ".join(sorted({f"{row['model']} with {row['optimizer']}" for row in rows})) or "no step"
        raise SparselthError(
            f"--price-on {device}: {file.name} has no steps of {config.model} with {recipe.optimizer} and "
            f"batches of {recipe.batch_size}; it has {known}"
        )
    model = get_model(config.model)
    levels = (1.0,) * (config.levels + 1)  # on a GPU every step is dense
    return name, Price(
        *(found["step"], levels, found["evaluation"], 2.0, 2 * 10**9),
        replica_bytes(model, config.recipe),
    )


def _recorded_line(rows: list[dict[str, Any]], kind: str, config: ImpConfig) -> dict[int, float]:
    """Seconds by number of replicas."""
    recipe = config.recipe
    wanted = config.model, recipe.optimizer, recipe.batch_size, kind
    return {
        int(row["replicas"]): float(min(way["median_s"] for way in row["ways"].values()))
        for row in rows
        if (row["model"], row["optimizer"], row["batch_size"], row["kind"]) == wanted
    }


def _start(config: ImpConfig, who: Replica) -> int:
    return 0 if who.level == 0 or who.arm in FRESH else config.rewind


def _line(points: dict[int, float], x: int) -> float:
    """Seconds at x replicas: between two measured points on their line, beyond the last in proportion."""
    sizes = sorted(points)
    if x <= sizes[0]:
        return points[sizes[0]]
    for low, high in pairwise(sizes):
        if x <= high:
            return points[low] + (points[high] - points[low]) * (x - low) / (high - low)
    return points[sizes[-1]] * x / sizes[-1]
