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

Slots: of every 8 weights of a row two have a slot, their places (0 to 7) in 6 bits of a byte. Full or empty,
all slots are stored, so they stream from memory without pointers. Kept weights that find both slots taken are
the residual: of a random mask at 95 / 90 / 80 % sparsity 1.5 / 5.4 / 17 %. (One slot for every 4 would leave
7 / 14 / 26 %, and what it saves in decoding is less than what they cost.)

Slots lie in the order of the registers from which a tensor core takes its left operand: each of 256 threads
decodes 16 bytes of values and 4 of places into 32 weights and hands on just these; none changes threads.
Thread 32 w + 4 r + q has, as pair 2 h + u, of row 16 w + 8 h + r the columns
32 u + 2 q + {0, 1, 8, 9, 16, 17, 24, 25}.

The residual is a product too: 64 columns of x, gathered, times a matrix with one number in each column. This
gather reads least where x lies features-major, with strides (1, B). Both layouts give the same bits.

K is cut into parts, to fill a device; a second kernel adds them in order, then bias and act. Sums are in fp32
and in one order. As in a dense product, what is not finite in a row of x reaches all of its row of y. On CPUs
there is only the reference, a dense product of decoded weights: nothing is won there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

from sparselth.kernels._triton import HAS_TRITON, INTERPRET, Aot, tl, triton
from sparselth.kernels.bitmask import use_triton

ROWS, COLUMNS, UNIT = 128, 64, 512  # of a block, a chunk, a unit
ENTRIES, PADDED = 64, 16  # of the residual: at a time, and what a unit has is a multiple of
WIDEST = 65536  # K, for 16-bit columns
PROGRAMS, PARTS = 264, 16  # two on each multiprocessor of an H200; most parts of K
FINISH = 1024  # columns of y a program of the second kernel
DTYPES = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """What a program computes: 128 rows of W by `columns` of the batch, `chunks` at a time."""

    columns: int
    chunks: int
    stages: int


TILES = (Tile(16, 2, 4), Tile(32, 4, 3), Tile(64, 2, 3), Tile(128, 2, 3))
WARPS = 8  # 256 threads, as the order of slots has it


@dataclass(frozen=True, eq=False)
class Slots:
    """W [N, K]: up to two of every 8 weights in slots, what is left in the residual."""

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
        groups = _grouped(torch.where(keep, bits, 0))  # [blocks, chunks, 256, 4, 8]
        kept = _grouped(keep)
        order = kept.cumsum(-1, dtype=torch.int8)
        first, second = (kept & (order == i) for i in (1, 2))
        p = first.to(torch.uint8).argmax(-1)
        q = torch.where(second.any(-1), second.to(torch.uint8).argmax(-1), p ^ 1)  # never the same place
        pair = torch.stack([p, q], -1)
        values = groups.gather(-1, pair)  # zeros where less than two are kept
        byte = 8 * torch.arange(4, device=w.device)
        places = ((p << 3 | q) << byte).sum(-1).to(torch.int32)

        left = _ungrouped(kept & (order > 2), n, k)
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
            values.view(blocks, chunks, 256, 8).view(w.dtype),
            places,
            residual.view(w.dtype),
            rows.to(torch.uint8),
            columns.to(torch.uint16),
            starts.to(torch.int32),
        )

    def to_dense(self) -> Tensor:
        """W [N, K], 0 where it is pruned; bit for bit what went in."""
        n, k = self.shape
        blocks, chunks = self.values.shape[:2]
        byte = 8 * torch.arange(4, device=self.places.device)
        code = self.places[..., None] >> byte
        place = torch.stack([code >> 3 & 7, code & 7], -1).long()  # [blocks, chunks, 256, 4, 2]
        values, residual = (t.view(torch.int16) for t in (self.values, self.residual))
        groups = values.new_zeros(blocks, chunks, 256, 4, 8)
        groups.scatter_(-1, place, values.view(blocks, chunks, 256, 4, 2))
        w = _ungrouped(groups, n, k)
        units = -(-k // UNIT)
        cell = torch.repeat_interleave(self.starts.diff().long())
        row = cell // units * ROWS + self.rows.long()
        real = residual != 0
        w[row[real], self.columns.long()[real]] = residual[real]
        return w.contiguous().view(self.values.dtype)


def _grouped(t: Tensor) -> Tensor:
    """[N, K] as [blocks, chunks, 256, 4, 8]: the eights that share a pair of slots, in order of threads."""
    n, k = t.shape
    blocks, chunks = -(-n // ROWS), -(-k // COLUMNS)
    t = F.pad(t, (0, chunks * COLUMNS - k, 0, blocks * ROWS - n))
    t = t.view(
        blocks, 8, 2, 8, chunks, 2, 4, 4, 2
    )  # block, w, h, r, chunk, u, eight's half and quarter, q, 2
    return t.permute(0, 4, 1, 3, 7, 2, 5, 6, 8).reshape(blocks, chunks, 256, 4, 8)


def _ungrouped(t: Tensor, n: int, k: int) -> Tensor:
    blocks, chunks = t.shape[:2]
    t = t.view(blocks, chunks, 8, 8, 4, 2, 2, 4, 2).permute(0, 2, 5, 3, 1, 6, 7, 4, 8)
    return t.reshape(blocks * ROWS, chunks * COLUMNS)[:n, :k]


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
def _decode(pair, first, second, byte, INTERPRET: tl.constexpr):
    """The 8 weights of a pair, as bits: two slots, each at its place, and zeros.

    `first` and `second` hold the places times 8 of four pairs, `byte` tells which is this one's.
    """
    if INTERPRET:
        low, high = pair & 0xFFFF, (pair >> 16) & 0xFFFF
        p, q = (first >> (8 * byte + 3)) & 7, (second >> (8 * byte + 3)) & 7
        o0 = tl.where(p == 0, low, tl.where(q == 0, high, 0)).to(tl.int16)
        o1 = tl.where(p == 1, low, tl.where(q == 1, high, 0)).to(tl.int16)
        o2 = tl.where(p == 2, low, tl.where(q == 2, high, 0)).to(tl.int16)
        o3 = tl.where(p == 3, low, tl.where(q == 3, high, 0)).to(tl.int16)
        o4 = tl.where(p == 4, low, tl.where(q == 4, high, 0)).to(tl.int16)
        o5 = tl.where(p == 5, low, tl.where(q == 5, high, 0)).to(tl.int16)
        o6 = tl.where(p == 6, low, tl.where(q == 6, high, 0)).to(tl.int16)
        o7 = tl.where(p == 7, low, tl.where(q == 7, high, 0)).to(tl.int16)
    else:
        # a byte for each of the 8 places says which bytes of {pair, 0} go there, as prmt wants it
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 p, q, lo, hi, a, b, c, d;
            .reg .b64 s, t;
            prmt.b32 p, $9, 0, $11;
            prmt.b32 q, $10, 0, $11;
            mov.b64 s, 0x54;
            mov.b64 t, 0x76;
            shl.b64 s, s, p;
            shl.b64 t, t, q;
            or.b64 s, s, t;
            mov.b64 {lo, hi}, s;
            prmt.b32 a, 0, $8, lo;
            shr.u32 lo, lo, 16;
            prmt.b32 b, 0, $8, lo;
            prmt.b32 c, 0, $8, hi;
            shr.u32 hi, hi, 16;
            prmt.b32 d, 0, $8, hi;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            mov.b32 {$4, $5}, c;
            mov.b32 {$6, $7}, d;
            }
            """,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
            [pair, first, second, byte + 0x4440],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
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
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    first_b = tl.program_id(2).to(tl.int64) * BLOCK_B
    units = (chunks + 7) // 8
    first_unit = tl.program_id(1) * units_a_part
    last_unit = tl.minimum(first_unit + units_a_part, units)
    begin = first_unit * 8
    end = tl.minimum(last_unit * 8, chunks)

    offs_m = tl.arange(0, 128)
    offs_b = tl.arange(0, BLOCK_B)
    offs_t = tl.arange(0, 256 * CHUNKS)  # threads of several chunks, one after the other
    offs_p = tl.arange(0, 4)
    offs_k = tl.arange(0, 64 * CHUNKS)
    offs_e = tl.arange(0, ENTRIES)
    in_b = offs_b < (B - first_b).to(tl.int32)

    tile = block * chunks + begin
    values_ptr += tile * 1024
    places_ptr += tile * 256
    x_ptr += first_b * stride_xb
    offs_values = offs_t[:, None] * 4 + offs_p[None, :]  # [256 C, 4]
    offs_x = offs_k.to(tl.int64)[:, None] * stride_xk + offs_b.to(tl.int64)[None, :] * stride_xb  # [BK, BB]
    x_ptrs = x_ptr + begin.to(tl.int64) * 64 * stride_xk + offs_x

    acc = tl.zeros((128, BLOCK_B), tl.float32)
    for c in range(begin, end, CHUNKS):
        in_k = (offs_k < K - c * 64) | EVEN_K
        x = tl.load(x_ptrs, mask=in_k[:, None] & in_b[None, :], other=0.0)
        in_t = (offs_t < (chunks - c) * 256) | EVEN_K
        pair = tl.load(values_ptr + offs_values, mask=in_t[:, None], other=0)
        place = tl.load(places_ptr + offs_t, mask=in_t, other=0)[:, None]
        first, second = place & 0x38383838, (place << 3) & 0x38383838
        pair, first = tl.broadcast(pair, first)
        pair, second = tl.broadcast(pair, second)
        pair, byte = tl.broadcast(pair, offs_p[None, :])
        o0, o1, o2, o3, o4, o5, o6, o7 = _decode(pair, first, second, byte, INTERPRET)
        w = tl.join(
            tl.join(tl.join(o0, o4), tl.join(o2, o6)),
            tl.join(tl.join(o1, o5), tl.join(o3, o7)),
        )  # [256 C, 4, 2, 2, 2]
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

    e = tl.load(starts_ptr + block * units + first_unit)
    last = tl.multiple_of(tl.load(starts_ptr + block * units + last_unit), 16)
    # a load that reads nothing: conversions to a tensor core's layout move in front of what starts from loads
    m = tl.load(rows_ptr + offs_m, mask=offs_m < 0, other=offs_m.to(tl.uint8))
    while e < last:
        e = tl.multiple_of(e, 16)
        in_e = offs_e < last - e
        row = tl.load(rows_ptr + e + offs_e, mask=in_e, other=0)
        column = tl.load(columns_ptr + e + offs_e, mask=in_e, other=0).to(tl.int64)
        value = tl.load(residual_ptr + e + offs_e, mask=in_e, other=0.0)
        found_ptrs = x_ptr + offs_b.to(tl.int64)[:, None] * stride_xb + column[None, :] * stride_xk
        found = tl.load(found_ptrs, mask=in_b[:, None] & in_e[None, :], other=0.0)  # [BB, E]
        single = _at_row(value, row, m, INTERPRET)  # [128, E]
        if INTERPRET:
            found = found.to(tl.float32)
            single = single.to(tl.float32)
        acc = tl.dot(single, tl.trans(found), acc, input_precision="ieee")
        e += ENTRIES

    first_m = block * 128
    in_m = offs_m < (N - first_m).to(tl.int32)
    out_ptr += (part * B + first_b) * N + first_m
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
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
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


def launch(slots: Slots, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    (n, k), b = slots.shape, x.shape[0]
    tile, parts, units_a_part = _cut(n, k, b)
    blocks, chunks = slots.values.shape[:2]
    sums = torch.empty(parts, b, n, dtype=torch.float32, device=x.device)
    y = x.new_empty(b, n)
    with torch.cuda.device_of(x):
        _slot_kernel[blocks, parts, triton.cdiv(b, tile.columns)](
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
            units_a_part,
            *x.stride(),
            EVEN_K=k % (COLUMNS * tile.chunks) == 0,
            BLOCK_B=tile.columns,
            CHUNKS=tile.chunks,
            ENTRIES=ENTRIES,
            INTERPRET=INTERPRET,
            num_warps=WARPS,
            num_stages=tile.stages,
        )
        _finish_kernel[triton.cdiv(n, FINISH), b](
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
    wanted = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
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


_operator = library.custom_op("sparselth::slot_linear", _forward, mutates_args=())


@_operator.register_fake
def _(values, places, residual, rows, columns, starts, n, k, x, bias, relu, kernels):
    return x.new_empty(x.shape[0], n)


# What the compile gate checks: every tile with x in rows and even K, and the smallest with all ends to guard


def _aot(tile: Tile, unit: str, even: bool, registers: int, narrow: int) -> Aot:
    constants: dict[str, Any] = {
        "EVEN_K": even,
        "BLOCK_B": tile.columns,
        "CHUNKS": tile.chunks,
        "ENTRIES": ENTRIES,
        "INTERPRET": False,
        unit: 1,
    }
    types = {"rows_ptr": "*u8", "columns_ptr": "*u16", "residual_ptr": "*bf16", "x_ptr": "*bf16"}
    types |= {"out_ptr": "*fp32"} | dict.fromkeys(("values_ptr", "places_ptr", "starts_ptr"), "*i32")
    signature = {name: types.get(name, "i32") for name in _slot_kernel.arg_names if name not in constants}
    loose = () if even else ("B", "N", "K")
    return Aot(
        kernel=_slot_kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(name for name in signature if name not in ("chunks", "units_a_part", *loose)),
        num_warps=WARPS,
        num_stages=tile.stages,
        max_registers=registers,
        narrow=narrow,
    )


# Registers and narrow accesses: one x a gathered number where x has rows, and what the residual's lists take.
# Up to 128 registers let two programs share a multiprocessor.
LIMITS = {16: (96, 30), 32: (128, 34), 64: (152, 53), 128: (255, 85)}


def _shipped() -> list[Aot]:
    found = [
        _aot(tile, unit, True, *LIMITS[tile.columns]) for tile in TILES for unit in ("stride_xk", "stride_xb")
    ]
    found.append(_aot(TILES[0], "stride_xk", False, 96, 47))
    finish = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "B": "i32", "N": "i32"}
    constants = {"PARTS": 4, "HAS_BIAS": True, "RELU": True, "BLOCK": FINISH}
    found.append(
        Aot(
            kernel=_finish_kernel,
            signature=finish,
            constants=constants,
            aligned=("parts_ptr", "bias_ptr", "y_ptr", "N"),
            num_warps=4,
            num_stages=3,
            max_registers=64,
        )
    )
    return found


AOT = _shipped() if HAS_TRITON else []
