"""Any mask comes back bit for bit; the product is the formula, whatever pruned weights and memory hold."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import slot_linear as module
from sparselth.kernels.slot_linear import Slots, floor, slot_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
RTOL = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # 3 times torch's own
NAN = float("nan")
KERNELS = "triton", "reference"


def randn(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g).to(DEVICE, dtype)


def expected(x: Tensor, w: Tensor, keep: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    y = x.double() @ torch.where(keep, w, 0).double().t()
    y = y if bias is None else y + bias.double()
    return y.relu() if relu else y


def assert_close(found: Tensor, right: Tensor, size: Tensor | None = None) -> None:
    assert found.shape == right.shape
    error, size = (found.double() - right).norm(), (right if size is None else size).norm()
    assert error <= RTOL[found.dtype] * size, f"{error:.1e} of {size:.1e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """What a launcher allocates is full of NaN."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def filled(t: Tensor) -> Tensor:
        return t.fill_(NAN) if t.is_floating_point() and t.device.type != "meta" else t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda *args, **kwargs: filled(new_empty(*args, **kwargs)))
        patch.setattr(torch, "empty", lambda *args, **kwargs: filled(empty(*args, **kwargs)))
        yield


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", RTOL, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 130, 70), (3, 7, 600), (33, 20, 47)], ids=lambda s: "B{}-N{}-K{}".format(*s)
)
def test_product_is_the_formula(shape: tuple[int, int, int], dtype: torch.dtype, kernels: str) -> None:
    b, n, k = shape
    g = torch.Generator().manual_seed(0)
    x, w, bias = (randn(g, dtype, *s) for s in ((b, k), (n, k), (n,)))
    keep = torch.rand(n, k, generator=g) < 0.3
    keep[0], keep[-1] = False, True  # an empty row and a full one
    keep = keep.to(DEVICE)
    slots = Slots.from_dense(torch.where(keep, w, NAN), keep)
    for given_bias, relu in ((bias, True), (None, False)):
        found = slot_linear(slots, x, given_bias, relu, kernels)
        assert found.dtype == dtype
        assert_close(found, expected(x, w, keep, given_bias, relu))


@pytest.mark.parametrize("columns", [tile.columns for tile in module.TILES])
def test_every_tile(columns: int) -> None:
    b, n, k = columns - 1, 10, 580
    g = torch.Generator().manual_seed(0)
    x, w = randn(g, torch.bfloat16, b, k), randn(g, torch.bfloat16, n, k)
    keep = (torch.rand(n, k, generator=g) < 0.2).to(DEVICE)
    tile, parts, units = module._cut(n, k, b)
    assert (tile.columns, parts, units) == (columns, 2, 1)
    slots = Slots.from_dense(w, keep)
    assert len(slots.residual) > module.ENTRIES
    assert_close(slot_linear(slots, x, kernels="triton"), expected(x, w, keep, None))


def test_a_batch_beyond_the_largest_tile() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = randn(g, torch.float16, 130, 20), randn(g, torch.float16, 5, 20)
    keep = (torch.rand(5, 20, generator=g) < 0.5).to(DEVICE)
    y = slot_linear(Slots.from_dense(w, keep), x, kernels="triton")
    assert_close(y, expected(x, w, keep, None))


def test_parts_fill_a_device_and_cover_all_of_k() -> None:
    for n, k, b in itertools.product((1, 300, 4096, 8192, 50000), (1, 784, 8192, 65536), (1, 32, 129)):
        tile, parts, units_a_part = module._cut(n, k, b)
        units = -(-k // module.UNIT)
        assert (parts - 1) * units_a_part < units <= parts * units_a_part
        programs = parts * -(-n // module.ROWS) * -(-b // tile.columns)
        assert parts == 1 or programs <= module.PROGRAMS
    assert module._cut(8192, 8192, 32)[1] == 4


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kept", [0, 1])
def test_empty_and_full_masks(kept: int, kernels: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, bias = (randn(g, torch.float16, *s) for s in ((9, 21), (17, 21), (17,)))
    keep = torch.full((17, 21), bool(kept), device=DEVICE)
    slots = Slots.from_dense(torch.where(keep, w, NAN), keep)
    y = slot_linear(slots, x, bias, kernels=kernels)
    assert_close(y, expected(x, w, keep, bias))
    if not kept:
        assert not len(slots.residual)
        assert torch.equal(y, bias.expand_as(y))


def test_every_pair_of_places_decodes_alone() -> None:
    """A row for each choice of up to two of eight places, in each group of a thread's columns."""
    choices = [c for size in (0, 1, 2) for c in itertools.combinations(range(8), size)]
    groups = [[32 * u + 2 * q + c for c in (0, 1, 8, 9, 16, 17, 24, 25)] for u in (0, 1) for q in range(4)]
    w = torch.zeros(len(choices), 64, dtype=torch.float16, device=DEVICE)
    for row, choice in enumerate(choices):
        for number, group in enumerate(groups):
            for place in choice:
                w[row, group[place]] = 1 + 8 * number + place
    slots = Slots.from_dense(w)
    assert not len(slots.residual)
    identity = torch.eye(64, dtype=torch.float16, device=DEVICE)
    assert torch.equal(slot_linear(slots, identity, kernels="triton").t(), w)
    three = w[-1:].clone()
    three[0, groups[5][0]] = 1
    assert len(Slots.from_dense(three).residual) == module.PADDED
    assert torch.equal(slot_linear(Slots.from_dense(three), identity, kernels="triton").t(), three)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", ["features-major", "sliced"])
def test_strides_do_not_matter(layout: str, kernels: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, wide = (randn(g, torch.bfloat16, *s) for s in ((18, 70), (12, 70), (18, 143)))
    slots = Slots.from_dense(w, torch.rand(12, 70, generator=g).to(DEVICE) < 0.5)
    wide[:, 3::2] = x
    spread = x.t().contiguous().t() if layout == "features-major" else wide[:, 3::2]
    bias = randn(g, torch.bfloat16, 24)
    found = slot_linear(slots, spread, bias[::2], kernels=kernels)
    right = slot_linear(slots, x, bias[::2].contiguous(), kernels=kernels)
    if kernels == "triton":
        assert same_bits(found, right)
    assert_close(found, right.double())


shapes = st.tuples(st.integers(1, 140), st.integers(1, 140)) | st.sampled_from(
    [(2, 513), (1, 1100), (257, 3)]
)


@settings(max_examples=4 * CASES)
@given(shapes, st.sampled_from(list(RTOL)), st.floats(0, 1), st.integers(0, 10**6))
def test_any_mask_comes_back_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, density: float, seed: int
) -> None:
    n, k = shape
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (n, k), generator=g, dtype=torch.int16).to(DEVICE)
    w = bits.view(dtype)  # NaN, infinities, zeros of both signs and all the rest
    keep = (torch.rand(n, k, generator=g) < density).to(DEVICE)
    slots = Slots.from_dense(w, keep)
    assert torch.equal(slots.to_dense().view(torch.int16), torch.where(keep, bits, 0))
    blocks, chunks, units = -(-n // 128), -(-k // 64), -(-k // 512)
    entries = int(slots.starts[-1])
    assert len(slots.residual) == entries
    assert slots.bytes() == blocks * chunks * 5120 + 5 * entries + 4 * (blocks * units + 1)
    if entries:
        assert int(slots.columns.long().max()) < k
        assert int(slots.rows.max()) < 128


@settings(max_examples=CASES)
@given(
    st.tuples(st.integers(1, 34), st.integers(1, 34), st.integers(1, 130)),
    st.sampled_from(list(RTOL)),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_product(
    shape: tuple[int, int, int], dtype: torch.dtype, density: float, rows: bool, seed: int
) -> None:
    b, n, k = shape
    g = torch.Generator().manual_seed(seed)
    x, w, bias = (randn(g, dtype, *s) for s in ((b, k), (n, k), (n,)))
    keep = (torch.rand(n, k, generator=g) < density).to(DEVICE)
    slots = Slots.from_dense(torch.where(keep, w, NAN), keep)
    size = expected(x.abs(), w.abs(), keep, bias.abs())
    spread = x if rows else x.t().contiguous().t()
    assert_close(slot_linear(slots, spread, bias, kernels="triton"), expected(x, w, keep, bias), size)


def test_bytes_of_a_random_mask() -> None:
    """At 90 % sparsity slots and residual take about a third of dense; the residual is 5.4 % of the kept."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 1024, generator=g).bfloat16()
    for sparsity, most, left in ((0.8, 0.41, 0.17), (0.9, 0.335, 0.054), (0.95, 0.325, 0.015)):
        keep = torch.rand(1024, 1024, generator=g) >= sparsity
        slots = Slots.from_dense(w, keep)
        assert 0.3125 < slots.bytes() / (2 * w.numel()) < most
        assert int((slots.residual != 0).sum()) / int(keep.sum()) == pytest.approx(left, rel=0.15)


def test_without_a_mask_zeros_are_pruned() -> None:
    w = torch.tensor([[0.0, 1.0, NAN, -2.0, 0.0]], dtype=torch.bfloat16)
    slots = Slots.from_dense(w)
    assert same_bits(slots.to_dense(), w)


def test_what_is_not_finite_in_a_row_of_x_stays_in_its_row_of_y() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = randn(g, torch.float16, 5, 70), randn(g, torch.float16, 9, 70)
    x[3, 11] = NAN
    y = slot_linear(Slots.from_dense(w), x, relu=True, kernels="triton")
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4]].isfinite().all()


def test_gradients_are_refused() -> None:
    w = torch.ones(3, 9, dtype=torch.float16)
    x = torch.ones(2, 9, dtype=torch.float16, requires_grad=True)
    y = slot_linear(Slots.from_dense(w), x, kernels="reference")
    with pytest.raises(RuntimeError):
        y.sum().backward()


def test_what_does_not_fit_is_said() -> None:
    w, x, bias = (torch.ones(*s, dtype=torch.float16) for s in ((3, 9), (2, 9), (3,)))
    slots = Slots.from_dense(w)
    for bad, words in (
        (w.float(), r"bf16 or fp16.*got torch.float32\[3, 9\]"),
        (w[0], r"w\[N, K\]"),
        (w[:0], "not empty"),
        (w[:1].expand(1, 9).new_zeros(1, 65537), "K at most 65536"),
    ):
        with pytest.raises(ValueError, match=words):
            Slots.from_dense(bad)
    with pytest.raises(ValueError, match=r"expected a bool mask\[3, 9\]"):
        Slots.from_dense(w, torch.ones(3, 9))
    for args, words in (
        ((x[0],), r"expected x\[B, 9\]"),
        ((x[:0],), "not empty"),
        ((x[:, :8],), r"expected x\[B, 9\].*got x torch.float16\[2, 8\]"),
        ((x, bias[:2]), r"and bias\[3\]"),
        ((x.bfloat16(),), "of one dtype"),
        ((x, bias.float()), "of one dtype"),
        ((x.to("meta"),), "on one device"),
        ((x, bias, False, "cuda"), 'got "cuda"'),
    ):
        with pytest.raises(ValueError, match=words):
            slot_linear(slots, *args)


def test_floor() -> None:
    slots = Slots.from_dense(torch.ones(3, 9, dtype=torch.float16))
    found = floor(slots, 4)
    assert found == {"bytes": slots.bytes() + 2 * (4 * 12 + 3), "flops": 2 * 4 * 3 * 9}


OPCHECK = """
import torch
from torch import library
from sparselth.kernels.slot_linear import Slots, _operator, slot_linear

torch.manual_seed(0)
slots = Slots.from_dense(torch.randn(7, 12).half())
x, bias = torch.randn(5, 12).half(), torch.randn(7).half()
library.opcheck(_operator, (*slots.tensors(), 7, 12, x, bias, True, "auto"))
library.opcheck(_operator, (*slots.tensors(), 7, 12, x.t().contiguous().t(), None, False, "auto"))
compiled = torch.compile(lambda x: slot_linear(slots, x, bias), fullgraph=True, backend="eager")
assert torch.equal(compiled(x), slot_linear(slots, x, bias))
try:
    slot_linear(slots, x, kernels="triton")
except ValueError as e:
    assert "TRITON_INTERPRET=1" in str(e)
else:
    raise AssertionError("Triton on a CPU without the interpreter")
"""


def test_opcheck(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)
