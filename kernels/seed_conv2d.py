r"""Convolution of a strong ticket: filters that nobody stores, under a mask of one bit a weight.

    Y[b, n, i, j] = b[n] + sum_{c, u, v} W[n, c, u, v] X[b, c, i t + u - p, j t + v - p]        0 outside of X
    W = M v, v = s or -s by the hash of (n, column), column = (c kh + u) kw + v
    dX = the transposed convolution of dY with W,  dS[n, c, u, v] = v[n, c, u, v] dW[n, c, u, v],  db = sum dY

| name     | shape               | dtype                                 Floor, t = itemsize, P = B OH OW:
| x, dx    | [B, C, H, W]        | fp32, fp16, bf16; any strides         bytes = N ceil(K / 8) + t (|x| + |y|)
| bits     | [N, ceil(K / 8)]    | uint8: M packed, K = C kh kw          FLOPs = 2 P N K
| bias, db | [N]                 | as x, or None
| s, ds    | [N, C, kh, kw]      | fp32, or as x; scores
| y, dy    | [B, N, OH, OW]      | as x

The filters are rows of `seed_linear`'s W, and what it says of signs, scores and zeros holds here.

C on a CPU, fp32: where all of y are LUT_BATCH places or fewer, its product of these columns; else filters
are made a few at a time in the cache, for torch's convolutions. That is 1/32 of the memory, and no faster
than dense.

Triton: an implicit product Y = W columns(X), whose columns are gathered where they are needed, two bytes at
a time in 16 bits; there the weights are made as `seed_linear` makes them, in the registers of a tensor
core's left operand. 3 x 3 filters in bf16, sm_90 by Triton 3.6: 516 instructions a warp for 64 weights and
16 gathered numbers a thread, most of them addresses; 209 registers. Neither tuned nor measured: it saves
memory, and no goal of speed hangs on it. Gradients write columns out, PLACES numbers at a time, for
`seed_linear`'s kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from sparselth.kernels import hash_weights
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._tiles import Tile, kind, precision
from sparselth.kernels._triton import INTERPRET, tl, triton
from sparselth.kernels.hash_weights import Keys, row_keys, word
from sparselth.kernels.seed_linear import (
    LAW,
    LUT_BATCH,
    ROWS,
    WARPS,
    SeedWeight,
    _backend,
    _fields,
    _left,
    _numbers,
    _words,
    dense,
    launch_ds,
    launch_product,
    native_linear,
    tiles,
    wide,
)

PLACES = 1 << 26  # numbers of columns that gradients write out at a time
TILES = {  # filters, places, columns at a time; of more places in 16 bits their addresses would spill
    "half": Tile(ROWS, 32, 128, WARPS, 2),
    "tf32": Tile(64, 64, 32, 4, 2),
    "ieee": Tile(32, 64, 32, 4, 2),
}


def sizes(x: Tensor, shape: list[int], stride: int, padding: int) -> tuple[int, int]:
    """OH and OW."""
    down, across = ((x.shape[2 + i] + 2 * padding - shape[2 + i]) // stride + 1 for i in (0, 1))
    return down, across


def floor(
    shape: tuple[int, ...], batch: int, size: tuple[int, int], out: tuple[int, int], itemsize: int
) -> dict[str, int]:
    """Bytes and FLOPs of y, for images of `size` and results of `out`."""
    n, k = hash_weights.matrix(shape)
    numbers = batch * (shape[1] * math.prod(size) + n * math.prod(out))
    return {"bytes": n * -(-k // 8) + itemsize * numbers, "flops": 2 * batch * math.prod(out) * n * k}


def reference(
    x: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
) -> Tensor:
    w = dense(keys, s, bits, shape[0], math.prod(shape[1:]), x).view(shape)
    return F.conv2d(wide(x), w, None if bias is None else wide(bias), stride, padding).to(x.dtype)


def reference_dx(
    dy: Tensor,
    bits: Tensor,
    size: list[int],
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
) -> Tensor:
    w = dense(keys, s, bits, shape[0], math.prod(shape[1:]), dy).view(shape)
    dx: Tensor = grad.conv2d_input(tuple(size), w, wide(dy), stride, padding)
    return dx.to(dy.dtype)


def reference_ds(
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    v = dense(keys, s, None, shape[0], math.prod(shape[1:]), x).view(shape)
    dw: Tensor = grad.conv2d_weight(wide(x), tuple(shape), wide(dy), stride, padding)
    return (dw * v).to(dtype)


# C


def native(
    x: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
) -> Tensor:
    x, bits, (n, *_), out = x.detach(), bits.contiguous(), shape, sizes(x, shape, stride, padding)
    places = len(x) * math.prod(out)
    if places <= LUT_BATCH:
        columns = F.unfold(x, tuple(shape[2:]), padding=padding, stride=stride).mT
        y = native_linear(columns.reshape(places, -1), bits, bias, keys, s)
        return y.view(len(x), -1, n).mT.contiguous().view(len(x), n, *out)
    y = torch.empty(len(x), n, *out, dtype=torch.float32, device="cpu")
    for first, end, w in _made(bits, shape, keys, s):
        some = None if bias is None else bias.detach()[first:end]
        y[:, first:end] = F.conv2d(x, w, some, stride, padding)
    return y


def native_dx(
    dy: Tensor,
    bits: Tensor,
    size: list[int],
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
) -> Tensor:
    dx = torch.zeros(size, dtype=torch.float32, device="cpu")
    for first, end, w in _made(bits.contiguous(), shape, keys, s):
        dx += grad.conv2d_input(tuple(size), w, dy.detach()[:, first:end], stride, padding)
    return dx


def native_ds(
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    ds: Tensor = grad.conv2d_weight(x.detach(), tuple(shape), dy.detach(), stride, padding).contiguous()
    hash_weights.fill(ds.view(shape[0], -1), Keys(*keys), LAW, s, multiply=True)
    return ds.to(dtype)


def _made(bits: Tensor, shape: list[int], keys: list[int], s: float) -> Iterator[tuple[int, int, Tensor]]:
    """Filters first to end - 1, which the next ones overwrite."""
    n, k = shape[0], math.prod(shape[1:])
    cut = tiles(n, k)
    some = torch.empty(cut[0][1], k, dtype=torch.float32, device="cpu")
    for first, end in cut:
        w = some[: end - first]
        hash_weights.fill(w, Keys(*keys), LAW, s, first, bits=bits[first:end])
        yield first, end, w.view(-1, *shape[1:])


# Triton


@triton.jit
def _places(first, P, OH, OW, C, H, W, stride, padding, BLOCK_P: tl.constexpr):
    """Of places of y: which there are, image and place within it, and where the top left corner lies in x."""
    p = first + tl.arange(0, BLOCK_P)
    inside = p < P
    b, place = p // (OH * OW), p % (OH * OW)
    top, left = place // OW * stride - padding, place % OW * stride - padding
    corner = b.to(tl.int64) * C * H * W + top * W + left
    return inside, b, place, top, left, corner


@triton.jit
def _columns(x_ptr, column, K, H, W, inside, top, left, corner, KH: tl.constexpr, KW: tl.constexpr):
    """[columns, places] of x, 0 outside of images."""
    tap = column % (KH * KW)
    down, across = tap // KW, tap % KW
    rows, across_x = top[None, :] + down[:, None], left[None, :] + across[:, None]
    there = (rows >= 0) & (rows < H) & (across_x >= 0) & (across_x < W)
    there &= inside[None, :] & (column < K)[:, None]
    offs = (column // (KH * KW)).to(tl.int64) * H * W + down * W + across
    return tl.load(x_ptr + corner[None, :] + offs[:, None], mask=there, other=0.0)


@triton.jit
def _store(acc, bias_ptr, out_ptr, row, N, inside, b, place, OH, OW, scale, HAS_BIAS: tl.constexpr):
    """acc [rows, places], whose weights were 2, to y."""
    acc *= scale * 0.5
    in_n = row < N
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row, mask=in_n, other=0.0).to(tl.float32)[:, None]
    plane = (b.to(tl.int64) * N)[None, :] + row[:, None]
    out_ptrs = out_ptr + plane * (OH * OW) + place[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3"])
def _half_kernel(
    x_ptr,
    words_ptr,
    bias_ptr,
    out_ptr,
    P,
    N,
    C,
    H,
    W,
    OH,
    OW,
    K,
    words,
    stride,
    padding,
    k0,
    k1,
    k2,
    k3,
    scale,
    HAS_BIAS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """128 filters at BLOCK_P places, 16-bit x; as seed_linear's, with gathered columns."""
    blocks = (N + 127) // 128
    block, first = tl.program_id(0) % blocks, tl.program_id(0) // blocks * BLOCK_P
    inside, b, place, top, left, corner = _places(first, P, OH, OW, C, H, W, stride, padding, BLOCK_P)
    offs_l = tl.arange(0, 128)  # in the order of `_left`
    row = block * 128 + offs_l // 8 % 8 * 16 + offs_l // 64 * 8 + offs_l % 8
    p, q = row_keys(row.to(tl.uint32), k0, k1, k2, k3)
    offs_w = tl.arange(0, 4)
    offs_c = offs_l // 2 % 4 * 32 + offs_l // 16 * 2 + offs_l // 8 % 2 + offs_l % 2 * 16
    words_ptrs = words_ptr + row.to(tl.int64)[:, None] * words + offs_w[None, :]
    acc = tl.zeros((128, BLOCK_P), tl.float32)
    tl.assume(K > 0)
    for c in range(0, K, 128):
        counter = c // 32 + offs_w
        mask = tl.load(words_ptrs + c // 32, mask=(row < N)[:, None] & (counter < words)[None, :], other=0)
        signs = word(counter.to(tl.uint32)[None, :], p[:, None], q[:, None])
        even, odd = _fields(mask.to(tl.uint32, bitcast=True), signs)
        w = _left(even, odd, x_ptr.dtype.element_ty, INTERPRET)
        x = _columns(x_ptr, c + offs_c, K, H, W, inside, top, left, corner, KH, KW)
        if INTERPRET:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc)
    row = block * 128 + tl.arange(0, 128)
    _store(acc, bias_ptr, out_ptr, row, N, inside, b, place, OH, OW, scale, HAS_BIAS)


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3"])
def _single_kernel(
    x_ptr,
    words_ptr,
    bias_ptr,
    out_ptr,
    P,
    N,
    C,
    H,
    W,
    OH,
    OW,
    K,
    words,
    stride,
    padding,
    k0,
    k1,
    k2,
    k3,
    scale,
    HAS_BIAS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N filters at BLOCK_P places, fp32."""
    blocks = (N + BLOCK_N - 1) // BLOCK_N
    block, first = tl.program_id(0) % blocks, tl.program_id(0) // blocks * BLOCK_P
    inside, b, place, top, left, corner = _places(first, P, OH, OW, C, H, W, stride, padding, BLOCK_P)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    p, q = row_keys(row.to(tl.uint32), k0, k1, k2, k3)
    acc = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    tl.assume(K > 0)
    for c in range(0, K, BLOCK_C):
        counter = c // 32 + tl.arange(0, BLOCK_C // 32)
        places = words_ptr + row.to(tl.int64)[:, None] * words + counter[None, :]
        mask = tl.load(places, mask=(row < N)[:, None] & (counter < words)[None, :], other=0)
        signs = word(counter.to(tl.uint32)[None, :], p[:, None], q[:, None])
        w = _numbers(mask.to(tl.uint32, bitcast=True), signs, x_ptr.dtype.element_ty)
        column = c + tl.arange(0, BLOCK_C)
        x = _columns(x_ptr, column, K, H, W, inside, top, left, corner, KH, KW)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    _store(acc, bias_ptr, out_ptr, row, N, inside, b, place, OH, OW, scale, HAS_BIAS)


def launch(
    x: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
) -> Tensor:
    x, words, bias = x.contiguous(), _words(bits), None if bias is None else bias.contiguous()
    (batch, c, h, w), out, name = x.shape, sizes(x, shape, stride, padding), kind(x.dtype, convolution=True)
    y, places, k = x.new_empty(batch, shape[0], *out), batch * math.prod(out), math.prod(shape[1:])
    if places >= 2**31 - 64 or c * h * w >= 2**31:
        raise ValueError(f"expected less than 2^31 places, and numbers an image; got x{list(x.shape)}")
    tile, half = TILES[name], name == "half"
    kernel: Any = _half_kernel if half else _single_kernel
    own: dict[str, Any] = {"INTERPRET": INTERPRET}
    if not half:
        own = {"BLOCK_N": tile.rows, "BLOCK_C": tile.depth, "PRECISION": precision(name)}
    with torch.cuda.device_of(x):
        kernel[(-(-shape[0] // tile.rows) * -(-places // tile.columns),)](
            x,
            words,
            bias,
            y,
            places,
            shape[0],
            c,
            h,
            w,
            *out,
            k,
            words.shape[1],
            stride,
            padding,
            *Keys(*keys).signed(),
            s,
            HAS_BIAS=bias is not None,
            KH=shape[2],
            KW=shape[3],
            BLOCK_P=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **own,
        )
    return y


def _images(batch: int, k: int, out: tuple[int, ...]) -> Iterator[slice]:
    """As many at a time as PLACES numbers of columns are."""
    step = max(1, PLACES // (k * math.prod(out)))
    return (slice(first, first + step) for first in range(0, batch, step))


def launch_dx(
    dy: Tensor,
    bits: Tensor,
    size: list[int],
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
) -> Tensor:
    dx, k = dy.new_empty(size), math.prod(shape[1:])
    for some in _images(len(dy), k, tuple(dy.shape[2:])):
        rows = dy[some].flatten(2).mT.reshape(-1, shape[0])
        columns = launch_product(rows, bits, None, k, keys, s, True, torch.float32)  # which are added up
        columns = columns.view(len(dy[some]), -1, k).mT
        dx[some] = F.fold(columns, tuple(size[2:]), tuple(shape[2:]), padding=padding, stride=stride)
    return dx


def launch_scores(
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    k, ds = math.prod(shape[1:]), None
    for some in _images(len(dy), k, tuple(dy.shape[2:])):
        rows = dy[some].flatten(2).mT.reshape(-1, shape[0])
        columns = F.unfold(x[some], tuple(shape[2:]), padding=padding, stride=stride).mT.reshape(-1, k)
        part = launch_ds(rows, columns, keys, s, torch.float32)
        ds = part if ds is None else ds.add_(part)
    assert ds is not None
    return ds.view(shape).to(dtype)


# The op


def seed_conv2d(
    x: Tensor,
    w: SeedWeight,
    bias: Tensor | None = None,
    scores: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    kernels: str = "auto",
) -> Tensor:
    """The convolution of x [B, C, H, W] with frozen filters under their mask: [B, N, OH, OW].

    Differentiable in x, bias and scores [N, C, kh, kw], as `seed_linear`. `kernels`: "triton", "native" (C,
    fp32 on a CPU), "reference" (torch), or "auto", the first that is there.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    shape = list(w.shape)
    tensors = {"x": x, "bits": w.bits, "bias": bias, "scores": scores}
    present = {name: t for name, t in tensors.items() if t is not None}
    got = ", ".join(f"{name} {t.dtype}{list(t.shape)} on {t.device}" for name, t in present.items())
    if len(shape) != 4 or x.ndim != 4 or x.shape[1] != shape[1] or not len(x):
        raise ValueError(f"expected x[B, C, H, W] and filters [N, C, kh, kw]; got {got}, filters {shape}")
    wanted = {"bias": shape[:1], "scores": shape}
    if any(list(present[name].shape) != wanted[name] for name in wanted.keys() & present.keys()):
        raise ValueError(f"expected bias{shape[:1]} and scores{shape}; got {got}")
    if not x.is_floating_point() or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"expected x and bias of one floating-point dtype; got {got}")
    if any(t.device != x.device for t in present.values()):
        raise ValueError(f"expected all on one device; got {got}")
    if stride < 1 or padding < 0 or min(sizes(x, shape, stride, padding)) < 1:
        raise ValueError(
            f"expected a stride from 1 on, a padding from 0 on and filters within the padded image; "
            f"got stride {stride}, padding {padding}, filters {shape} on {list(x.shape)}"
        )
    return _forward(x, w.bits, bias, scores, shape, list(w.keys), w.scale, stride, padding, kernels)  # type: ignore[no-any-return]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bits, _, scores, *ctx.rest = inputs
    ctx.save_for_backward(x, bits)
    ctx.dtype = None if scores is None else scores.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x, bits), needs = ctx.saved_tensors, ctx.needs_input_grad
    *rest, kernels = ctx.rest
    return (
        _dx(dy, bits, list(x.shape), *rest, kernels) if needs[0] else None,
        None,
        dy.sum((0, 2, 3)) if needs[2] else None,
        _ds(dy, x, *rest, ctx.dtype, kernels) if needs[3] else None,
        *(None,) * 6,
    )


@operator("seed_conv2d", _backward, _save)
def _forward(
    x: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
    kernels: str,
) -> Tensor:
    compute = {"triton": launch, "native": native, "reference": reference}[_backend(kernels, x)]
    return compute(x, bits, bias, shape, keys, s, stride, padding)


@operator("seed_conv2d_dx")
def _dx(
    dy: Tensor,
    bits: Tensor,
    size: list[int],
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
    kernels: str,
) -> Tensor:
    compute = {"triton": launch_dx, "native": native_dx, "reference": reference_dx}[_backend(kernels, dy)]
    return compute(dy, bits, size, shape, keys, s, stride, padding)


@operator("seed_conv2d_ds")
def _ds(
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    keys: list[int],
    s: float,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    kernels: str,
) -> Tensor:
    compute = {"triton": launch_scores, "native": native_ds, "reference": reference_ds}[_backend(kernels, dy)]
    return compute(dy, x, shape, keys, s, stride, padding, dtype)


@fake(_forward)
def _(x, bits, bias, scores, shape, keys, s, stride, padding, kernels):
    return x.new_empty(x.shape[0], shape[0], *sizes(x, shape, stride, padding))


@fake(_dx)
def _(dy, bits, size, shape, keys, s, stride, padding, kernels):
    return dy.new_empty(size)


@fake(_ds)
def _(dy, x, shape, keys, s, stride, padding, dtype, kernels):
    return x.new_empty(shape, dtype=dtype)
