"""block_linear at the sizes of its targets; the dense product and torch's tuned BSR as rivals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import Copies, Run, first_line, median, once, ratio, rows
from oracle import DTYPES, NAN, UNIT, Wrong, compare, must_replay, need_memory, precision
from sparselth.kernels._tiles import Tile
from sparselth.kernels.block_linear import BlockWeight, block_linear, floor, launch

Shape = tuple[int, int, int, int]  # B, N, K, block
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
# Raced beside the shipped tiles on the targets, by block. Programs that share a multiprocessor, with other
# tiles; more of the batch, which pulls fewer weights through the L2 cache, alone on it.
OTHER_TILES = {
    64: (Tile(128, 64, 64, 4, 4), Tile(256, 64, 64, 8, 2), Tile(512, 64, 32, 8, 3)),
    128: (Tile(128, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3)),
}


class Problem(NamedTuple):
    x: Tensor
    weight: BlockWeight
    bias: Tensor
    kept: Tensor


def problem(here: Here, part: str, shape: Shape, density: float) -> Problem:
    batch, n, k, block = shape
    g = here.generator(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    x, w, bias = normal(batch, k), normal(n, k), normal(n)
    live = torch.rand(-(-n // block), -(-k // block), generator=g, device=here.device) < density
    mask = live.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
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
        return must_replay(lambda: ours(p)) if graph else accuracy(p, "bf16", ours(p))

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
        warnings.filterwarnings("ignore", message="Sparse (BSR tensor support|invariant checks)")
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


def bsr_rival(p: Problem, part: str) -> tuple[str, Run]:
    """torch's BSR product by its best parameters, which its name says; Wrong where it is not right."""
    run, meta = bsr_linear(p), tuned(p, part)
    right = formula(p, torch.double)["y"]
    if not float((run(meta).double() - right).norm()) <= 8 * UNIT[part] * float(right.norm()):
        raise Wrong(f"torch's BSR product is wrong with {meta}")
    return "torch BSR, " + " ".join(f"{name} {value}" for name, value in meta.items()), partial(run, meta)


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
        rivals, bsr, facts = products(p), "", dict[str, Any]()
        if here.device == "cuda":
            if (block, pruned) == (64, 0.9):
                torch.compiler.reset()
                compiled = torch.compile(lambda: F.linear(x, kept, bias), dynamic=False)
                rivals["dense compiled"] = compiled
            if part in ("bf16", "fp16") and batch >= 16:
                try:
                    bsr, run = bsr_rival(p, part)
                    rivals[bsr] = run
                except Exception as error:  # then the others race without it
                    facts["torch BSR"] = first_line(error)
            if workload == TARGETS.get(block) and part == "bf16":
                index = w.places, w.starts, w.order
                for tile in OTHER_TILES[block]:
                    name = "triton, tile {} x {} x {}, {} warps, {} stages".format(*tile)
                    rivals[name] = partial(launch, x, w.values, *index, len(bias), bias, False, (tile, 1))
        timed = rows(here, title(workload), floor(w, batch), part, "triton", rivals)
    figures = {}
    if target and bsr:  # on the same operands, both
        figures["times torch's tuned BSR"] = ratio(
            median(timed, bsr, "graph"), median(timed, "triton", "graph")
        )
    return {"times": timed, "figures": figures} | facts | wrong


def benchmarks(here: Here) -> Iterator[Case]:
    for part, workloads in WORKLOADS.items():
        for workload in here.pick([((20, 40, 70, 16), 0.5)], workloads):
            seconds = 20.0 if workload == TARGETS[64] else 8.0  # BSR is tuned for the first of its block
            yield Case(title(workload), part, partial(benchmark, here, part, workload), seconds)
