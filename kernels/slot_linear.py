r"""Inference with an unstructured sparse W [N, K] on tensor cores, for batches of 16 to 128:

    Y = act(X W^T + b)

| name     | shape                    | dtype                        Floor:
| x        | [B, K]                   | bf16, fp16; any strides      bytes = `Slots.bytes()` + 2 (BK + BN + N)
| y        | [B, N]                   | as x                         FLOPs = 2 B N K: zeros are multiplied
| bias     | [N]                      | as x, or None
| values   | [blocks, chunks, 256, 8] | as x     \  `Slots`: a tile is 128 rows x 64 columns of W,
| places   | [blocks, chunks, 256]    | int32    |  0.625 bytes a weight, kept or not,
| residual | [entries]                | as x     |  and 5 bytes for each that found no slot:
| rows     | [entries]                | uint8    |  row of its block,
| columns  | [entries]                | uint16   |  column of W,
| starts   | [blocks * units + 1]     | int32    /  by blocks, then by units of 512 columns, then by columns

Slots: 16 weights of a row share four, and have a bit each that tells whether they got one. They are two
eights: the first takes slots 0, 2, 3 in the order of its bits, the second 1, 3, 2. So each has up to three,
both have up to four; if that is too few, both up to two. Full or empty, all slots are stored: they stream
from memory without pointers. Kept weights without a slot are the residual: of a random mask at 95 / 90 / 80 %
sparsity 0.18 / 1.57 / 10.6 %. (Any four of 16 would leave 0.12 / 1.30 / 9.96 %, but a register is filled from
four numbers, and one of them is zero. Two of 8, in as many bytes, leave 1.54 / 5.45 / 16.9 %.)

Slots lie in the order of the registers from which a tensor core takes its left operand: each of 256 threads
decodes 16 bytes of values and 4 of places into 32 weights and hands on just these; none changes threads.
Thread 32 w + 4 r + q has of row 16 w + 8 h + r, as eight 2 h + u, the columns
32 u + 2 q + {0, 8, 1, 9, 16, 24, 17, 25}, in the order of their bits: two of each byte of its places, at
2 (2 h + u).

The residual is a product too: 64 columns of x, gathered, times a matrix with one number in each column. Both
layouts of x give the same bits. Features-major, strides (1, B), is the fast one: a gathered column is 2 B
bytes in one piece, at B = 32 one load of 16 bytes a thread and round; in rows it is 2 bytes of each of B
sectors, 8 loads. (The main loop loads 16 bytes at a time from either.)

K is cut into parts, to fill a device; a second kernel adds them in order, then bias and act. Sums are in fp32
and in one order. As in a dense product, what is not finite in a row of x reaches all of its row of y. On CPUs
there is only the reference, a dense product of decoded weights: nothing is won there.

8192 square, 90 % pruned, B = 32 features-major, bf16; instructions of sm_90 by Triton 3.6:
bytes      42 MB of slots, 0.6 of residual, 1 of x and y; 4 of sums, twice, stay in the L2 cache
main loop  532 instructions a warp for 20 KB of slots, 220 of them for the integer pipe, at half rate: 1,064
           cycles, 4.5 TB/s at 1.755 GHz (two of 8, with places as numbers: 488, of which 264 for that pipe)
residual   146 instructions for 64 entries, 7 rounds a program; no load feeds a load in either loop
in flight  two programs of 96 registers a multiprocessor, two stages of 20 KB ahead: 80 KB, needed are 18
launches   2
expected   H100: 43.6 MB at 3.0 TB/s 14.5 us, start 2.5, residual 7 x 0.25, sums 3: 22 us, dense 47: 2.1x
           H200: 10.1 us at 4.3 TB/s, 9.7 of issue, together 12: 19 us, dense 34 to 36: 1.8x to 1.9x
goal       2x of dense
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_triton
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._triton import INTERPRET, tl, triton

ROWS, COLUMNS, UNIT = 128, 64, 512  # of a block, a chunk, a unit
TAKEN = ((0, 2, 3), (1, 3, 2))  # slots of the first eight of 16 weights, and of the second
PADDED = 16  # what a unit has of the residual is a multiple of this
WIDEST = 65536  # K, for 16-bit columns
PROGRAMS, PARTS = 264, 16  # two on each multiprocessor of an H200; most parts of K
FINISH = 1024  # columns of y a program of the second kernel
DTYPES = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """What a program computes: 128 rows of W by `columns` of the batch, `chunks` at a time.

    Of the residual `entries` at a time. `registers`: what the compiler gets on Hopper, so that two programs
    share a multiprocessor; None where it needs no telling, or where they cannot.
    """

    columns: int
    chunks: int
    stages: int
    entries: int = 64
    registers: int | None = None


TILES = (Tile(16, 2, 4), Tile(32, 4, 3, registers=128), Tile(64, 2, 3), Tile(128, 2, 3, entries=32))
WARPS = 8  # 256 threads, as the order of slots has it


@dataclass(frozen=True, eq=False)
class Slots:
    """W [N, K]: up to four of 16 weights in slots, what is left in the residual."""

    shape: tuple[int, int]
    values: Tensor
    places: Tensor
    residual: Tensor
    rows: Tensor
    columns: Tensor
    starts: Tensor

    def bytes(self) -> int:
        """Memory of all of it, full slots and empty ones."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.places, self.residual, self.rows, self.columns, self.starts

    @staticmethod
    def from_dense(w: Tensor, mask: Tensor | None = None) -> Slots:
        """The weights of w [N, K] where the bool mask is True, or where they are not 0."""
        if w.ndim != 2 or 0 in w.shape or w.dtype not in DTYPES or w.shape[1] > WIDEST:
            raise ValueError(
                f"expected w[N, K] in bf16 or fp16, not empty, K at most {WIDEST}; "
                f"got {w.dtype}{list(w.shape)}"
            )
        if mask is not None and (mask.shape != w.shape or mask.dtype != torch.bool):
            raise ValueError(f"expected a bool mask{list(w.shape)}, got {mask.dtype}{list(mask.shape)}")
        n, k = w.shape
        blocks, chunks, units = -(-n // ROWS), -(-k // COLUMNS), -(-k // UNIT)
        keep = (w != 0) if mask is None else mask
        bits = w.contiguous().view(torch.int16)  # NaN must stay the NaN that it is
        slot = _assigned(_grouped(keep))
        groups = _grouped(torch.where(keep, bits, 0))  # [blocks, chunks, 256, 2, 2, 8]
        values = [torch.where(slot == i, groups, 0).sum((-2, -1), dtype=torch.int16) for i in range(4)]
        places = torch.where(slot < 4, _bits(w.device), 0).sum((-3, -2, -1), dtype=torch.int32)

        left = _ungrouped(slot == 4, n, k)
        row, column = left.nonzero().unbind(1)
        at = (row // ROWS * WIDEST + column).argsort(stable=True)
        row, column = row[at], column[at]
        cell = row // ROWS * units + column // UNIT
        counts = torch.bincount(cell, minlength=blocks * units)
        starts = F.pad(((counts + PADDED - 1) // PADDED * PADDED).cumsum(0), (1, 0))
        before = F.pad(counts.cumsum(0), (1, 0))
        entry = torch.arange(len(row), device=w.device) + (starts - before)[cell]
        size = int(starts[-1])
        residual, rows = bits.new_zeros(size), row.new_zeros(size)
        columns = torch.repeat_interleave(  # what fills a unit up is 0 times its first column
            torch.arange(units, device=w.device).repeat(blocks) * UNIT, starts.diff()
        )
        residual[entry], rows[entry], columns[entry] = bits[row, column], row % ROWS, column
        return Slots(
            (n, k),
            torch.stack(values, -1).view(blocks, chunks, 256, 8).view(w.dtype),
            places,
            residual.view(w.dtype),
            rows.to(torch.uint8),
            columns.to(torch.uint16),
            starts.to(torch.int32),
        )

    def to_dense(self) -> Tensor:
        """W [N, K], 0 where it is pruned; bit for bit what went in."""
        n, k = self.shape
        values, residual = (t.view(torch.int16) for t in (self.values, self.residual))
        values = values.view(*self.places.shape, 2, 1, 1, 4)
        slot = _assigned((self.places[..., None, None, None] & _bits(self.places.device)) != 0)
        groups = torch.zeros_like(slot, dtype=torch.int16)
        for i in range(4):
            groups = torch.where(slot == i, values[..., i], groups)
        w = _ungrouped(groups, n, k)
        units = -(-k // UNIT)
        cell = torch.repeat_interleave(self.starts.diff().long())
        row = cell // units * ROWS + self.rows.long()
        real = residual != 0
        w[row[real], self.columns.long()[real]] = residual[real]
        return w.contiguous().view(self.values.dtype)


def _grouped(t: Tensor) -> Tensor:
    """[N, K] as [blocks, chunks, 256, 2, 2, 8]: two eights have four slots; each in the order of bits."""
    n, k = t.shape
    blocks, chunks = -(-n // ROWS), -(-k // COLUMNS)
    t = F.pad(t, (0, chunks * COLUMNS - k, 0, blocks * ROWS - n))
    t = t.view(
        blocks, 8, 2, 8, chunks, 2, 2, 2, 4, 2
    )  # block, w, h, r, chunk, u, and of an eight 16s, 8s, q, 1s
    return t.permute(0, 4, 1, 3, 8, 2, 5, 6, 9, 7).reshape(blocks, chunks, 256, 2, 2, 8)


def _ungrouped(t: Tensor, n: int, k: int) -> Tensor:
    blocks, chunks = t.shape[:2]
    t = t.view(blocks, chunks, 8, 8, 4, 2, 2, 2, 2, 2).permute(0, 2, 5, 3, 1, 6, 7, 9, 4, 8)
    return t.reshape(blocks * ROWS, chunks * COLUMNS)[:n, :k]


def _assigned(kept: Tensor) -> Tensor:
    """The slot of each weight of [..., 2, 2, 8]: 4 where a kept one finds none, 5 of the pruned."""
    rank = kept.cumsum(-1, dtype=torch.int8) - 1
    most = (rank[..., -1:] + 1).clamp(max=3)
    most = torch.where(most.sum(-2, keepdim=True) > 4, most.clamp(max=2), most)
    slot = torch.full_like(rank, 4)
    for i, of_eights in enumerate(zip(*TAKEN, strict=True)):
        taken = torch.tensor(of_eights, dtype=torch.int8, device=kept.device)[:, None]
        slot = torch.where((rank == i) & (most > i), taken, slot)
    return torch.where(kept, slot, 5)


def _bits(device: torch.device) -> Tensor:
    """[2, 2, 8]: the bit of each of a thread's weights."""
    eight, i = torch.arange(4, device=device)[:, None], torch.arange(8, device=device)
    return (1 << (i // 2 * 8 + 2 * eight + i % 2)).to(torch.int32).view(2, 2, 8)


def reference(slots: Slots, x: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """The dense product of decoded weights."""
    y = F.linear(x, slots.to_dense(), bias)
    return y.relu() if relu else y


def floor(slots: Slots, batch: int) -> dict[str, int]:
    """Least traffic with this format, and multiplications as tensor cores do them: zeros, too."""
    n, k = slots.shape
    return {
        "bytes": slots.bytes() + (batch * (n + k) + n) * slots.values.element_size(),
        "flops": 2 * batch * n * k,
    }


@triton.jit
def _selectors(bits):
    """For the eight whose bits are the lowest two of each byte: a byte a weight, which two bytes become it.

    Bytes 0 and 1 are zero, 2 to 7 the slots in order: 0x32, 0x54, 0x76 for the first, second and third bit.
    Multiplication counts the bits in front of each: a byte's own in the bytes above it.
    """
    lower, upper = bits & 0x01010101, bits & 0x02020202
    rank = lower * 0x22222200 + (upper * 0x11111100 + 0x32323232)
    return rank & (lower * 0xFF), (rank + lower * 0x22) & (upper * 0x7F)


@triton.jit
def _pick(first, last, selector, INTERPRET: tl.constexpr):
    """Two weights, as bits, from the four halves of `first` and `last`."""
    if INTERPRET:
        low, high = (selector >> 5) & 3, (selector >> 13) & 3
        a, b, c = first >> 16, last, last >> 16
        w0 = tl.where(low == 1, a, tl.where(low == 2, b, tl.where(low == 3, c, first))).to(tl.int16)
        w1 = tl.where(high == 1, a, tl.where(high == 2, b, tl.where(high == 3, c, first))).to(tl.int16)
    else:
        w0, w1 = tl.inline_asm_elementwise(
            "{.reg .b32 two; prmt.b32 two, $2, $3, $4; mov.b32 {$0, $1}, two;}",
            "=h,=h,r,r,r",
            [first, last, selector],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    return w0, w1


@triton.jit
def _eight(first, last, bits, INTERPRET: tl.constexpr):
    """The 8 weights of an eight, [..., 2, 2, 2], as bits."""
    even, odd = _selectors(bits)
    o0, o1 = _pick(first, last, even, INTERPRET)
    o2, o3 = _pick(first, last, odd, INTERPRET)
    o4, o5 = _pick(first, last, even >> 16, INTERPRET)
    o6, o7 = _pick(first, last, odd >> 16, INTERPRET)
    return o0, o1, o2, o3, o4, o5, o6, o7


@triton.jit
def _at_row(value, row, m, INTERPRET: tl.constexpr):
    """[BM, E]: the value of each entry in its row, else 0."""
    value, row, m = value[None, :], row[None, :].to(tl.int16), m[:, None].to(tl.int16)
    if INTERPRET:
        return tl.where(row == m, value, 0.0)
    # two at a time: small whole numbers, seen as fp16, are equal where they are equal
    return tl.inline_asm_elementwise(
        "{.reg .b32 same; set.eq.u32.f16x2 same, $2, $3; and.b32 $0, $1, same;}",
        "=r,r,r,r",
        [value, row, m],
        dtype=value.dtype,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _slot_kernel(
    x_ptr,
    values_ptr,
    places_ptr,
    starts_ptr,
    rows_ptr,
    columns_ptr,
    residual_ptr,
    out_ptr,
    B,
    N,
    K,
    chunks,
    parts,
    units_a_part,
    stride_xb,
    stride_xk,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHUNKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[part, b, n] = sum over the part's columns of x[b, k] w[n, k], fp32"""
    # all in one axis of the grid: the others end at 65,535
    blocks = (N + 127) // 128
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    part, first_b = rest % parts, rest // parts * BLOCK_B
    units = (chunks + 7) // 8
    first_unit = part * units_a_part
    last_unit = tl.minimum(first_unit + units_a_part, units)
    begin = first_unit * 8
    end = tl.minimum(last_unit * 8, chunks)

    offs_m = tl.arange(0, 128)
    offs_b = tl.arange(0, BLOCK_B)
    offs_t = tl.arange(0, 256 * CHUNKS)  # threads of several chunks, one after the other
    offs_p = tl.arange(0, 4)
    offs_h = tl.arange(0, 2)
    offs_k = tl.arange(0, 64 * CHUNKS)
    offs_e = tl.arange(0, ENTRIES)
    in_b = offs_b < B - first_b

    tile = block.to(tl.int64) * chunks + begin
    values_ptr += tile * 1024
    places_ptr += tile * 256
    x_ptr += first_b.to(tl.int64) * stride_xb
    offs_values = offs_t[:, None] * 4 + offs_p[None, :]  # [256 C, 4]
    offs_x = offs_k.to(tl.int64)[:, None] * stride_xk + offs_b.to(tl.int64)[None, :] * stride_xb  # [BK, BB]
    x_ptrs = x_ptr + begin.to(tl.int64) * 64 * stride_xk + offs_x

    # the residual's first round, in time for its end: no load there waits for another
    starts_ptr += block.to(tl.int64) * units
    e = tl.load(starts_ptr + first_unit)
    last = tl.multiple_of(tl.load(starts_ptr + last_unit), 16)
    in_e = offs_e < last - e
    column = tl.load(columns_ptr + e + offs_e, mask=in_e, other=0)
    column_next = tl.load(columns_ptr + e + ENTRIES + offs_e, mask=offs_e < last - e - ENTRIES, other=0)

    acc = tl.zeros((128, BLOCK_B), tl.float32)
    for c in range(begin, end, CHUNKS):
        in_k = (offs_k < K - c * 64) | EVEN_K
        x = tl.load(x_ptrs, mask=in_k[:, None] & in_b[None, :], other=0.0)
        in_t = (offs_t < (chunks - c) * 256) | EVEN_K
        words = tl.load(values_ptr + offs_values, mask=in_t[:, None], other=0)
        bits = tl.load(places_ptr + offs_t, mask=in_t, other=0)[:, None]
        own, shared = tl.split(tl.reshape(words, (256 * CHUNKS, 2, 2)))
        bits, _ = tl.broadcast(bits >> (4 * offs_h[None, :]), own)
        turned = (shared << 16) | ((shared >> 16) & 0xFFFF)
        a0, a1, a2, a3, a4, a5, a6, a7 = _eight(own << 16, shared, bits, INTERPRET)
        b0, b1, b2, b3, b4, b5, b6, b7 = _eight(own & -65536, turned, bits >> 2, INTERPRET)
        o0, o1, o2, o3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
        o4, o5, o6, o7 = tl.join(a4, b4), tl.join(a5, b5), tl.join(a6, b6), tl.join(a7, b7)
        w = tl.join(
            tl.join(tl.join(o0, o4), tl.join(o2, o6)),
            tl.join(tl.join(o1, o5), tl.join(o3, o7)),
        )  # [256 C, 2, 2, 2, 2, 2]
        w = tl.reshape(w, (CHUNKS, 8, 8, 4, 2, 2, 2, 2, 2))
        w = tl.permute(w, (1, 4, 2, 0, 5, 6, 7, 3, 8))
        w = tl.reshape(w, (128, 64 * CHUNKS)).to(x_ptr.dtype.element_ty, bitcast=True)
        if INTERPRET:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        x_ptrs += CHUNKS * 64 * stride_xk
        values_ptr += CHUNKS * 1024
        places_ptr += CHUNKS * 256

    # a load that reads nothing: conversions to a tensor core's layout move in front of what starts from loads
    m = tl.load(rows_ptr + offs_m, mask=offs_m < 0, other=offs_m.to(tl.uint8))
    batch_ptrs = x_ptr + offs_b.to(tl.int64)[:, None] * stride_xb  # [BB, E] with the columns
    found_ptrs = batch_ptrs + column.to(tl.int64)[None, :] * stride_xk
    found = tl.load(found_ptrs, mask=in_b[:, None] & in_e[None, :], other=0.0)
    row = tl.load(rows_ptr + e + offs_e, mask=in_e, other=0)
    value = tl.load(residual_ptr + e + offs_e, mask=in_e, other=0.0)
    while e < last:
        e = tl.multiple_of(e, 16) + ENTRIES
        in_e = offs_e < last - e
        row_next = tl.load(rows_ptr + e + offs_e, mask=in_e, other=0)
        value_next = tl.load(residual_ptr + e + offs_e, mask=in_e, other=0.0)
        found_ptrs = batch_ptrs + column_next.to(tl.int64)[None, :] * stride_xk
        found_next = tl.load(found_ptrs, mask=in_b[:, None] & in_e[None, :], other=0.0)
        column_next = tl.load(columns_ptr + e + ENTRIES + offs_e, mask=offs_e < last - e - ENTRIES, other=0)
        single = _at_row(value, row, m, INTERPRET)  # [128, E]
        if INTERPRET:
            found = found.to(tl.float32)
            single = single.to(tl.float32)
        acc = tl.dot(single, tl.trans(found), acc, input_precision="ieee")
        row, value, found = row_next, value_next, found_next

    first_m = block * 128
    in_m = offs_m < N - first_m
    out_ptr += (part.to(tl.int64) * B + first_b) * N + first_m
    out_ptrs = out_ptr + offs_b.to(tl.int64)[:, None] * N + offs_m[None, :]
    tl.store(out_ptrs, tl.trans(acc), mask=in_b[:, None] & in_m[None, :])


@triton.jit
def _finish_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    B,
    N,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[b, n] = act(sum_p parts[p, b, n] + bias[n])"""
    pieces = (N + BLOCK - 1) // BLOCK
    offs_n = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // pieces).to(tl.int64)
    inside = offs_n < N
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts_ptr + (part * B + b) * N + offs_n, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + b * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=inside)


def _cut(n: int, k: int, batch: int) -> tuple[Tile, int, int]:
    """The tile, the parts of K, and the units of a part."""
    tile = next((tile for tile in TILES if batch <= tile.columns), TILES[-1])
    programs, units = -(-n // ROWS) * -(-batch // tile.columns), -(-k // UNIT)
    units_a_part = -(-units // min(max(1, PROGRAMS // programs), PARTS))
    return tile, -(-units // units_a_part), units_a_part


@cache
def _is_hopper(device: torch.device) -> bool:
    """Whether that is what Triton compiles for, where this device is the current one."""
    return not INTERPRET and triton.runtime.driver.active.get_current_target().arch >= 90


def launch(slots: Slots, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    (n, k), b = slots.shape, x.shape[0]
    tile, parts, units_a_part = _cut(n, k, b)
    blocks, chunks = slots.values.shape[:2]
    sums = torch.empty(parts, b, n, dtype=torch.float32, device=x.device)
    y = x.new_empty(b, n)
    with torch.cuda.device_of(x):
        _slot_kernel[(blocks * parts * triton.cdiv(b, tile.columns),)](
            x,
            slots.values.view(torch.int32),
            slots.places,
            slots.starts,
            slots.rows,
            slots.columns,
            slots.residual,
            sums,
            b,
            n,
            k,
            chunks,
            parts,
            units_a_part,
            *x.stride(),
            EVEN_K=k % (COLUMNS * tile.chunks) == 0,
            BLOCK_B=tile.columns,
            CHUNKS=tile.chunks,
            ENTRIES=tile.entries,
            INTERPRET=INTERPRET,
            num_warps=WARPS,
            num_stages=tile.stages,
            maxnreg=tile.registers if _is_hopper(x.device) else None,
        )
        _finish_kernel[(b * triton.cdiv(n, FINISH),)](
            sums,
            bias,
            y,
            b,
            n,
            PARTS=parts,
            HAS_BIAS=bias is not None,
            RELU=relu,
            BLOCK=FINISH,
            num_warps=4,
        )
    return y


def slot_linear(
    slots: Slots, x: Tensor, bias: Tensor | None = None, relu: bool = False, kernels: str = "auto"
) -> Tensor:
    """act(x W^T + bias) as [B, N]; `relu` makes act the rectifier. Inference only: no gradients.

    x is fastest features-major, strides (1, B), B a multiple of 8: `features.t()` of features [K, B].
    `kernels`: "triton", "reference" (torch), or "auto": Triton on CUDA, else the reference.
    """
    n, k = slots.shape
    given = {"x": x, "values": slots.values} | ({} if bias is None else {"bias": bias})
    got = ", ".join(f"{name} {t.dtype}{list(t.shape)} on {t.device}" for name, t in given.items())
    if x.ndim != 2 or x.shape[1] != k or not len(x) or (bias is not None and bias.shape != (n,)):
        raise ValueError(f"expected x[B, {k}], not empty, and bias[{n}]; got {got}")
    if any((t.dtype, t.device) != (x.dtype, x.device) for t in given.values()):
        raise ValueError(f"expected all of one dtype on one device; got {got}")
    # the operator is for the compiler and for autograd, which it refuses; a call of it takes longer than ours
    wanted = torch.compiler.is_compiling() or _native.wants_gradient(x, slots.values, bias)
    run: Callable[..., Tensor] = _operator if wanted else _forward
    return run(*slots.tensors(), n, k, x, bias, relu, kernels)


def _forward(
    values: Tensor,
    places: Tensor,
    residual: Tensor,
    rows: Tensor,
    columns: Tensor,
    starts: Tensor,
    n: int,
    k: int,
    x: Tensor,
    bias: Tensor | None,
    relu: bool,
    kernels: str,
) -> Tensor:
    slots = Slots((n, k), values, places, residual, rows, columns, starts)
    if use_triton(kernels, x):
        return launch(slots, x, None if bias is None else bias.contiguous(), relu)
    return reference(slots, x, bias, relu)


_operator = operator("slot_linear")(_forward)


@fake(_operator)
def _(values, places, residual, rows, columns, starts, n, k, x, bias, relu, kernels):
    return x.new_empty(x.shape[0], n)
