"""What this device can do at best, measured: the least time of a piece of work is its floor.

    floor = max(bytes / bandwidth, FLOPs / rate)

Bandwidth: the best of a copy, a sum and a scalar product, for buffers from 32 KB to more than any cache; a
small piece of work lies in a cache and has that cache's bandwidth. Rate: the best of large dense products.
Both are the fastest ever seen, since a floor that was measured beside other work would be no floor.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sparselth import clock
from sparselth.check import DTYPES

SIZES = (1 << 15, 1 << 18, 1 << 21, 1 << 24, 1 << 26, 1 << 28)  # bytes, on a CPU
SIDES = (512, 1024, 2048)  # of square products, on a CPU
SECONDS = 0.12  # for each size
SLACK = 1.1  # a time may be that much below its floor: the anchors have been measured, too


@dataclass
class Anchors:
    """Bytes a second for buffers of a size, FLOPs a second by dtype."""

    device: str
    dtypes: tuple[str, ...]
    bandwidth: dict[int, float] = field(default_factory=dict)
    rate: dict[str, float] = field(default_factory=dict)
    disturbed: bool = False  # whether others had the processor meanwhile, so that nothing here is the best

    def measure(self) -> None:
        """Measure, or measure again: what is faster than before counts."""
        began, before = time.perf_counter(), clock.waited()
        (self._cuda if self.device == "cuda" else self._cpu)()
        self.disturbed = clock.waited() - before > clock.WAIT * (time.perf_counter() - began)
        # What a large buffer reaches a small one can; a product may be computed in fp32 whatever its dtype.
        best = 0.0
        for size in sorted(self.bandwidth, reverse=True):
            best = self.bandwidth[size] = max(best, self.bandwidth[size])
        for name in self.dtypes:
            self.rate[name] = max(self.rate[name], self.rate["fp32"])

    def floor(self, bytes_: int, flops: float, dtype: str) -> float:
        """Least seconds for so many bytes, each moved once, and so many FLOPs."""
        sizes = sorted(self.bandwidth)
        size = sizes[max(0, bisect.bisect_right(sizes, bytes_) - 1)]
        return max(bytes_ / self.bandwidth[size], flops / self.rate[dtype])

    def facts(self) -> dict[str, Any]:
        """For the document."""
        return {
            "bytes_per_s": {str(size): rate for size, rate in sorted(self.bandwidth.items())},
            "flops_per_s": dict(self.rate),
        }

    def _cpu(self) -> None:
        for size in SIZES:
            x, y = (
                torch.ones(size // 4, dtype=torch.float32, device="cpu"),
                torch.zeros(size // 4, dtype=torch.float32, device="cpu"),
            )
            again = x.expand(max(1, (1 << 21) // size), -1)  # so many sums that a call's overhead is nothing
            ways: list[tuple[int, Callable[[], object]]] = [
                (4 * again.numel(), again.sum),
                (2 * size, partial(torch.dot, x, y)),
                (2 * size, partial(y.copy_, x)),
            ]
            for moved, call in ways:
                found = moved / _least(call, SECONDS / 3)
                self.bandwidth[size] = max(self.bandwidth.get(size, 0.0), found)
        for name in self.dtypes:
            for side in SIDES if name == "fp32" else SIDES[:1]:
                a = torch.randn(side, side, dtype=torch.float32, device="cpu").to(DTYPES[name])
                found = 2 * side**3 / _least(partial(torch.mm, a, a), SECONDS)
                self.rate[name] = max(self.rate.get(name, 0.0), found)

    def _cuda(self) -> None:
        n = min(2**30, torch.cuda.mem_get_info()[0] // 32)
        pair = torch.randn(2, n, device="cuda", dtype=torch.float32)
        copied, summed = (
            _least_cuda(call) for call in (lambda: pair[0].copy_(pair[1]), lambda: pair[0].sum())
        )
        self.bandwidth[n] = max(self.bandwidth.get(n, 0.0), 8 * n / copied, 4 * n / summed)
        for name in self.dtypes:
            a, b = (
                torch.randn(8192, 8192, device="cuda", dtype=torch.float32).to(DTYPES[name]) for _ in range(2)
            )
            with precision(name):
                found = 2 * 8192**3 / _least_cuda(partial(torch.mm, a, b))
            self.rate[name] = max(self.rate.get(name, 0.0), found)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """fp32 products and convolutions in TF32 for "tf32", in full precision otherwise."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def fp32(device: str) -> AbstractContextManager[None]:
    """No TF32 on CUDA; on a CPU nothing, since torch.export refuses to run beside that setting."""
    return precision("fp32") if device == "cuda" else nullcontext()


def _least(call: Callable[[], object], seconds: float) -> float:
    """The fastest of the calls that fit into `seconds`, at least three."""
    call()
    taken: list[float] = []
    sample, began = clock.wall(call), time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < seconds:
        taken.append(sample())
    return min(taken)


def _least_cuda(call: Callable[[], object]) -> float:
    sample = clock.warm(call)
    return min(sample() for _ in range(8))
