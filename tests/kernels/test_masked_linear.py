"""Against the formula in float64; pruned weights may hold anything and their gradients are exactly 0.

On a device also at the large tiles, in every dtype and layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import (
    DEVICE,
    DTYPES,
    FLOATS,
    INF,
    NAN,
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
from sparselth.kernels import _triton
from sparselth.kernels import masked_linear as module
from sparselth.kernels.bitmask import reference_pack
from sparselth.kernels.masked_linear import floor, masked_linear

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
SHAPES = [(1, 1, 1, 1), (2, 33, 20, 47), (1, 7, 65, 130), (3, 5, 10, 84)]  # R, B, N, K
MORE = [(1, 60, 300, 784), (2, 128, 128, 128), (1, 1, 257, 31)]
LARGE = [(1, 1024, 1024, 1024), (1, 1100, 1030, 1027), (2, 300, 2100, 777)]  # the large tiles
LAYOUTS = ("contiguous", "transposed", "sliced", "replicas inside", "off the grid")
GRADS = ("y", "dx", "dw", "db", "ds")
OPS = torch.ops.sparselth


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def keep_bits(keep: Tensor) -> Tensor:
    return reference_pack(keep).to(DEVICE)


def strided(t: Tensor, layout: str) -> Tensor:
    """The same values [R, A, B] with other strides."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "sliced":
        wide = t.new_full((t.shape[0], t.shape[1], 2 * t.shape[2] + 3), NAN)
        wide[:, :, 3::2] = t
        return wide[:, :, 3::2]
    if layout == "replicas inside":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return surrounded(t, shift=1 if layout == "off the grid" else 0)


def products(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor, dy: Tensor, kernels: str) -> dict[str, Tensor]:
    """y and all gradients, through autograd."""
    leaves = [t.detach().requires_grad_() for t in (x, w, bias, torch.empty_like(w))]
    x, w, bias, scores = leaves
    y = masked_linear(x, w, mask, bias, scores, kernels)
    return dict(zip(GRADS, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def expected(
    x: Tensor, w: Tensor, keep: Tensor, bias: Tensor, dy: Tensor, dtype: torch.dtype = torch.double
) -> dict[str, Tensor]:
    x, w, bias, dy = (t.to(dtype) for t in (x, w, bias, dy))
    kept, dense = torch.where(keep, w, 0), dy.mT @ x
    return {
        "y": torch.baddbmm(bias[:, None], x, kept.mT),
        "dx": dy @ kept,
        "dw": dense * keep,
        "db": dy.sum(1),
        "ds": dense * w,
    }


def assert_close(
    found: dict[str, Tensor],
    right: dict[str, Tensor],
    names: tuple[str, ...] = GRADS,
    scale: dict[str, Tensor] | None = None,
) -> None:
    """Relative RMS error; `scale` is the formula on absolute values, for sums that may cancel."""
    (_, b, n), k = right["y"].shape, right["dx"].shape[2]
    for name in names:
        near(found[name], right[name], {"y": k, "dx": n}.get(name, b), (scale or right)[name], what=name)


def check(
    part: str,
    shape: tuple[int, ...],
    density: float = 0.3,
    layout: str = "contiguous",
    seed: int = 0,
    once: bool = False,
) -> None:
    """All five as close to float64 as torch's own, twice; NaN in pruned weights and whatever is allocated.

    `once`: not without NaN in pruned weights, which the gradient of the scores feels.
    """
    r, b, n, k = shape
    g, dtype = torch.Generator().manual_seed(seed), DTYPES[part]
    x, w, bias, dy = (randn(g, dtype, *s) for s in ((r, b, k), (r, n, k), (r, n), (r, b, n)))
    keep = torch.rand(r, n, k, generator=g) < density
    if n > 2 and 0 < density < 1:
        keep[:, 0], keep[:, -1] = False, True  # an empty row and a full one
    bits, keep = surrounded(keep_bits(keep)), keep.to(DEVICE)
    with precision(part):
        right, own = expected(x, w, keep, bias, dy), expected(x, w, keep, bias, dy, dtype)
        absolute = expected(x.abs(), w.abs(), keep, bias.abs(), dy.abs())
        holes = strided(torch.where(keep, w, NAN), layout)
        x, w, dy = (strided(t, layout) for t in (x, w, dy))
        with poisoned():
            again = products(x, holes, bits, bias, dy, "triton")
            found = again if once else products(x, w, bits, bias, dy, "triton")
    exact = "ieee" if part == "tf32" and DEVICE == "cpu" else part  # the interpreter cuts no operand off
    assert again.pop("ds").isnan().equal(~keep)
    if once:
        del right["ds"]
    compare(found, right, own, exact, {"y": k, "dx": n, "dw": b, "db": b, "ds": b}, absolute)
    must_repeat(again, found, "NaN in pruned weights")
    must_be_zero(found["dw"], ~keep, "dw of pruned weights")


@pytest.mark.parametrize("part", DTYPES)
@pytest.mark.parametrize("shape", pick(SHAPES, SHAPES + MORE + LARGE), ids=str)
def test_all_products_are_the_formula(shape: tuple[int, ...], part: str) -> None:
    check(part, shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    r, b, n, k = shape
    g = torch.Generator().manual_seed(0)
    x, w, bias, dy = (randn(g, dtype, *s) for s in ((r, b, k), (r, n, k), (r, n), (r, b, n)))
    keep = torch.rand(r, n, k, generator=g) < 0.3
    bits = keep_bits(keep)
    keep = keep.to(DEVICE)
    found = products(x, torch.where(keep, w, NAN), bits, bias, dy, "reference")
    assert_close(found, expected(x, w, keep, bias, dy), GRADS[:4])
    assert not found["dw"][~keep].any()
    assert found["ds"].isnan().equal(~keep)


@pytest.mark.parametrize("part", pick(["bf16"], list(DTYPES)))
@pytest.mark.parametrize(("n", "k"), pick([(32, 64)], [(256, 128), (1024, 1024), (1031, 1000)]))
def test_every_byte_of_mask_at_every_place(n: int, k: int, part: str) -> None:
    """Products with the identity are the masked weights, exactly."""
    places = torch.arange(n)[:, None] + 37 * torch.arange(k // 8)
    bits = places.to(torch.uint8)[None]
    keep = ((bits[..., None] >> torch.arange(8)) & 1).bool().view(1, n, k).to(DEVICE)
    bits = bits.to(DEVICE)
    w = randn(torch.Generator().manual_seed(0), DTYPES[part], 1, n, k)
    if part == "tf32":
        w = w.half().float()  # what TF32 holds exactly
    right = torch.where(keep, w, 0)
    rubbish = torch.full_like(w, NAN)
    rubbish[..., ::2] = INF
    holes = torch.where(keep, w, rubbish)
    one_k, one_n = (torch.eye(size, device=DEVICE, dtype=w.dtype)[None] for size in (k, n))
    with precision(part):
        found = {
            "y": masked_linear(one_k, holes, bits, kernels="triton").mT,
            "dx": OPS.masked_linear_dx(one_n, holes, bits, "triton"),
            "dw": OPS.masked_linear_dw(right.mT.contiguous(), one_k, torch.full_like(bits, 255), "triton"),
            "dw masked": OPS.masked_linear_dw(w.mT.contiguous(), one_k, bits, "triton"),
        }
    for name, t in found.items():
        wrong = (t != right)[0].nonzero()
        assert not len(wrong), f"{name}: {len(wrong)} of {n * k} differ, first at n, k = {wrong[0].tolist()}"


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
@pytest.mark.parametrize("part", DTYPES)
def test_in_a_cuda_graph(part: str) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = (2, 60, 84), (2, 300, 84), (2, 300), (2, 60, 300)
    x, w, bias, dy = (randn(g, DTYPES[part], *s) for s in shapes)
    bits = keep_bits(torch.rand(2, 300, 84, generator=g) < 0.5)
    with precision(part):
        must_replay(lambda: products(x, w, bits, bias, dy, "triton"))


@pytest.mark.parametrize("dtype", pick([torch.float32], list(FLOATS)), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("kept", [False, True])
def test_empty_and_full_masks(kept: bool, kernels: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, bias, dy = (randn(g, dtype, *s) for s in ((2, 9, 21), (2, 17, 21), (2, 17), (2, 9, 17)))
    keep = torch.full((2, 17, 21), kept)
    found = products(x, w, keep_bits(keep), bias, dy, kernels)
    assert_close(found, expected(x, w, keep.to(DEVICE), bias, dy))
    if not kept:
        assert found["y"].equal(bias[:, None].expand_as(found["y"]))
        assert not found["dx"].any()
        assert not found["dw"].any()


@pytest.mark.parametrize("dtype", pick([torch.float32], list(FLOATS)), ids=lambda d: str(d)[6:])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_gradient_of_pruned_weights_is_0_whatever_x_and_dy_hold(
    value: float, kernels: str, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, dy = (randn(g, dtype, *s) for s in ((1, 20, 40), (1, 34, 40), (1, 20, 34)))
    x[0, 3, 5] = dy[0, 7, 11] = value
    keep = torch.rand(1, 34, 40, generator=g) < 0.5
    y = masked_linear(x, w.requires_grad_(), keep_bits(keep), kernels=kernels)
    (dw,) = torch.autograd.grad(y, w, dy)
    assert not dw[~keep.to(DEVICE)].any()
    assert not dw[0, 11].isfinite()[keep[0, 11].to(DEVICE)].any()
    assert dw[0, :11, :5].isfinite().all()


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_do_not_matter(layout: str, kernels: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, bias, dy = (randn(g, torch.float32, *s) for s in ((2, 18, 35), (2, 12, 35), (2, 12), (2, 18, 12)))
    keep = torch.rand(2, 12, 35, generator=g) < 0.5
    bits = keep_bits(keep)
    right = products(x, w, bits, bias, dy, kernels)
    wide = torch.zeros(2, 12, 11, dtype=torch.uint8, device=DEVICE)  # rows of the mask further apart
    wide[:, :, :5] = bits
    found = products(
        strided(x, layout), strided(w, layout), wide[:, :, :5], bias, strided(dy, layout), kernels
    )
    for name in GRADS:
        assert torch.allclose(found[name], right[name], rtol=1e-5, atol=1e-5), name
    if kernels == "triton" and DEVICE == "cuda":
        for part in DTYPES:
            check(part, (2, 18, 12, 35), layout=layout)
    # a gradient broadcast over the batch, as `y.sum().backward()` gives
    same = dy[:, :1].expand_as(dy)
    assert_close(products(x, w, bits, bias, same, kernels), expected(x, w, keep.to(DEVICE), bias, same))


@pytest.mark.parametrize("part", pick(["ieee"], list(DTYPES)))
def test_a_replica_is_the_same_bits_whoever_sits_beside_it(part: str) -> None:
    assert module._choose("half", 4096, 512)[0] is module.TILES["half"][0]
    assert module._choose("ieee", 300, 60)[0] is module.TILES["ieee"][1]  # whatever R
    g = torch.Generator().manual_seed(0)
    x, w, bias, dy = (randn(g, DTYPES[part], *s) for s in ((3, 9, 40), (3, 33, 40), (3, 33), (3, 9, 33)))
    bits = keep_bits(torch.rand(3, 33, 40, generator=g) < 0.5)
    with precision(part):
        together = products(x, w, bits, bias, dy, "triton")
        for r in range(3):
            alone = products(*(t[r : r + 1] for t in (x, w, bits, bias, dy)), "triton")
            for name in GRADS:
                assert alone[name][0].equal(together[name][r]), name


def test_more_replicas_than_a_grid_has_places(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, bias, dy = (randn(g, torch.float32, *s) for s in ((5, 3, 9), (5, 4, 9), (5, 4), (5, 3, 4)))
    bits = keep_bits(torch.rand(5, 4, 9, generator=g) < 0.5)
    right = products(x, w, bits, bias, dy, "triton")
    monkeypatch.setattr(_triton, "GRID", 2)
    must_repeat(products(x, w, bits, bias, dy, "triton"), right, "more than one launch")


def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_FROM", 1)
    g = torch.Generator().manual_seed(0)
    for n, k in ((128, 128), (130, 75)):
        x, w, bias, dy = (randn(g, torch.float16, *s) for s in ((1, 70, k), (1, n, k), (1, n), (1, 70, n)))
        keep = torch.rand(1, n, k, generator=g) < 0.5
        found = products(x, w, keep_bits(keep), bias, dy, "triton")
        assert_close(found, expected(x, w, keep.to(DEVICE), bias, dy))


@settings(max_examples=CASES)
@given(
    st.tuples(st.integers(1, 2), *[st.integers(1, pick(34, 300))] * 3),
    st.sampled_from(list(DTYPES)),
    st.floats(0, 1),
    st.sampled_from(LAYOUTS),
    st.integers(0, 10**6),
)
def test_any_shape(shape: tuple[int, ...], part: str, density: float, layout: str, seed: int) -> None:
    check(part, shape, density, layout, seed, once=pick(True, False))


def test_scores_in_fp32_under_autocast_and_no_bias() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, scores = (randn(g, torch.float32, *s) for s in ((2, 6, 30), (2, 12, 30), (2, 12, 30)))
    bits = keep_bits(scores.cpu() > 0)
    scores.requires_grad_()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(DEVICE, dtype):
            y = masked_linear(x, w, bits, scores=scores)
        assert y.dtype == dtype
        (ds,) = torch.autograd.grad(y.sum(), scores)
        assert ds.dtype == torch.float32
        right = x.double().sum(1, keepdim=True) * w.double()
        near(ds.to(dtype), right, 6)


def test_gradients_by_finite_differences() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, bias = (
        torch.randn(s, generator=g, dtype=torch.double).requires_grad_()
        for s in ((2, 3, 9), (2, 4, 9), (2, 4))
    )
    bits = reference_pack(torch.rand(2, 4, 9, generator=g) < 0.5)
    assert torch.autograd.gradcheck(lambda x, w, b: masked_linear(x, w, bits, b), (x, w, bias))


def test_what_does_not_fit_is_said() -> None:
    x, w, bits = torch.ones(2, 3, 9), torch.ones(2, 4, 9), torch.zeros(2, 4, 2, dtype=torch.uint8)
    for args, words in (
        ((x[0], w, bits), r"expected x\[R, B, K\] and w\[R, N, K\]"),
        ((x[:, :0], w, bits), "none empty"),
        ((x, w[:1], bits), r"expected w\[2, 4, 9\]"),
        ((x, w, bits[..., :1]), r"expected mask\[2, 4, 2\]"),
        ((x, w, bits, torch.ones(2, 3)), r"expected bias\[2, 4\]; got .*bias torch.float32\[2, 3\]"),
        ((x, w, bits, None, w.mT), r"expected scores\[2, 4, 9\]"),
        ((x, w, bits.bool()), "expected a uint8 mask"),
        ((x, w.half(), bits), "of one dtype"),
        ((x, w, bits.to("meta")), "expected all on one device; got .*on meta"),
    ):
        with pytest.raises(ValueError, match=words):
            masked_linear(*args)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        masked_linear(*(t.to(DEVICE) for t in (x.double(), w.double(), bits)), kernels="triton")
    with pytest.raises(ValueError, match="cuda"):
        masked_linear(x, w, bits, kernels="cuda")


def test_floor() -> None:
    found = floor(2, 60, 300, 784, 4)
    assert found == {
        "bytes": 2 * (4 * (60 * 784 + 300 * 784 + 60 * 300) + 300 * 98),
        "flops": 4 * 60 * 300 * 784,
    }


OPCHECK = """
import torch
from torch import library
from sparselth.kernels.masked_linear import _ds, _dw, _dx, _forward, masked_linear

torch.manual_seed(0)
shapes = (2, 5, 12), (2, 7, 12), (2, 7), (2, 7, 12)
x, w, bias, scores = (torch.randn(shape, requires_grad=True) for shape in shapes)
mask, dy = torch.randint(0, 16, (2, 7, 2), dtype=torch.uint8), torch.randn(2, 5, 7)
library.opcheck(_forward, (x, w, mask, bias, scores, "auto"))
library.opcheck(_forward, (x.mT.contiguous().mT, w, mask, None, None, "auto"))
x, w = x.detach(), w.detach()
library.opcheck(_dx, (dy, w, mask, "auto"))
library.opcheck(_dw, (dy, x, mask, "auto"))
library.opcheck(_ds, (dy, x, w, "auto"))
try:
    masked_linear(x, w, mask, kernels="triton")
except ValueError as e:
    assert "TRITON_INTERPRET=1" in str(e)
else:
    raise AssertionError("Triton on a CPU without the interpreter")
"""


def test_opcheck(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)


def test_rows_too_far_apart_are_refused() -> None:
    w = torch.zeros(1).as_strided((1, 2, 8), (0, 0, 0))
    far = torch.empty(1, device="meta").as_strided((1, 2, 8), (0, 2**24, 1))
    module._near(w, torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"less than 2\^24 numbers apart"):
        module._near(w, far)
