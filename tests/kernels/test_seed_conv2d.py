"""Convolutions with filters that are not stored, against float64: y, dx, db and the scores' gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import (
    DEVICE,
    DTYPES,
    NAN,
    compare,
    must_repeat,
    must_replay,
    pick,
    poisoned,
    precision,
    surrounded,
)
from sparselth.kernels import _native
from sparselth.kernels import seed_conv2d as module
from sparselth.kernels.seed_conv2d import floor, seed_conv2d
from sparselth.kernels.seed_linear import SeedWeight

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
# B, C, H, W, N, kh, kw, stride, padding
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1, 0),
    (2, 3, 7, 6, 5, 3, 3, 1, 1),
    (1, 16, 5, 6, 17, 5, 3, 2, 2),
    (1, 13, 3, 3, 130, 3, 3, 1, 1),
    (3, 2, 4, 4, 3, 2, 2, 2, 0),
]
LARGE = [(8, 64, 32, 32, 64, 3, 3, 1, 1), (2, 512, 4, 4, 512, 3, 3, 1, 1), (4, 128, 16, 16, 256, 3, 3, 2, 1)]
NAMES = ("y", "dx", "db", "ds")
PATHS = ["reference", *_native.levels()]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


def filters(shape: tuple[int, ...], density: float = 0.5, seed: int = 0, device: str = DEVICE) -> SeedWeight:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    return SeedWeight(shape, surrounded(SeedWeight.of(keep, seed, 3).bits.to(device)), seed, 3)


def products(
    x: Tensor, w: SeedWeight, bias: Tensor, dy: Tensor, stride: int, padding: int, kernels: str
) -> dict[str, Tensor]:
    """y and all gradients, through autograd; the scores' values must not matter."""
    leaves = [t.detach().requires_grad_() for t in (x, bias, torch.full(w.shape, NAN, device=x.device))]
    y = seed_conv2d(leaves[0], w, leaves[1], leaves[2], stride, padding, kernels)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def expected(
    x: Tensor,
    w: SeedWeight,
    bias: Tensor,
    dy: Tensor,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    absolute: bool,
) -> dict[str, Tensor]:
    """By torch's convolution and its gradients, with the weights written out."""
    tensors = x, w.to_dense(), bias, dy, w.frozen()
    x, kept, bias, dy, frozen = (t.detach().abs().to(dtype) if absolute else t.to(dtype) for t in tensors)
    x, kept, bias = (t.detach().clone().requires_grad_() for t in (x, kept, bias))
    y = F.conv2d(x, kept, bias, stride, padding)
    dx, dw, db = torch.autograd.grad(y, (x, kept, bias), dy)
    ds = dw * frozen
    return {"y": y.detach(), "dx": dx, "db": db, "ds": ds if dtype == torch.double else ds.float()}


def check(kernels: str, part: str, case: tuple[int, ...], density: float = 0.5, seed: int = 0) -> None:
    device = DEVICE if kernels == "triton" else "cpu"
    b, c, h, width, n, kh, kw, stride, padding = case
    w, dtype = filters((n, c, kh, kw), density, seed, device), DTYPES[part]
    g = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(s, generator=g).to(device, dtype) for s in ((b, c, h, width), (n,)))
    out = module.sizes(x, list(w.shape), stride, padding)
    dy = torch.randn(b, n, *out, generator=g).to(device, dtype)
    rest = stride, padding
    with precision(part):
        right, absolute = (expected(x, w, bias, dy, *rest, torch.double, a) for a in (False, True))
        own = expected(x, w, bias, dy, *rest, dtype, False)
        with poisoned():
            found = products(surrounded(x), w, surrounded(bias), surrounded(dy), *rest, kernels)
            turned = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            again = products(turned, w, surrounded(bias), surrounded(dy), *rest, kernels)
    exact = "ieee" if part == "tf32" and device == "cpu" else part
    terms = {"y": c * kh * kw, "dx": n * kh * kw, "db": b * out[0] * out[1], "ds": b * out[0] * out[1]}
    for names, rounding in ((NAMES[:3], exact), (NAMES[3:], exact if exact == "tf32" else "ieee")):
        f, r, o, a = ({name: t[name] for name in names} for t in (found, right, own, absolute))
        compare(f, r, o, rounding, terms, a)
    if kernels == "triton":
        must_repeat(again, found, "another layout")


@pytest.mark.parametrize("part", DTYPES)
@pytest.mark.parametrize("case", pick(SHAPES, SHAPES + LARGE), ids=str)
def test_triton_is_the_formula(case: tuple[int, ...], part: str) -> None:
    check("triton", part, case)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=CASES // 3 + 1)
@given(
    st.tuples(
        *(st.integers(1, 4), st.integers(1, 9), st.integers(4, 9), st.integers(4, 9)),
        *(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2)),
    ),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**20),
)
def test_any_convolution_on_a_cpu(path: str, case: tuple[int, ...], density: float, seed: int) -> None:
    if path != "reference":
        _native.choose(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparselth.kernels.seed_linear.MADE", 1 << 8)  # several tiles even here
        check("reference" if path == "reference" else "native", "ieee", case, density, seed)


@pytest.mark.parametrize("dtype", pick([torch.float32], [torch.float32, torch.bfloat16]))
def test_gradients_in_many_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLACES", 100)
    check("triton", "ieee" if dtype == torch.float32 else "bf16", (5, 3, 4, 5, 6, 3, 3, 1, 1))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
def test_in_a_cuda_graph() -> None:
    w = filters((64, 32, 3, 3))
    x, bias, dy = (torch.randn(s).cuda().bfloat16() for s in ((4, 32, 8, 8), (64,), (4, 64, 8, 8)))
    must_replay(lambda: products(x, w, bias, dy, 1, 1, "triton"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 5, 5)}, r"expected x\[B, C, H, W\] and filters \[N, C, kh, kw\]"),
        ({"x": torch.zeros(3, 5, 5)}, r"expected x\[B, C, H, W\]"),
        ({"x": torch.zeros(2, 3, 5, 5).int()}, "one floating-point dtype"),
        ({"bias": torch.zeros(5)}, r"expected bias\[4\]"),
        ({"scores": torch.zeros(4, 27)}, r"scores\[4, 3, 3, 3\]"),
        ({"stride": 0}, "expected a stride from 1 on"),
        ({"padding": -1}, "a padding from 0 on"),
        ({"x": torch.zeros(2, 3, 2, 5)}, "filters within the padded image"),
        ({"bias": torch.zeros(4, device="meta")}, "all on one device"),
        ({"kernels": "fast"}, "kernels='fast'"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {"x": torch.zeros(2, 3, 5, 5), "w": filters((4, 3, 3, 3), device="cpu")}
    with pytest.raises(ValueError, match=message):
        seed_conv2d(**(usual | change))  # type: ignore[arg-type]


def test_floor() -> None:
    assert floor((8, 4, 3, 3), 2, (5, 5), (3, 3), 2) == {
        "bytes": 8 * 5 + 2 * 2 * (100 + 72),
        "flops": 2 * 2 * 9 * 8 * 36,
    }


OPCHECK = """
import torch
from torch import library
from sparselth.kernels.seed_conv2d import _dx, _ds, _forward
from sparselth.kernels.seed_linear import SeedWeight
w = SeedWeight.of(torch.rand(4, 3, 3, 3) < 0.5, 1, 2)
keys, shape = list(w.keys), [4, 3, 3, 3]
x, bias, scores = (torch.randn(s, requires_grad=True) for s in ((2, 3, 5, 5), (4,), (4, 3, 3, 3)))
dy = torch.randn(2, 4, 3, 3)
some = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
library.opcheck(_forward, (x, w.bits, bias, scores, shape, keys, w.scale, 2, 1, "auto"), **some)
library.opcheck(_dx, (dy, w.bits, [2, 3, 5, 5], shape, keys, w.scale, 2, 1, "auto"), **some)
library.opcheck(_ds, (dy, x.detach(), shape, keys, w.scale, 2, 1, torch.float32, "auto"), **some)
"""


def test_opcheck(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)
