"""block_linear: y against float64 whatever the mask; the dense product and torch's tuned BSR as rivals."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import Copies, Run, median, once, ratio, rows
from oracle import (
    DTYPES,
    INF,
    NAN,
    UNIT,
    Wrong,
    compare,
    graphed,
    must_be_zero,
    must_repeat,
    need_memory,
    poisoned,
    precision,
    surrounded,
)
from sparselth.kernels.block_linear import BLOCKS, TILES, BlockWeight, Tile, block_linear, floor, launch

Shape = tuple[int, int, int, int]  # B, N, K, block
TINY: list[Shape] = [(1, 1, 1, 16), (33, 70, 150, 32), (5, 130, 257, 128)]
SMALL: list[Shape] = TINY + [
    (16, 300, 784, 16),
    (128, 256, 512, 64),
    (17, 1000, 520, 64),
    (64, 512, 128, 128),
]
LARGE: list[Shape] = [
    (4096, 4096, 1024, 64),
    (4100, 2050, 1030, 128),
    (2000, 4096, 512, 32),
    (1, 256, 65536, 32),
]
MASKS = ("random", "empty", "full", "one weight", "one block row")
PARTS = ("bf16", "fp16", "tf32", "ieee")

# B, N, K, block, part of the blocks pruned
Workload = tuple[Shape, float]
TARGETS: dict[int, Workload] = {block: ((4096, 4096, 4096, block), 0.9) for block in (64, 128)}
WORKLOADS: dict[str, list[Workload]] = {
    "bf16": [
        *TARGETS.values(),
        *[((4096, 8192, 8192, block), 0.9) for block in (64, 128, 32)],
        *[((batch, 8192, 8192, 64), 0.9) for batch in (1, 32, 512)],
        *[((4096, 8192, 8192, 64), pruned) for pruned in (0.8, 0.95)],
        *[((batch, 4096, 4096, 64), 0.9) for batch in (1, 512)],
    ],
    "fp16": [TARGETS[64]],
    "tf32": [TARGETS[64], ((512, 4096, 4096, 64), 0.9)],
    "ieee": [((512, 4096, 4096, 64), 0.9), ((1, 4096, 4096, 64), 0.9)],
}
# Raced beside the shipped tile on the target: two programs a multiprocessor with other tiles, or a large one.
OTHER_TILES = (Tile(128, 64, 64, 4, 4), Tile(256, 64, 64, 8, 2), Tile(256, 64, 64, 8, 4))


class Problem(NamedTuple):
    x: Tensor
    weight: BlockWeight
    bias: Tensor
    kept: Tensor


def live(here: Here, shape: Shape, density: float, kind: str, g: torch.Generator) -> Tensor:
    """Which blocks live, [N, K] bool."""
    _, n, k, block = shape
    size = -(-n // block), -(-k // block)
    found = torch.rand(size, generator=g, device=here.device) < density
    if kind == "full":
        found[:] = True
    elif kind != "random":
        found[:] = False
    if kind == "one block row":
        found[size[0] // 2] = True
    return found.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]


def problem(
    here: Here, part: str, shape: Shape, density: float = 0.4, kind: str = "random", seed: int = 0
) -> Problem:
    batch, n, k, block = shape
    g = here.generator(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    x, w, bias, mask = normal(batch, k), normal(n, k), normal(n), live(here, shape, density, kind, g)
    if kind == "one weight":
        mask[n - 1, k // 2] = True
    kept = torch.where(mask, w, 0)
    return Problem(x, BlockWeight.from_dense(torch.where(mask, w, NAN), mask, block), bias, kept)


def formula(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    y = F.linear(p.x.to(dtype), p.kept.to(dtype), p.bias.to(dtype))
    return {"y": y, "relu": y.relu()}


def ours(p: Problem) -> dict[str, Tensor]:
    return {
        name: block_linear(p.x, p.weight, p.bias, name == "relu", kernels="triton") for name in ("y", "relu")
    }


def accuracy(p: Problem, part: str, found: dict[str, Tensor]) -> dict[str, float]:
    absolute = formula(Problem(p.x.abs(), p.weight, p.bias.abs(), p.kept.abs()), torch.double)
    terms = dict.fromkeys(found, p.x.shape[1])
    return compare(found, formula(p, torch.double), formula(p, DTYPES[part]), part, terms, absolute)


def check(
    here: Here, part: str, shape: Shape, density: float = 0.4, kind: str = "random", seed: int = 0
) -> dict[str, float]:
    """Twice, from tensors amid NaN and into NaN."""
    p = problem(here, part, shape, density, kind, seed)
    if not torch.equal(p.weight.to_dense(), p.kept):
        raise Wrong("the format does not hold the weights")
    w = p.weight
    moved = BlockWeight(w.shape, surrounded(w.values), w.columns, w.starts, w.order, w.runs)
    p = p._replace(x=surrounded(p.x), weight=moved)
    with poisoned():
        found = ours(p)
        must_repeat(ours(p), found)
    if kind == "empty" and not torch.equal(found["y"], p.bias.expand_as(found["y"])):
        raise Wrong("y is not the bias")
    return accuracy(p, part, found)


def tiles(here: Here, part: str) -> None:
    """Every tile at every block, lists whole and split."""
    kind = "half" if part in ("bf16", "fp16") else part
    for tile in TILES[kind]:
        for block in BLOCKS:
            p = problem(here, part, (70, 2 * block + 3, 5 * block + 8, block), 0.6)
            w = p.weight
            for splits in (1, 3):
                y = launch(
                    p.x, w.values, w.columns, w.starts, w.order, len(p.bias), p.bias, False, (tile, splits)
                )
                error = float((y.double() - formula(p, torch.double)["y"]).norm())
                size = float(formula(p, torch.double)["y"].norm())
                if not error <= max(3 * UNIT[part], 1e-6) * max(size, 1.0):
                    raise Wrong(f"{tile}, blocks of {block}, {splits} parts: error {error / size:.1e}")


def strided(here: Here, part: str) -> None:
    p = problem(here, part, (18, 100, 70, 16))
    right = ours(p)
    wide = p.x.new_full((18, 143), NAN)
    wide[:, 3::2] = p.x
    for x in (p.x.t().contiguous().t(), wide[:, 3::2], F.pad(p.x, (5, 9), value=NAN)[:, 5:75]):
        must_repeat(ours(p._replace(x=x)), right, "another layout of x")


def extreme(here: Here, part: str, value: float) -> None:
    """NaN and infinity pass live blocks alone."""
    w = torch.ones(64, 96, dtype=DTYPES[part], device=here.device)
    w[:32, 32:] = w[32:, :32] = w[32:, 64:] = 0
    for block, batch in ((16, 3), (32, 40)):
        x = torch.ones(batch, 96, dtype=w.dtype, device=here.device)
        x[1, 3] = x[2, 80] = value
        y = block_linear(x, BlockWeight.from_dense(w, block=block), kernels="triton")
        must_be_zero(y[[0, 2]] - 32, torch.ones_like(y[:2], dtype=torch.bool), "what sees no such number")
        if y[1, :32].isfinite().any() or not y[1, 32:].isfinite().all():
            raise Wrong(f"{value} in x does not reach exactly the rows of its live block")


def replayed(here: Here, part: str) -> None:
    for batch in (3, 300):
        p = problem(here, part, (batch, 512, 4096, 32))
        eager, kept = ours(p), dict[str, Tensor]()
        graph = graphed(lambda p=p, kept=kept: kept.update(ours(p)), 1)  # type: ignore[misc]
        for t in kept.values():
            t.fill_(NAN)
        graph.replay()
        must_repeat(kept, eager, "a CUDA graph")


def checks(part: str, here: Here) -> Iterator[Case]:
    draw = random.Random(0)

    def case(name: str, run: Any, *args: Any, **kwargs: Any) -> Case:
        def guarded() -> Any:
            with precision(part):
                return run(here, part, *args, **kwargs)

        return Case(name, part, guarded)

    for shape in here.pick(TINY, SMALL + LARGE[:2], SMALL + LARGE):
        yield case(said(shape), check, shape)
    for kind in MASKS[1:]:
        yield case(f"{said((5, 100, 150, 32))}, {kind}", check, (5, 100, 150, 32), kind=kind)
    yield case("x with other strides", strided)
    for value in (NAN, INF):
        yield case(f"{value} in x", extreme, value)
    for i in range(here.pick(2, 8, 40)):
        most = here.pick(34, 300, 700)
        shape = (*(draw.randint(1, most) for _ in range(3)), draw.choice(BLOCKS))
        density = draw.random()
        yield case(f"random {i}: {said(shape)}, {density:.0%} live", check, shape, density, seed=i)
    if here.size != "tiny":
        yield case("every tile", tiles)
        yield case("in a CUDA graph", replayed)


def said(shape: Shape) -> str:
    return "B{} N{} K{} b{}".format(*shape)


# Offsets beyond 2^31


def vast(here: Here, part: str, shape: Shape) -> None:
    """x or y of more than 2^31 numbers: the last rows are those of the small problem there."""
    need_memory(14)
    batch, n, k, block = shape
    g = here.generator(0)
    x = torch.empty(batch, k, dtype=DTYPES[part], device=here.device).uniform_(-1, 1, generator=g)
    small = problem(here, part, (1, n, k, block), 0.1)
    for relu in (False, True):
        y = block_linear(x, small.weight, small.bias, relu, kernels="triton")
        ends = torch.tensor([0, batch // 2, batch - 1], device=here.device)
        right = block_linear(x[ends], small.weight, small.bias, relu, kernels="torch").double()
        error = float((y[ends].double() - right).norm() / right.norm())
        if not error <= 8 * UNIT[part]:
            raise Wrong(f"error {error:.1e} in the first, middle and last row")


def large(here: Here) -> Iterator[Case]:
    for shape in here.pick([(300, 40, 70, 16)], [(300_000, 128, 8192, 64), (300_000, 8192, 128, 64)]):
        yield Case(f"{said(shape)}: beyond 2^31", "bf16", partial(vast, here, "bf16", shape), 10)


# At the sizes of the targets


def smoke(here: Here) -> Iterator[Case]:
    def run(workload: Workload, graph: bool) -> Any:
        shape, pruned = workload
        p = problem(here, "bf16", shape, 1 - pruned)
        eager = ours(p)
        if not graph:
            return accuracy(p, "bf16", eager)
        kept: dict[str, Tensor] = {}
        replay = graphed(lambda: kept.update(ours(p)), 1).replay
        for t in kept.values():
            t.fill_(NAN)
        replay()
        return must_repeat(kept, eager, "a CUDA graph")

    for shape, pruned in here.pick([((20, 40, 70, 16), 0.5)], TARGETS.values()):
        yield Case(said(shape), "bf16", partial(run, (shape, pruned), False), 3)
        if here.device == "cuda":
            yield Case(f"{said(shape)} in a CUDA graph", "bf16", partial(run, (shape, pruned), True))


def products(p: Problem) -> dict[str, Run | Copies]:
    """Ours and the dense product, on copies of x and of the weights."""

    def sparse() -> Run:
        x, w = p.x.clone(), replace(p.weight, values=p.weight.values.clone())
        return lambda: block_linear(x, w, p.bias, kernels="triton")

    def dense() -> Run:
        x, kept = p.x.clone(), p.kept.clone()
        return lambda: F.linear(x, kept, p.bias)

    return {
        "triton": Copies(sparse, p.x.nbytes + p.weight.bytes()),
        "dense": Copies(dense, p.x.nbytes + p.kept.nbytes),
    }


def title(workload: Workload) -> str:
    return f"{said(workload[0])} {workload[1]:.0%} pruned"


def targets(here: Here) -> Iterator[Case]:
    """What no block and no sparsity changes, the dense product, beside blocks of 64 and of 128."""

    def figure(block: int, workload: Workload) -> dict[str, Any]:
        shape, pruned = workload
        p = problem(here, "bf16", shape, 1 - pruned)
        wrong = judged(accuracy, p, "bf16", ours(p))
        timed = rows(here, title(workload), floor(p.weight, shape[0]), "bf16", "triton", products(p))
        times = ratio(median(timed, "dense", "cold"), median(timed, "triton", "cold"))
        return {"times": timed, "figures": {f"times the best dense, blocks of {block}": times}} | wrong

    for block, workload in TARGETS.items():
        chosen = here.pick(((20, 40, 70, 16), 0.5), workload)
        yield Case(title(chosen), "bf16", partial(figure, block, chosen), 4)


# Other times


Meta = dict[str, int]
TUNED: dict[tuple[str, int], Meta] = {}  # by dtype and block, on the first workload that has them
SEARCHED = {
    "width": (32, 64, 128, 256),
    "num_stages": (1, 2, 3, 4),
    "num_warps": (4, 8),
    "GROUP_SIZE_ROW": (1, 4),
}


def bsr_linear(p: Problem) -> Callable[[Meta], Tensor]:
    """torch's BSR product with given Triton parameters.

    torch ships parameters for an A100; elsewhere it runs one stage and four warps. They go in by the argument
    of `torch.sparse._triton_ops.bsr_dense_addmm` that is there for it, so nothing of torch is changed.
    """
    from torch.sparse._triton_ops import bsr_dense_addmm

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        bsr = p.kept.to_sparse_bsr((p.weight.block, p.weight.block))
    batch = p.x.shape[0]
    bias = p.bias[:, None].expand(-1, batch)

    def run(meta: Meta) -> Tensor:
        rest = {name: value for name, value in meta.items() if name != "width"}
        y: Tensor = bsr_dense_addmm(bias, bsr, p.x.t(), meta=rest | {"SPLIT_N": batch // meta["width"]})
        return y.t()

    return run


def tuned(p: Problem, part: str) -> Meta:
    """The fastest parameters found, one at a time, twice around; the width of a tile divides the batch."""
    key, batch = (part, p.weight.block), p.x.shape[0]
    if key not in TUNED:
        run = bsr_linear(p)
        seconds: dict[tuple[int, ...], float] = {}

        def measure(meta: Meta) -> float:
            values = tuple(meta.values())
            if values not in seconds:
                try:
                    run(meta)
                    seconds[values] = min(once(None, partial(run, meta)) for _ in range(5))
                except Exception:  # more shared memory than there is
                    seconds[values] = float("inf")
            return seconds[values]

        best = {"width": 128, "num_stages": 3, "num_warps": 4, "GROUP_SIZE_ROW": 4}
        for _ in range(2):
            for name, choices in SEARCHED.items():
                best = min((best | {name: value} for value in choices), key=measure)
        TUNED[key] = best
    return TUNED[key] | {"width": min(TUNED[key]["width"], batch & -batch)}


def benchmark(here: Here, part: str, workload: Workload) -> dict[str, Any]:
    """Dense, also compiled, which no block and no sparsity changes: for blocks of 64 at 90 % then.

    torch's BSR product sums fp32 in fp64, takes batches from 16 on, and runs in bf16 and fp16 here.
    """
    shape, pruned = workload
    batch, _, _, block = shape
    target = workload == TARGETS[64] and part == "bf16"
    with precision(part):
        p = problem(here, part, shape, 1 - pruned)
        wrong = judged(accuracy, p, part, ours(p))
        x, w, bias, kept = p.x, p.weight, p.bias, p.kept
        rivals, bsr = products(p), ""
        if here.device == "cuda":
            if (block, pruned) == (64, 0.9):
                torch.compiler.reset()
                compiled = torch.compile(lambda: F.linear(x, kept, bias), dynamic=False)
                rivals["dense compiled"] = compiled
            if part in ("bf16", "fp16") and batch >= 16:
                run, meta = bsr_linear(p), tuned(p, part)
                right = formula(p, torch.double)["y"]
                if not float((run(meta).double() - right).norm()) <= 8 * UNIT[part] * float(right.norm()):
                    raise Wrong(f"torch's BSR product is wrong with {meta}")
                bsr = "torch BSR, " + " ".join(f"{name} {value}" for name, value in meta.items())
                rivals[bsr] = partial(run, meta)
            if target:
                index = w.columns, w.starts, w.order
                for tile in OTHER_TILES:
                    name = "triton, tile {} x {} x {}, {} warps, {} stages".format(*tile)
                    rivals[name] = partial(launch, x, w.values, *index, len(bias), bias, False, (tile, 1))
        timed = rows(here, title(workload), floor(w, batch), part, "triton", rivals)
    figures = {}
    if target:  # on the same operands, both
        figures["times torch's tuned BSR"] = ratio(
            median(timed, bsr, "graph"), median(timed, "triton", "graph")
        )
    return {"times": timed, "figures": figures} | wrong


def benchmarks(here: Here) -> Iterator[Case]:
    for part, workloads in WORKLOADS.items():
        for workload in here.pick([((20, 40, 70, 16), 0.5)], workloads):
            seconds = 20.0 if workload == TARGETS[64] else 8.0  # BSR is tuned for the first of its block
            yield Case(title(workload), part, partial(benchmark, here, part, workload), seconds)
