"""csr_infer: against float64, NaN and infinity; dense products and cuSPARSE as rivals."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import Copies, Run, median, ratio, rows
from oracle import (
    DTYPES,
    INF,
    NAN,
    Wrong,
    compare,
    graphed,
    layed,
    must_repeat,
    need_memory,
    poisoned,
    precision,
    surrounded,
)
from sparselth.kernels.csr_infer import PackedCsr, csr_infer, floor

Shape = tuple[int, int, int]  # N, K, B
LAYOUTS = ("contiguous", "transposed", "sliced", "off the grid")
TINY: list[Shape] = [(1, 1, 1), (5, 47, 8), (9, 130, 3)]
SMALL: list[Shape] = TINY + [
    *[(300, 784, b) for b in (1, 2, 4, 5, 8, 11, 16, 17, 64)],
    *[(10, 100, 8), (3, 50000, 1), (1, 4096, 16), (2000, 31, 8), (40, 65536, 8), (40, 65537, 8)],
]
LARGE: list[Shape] = [(4096, 4096, 1), (8192, 8192, 8), (1000, 25088, 16), (16384, 2048, 13)]
TARGET = 8192, 0.9  # size and sparsity that the targets are about
WORKLOADS: dict[str, list[tuple[int, float, int]]] = {  # size, sparsity, batch
    "bf16": [(*TARGET, 1), (*TARGET, 8)]
    + [
        (size, sparsity, batch)
        for size in (8192, 4096)
        for sparsity in (0.8, 0.9, 0.95, 0.98)
        for batch in (1, 8, 16)
        if (size, sparsity) != TARGET or batch == 16
    ],
    "fp16": [(*TARGET, 1), (*TARGET, 8)],
    "ieee": [(*TARGET, 1), (*TARGET, 8), (4096, 0.9, 1), (4096, 0.9, 8)],
}


class Problem(NamedTuple):
    x: Tensor
    w: Tensor  # NaN where pruned
    keep: Tensor
    bias: Tensor


def problem(here: Here, part: str, shape: Shape, density: float, seed: int = 0) -> Problem:
    """With rows of very different length, an empty and a full one, where there are so many."""
    n, k, b = shape
    g = here.generator(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    share = torch.linspace(0, 2 * density, n, device=here.device)[:, None] if n > 8 else density
    keep = torch.rand(n, k, generator=g, device=here.device) < share
    if n > 2 and 0 < density < 1:
        keep[0], keep[-1] = False, True
    return Problem(normal(k, b), normal(n, k).masked_fill_(~keep, NAN), keep, normal(n))


def formula(p: Problem, dtype: torch.dtype, relu: bool = False) -> dict[str, Tensor]:
    w = torch.where(p.keep, p.w, 0).to(dtype)
    y = torch.addmm(p.bias.to(dtype)[:, None], w, p.x.to(dtype))
    return {"y": y.relu_() if relu else y}


def ours(packed: PackedCsr, p: Problem, relu: bool = False) -> dict[str, Tensor]:
    return {"y": csr_infer(packed, p.x, p.bias, relu, kernels="triton")}


def guarded(packed: PackedCsr) -> PackedCsr:
    """The same with NaN, and indices that lead nowhere, around its arrays."""

    def around(t: Tensor) -> Tensor:
        if t.dtype.is_floating_point:
            return surrounded(t)
        bits = t.view(torch.int16 if t.itemsize == 2 else torch.int32)
        wide = bits.new_full((bits.numel() + 512,), 0x5555)
        wide[256:-256] = bits
        return wide[256:-256].view(t.dtype)

    return PackedCsr(packed.shape, packed.lanes, *map(around, packed.arrays()))


def check(
    here: Here, part: str, shape: Shape, density: float = 0.2, layout: str = "contiguous", seed: int = 0
) -> dict[str, float]:
    """y against float64, twice; NaN in pruned weights, around all operands and in all that is allocated."""
    p = problem(here, part, shape, density, seed)
    packed = PackedCsr.from_dense(p.w, p.keep)
    if not torch.equal(packed.to_dense(), torch.where(p.keep, p.w, 0)):
        raise Wrong("the packed weights are not those that were packed")
    relu = seed % 2 == 1
    absolute = formula(Problem(p.x.abs(), p.w.abs(), p.keep, p.bias.abs()), torch.double)
    right, torchs = formula(p, torch.double, relu), formula(p, DTYPES[part], relu)
    spread = p._replace(x=layed(p.x, layout))
    with poisoned():
        found = ours(guarded(packed), spread, relu)
        errors = compare(found, right, torchs, part, {"y": shape[1]}, absolute)
        must_repeat(ours(guarded(packed), spread, relu), found)
    return errors


def extreme(here: Here, part: str, value: float, batch: int) -> None:
    """What is not finite in x reaches y through kept weights, unchanged, and never through empty places."""
    p = problem(here, part, (40, 300, batch), 0.1)
    for column in (0, 7, 299):  # 0 is what empty places hold
        x = p.x.clone()
        x[column, -1] = value
        y = ours(PackedCsr.from_dense(p.w, p.keep), p._replace(x=x))["y"]
        if not y[:, :-1].isfinite().all() or not torch.equal(~y[:, -1].isfinite(), p.keep[:, column]):
            raise Wrong(f"{value} in column {column} of x does not reach exactly its rows of y")
        signs = p.w[:, column].sign() * value
        if value == INF and not torch.equal(y[p.keep[:, column], -1], signs[p.keep[:, column]]):
            raise Wrong(f"infinity in column {column} of x does not come out as infinity")


def no_weights(here: Here, part: str) -> None:
    p = problem(here, part, (17, 21, 8), 0.0)
    with poisoned():
        found = ours(PackedCsr.from_dense(p.w, p.keep), p)["y"]
    if not torch.equal(found, p.bias[:, None].expand_as(found)):
        raise Wrong("y is not the bias")


def replayed(here: Here, part: str) -> None:
    p = problem(here, part, (300, 784, 11), 0.1)
    packed = PackedCsr.from_dense(p.w, p.keep)
    eager = ours(packed, p)
    kept: dict[str, Tensor] = {}
    graph = graphed(lambda: kept.update(ours(packed, p)), 1)
    kept["y"].fill_(NAN)
    graph.replay()
    must_repeat(kept, eager, "a CUDA graph")


def checks(part: str, here: Here) -> Iterator[Case]:
    draw = random.Random(0)

    def case(name: str, run: Any, *args: Any, **kwargs: Any) -> Case:
        def precise() -> Any:
            with precision(part):
                return run(here, part, *args, **kwargs)

        return Case(name, part, precise)

    for shape in here.pick(TINY, SMALL + LARGE[:2], SMALL + LARGE):
        yield case(said(shape), check, shape)
    for layout in LAYOUTS[1:]:
        for batch in here.pick((8,), (1, 8, 13), (1, 8, 13)):
            shape = (18, 70, batch)
            yield case(f"{said(shape)}, {layout}", check, shape, layout=layout)
    for density in here.pick((1.0,), (0.01, 0.5, 1.0), (0.01, 0.5, 1.0)):
        shape = here.pick((5, 60, 8), (300, 1000, 8), (300, 1000, 8))
        yield case(f"{said(shape)}, {density:.0%} kept", check, shape, density)
    yield case("no weights", no_weights)
    for value in (NAN, INF):
        for batch in here.pick((2,), (1, 8, 16), (1, 8, 16)):
            yield case(f"{value} in x, batch {batch}", extreme, value, batch)
    for i in range(here.pick(2, 12, 60)):
        most = here.pick((9, 200, 17), (600, 3000, 40), (600, 3000, 40))
        shape = draw.randint(1, most[0]), draw.randint(1, most[1]), draw.randint(1, most[2])
        density, layout = draw.random() ** 2, draw.choice(LAYOUTS)
        name = f"random {i}: {said(shape)}, {density:.0%} kept, {layout}"
        yield case(name, check, shape, density, layout, seed=i)
    if here.size != "tiny":
        yield case("in a CUDA graph", replayed)


def said(shape: Shape) -> str:
    return "N{} K{} B{}".format(*shape)


# Offsets beyond 2^31


def many_weights(here: Here, part: str) -> None:
    """More than 2^31 kept weights, of full rows; the first, a middle and the last rows against float64."""
    need_memory(24)
    n, k, lanes, b = *here.pick((10, 128), (0, 0), (2**17 + 8, 2**14)), 16, 8
    g = here.generator(0)
    values = torch.empty(n * k, dtype=DTYPES[part], device=here.device).uniform_(-1, 1, generator=g)
    # place j of group l of a step holds kept weight 16 j + l; here all are kept
    order = torch.arange(k, device=here.device).view(-1, 8, lanes).permute(0, 2, 1).reshape(k)
    columns = order.int().to(torch.uint16).repeat(n)
    starts = (k // 8) * torch.arange(n + 1, dtype=torch.int32, device=here.device)
    numbers = 8 * torch.arange(n, dtype=torch.int32, device=here.device)
    packed = PackedCsr((n, k), lanes, values, columns, starts, numbers)
    x = torch.randn(k, b, generator=g, device=here.device).to(DTYPES[part])
    y = csr_infer(packed, x, kernels="triton")
    ends = torch.tensor([0, n // 2, n - 1], device=here.device)
    near(y[ends], values.view(n, k)[ends].double() @ x[order].double())


def far_columns(here: Here, part: str) -> None:
    """x and y of more than 2^31 numbers; the first and the last columns against float64."""
    need_memory(24)
    for n, k, b in here.pick([(40, 20, 37)], [], [(40, 65536, 32803), (65540, 40, 32803)]):
        p = problem(here, part, (n, k, 1), 0.05)
        x = torch.empty(k, b, dtype=DTYPES[part], device=here.device)
        x.uniform_(-1, 1, generator=here.generator(1))
        y = csr_infer(PackedCsr.from_dense(p.w, p.keep), x, p.bias, kernels="triton")
        ends = torch.tensor([0, b // 2, b - 1], device=here.device)
        near(y[:, ends], formula(p._replace(x=x[:, ends]), torch.double)["y"])


def near(found: Tensor, right: Tensor) -> None:
    error = float((found.double() - right).norm() / right.norm())
    if not error <= 1e-2:
        raise Wrong(f"error {error:.2e}")


def large(here: Here) -> Iterator[Case]:
    for part in here.pick(("bf16", "ieee"), ("bf16",)):
        yield Case("beyond 2^31 kept weights", part, partial(many_weights, here, part), 10)
        yield Case("beyond 2^31 numbers of x and y", part, partial(far_columns, here, part), 10)


# At the sizes of the targets


class Workload:
    """A random mask over a square matrix."""

    def __init__(self, here: Here, part: str, size: int, sparsity: float, batch: int) -> None:
        self.part, self.name = part, f"{size} square, {sparsity:.0%} pruned, batch {batch}"
        g = here.generator(0)
        keep = torch.rand(size, size, generator=g, device=here.device) >= sparsity
        w = torch.randn(size, size, generator=g, device=here.device).to(DTYPES[part]) * keep
        x = torch.randn(size, batch, generator=g, device=here.device).to(DTYPES[part])
        self.p = Problem(x, w, keep, torch.randn(size, generator=g, device=here.device).to(DTYPES[part]))
        self.packed = PackedCsr.from_dense(w, keep)

    def check(self) -> None:
        p, part = self.p, self.part
        right, torchs = formula(p, torch.double), formula(p, DTYPES[part])
        compare(ours(self.packed, p), right, torchs, part, {"y": p.w.shape[1]})

    def replay(self) -> None:
        """A CUDA graph gives the bits of a plain call."""
        eager, kept = ours(self.packed, self.p), {}
        graph = graphed(lambda: kept.update(ours(self.packed, self.p)), 1)
        kept["y"].fill_(NAN)
        graph.replay()
        must_repeat(kept, eager, "a CUDA graph")

    def ours(self) -> Run:
        packed = PackedCsr(self.packed.shape, self.packed.lanes, *(t.clone() for t in self.packed.arrays()))
        return lambda: csr_infer(packed, self.p.x, kernels="triton")

    def dense(self) -> dict[str, Copies]:
        """The product of the same weights and their zeros each way that torch has."""
        x, batch_first = self.p.x, self.p.x.t().contiguous()

        def product(call: Callable[[Tensor], object]) -> Copies:
            def make() -> Run:
                w = self.p.w.clone()
                return lambda: call(w)

            return Copies(make, self.p.w.nbytes)

        found = {
            "dense F.linear": product(lambda w: F.linear(batch_first, w)),
            "dense w @ x": product(lambda w: w @ x),
        }
        if x.shape[1] == 1:
            found["dense mv"] = product(lambda w: torch.mv(w, x[:, 0]))
        return found


def smoke(here: Here) -> Iterator[Case]:
    def run(batch: int, check: Callable[[Workload], None]) -> None:
        check(Workload(here, "bf16", *here.pick((40, 0.9), TARGET), batch))

    for batch in (1, 8):
        yield Case(f"target shape, batch {batch}", "bf16", partial(run, batch, Workload.check), 3)
        if here.device == "cuda":
            yield Case(f"in a CUDA graph, batch {batch}", "bf16", partial(run, batch, Workload.replay))


def timed(here: Here, part: str, size: int, sparsity: float, batch: int, more: bool) -> dict[str, Any]:
    """Beside dense products, and with `more` beside cuSPARSE."""
    load = Workload(here, part, size, sparsity, batch)
    dense = load.dense()
    rivals: dict[str, Run | Copies] = {"triton": Copies(load.ours, load.packed.bytes()), **dense}
    if more and (here.device == "cuda" or part == "ieee"):  # a CPU has it in fp32 alone
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            csr = load.p.w.to_sparse_csr()
        rivals["torch CSR"] = lambda: csr @ load.p.x
    with precision(part):
        wrong = judged(load.check)
        found = rows(here, load.name, floor(load.packed, batch), part, "triton", rivals)
    best = min((t for name in dense if (t := median(found, name, "cold"))), default=None)
    return {"times": found, "best dense": ratio(best, median(found, "triton", "cold"))} | wrong


def targets(here: Here) -> Iterator[Case]:
    size, sparsity = here.pick((40, 0.9), TARGET)

    def figures(batch: int) -> dict[str, Any]:
        found = timed(here, "bf16", size, sparsity, batch, more=False)
        return found | {"figures": {f"times the best dense, cold, batch {batch}": found.pop("best dense")}}

    def space() -> dict[str, Any]:
        load = Workload(here, "bf16", size, sparsity, 1)
        return {"figures": {"bytes of weights, of dense": load.packed.bytes() / load.p.w.nbytes}}

    for batch in (1, 8):
        yield Case(f"{size} square, {sparsity:.0%} pruned, batch {batch}", "bf16", partial(figures, batch), 4)
    yield Case("bytes", "bf16", space)


def benchmarks(here: Here) -> Iterator[Case]:
    for part, workloads in WORKLOADS.items():
        for size, sparsity, batch in here.pick([(40, 0.9, 1), (40, 0.9, 8)], workloads):
            name = f"{size} square, {sparsity:.0%} pruned, batch {batch}"
            yield Case(name, part, partial(timed, here, part, size, sparsity, batch, more=True), 4)
