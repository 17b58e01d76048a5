"""Packed weights there and back; the CUDA kernel against float64, at every end of a row and beyond it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from oracle import (
    DEVICE,
    FLOATS,
    INF,
    NAN,
    compare,
    layed,
    must_repeat,
    near,
    pick,
    poisoned,
    precision,
    same_bits,
    surrounded,
)
from sparselth.kernels import _native, csr_linear
from sparselth.kernels import csr_lanes as op
from sparselth.kernels.csr_lanes import LanedCsr, csr_lanes, floor

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
DTYPES = list(FLOATS)
BF16 = torch.bfloat16
PARTS = "bf16", "fp16", "ieee"
LAYOUTS = ("contiguous", "transposed", "sliced", "off the grid")
Shape = tuple[int, int, int]  # N, K, B
TINY: list[Shape] = [(1, 1, 1), (5, 47, 8), (9, 130, 3)]
DEVICE_SHAPES: list[Shape] = [
    *[(300, 784, b) for b in (1, 2, 4, 5, 8, 11, 16, 17, 64)],
    *[(10, 100, 8), (3, 50000, 1), (1, 4096, 16), (2000, 31, 8), (40, 65536, 8), (40, 65537, 8)],
    *[(4096, 4096, 1), (8192, 8192, 8), (1000, 25088, 16), (16384, 2048, 13)],
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def kinds(n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Masks [n, k] of all kinds."""
    names = "empty", "single", "row", "column", "ends"
    keep = {name: torch.zeros(n, k, dtype=torch.bool) for name in names}
    if n and k:
        g = torch.Generator().manual_seed(seed)
        keep["single"][n // 2, k - 1] = True
        keep["row"][n - 1] = True
        keep["column"][:, 0] = True
        keep["ends"][:, [0, k - 1]] = True
        keep["sparse"] = torch.rand(n, k, generator=g) < 0.1
        lengths = torch.rand(n, generator=g).square() * (k + 1)
        keep["uneven"] = torch.rand(n, k, generator=g).argsort(1) < lengths[:, None]
    return {name: t.to(DEVICE) for name, t in keep.items()} | {"full": ~keep["empty"].to(DEVICE)}


def packed_of(mask: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanedCsr:
    """Random weights, and NaN where they are pruned."""
    weight = draw(*mask.shape, seed=seed).masked_fill_(~mask, math.nan)
    return LanedCsr.from_dense(weight, mask, dtype)


def exact(packed: LanedCsr, x: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """float64, over kept weights alone, one by one."""
    y = torch.zeros(packed.shape[0], x.shape[1], dtype=torch.double)
    for row, column, value in zip(*(t.tolist() for t in packed.kept_weights()), strict=True):
        y[row] += value * x[column].double().cpu()
    if bias is not None:
        y += bias.double().cpu()[:, None]
    return y.relu() if relu else y


def check(packed: LanedCsr, x: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    y = csr_lanes(packed, x, bias, relu, kernels="triton")
    assert y.dtype == x.dtype
    right = exact(packed, x, bias, relu)
    # sums that cancel are judged by what they are sums of
    squares = packed.to_dense().double().square() @ x.double().nan_to_num(0, 0, 0).square()
    size = max(right, squares.sqrt().cpu(), key=torch.linalg.vector_norm)
    near(y.cpu(), right, packed.shape[1], size)
    return y


# The format


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (13, 1), (7, 8), (40, 131), (0, 5), (5, 0)], ids=str)
def test_any_mask_there_and_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mask in kinds(*shape).values():
        packed = packed_of(mask, dtype)
        weight = draw(*shape)
        assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0).to(dtype))
        assert packed.kept == int(mask.sum())
        assert packed.bytes() == sum(t.numel() * t.element_size() for t in packed.arrays())
        counts = mask.sum(1)
        groups = -(-counts // 8)
        assert packed.values.numel() == packed.columns.numel() == 8 * int(groups.sum())
        assert torch.equal(packed.starts.diff().long(), groups.sort(descending=True)[0])
        assert packed.starts.dtype == packed.rows.dtype == torch.int32
        assert torch.equal((packed.rows >> 3).long().sort()[0], torch.arange(shape[0], device=DEVICE))


@settings(max_examples=4 * CASES)
@given(
    st.integers(0, 70),
    st.one_of(st.integers(0, 90), st.integers(600, 2100)),
    st.sampled_from(["empty", "single", "row", "column", "ends", "sparse", "uneven", "full"]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**20),
)
@example(3, 70000, "sparse", BF16, 0)
def test_random_masks_there_and_back(n: int, k: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    mask = kinds(n, k, seed).get(kind, torch.zeros(n, k, dtype=torch.bool, device=DEVICE))
    packed = packed_of(mask, dtype, seed)
    assert torch.equal(packed.to_dense(), torch.where(mask, draw(n, k, seed=seed), 0).to(dtype))
    assert packed.columns.dtype == (torch.uint16 if k <= 65536 else torch.int32)


def test_kept_weights_that_are_zero_are_kept() -> None:
    mask = kinds(9, 40)["sparse"]
    packed = LanedCsr.from_dense(torch.zeros(9, 40, device=DEVICE), mask)
    row, column, value = packed.kept_weights()
    found = torch.zeros_like(mask)
    found[row, column] = True
    assert torch.equal(found, mask)
    assert not value.any()


def test_neighbouring_threads_have_neighbouring_columns() -> None:
    """A step is 8 places of all lanes: place 0 of all groups comes first, then place 1."""
    packed = packed_of(torch.ones(1, 100, dtype=torch.bool, device=DEVICE))
    assert packed.lanes == 16
    whole, end = packed.columns.int()[:96], packed.columns.int()[96:]
    assert packed.columns.numel() == 104  # 13 groups, less than the lanes: one step
    steps = torch.cat([whole, end]).view(13, 8).t().reshape(-1)
    assert steps[:100].tolist() == list(range(100))
    assert not steps[100:].any()
    assert packed.rows.tolist() == [4]


@pytest.mark.parametrize(
    ("rows", "groups", "lanes"),
    [(8192, 103, 16), (4096, 52, 32), (1000, 314, 128), (10, 2, 8), (300, 10, 16), (10**6, 50, 8), (0, 0, 8)],
)
def test_lanes_fill_a_device_but_not_more_than_a_row(rows: int, groups: int, lanes: int) -> None:
    assert op._lanes(rows, rows * groups) == lanes


def test_bytes_of_a_large_layer() -> None:
    mask = torch.rand(512, 8192, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.1
    packed = packed_of(mask, BF16)
    assert packed.bytes() / (2 * mask.numel()) <= 0.21
    assert floor(packed, 8) == {
        "bytes": packed.bytes() + 2 * 8 * (512 + 8192),
        "flops": 2 * 8 * int(mask.sum()),
    }


# The kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["empty", "single", "row", "column", "ends", "sparse", "uneven", "full"])
def test_any_mask(kind: str, dtype: torch.dtype) -> None:
    packed = packed_of(kinds(11, 70)[kind], dtype)
    check(packed, draw(70, 4).to(dtype), draw(11, seed=1).to(dtype))


@pytest.mark.parametrize("batch", range(1, 18))
def test_every_batch(batch: int) -> None:
    dtype = DTYPES[batch % 3]
    packed = packed_of(kinds(5, 40)["uneven"], dtype)
    check(packed, draw(40, batch).to(dtype), draw(5, seed=1).to(dtype), relu=True)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("lanes", [8, 16, 32, 64, 128])
def test_rows_of_many_steps_beside_short_ones(
    lanes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_lanes", lambda rows, groups: lanes)
    kept = [0, 1, 7, 8, 9, 8 * lanes - 1, 8 * lanes, 8 * lanes + 1, 16 * lanes + 3]
    counts = torch.tensor(kept, device=DEVICE)[[5, 0, 8, 3, 7, 1, 6, 2, 4]]
    mask = torch.arange(16 * lanes + 3, device=DEVICE) < counts[:, None]
    packed = packed_of(mask, dtype)
    assert packed.lanes == lanes
    assert torch.equal(packed.to_dense(), torch.where(mask, draw(*mask.shape), 0).to(dtype))
    check(packed, draw(mask.shape[1], 3).to(dtype))


def test_all_steps_full() -> None:
    check(packed_of(torch.ones(9, 256, dtype=torch.bool, device=DEVICE), BF16), draw(256, 16).to(BF16))


@pytest.mark.parametrize("k", [65536, 65537])
def test_the_last_column_that_16_bits_tell(k: int) -> None:
    mask = torch.zeros(3, k, dtype=torch.bool, device=DEVICE)
    mask[:, [0, 32767, 32768, k - 1]] = True
    for dtype in DTYPES:
        packed = packed_of(mask, dtype)
        assert packed.columns.dtype == (torch.uint16 if k == 65536 else torch.int32)
        check(packed, draw(k, 2).to(dtype))


# Beside the formula in float64, with guards around all operands


class Problem(NamedTuple):
    x: Tensor
    w: Tensor  # NaN where pruned
    keep: Tensor
    bias: Tensor


def problem(part: str, shape: Shape, density: float, seed: int = 0) -> Problem:
    """With rows of very different length, an empty and a full one, where there are so many."""
    n, k, b = shape
    g = torch.Generator(DEVICE).manual_seed(seed)
    share = torch.linspace(0, 2 * density, n, device=DEVICE)[:, None] if n > 8 else density
    keep = torch.rand(n, k, generator=g, device=DEVICE) < share
    if n > 2 and 0 < density < 1:
        keep[0], keep[-1] = False, True
    x, w, bias = (
        torch.randn(s, generator=g, device=DEVICE).to(oracle.DTYPES[part]) for s in ((k, b), (n, k), (n,))
    )
    return Problem(x, w.masked_fill_(~keep, NAN), keep, bias)


def formula(p: Problem, dtype: torch.dtype, relu: bool = False) -> dict[str, Tensor]:
    w = torch.where(p.keep, p.w, 0).to(dtype)
    y = torch.addmm(p.bias.to(dtype)[:, None], w, p.x.to(dtype))
    return {"y": y.relu_() if relu else y}


def guarded(packed: LanedCsr) -> LanedCsr:
    """The same with NaN, and indices that lead nowhere, around its arrays."""

    def around(t: Tensor) -> Tensor:
        if t.dtype.is_floating_point:
            return surrounded(t)
        bits = t.view(torch.int16 if t.itemsize == 2 else torch.int32)
        wide = bits.new_full((bits.numel() + 512,), 0x5555)
        wide[256:-256] = bits
        return wide[256:-256].view(t.dtype)

    return LanedCsr(packed.shape, packed.lanes, *map(around, packed.arrays()))


def check_beside_torch(
    part: str, shape: Shape, density: float = 0.2, layout: str = "contiguous", seed: int = 0
) -> None:
    """y against float64, twice; NaN in pruned weights, around all operands and in all that is allocated."""
    p = problem(part, shape, density, seed)
    packed = LanedCsr.from_dense(p.w, p.keep)
    assert same_bits(packed.to_dense(), torch.where(p.keep, p.w, 0))
    relu = seed % 2 == 1
    spread = layed(p.x, layout)

    def ours(packed: LanedCsr, x: Tensor) -> dict[str, Tensor]:
        return {"y": csr_lanes(packed, x, p.bias, relu, kernels="triton")}

    with precision(part):
        absolute = formula(Problem(p.x.abs(), p.w.abs(), p.keep, p.bias.abs()), torch.double)
        right, torchs = formula(p, torch.double, relu), formula(p, oracle.DTYPES[part], relu)
        with poisoned():
            found = ours(guarded(packed), spread)
            compare(found, right, torchs, part, {"y": shape[1]}, absolute)
            must_repeat(ours(guarded(packed), spread), found)
        if layout != "contiguous":
            must_repeat(ours(packed, p.x), found, "another layout")


def said(shape: Shape) -> str:
    return "N{} K{} B{}".format(*shape)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", pick(TINY, TINY + DEVICE_SHAPES), ids=said)
def test_product_is_the_formula(shape: Shape, part: str) -> None:
    check_beside_torch(part, shape)


@pytest.mark.parametrize("part", pick(("bf16", "ieee"), PARTS))
@pytest.mark.parametrize("batch", pick((1, 8), (1, 8, 13)))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout: str, batch: int, part: str) -> None:
    check_beside_torch(part, (18, 70, batch), layout=layout)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("density", pick((1.0,), (0.01, 0.5, 1.0)))
def test_densities(density: float, part: str) -> None:
    check_beside_torch(part, pick((5, 60, 8), (300, 1000, 8)), density)


@pytest.mark.parametrize("part", PARTS)
def test_without_weights_y_is_the_bias(part: str) -> None:
    p = problem(part, (17, 21, 8), 0.0)
    with poisoned():
        found = csr_lanes(LanedCsr.from_dense(p.w, p.keep), p.x, p.bias, kernels="triton")
    assert torch.equal(found, p.bias[:, None].expand_as(found))


@settings(max_examples=pick(CASES // 2, 180))
@given(
    st.tuples(*(st.integers(1, most) for most in pick((9, 120, 20), (600, 3000, 40)))),
    st.sampled_from(PARTS),
    st.floats(0, 1).map(lambda share: share**2),
    st.sampled_from(LAYOUTS),
    st.integers(0, 10**6),
)
def test_any_product(shape: Shape, part: str, density: float, layout: str, seed: int) -> None:
    check_beside_torch(part, shape, density, layout, seed)


@pytest.mark.parametrize("part", pick(("bf16",), PARTS))
@pytest.mark.parametrize("batch", pick((16,), (1, 8, 16)))
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_reaches_its_rows_at_every_width(value: float, batch: int, part: str) -> None:
    """And nothing through empty places, which hold column 0."""
    p = problem(part, pick((20, 90, batch), (40, 300, batch)), 0.1)
    packed = LanedCsr.from_dense(p.w, p.keep)
    for column in (0, 7, p.x.shape[0] - 1):
        x = p.x.clone()
        x[column, -1] = value
        y = csr_lanes(packed, x, p.bias, kernels="triton")
        assert y[:, :-1].isfinite().all()
        assert torch.equal(~y[:, -1].isfinite(), p.keep[:, column])
        if value == INF:
            kept = p.keep[:, column]
            assert torch.equal(y[kept, -1], p.w[kept, column].sign() * value)


@pytest.mark.parametrize("kernels", ["triton", "reference", "auto"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_comes_through_kept_weights_alone(
    bad: float, dtype: torch.dtype, kernels: str
) -> None:
    """Row 0 has 9 kept weights, so 7 empty places; these hold column 0, where x is not finite either."""
    mask = kinds(10, 60)["sparse"]
    mask[0] = False
    mask[0, 3:12] = True
    mask[:, 0] = False
    mask[4, 0] = True
    packed = packed_of(mask, dtype)
    x = draw(60, 2).to(dtype)
    x[0, 0] = x[5, 1] = bad
    y = csr_lanes(packed, x, kernels=kernels).cpu()
    right = exact(packed, x)
    assert torch.equal(y.isnan(), right.isnan())
    assert torch.equal(torch.where(right.isinf(), y.double(), 0), torch.where(right.isinf(), right, 0))
    assert torch.equal(y.isfinite(), ~mask[:, [0, 5]].cpu())
    rectified = csr_lanes(packed, x, relu=True, kernels=kernels).cpu()
    assert torch.equal(rectified.isnan(), y.isnan())
    assert torch.equal(rectified.nan_to_num(0, math.inf), y.relu().nan_to_num(0, math.inf))


@pytest.mark.parametrize("empty", range(8))
@pytest.mark.parametrize("lanes", [8, 128])
def test_the_last_group_of_a_step_has_empty_places(
    lanes: int, empty: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all rows of a program, of two steps each."""
    monkeypatch.setattr(op, "_lanes", lambda rows, groups: lanes)
    mask = torch.zeros(128 // lanes, 16 * lanes + 1, dtype=torch.bool, device=DEVICE)
    mask[:, 1 : 16 * lanes + 1 - empty] = True
    x = draw(mask.shape[1], 1).to(BF16)
    x[0] = math.inf
    check(packed_of(mask, BF16), x)


def test_short_rows_beside_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 256 weights are full for one row of a program alone."""
    monkeypatch.setattr(op, "_lanes", lambda rows, groups: 32)
    mask = torch.arange(513, device=DEVICE) < torch.tensor([[8], [513], [301], [0]], device=DEVICE)
    mask[:, 0] = False
    x = draw(513, 2)
    x[0] = math.inf
    check(packed_of(mask), x)


def test_infinite_weights_stay_in_their_rows() -> None:
    mask = kinds(10, 60)["sparse"]
    mask[3, 7] = True
    weight = draw(10, 60)
    weight[3, 7] = math.inf
    x = draw(60, 8)
    y = csr_lanes(LanedCsr.from_dense(weight, mask), x, kernels="triton")
    assert torch.equal(y[3], x[7].sign() * math.inf)
    assert y[[0, 1, 2, *range(4, 10)]].isfinite().all()


@pytest.mark.parametrize("kernels", ["triton", "reference", "auto"])
@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)], ids=str)
def test_empty_operands(shape: tuple[int, int, int], kernels: str) -> None:
    n, k, b = shape
    packed, bias = packed_of(torch.ones(n, k, dtype=torch.bool, device=DEVICE)), draw(n)
    y = csr_lanes(packed, draw(k, b), bias, kernels=kernels)
    torch.testing.assert_close(y, packed.to_dense() @ draw(k, b) + bias[:, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_computes_the_same(dtype: torch.dtype) -> None:
    packed = packed_of(kinds(12, 200)["uneven"], dtype)
    x, bias = draw(200, 5).to(dtype), draw(12).to(dtype)
    for kernels in ("reference", "auto"):
        y = csr_lanes(packed, x, bias, True, kernels=kernels).cpu()
        right = exact(packed, x, bias, True)
        near(y, right, 200)


@pytest.mark.skipif(DEVICE == "cuda" or _native.LIB is None, reason="the native kernels compute on CPUs")
def test_a_cpu_takes_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = packed_of(kinds(12, 200)["uneven"]), draw(5, 200).t()
    monkeypatch.setattr(op, "_infer", None)
    before = packed.bytes()
    y = csr_lanes(packed, x)
    index, values = packed.native
    assert torch.equal(y, csr_linear.csr_linear(index, values, x.contiguous(), kernels="native"))
    assert torch.equal(index.to_dense(values), packed.to_dense())
    assert packed.bytes() == before + index.bytes() + 4 * packed.kept


def test_autocast_takes_activations_to_the_weights() -> None:
    packed, x, bias = packed_of(kinds(6, 50)["sparse"], BF16), draw(50, 2), draw(6)
    with torch.autocast(DEVICE, dtype=BF16):
        y = csr_lanes(packed, x, bias, kernels="reference")
    assert torch.equal(y, csr_lanes(packed, x.to(BF16), bias.to(BF16), kernels="reference"))


def test_wrong_operands_are_named() -> None:
    weight, mask = draw(4, 6), kinds(4, 6)["sparse"]
    packed = LanedCsr.from_dense(weight, mask)
    with pytest.raises(ValueError, match=r"got torch.float32 \[4, 6\] and torch.bool \[4, 5\]"):
        LanedCsr.from_dense(weight, mask[:, 1:])
    with pytest.raises(ValueError, match=r"and torch\.uint8"):
        LanedCsr.from_dense(weight, mask.to(torch.uint8))
    with pytest.raises(ValueError, match=r"expected weights in .*bfloat16, got torch.float64"):
        LanedCsr.from_dense(weight, mask, torch.float64)
    with pytest.raises(ValueError, match=r"at most 2\^27 columns, got 1 and 134217729"):
        LanedCsr.from_dense(weight[:1, :1].expand(1, 2**27 + 1), mask[:1, :1].expand(1, 2**27 + 1))
    with pytest.raises(ValueError, match=r"expected x\[6, B\] and bias\[4\] for W\[4, 6\]; got x torch"):
        csr_lanes(packed, draw(5, 2))
    with pytest.raises(ValueError, match=r"bias torch.float32\[3\]"):
        csr_lanes(packed, draw(6, 2), draw(3))
    with pytest.raises(ValueError, match="expected all of one dtype"):
        csr_lanes(packed, draw(6, 2).to(BF16))
    with pytest.raises(ValueError, match="kernels='fast'"):
        csr_lanes(packed, draw(6, 2), kernels="fast")


OPCHECK = """
import torch
from torch import library
from sparselth.kernels.csr_lanes import LanedCsr, csr_lanes
weight, x, bias = torch.randn(12, 30), torch.randn(30, 5), torch.randn(12)
packed = LanedCsr.from_dense(weight, torch.rand(12, 30) < 0.3, torch.bfloat16)
x, bias = x.bfloat16(), bias.bfloat16()
for b in (bias, None):
    library.opcheck(torch.ops.sparselth.csr_lanes, (*packed.arrays(), x, b, packed.lanes, True, "auto"))
whole = torch.compile(lambda x: csr_lanes(packed, x, bias, True), fullgraph=True, backend="aot_eager")
assert torch.equal(whole(x), csr_lanes(packed, x, bias, True))
try:
    csr_lanes(packed, x, kernels="triton")
except ValueError as error:
    assert "TRITON_INTERPRET=1" in str(error)
else:
    assert torch.cuda.is_available()
"""


@pytest.mark.host
def test_the_op_passes_torchs_checks(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)
