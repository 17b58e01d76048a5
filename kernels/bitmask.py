r"""Masks as bits: pack, unpack, count, compare.

    bits[..., i] = sum_j (mask[..., 8 i + j] != 0) << j        j = 0 to 7; bits behind K are 0
    count(bits) = number of ones,  hamming(a, b) = count(a ^ b)

| name | shape             | dtype          |        Floor, s = itemsize, P = weights:
| mask | [..., K]          | any; 0 = gone  |          pack    P s + P / 8 bytes
| bits | [..., ceil(K / 8)]| uint8          |          unpack  P / 8 + P bytes (bool)
|                                                     count   P / 8 bytes, hamming P / 4

And, or and xor of two masks are torch's own `a & b`, `a | b`, `a ^ b`, which leave the bits behind K at 0
(`~a` does not). The layout is that of `sparselth.masks`, which packs numpy arrays for files.

2.7e8 weights, expected at 0.9 of a copy (H200 | H100, 4.3 | 3.0 TB/s), one launch each, count a zeroing more:
             bytes    instructions   registers  bytes in flight a SM    time
    pack     302 MB   5.9 a weight      30      16 programs of 8 KB     78 | 112 us (of a bool mask)
    unpack   302 MB   4.9 a weight      30      16 programs of 1 KB     78 | 112 us
    count     34 MB   8.5 a word        54       9 programs of 16 KB     9 |  13 us, and 4 us of launches
No goal hangs on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselth.kernels._choose import use_triton
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._triton import tl, triton

BLOCK = 1024  # bytes of bits a program packs or unpacks
COUNT_BLOCK = 4096  # elements a program counts
PROGRAMS = 2**31 - 1  # the first axis of a CUDA grid; the others end at 65,535
MAGIC = 0x0102040810204080  # times eight bytes of 0 or 1: their bits, packed, in the highest byte


def is_ragged(k: int) -> bool:
    """Whether rows of k bits end within a byte."""
    if k % 8 and k > 2**30:  # places counts them in 32 bits
        raise ValueError(f"expected rows of 8 x weights, or of at most 2**30, got {k}")
    return k % 8 != 0


def reference_pack(mask: Tensor) -> Tensor:
    width = -(-mask.shape[-1] // 8)
    kept = mask.bool().contiguous()
    if mask.shape[-1] % 8 or kept.storage_offset() % 8:
        kept = mask.new_zeros((*mask.shape[:-1], 8 * width), dtype=torch.bool)
        kept[..., : mask.shape[-1]] = mask
    eights = kept.view(-1).view(torch.int64) * MAGIC
    return eights.view(torch.uint8)[7::8].clone().view(*mask.shape[:-1], width)


def reference_unpack(bits: Tensor, k: int) -> Tensor:
    places = torch.arange(8, device=bits.device)
    table = (torch.arange(256, device=bits.device)[:, None] >> places & 1).bool().view(torch.int64)
    eights = table[:, 0].index_select(0, bits.flatten().int())
    return eights.view(torch.bool).view(*bits.shape[:-1], 8 * bits.shape[-1])[..., :k].contiguous()


def reference_count(bits: Tensor, other: Tensor | None, rows: bool) -> Tensor:
    x = bits if other is None else bits ^ other
    x = x - (x >> 1 & 0x55)
    x = (x & 0x33) + (x >> 2 & 0x33)
    x = x + (x >> 4) & 0x0F
    return x.sum(-1) if rows else x.sum()


@triton.jit
def popcount(x):
    """Ones of every uint32, without libdevice, which the interpreter lacks."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def places(start, n_bytes, K, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """Where the weights of bytes `start` to `start + BLOCK` lie, and which of them exist: [8 * BLOCK]."""
    local = tl.arange(0, 8 * BLOCK)
    # 8 * n_bytes may not fit 32 bits, what is left of a block does: half the comparisons
    inside = local < tl.minimum(8 * (n_bytes - start), 8 * BLOCK).to(tl.int32)
    if RAGGED:
        row_bits = (K + 7) // 8 * 8
        row = 8 * start // row_bits
        column = local + (8 * start - row * row_bits).to(tl.int32)
        down = column // row_bits  # rows further down; a division in 64 bits takes far more registers
        column -= down * row_bits
        return 8 * start - row * (row_bits - K) + (local - down * (row_bits - K)), inside & (column < K)
    return 8 * start + local, inside


@triton.jit
def _pack_kernel(mask_ptr, bits_ptr, n_bytes, K, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs_mask, inside = places(start, n_bytes, K, BLOCK, RAGGED)
    value = tl.load(mask_ptr + offs_mask, mask=inside, other=0)
    if value.dtype == tl.bfloat16:  # the interpreter compares its bit patterns, and -0.0 has one
        value = value.to(tl.float32)
    eights = tl.reshape((value != 0).to(tl.int32), (BLOCK, 8))
    byte = tl.sum(eights << tl.arange(0, 8)[None, :], axis=1)
    offs = start + tl.arange(0, BLOCK)
    tl.store(bits_ptr + offs, byte.to(tl.uint8), mask=offs < n_bytes)


@triton.jit
def _unpack_kernel(bits_ptr, mask_ptr, n_bytes, K, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    byte = tl.load(bits_ptr + offs, mask=offs < n_bytes, other=0)
    eights = (byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    offs_mask, inside = places(start, n_bytes, K, BLOCK, RAGGED)
    tl.store(mask_ptr + offs_mask, tl.reshape(eights.to(tl.uint8), (8 * BLOCK,)), mask=inside)


@triton.jit
def _count_kernel(a_ptr, b_ptr, out_ptr, W, chunks, BLOCK: tl.constexpr, XOR: tl.constexpr):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    offs = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(a_ptr + row * W + offs, mask=offs < W, other=0)
    if XOR:
        x = x ^ tl.load(b_ptr + row * W + offs, mask=offs < W, other=0)
    ones = tl.sum(popcount(x.to(tl.uint32)).to(tl.int32))
    tl.atomic_add(out_ptr + row, ones.to(tl.int64), sem="relaxed")


def launch_pack(mask: Tensor, *, kernels: str = "auto") -> Tensor:
    """Mask [..., K] to bits [..., ceil(K / 8)]."""
    if mask.ndim == 0:
        raise ValueError("expected a mask [..., K], got a scalar")
    if not use_triton(kernels, mask):
        return reference_pack(mask)
    k = mask.shape[-1]
    bits = torch.empty(*mask.shape[:-1], -(-k // 8), dtype=torch.uint8, device=mask.device)
    if bits.numel():
        mask = mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        tile = _tile(k)
        with torch.cuda.device_of(mask):
            _pack_kernel[(triton.cdiv(bits.numel(), tile["BLOCK"]),)](mask, bits, bits.numel(), k, **tile)
    return bits


def _tile(k: int) -> dict[str, int]:
    ragged = is_ragged(k)  # which takes registers: a full block would spill
    return {"BLOCK": BLOCK // 4 if ragged else BLOCK, "RAGGED": ragged, "num_warps": 4}


def launch_unpack(bits: Tensor, k: int, *, kernels: str = "auto") -> Tensor:
    """Bits [..., ceil(k / 8)] to a bool mask [..., k]."""
    _check_bits(bits)
    if bits.shape[-1] != -(-k // 8):
        raise ValueError(f"expected {-(-k // 8)} bytes a row for {k} weights, got {bits.shape[-1]}")
    if not use_triton(kernels, bits):
        return reference_unpack(bits, k)
    mask = torch.empty(*bits.shape[:-1], k, dtype=torch.bool, device=bits.device)
    if mask.numel():
        bits = bits.contiguous()
        tile, values = _tile(k), mask.view(torch.uint8)
        with torch.cuda.device_of(bits):
            _unpack_kernel[(triton.cdiv(bits.numel(), tile["BLOCK"]),)](bits, values, bits.numel(), k, **tile)
    return mask


def launch_count(bits: Tensor, other: Tensor | None, rows: bool, *, kernels: str = "auto") -> Tensor:
    """Ones of `bits`, or of `bits ^ other`: int64, of every row of bytes or of the whole tensor."""
    _check_bits(bits)
    if other is not None:
        _check_bits(other)
        if other.shape != bits.shape or other.device != bits.device:
            raise ValueError(
                f"expected two masks alike, got {tuple(bits.shape)} on {bits.device} "
                f"and {tuple(other.shape)} on {other.device}"
            )
    if not use_triton(kernels, bits):
        return reference_count(bits, other, rows)
    shape = bits.shape[:-1] if rows else bits.shape[:0]
    out = torch.zeros(shape, dtype=torch.int64, device=bits.device)
    if bits.numel():
        a, b = (_words(x, rows) for x in (bits, bits if other is None else other))
        if a.dtype != b.dtype:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        width = a.shape[-1]
        chunks = triton.cdiv(width, COUNT_BLOCK)
        at_once = max(PROGRAMS // chunks, 1)  # rows: one grid holds all but the most absurd masks
        parts = (x.view(-1, width).split(at_once) for x in (a, b))
        with torch.cuda.device_of(bits):
            for p, q, ones in zip(*parts, out.view(-1).split(at_once), strict=True):
                _count_kernel[(len(p) * chunks,)](
                    p, q, ones, width, chunks, BLOCK=COUNT_BLOCK, XOR=other is not None, num_warps=4
                )
    return out


def _words(bits: Tensor, rows: bool) -> Tensor:
    """Four bytes at a time where rows and address allow it."""
    bits = bits.contiguous() if rows else bits.contiguous().flatten()
    fit = bits.shape[-1] % 4 == 0 and bits.storage_offset() % 4 == 0
    return bits.view(torch.int32) if fit else bits


def _check_bits(bits: Tensor) -> None:
    if bits.ndim == 0 or bits.dtype != torch.uint8:
        raise ValueError(f"expected packed bits, uint8 [..., bytes], got {bits.dtype} {tuple(bits.shape)}")


@operator("pack")
def pack(mask: Tensor) -> Tensor:
    """Mask [..., K], whatever is not 0 is kept, to uint8 bits [..., ceil(K / 8)]."""
    return launch_pack(mask)


@fake(pack)
def _(mask: Tensor) -> Tensor:
    return mask.new_empty((*mask.shape[:-1], -(-mask.shape[-1] // 8)), dtype=torch.uint8)


@operator("unpack")
def unpack(bits: Tensor, k: int) -> Tensor:
    """Bits [..., ceil(k / 8)] to a bool mask [..., k]."""
    return launch_unpack(bits, k)


@fake(unpack)
def _(bits: Tensor, k: int) -> Tensor:
    return bits.new_empty((*bits.shape[:-1], k), dtype=torch.bool)


@operator("count")
def count(bits: Tensor, rows: bool = False) -> Tensor:
    """Ones, int64: of the whole tensor (0-dim), or of every row [...]."""
    return launch_count(bits, None, rows)


@fake(count)
def _(bits: Tensor, rows: bool = False) -> Tensor:
    return bits.new_empty(bits.shape[:-1] if rows else (), dtype=torch.int64)


@operator("hamming")
def hamming(a: Tensor, b: Tensor, rows: bool = False) -> Tensor:
    """Places where two masks differ, int64: of the whole tensor (0-dim), or of every row [...]."""
    return launch_count(a, b, rows)


@fake(hamming)
def _(a: Tensor, b: Tensor, rows: bool = False) -> Tensor:
    return a.new_empty(a.shape[:-1] if rows else (), dtype=torch.int64)


def floor(op: str, weights: int, itemsize: int = 1) -> dict[str, int]:
    """Least traffic of "pack" (of elements of `itemsize` bytes), "unpack", "count" or "hamming"."""
    bits = -(-weights // 8)
    moved = {"pack": weights * itemsize + bits, "unpack": bits + weights, "count": bits, "hamming": 2 * bits}
    return {"bytes": moved[op], "flops": 0}
