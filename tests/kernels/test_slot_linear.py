"""Any mask comes back bit for bit; the product is the formula, whatever pruned weights and memory hold."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import DEVICE, DTYPES, NAN, compare, layed, must_repeat, pick, poisoned, same_bits, surrounded
from sparselth.kernels import slot_linear as module
from sparselth.kernels.slot_linear import Slots, floor, slot_linear

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
PARTS = "bf16", "fp16"
KERNELS = "triton", "reference"
EIGHT = [0, 1, 8, 9, 16, 17, 24, 25]  # columns of a thread's eight
LAYOUTS = ("contiguous", "transposed", "sliced", "off the grid")
Shape = tuple[int, int, int]  # B, N, K
TINY: list[Shape] = [(1, 1, 1), (17, 130, 70), (3, 7, 600), (33, 20, 47), (17, 20, 70), (3, 130, 580)]
DEVICE_SHAPES: list[Shape] = [
    *[(b, 300, 784) for b in (1, 15, 16, 31, 32, 33, 64, 100, 128, 129, 300)],
    *[(32, 128, 64), (32, 1000, 65536), (16, 4000, 40), (64, 257, 513)],
    *[(16, 4096, 4096), (32, 8192, 8192), (128, 4096, 11008)],
]


class Problem(NamedTuple):
    x: Tensor
    w: Tensor  # NaN where pruned
    keep: Tensor
    bias: Tensor


def problem(part: str, shape: Shape, density: float, seed: int = 0) -> Problem:
    """With an empty and a full row, where there are so many."""
    b, n, k = shape
    g = torch.Generator(DEVICE).manual_seed(seed)
    keep = torch.rand(n, k, generator=g, device=DEVICE) < density
    if n > 2 and 0 < density < 1:
        keep[0], keep[-1] = False, True
    x, w, bias = (torch.randn(s, generator=g, device=DEVICE).to(DTYPES[part]) for s in ((b, k), (n, k), (n,)))
    return Problem(x, w.masked_fill_(~keep, NAN), keep, bias)


def formula(p: Problem, dtype: torch.dtype, relu: bool = False) -> dict[str, Tensor]:
    y = F.linear(p.x.to(dtype), torch.where(p.keep, p.w, 0).to(dtype), p.bias.to(dtype))
    return {"y": y.relu() if relu else y}


def guarded(slots: Slots) -> Slots:
    """The same with NaN, and indices that lead nowhere, around its arrays."""

    def around(t: Tensor) -> Tensor:
        if t.dtype.is_floating_point or t.dtype == torch.uint8:
            return surrounded(t)
        bits = t.view(torch.int16 if t.itemsize == 2 else torch.int32)
        wide = bits.new_full((bits.numel() + 512,), 0x5555)
        wide[256:-256] = bits.flatten()
        return wide[256:-256].view(t.dtype).view(t.shape)

    return Slots(slots.shape, *map(around, slots.tensors()))


def check(part: str, shape: Shape, density: float = 0.2, layout: str = "contiguous", seed: int = 0) -> None:
    """y against float64, twice; NaN in pruned weights, around all operands and in all that is allocated."""
    p = problem(part, shape, density, seed)
    slots = Slots.from_dense(p.w, p.keep)
    assert same_bits(slots.to_dense(), torch.where(p.keep, p.w, 0))
    relu = seed % 2 == 1
    absolute = formula(Problem(p.x.abs(), p.w.abs(), p.keep, p.bias.abs()), torch.double)
    right, torchs = formula(p, torch.double, relu), formula(p, DTYPES[part], relu)
    spread = layed(p.x, layout)

    def ours(slots: Slots, x: Tensor) -> dict[str, Tensor]:
        return {"y": slot_linear(slots, x, p.bias, relu, kernels="triton")}

    with poisoned():
        found = ours(guarded(slots), spread)
        compare(found, right, torchs, part, {"y": shape[2]}, absolute)
        must_repeat(ours(guarded(slots), spread), found)
    if layout != "contiguous":
        must_repeat(ours(slots, p.x), found, "another layout")


def said(shape: Shape) -> str:
    return "B{} N{} K{}".format(*shape)


# The kernel


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", pick(TINY, TINY + DEVICE_SHAPES), ids=said)
def test_product_is_the_formula(shape: Shape, part: str) -> None:
    check(part, shape, 0.3 if shape[2] < 700 else 0.2)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("batch", pick((18,), (18, 40, 64, 128)))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout: str, batch: int, part: str) -> None:
    check(part, (batch, 12, 70), layout=layout)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_densities(density: float, part: str) -> None:
    check(part, pick((9, 17, 60), (40, 300, 1000)), density)


MOST = pick((34, 40, 130), (300, 600, 3000))


@settings(max_examples=pick(CASES, 120))
@given(
    st.tuples(*(st.integers(1, most) for most in MOST)),
    st.sampled_from(PARTS),
    st.floats(0, 1).map(lambda share: share**2),
    st.sampled_from(LAYOUTS),
    st.integers(0, 10**6),
)
def test_any_product(shape: Shape, part: str, density: float, layout: str, seed: int) -> None:
    check(part, shape, density, layout, seed)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", TINY[:4], ids=said)
def test_torch_computes_the_same(shape: Shape, part: str) -> None:
    p = problem(part, shape, 0.3)
    for bias, relu in ((p.bias, True), (None, False)):
        beside = p._replace(bias=torch.zeros_like(p.bias) if bias is None else bias)
        found = {"y": slot_linear(Slots.from_dense(p.w, p.keep), p.x, bias, relu, "reference")}
        right, torchs = formula(beside, torch.double, relu), formula(beside, DTYPES[part], relu)
        compare(found, right, torchs, part, {"y": shape[2]})


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "features-major"])
@pytest.mark.parametrize("columns", [tile.columns for tile in module.TILES])
def test_every_tile(columns: int, rows: bool) -> None:
    """Two parts, the first with several rounds of the residual."""
    shape = columns - 1, 20, 580
    tile, parts, units = module._cut(*shape[1:], shape[0])
    assert (tile.columns, parts, units) == (columns, 2, 1)
    p = problem("bf16", shape, 0.3)
    lengths = Slots.from_dense(p.w, p.keep).starts.diff()
    assert int(lengths.max()) > 3 * tile.entries
    check("bf16", shape, 0.3, "contiguous" if rows else "transposed")


def test_a_batch_beyond_the_largest_tile() -> None:
    check("fp16", (130, 5, 20), 0.5)


def test_parts_fill_a_device_and_cover_all_of_k() -> None:
    for n, k, b in itertools.product((1, 300, 4096, 8192, 50000), (1, 784, 8192, 65536), (1, 32, 129)):
        tile, parts, units_a_part = module._cut(n, k, b)
        units = -(-k // module.UNIT)
        assert (parts - 1) * units_a_part < units <= parts * units_a_part
        programs = parts * -(-n // module.ROWS) * -(-b // tile.columns)
        assert parts == 1 or programs <= module.PROGRAMS
    assert module._cut(8192, 8192, 32)[1] == 4


@pytest.mark.parametrize(
    ("b", "n", "k"), [(65_536, 40, 70), (2**24, 8, 8), (3, 2**24, 8), (129, 300, 65_536)]
)
def test_no_grid_is_beyond_a_devices_limits(b: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_slot_kernel", "_finish_kernel"):
        monkeypatch.setattr(module, name, Recorder())
    blocks, chunks = -(-n // module.ROWS), -(-k // module.COLUMNS)
    half = torch.empty(1, dtype=torch.float16, device="meta")
    values, places = (
        half.new_empty(blocks, chunks, 256, 8),
        half.new_empty(blocks, chunks, 256, dtype=torch.int32),
    )
    slots = Slots((n, k), values, places, half, half, half, half)
    module.launch(slots, half.new_empty(b, k), None, False)
    assert len(grids) == 2
    for grid in grids:
        assert grid[0] < 2**31
        assert all(axis <= 65_535 for axis in grid[1:]), grid


@pytest.mark.parametrize("kernels", KERNELS)
def test_without_weights_y_is_the_bias(kernels: str) -> None:
    p = problem("fp16", (9, 17, 21), 0.0)
    slots = Slots.from_dense(p.w, p.keep)
    assert not len(slots.residual)
    with poisoned():
        y = slot_linear(slots, p.x, p.bias, kernels=kernels)
    assert torch.equal(y, p.bias.expand_as(y))


def test_every_choice_of_places_decodes_alone() -> None:
    """A product with the identity is the weights: each choice of up to three of an eight's places, in either
    eight and beside each number of weights in the other, in each of a chunk's groups of 16."""
    picked = [c for size in range(5) for c in itertools.combinations(range(8), size)]
    beside = [(), (3,), (1, 6), (0, 5, 7), (1, 2, 3, 6)]
    choices = [(*pair, u) for pair in itertools.product(picked, beside) for u in (0, 1)]
    w = torch.zeros(len(choices), 64, dtype=torch.float16)
    for row, (mine, others, u) in enumerate(choices):
        for q in range(4):
            for half, places in ((u, mine), (1 - u, others)):
                for place in places:
                    w[row, 32 * half + 2 * q + EIGHT[place]] = 1 + (16 * q + 8 * half + place + row) % 200
    w = w.to(DEVICE)
    slots, identity = Slots.from_dense(w), torch.eye(64, dtype=torch.float16, device=DEVICE)
    assert torch.equal(slot_linear(slots, identity, kernels="triton").t(), w)
    flipped = w.flip(0)  # the rows of the residual, too
    assert torch.equal(slot_linear(Slots.from_dense(flipped), identity, kernels="triton").t(), flipped)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (0, 0, 0),
        (3, 1, 0),
        (1, 3, 0),
        (2, 2, 0),
        (3, 0, 0),
        (4, 0, 1),
        (0, 4, 1),
        (3, 2, 1),
        (2, 3, 1),
        (8, 8, 12),
    ],
)
def test_16_weights_share_four_slots(first: int, second: int, left: int) -> None:
    w = torch.zeros(1, 64, dtype=torch.float16)
    w[0, EIGHT[:first]] = 1.0
    w[0, [32 + c for c in EIGHT[:second]]] = 2.0
    slots = Slots.from_dense(w.to(DEVICE))
    assert int((slots.residual != 0).sum()) == left
    assert int((slots.values != 0).sum()) == first + second - left
    assert torch.equal(slots.to_dense().cpu(), w)


@pytest.mark.parametrize("kernels", KERNELS)
def test_strides_of_the_bias_do_not_matter(kernels: str) -> None:
    p = problem("bf16", (18, 12, 70), 0.5)
    slots, wide = Slots.from_dense(p.w, p.keep), torch.full((24,), NAN, dtype=torch.bfloat16, device=DEVICE)
    wide[::2] = p.bias
    found = slot_linear(slots, p.x, wide[::2], kernels=kernels)
    assert same_bits(found, slot_linear(slots, p.x, p.bias, kernels=kernels))


# The format


shapes = st.tuples(st.integers(1, 140), st.integers(1, 140)) | st.sampled_from(
    [(2, 513), (1, 1100), (257, 3)]
)


@settings(max_examples=4 * CASES)
@given(shapes, st.sampled_from(PARTS), st.floats(0, 1), st.integers(0, 10**6))
def test_any_mask_comes_back_bit_for_bit(
    shape: tuple[int, int], part: str, density: float, seed: int
) -> None:
    (n, k), dtype = shape, DTYPES[part]
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


def test_bytes_of_a_random_mask() -> None:
    """At 90 % sparsity slots and residual are less than a third of dense, the residual 1.6 % of the kept."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 1024, generator=g).bfloat16()
    for sparsity, most, left in ((0.8, 0.38, 0.1055), (0.9, 0.325, 0.01575), (0.95, 0.32, 0.0018)):
        keep = torch.rand(1024, 1024, generator=g) >= sparsity
        slots = Slots.from_dense(w, keep)
        assert 0.3125 < slots.bytes() / (2 * w.numel()) < most
        assert int((slots.residual != 0).sum()) / int(keep.sum()) == pytest.approx(left, rel=0.15)


def test_without_a_mask_zeros_are_pruned() -> None:
    w = torch.tensor([[0.0, 1.0, NAN, -2.0, 0.0]], dtype=torch.bfloat16)
    slots = Slots.from_dense(w)
    assert same_bits(slots.to_dense(), w)


def test_what_is_not_finite_in_a_row_of_x_stays_in_its_row_of_y() -> None:
    p = problem("fp16", (5, 9, 70), 1.0)
    p.x[3, 11] = NAN
    y = slot_linear(Slots.from_dense(p.w), p.x, relu=True, kernels="triton")
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
        ((x, bias, False, "cuda"), "kernels='cuda'"),
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


@pytest.mark.host
def test_opcheck(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)
