"""bitmask at 2.7e8 weights and beyond 2^31: exact; torch's own reductions as rivals."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import rows
from oracle import Wrong, graphed, need_memory
from sparselth.kernels.bitmask import floor, launch_count, launch_pack, launch_unpack, reference_pack


def exact(name: str, found: Tensor, right: Tensor) -> None:
    if found.shape != right.shape or found.dtype != right.dtype or not torch.equal(found, right):
        raise Wrong(f"{name} is not exact: {found.dtype} {list(found.shape)}")


def vast(here: Here) -> None:
    """More than 2^31 weights, rows that end within a byte, and no multiple of 4 bytes: counted byte by byte,
    by more than 65,535 programs."""
    need_memory(12)
    n, k = here.pick((37, 44), (65537, 32780))
    keep = torch.empty(n, k, dtype=torch.bool, device=here.device).random_(generator=here.generator(0))
    bits = launch_pack(keep, kernels="triton")
    for rows_ in (slice(0, 64), slice(n - 64, n)):
        exact("pack", bits[rows_], reference_pack(keep[rows_]))
    exact("unpack", launch_unpack(bits, k, kernels="triton"), keep)
    exact("count of rows", launch_count(bits, None, True, kernels="triton"), keep.sum(1))
    exact("count", launch_count(bits, None, False, kernels="triton"), keep.sum())


def large(here: Here) -> Iterator[Case]:
    yield Case("beyond 2^31 weights", "bits", partial(vast, here), 8)


OPS = ("pack", "unpack", "count")


class Workload:
    """A mask of 2.7e8 weights, half of them kept."""

    def __init__(self, here: Here) -> None:
        self.n = here.pick(1 << 10, 1 << 28)
        shape = self.n // 1024, 1024
        self.keep = torch.rand(shape, generator=here.generator(0), device=here.device) < 0.5
        self.bits = reference_pack(self.keep)

    def ours(self, op: str) -> Tensor:
        if op == "pack":
            return launch_pack(self.keep, kernels="triton")
        if op == "unpack":
            return launch_unpack(self.bits, 1024, kernels="triton")
        return launch_count(self.bits, None, False, kernels="triton")

    def check(self) -> None:
        for op, right in zip(OPS, (self.bits, self.keep, self.keep.sum()), strict=True):
            exact(op, self.ours(op), right)

    def replay(self) -> None:
        """CUDA graphs of all three give what plain calls give."""
        kept: dict[str, Tensor] = {}
        for op in OPS:
            graph = graphed(lambda op=op: kept.update({op: self.ours(op)}), 1)  # type: ignore[misc]
            kept[op].zero_()
            graph.replay()
            exact(f"{op} in a graph", kept[op], self.ours(op))


def smoke(here: Here) -> Iterator[Case]:
    yield Case("2.7e8 weights", "bits", lambda: Workload(here).check())
    if here.device == "cuda":
        yield Case("2.7e8 weights in a CUDA graph", "bits", lambda: Workload(here).replay())


def benchmark(here: Here, op: str) -> dict[str, Any]:
    load = Workload(here)
    wrong = judged(load.check)
    theirs = {
        "pack": ("torch", lambda: reference_pack(load.keep)),
        "unpack": ("copy of the mask", load.keep.clone),
        "count": ("sum of the mask", load.keep.sum),
    }
    rivals = dict([("triton", partial(load.ours, op)), theirs[op]])
    timed = rows(here, f"{op} {load.n:.1e} weights", floor(op, load.n), "ieee", "triton", rivals)
    return {"times": timed} | wrong


def benchmarks(here: Here) -> Iterator[Case]:
    for op in OPS:
        yield Case(op, "bits", partial(benchmark, here, op))
