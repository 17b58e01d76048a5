"""What races of whole networks have in common: a dense network beside its pruned one, the clock, the rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparselth import pruning
from sparselth.clock import SHARE, Race, Sample, Timing, mark, rounds, warm, warm_wall
from sparselth.config import Cell
from sparselth.engine.dense import init_weights
from sparselth.errors import UsageError
from sparselth.machine import cpu_name
from sparselth.measure import noise
from sparselth.measure.memory import Memory
from sparselth.models import Model
from sparselth.streams import stream

Say = Callable[[str], None]
Keep = Callable[["Result"], None]  # gets what there is so far
Call = Callable[[], object]
Row = dict[str, Any]
REST = 0.005  # seconds; OpenMP's threads go on spinning for a while
WHO = Cell(0, "ticket", 0)


@dataclass(frozen=True)
class Result:
    """What was measured; `report.network_tables` says it in words."""

    what: str  # "ticket", "model" or "training"
    device: str
    rows: list[Row]
    memory: dict[str, tuple[Memory, Memory]]  # what was running -> of the dense and the pruned network
    failed: bool  # whether a check did
    facts: dict[str, Any]  # of the ticket, of the images, of the checks
    notes: list[str] = field(default_factory=list)  # why something was not measured


@dataclass(frozen=True)
class Case:
    """A dense network and its pruned counterpart, buffers [P] of one model."""

    model: Model
    dense: Tensor
    pruned: Tensor
    mask: Tensor  # [M]

    @property
    def sparsity(self) -> float:
        return 1 - sum(self.model.params.kept(self.mask).values()) / self.model.params.prunable


def random_case(model: Model, sparsity: float) -> Case:
    """Fresh weights, of which every layer keeps the same share, chosen at random."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"`sparsity` {sparsity:g}: expected a number from 0 to below 1, the share of zeros")
    dense = init_weights(model, stream(0, "bench", 0, "init"))
    noise = torch.rand(
        model.params.mask_size, generator=stream(0, "bench", 0, "mask"), dtype=torch.float32, device="cpu"
    )
    keep = {spec.name: round((1 - sparsity) * spec.numel) for spec in model.weights}
    mask = pruning.prune(model.params, noise, model.params.full_mask(), keep, "reference")
    pruned = dense.clone()
    pruned[: model.params.mask_size] *= mask
    return Case(model, dense, pruned, mask)


def no_keep(found: Result) -> None:
    """For callers who wait for the whole."""


def check_batches(batches: Sequence[int]) -> None:
    """UsageError where one is no number of images."""
    for batch in batches:
        if batch < 1:
            raise UsageError(f"`batch` {batch}: expected 1 or more images")


def row_of(name: str, sparsity: float, label: str, batch: int, times: Mapping[str, Timing], best: str) -> Row:
    """What every row of a network has."""
    return {
        "implementation": label,
        "network": name,
        "batch": batch,
        "dtype": "fp32",
        "sparsity": round(sparsity, 4),
        "threads": torch.get_num_threads(),
        "median_s": times[label].median,
        "iqr_s": times[label].spread,
        "samples": times[label].samples,
        "disturbed": times[label].disturbed,
        "dense_best": best,
        "dense_median_s": times[best].median,
        "speedup": times[best].median / times[label].median,
        "noisy": noise.decides(times[label], times[best]),
    }


def conversion_of(seconds: float, times: Mapping[str, Timing], best: str) -> Row:
    """Calls until the conversion has paid for itself against dense at its best; None: never."""
    gain = times[best].median - times["sparselth"].median
    return {"conversion_s": seconds, "pays_after": math.ceil(seconds / gain) if gain > 0 else None}


def best_of(times: Mapping[str, Timing], without: set[str]) -> str:
    """The fastest dense rival that is right."""
    right = [label for label in times if label not in without] or ["dense" if "dense" in times else "torch"]
    return min(right, key=lambda label: times[label].median)


def race(calls: Mapping[str, Call], device: str, others: Collection[str] = ()) -> dict[str, Timing]:
    """All rivals in turn, warm; again while noise decides between ours and the best not in `others`."""
    sample = warm if device == "cuda" else _rested
    found = Race({label: sample(call) for label, call in calls.items()}, watch=device == "cpu")
    for _ in range(noise.AGAIN + 1):
        rounds(found)
        times = found.timings()
        if not noise.decides(times["sparselth"], times[best_of(times, {"sparselth", *others})]):
            break
        found = found.only(calls, SHARE)
    return times


def _rested(call: Call) -> Sample:
    """`warm_wall` once the threads of the rival before have gone to sleep."""
    sample = warm_wall(call)

    def rested() -> float:
        time.sleep(REST)
        call()
        mark()
        return sample()

    return rested


def where(device: str) -> str:
    """On what it was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else None
    name = name or f"{cpu_name()}, threads {torch.get_num_threads()}"
    return f"{name}, torch {torch.__version__}, fp32"
