r"""Inference with filters pruned in blocks:  y = act(conv2d(x, w) + b),  of w only the blocks that live.

    y[m, n] = act(b[n] + sum over live (i, j, c) of  x[p s + i d - pad, q s + j d - pad, c] w[n, i, j, c])

| name   | shape           | dtype            |                        Floor, s = itemsize:
| x      | [B, C, H, W]    | fp32, fp16, bf16 | channels-last          bytes = (L b^2 + |x| + |y| + N) s
| y      | [B, N, P, Q]    | as x             | channels-last                + 4 (L + 2 N / b + 1)
| bias   | [N]             | as x, or None    |                        FLOPs = 2 B P Q L b^2
| values | [L, b, b]       | as x             | the L live blocks, [n, c] each
| places | [L]             | int32            | their i 2^24 + j 2^16 + block of channels
| starts | [N / b + 1]     | int32            | where each block of filters begins its list there; the end
| order  | [N / b]         | int32            | block of filters of each list

The matrix of a convolution is [N, (i, j, c)], and m = (image, p, q) are the rows of what it meets: a block is
b filters by b channels at one tap (i, j), and those channels of a pixel lie side by side. b is 16, 32, 64 or
128; N, and C at every tap, are rounded up to blocks, with weights of 0. x in another layout is copied.

The live blocks of b filters are a list, as in block_linear. A live block is multiplied whole: NaN and
infinity in x pass all of its weights. Pruned blocks are not there, and filters without a live block give
act(b). Sums are in fp32, fp32 products in TF32 where torch's convolutions are; two runs give equal bits.

The account of C = N = 256, 3 x 3 on 14 x 14, B = 256, bf16, a tenth of blocks of 64, on an H100 (an H200 has
the same L2 cache): DRAM 52 MB, 17 us at 3.0 TB/s; L2 156 MB (x 84, w 46, y 26), 28 us at 5.5; 5.9 GFLOP, 8 us
at 700 TFLOP/s; dense 59, 100 us at 600. 1,568 programs of lists of 3.6 blocks in 6 rounds of two a
multiprocessor, each 4 steps of 202 instructions (153 registers, 2 x 3 x 24 KB in flight) and 2 us to find its
list and to write: 20-30 us beside L2's 28. Expected 35-45 us: 2.2-2.9x; goal 3x. One launch. (5.5 TB/s is a
guess; gpu_check measures it.)

On a CPU what a list meets is gathered into columns, for one product that is its b filters of y. Where about
half of the blocks live, or a fifth of those of 16, and in tiny layers, the vendor's dense convolution is as
fast or faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _choose, _native, _tiles
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._tiles import BLOCKS, DTYPES, GATHERED, SINGLY, Blocks, Tile, kind, written
from sparselth.kernels._triton import tl, triton
from sparselth.kernels.block_linear import HAS, BlockWeight
from sparselth.kernels.masked_conv2d import Geometry, Pair, geometry

LARGEST = 127  # taps down or across, for which `places` has room


# Rows are pixels of y; a step is at most a block deep.
# From large to small, for many pixels and for few; of large ones two programs share a multiprocessor of an
# H100. IEEE fp32 has no tensor cores, and larger tiles take too many registers for that.
TILES = {
    "half": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 32, 64, 4, 4),
        Tile(16, 16, 64, 1, 4),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 4, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(32, 32, 32, 4, 4),
        Tile(16, 16, 32, 1, 4),
    ),
    "ieee": (
        Tile(64, 64, 16, 4, 4),
        Tile(32, 32, 16, 4, 4),
        Tile(16, 16, 16, 1, 4),
    ),
}


@dataclass(frozen=True, eq=False)
class BlockFilters(Blocks):
    """w [N, C, kh, kw] by its live blocks."""

    @staticmethod
    def from_dense(weight: Tensor, mask: Tensor | None = None, block: int = 64) -> BlockFilters:
        """Of a weight [N, C, kh, kw] and a bool mask, True = kept; without a mask, what is not 0 is kept."""
        if weight.dim() != 4 or weight.dtype not in DTYPES or 0 in weight.shape:
            raise ValueError(
                "expected a weight [N, C, kh, kw] in fp32, fp16 or bf16, "
                f"got {weight.dtype} {list(weight.shape)}"
            )
        if block not in BLOCKS:
            raise ValueError(f"expected blocks of 16, 32, 64 or 128, got {block}")
        n, c, down, across = weight.shape
        if max(down, across) > LARGEST:
            raise ValueError(f"expected at most {LARGEST} x {LARGEST} taps, got {down} x {across}")
        mask = weight != 0 if mask is None else mask
        if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
            raise ValueError(
                f"expected a bool mask {list(weight.shape)} on {weight.device}, "
                f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
            )
        flat, kept = (F.pad(t.permute(0, 2, 3, 1), (0, -c % block)).flatten(1) for t in (weight, mask))
        blocks = BlockWeight.from_dense(flat, kept, block)
        wide = -(-c // block)
        tap, channel = blocks.places // wide, blocks.places % wide
        places = (tap // across << 24) + (tap % across << 16) + channel
        shape = n, c, down, across
        return BlockFilters(shape, blocks.values, places, blocks.starts, blocks.order, blocks.runs)

    @property
    def occupancy(self) -> float:
        """Live blocks of all blocks."""
        n, c, down, across = self.shape
        return self.places.numel() / (-(-n // self.block) * -(-c // self.block) * down * across)

    def to_dense(self) -> Tensor:
        return _dense(*self.tensors(), self.shape)


def _unpacked(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """i, j and the block of channels."""
    return places >> 24, places >> 16 & 0xFF, places & 0xFFFF


def _dense(values: Tensor, places: Tensor, starts: Tensor, order: Tensor, shape: Sequence[int]) -> Tensor:
    n, c, down, across = shape
    block, lists = values.shape[2], order.numel()
    rows = torch.repeat_interleave(order, starts.diff())
    i, j, channel = _unpacked(places)
    dense = values.new_zeros(lists, -(-c // block), down, across, block, block)
    dense[rows, channel, i, j] = values
    dense = dense.permute(0, 4, 1, 5, 2, 3).reshape(lists * block, -1, down, across)
    return dense[:n, :c].contiguous(memory_format=torch.channels_last)


def floor(
    x: Tensor, weight: BlockFilters, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1
) -> dict[str, int]:
    """Least bytes and FLOPs; and `l2_bytes`, what this kernel moves through the L2 cache with its tiles."""
    (n, c, *kernel), block, lists = weight.shape, weight.block, weight.order.numel()
    g = geometry(kernel, stride, padding, dilation)
    outs = g.out(*x.shape[2:])
    pixels, size, blocks = len(x) * outs[0] * outs[1], x.element_size(), weight.places.numel()
    tile, splits = choose(kind(x.dtype, convolution=True), block, pixels, lists, blocks)
    # of every live block what its tap sees of the images, once for each part of its filters, and its weights
    # once for each tile of pixels
    *taps, channel = _unpacked(weight.places.long().cpu())
    seen = (c - channel * block).clamp(max=block) * len(x)
    for tap, out, extent, step, pad, apart in zip(taps, outs, x.shape[2:], *g[1:], strict=True):
        place = torch.arange(out, device="cpu") * step - pad + tap[:, None] * apart
        seen = seen * ((place >= 0) & (place < extent)).sum(1)
    w = blocks * block**2 * -(-pixels // tile.rows)
    return {
        "bytes": weight.bytes() + (x.numel() + pixels * n + n) * size,
        "l2_bytes": (int(seen.sum()) * (block // min(block, tile.columns)) + w) * size
        + written(pixels * n, size, splits),
        "flops": 2 * pixels * weight.values.numel(),
    }


def _torch(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    order: Tensor,
    runs: Sequence[int],
    n: int,
    bias: Tensor | None,
    relu: bool,
    g: Geometry,
) -> Tensor:
    """Products of gathered columns in fp32: lists of one length together, as many pixels as a cache holds."""
    block, dtype, batch, lists = values.shape[2], x.dtype, len(x), order.numel()
    p, q = g.out(*x.shape[2:])
    (top, left), (across, down) = g.padding, g.stride[::-1]
    x = x.permute(0, 2, 3, 1).float()
    edges = (0, -x.shape[3] % block, left, left, top, top)
    x = F.pad(x, edges) if any(edges) else x.contiguous()
    _, h, wide, c = x.shape
    # runs of b channels as rows of a matrix: where the windows of y begin, and the way from there to a block
    pieces, pixels, blocks = x.view(-1, block), batch * p * q, places.numel()
    first = (
        torch.arange(batch, device="cpu")[:, None, None] * h + torch.arange(p, device="cpu")[:, None] * down
    )
    first = ((first * wide + torch.arange(q, device="cpu") * across) * (c // block)).view(1, -1, 1)
    i, j, channel = _unpacked(places.long())
    way = (i * (g.dilation[0] * wide) + j * g.dilation[1]) * (c // block) + channel
    w, order = values.mT.float(), order.long()
    if blocks * pixels * block <= GATHERED and blocks <= SINGLY * len(runs) // 2:
        columns = pieces.index_select(0, (way[:, None, None] + first).flatten()).view(blocks, pixels, block)
        rows = torch.repeat_interleave(order, starts.diff())
        y = x.new_zeros(lists, pixels, block).index_add_(0, rows, torch.bmm(columns, w)).transpose(0, 1)
        y = y.reshape(pixels, -1)
    else:
        y = x.new_empty(pixels, lists, block)
        row, at = 0, 0  # list, block
        for count, length in zip(runs[::2], runs[1::2], strict=True):
            if not length:
                y[:, order[row:]] = 0
                break
            depth = length * block
            most = max(1, GATHERED // (pixels * depth))  # lists at a time
            share = pixels if most > 1 else max(1, min(pixels, GATHERED // depth))
            for part in (min(most, count - done) for done in range(0, count, most)):
                end = at + part * length
                weights, ways = w[at:end].reshape(part, depth, block), way[at:end].view(part, 1, length)
                target = order[row : row + part]
                for begin in range(0, pixels, share):
                    some = slice(begin, begin + share)
                    index = (first[:, some] + ways).flatten()
                    columns = pieces.index_select(0, index).view(part, -1, depth)
                    if part == 1:
                        torch.mm(columns[0], weights[0], out=y[some, int(target)])
                    else:
                        y[some].index_copy_(1, target, torch.bmm(columns, weights).transpose(0, 1))
                row, at = row + part, end
    y = y.view(batch, p, q, -1)[..., :n]
    if bias is not None:
        y = y.add_(bias)
    y = y.relu_() if relu else y
    return y.to(dtype).contiguous().permute(0, 3, 1, 2)


@triton.jit
def _step(
    acc,
    t,
    place,
    rows_ptr,
    values_ptr,
    row,
    column,
    offs_w,
    blocks,
    C,
    H,
    W,
    GEOMETRY: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    CORES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc += x w^T for DEPTH channels of a block of the list; nothing is read where that is empty."""
    offs_d = tl.arange(0, DEPTH)
    down, across = (place >> 24) * GEOMETRY[3][0], (place >> 16 & 0xFF) * GEOMETRY[3][1]
    first = 0 if DEPTH == BLOCK else tl.multiple_of(t * DEPTH % BLOCK, DEPTH)
    i = t if DEPTH == BLOCK else t * DEPTH // BLOCK
    offs_c = tl.multiple_of((place & 0xFFFF) * BLOCK + first, DEPTH) + offs_d
    # what lies outside is negative: one comparison, where LLVM takes several through the stack
    h, w = row + down, column + across
    inside = ((h | w | (H - 1 - h) | (W - 1 - w)) >= 0)[:, None]
    live = tl.full((1, 1), 0, tl.int32) < blocks  # the interpreter of Triton 3.9 widens a lone `blocks > 0`
    if CORES:
        inside = inside & live
    if not EVEN_C:
        inside = inside & (offs_c < C)[None, :]
    way = (down * W + across) * C
    x = tl.load(rows_ptr[:, None] + (way + offs_c)[None, :], mask=inside, other=0.0)
    offs_w = offs_w + offs_d[:, None]
    w_ptrs = values_ptr + i * (BLOCK * BLOCK) + first + offs_w
    if CORES:
        w = tl.load(w_ptrs, mask=live, other=0.0)
    else:
        w = tl.load(w_ptrs)
    if UPCAST:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def _block_conv2d_kernel(
    x_ptr,  # [B, H, W, C]
    values_ptr,
    places_ptr,
    starts_ptr,
    order_ptr,
    bias_ptr,
    out_ptr,  # [M, N], or of every part of the lists one
    M,
    N,
    C,
    H,
    W,
    P,
    Q,
    lists,
    splits,
    GEOMETRY: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    CORES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = lists * PARTS
    pid = tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP)
    start = tl.load(starts_ptr + pid_n // PARTS)
    end = tl.load(starts_ptr + pid_n // PARTS + 1)
    filters = tl.load(order_ptr + pid_n // PARTS)
    if SPLIT:
        share = tl.cdiv(end - start, splits)
        start += tl.program_id(1) * share
        end = tl.minimum(start + share, end)
        out_ptr += tl.program_id(1).to(tl.int64) * M * N

    # the pixel where the window of each row begins, in the padding perhaps
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image = offs_m // (P * Q)
    pixel = offs_m - image * (P * Q)
    row = pixel // Q * GEOMETRY[1][0] - GEOMETRY[2][0]
    row = tl.where(offs_m < M, row, -(1 << 30))  # no tap comes back from there
    column = pixel % Q * GEOMETRY[1][1] - GEOMETRY[2][1]
    rows_ptr = x_ptr + ((image.to(tl.int64) * H + row) * W + column) * C

    part = pid_n % PARTS * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    offs_w = offs_n[None, :] * BLOCK
    values_ptr += start.to(tl.int64) * (BLOCK * BLOCK) + part * BLOCK
    places_ptr += start
    blocks = end - start
    STEPS: tl.constexpr = BLOCK // DEPTH
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    place = tl.load(places_ptr, mask=blocks > 0, other=0)
    steps = blocks * STEPS
    if CORES:
        # at least one step, of zeros: for a loop that may be left out, ptxas 12.8 makes each of its products
        # wait for the one before (C7515)
        steps = tl.maximum(steps, 1)
    if UPCAST:  # the interpreter of Triton 3.6 takes no loaded bound of a for loop
        t = 0
        while t < steps:
            acc = _step(
                acc,
                t,
                place,
                rows_ptr,
                values_ptr,
                row,
                column,
                offs_w,
                blocks,
                C,
                H,
                W,
                GEOMETRY,
                BLOCK,
                DEPTH,
                EVEN_C,
                PRECISION,
                CORES,
                UPCAST,
            )
            t += 1
            place = tl.load(places_ptr + t // STEPS, mask=t // STEPS < blocks, other=0)
    else:
        for t in range(steps):
            # a step ahead, or the pipeline would spend half of its stages on places
            ahead = tl.load(places_ptr + (t + 1) // STEPS, mask=(t + 1) // STEPS < blocks, other=0)
            acc = _step(
                acc,
                t,
                place,
                rows_ptr,
                values_ptr,
                row,
                column,
                offs_w,
                blocks,
                C,
                H,
                W,
                GEOMETRY,
                BLOCK,
                DEPTH,
                EVEN_C,
                PRECISION,
                CORES,
                UPCAST,
            )
            place = ahead
    first_n = filters.to(tl.int64) * BLOCK + part
    in_n = offs_n < (N - first_n).to(tl.int32)
    if not SPLIT:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + first_n + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if RELU:
            acc = tl.where(acc < 0, 0.0, acc)
    out_ptrs = out_ptr + first_n + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & in_n[None, :])


def choose(kind: str, block: int, pixels: int, lists: int, blocks: int) -> tuple[Tile, int]:
    """The tile of a product, and into how many parts each list is split."""
    return _tiles.choose([_within(tile, block) for tile in TILES[kind]], block, pixels, lists, blocks)


def _within(tile: Tile, block: int) -> Tile:
    """The tile with steps that end with a block."""
    return tile._replace(depth=min(block, tile.depth))


def launch(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    order: Tensor,
    n: int,
    bias: Tensor | None,
    relu: bool,
    g: Geometry,
    chosen: tuple[Tile, int] | None = None,
) -> Tensor:
    """y by Triton; `chosen` instead of what `choose` says."""
    (batch, c, h, w), block, lists = x.shape, values.shape[2], order.numel()
    p, q = g.out(h, w)
    pixels = batch * p * q
    if max(pixels, (h + sum(g.padding)) * w * c) >= 2**31 - 2**9:  # of y, and of an image: 32 bits wide
        raise ValueError(
            f"expected less than 2^31 pixels of y and numbers in an image, got {pixels} and {h * w * c}"
        )
    name, index = kind(x.dtype, convolution=True), (values, places, starts, order)
    tile, splits = chosen or choose(name, block, pixels, lists, places.numel())
    y = x.new_empty(batch, p, q, n)
    rest = {"C": c, "H": h, "W": w, "P": p, "Q": q, "GEOMETRY": tuple(g), "EVEN_C": c % block == 0}
    _tiles.launch(
        _block_conv2d_kernel,
        x.permute(0, 2, 3, 1).contiguous(),
        index,
        bias,
        relu,
        y.view(pixels, n),
        name,
        _within(tile, block),
        splits,
        **rest,
    )
    return y.permute(0, 3, 1, 2)


def block_conv2d(
    x: Tensor,
    weight: BlockFilters,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    relu: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """act(conv2d(x, w) + bias), channels-last; `relu` makes act the rectifier. Not differentiable.

    `kernels`: "triton", "torch" (products of gathered columns), "reference" (the dense convolution), or
    "auto": Triton on CUDA, else torch.
    """
    n, c, *kernel = weight.shape
    values = weight.values
    if x.dim() != 4 or x.shape[1] != c or x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"expected x [B, {c}, H, W] in {values.dtype} on {values.device}, "
            f"got {list(x.shape)} in {x.dtype} on {x.device}"
        )
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"expected bias [{n}] in {x.dtype} on {x.device}, "
            f"got {list(bias.shape)} in {bias.dtype} on {bias.device}"
        )
    g = geometry(kernel, stride, padding, dilation)
    if min(g.out(*x.shape[2:])) < 1:
        raise ValueError(f"expected a kernel no larger than the padded image, got {list(x.shape)} with {g}")
    flat = [v for pair in g for v in pair]
    index = weight.places, weight.starts, weight.order
    # the operator is for the compiler and for autograd, which it refuses; a call of it takes 50 us
    wanted = torch.compiler.is_compiling() or _native.wants_gradient(x, values, bias)
    run = _operator if wanted else _forward
    return run(x, values, *index, weight.runs, n, bias, relu, flat, kernels)


def _forward(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    order: Tensor,
    runs: Sequence[int],
    n: int,
    bias: Tensor | None,
    relu: bool,
    geometry: Sequence[int],
    kernels: str,
) -> Tensor:
    g = _geometry(geometry)
    if len(x) == 0:
        return _empty(x, n, g)
    backend = _choose.choose(kernels, HAS, x)
    if backend == "triton":
        return launch(x, values, places, starts, order, n, bias, relu, g)
    if backend == "reference":
        dense = _dense(values, places, starts, order, (n, x.shape[1], *g.kernel))
        y = F.conv2d(x, dense, bias, g.stride, g.padding, g.dilation)
        y = y.relu_() if relu else y
        return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return _torch(x, values, places, starts, order, runs, n, bias, relu, g)


_operator = operator("block_conv2d")(_forward)


@fake(_operator)
def _(x, values, places, starts, order, runs, n, bias, relu, geometry, kernels):
    return _empty(x, n, _geometry(geometry))


def _geometry(flat: Sequence[int]) -> Geometry:
    return Geometry(*zip(flat[::2], flat[1::2], strict=True))


def _empty(x: Tensor, n: int, g: Geometry) -> Tensor:
    p, q = g.out(*x.shape[2:])
    return x.new_empty(len(x), p, q, n).permute(0, 3, 1, 2)
