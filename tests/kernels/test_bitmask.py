"""Bits against numpy's packbits, on both paths; what lies behind K; the ops under torch's own checks."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import DEVICE, NAN, pick, poisoned, surrounded
from sparselth import masks
from sparselth.kernels import bitmask
from sparselth.kernels._triton import tl, triton

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
SHAPES = [(1,), (8,), (7, 13), (2, 3, 25), (3, 5, 16), (1, 1), (131, 2), (0, 9), (3, 0)]
SHAPES += pick([], [(7,), (3, 5, 10), (2, 300, 784), (1, 13), (65, 1), (4, 1000, 33)])
DTYPES = [torch.bool, torch.uint8, torch.float32, torch.float16, torch.bfloat16]
KERNELS = ["reference", "triton"]


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several to a tensor; a device takes those that ship."""
    monkeypatch.setattr(bitmask, "BLOCK", pick(16, bitmask.BLOCK))
    monkeypatch.setattr(bitmask, "COUNT_BLOCK", pick(32, bitmask.COUNT_BLOCK))


def random_mask(shape: tuple[int, ...], keep: float, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep).to(DEVICE)


def packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(masks.pack(mask.cpu().numpy())).to(DEVICE)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_is_that_of_the_files(shape: tuple[int, ...], keep: float, kernels: str) -> None:
    mask = random_mask(shape, keep)
    bits = bitmask.launch_pack(mask, kernels=kernels)
    assert bits.dtype == torch.uint8
    assert torch.equal(bits, packed(mask))
    again = bitmask.launch_unpack(bits, shape[-1], kernels=kernels).view(torch.uint8)
    assert torch.equal(again, mask.view(torch.uint8))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64]
)
def test_whatever_is_not_zero_is_kept(dtype: torch.dtype, kernels: str) -> None:
    mask = random_mask((5, 27), 0.5)
    values = torch.where(mask, 0.25 if dtype.is_floating_point else 3, 0).to(dtype)
    values[0, :2] = 0  # and -0.0
    values[0, 1].neg_()
    mask[0, :2] = False
    if dtype.is_floating_point:
        values[1, 0], mask[1, 0] = float("nan"), True
    assert torch.equal(bitmask.launch_pack(values, kernels=kernels), packed(mask))


@settings(max_examples=CASES)
@given(
    shape=st.lists(st.integers(1, pick(12, 90)), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    keep=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_guarded(shape: list[int], dtype: torch.dtype, keep: float, seed: int) -> None:
    """With NaN, or ones, around what is read and in what is to be written, and nothing written beside it."""
    (kept, other), k = (random_mask(tuple(shape), keep, seed + i) for i in range(2)), shape[-1]
    values = torch.where(kept, 1, 0).to(dtype)
    if dtype.is_floating_point:
        values = torch.where(kept, torch.where(other, NAN, -0.5), -0.0).to(dtype)
    right, others = packed(kept), packed(other)
    around = surrounded(values.view(torch.uint8) if dtype == torch.bool else values).view(dtype)
    with poisoned():
        assert torch.equal(bitmask.launch_pack(around, kernels="triton"), right)
        assert torch.equal(bitmask.launch_unpack(surrounded(right), k, kernels="triton"), kept)
        for b, truth in ((None, kept), (surrounded(others), kept ^ other)):
            for rows in (False, True):
                found = bitmask.launch_count(surrounded(right), b, rows, kernels="triton")
                assert torch.equal(found, truth.sum(-1) if rows else truth.sum())


@pytest.mark.parametrize("kernels", KERNELS)
def test_strided_masks_and_bits(kernels: str) -> None:
    mask = random_mask((24, 10), 0.4)
    assert torch.equal(bitmask.launch_pack(mask.T, kernels=kernels), packed(mask.T))
    assert torch.equal(bitmask.launch_pack(mask[::2, 1:], kernels=kernels), packed(mask[::2, 1:]))
    flat = mask.flatten()[3:227]  # contiguous, but off the 8-byte grid
    for shape in ((14, 16), (16, 14), (224, 1), (1, 224)):
        assert torch.equal(bitmask.launch_pack(flat.view(shape), kernels=kernels), packed(flat.view(shape)))
    bits = packed(mask.T)[:, 1:]  # rows that start at odd addresses
    assert torch.equal(bitmask.launch_unpack(bits, 13, kernels=kernels), mask.T[:, 8:21])
    for rows in (False, True):
        found = bitmask.launch_count(bits, bits.flip(0), rows, kernels=kernels)
        differ = mask.T[:, 8:] ^ mask.T[:, 8:].flip(0)
        assert torch.equal(found, differ.sum(-1) if rows else differ.sum())


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=CASES)
@given(st.lists(st.integers(1, 4), max_size=2), st.integers(1, 300), st.floats(0, 1), st.integers(0, 2**20))
def test_counts(kernels: str, lead: list[int], k: int, keep: float, seed: int) -> None:
    a, b = (random_mask((*lead, k), keep, seed + i) for i in range(2))
    p, q = packed(a), packed(b)
    for rows in (False, True):
        for other, ones in ((None, a), (q, a ^ b)):
            found = bitmask.launch_count(p, other, rows, kernels=kernels)
            assert found.dtype == torch.int64
            assert torch.equal(found, ones.sum(-1) if rows else ones.sum())


class Counted:
    """Stands for a kernel: notes the grids that its launcher asks for."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("shape", "rows", "programs"),
    [
        ((268_570_626,), False, 65_570),  # 65,537 x 4,098 bytes, no multiple of 4: bytes, not words
        ((2**34,), False, 2**20),
        ((70_000, 3), True, 70_000),
        ((3, 65_536 * 4096 * 4), True, 3 * 65_536),
        ((2**31 + 5, 1), True, 2**31 + 5),
    ],
    ids=str,
)
def test_grids_of_any_mask_are_a_devices(
    shape: tuple[int, ...], rows: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA grid has at most 2**31 - 1 programs along x and 65,535 along y and z. Nothing is allocated."""
    monkeypatch.undo()
    counted = Counted()
    monkeypatch.setattr(bitmask, "_count_kernel", counted)
    monkeypatch.setattr(bitmask, "use_triton", lambda kernels, t: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    bits = torch.empty(shape, dtype=torch.uint8, device="meta")
    bitmask.launch_count(bits, None, rows, kernels="triton")
    for x, *others in counted.grids:
        assert 1 <= x < 2**31
        assert all(1 <= n <= 65_535 for n in others)
    assert sum(math.prod(grid) for grid in counted.grids) == programs


def test_rows_beyond_one_grid_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask, "PROGRAMS", 7)
    for shape in ((40, 8 * 4 * bitmask.COUNT_BLOCK * 3), (40, 9), (1, 8 * 4 * bitmask.COUNT_BLOCK * 9)):
        a, b = random_mask(shape, 0.5), random_mask(shape, 0.5, 1)
        found = bitmask.launch_count(packed(a), packed(b), True, kernels="triton")
        assert torch.equal(found, (a ^ b).sum(-1))


@triton.jit
def _probe(offs_ptr, inside_ptr, blocks, n_bytes, K, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    offs, inside = bitmask.places(blocks.to(tl.int64) * BLOCK, n_bytes, K, BLOCK, RAGGED)
    tl.store(offs_ptr + tl.arange(0, 8 * BLOCK), offs)
    tl.store(inside_ptr + tl.arange(0, 8 * BLOCK), inside.to(tl.uint8))


@pytest.mark.parametrize(("k", "ragged"), [(64, False), (61, True)])
def test_places_behind_two_to_the_31(k: int, ragged: bool) -> None:
    """The last of 2**32 bits: no tensor so large, but its place."""
    blocks, block = 2**24 - 1, 32
    n_bytes = (blocks + 1) * block - 8  # the last row is not there
    offs = torch.zeros(8 * block, dtype=torch.int64, device=DEVICE)
    inside = torch.zeros(8 * block, dtype=torch.uint8, device=DEVICE)
    _probe[(1,)](offs, inside, blocks, n_bytes, k, BLOCK=block, RAGGED=ragged)
    bit = 8 * block * blocks + torch.arange(8 * block)
    assert torch.equal(offs.cpu(), bit // 64 * k + bit % 64)
    assert torch.equal(inside.cpu().bool(), (bit < 8 * n_bytes) & (bit % 64 < k))


@pytest.mark.parametrize("rows", [False, True])
def test_all_of_256_bytes(rows: bool) -> None:
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(16, 16)
    ones = torch.from_numpy(np.array([bin(i).count("1") for i in range(256)])).view(16, 16).to(DEVICE)
    for kernels in KERNELS:
        found = bitmask.launch_count(bits, None, rows, kernels=kernels)
        assert torch.equal(found, ones.sum(1) if rows else ones.sum())


def test_and_or_xor_leave_the_bits_behind_k_at_zero() -> None:
    a, b = random_mask((3, 13), 0.5), random_mask((3, 13), 0.5, 1)
    p, q = bitmask.pack(a), bitmask.pack(b)
    for bits, mask in ((p & q, a & b), (p | q, a | b), (p ^ q, a ^ b)):
        assert torch.equal(bits, packed(mask))
        assert torch.equal(bitmask.unpack(bits, 13), mask)
    assert int(bitmask.hamming(p, q)) == int((a ^ b).sum())
    assert bitmask.count(p, rows=True).tolist() == a.sum(1).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bitmask.launch_pack(torch.tensor(True)), "scalar"),
        (lambda: bitmask.launch_pack(torch.ones(8), kernels="fast"), "kernels='fast'"),
        (lambda: bitmask.is_ragged(2**31 - 1), "at most 2\\*\\*30, got 2147483647"),
        (lambda: bitmask.launch_unpack(torch.zeros(2, 2, dtype=torch.uint8), 17), "expected 3 bytes"),
        (lambda: bitmask.launch_count(torch.zeros(2), None, False), "float32"),
        (
            lambda: bitmask.launch_count(
                torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), False
            ),
            r"\(2,\).*\(3,\)",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_floor() -> None:
    assert bitmask.floor("pack", 800, 4) == {"bytes": 3300, "flops": 0}
    assert bitmask.floor("count", 801)["bytes"] == 101


OPCHECK = """
import torch
from torch import library
from sparselth.kernels import bitmask
mask = torch.rand(3, 5, 13) < 0.5
bits = bitmask.pack(mask)
for op, args in (
    (bitmask.pack, (mask,)), (bitmask.unpack, (bits, 13)), (bitmask.count, (bits,)),
    (bitmask.count, (bits, True)), (bitmask.hamming, (bits, bits.flip(0), True)),
):
    library.opcheck(op, args)
try:
    bitmask.launch_pack(mask, kernels="triton")
except ValueError as error:
    assert "TRITON_INTERPRET=1" in str(error)
else:
    raise AssertionError
"""


def test_ops_pass_torchs_checks(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)
