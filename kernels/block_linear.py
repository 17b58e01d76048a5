r"""Inference with block-sparse weights:  Y = act(X W^T + b),  of W only the blocks that hold a kept weight.

| name    | shape       | dtype            |              Floor, s = itemsize:
| x       | [B, K]      | fp32, fp16, bf16 | any strides  bytes = (L b^2 + B (K + N) + N) s
| y       | [B, N]      | as x             |                + 4 (L + 2 N / b + 1)
| bias    | [N]         | as x, or None    |              FLOPs = 2 B L b^2
| values  | [L, b, b]   | as x             | the L live blocks, [n, k] each
| places  | [L]         | int32            | their block columns
| starts  | [N / b + 1] | int32            | where the list of each block row begins in them; the end
| order   | [N / b]     | int32            | block row of each list

b is 16, 32, 64 or 128; N and K are rounded up to blocks, with weights of 0. The live blocks of a block row
are a list; _tiles has how lists are laid out and launched.

A live block is multiplied whole: NaN and infinity in x reach y through all of its weights, pruned or not.
Pruned blocks are not there, and nothing reaches y through them; only the reference, a dense product, has
zeros in their place. Sums are in fp32, fp32 products in TF32 where torch's own are; two runs give equal bits.

The account of N = K = B = 4096 in bf16, a tenth of the blocks, on an H100 (an H200 has the same L2 cache):

                   b = 64, tiles 256 x 64         b = 128, tiles 256 x 128
    DRAM           70 MB: 23 us at 3.0 TB/s       the same
    L2             303 MB (x 215, w 54, y 34)     194 MB (x 107, w 54, y 34)
    at 5.5 TB/s    55 us                          35 us (tiles of 128 x 128: 248 MB, 45 us)
    tensor cores   14 GFLOP: 20 us at 700 TFLOP/s; dense 137: 200 us
    a step of 32   105 instructions, 108 regs     109, 170 regs
    in flight      2 x 3 x 20 KB a multiprocessor 3 x 24 KB
    expected       55-60 us: 3.4-3.6x, goal 4x    35-40 us: 5-5.7x, goal 5x; one launch

L2 bounds both: no tile lowers what is read of x, B b a live block. Random block rows share too few columns to
go in pairs: of two, 19 % of the columns live in either, 20 % counted singly. (5.5 TB/s is a guess; gpu_check
measures it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native, _tiles
from sparselth.kernels._choose import choose
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._tiles import BLOCKS, DTYPES, GATHERED, SINGLY, Blocks, Tile, kind, laid, written
from sparselth.kernels._triton import tl, triton

HAS = ("triton", "torch", "reference")

# From large to small. A block of x comes from the L2 cache once for every live block, its weights once for
# every tile of the batch, and that bounds large batches; hence 256 rows. Beside 128 columns they take a
# multiprocessor of an H100 for themselves; of the other large ones two share it, and one computes while the
# other finds its list or writes. 16 deep in IEEE fp32, which spills beyond.
TILES = {
    "half": (
        Tile(256, 128, 32, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(256, 64, 32, 8, 4),
        Tile(128, 64, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 32, 128, 4, 3),
        Tile(16, 16, 128, 1, 4),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 4, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(32, 32, 64, 4, 3),
        Tile(16, 16, 64, 1, 4),
    ),
    "ieee": (
        Tile(128, 64, 16, 8, 4),
        Tile(64, 64, 16, 4, 4),
        Tile(32, 32, 32, 4, 4),
        Tile(16, 16, 32, 1, 4),
    ),
}


@dataclass(frozen=True, eq=False)
class BlockWeight(Blocks):
    """W [N, K] by its live blocks; `places` are the columns."""

    @staticmethod
    def from_dense(weight: Tensor, mask: Tensor | None = None, block: int = 64) -> BlockWeight:
        """Of a weight [N, K] and a bool mask, True = kept; without a mask, what is not 0 is kept."""
        if weight.dim() != 2 or weight.dtype not in DTYPES or 0 in weight.shape:
            raise ValueError(
                f"expected a weight [N, K] in fp32, fp16 or bf16, got {weight.dtype} {list(weight.shape)}"
            )
        if block not in BLOCKS:
            raise ValueError(f"expected blocks of 16, 32, 64 or 128, got {block}")
        mask = weight != 0 if mask is None else mask
        if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
            raise ValueError(
                f"expected a bool mask {list(weight.shape)} on {weight.device}, "
                f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
            )
        kept, blocks = (_blocks(t, block) for t in (mask, torch.where(mask, weight, 0)))
        live = kept.flatten(2).any(2)
        lengths, order = live.sum(1).sort(descending=True, stable=True)
        place, columns = live[order].nonzero().unbind(1)
        values = blocks[order[place], columns]
        starts = F.pad(lengths.cumsum(0), (1, 0))
        runs = torch.stack(torch.unique_consecutive(lengths, return_counts=True)).flip(0)
        return BlockWeight(
            (weight.shape[0], weight.shape[1]),
            laid(values),
            columns.int(),
            starts.int(),
            order.int(),
            tuple(runs.t().flatten().tolist()),
        )

    @property
    def occupancy(self) -> float:
        """Live blocks of all blocks."""
        n, k = (-(-size // self.block) for size in self.shape)
        return self.places.numel() / (n * k)

    def to_dense(self) -> Tensor:
        return _dense(*self.tensors(), self.shape)


def _blocks(t: Tensor, block: int) -> Tensor:
    """[N, K] as [rows, columns, b, b] of blocks."""
    n, k = t.shape
    if n % block or k % block:
        t = F.pad(t, (0, -k % block, 0, -n % block))
    return t.reshape(-(-n // block), block, -(-k // block), block).transpose(1, 2)


def _dense(values: Tensor, columns: Tensor, starts: Tensor, order: Tensor, shape: Sequence[int]) -> Tensor:
    (n, k), block = shape, values.shape[2]
    rows = torch.repeat_interleave(order, starts.diff())
    dense = values.new_zeros(order.numel(), -(-k // block), block, block)
    dense[rows, columns] = values
    return dense.transpose(1, 2).reshape(order.numel() * block, -1)[:n, :k]


def floor(weight: BlockWeight, batch: int) -> dict[str, int]:
    """Least bytes and FLOPs; and `l2_bytes`, what this kernel moves through the L2 cache with its tiles."""
    (n, k), block, lists = weight.shape, weight.block, weight.order.numel()
    size, blocks = weight.values.element_size(), weight.places.numel()
    tile, splits = _tiles.choose(TILES[kind(weight.values.dtype)], block, batch, lists, blocks)
    # of each live block the batch once for each part of its rows, its weights once for each tile of the batch
    inside = int((k - weight.places.long() * block).clamp(max=block).sum())
    x = batch * inside * (block // min(block, tile.columns))
    w = blocks * block**2 * -(-batch // tile.rows)
    return {
        "bytes": weight.bytes() + (batch * (n + k) + n) * size,
        "l2_bytes": (x + w) * size + written(batch * n, size, splits),
        "flops": 2 * batch * weight.values.numel(),
    }


def _torch(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    order: Tensor,
    runs: Sequence[int],
    n: int,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """Batched products in fp32: of the lists of one length, or of all blocks where there are few."""
    block, dtype, batch, lists = values.shape[2], x.dtype, x.shape[0], order.numel()
    x = F.pad(x, (0, -x.shape[1] % block)) if x.shape[1] % block else x
    x = x.float().reshape(batch, -1, block)
    w = values.mT
    if columns.numel() * batch * block <= GATHERED and columns.numel() <= SINGLY * len(runs) // 2:
        products = torch.bmm(x.index_select(1, columns).transpose(0, 1), w.float())
        rows = torch.repeat_interleave(order, starts.diff())
        y = x.new_zeros(lists, batch, block).index_add_(0, rows, products).transpose(0, 1)
    else:
        sums = x.new_empty(lists, batch, block)
        first, i = 0, 0  # list, block
        for count, length in zip(runs[::2], runs[1::2], strict=True):
            depth = length * block
            most = max(1, GATHERED // max(1, batch * depth))
            for part in (min(most, count - done) for done in range(0, count, most)):
                end = i + part * length
                inputs = x.index_select(1, columns[i:end]).view(batch, part, depth).transpose(0, 1)
                weights = w[i:end].float().reshape(part, depth, block)
                torch.bmm(inputs, weights, out=sums[first : first + part])
                first, i = first + part, end
        y = x.new_empty(batch, lists, block).index_copy_(1, order.long(), sums.transpose(0, 1))
    y = y.reshape(batch, -1)[:, :n]
    if bias is not None:
        y = y + bias
    return (y.relu() if relu else y).to(dtype).contiguous()


@triton.jit
def _columns(columns_ptr, t, count, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Block columns that step t of a list of `count` weights a row needs: one, or [DEPTH]."""
    if DEPTH > BLOCK:
        offs = t * DEPTH + tl.arange(0, DEPTH)
    else:
        offs = t * DEPTH
    return tl.load(columns_ptr + offs // BLOCK, mask=offs < count, other=0)


@triton.jit
def _step(
    acc,
    t,
    columns,
    x_ptr,
    values_ptr,
    offs_x,
    offs_w,
    in_b,
    K,
    count,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CORES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc += x w^T for DEPTH of the list's weights; nothing is read where the list is empty."""
    offs_d = tl.arange(0, DEPTH)
    if DEPTH > BLOCK:  # several blocks, or what is left of them
        live = t * DEPTH + offs_d < count
        offs_k = columns * BLOCK + offs_d % BLOCK
        offs_w = offs_w + (offs_d // BLOCK * (BLOCK * BLOCK) + offs_d % BLOCK)[:, None]
        w = tl.load(values_ptr + t * (DEPTH * BLOCK) + offs_w, mask=live[:, None], other=0.0)
        in_x = in_b[:, None] & live[None, :]
    else:
        first = 0 if DEPTH == BLOCK else tl.multiple_of(t * DEPTH % BLOCK, DEPTH)
        i = t if DEPTH == BLOCK else t * DEPTH // BLOCK
        offs_k = tl.multiple_of(columns * BLOCK + first, DEPTH) + offs_d
        offs_w = offs_w + offs_d[:, None]
        w_ptrs = values_ptr + i * (BLOCK * BLOCK) + first + offs_w
        if CORES:
            some = tl.full((1, 1), 0, tl.int32) < count  # the interpreter of Triton 3.9 widens `count > 0`
            w = tl.load(w_ptrs, mask=some, other=0.0)
            in_x = in_b[:, None] & some
        else:
            w = tl.load(w_ptrs)
            in_x = in_b[:, None]
    if not EVEN_K:
        in_x = in_x & (offs_k < K)[None, :]
    x = tl.load(x_ptr + (offs_x + offs_k[None, :]), mask=in_x, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def _block_linear_kernel(
    x_ptr,
    values_ptr,
    columns_ptr,
    starts_ptr,
    order_ptr,
    bias_ptr,
    out_ptr,
    B,
    N,
    K,
    lists,
    splits,
    stride_xb,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    CORES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    tiles_b = tl.cdiv(B, BLOCK_M)
    tiles_n = lists * PARTS
    pid = tl.program_id(0)
    pid_b, pid_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_b, tiles_n, GROUP)
    first_b = pid_b.to(tl.int64) * BLOCK_M
    start = tl.load(starts_ptr + pid_n // PARTS)
    end = tl.load(starts_ptr + pid_n // PARTS + 1)
    row = tl.load(order_ptr + pid_n // PARTS)
    if SPLIT:
        share = tl.cdiv(end - start, splits)
        start += tl.program_id(1) * share
        end = tl.minimum(start + share, end)
        out_ptr += tl.program_id(1).to(tl.int64) * B * N
    offs_b = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    in_b = offs_b < (B - first_b).to(tl.int32)

    part = pid_n % PARTS * BLOCK_N
    x_ptr += first_b * stride_xb
    values_ptr += start.to(tl.int64) * (BLOCK * BLOCK) + part * BLOCK
    columns_ptr += start
    offs_x = offs_b[:, None] * stride_xb
    offs_w = offs_n[None, :] * BLOCK
    count = (end - start) * BLOCK
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    columns = _columns(columns_ptr, 0, count, BLOCK, DEPTH)
    steps = tl.cdiv(count, DEPTH)
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
                columns,
                x_ptr,
                values_ptr,
                offs_x,
                offs_w,
                in_b,
                K,
                count,
                BLOCK,
                DEPTH,
                EVEN_K,
                PRECISION,
                CORES,
                UPCAST,
            )
            t += 1
            columns = _columns(columns_ptr, t, count, BLOCK, DEPTH)
    else:
        for t in range(steps):
            # a step ahead, or the pipeline would spend half of its stages on columns
            ahead = _columns(columns_ptr, t + 1, count, BLOCK, DEPTH)
            acc = _step(
                acc,
                t,
                columns,
                x_ptr,
                values_ptr,
                offs_x,
                offs_w,
                in_b,
                K,
                count,
                BLOCK,
                DEPTH,
                EVEN_K,
                PRECISION,
                CORES,
                UPCAST,
            )
            columns = ahead
    first_n = row.to(tl.int64) * BLOCK + part
    in_n = offs_n < (N - first_n).to(tl.int32)
    if not SPLIT:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + first_n + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if RELU:
            acc = tl.where(acc < 0, 0.0, acc)
    out_ptrs = out_ptr + first_b * N + first_n + offs_b.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_b[:, None] & in_n[None, :])


def launch(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    order: Tensor,
    n: int,
    bias: Tensor | None,
    relu: bool,
    chosen: tuple[Tile, int] | None = None,
) -> Tensor:
    """Y by Triton; `chosen` instead of what `choose` says."""
    (batch, k), block, lists = x.shape, values.shape[2], order.numel()
    x = x if x.stride(1) == 1 else x.contiguous()
    if (batch > 1 and x.stride(0) >= 2**23) or k * block >= 2**31:  # offsets are 32 bits wide
        raise ValueError(f"expected rows of x less than 2^23 numbers apart, got {x.stride(0)} and K = {k}")
    name, index = kind(x.dtype), (values, columns, starts, order)
    tile, splits = chosen or _tiles.choose(TILES[name], block, batch, lists, columns.numel())
    y = x.new_empty(batch, n)
    rest = {"K": k, "stride_xb": x.stride(0), "EVEN_K": k % block == 0}
    _tiles.launch(_block_linear_kernel, x, index, bias, relu, y, name, tile, splits, **rest)
    return y


def block_linear(
    x: Tensor, weight: BlockWeight, bias: Tensor | None = None, relu: bool = False, kernels: str = "auto"
) -> Tensor:
    """act(x W^T + bias) as [B, N]; `relu` makes act the rectifier. Not differentiable.

    `kernels`: "triton", "torch" (batched products), "reference" (the dense product), or "auto": Triton on
    CUDA, else torch.
    """
    n, k = weight.shape
    values = weight.values
    if x.dim() != 2 or x.shape[1] != k or x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"expected x [B, {k}] in {values.dtype} on {values.device}, "
            f"got {list(x.shape)} in {x.dtype} on {x.device}"
        )
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"expected bias [{n}] in {x.dtype} on {x.device}, "
            f"got {list(bias.shape)} in {bias.dtype} on {bias.device}"
        )
    index = weight.places, weight.starts, weight.order
    # the operator is for the compiler and for autograd, which it refuses; a call of it takes 50 us
    wanted = torch.compiler.is_compiling() or _native.wants_gradient(x, values, bias)
    run = _operator if wanted else _forward
    return run(x, values, *index, weight.runs, n, bias, relu, kernels)


def _forward(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    order: Tensor,
    runs: Sequence[int],
    n: int,
    bias: Tensor | None,
    relu: bool,
    kernels: str,
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    backend = choose(kernels, HAS, x)
    if backend == "triton":
        return launch(x, values, columns, starts, order, n, bias, relu)
    if backend == "reference":
        dense = _dense(values, columns, starts, order, (n, x.shape[1]))
        y = F.linear(x, dense, bias)
        return y.relu_() if relu else y
    return _torch(x, values, columns, starts, order, runs, n, bias, relu)


_operator = operator("block_linear")(_forward)


@fake(_operator)
def _(x, values, columns, starts, order, runs, n, bias, relu, kernels):
    return x.new_empty(x.shape[0], n)
