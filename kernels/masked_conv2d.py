r"""Masked convolution over R replicas, Y[r] = conv2d(X[r], W[r] * M[r]) + b[r], and its gradients

    y[b, n, p, q] = sum over (i, j, c) of  x[b, c, p s + i d - pad, q s + j d - pad] (w m)[n, c, i, j]

| name     | shape               | dtype                    |    Floor of each pass, s = itemsize:
| x, dx    | [R, B, C, H, W]     | fp32, fp16, bf16         |      bytes = (|x| + |w| + |y|) s + |mask|
| w, dw    | [R, N, C, kh, kw]   | as x                     |      FLOPs = 2 B P Q nnz(m)
| mask     | [R, N, ceil(K / 8)] | uint8, bits; K = C kh kw |      (dense 2 B P Q R N K)
| bias, db | [R, N]              | as x, or None            |
| y, dy    | [R, B, N, P, Q]     | as x; sums in fp32       |

Any tensor may have any strides. The products read pixels whose channels are neighbours (channels-last,
[R, B, H, W, C] in memory) in 16-byte loads, so x and dy in another layout are copied first; y and dx come
channels-last.

On CUDA each pass is one matrix product (implicit GEMM). Its rows are the output pixels m = (b, p, q), its
inner axis is k = (i, j, c), channels innermost: where tiles divide C, a tile has one tap (i, j). Weights and
mask lie in (c, i, j) order, so a small kernel writes w * m in the order of the product, padded with zeros to
whole tiles; bit c kh kw + tap is read where it lies. A second one lists the tiles that keep a weight, and the
product visits only those. dx is the same product with N and C exchanged and the taps turned round; with a
stride of s it meets zeros in s^2 - 1 of s^2 places. dw leaves out tiles without a kept weight, is summed over
chunks of m into one fp32 slab each, and the slabs are added in order under the mask: no atomics, the same
bits every time and for every R. Pruned weights are never read, and their gradients are exactly 0.

Where every tile is occupied nothing is left out, and the vendor's convolution of w * m should be faster:
with the replicas as groups of one call, or apart, side by side on a few streams. So "auto" times all three
on CUDA, once for every pass, shape, layout and dtype, keeps the choice in CHOICES, and `explain` tells it.
The choice may differ with R and from one process to the next; who needs the same bits always asks for
"triton".

Account of y in Conv-2's second layer, R 30, B 60, 64 channels, 32 x 32, 3 x 3, TF32, on an H100. Goal: within
2 times the floor. Not measured.
  944 MB of DRAM (315 us at 3.0 TB/s; H200 220), dense 136 GFLOP (275 us at 495 TFLOP/s)
  3 launches: packing, lists, and 14,400 programs of 128 x 64, 18 steps of 32, all tiles occupied
  134 registers, 74 KB of shared memory: 3 programs a multiprocessor, 147 KB in flight; no product waits for
  the one before it, and no load for a load (list entries are read a step early)
  L2 to multiprocessors: every tap reads x again, 4.2 GB, and 2.1 of weights: 0.9-1.2 ms at 5.5-7 TB/s, which
  bounds: expected 0.9-1.2 ms, 3 to 4 times the floor. So "auto" should take the vendor's here

`masked_conv2d` is for autograd. `forward`, `dgrad` and `wgrad` are the passes alone, unchecked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_triton
from sparselth.kernels._graphs import replayed
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._tiles import DTYPES, Tile, kind, precision
from sparselth.kernels._triton import INTERPRET, tl, triton, within_grid
from sparselth.kernels.bitmask import launch_count, launch_unpack

Pair = int | Sequence[int]
STREAMS = 4  # on which the vendor's convolutions of single replicas run side by side
LISTED = 1024  # tiles that a program lists at a time; all at once, ptxas takes minutes for 2^18 of them


class Geometry(NamedTuple):
    """Height and width of the kernel, and its stride, padding and dilation along both; see `geometry`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def out(self, h: int, w: int) -> tuple[int, int]:
        """P and Q."""
        p, q = (
            (size + 2 * pad - d * (k - 1) - 1) // s + 1
            for size, k, s, pad, d in zip((h, w), *self, strict=True)
        )
        return p, q


# The reference, which on CUDA is the vendor's convolution: the replicas are groups of one call


def reference(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    flat = None if bias is None else bias.flatten()
    y = F.conv2d(_fold(x), _masked(w, mask).flatten(0, 1), flat, g.stride, g.padding, g.dilation, len(w))
    return _unfold(y, len(w))


def reference_dgrad(dy: Tensor, w: Tensor, mask: Tensor, size: Sequence[int], g: Geometry) -> Tensor:
    d = _fold(dy)
    x = d.new_empty(len(d), *size, len(w) * w.shape[2]).permute(0, 3, 1, 2)  # its shape and layout only
    return _unfold(_aten_backward(d, x, _masked(w, mask).flatten(0, 1), g, len(w), 0), len(w))


def reference_wgrad(dy: Tensor, x: Tensor, mask: Tensor, g: Geometry) -> Tensor:
    w = x.new_empty(len(x), dy.shape[2], x.shape[2], *g.kernel)  # its shape only
    dw = _aten_backward(_fold(dy), _fold(x), w.flatten(0, 1), g, len(x), 1)
    return _masked(dw.view(w.shape), mask)


def apart(run: Callable[[slice], Tensor], replicas: int, device: torch.device) -> Tensor:
    """`run` for each replica alone, on CUDA side by side on a few streams, which a graph capture follows."""
    rows = [slice(r, r + 1) for r in range(replicas)]
    if device.type != "cuda":
        return torch.cat([run(row) for row in rows])
    here, streams = torch.cuda.current_stream(device), _streams(device)
    for stream in streams:  # so what they allocated in an earlier call is theirs again
        stream.wait_stream(here)
    found = []
    for r, row in enumerate(rows):
        with torch.cuda.stream(streams[r % STREAMS]):
            found.append(run(row))
    for stream in streams:
        here.wait_stream(stream)
    return torch.cat(found)


@lru_cache(maxsize=8)
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(STREAMS)]


def _aten_backward(dy: Tensor, x: Tensor, w: Tensor, g: Geometry, groups: int, which: int) -> Tensor:
    wanted = [which == 0, which == 1, False]
    grads: Sequence[Tensor] = torch.ops.aten.convolution_backward(
        dy, x, w, None, g.stride, g.padding, g.dilation, False, (0, 0), groups, wanted
    )
    return grads[which]


def _masked(w: Tensor, mask: Tensor) -> Tensor:
    """w where the bits keep it, 0 elsewhere, whatever w is there."""
    return torch.where(launch_unpack(mask, w[0, 0].numel()).view(w.shape), w, 0)


def _fold(t: Tensor) -> Tensor:
    """[R, B, C, H, W] as [B, R * C, H, W]."""
    return t[0] if len(t) == 1 else t.movedim(0, 1).flatten(1, 2)


def _unfold(t: Tensor, replicas: int) -> Tensor:
    """[B, R * C, H, W] as [R, B, C, H, W], channels-last."""
    t = t.unflatten(1, (replicas, -1)).permute(1, 0, 3, 4, 2)
    return t.contiguous().permute(0, 1, 4, 2, 3)


def floor(
    x: Tensor, w: Tensor, mask: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1
) -> dict[str, int]:
    """Bytes and FLOPs that each pass cannot do without."""
    p, q = geometry(w.shape[3:], stride, padding, dilation).out(*x.shape[3:])
    y = len(x) * x.shape[1] * w.shape[1] * p * q
    return {
        "bytes": (x.numel() + w.numel() + y) * x.element_size() + mask.numel(),
        "flops": 2 * x.shape[1] * p * q * int(launch_count(mask, None, rows=False)),
    }


# Triton: the weights in the order of the product, and the tiles that are occupied


@triton.jit
def _pack_kernel(
    w_ptr,  # [R, N, K], K = (c, tap)
    mask_ptr,  # [R, N, K / 8]
    packed_ptr,  # [R, OUT tiles, BLOCK_N, K tiles, BLOCK_K], K = (tap, IN)
    occupied_ptr,  # [R, OUT tiles, K tiles]
    OUT,
    IN,
    K,
    k_tiles,
    stride_wr,
    stride_wn,
    stride_mr,
    stride_mn,
    TAPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # (OUT, IN) is (C, N) instead of (N, C)
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    here, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = here // k_tiles
    t = here - tile * k_tiles
    offs_o = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BN, 1]
    offs_k = t * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [1, BK]
    tap = offs_k // IN
    offs_i = offs_k - tap * IN
    if TRANSPOSED:
        n, c = offs_i, offs_o
    else:
        n, c = offs_o, offs_i
    n = n.to(tl.int64)
    place = c * TAPS + tap
    inside = (offs_o < OUT) & (offs_k < K)
    byte = tl.load(mask_ptr + r * stride_mr + n * stride_mn + (place >> 3), mask=inside, other=0)
    keep = ((byte >> (place & 7).to(tl.uint8)) & 1) != 0  # [BN, BK]
    w = tl.load(w_ptr + r * stride_wr + n * stride_wn + place, mask=keep, other=0.0)
    row = (r * (tl.num_programs(0) // k_tiles) + tile) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tl.store(packed_ptr + row * k_tiles * BLOCK_K + offs_k, w)
    tl.store(occupied_ptr + r * tl.num_programs(0) + here, tl.max(keep.to(tl.int32)))


@triton.jit
def _list_kernel(
    occupied_ptr,  # [R, OUT tiles, K tiles]
    live_ptr,  # the same shape: the numbers of the occupied K tiles, in order
    count_ptr,  # [R, OUT tiles]: how many those are
    k_tiles,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    listed = 0
    for first in range(0, k_tiles, BLOCK):
        k_tile = first + offs
        occupied = tl.load(occupied_ptr + tile * k_tiles + k_tile, mask=k_tile < k_tiles, other=0)
        slot = listed + tl.cumsum(occupied) - occupied
        tl.store(live_ptr + tile * k_tiles + slot, k_tile, mask=occupied != 0)
        listed += tl.sum(occupied)
    tl.store(count_ptr + tile, listed)


# Triton: the products


@triton.jit
def _meet(out, tap, size, AXIS: tl.constexpr, GEOMETRY: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The row (AXIS 0) or column (1) of the input that `out` meets through a tap, and whether it exists."""
    stride, padding, dilation = GEOMETRY[1][AXIS], GEOMETRY[2][AXIS], GEOMETRY[3][AXIS]
    if TRANSPOSED:
        spread = out + padding - tap * dilation
        at = spread // stride
        return at, (at * stride == spread) & (at.to(tl.uint32) < size)
    at = out * stride + tap * dilation - padding
    return at, at.to(tl.uint32) < size  # below 0, too


@triton.jit
def _split(m, P, Q):
    """Image, row and column of output pixels m = (b, p, q)."""
    image = m // (P * Q)
    pixel = m - image * (P * Q)
    row = pixel // Q
    return image, row, pixel - row * Q


@triton.jit
def _gather(
    x_ptr,  # [B, HI, WI, IN]
    inside,  # which output pixels exist [BM, 1]
    image,
    row,
    column,
    k0,  # the first column of the tile, K = (tap, IN)
    IN,
    K,
    HI,
    WI,
    GEOMETRY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ONE_TAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of the matrix that im2col would write: what output pixels meet in columns k0, k0 + 1, ..."""
    KW: tl.constexpr = GEOMETRY[0][1]
    if ONE_TAP:
        tap = k0 // IN
        offs_c = k0 - tap * IN + tl.arange(0, BLOCK_K)[None, :]
    else:
        offs_k = k0 + tl.arange(0, BLOCK_K)[None, :]
        tap = offs_k // IN
        offs_c = offs_k - tap * IN
        inside = inside & (offs_k < K)
    h, in_h = _meet(row, tap // KW, HI, 0, GEOMETRY, TRANSPOSED)
    w, in_w = _meet(column, tap % KW, WI, 1, GEOMETRY, TRANSPOSED)
    at = ((image * HI + h) * WI + w) * IN
    x = tl.load(x_ptr + (at + offs_c), mask=inside & in_h & in_w, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x  # [BM, BK]


@triton.jit
def _conv_kernel(
    x_ptr,  # [R, B, HI, WI, IN]
    packed_ptr,  # [R, OUT tiles, BLOCK_N, K tiles, BLOCK_K]
    live_ptr,  # [R, OUT tiles, K tiles]
    count_ptr,  # [R, OUT tiles]
    bias_ptr,  # [R, OUT]
    y_ptr,  # [R, M, OUT]
    M,
    OUT,
    IN,
    K,
    HI,
    WI,
    HO,
    WO,
    out_tiles,
    k_tiles,
    stride_xr,
    GEOMETRY: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # dgrad
    ONE_TAP: tl.constexpr,  # BLOCK_K divides IN
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    r = tl.program_id(1).to(tl.int64)
    m_tile = tl.program_id(0) // out_tiles  # neighbours share the rows of x
    tile = tl.program_id(0) - m_tile * out_tiles
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    here = r * out_tiles + tile
    offs_w = (here * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]) * k_tiles * BLOCK_K  # [1, BN]
    image, row, column = _split(m, HO, WO)
    live_ptr += here * k_tiles
    count = tl.load(count_ptr + here)
    k_tile = tl.load(live_ptr, mask=count > 0, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # a `for`, although its end is data: Triton pipelines the loads of no other loop. Never without a round,
    # else ptxas waits for each product before the next; an empty list's round multiplies zeros
    rounds = tl.maximum(count, 1)
    tl.assume(rounds > 0)
    for step in range(rounds):
        k0 = k_tile * BLOCK_K
        k_tile = tl.load(live_ptr + step + 1, mask=step + 1 < count, other=0)  # early: no load waits for it
        x = _gather(
            x_ptr + r * stride_xr,
            tl.where(count > 0, m < M, False),
            image,
            row,
            column,
            k0,
            IN,
            K,
            HI,
            WI,
            GEOMETRY,
            TRANSPOSED,
            ONE_TAP,
            BLOCK_K,
            UPCAST,
        )
        w = tl.load(packed_ptr + offs_w + (k0 + tl.arange(0, BLOCK_K)[:, None]))  # [BK, BN], padded
        if UPCAST:
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    offs_o = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + r * OUT + offs_o, mask=offs_o < OUT, other=0.0).to(tl.float32)
    y = y_ptr + (r * M + m) * OUT + offs_o
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M) & (offs_o < OUT))


@triton.jit
def _wgrad_kernel(
    dy_ptr,  # [R, M, N]
    x_ptr,  # [R, B, H, W, C]
    mask_ptr,  # [R, N, K / 8], K = (c, tap)
    slab_ptr,  # [chunks, R, N tiles, BLOCK_N, K tiles, BLOCK_K], K = (tap, c)
    M,
    N,
    C,
    K,
    steps,
    k_tiles,
    stride_dr,
    stride_xr,
    stride_mr,
    stride_mn,
    H: tl.constexpr,  # constants, because every step divides by them
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GEOMETRY: tl.constexpr,
    ONE_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    chunk, r = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n_tile = tl.program_id(0) // k_tiles
    k0 = (tl.program_id(0) - n_tile * k_tiles) * BLOCK_K
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BN, 1]
    offs_k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BK]
    tap = offs_k // C
    place = (offs_k - tap * C) * (GEOMETRY[0][0] * GEOMETRY[0][1]) + tap
    byte = tl.load(
        mask_ptr + r * stride_mr + offs_n.to(tl.int64) * stride_mn + (place >> 3),
        mask=(offs_n < N) & (offs_k < K),
        other=0,
    )
    if tl.max(((byte >> (place & 7).to(tl.uint8)) & 1).to(tl.int32)) == 0:
        return  # nobody reads a slab where the mask is 0
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for step in range(steps):
        m = (tl.program_id(1) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        dy = tl.load(
            dy_ptr + r * stride_dr + m[None, :].to(tl.int64) * N + offs_n,
            mask=(m[None, :] < M) & (offs_n < N),
            other=0.0,
        )  # [BN, BM]
        if UPCAST:
            dy = dy.to(tl.float32)
        image, row, column = _split(m[:, None], P, Q)
        x = _gather(
            x_ptr + r * stride_xr,
            m[:, None] < M,
            image,
            row,
            column,
            k0,
            C,
            K,
            H,
            W,
            GEOMETRY,
            False,
            ONE_TAP,
            BLOCK_K,
            UPCAST,
        )
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    slab = slab_ptr + (chunk * tl.num_programs(2) + r) * tl.num_programs(0) * BLOCK_N * BLOCK_K
    tl.store(slab + offs_n.to(tl.int64) * k_tiles * BLOCK_K + offs_k, acc)


@triton.jit
def _sum_kernel(
    slab_ptr,  # [chunks, R, slab_rows, slab_columns], K = (tap, c)
    mask_ptr,  # [R, N, K / 8], K = (c, tap)
    dw_ptr,  # [R, N, K]
    chunks,
    K,
    slab_rows,
    slab_columns,
    C,
    stride_mr,
    stride_mn,
    TAPS: tl.constexpr,
    BYTES: tl.constexpr,
):
    parts = tl.cdiv(K, 8 * BYTES)  # of a row of dw; rows are many on this axis alone
    n, r = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_byte = tl.program_id(0) % parts * BYTES + tl.arange(0, BYTES)[:, None]
    place = offs_byte * 8 + tl.arange(0, 8)[None, :]  # [BYTES, 8]
    byte = tl.load(mask_ptr + r * stride_mr + n * stride_mn + offs_byte, mask=offs_byte * 8 < K, other=0)
    keep = ((byte >> tl.arange(0, 8)[None, :].to(tl.uint8)) & 1) != 0
    c = place // TAPS
    slab = slab_ptr + (r * slab_rows + n) * slab_columns + (place - c * TAPS) * C + c
    acc = tl.zeros((BYTES, 8), dtype=tl.float32)
    for _ in range(chunks):
        acc += tl.load(slab, mask=keep, other=0.0)
        slab += tl.num_programs(1).to(tl.int64) * slab_rows * slab_columns
    dw = dw_ptr + (r * (tl.num_programs(0) // parts) + n) * K + place
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=place < K)


# Launching them


def _tile(kind: str, out: int, inner: int) -> Tile:
    """Of forward and dgrad: rows are pixels, columns some of the `out` channels, each tap has `inner`."""
    if kind == "ieee":  # no tensor cores: larger tiles spill
        return Tile(64, _power_of_2(out, 16, 64), 16, 4, 4)
    if inner % 32:  # each column of a tile has its own tap, and so every number its own address
        return Tile(64, _power_of_2(out, 16, 64), 16, 4, 3)
    n = _power_of_2(out, 16, 128)
    return Tile(128, n, 64 if inner % 64 == 0 and kind == "half" else 32, 8 if n == 128 else 4, 3)


def _wgrad_tile(kind: str, n: int, c: int, k: int) -> Tile:
    """Of wgrad: rows and columns of dw [n, k], summed over pixels."""
    n, k = _power_of_2(n, 16, 128), _power_of_2(k, 16, 64 if c % 64 == 0 else 32)
    if kind == "ieee":
        # with 3 stages ptxas 12.9 fits 128 x 64 into 80 registers for sm_80, by spilling 16 bytes
        return Tile(n, k, 16, 8, 4) if n * k >= 4096 else Tile(n, k, 16, 4, 3)
    return Tile(n, k, 32 if kind == "tf32" else 64, 4, 3)


def _chunks(tiles: int, m: int, depth: int) -> tuple[int, int]:
    """(chunks, steps of `depth` pixels in each) of wgrad: enough programs for a large GPU, but 512 pixels in
    each at least.

    Neither R nor the device counts, so that a replica's sums are the same wherever it trains.
    """
    steps = _ceil(m, depth)
    each = min(steps, max(_ceil(512, depth), _ceil(steps * tiles, 264)))
    return _ceil(steps, each), each


def _power_of_2(n: int, low: int, high: int) -> int:
    """The least power of two that is not below n, between low and high."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pixels(t: Tensor) -> Tensor:
    """[R, B, C, H, W] as [R, B, H, W, C], every replica without gaps; a copy if need be."""
    t = t.permute(0, 1, 3, 4, 2)
    return t if t[0].is_contiguous() else t.contiguous()


def _rows(t: Tensor) -> Tensor:
    """[R, N, ...] as [R, N, K] with neighbours along K."""
    t = t.flatten(2)
    return t if t.stride(2) == 1 else t.contiguous()


def launch_product(
    x: Tensor,
    w: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    g: Geometry,
    transposed: bool,
) -> Tensor:
    """Forward, or if transposed dgrad with dy for x; `size` is the height and width of the result."""
    _native.refuse_gradient(x=x, w=w, bias=bias)
    if len(parts := within_grid(len(x))) > 1:
        cut = ((x[s], w[s], mask[s], None if bias is None else bias[s]) for s in parts)
        found = [_pixels(launch_product(*some, size, g, transposed)) for some in cut]
        return torch.cat(found).permute(0, 1, 4, 2, 3)
    r, b, inner, *extent = x.shape
    n, c = w.shape[1:3]
    out, taps, m = c if transposed else n, g.kernel[0] * g.kernel[1], b * size[0] * size[1]
    name = kind(x.dtype, convolution=True)
    tile = _tile(name, out, inner)
    out_tiles, k_tiles = _ceil(out, tile.columns), _ceil(taps * inner, tile.depth)
    x, w, mask = _pixels(x), _rows(w), _rows(mask)
    packed = x.new_empty(r, out_tiles, tile.columns, k_tiles, tile.depth)
    occupied, live = x.new_empty(2, r, out_tiles, k_tiles, dtype=torch.int32)
    count = x.new_empty(r, out_tiles, dtype=torch.int32)
    y = x.new_empty(r, b, *size, out)
    with torch.cuda.device_of(x):
        _pack_kernel[out_tiles * k_tiles, r](
            w,
            mask,
            packed,
            occupied,
            out,
            inner,
            taps * inner,
            k_tiles,
            *w.stride()[:2],
            *mask.stride()[:2],
            TAPS=taps,
            TRANSPOSED=transposed,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            # 16 weights a thread; 32 of them spill
            num_warps=_power_of_2(tile.columns * tile.depth // 512, 4, 16),
        )
        _list_kernel[r * out_tiles,](occupied, live, count, k_tiles, BLOCK=_power_of_2(k_tiles, 16, LISTED))
        _conv_kernel[_ceil(m, tile.rows) * out_tiles, r](
            x,
            packed,
            live,
            count,
            None if bias is None else bias.contiguous(),
            y,
            m,
            out,
            inner,
            taps * inner,
            *extent,
            *size,
            out_tiles,
            k_tiles,
            x.stride(0),
            GEOMETRY=tuple(g),
            TRANSPOSED=transposed,
            ONE_TAP=inner % tile.depth == 0,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            PRECISION=precision(name),
            UPCAST=INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y.permute(0, 1, 4, 2, 3)


def launch_wgrad(dy: Tensor, x: Tensor, mask: Tensor, g: Geometry) -> Tensor:
    _native.refuse_gradient(dy=dy, x=x)
    if len(parts := within_grid(len(x))) > 1:
        return torch.cat([launch_wgrad(dy[s], x[s], mask[s], g) for s in parts])
    r, b, n, p, q = dy.shape
    c, taps = x.shape[2], g.kernel[0] * g.kernel[1]
    k, m, name = taps * c, b * p * q, kind(x.dtype, convolution=True)
    tile = _wgrad_tile(name, n, c, k)
    n_tiles, k_tiles = _ceil(n, tile.rows), _ceil(k, tile.columns)
    chunks, steps = _chunks(n_tiles * k_tiles, m, tile.depth)
    dy, x, mask = _pixels(dy), _pixels(x), _rows(mask)
    slab = x.new_empty(chunks, r, n_tiles * tile.rows, k_tiles * tile.columns, dtype=torch.float32)
    dw = x.new_empty(r, n, c, *g.kernel)
    bytes_ = _power_of_2(mask.shape[2], 1, 128)
    with torch.cuda.device_of(x):
        _wgrad_kernel[n_tiles * k_tiles, chunks, r](
            dy,
            x,
            mask,
            slab,
            m,
            n,
            c,
            k,
            steps,
            k_tiles,
            dy.stride(0),
            x.stride(0),
            *mask.stride()[:2],
            H=x.shape[2],  # of [R, B, H, W, C]
            W=x.shape[3],
            P=p,
            Q=q,
            GEOMETRY=tuple(g),
            ONE_TAP=c % tile.columns == 0,
            BLOCK_M=tile.depth,
            BLOCK_N=tile.rows,
            BLOCK_K=tile.columns,
            PRECISION=precision(name),
            UPCAST=INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _sum_kernel[_ceil(mask.shape[2], bytes_) * n, r](
            slab, mask, dw, chunks, k, *slab.shape[2:], c, *mask.stride()[:2], TAPS=taps, BYTES=bytes_
        )
    return dw


# Choosing


@dataclass(frozen=True)
class Choice:
    """What runs, and the seconds of all; none if the first call came inside a graph capture."""

    taken: str
    seconds: dict[str, float]


CALLS = 10  # in a row, of what is timed
CHOICES: dict[tuple[Any, ...], Choice] = {}


def explain() -> str:
    """What "auto" chose on CUDA and why, one line a choice. After CHOICES.clear() it times again."""
    lines = []
    for (which, device, dtype, name, *layouts, g), choice in CHOICES.items():
        a, strides_a, b, strides_b = (list(numbers) for numbers in layouts)
        times = ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in choice.seconds.items())
        why = times or "met inside a graph capture, where nothing can be timed"
        lines.append(
            f"{which} of {a} strides {strides_a} and {b} strides {strides_b}, {g}, "
            f"{dtype} {name} on {device}: {choice.taken} ({why})"
        )
    return "\n".join(lines) or "nothing was chosen yet; without CUDA the reference runs"


def _dispatch(
    kernels: str, which: str, a: Tensor, b: Tensor, g: Geometry, runs: dict[str, Callable[[], Tensor]]
) -> Tensor:
    """Run one of `runs` for the pass `which` over the tensors a and b: "triton", or the vendor's convolution
    with the replicas as groups of one call ("reference") or "apart"."""
    if not use_triton(kernels, a) or (kernels == "auto" and a.dtype not in DTYPES):
        return runs["reference"]()
    if a.dtype not in DTYPES:
        raise ValueError(f"expected fp32, fp16 or bf16 for Triton, got {a.dtype}")
    if kernels == "triton":
        return runs["triton"]()
    name = kind(a.dtype, convolution=True)
    key = (which, a.device, a.dtype, name, a.shape, a.stride(), b.shape, b.stride(), g)
    if not (key in CHOICES and CHOICES[key].seconds):
        CHOICES[key] = _measure(a.device, {k: v for k, v in runs.items() if k != "apart" or len(a) > 1})
    return runs[CHOICES[key].taken]()


def _measure(device: torch.device, runs: dict[str, Callable[[], Tensor]]) -> Choice:
    """Medians over 5 rounds of CALLS calls in a row, in a CUDA graph, which is how steps run; those that no
    graph can hold are launched from Python.

    One more round comes first. Inside a graph capture the first call takes the vendor's.
    """
    if torch.cuda.is_current_stream_capturing():
        return Choice("reference", {})
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.cuda.device(device):
        calls = {name: replayed(run, CALLS) for name, run in runs.items()}
        for _ in range(6):
            for name, several in calls.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                several()
                stop.record()
                stop.synchronize()
                seconds[name].append(start.elapsed_time(stop) / 1e3 / CALLS)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return Choice(min(medians, key=lambda name: medians[name]), medians)


# The passes


def forward(
    x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, g: Geometry, kernels: str = "auto"
) -> Tensor:
    """y."""
    runs = {
        "triton": lambda: launch_product(x, w, mask, bias, g.out(*x.shape[3:]), g, transposed=False),
        "reference": lambda: reference(x, w, mask, bias, g),
        "apart": lambda: apart(
            lambda r: reference(x[r], w[r], mask[r], None if bias is None else bias[r], g), len(w), x.device
        ),
    }
    return _dispatch(kernels, "forward", x, w, g, runs)


def dgrad(
    dy: Tensor, w: Tensor, mask: Tensor, size: Sequence[int], g: Geometry, kernels: str = "auto"
) -> Tensor:
    """dx for inputs of `size` (H, W)."""
    runs = {
        "triton": lambda: launch_product(dy, w, mask, None, size, g, transposed=True),
        "reference": lambda: reference_dgrad(dy, w, mask, size, g),
        "apart": lambda: apart(lambda r: reference_dgrad(dy[r], w[r], mask[r], size, g), len(w), dy.device),
    }
    return _dispatch(kernels, "dgrad", dy, w, g, runs)


def wgrad(dy: Tensor, x: Tensor, mask: Tensor, g: Geometry, kernels: str = "auto") -> Tensor:
    """dw."""
    runs = {
        "triton": lambda: launch_wgrad(dy, x, mask, g),
        "reference": lambda: reference_wgrad(dy, x, mask, g),
        "apart": lambda: apart(lambda r: reference_wgrad(dy[r], x[r], mask[r], g), len(x), dy.device),
    }
    return _dispatch(kernels, "wgrad", dy, x, g, runs)


# The operators


def masked_conv2d(
    x: Tensor,
    w: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    kernels: str = "auto",
) -> Tensor:
    """conv2d(x[r], w[r] * mask[r], bias[r]) of every replica r, [R, B, N, P, Q] stored channels-last.

    Differentiable in x, w and bias. `kernels`: "triton", "reference" (the vendor's convolution of the masked
    weights), or "auto": on CUDA the faster of the two, each pass by its own measurement, else the reference.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    g = geometry(w.shape[3:], stride, padding, dilation)
    _check(x, w, mask, bias, g)
    return _forward(x, w, mask, bias, list(chain(*g)), kernels)  # type: ignore[no-any-return]


def geometry(kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding, dilation)]
    if any(len(pair) != 2 or min(pair) < least for pair, least in zip(pairs, (1, 1, 0, 1), strict=True)):
        raise ValueError(
            "expected w[R, N, C, kh, kw] and ints or pairs, stride and dilation from 1, padding from 0; "
            f"got kernel, stride, padding and dilation {pairs}"
        )
    return Geometry(*pairs)


def _check(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, g: Geometry) -> None:
    tensors = [x, w, mask] + ([] if bias is None else [bias])
    got = ", ".join(f"{t.dtype}{list(t.shape)} on {t.device}" for t in tensors)
    r, n, c = w.shape[:3]
    shapes = [(r, n, c, *g.kernel), (r, n, _ceil(c * g.kernel[0] * g.kernel[1], 8)), (r, n)]
    if (
        x.ndim != 5
        or x.shape[0] != r
        or x.shape[2] != c
        or any(t.shape != shape for t, shape in zip(tensors[1:], shapes, strict=False))
        or 0 in x.shape
        or 0 in w.shape
    ):
        raise ValueError(
            "expected x[R, B, C, H, W], w[R, N, C, kh, kw], mask[R, N, ceil(C kh kw / 8)] and bias[R, N], "
            f"none of them empty; got {got}"
        )
    if mask.dtype != torch.uint8 or any(t.dtype != x.dtype for t in tensors if t is not mask):
        raise ValueError(f"expected a uint8 mask and x, w and bias of one dtype; got {got}")
    if any(t.device != x.device for t in tensors):
        raise ValueError(f"expected all on one device; got {got}")
    p, q = g.out(*x.shape[3:])
    if min(p, q) < 1:
        raise ValueError(f"expected a kernel no larger than the padded input; got {got} with {g}")
    if x.shape[1] * max(n * p * q, c * x.shape[3] * x.shape[4]) >= 2**31:
        raise ValueError(f"expected fewer than 2^31 numbers in x[r] and y[r]; got {got}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, mask, _, ctx.g, ctx.kernels = inputs
    ctx.save_for_backward(x, w, mask)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, mask = ctx.saved_tensors
    dx = _dgrad(dy, w, mask, x.shape[3:], ctx.g, ctx.kernels) if ctx.needs_input_grad[0] else None
    dw = _wgrad(dy, x, mask, ctx.g, ctx.kernels) if ctx.needs_input_grad[1] else None
    db = dy.sum((1, 3, 4)) if ctx.needs_input_grad[3] else None
    return dx, dw, None, db, None, None


@operator("masked_conv2d", _backward, _save)
def _forward(
    x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, g: Sequence[int], kernels: str
) -> Tensor:
    return forward(x, w, mask, bias, _pairs(g), kernels)


@operator("masked_conv2d_dgrad")
def _dgrad(
    dy: Tensor, w: Tensor, mask: Tensor, size: Sequence[int], g: Sequence[int], kernels: str
) -> Tensor:
    return dgrad(dy, w, mask, size, _pairs(g), kernels)


@operator("masked_conv2d_wgrad")
def _wgrad(dy: Tensor, x: Tensor, mask: Tensor, g: Sequence[int], kernels: str) -> Tensor:
    return wgrad(dy, x, mask, _pairs(g), kernels)


def _pairs(g: Sequence[int]) -> Geometry:
    """A geometry again, from the list of ints that an operator takes."""
    return Geometry(*zip(g[::2], g[1::2], strict=True))


@fake(_forward)
def _(x, w, mask, bias, g, kernels):
    p, q = _pairs(g).out(*x.shape[3:])
    return x.new_empty(*x.shape[:2], p, q, w.shape[1]).permute(0, 1, 4, 2, 3)


@fake(_dgrad)
def _(dy, w, mask, size, g, kernels):
    return dy.new_empty(*dy.shape[:2], *size, w.shape[2]).permute(0, 1, 4, 2, 3)


@fake(_wgrad)
def _(dy, x, mask, g, kernels):
    return x.new_empty(len(x), dy.shape[2], x.shape[2], *g[:2])
