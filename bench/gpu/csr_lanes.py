"""csr_lanes at its targets' shapes and beyond 2^31; dense products and cuSPARSE as rivals."""

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
from oracle import DTYPES, NAN, compare, must_replay, near, need_memory, precision
from sparselth.kernels.csr_lanes import LanedCsr, csr_lanes, floor

Shape = tuple[int, int, int]  # N, K, B
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


def ours(packed: LanedCsr, p: Problem, relu: bool = False) -> dict[str, Tensor]:
    return {"y": csr_lanes(packed, p.x, p.bias, relu, kernels="triton")}


# Offsets beyond 2^31


def many_weights(here: Here, part: str) -> None:
    """More than 2^31 kept weights, of full rows; the first, a middle and the last rows against float64."""
    need_memory(24)
    n, k, lanes, b = *here.pick((10, 128), (2**17 + 8, 2**14)), 16, 8
    g = here.generator(0)
    values = torch.empty(n * k, dtype=DTYPES[part], device=here.device).uniform_(-1, 1, generator=g)
    # place j of group l of a step holds kept weight 16 j + l; here all are kept
    order = torch.arange(k, device=here.device).view(-1, 8, lanes).permute(0, 2, 1).reshape(k)
    columns = order.int().to(torch.uint16).repeat(n)
    starts = (k // 8) * torch.arange(n + 1, dtype=torch.int32, device=here.device)
    numbers = 8 * torch.arange(n, dtype=torch.int32, device=here.device)
    packed = LanedCsr((n, k), lanes, values, columns, starts, numbers)
    x = torch.randn(k, b, generator=g, device=here.device).to(DTYPES[part])
    y = csr_lanes(packed, x, kernels="triton")
    ends = torch.tensor([0, n // 2, n - 1], device=here.device)
    near(y[ends], values.view(n, k)[ends].double() @ x[order].double(), part, k)


def far_columns(here: Here, part: str) -> None:
    """x and y of more than 2^31 numbers; the first and the last columns against float64."""
    need_memory(24)
    for n, k, b in here.pick([(40, 20, 37)], [(40, 65536, 32803), (65540, 40, 32803)]):
        p = problem(here, part, (n, k, 1), 0.05)
        x = torch.empty(k, b, dtype=DTYPES[part], device=here.device)
        x.uniform_(-1, 1, generator=here.generator(1))
        y = csr_lanes(LanedCsr.from_dense(p.w, p.keep), x, p.bias, kernels="triton")
        ends = torch.tensor([0, b // 2, b - 1], device=here.device)
        near(y[:, ends], formula(p._replace(x=x[:, ends]), torch.double)["y"], part, k)


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
        self.packed = LanedCsr.from_dense(w, keep)

    def check(self) -> None:
        p, part = self.p, self.part
        right, torchs = formula(p, torch.double), formula(p, DTYPES[part])
        compare(ours(self.packed, p), right, torchs, part, {"y": p.w.shape[1]})

    def replay(self) -> None:
        """A CUDA graph gives the bits of a plain call."""
        must_replay(lambda: ours(self.packed, self.p))

    def ours(self) -> Run:
        packed = LanedCsr(self.packed.shape, self.packed.lanes, *(t.clone() for t in self.packed.arrays()))
        return lambda: csr_lanes(packed, self.p.x, kernels="triton")

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
            warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
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
