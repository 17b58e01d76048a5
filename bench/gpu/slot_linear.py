"""slot_linear at its target's shape and beyond 2^31; dense products, cuSPARSE and 2:4 as rivals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import Copies, Run, median, ratio, rows
from oracle import DTYPES, PARTS, compare, must_repeat, must_replay, near, need_memory
from sparselth.kernels.slot_linear import Slots, floor, slot_linear
from sparselth.kernels.two_four_linear import TwoFour, two_four_linear

TARGET = 8192, 0.9  # size and sparsity that the target is about
WORKLOADS: dict[str, list[tuple[int, float, int]]] = {  # size, sparsity, batch
    "bf16": [(*TARGET, 32), (*TARGET, 64)]
    + [
        (size, sparsity, batch)
        for size in (8192, 4096)
        for sparsity in (0.8, 0.9, 0.95)
        for batch in (16, 32, 64, 128)
        if (size, sparsity) != TARGET or batch in (16, 128)
    ],
    "fp16": [(*TARGET, 32)],
}


class Problem(NamedTuple):
    x: Tensor
    w: Tensor  # 0 where pruned
    bias: Tensor


def problem(here: Here, part: str, shape: tuple[int, int, int], density: float) -> Problem:
    """Of shape B, N, K."""
    (b, n, k), g = shape, here.generator(0)
    keep = torch.rand(n, k, generator=g, device=here.device) < density

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    return Problem(normal(b, k), normal(n, k).mul_(keep), normal(n))


def formula(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"y": F.linear(p.x.to(dtype), p.w.to(dtype), p.bias.to(dtype))}


# Offsets beyond 2^31, grids beyond 65,535


def many_weights(here: Here, part: str) -> None:
    """More than 2^31 pairs of slots; the first and the last block of rows against float64."""
    need_memory(20)
    blocks, k, b = here.pick((3, 128, 5), (2**11 + 8, 2**16, 16))
    g, chunks = here.generator(0), k // 64
    values = torch.empty(blocks, chunks, 256, 8, dtype=DTYPES[part], device=here.device)
    values.uniform_(-1, 1, generator=g)
    # of each of a thread's four eights two bits: both of byte i, or one of byte i and one of the next
    codes = torch.tensor([0xFF << 8 * i for i in range(4)] + [0x5555 << 8 * i for i in range(3)])
    places = codes.to(torch.int32).to(here.device)
    places = places[torch.randint(0, 7, (chunks, 256), generator=g, device=here.device)]
    places = places.expand(blocks, chunks, 256).contiguous()
    none = values.new_empty(0), places.new_empty(0).byte(), places.new_empty(0).to(torch.uint16)
    starts = places.new_zeros(blocks * -(-k // 512) + 1)
    x = torch.randn(b, k, generator=g, device=here.device).to(DTYPES[part])
    y = slot_linear(Slots((128 * blocks, k), values, places, *none, starts), x, kernels="triton")
    for at in (0, blocks - 1):
        block = Slots((128, k), values[at : at + 1], places[at : at + 1], *none, starts[: -(-k // 512) + 1])
        near(
            y[:, 128 * at : 128 * (at + 1)],
            x.double() @ block.to_dense().double().t(),
            k,
            dtype=PARTS[part],
            capped=False,
        )


def far_rows(here: Here, part: str) -> None:
    """x, then y, of more than 2^31 numbers, then more than 65,535 rows; the ends against float64."""
    need_memory(24)
    shapes = [(32803, 40, 65536), (32803, 65540, 40), (70001, 1100, 40)]
    for b, n, k in here.pick([(37, 40, 20)], shapes):
        p = problem(here, part, (1, n, k), 0.05)
        x = torch.empty(b, k, dtype=DTYPES[part], device=here.device)
        x.uniform_(-1, 1, generator=here.generator(1))
        y = slot_linear(Slots.from_dense(p.w), x, p.bias, kernels="triton")
        ends = torch.tensor([0, b // 2, b - 1], device=here.device)
        near(y[ends], formula(p._replace(x=x[ends]), torch.double)["y"], k, dtype=PARTS[part], capped=False)


def large(here: Here) -> Iterator[Case]:
    yield Case("beyond 2^31 pairs of slots", "bf16", partial(many_weights, here, "bf16"), 10)
    yield Case("beyond 2^31 numbers of x and y, 65,535 rows", "bf16", partial(far_rows, here, "bf16"), 15)


# At the size of the target


class Workload:
    """A random mask over a square matrix."""

    def __init__(self, here: Here, part: str, size: int, sparsity: float, batch: int) -> None:
        self.part, self.name = part, f"{size} square, {sparsity:.0%} pruned, batch {batch}"
        self.p = problem(here, part, (batch, size, size), 1 - sparsity)
        self.features = self.p.x.t().contiguous()
        self.slots = Slots.from_dense(self.p.w)

    def y(self) -> dict[str, Tensor]:
        """As it is fastest: x features-major."""
        return {"y": slot_linear(self.slots, self.features.t(), self.p.bias, kernels="triton")}

    def check(self) -> None:
        p, part = self.p, self.part
        right, torchs, found = formula(p, torch.double), formula(p, DTYPES[part]), self.y()
        compare(found, right, torchs, part, {"y": p.w.shape[1]})
        in_rows = {"y": slot_linear(self.slots, p.x, p.bias, kernels="triton")}
        must_repeat(in_rows, found, "x in rows")

    def replay(self) -> None:
        """A CUDA graph gives the bits of a plain call."""
        must_replay(self.y)

    def ours(self, x: Tensor) -> Copies:
        def make() -> Run:
            slots = Slots(self.slots.shape, *(t.clone() for t in self.slots.tensors()))
            return lambda: slot_linear(slots, x, kernels="triton")

        return Copies(make, self.slots.bytes())

    def product(self, call: Callable[[Tensor], object]) -> Copies:
        """A call on the same weights and their zeros."""

        def make() -> Run:
            w = self.p.w.clone()
            return lambda: call(w)

        return Copies(make, self.p.w.nbytes)

    def dense(self) -> dict[str, Copies]:
        """Each way that torch has."""
        return {
            "dense F.linear": self.product(lambda w: F.linear(self.p.x, w)),
            "dense w @ x": self.product(lambda w: w @ self.features),
        }


def two_four(w: Tensor, x: Tensor) -> Run:
    """Made in the first call, which is not timed and may fail."""
    made: list[TwoFour] = []

    def run() -> Tensor:
        if not made:
            made.append(TwoFour.from_dense(w))
        return two_four_linear(made[0], x)

    return run


def smoke(here: Here) -> Iterator[Case]:
    def run(part: str, check: Callable[[Workload], None]) -> None:
        check(Workload(here, part, *here.pick((64, 0.9), TARGET), 32))

    yield Case("target shape, batch 32", "bf16", partial(run, "bf16", Workload.check), 3)
    if here.device == "cuda":
        yield Case("in a CUDA graph, batch 32", "bf16", partial(run, "bf16", Workload.replay))


def timed(here: Here, part: str, size: int, sparsity: float, batch: int, more: bool) -> dict[str, Any]:
    """Beside dense products, and with `more` x in rows, beside cuSPARSE and 2:4."""
    load = Workload(here, part, size, sparsity, batch)
    dense = load.dense()
    rivals: dict[str, Run | Copies] = {"triton": load.ours(load.features.t()), **dense}
    if more:
        rivals |= {"triton, x in rows": load.ours(load.p.x), "2:4 + residual": two_four(load.p.w, load.p.x)}
    if more and here.device == "cuda":  # no half precision on CPUs
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
            csr = load.p.w.to_sparse_csr()
        rivals["torch CSR"] = lambda: csr @ load.features
    wrong = judged(load.check)
    found = rows(here, load.name, floor(load.slots, batch), part, "triton", rivals)
    best = min((t for name in dense if (t := median(found, name, "cold"))), default=None)
    return {"times": found, "best dense": ratio(best, median(found, "triton", "cold"))} | wrong


def targets(here: Here) -> Iterator[Case]:
    size, sparsity = here.pick((64, 0.9), TARGET)

    def figures() -> dict[str, Any]:
        found = timed(here, "bf16", size, sparsity, 32, more=False)
        return found | {"figures": {"times the best dense, cold, batch 32": found.pop("best dense")}}

    yield Case(f"{size} square, {sparsity:.0%} pruned, batch 32", "bf16", figures, 4)


def benchmarks(here: Here) -> Iterator[Case]:
    for part, workloads in WORKLOADS.items():
        for size, sparsity, batch in here.pick([(64, 0.9, 5)], workloads):
            name = f"{size} square, {sparsity:.0%} pruned, batch {batch}"
            yield Case(name, part, partial(timed, here, part, size, sparsity, batch, more=True), 4)
