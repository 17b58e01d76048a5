"""Runs for tests of reports, point by point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparselth.config import Recipe
from sparselth.experiments.imp import ImpConfig
from sparselth.runs import RunRecord

KEPT = {"fc1.weight": 235_200, "fc2.weight": 30_000, "fc3.weight": 1_000}


def points(
    arm: str, level: int, accuracies: Iterable[float | None], stop: Any = 500, **more: Any
) -> list[Any]:
    """A point a seed, 0, 1, ...; `stop` of all of them or of each."""
    accuracies = [*accuracies]
    stops = stop if isinstance(stop, Sequence) else [stop] * len(accuracies)
    shared = {"arm": arm, "level": level, "draw": 0, "weights_remaining": 0.8**level, "kept": KEPT} | more
    return [
        {"seed": seed, "accuracy_at_early_stop": a, "final_accuracy": a, "early_stop_step": step} | shared
        for seed, (a, step) in enumerate(zip(accuracies, stops, strict=True))
        if a is not None
    ]


def record(some: list[Any], seeds: int = 3, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "model": "lenet-300-100", "dataset": "mnist", "seeds": tuple(range(seeds)), "levels": 1,
        "arms": ("ticket", "reinit"), "device": "cpu", "recipe": Recipe(steps=1000, lr=1e-3),
    }  # fmt: skip
    return RunRecord(Path("run"), ImpConfig(**values | changes), some, [])
