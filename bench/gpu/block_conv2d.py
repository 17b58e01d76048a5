"""block_conv2d at the sizes of layers; cuDNN as the rival, in two layouts, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import median, ratio, rows
from oracle import DTYPES, NAN, UNIT, Wrong, compare, must_replay, need_memory, precision
from sparselth.kernels._tiles import Tile
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d, floor, launch
from sparselth.kernels.masked_conv2d import geometry

Pair = tuple[int, int]


class Setup(NamedTuple):
    b: int
    c: int
    size: Pair
    n: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    block: int = 64
    kept: float = 0.4  # of the blocks

    def __str__(self) -> str:
        h, w = self.size
        text = f"B{self.b} C{self.c} {h}x{w} N{self.n} {self.kernel[0]}x{self.kernel[1]} b{self.block}"
        rest = zip(("stride", "padding", "dilation"), self[5:8], ((1, 1), (0, 0), (1, 1)), strict=True)
        changed = [f"{name} {v[0]},{v[1]}" for name, v, usual in rest if v != usual]
        return ", ".join([text, *changed, f"kept {self.kept:.0%}"])

    @property
    def where(self) -> tuple[Pair, Pair, Pair]:
        return self.stride, self.padding, self.dilation


def square(b: int, c: int, size: int, n: int, k: int = 3, stride: int = 1, **rest: Any) -> Setup:
    """As layers usually are: padded to keep the size of the image, or half of it."""
    return Setup(b, c, (size, size), n, (k, k), (stride, stride), (k // 2, k // 2), **rest)


TINY = square(2, 37, 5, 70, block=32)
# 10 % of the blocks
TARGET = square(256, 256, 14, 256, block=64, kept=0.1)
LAYERS = [
    TARGET,
    square(256, 256, 14, 256, block=128, kept=0.1),
    square(256, 256, 14, 256, block=32, kept=0.1),
    square(256, 256, 14, 256, block=64, kept=0.2),
    square(256, 128, 28, 128, block=64, kept=0.1),
    square(256, 512, 7, 512, block=64, kept=0.1),
    square(1, 512, 7, 512, block=64, kept=0.1),
    square(256, 512, 4, 512, block=64, kept=0.1),  # ResNet-18 on images of 32 x 32, last
    square(256, 64, 32, 64, block=16, kept=0.1),  # its first
    square(256, 1024, 14, 256, 1, block=64, kept=0.1),
]


# Raced beside the shipped tile on the target: more programs a multiprocessor; more pixels, which pull fewer
# weights through the L2 cache.
OTHER_TILES = (Tile(128, 64, 64, 4, 3), Tile(256, 64, 32, 8, 4))


class Problem(NamedTuple):
    x: Tensor
    weight: BlockFilters
    bias: Tensor
    kept: Tensor
    where: tuple[Pair, Pair, Pair]


def problem(here: Here, part: str, s: Setup) -> Problem:
    g = here.generator(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    x, w, bias = normal(s.b, *s.size, s.c).permute(0, 3, 1, 2), normal(s.n, s.c, *s.kernel), normal(s.n)
    size = -(-s.n // s.block), -(-s.c // s.block), *s.kernel
    live = torch.rand(size, generator=g, device=here.device) < s.kept
    mask = live.repeat_interleave(s.block, 0)[: s.n].repeat_interleave(s.block, 1)[:, : s.c]
    weight = BlockFilters.from_dense(torch.where(mask, w, NAN), mask, s.block)
    return Problem(x, weight, bias, torch.where(mask, w, 0), s.where)


def formula(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    y = F.conv2d(p.x.to(dtype), p.kept.to(dtype), p.bias.to(dtype), *p.where)
    return {"y": y, "relu": y.relu()}


def ours(p: Problem) -> dict[str, Tensor]:
    return {
        name: block_conv2d(p.x, p.weight, p.bias, *p.where, name == "relu", kernels="triton")
        for name in ("y", "relu")
    }


def accuracy(p: Problem, part: str, found: dict[str, Tensor]) -> dict[str, float]:
    absolute = formula(p._replace(x=p.x.abs(), bias=p.bias.abs(), kept=p.kept.abs()), torch.double)
    terms = dict.fromkeys(found, p.kept[0].numel())
    return compare(found, formula(p, torch.double), formula(p, DTYPES[part]), part, terms, absolute)


# Offsets beyond 2^31


def vast(here: Here, part: str, s: Setup) -> None:
    """x or y of more than 2^31 numbers: the first and last images are those of a small problem."""
    need_memory(16)
    small = problem(here, part, s._replace(b=2))
    p, q = geometry(s.kernel, *s.where).out(*s.size)
    x = small.x.new_empty(s.b, *s.size, s.c).permute(0, 3, 1, 2)
    x[1:-1] = 0
    x[[0, -1]] = small.x
    right = block_conv2d(small.x, small.weight, small.bias, *s.where, kernels="triton")
    for relu in (False, True):
        y = block_conv2d(x, small.weight, small.bias, *s.where, relu, kernels="triton")
        error = (y[[0, -1]].double() - (right.relu() if relu else right).double()).norm()
        if y.shape != (s.b, s.n, p, q) or not float(error / right.double().norm()) <= 2 * UNIT[part]:
            raise Wrong(f"error {float(error):.1e} in the first and last image")


def large(here: Here) -> Iterator[Case]:
    huge = [square(700, 64, 224, 16, block=16, kept=0.2), square(700, 16, 224, 64, block=16)]
    for s in here.pick([square(9, 20, 6, 18, block=16)], huge):
        yield Case(f"{s}: beyond 2^31", "bf16", partial(vast, here, "bf16", s), 10)


# At the sizes of the targets


def smoke(here: Here) -> Iterator[Case]:
    s = here.pick(TINY, TARGET)

    def check() -> dict[str, float]:
        p = problem(here, "bf16", s)
        return accuracy(p, "bf16", ours(p))

    def graph() -> None:
        p = problem(here, "bf16", s)
        must_replay(lambda: ours(p))

    yield Case(str(s), "bf16", check, 4)
    if here.device == "cuda":
        yield Case(f"{s} in a CUDA graph", "bf16", graph, 2)


def timed(here: Here, part: str, s: Setup, compiled: bool = False) -> dict[str, Any]:
    """Dense, in two layouts, or compiled in the better one; no block and no sparsity changes those."""
    with precision(part):
        p = problem(here, part, s)
        wrong = judged(lambda: accuracy(p, part, ours(p)))
        x, bias, where = p.x, p.bias, p.where
        turned = p.kept.contiguous(memory_format=torch.channels_last)
        flat, plain = x.contiguous(), p.kept.contiguous()
        rivals: dict[str, Callable[[], object]] = {
            "triton": lambda: block_conv2d(x, p.weight, bias, *where, kernels="triton"),
            "cuDNN channels-last": lambda: F.conv2d(x, turned, bias, *where),
            "cuDNN contiguous": lambda: F.conv2d(flat, plain, bias, *where),
        }
        if compiled and s == TARGET and part == "bf16":
            w = p.weight
            call = partial(launch, x, w.values, w.places, w.starts, w.order, len(bias), bias, False)
            for tile in OTHER_TILES:
                name = "triton, tile {} x {} x {}, {} warps, {} stages".format(*tile)
                rivals[name] = partial(call, geometry(s.kernel, *where), (tile, 1))
        if compiled and here.device == "cuda":
            torch.compiler.reset()
            rivals["channels-last compiled"] = torch.compile(
                lambda: F.conv2d(x, turned, bias, *where), dynamic=False
            )
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            found = rows(here, str(s), floor(x, p.weight, *where), part, "triton", rivals)
        finally:
            torch.backends.cudnn.benchmark = before
    dense = [t for name in rivals if "triton" not in name and (t := median(found, name, "cold"))]
    best = ratio(min(dense, default=None), median(found, "triton", "cold"))
    return {"times": found, "best dense": best} | wrong


def targets(here: Here) -> Iterator[Case]:
    s = here.pick(TINY, TARGET)

    def figure() -> dict[str, Any]:
        found = timed(here, "bf16", s)
        return found | {"figures": {"times the best dense": found.pop("best dense")}}

    yield Case(str(s), "bf16", figure, 6)


# Other times


def benchmarks(here: Here) -> Iterator[Case]:
    few = {"bf16": len(LAYERS), "fp16": 1, "tf32": 2, "ieee": 1}
    for part, count in few.items():
        for s in here.pick([TINY], LAYERS[:count]):
            compiled = s in LAYERS[:1] + LAYERS[4:]
            yield Case(str(s), part, partial(timed, here, part, s, compiled), 15.0 if compiled else 5.0)
