"""slot_linear: against float64, every pair of places; dense products, cuSPARSE and 2:4 as rivals."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here
from gpu.timing import median, ratio, rows
from oracle import (
    DTYPES,
    NAN,
    Wrong,
    compare,
    graphed,
    layed,
    must_repeat,
    need_memory,
    poisoned,
    surrounded,
)
from sparselth.kernels.slot_linear import Slots, floor, slot_linear
from sparselth.kernels.two_four_linear import TwoFour, two_four_linear

Shape = tuple[int, int, int]  # B, N, K
LAYOUTS = ("contiguous", "transposed", "sliced", "off the grid")
TINY: list[Shape] = [(1, 1, 1), (17, 20, 70), (3, 130, 580)]
SMALL: list[Shape] = TINY + [
    *[(b, 300, 784) for b in (1, 15, 16, 31, 32, 33, 64, 100, 128, 129, 300)],
    *[(32, 128, 64), (32, 1000, 65536), (16, 4000, 40), (64, 257, 513)],
]
LARGE: list[Shape] = [(16, 4096, 4096), (32, 8192, 8192), (128, 4096, 11008)]
TARGET = 8192, 0.9  # size and sparsity that the targets are about
WORKLOADS: dict[str, list[tuple[int, float, int]]] = {  # size, sparsity, batch; --quick times two
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
    w: Tensor  # NaN where pruned
    keep: Tensor
    bias: Tensor


def problem(here: Here, part: str, shape: Shape, density: float, seed: int = 0) -> Problem:
    """With an empty and a full row, where there are so many."""
    b, n, k = shape
    g = here.generator(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    keep = torch.rand(n, k, generator=g, device=here.device) < density
    if n > 2 and 0 < density < 1:
        keep[0], keep[-1] = False, True
    return Problem(normal(b, k), normal(n, k).masked_fill_(~keep, NAN), keep, normal(n))


def formula(p: Problem, dtype: torch.dtype, relu: bool = False) -> dict[str, Tensor]:
    y = F.linear(p.x.to(dtype), torch.where(p.keep, p.w, 0).to(dtype), p.bias.to(dtype))
    return {"y": y.relu() if relu else y}


def ours(slots: Slots, p: Problem, relu: bool = False) -> dict[str, Tensor]:
    return {"y": slot_linear(slots, p.x, p.bias, relu, kernels="triton")}


def guarded(slots: Slots) -> Slots:
    """The same with NaN, and indices that lead nowhere, around its arrays."""

    def around(t: Tensor) -> Tensor:
        if t.dtype.is_floating_point or t.dtype == torch.uint8:
            return surrounded(t)
        bits = t.view(torch.int16 if t.itemsize == 2 else torch.int32)
        wide = bits.new_full((bits.numel() + 512,), 0x5555)
        wide[256:-256] = bits.flatten()
        return wide[256:-256].view(t.dtype).view(t.shape)

    return Slots(slots.shape, *map(around, slots.tensors()))


def check(
    here: Here, part: str, shape: Shape, density: float = 0.2, layout: str = "contiguous", seed: int = 0
) -> dict[str, float]:
    """y against float64, twice; NaN in pruned weights, around all operands and in all that is allocated."""
    p = problem(here, part, shape, density, seed)
    slots = Slots.from_dense(p.w, p.keep)
    if not torch.equal(slots.to_dense(), torch.where(p.keep, p.w, 0)):
        raise Wrong("the weights in slots are not those that were put there")
    relu = seed % 2 == 1
    absolute = formula(Problem(p.x.abs(), p.w.abs(), p.keep, p.bias.abs()), torch.double)
    right, torchs = formula(p, torch.double, relu), formula(p, DTYPES[part], relu)
    spread = p._replace(x=layed(p.x, layout))
    with poisoned():
        found = ours(guarded(slots), spread, relu)
        errors = compare(found, right, torchs, part, {"y": shape[2]}, absolute)
        must_repeat(ours(guarded(slots), spread, relu), found)
    must_repeat(ours(slots, p, relu), found, "another layout")
    return errors


def every_place(here: Here, part: str) -> None:
    """A product with the identity is the weights: each choice of up to three of every 8 places."""
    choices = [c for size in (0, 1, 2, 3) for c in itertools.combinations(range(8), size)]
    places = (0, 1, 8, 9, 16, 17, 24, 25)
    w = torch.zeros(len(choices), 512, dtype=DTYPES[part], device=here.device)
    for row, choice in enumerate(choices):
        for first in range(0, 512, 32):
            for q in range(4):
                for at in choice:
                    w[row, first + 2 * q + places[at]] = 1 + (row + 3 * first + 5 * q + at) % 200
    for kept in (w, w.flip(0)):  # the rows of the residual, too
        slots, identity = Slots.from_dense(kept), torch.eye(512, dtype=w.dtype, device=w.device)
        found = slot_linear(slots, identity, kernels="triton").t()
        if not torch.equal(found, kept):
            wrong = (found != kept).nonzero()
            raise Wrong(f"{len(wrong)} of {w.numel()} differ, first at n, k = {wrong[0].tolist()}")


def no_weights(here: Here, part: str) -> None:
    p = problem(here, part, (17, 20, 30), 0.0)
    with poisoned():
        found = ours(Slots.from_dense(p.w, p.keep), p)["y"]
    if not torch.equal(found, p.bias.expand_as(found)):
        raise Wrong("y is not the bias")


def replayed(here: Here, part: str) -> None:
    p = problem(here, part, (33, 300, 784), 0.1)
    slots = Slots.from_dense(p.w, p.keep)
    eager = ours(slots, p)
    kept: dict[str, Tensor] = {}
    graph = graphed(lambda: kept.update(ours(slots, p)), 1)
    kept["y"].fill_(NAN)
    graph.replay()
    must_repeat(kept, eager, "a CUDA graph")


def checks(part: str, here: Here) -> Iterator[Case]:
    draw = random.Random(0)

    def case(name: str, run: Any, *args: Any, **kwargs: Any) -> Case:
        return Case(name, part, partial(run, here, part, *args, **kwargs))

    if here.size != "tiny":  # the interpreter has its own decoding
        yield case("every choice of places", every_place)
    for shape in here.pick(TINY, SMALL + LARGE[:1], SMALL + LARGE):
        yield case(said(shape), check, shape)
    for layout in LAYOUTS[1:]:
        for batch in here.pick((18,), (18, 40, 128), (18, 40, 64, 128)):
            yield case(f"{said((batch, 12, 70))}, {layout}", check, (batch, 12, 70), layout=layout)
    for density in (0.02, 0.5, 1.0):
        shape = here.pick((9, 17, 60), (40, 300, 1000), (40, 300, 1000))
        yield case(f"{said(shape)}, {density:.0%} kept", check, shape, density)
    yield case("no weights", no_weights)
    for i in range(here.pick(2, 12, 60)):
        most = here.pick((17, 40, 200), (300, 600, 3000), (300, 600, 3000))
        shape = draw.randint(1, most[0]), draw.randint(1, most[1]), draw.randint(1, most[2])
        density, layout = draw.random() ** 2, draw.choice(LAYOUTS)
        name = f"random {i}: {said(shape)}, {density:.0%} kept, {layout}"
        yield case(name, check, shape, density, layout, seed=i)
    if here.size != "tiny":
        yield case("in a CUDA graph", replayed)


def said(shape: Shape) -> str:
    return "B{} N{} K{}".format(*shape)


# Offsets beyond 2^31


def many_weights(here: Here, part: str) -> None:
    """More than 2^31 pairs of slots; the first and the last block of rows against float64."""
    need_memory(20)
    blocks, k, b = here.pick((3, 128, 5), (0, 0, 0), (2**11 + 8, 2**16, 16))
    g, chunks = here.generator(0), k // 64
    values = torch.empty(blocks, chunks, 256, 8, dtype=DTYPES[part], device=here.device)
    values.uniform_(-1, 1, generator=g)
    codes = torch.tensor(  # four pairs of places, never the same one twice
        [sum((p << 3 | (p + i + 1) % 8) << 8 * i for i in range(4)) for p in range(8)], device=here.device
    )
    places = codes.int()[torch.randint(0, 8, (chunks, 256), generator=g, device=here.device)]
    places = places.expand(blocks, chunks, 256).contiguous()
    none = values.new_empty(0), places.new_empty(0).byte(), places.new_empty(0).to(torch.uint16)
    starts = places.new_zeros(blocks * -(-k // 512) + 1)
    x = torch.randn(b, k, generator=g, device=here.device).to(DTYPES[part])
    y = slot_linear(Slots((128 * blocks, k), values, places, *none, starts), x, kernels="triton")
    for at in (0, blocks - 1):
        block = Slots((128, k), values[at : at + 1], places[at : at + 1], *none, starts[: -(-k // 512) + 1])
        near(y[:, 128 * at : 128 * (at + 1)], x.double() @ block.to_dense().double().t())


def far_rows(here: Here, part: str) -> None:
    """x, then y, of more than 2^31 numbers; the first and the last rows against float64."""
    need_memory(24)
    for b, n, k in here.pick([(37, 40, 20)], [], [(32803, 40, 65536), (32803, 65540, 40)]):
        p = problem(here, part, (1, n, k), 0.05)
        x = torch.empty(b, k, dtype=DTYPES[part], device=here.device)
        x.uniform_(-1, 1, generator=here.generator(1))
        y = slot_linear(Slots.from_dense(p.w, p.keep), x, p.bias, kernels="triton")
        ends = torch.tensor([0, b // 2, b - 1], device=here.device)
        near(y[ends], formula(p._replace(x=x[ends]), torch.double)["y"])


def near(found: Tensor, right: Tensor) -> None:
    error = float((found.double() - right).norm() / right.norm())
    if not error <= 1e-2:
        raise Wrong(f"error {error:.2e}")


def large(part: str, here: Here) -> Iterator[Case]:
    yield Case("beyond 2^31 pairs of slots", part, partial(many_weights, here, part))
    yield Case("beyond 2^31 numbers of x and y", part, partial(far_rows, here, part))


# Benchmarks


def two_four(w: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Made in the first call, which is not timed and may fail."""
    made: list[TwoFour] = []

    def run() -> Tensor:
        if not made:
            made.append(TwoFour.from_dense(w))
        return two_four_linear(made[0], x)

    return run


def benchmark(here: Here, part: str, size: int, sparsity: float, batch: int) -> dict[str, Any]:
    """A random mask; with the dense product each way that torch has, of the same weights and their zeros."""
    g = here.generator(0)
    keep = torch.rand(size, size, generator=g, device=here.device) >= sparsity
    w = torch.randn(size, size, generator=g, device=here.device).to(DTYPES[part]) * keep
    x = torch.randn(batch, size, generator=g, device=here.device).to(DTYPES[part])
    p = Problem(x, w, keep, w.new_zeros(size))
    slots = Slots.from_dense(w, keep)
    features = x.t().contiguous()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        csr = w.to_sparse_csr()
    dense = {"dense F.linear": lambda: F.linear(x, w), "dense w @ x": lambda: w @ features}
    rivals = {
        "triton": lambda: slot_linear(slots, x, kernels="triton"),
        "triton, x features-major": lambda: slot_linear(slots, features.t(), kernels="triton"),
        **dense,
        "2:4 + residual": two_four(w, x),
    }
    if x.is_cuda:  # no half precision on CPUs
        rivals["torch CSR"] = lambda: csr @ features
    compare(ours(slots, p), formula(p, torch.double), formula(p, DTYPES[part]), part, {"y": size})
    workload = f"{size} square, {sparsity:.0%} pruned, batch {batch}"
    timed = rows(here, workload, floor(slots, batch), part, "triton", rivals)
    figures: dict[str, float | None] = {}
    if part == "bf16" and (size, sparsity) == TARGET:
        others = [t for name in dense if (t := median(timed, name, "cold"))]
        best = min(others, default=None)
        figures[f"times the best dense, cold, batch {batch}"] = ratio(best, median(timed, "triton", "cold"))
        figures["bytes of weights, of dense"] = slots.bytes() / (w.numel() * w.itemsize)
    return {"times": timed, "figures": figures}


def benchmarks(part: str, here: Here) -> Iterator[Case]:
    full = WORKLOADS[part]
    quick = full[:2] if part == "bf16" else []
    for size, sparsity, batch in here.pick([(64, 0.9, 5)], quick, full):
        name = f"{size} square, {sparsity:.0%} pruned, batch {batch}"
        yield Case(name, part, partial(benchmark, here, part, size, sparsity, batch))
