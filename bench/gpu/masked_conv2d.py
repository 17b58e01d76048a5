"""masked_conv2d: layers against float64; cuDNN as the rival, channels-last and not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import rows
from oracle import DTYPES, NAN, Wrong, compare, must_repeat, must_replay, need_memory, precision
from sparselth.kernels import masked_conv2d as op
from sparselth.kernels.bitmask import reference_pack
from sparselth.kernels.masked_conv2d import floor, masked_conv2d

NAMES = ("y", "dx", "dw", "db")


class Setup(NamedTuple):
    r: int
    b: int
    c: int
    size: tuple[int, int]
    n: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    keep: float | str = 0.3  # "channels": the upper half is pruned; "rows": every second filter

    def __str__(self) -> str:
        h, w, p = *self.size, self.keep
        text = f"R{self.r} B{self.b} C{self.c} {h}x{w} N{self.n} {self.kernel[0]}x{self.kernel[1]}"
        rest = zip(("stride", "padding", "dilation"), self[6:9], ((1, 1), (0, 0), (1, 1)), strict=True)
        changed = [f"{name} {v[0]},{v[1]}" for name, v, usual in rest if v != usual]
        return ", ".join([text, *changed, f"kept {p}"])


TINY = Setup(2, 2, 3, (5, 7), 5, (3, 3), padding=(1, 1))
LAYERS = [  # what is timed
    Setup(1, 60, 64, (32, 32), 64, (3, 3), padding=(1, 1), keep=0.1),  # Conv-4, second
    Setup(1, 60, 256, (14, 14), 256, (3, 3), padding=(1, 1), keep=0.1),
    Setup(1, 60, 256, (14, 14), 256, (3, 3), padding=(1, 1), keep="channels"),
    Setup(10, 60, 1, (28, 28), 6, (5, 5), padding=(2, 2), keep=0.2),  # LeNet-5, first
]


class Problem(NamedTuple):
    x: Tensor
    w: Tensor
    mask: Tensor
    bias: Tensor
    dy: Tensor
    keep: Tensor  # bool, as w
    rest: tuple[tuple[int, int], ...]


def problem(here: Here, part: str, s: Setup, seed: int = 0) -> Problem:
    g, shape, rest = here.generator(seed), (s.r, s.n, s.c, *s.kernel), (s.stride, s.padding, s.dilation)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    if s.keep == "rows":
        keep = (torch.arange(s.n, device=here.device) % 2 == 0)[None, :, None, None, None].expand(shape)
    elif s.keep == "channels":
        keep = (torch.arange(s.c, device=here.device) < s.c // 2)[None, None, :, None, None].expand(shape)
    else:
        keep = torch.rand(shape, generator=g, device=here.device) < s.keep
    mask = reference_pack(keep.flatten(2))
    p, q = op.geometry(s.kernel, *rest).out(*s.size)
    x, w, bias = normal(s.r, s.b, s.c, *s.size), normal(*shape), normal(s.r, s.n)
    return Problem(x, w, mask, bias, normal(s.r, s.b, s.n, p, q), keep, rest)


def ours(p: Problem) -> dict[str, Tensor]:
    x, w, bias = (t.detach().requires_grad_() for t in (p.x, p.w, p.bias))
    y = masked_conv2d(x, w, p.mask, bias, *p.rest, kernels="triton")
    grads = torch.autograd.grad(y, (x, w, bias), p.dy)
    return dict(zip(NAMES, (y.detach(), *grads), strict=True))


def formula(p: Problem, dtype: torch.dtype, absolute: bool = False) -> dict[str, Tensor]:
    """Replica by replica, which knows nothing of bits, tiles and groups."""
    x, w, bias, dy = (t.to(dtype).abs() if absolute else t.to(dtype) for t in (p.x, p.w, p.bias, p.dy))
    x, w, bias = (t.detach().requires_grad_() for t in (x, torch.where(p.keep, w, 0), bias))
    y = torch.stack([F.conv2d(*layer, *p.rest) for layer in zip(x, w, bias, strict=True)])
    dx, dw, db = torch.autograd.grad(y, (x, w, bias), dy)
    return {"y": y.detach(), "dx": dx, "dw": torch.where(p.keep, dw, 0), "db": db}


def terms(p: Problem) -> dict[str, int]:
    taps, pixels = p.w[0, 0, 0].numel(), p.dy.shape[1] * p.dy[0, 0, 0].numel()
    return {"y": p.w[0, 0].numel(), "dx": p.w.shape[1] * taps, "dw": pixels, "db": pixels}


# Offsets beyond 2^31


def apart(here: Here, part: str) -> None:
    """Replicas of x, w and dy 2^31 elements apart."""
    need_memory(10)
    gap = here.pick(2**13, 2**31) + 16
    small = problem(here, part, Setup(2, 2, 16, (6, 5), 24, (3, 3), padding=(1, 1)))
    flat = torch.full((gap + 2**13,), NAN, dtype=small.x.dtype, device=here.device)
    views, start = [], 0
    for t in (small.x, small.dy, small.w):
        t = t if t is small.w else t.permute(0, 1, 3, 4, 2)
        view = flat[start:].as_strided(t.shape, (gap, *t.contiguous().stride()[1:])).copy_(t)
        views.append(view if t is small.w else view.permute(0, 1, 4, 2, 3))
        start += -(-t[0].numel() // 16) * 16
    x, dy, w = views
    found = ours(small._replace(x=x, dy=dy, w=w))
    found.pop("db")  # torch's own sum, in another order
    must_repeat(found, ours(small), "distance")


def vast(here: Here, part: str) -> None:
    """More than 2^31 numbers in y, fewer in y[r]; the last images are those of a small problem."""
    need_memory(32)
    size, batch = here.pick(8, 512), here.pick(2, 64)
    p = problem(here, part, Setup(3, batch, 8, (size, size), 44, (1, 1)))
    last = p._replace(x=p.x[:, -1:], dy=p.dy[:, -1:])
    right = formula(last, torch.double)
    g = op.geometry((1, 1), *p.rest)
    found = {
        "y": op.forward(p.x, p.w, p.mask, p.bias, g, "triton")[:, -1:],
        "dx": op.dgrad(p.dy, p.w, p.mask, p.x.shape[3:], g, "triton")[:, -1:],
    }
    dw = op.wgrad(p.dy, p.x, p.mask, g, "triton")
    halves = [op.wgrad(p.dy[:, i::2], p.x[:, i::2], p.mask, g, "triton").double() for i in range(2)]
    compare(found, {n: right[n] for n in found}, formula(last, DTYPES[part]), part, terms(last))
    if not (dw.double() - sum(halves)).norm() <= 3e-2 * dw.double().norm():
        raise Wrong("dw of all images is not the sum of two halves")


def large(here: Here) -> Iterator[Case]:
    yield Case("replicas 2^31 apart", "bf16", partial(apart, here, "bf16"), 5)
    yield Case("beyond 2^31 numbers in y", "bf16", partial(vast, here, "bf16"), 15)


# At the sizes of layers


def verify(p: Problem, part: str) -> dict[str, float]:
    found = ours(p)
    return compare(found, formula(p, torch.double), formula(p, DTYPES[part]), part, terms(p))


def smoke(here: Here) -> Iterator[Case]:
    def run(part: str, s: Setup, graph: bool) -> Any:
        with precision(part):
            p = problem(here, part, s)
            if not graph:
                return verify(p, part)
            return must_replay(lambda: ours(p))

    for part in ("bf16", "tf32"):
        s = here.pick(TINY, LAYERS[1])
        yield Case(str(s), part, partial(run, part, s, False), 4)
        if here.device == "cuda":
            yield Case(f"{s} in a CUDA graph", part, partial(run, part, s, True), 2)


# Times


def chosen(here: Here, part: str) -> list[Setup]:
    return here.pick([TINY], LAYERS if part in ("bf16", "ieee") else LAYERS[:2])  # type: ignore[no-any-return]


def benchmark(here: Here, part: str, s: Setup, which: str) -> dict[str, Any]:
    p = problem(here, part, s)
    g, groups = op.geometry(s.kernel, *p.rest), s.r
    x, dy = (t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for t in (p.x, p.dy))
    factor = p.keep.to(p.w.dtype)
    masked = (p.w * factor).flatten(0, 1)

    def fold(t: Tensor, layout: torch.memory_format) -> Tensor:
        return t.movedim(0, 1).flatten(1, 2).contiguous(memory_format=layout)

    def backward(x: Tensor, dy: Tensor, w: Tensor, which: str) -> Tensor:
        wanted = [which == "dx", which == "dw", False]
        grads = torch.ops.aten.convolution_backward(
            dy, x, w, None, s.stride, s.padding, s.dilation, False, (0, 0), groups, wanted
        )
        return grads[0 if which == "dx" else 1]  # type: ignore[no-any-return]

    run: dict[str, Any] = {
        "y": lambda: op.forward(x, p.w, p.mask, p.bias, g, "triton"),
        "dx": lambda: op.dgrad(dy, p.w, p.mask, p.x.shape[3:], g, "triton"),
        "dw": lambda: op.wgrad(dy, x, p.mask, g, "triton"),
    }
    rivals = {"triton": run[which]}
    layouts = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
    for name, layout in layouts.items():
        folded = fold(p.x, layout), fold(p.dy, layout)
        kinds = {"w * m before": masked.contiguous(memory_format=layout)}
        if name == "channels-last":
            kinds["w * m each time"] = None
        for kind, w in kinds.items():

            def vendor(w: Tensor | None = w, folded: tuple[Tensor, Tensor] = folded) -> Tensor:
                a, b = folded
                w = (p.w * factor).flatten(0, 1) if w is None else w
                if which == "y":
                    return F.conv2d(a, w, p.bias.flatten(), s.stride, s.padding, s.dilation, groups)
                return backward(a, b, w, which)

            rivals[f"cuDNN {name}, {kind}"] = vendor
    with precision(part):
        wrong = judged(verify, p, part)
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            least = floor(p.x, p.w, p.mask, *p.rest)
            timed = rows(here, f"{which} {s}", least, part, "triton", rivals)
        finally:
            torch.backends.cudnn.benchmark = before
    return {"times": timed} | wrong


def benchmarks(here: Here) -> Iterator[Case]:
    for part in ("bf16", "fp16", "tf32", "ieee"):
        for s in chosen(here, part):
            for which in NAMES[:3]:
                yield Case(f"{which} {s}", part, partial(benchmark, here, part, s, which), 5)
