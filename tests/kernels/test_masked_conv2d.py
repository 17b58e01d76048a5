"""Against float64 convolutions of single replicas, which know nothing of bits, tiles and groups.

On a device also at the large tiles, in every dtype and layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import (
    DEVICE,
    DTYPES,
    compare,
    must_be_zero,
    must_repeat,
    must_replay,
    near,
    pick,
    poisoned,
    precision,
    surrounded,
)
from sparselth.kernels import _graphs, _triton, bitmask
from sparselth.kernels import masked_conv2d as op
from sparselth.kernels._tiles import kind
from sparselth.kernels.masked_conv2d import masked_conv2d

CONV = torch.backends.cudnn.conv  # type: ignore[attr-defined]
Pair = int | tuple[int, int]


class Case(NamedTuple):
    r: int
    b: int
    c: int
    size: tuple[int, int]
    n: int
    kernel: tuple[int, int]
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1
    keep: str = "0.3"

    def __str__(self) -> str:
        return "-".join(
            f"{k}{v}" for k, v in self._asdict().items() if v != self._field_defaults.get(k)
        ).replace(" ", "")


CASES = [
    Case(1, 1, 1, (1, 1), 1, (1, 1), keep="1"),
    Case(1, 2, 1, (10, 10), 6, (5, 5), padding=2),  # LeNet-5
    Case(2, 2, 3, (5, 7), 5, (3, 3), padding=1),
    Case(1, 2, 5, (9, 8), 7, (3, 3), stride=2, padding=1),
    Case(1, 2, 32, (6, 5), 17, (3, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    Case(1, 2, 3, (9, 9), 4, (3, 3), padding=2, dilation=2),
    Case(2, 1, 4, (5, 6), 3, (3, 2), stride=3, padding=4),  # more padding than the kernel reaches
    Case(1, 1, 32, (4, 3), 70, (1, 1), keep="0.02"),
    Case(1, 2, 64, (3, 4), 32, (3, 3), padding=1, keep="channels"),
    Case(1, 1, 33, (2, 3), 13, (1, 3), stride=2, padding=(0, 1), keep="rows"),
    Case(1, 1, 7, (4, 4), 3, (2, 2), keep="0"),
    Case(1, 1, 3, (13, 1), 2, (5, 1), padding=(2, 0), keep="1"),
]
LARGE = [
    Case(1, 60, 1, (28, 28), 6, (5, 5), padding=2),  # LeNet-5
    Case(1, 60, 6, (14, 14), 16, (5, 5)),
    Case(2, 8, 128, (14, 14), 256, (3, 3), stride=2, padding=1, keep="0.1"),
    Case(1, 8, 256, (14, 14), 256, (1, 1), keep="rows"),
    Case(1, 16, 64, (33, 31), 130, (3, 3), padding=1, keep="channels"),
]
TWO_TILES = [Case(1, 1, 32, size, n, (1, 1)) for n, size in ((70, (4, 3)), (3, (9, 9)))]  # of IEEE fp32
LAYOUTS = ("contiguous", "channels-last", "batch last", "off the grid")


class Problem(NamedTuple):
    x: Tensor
    w: Tensor  # NaN where it is pruned
    mask: Tensor
    bias: Tensor
    kept: Tensor  # bool [R, N, K]
    rest: tuple[Pair, Pair, Pair]


def problem(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shape = (case.r, case.n, case.c, *case.kernel)
    x = torch.randn(case.r, case.b, case.c, *case.size, generator=generator)
    w, chance = torch.randn(2, *shape, generator=generator)
    match case.keep:
        case "rows":  # of filters: pruned and full ones in turn
            kept = (torch.arange(case.n) % 2 == 0)[None, :, None, None, None].expand(shape)
        case "channels":  # the upper half is pruned
            kept = (torch.arange(case.c) < case.c // 2)[None, None, :, None, None].expand(shape)
        case share:
            kept = (
                chance.erf() < 2 * float(share) - 1
                if 0 < float(share) < 1
                else chance < 1e9 * (float(share) - 0.5)
            )
    w = torch.where(kept, w, torch.nan)
    bits = np.packbits(kept.reshape(case.r, case.n, -1).numpy(), axis=-1, bitorder="little")
    bias = torch.randn(case.r, case.n, generator=generator)
    x, w, bias = (t.to(DEVICE, dtype) for t in (x, w, bias))
    mask = torch.from_numpy(bits).to(DEVICE)
    return Problem(x, w, mask, bias, kept.flatten(2).to(DEVICE), (case.stride, case.padding, case.dilation))


def ours(p: Problem, dy: Tensor | None, kernels: str = "triton") -> list[Tensor]:
    """y, dx, dw, db; without dy, of the sum of y."""
    x, w, bias = (t.detach().requires_grad_() for t in (p.x, p.w, p.bias))
    y = masked_conv2d(x, w, p.mask, bias, *p.rest, kernels=kernels)
    grads = torch.autograd.grad(y, (x, w, bias), torch.ones_like(y[:1]).expand_as(y) if dy is None else dy)
    return [y.detach(), *grads]


def truth(p: Problem, dy: Tensor | None, dtype: torch.dtype = torch.double) -> list[Tensor]:
    kept = p.kept.view(p.w.shape)
    x, w, bias = (t.detach().to(dtype).requires_grad_() for t in (p.x, torch.where(kept, p.w, 0), p.bias))
    y = torch.stack([F.conv2d(*layer, *p.rest) for layer in zip(x, w, bias, strict=True)])
    dx, dw, db = torch.autograd.grad(y, (x, w, bias), torch.ones_like(y) if dy is None else dy.to(dtype))
    return [y.detach(), dx, dw * kept, db]


def random_dy(p: Problem) -> Tensor:
    like = truth(p, None)[0]
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, p.x.dtype)


def check(p: Problem, dy: Tensor | None, found: list[Tensor], scale: list[Tensor] | None = None) -> None:
    """Errors in parts of `scale`, which is the right result unless that may cancel to almost nothing."""
    rights = truth(p, dy)
    right_pixels = rights[0][0, :, 0].numel()  # that dw and db are sums over
    for name, f, right, size in zip(("y", "dx", "dw", "db"), found, rights, scale or rights, strict=True):
        assert f.dtype == p.x.dtype
        terms = {"y": p.w[0, 0].numel(), "dx": p.w[0, :, 0].numel()}.get(name, right_pixels)
        near(f, right, terms, size, what=name)
    assert not found[2].flatten(2)[~p.kept].any()


@pytest.fixture(autouse=True)
def nan_in_new_tensors() -> Iterator[None]:
    """And exact products: TF32 is wrong by 1e-3 on a GPU, though not in the interpreter."""
    before = CONV.fp32_precision
    CONV.fp32_precision = "tf32" if DEVICE == "cpu" else "ieee"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    CONV.fp32_precision = before


def strided(t: Tensor, layout: str) -> Tensor:
    """The same numbers [R, B, C, H, W] in another order of memory."""
    match layout:
        case "channels-last":
            return t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        case "batch last":
            return t.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    return surrounded(t, shift=1 if layout == "off the grid" else 0)


def strict(case: Case, part: str, layout: str = "contiguous", seed: int = 0) -> None:
    """All four as close to float64 as torch's own; NaN in pruned weights and in everything that is allocated,
    and around what is read."""

    def named(tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(("y", "dx", "dw", "db"), tensors, strict=True))

    p = problem(case, DTYPES[part], seed)
    dy = random_dy(p)
    with precision(part):
        right, own = named(truth(p, dy)), named(truth(p, dy, DTYPES[part]))
        magnitudes = p._replace(x=p.x.abs(), w=p.w.abs(), bias=p.bias.abs())
        absolute = named(truth(magnitudes, dy.abs()))
        dy = strided(dy, layout)
        p = p._replace(x=strided(p.x, layout), w=surrounded(p.w), mask=surrounded(p.mask))
        with poisoned():
            found = named(ours(p, dy))
            if DEVICE == "cuda":
                must_repeat(
                    named(ours(p._replace(w=p.w.nan_to_num()), dy)), found, "numbers in pruned weights"
                )
    taps, pixels = p.w[0, 0, 0].numel(), dy.shape[1] * dy[0, 0, 0].numel()
    terms = {"y": p.kept.shape[2], "dx": case.n * taps, "dw": pixels, "db": pixels}
    exact = "ieee" if part == "tf32" and DEVICE == "cpu" else part  # the interpreter cuts no operand off
    compare(found, right, own, exact, terms, absolute)
    must_be_zero(found["dw"].flatten(2), ~p.kept, "dw of pruned weights")


@pytest.mark.parametrize(
    ("case", "part"),
    pick(
        [(case, "tf32") for case in CASES]
        + [(CASES[i], part) for i in (2, 4, 8) for part in ("fp16", "bf16")]
        + [(case, "ieee") for case in TWO_TILES],
        [(case, part) for case in CASES + LARGE + TWO_TILES for part in DTYPES],
    ),
    ids=str,
)
def test_output_and_gradients(case: Case, part: str) -> None:
    strict(case, part)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    p = problem(case)
    dy = random_dy(p)
    check(p, dy, ours(p, dy, "reference"))


@pytest.mark.skipif(DEVICE == "cpu", reason="as the layouts below, in every dtype")
@pytest.mark.parametrize("part", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_in_every_dtype(layout: str, part: str) -> None:
    strict(Case(2, 2, 4, (3, 4), 6, (3, 3), padding=1), part, layout)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
@pytest.mark.parametrize("part", DTYPES)
def test_in_a_cuda_graph(part: str) -> None:
    with precision(part):
        p = problem(LARGE[2], DTYPES[part])
        dy = random_dy(p)
        must_replay(lambda: {str(i): t for i, t in enumerate(ours(p, dy))})


@pytest.mark.skipif(DEVICE == "cpu", reason="chooses on CUDA alone")
@pytest.mark.parametrize("part", DTYPES)
def test_auto_is_right_whatever_it_takes(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHOICES", {})
    p = problem(LARGE[1], DTYPES[part])
    dy = random_dy(p)
    with precision(part):
        found, right, own = ours(p, dy, "auto"), truth(p, dy), truth(p, dy, DTYPES[part])
    taps, pixels = p.w[0, 0, 0].numel(), dy.shape[1] * dy[0, 0, 0].numel()
    terms = {"y": p.kept.shape[2], "dx": p.w.shape[1] * taps, "dw": pixels}
    compare(*(dict(zip(terms, t, strict=False)) for t in (found, right, own)), part, terms)
    assert len(op.CHOICES) == 3


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize(
    "layout", ["channels-last", "batch last", "off the grid", "shared x", "flat buffer", "sparse"]
)
def test_layouts(layout: str, kernels: str) -> None:
    p = problem(Case(2, 2, 4, (3, 4), 6, (3, 3), padding=1))
    match layout:
        case "shared x":
            p = p._replace(x=p.x[:1].expand(p.x.shape))
        case "flat buffer":
            flat = F.pad(p.w.flatten(1), (3, 5))
            p = p._replace(w=flat[:, 3:-5].view(p.w.shape), mask=F.pad(p.mask, (1, 1))[..., 1:-1])
        case "sparse":  # every second element of larger tensors
            twice = [t.repeat_interleave(2, -1)[..., ::2] for t in (p.x, p.w, p.mask, p.bias)]
            p = p._replace(x=twice[0], w=twice[1], mask=twice[2], bias=twice[3])
    p = p._replace(x=strided(p.x, layout))
    dy = strided(random_dy(p), layout)
    found = ours(p, dy, kernels)
    check(p, dy, found)
    assert found[0].permute(0, 1, 3, 4, 2).is_contiguous()
    if layout == "channels-last":
        check(p, None, ours(p, None, kernels))  # dy expanded from one image


def test_only_occupied_tiles_are_visited() -> None:
    p = problem(Case(1, 1, 64, (4, 4), 3, (3, 3), padding=1, keep="channels"))
    x = p.x.clone()
    x[:, :, 32:] = torch.inf
    y = masked_conv2d(x, p.w, p.mask, p.bias, *p.rest, kernels="triton")
    assert torch.equal(y, masked_conv2d(p.x, p.w, p.mask, p.bias, *p.rest, kernels="triton"))


def test_lists_longer_than_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """29 tiles and more, listed 16 at a time."""
    monkeypatch.setattr(op, "LISTED", 16)
    for keep in ("channels", "0.01"):
        p = problem(Case(1, 1, 200, (3, 3), 5, (3, 3), padding=1, keep=keep))
        dy = random_dy(p)
        check(p, dy, ours(p, dy))


@pytest.mark.parametrize("part", pick(["tf32"], list(DTYPES)))
def test_a_layer_without_weights_gives_its_bias(part: str) -> None:
    p = problem(Case(2, 2, 5, (4, 4), 3, (3, 3), keep="0"), DTYPES[part])
    p.x[:] = torch.inf  # which no round of an empty list may read
    with precision(part), poisoned():
        y, dx, dw, _ = ours(p, None)
    assert torch.equal(y, p.bias[:, None, :, None, None].expand_as(y))
    assert not dx.any()
    assert not dw.any()


@pytest.mark.parametrize("part", pick(["tf32"], list(DTYPES)))
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pruned_gradients_are_0_whatever_x_and_dy_hold(value: float, kernels: str, part: str) -> None:
    p = problem(Case(2, 2, 3, (4, 5), 4, (3, 3), padding=1), DTYPES[part])
    p.x[:, 0, 1, 2, 2] = value
    dy = random_dy(p)
    dy[1, 1, 2, 0, 3] = value
    with precision(part):
        dw = ours(p, dy, kernels)[2].flatten(2)
    assert not dw[~p.kept].any()
    assert not dw[1, 2].isfinite()[p.kept[1, 2]].any()


def test_passes_without_autograd_into_a_flat_gradient() -> None:
    """As a network with one buffer of weights and one of gradients calls them."""
    p = problem(Case(2, 2, 3, (5, 6), 4, (3, 2), stride=2, padding=1))
    dy = random_dy(p)
    g = op.geometry(p.w.shape[3:], *p.rest)
    grad = torch.full((2, p.w[0].numel() + 9), torch.nan, device=DEVICE)
    for kernels in ("triton", "reference"):
        y = op.forward(p.x, p.w, p.mask, p.bias, g, kernels)
        dx = op.dgrad(dy, p.w, p.mask, p.x.shape[3:], g, kernels)
        dw = grad[:, 5:-4].view(p.w.shape).copy_(op.wgrad(dy, p.x, p.mask, g, kernels))
        check(p, dy, [y, dx, dw, dy.sum((1, 3, 4))])


def test_gradients_by_finite_differences() -> None:
    p = problem(Case(2, 1, 2, (4, 3), 2, (2, 2), stride=(2, 1), padding=1), torch.float64)
    leaves = [t.nan_to_num().requires_grad_() for t in (p.x, p.w, p.bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: masked_conv2d(x, w, p.mask, b, *p.rest), leaves)


def test_precision_is_that_of_convolutions() -> None:
    for setting in ("tf32", "ieee"):
        CONV.fp32_precision = setting  # and not that of recurrent layers: cudnn.allow_tf32 raises
        assert kind(torch.float32, convolution=True) == setting
        assert kind(torch.bfloat16, convolution=True) == "half"


@pytest.mark.parametrize("part", pick(["tf32"], list(DTYPES)))
def test_same_bits_again_and_in_any_company(part: str) -> None:
    p = problem(Case(2, 2, 2, (17, 17), 3, (2, 1)), DTYPES[part])
    assert op._chunks(1, 2 * 16 * 17, op._wgrad_tile("tf32", 3, 2, 4).depth)[0] > 1
    dy = random_dy(p)
    with precision(part):
        together = ours(p, dy)
        assert op.wgrad(dy, p.x, p.mask, op.geometry((2, 1), *p.rest), "triton").equal(together[2])
        alone = Problem(*(t[1:] for t in p[:5]), p.rest)  # type: ignore[union-attr]
        for a, b in zip(ours(alone, dy[1:]), together, strict=True):
            assert a[0].equal(b[1])


def test_more_replicas_than_a_grid_has_places(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(Case(3, 1, 2, (3, 4), 3, (2, 1)))
    dy = random_dy(p)
    right = ours(p, dy)
    monkeypatch.setattr(_triton, "GRID", 2)
    found = ours(p, dy)
    assert [t.stride()[1:] for t in found] == [t.stride()[1:] for t in right]
    for a, b in zip(found, right, strict=True):
        assert a.equal(b)


def test_autocast() -> None:
    p = problem(CASES[2])
    x, w = p.x.requires_grad_(), p.w.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = masked_conv2d(x, w, p.mask, None, *p.rest)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.dtype == w.grad.dtype == torch.float32


def test_floor() -> None:
    p = problem(Case(2, 2, 3, (7, 11), 5, (3, 3), padding=1))
    found = op.floor(p.x, p.w, p.mask, *p.rest)
    assert found["bytes"] == 4 * (p.x.numel() + p.w.numel() + 2 * 2 * 5 * 7 * 11) + p.mask.numel()
    assert found["flops"] == 2 * 2 * 7 * 11 * int(p.kept.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 1, 2, 4, 4)}, "expected x"),
        ({"mask": torch.zeros(1, 2, 2, dtype=torch.uint8)}, "expected x"),
        ({"bias": torch.zeros(1, 3)}, "expected x"),
        ({"x": torch.zeros(1, 0, 3, 4, 4)}, "none of them empty"),
        ({"mask": torch.zeros(1, 2, 4)}, "uint8 mask"),
        ({"x": torch.zeros(1, 1, 3, 4, 4, dtype=torch.float16)}, "one dtype"),
        ({"x": torch.zeros(1, 1, 3, 2, 4)}, "padded input"),
        ({"x": torch.zeros(1).expand(1, 2**28, 3, 4, 4)}, "2\\^31"),
        ({"stride": 0}, "stride and dilation from 1"),
        ({"padding": (1, 2, 3)}, "pairs"),
        ({"kernels": "fast"}, "fast"),
        ({"mask": torch.zeros(1, 2, 4, dtype=torch.uint8, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fits: dict[str, Any] = {
        "x": torch.zeros(1, 1, 3, 4, 4),
        "w": torch.zeros(1, 2, 3, 3, 3),
        "mask": torch.zeros(1, 2, 4, dtype=torch.uint8),
    }
    masked_conv2d(**fits)
    with pytest.raises(ValueError, match=message):
        masked_conv2d(**(fits | change))


def test_triton_takes_no_float64() -> None:
    p = problem(CASES[2], torch.float64)
    with pytest.raises(ValueError, match="float64"):
        masked_conv2d(p.x, p.w, p.mask, kernels="triton")


class Clock:
    """Stands for CUDA: its time passes when a kernel runs."""

    now, capturing = 0.0, False

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Clock) -> float:
        return other.at - self.at


LAUNCH_MS = 1.0  # of a launch from Python


class Graph:
    """A captured graph: its kernels take what they take, without launches."""

    under_way = False

    def __init__(self, call: Callable[[], object], calls: int) -> None:
        self.call, self.calls = call, calls
        Graph.under_way = True
        try:
            call()
        finally:
            Graph.under_way = False

    def replay(self) -> None:
        Graph.under_way = True
        for _ in range(self.calls):
            self.call()
        Graph.under_way = False


@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_apart_are_the_groups_of_one_call(replicas: int) -> None:
    x, w = torch.randn(replicas, 2, 3, 7, 5), torch.randn(replicas, 4, 3, 3, 3)
    mask = bitmask.pack(torch.rand(replicas, 4, 27) < 0.4)
    bias, g = torch.randn(replicas, 4), op.geometry((3, 3), 1, 1, 1)
    together = op.reference(x, w, mask, bias, g)
    found = op.apart(lambda r: op.reference(x[r], w[r], mask[r], bias[r], g), replicas, x.device)
    torch.testing.assert_close(found, together)
    assert found.shape == together.shape


def test_auto_takes_the_faster_and_never_decides_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHOICES", {})
    monkeypatch.setattr(op, "use_triton", lambda kernels, tensor: True)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Clock.capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(_graphs, "side", lambda device: MagicMock())
    monkeypatch.setattr(_graphs, "capture", Graph)
    ran: list[str] = []

    def call(size: int, triton_ms: float, capturing: bool = False) -> str:
        def run(name: str, ms: float) -> Tensor:
            if name == "triton" and size == 10 and Graph.under_way:
                raise RuntimeError("operation not permitted when stream is capturing")
            ran.append(name)
            Clock.now += ms + (0 if Graph.under_way else LAUNCH_MS)
            return torch.zeros(())

        Clock.capturing = capturing
        ran.clear()

        def several() -> Tensor:  # launches, as three kernels one after the other
            run("triton", triton_ms / 3)
            run("triton", triton_ms / 3)
            return run("triton", triton_ms / 3)

        runs = {"triton": several, "reference": lambda: run("reference", 2.0)}
        x = torch.zeros(1, 1, 1, size, size)
        op._dispatch("auto", "forward", x, x, op.geometry((1, 1), 1, 0, 1), runs)
        return ran[-1]

    assert "nothing" in op.explain()
    assert call(8, 1.0, capturing=True) == "reference"
    assert len(ran) == 1
    assert "capture" in op.explain()
    assert call(8, 1.0) == "triton"  # launched from Python it would take 4 ms, and the other 3
    assert len(ran) > 100
    assert call(8, 9.0, capturing=True) == "triton"  # what was measured stands
    assert len(ran) == 3
    assert call(9, 3.0) == "reference"  # another shape
    assert call(10, 1.8) == "reference"  # in no graph, and so from Python
    lines = op.explain().splitlines()
    assert [line.split(": ")[1][:30] for line in lines] == [
        "triton (triton 1.000 ms, refer",
        "reference (triton 3.000 ms, re",
        "reference (triton 4.800 ms, re",
    ]
    assert "forward of [1, 1, 1, 8, 8]" in lines[0]


def test_opcheck(without_interpreter: Callable[[str], str]) -> None:
    """In a process without the interpreter, which fake tensors do not survive."""
    without_interpreter("""
import torch
from torch import library
from sparselth.kernels import masked_conv2d as op
x, w, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4, 7, 6), (2, 5, 4, 3, 3), (2, 5)))
mask = torch.randint(0, 256, (2, 5, 5), dtype=torch.uint8) & 0xF
rest = [3, 3, 2, 1, 1, 0, 1, 2], "auto"
library.opcheck(op._forward, (x, w, mask, bias, *rest))
y = op._forward(x, w, mask, None, *rest).detach()
library.opcheck(op._dgrad, (y, w.detach(), mask, [7, 6], *rest))
library.opcheck(op._wgrad, (y, x.detach(), mask, *rest))
compiled = torch.compile(op.masked_conv2d, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x, w, mask, bias, 1, 1), op.masked_conv2d(x, w, mask, bias, 1, 1))
try:
    op.masked_conv2d(x, w, mask, kernels="triton")
except ValueError as error:
    assert "TRITON_INTERPRET=1" in str(error)
else:
    raise AssertionError("Triton ran without a GPU or its interpreter")
""")


cases = st.builds(
    Case,
    r=st.integers(1, 2),
    b=st.integers(1, pick(2, 3)),
    c=st.integers(1, pick(3, 64)),
    size=st.tuples(*[st.integers(1, pick(5, 16))] * 2),
    n=st.integers(1, pick(3, 64)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    keep=st.sampled_from(["0", "0.1", "0.5", "1", "rows", "channels"]),
).filter(lambda case: min(op.geometry(case.kernel, *case[6:9]).out(*case.size)) > 0)


@settings(max_examples=int(os.environ.get("SPARSELTH_CASES", "25")))
@given(
    cases,
    st.sampled_from(list(DTYPES)),
    st.sampled_from(LAYOUTS),
    st.sampled_from(["triton", "reference"]),
    st.integers(0, 10**6),
)
def test_any_geometry(case: Case, part: str, layout: str, kernels: str, seed: int) -> None:
    if kernels == "triton":
        strict(case, part, layout, seed)
        return
    p = problem(case, DTYPES[part], seed)
    dy = random_dy(p)
    magnitudes = p._replace(x=p.x.abs(), w=p.w.abs(), bias=p.bias.abs())
    scale = truth(magnitudes, dy.abs())
    p, dy = p._replace(x=strided(p.x, layout)), strided(dy, layout)
    check(p, dy, ours(p, dy, kernels), scale)
