"""block_conv2d: y against float64 whatever the mask; cuDNN as the rival, in two layouts, and compiled."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import median, ratio, rows
from oracle import (
    DTYPES,
    INF,
    NAN,
    UNIT,
    Wrong,
    compare,
    graphed,
    must_repeat,
    need_memory,
    poisoned,
    precision,
    surrounded,
)
from sparselth.kernels.block_conv2d import TILES, BlockFilters, block_conv2d, floor, launch
from sparselth.kernels.block_linear import BLOCKS
from sparselth.kernels.masked_conv2d import geometry

Pair = tuple[int, int]
MASKS = ("random", "empty", "full", "one weight", "one block row")
LAYOUTS = ("contiguous", "batch last", "every second channel")


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


TINY = [
    Setup(1, 1, (1, 1), 1, (1, 1), block=16),
    square(2, 37, 5, 70, block=32),
    Setup(1, 20, (6, 5), 33, (3, 2), (2, 1), (1, 3), (1, 2), block=16),
]
SMALL = [
    *TINY,
    square(8, 64, 14, 64, block=16),
    square(3, 128, 9, 200, 5, 2, block=128),
    square(1, 512, 4, 512, block=64),
    square(5, 130, 7, 64, 1, 2, block=64),
    Setup(2, 64, (33, 31), 64, (3, 3), (1, 1), (2, 2), (2, 2), block=32),
]
LARGE = [
    square(64, 256, 14, 256, block=64),
    square(32, 256, 28, 256, block=128, kept=0.1),
    square(16, 520, 7, 264, 3, 2, block=32),
]
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


class Problem(NamedTuple):
    x: Tensor
    weight: BlockFilters
    bias: Tensor
    kept: Tensor
    where: tuple[Pair, Pair, Pair]


def live(here: Here, s: Setup, kind: str, g: torch.Generator) -> Tensor:
    """Which blocks live, [N, C, kh, kw] bool."""
    size = -(-s.n // s.block), -(-s.c // s.block), *s.kernel
    found = torch.rand(size, generator=g, device=here.device) < s.kept
    if kind == "full":
        found[:] = True
    elif kind != "random":
        found[:] = False
    if kind == "one block row":
        found[size[0] // 2] = True
    return found.repeat_interleave(s.block, 0)[: s.n].repeat_interleave(s.block, 1)[:, : s.c]


def problem(here: Here, part: str, s: Setup, kind: str = "random", seed: int = 0) -> Problem:
    g = here.generator(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    x, w, bias = normal(s.b, *s.size, s.c).permute(0, 3, 1, 2), normal(s.n, s.c, *s.kernel), normal(s.n)
    mask = live(here, s, kind, g)
    if kind == "one weight":
        mask[s.n - 1, s.c // 2, 0, s.kernel[1] - 1] = True
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


def check(here: Here, part: str, s: Setup, kind: str = "random", seed: int = 0) -> dict[str, float]:
    """Twice, from tensors amid NaN and into NaN."""
    p = problem(here, part, s, kind, seed)
    if not torch.equal(p.weight.to_dense(), p.kept):
        raise Wrong("the format does not hold the weights")
    w = p.weight
    moved = BlockFilters(w.shape, surrounded(w.values), w.places, w.starts, w.order, w.runs)
    p = p._replace(x=surrounded(p.x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), weight=moved)
    with poisoned():
        found = ours(p)
        must_repeat(ours(p), found)
    if kind == "empty" and not torch.equal(found["y"], p.bias[:, None, None].expand_as(found["y"])):
        raise Wrong("y is not the bias")
    return accuracy(p, part, found)


def tiles(here: Here, part: str) -> None:
    """Every tile at every block, lists whole and split."""
    kind = "half" if part in ("bf16", "fp16") else part
    for tile in TILES[kind]:
        for block in BLOCKS:
            s = square(2, 2 * block + 8, 9, block + 3, block=block, kept=0.6)
            p = problem(here, part, s)
            w, g = p.weight, geometry(s.kernel, *s.where)
            right = formula(p, torch.double)["y"]
            for splits in (1, 3):
                index = w.values, w.places, w.starts, w.order
                y = launch(p.x, *index, len(p.bias), p.bias, False, g, (tile, splits))
                error, size = float((y.double() - right).norm()), float(right.norm())
                if not error <= max(3 * UNIT[part], 1e-6) * max(size, 1.0):
                    raise Wrong(f"{tile}, blocks of {block}, {splits} parts: error {error / size:.1e}")


def other(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another order of memory."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "batch last":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    wide = x.new_full((x.shape[0], *x.shape[2:], 2 * x.shape[1]), NAN).permute(0, 3, 1, 2)
    wide[:, ::2] = x
    return wide[:, ::2]


def strided(here: Here, part: str, layout: str) -> None:
    p = problem(here, part, square(2, 37, 5, 33, block=16))
    must_repeat(ours(p._replace(x=other(p.x, layout))), ours(p), "another layout of x")


def extreme(here: Here, part: str, value: float) -> None:
    """NaN and infinity pass live blocks alone."""
    w = torch.zeros(32, 48, 3, 3, dtype=DTYPES[part], device=here.device)
    w[:16, :16, 1, 0] = 1  # what lies to the left
    w[16:, 16:32, 1, 1] = 1
    x = torch.ones(2, 48, 4, 4, dtype=w.dtype, device=here.device)
    x[1, 3, 2, 1] = x[:, 40] = value
    y = block_conv2d(x, BlockFilters.from_dense(w, block=16), padding=1, kernels="triton")
    seen = torch.zeros_like(y, dtype=torch.bool)
    seen[1, :16, 2, 2] = True
    if not torch.equal(y.isfinite(), ~seen):
        raise Wrong(f"{value} in x does not reach exactly the filters of its live block")


def replayed(here: Here, part: str) -> None:
    for batch in (1, 32):
        p = problem(here, part, square(batch, 512, 7, 256, block=32))
        eager, kept = ours(p), dict[str, Tensor]()
        graph = graphed(lambda p=p, kept=kept: kept.update(ours(p)), 1)  # type: ignore[misc]
        for t in kept.values():
            t.fill_(NAN)
        graph.replay()
        must_repeat(kept, eager, "a CUDA graph")


def random_setup(draw: random.Random, most: int) -> Setup:
    while True:
        kernel, stride, padding, dilation = (
            (draw.randint(low, high), draw.randint(low, high))
            for low, high in ((1, 5), (1, 3), (0, 4), (1, 2))
        )
        size = draw.randint(1, most), draw.randint(1, most)
        if min(geometry(kernel, stride, padding, dilation).out(*size)) > 0:
            c, n = draw.randint(1, 9 * most), draw.randint(1, 9 * most)
            where = stride, padding, dilation
            return Setup(draw.randint(1, 4), c, size, n, kernel, *where, draw.choice(BLOCKS), draw.random())


def checks(part: str, here: Here) -> Iterator[Case]:
    draw = random.Random(0)

    def case(name: str, run: Any, *args: Any, **kwargs: Any) -> Case:
        def guarded() -> Any:
            with precision(part):
                return run(here, part, *args, **kwargs)

        return Case(name, part, guarded)

    for s in here.pick(TINY, SMALL + LARGE[:1], SMALL + LARGE):
        yield case(str(s), check, s)
    for kind in MASKS[1:]:
        s = square(2, 40, 5, 50, block=32)
        yield case(f"{s}, {kind}", check, s, kind=kind)
    for layout in LAYOUTS:
        yield case(f"x {layout}", strided, layout)
    for value in (NAN, INF):
        yield case(f"{value} in x", extreme, value)
    for i in range(here.pick(2, 8, 40)):
        s = random_setup(draw, here.pick(4, 16, 32))
        yield case(f"random {i}: {s}", check, s, seed=i)
    if here.size != "tiny":
        yield case("every tile", tiles)
        yield case("in a CUDA graph", replayed)


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
    s = here.pick(TINY[1], TARGET)

    def check() -> dict[str, float]:
        p = problem(here, "bf16", s)
        return accuracy(p, "bf16", ours(p))

    def graph() -> None:
        p = problem(here, "bf16", s)
        eager, kept = ours(p), dict[str, Tensor]()
        replay = graphed(lambda: kept.update(ours(p)), 1).replay
        for t in kept.values():
            t.fill_(NAN)
        replay()
        must_repeat(kept, eager, "a CUDA graph")

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
    dense = [t for name in rivals if name != "triton" and (t := median(found, name, "cold"))]
    best = ratio(min(dense, default=None), median(found, "triton", "cold"))
    return {"times": found, "best dense": best} | wrong


def targets(here: Here) -> Iterator[Case]:
    s = here.pick(TINY[1], TARGET)

    def figure() -> dict[str, Any]:
        found = timed(here, "bf16", s)
        return found | {"figures": {"times the best dense": found.pop("best dense")}}

    yield Case(str(s), "bf16", figure, 6)


# Other times


def benchmarks(here: Here) -> Iterator[Case]:
    few = {"bf16": len(LAYERS), "fp16": 1, "tf32": 2, "ieee": 1}
    for part, count in few.items():
        for s in here.pick([TINY[1]], LAYERS[:count]):
            compiled = s in LAYERS[:1] + LAYERS[4:]
            yield Case(str(s), part, partial(timed, here, part, s, compiled), 15.0 if compiled else 5.0)
