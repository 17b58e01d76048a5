r"""Masked linear layer over R replicas:  Y[r] = X[r] (W[r] * M[r])^T + b[r],  and its gradients

    dX = dY (W * M),    dW = (dY^T X) * M,    db = sum_b dY,    dS = (dY^T X) * W

| name     | shape               | dtype                                   Floor of y, dx or dw, s = itemsize:
| x, dx    | [R, B, K]           | fp32, fp16, bf16; any strides           bytes = R (BK + NK + BN) s + |mask|
| w, dw    | [R, N, K]           | as x; contiguous along K, else copied   FLOPs = 2 R B N K
| mask     | [R, N, ceil(K / 8)] | uint8, packed
| bias, db | [R, N]              | as x, or None
| s, ds    | [R, N, K]           | any; scores, dS where the weights are frozen (edge-popup)
| y, dy    | [R, B, N]           | as x; dy with any strides

Sums are in fp32, fp32 products in TF32 where torch's own are. A pruned weight is 0 in every product, whatever
lies there (NaN, say), and so is its dW, whatever x and dy hold; dS knows no mask. This is for pruned weights
that must survive; where they are 0 already, the vendor's product of w needs no mask for y and dx.

The masked operand stands on the left, Y^T = (W * M) X^T, since tensor cores take only their left operand from
registers: weights come to shared memory by asynchronous copies, and are masked on the way to the registers.

Account of y at 4096 square, batch 512, bf16, on an H100. Goal: 1.3 times cuBLAS on w * m. Not measured.
  44 MB of DRAM (15 us at 3.0 TB/s; H200 10), 17.2 GFLOP (17 us at 989 TFLOP/s)
  128 programs of 128 x 128 on 132 multiprocessors: one wave, one launch; 64 steps of 33 KB each
  a step: 188 instructions a warp, 376 issue slots a scheduler beside 512 cycles of tensor cores; no product
  waits for the one before it; 136 registers, 115 KB of shared memory, 99 KB in flight a multiprocessor
  shared memory: 33 KB written, 16 KB of w and 32 KB of x read a step, 650 cycles: 24 us at 1.75 GHz
  L2 to multiprocessors: 277 MB, 40-50 us at 5.5-7 TB/s, which bounds: expected 40-50 us. Tiles of 128 x 256
  over half of the sum each would move 201 MB, and 34 MB of sums: bench/gpu times both
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparselth.kernels._choose import use_triton
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._tiles import Tile, kind, precision
from sparselth.kernels._triton import INTERPRET, tl, triton, within_grid
from sparselth.kernels.bitmask import reference_unpack

# (large, small) for each kind of product; 16 deep in IEEE fp32, which spills registers beyond
TILES = {
    "half": (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    "tf32": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
    "ieee": (Tile(128, 64, 16, 8, 4), Tile(32, 64, 16, 4, 4)),
}
LARGE_FROM = 64  # programs a replica: with fewer large tiles, half of a big GPU would idle


def reference(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ _kept(w, mask).mT
    return y if bias is None else y + bias[:, None]


def reference_dx(dy: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    return dy @ _kept(w, mask)


def reference_dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return _kept(dy.mT @ x, mask)


def reference_ds(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return (dy.mT @ x) * w


def _kept(w: Tensor, mask: Tensor) -> Tensor:
    return torch.where(reference_unpack(mask, w.shape[-1]), w, 0)


def floor(replicas: int, batch: int, n: int, k: int, itemsize: int) -> dict[str, int]:
    """Least traffic and multiplications of y, dx or dw; dense, for that is how tensor cores multiply."""
    entries = batch * k + n * k + batch * n
    return {
        "bytes": replicas * (entries * itemsize + n * -(-k // 8)),
        "flops": 2 * replicas * batch * n * k,
    }


@triton.jit
def _masked(w, bits, shift, AXIS: tl.constexpr):
    """w where its bit is 1, else 0. `bits` has an eighth of w's extent along AXIS, `shift` all of it."""
    bits = tl.expand_dims(bits.to(tl.int32), AXIS + 1)
    if AXIS == 0:
        bits = tl.broadcast_to(bits, (w.shape[0] // 8, 8, w.shape[1]))
        sign = tl.reshape(bits, w.shape) << shift[:, None]
    else:
        bits = tl.broadcast_to(bits, (w.shape[0], w.shape[1] // 8, 8))
        sign = tl.reshape(bits, w.shape) << shift[None, :]
    if w.dtype.primitive_bitwidth == 16:
        # two weights at a time: spread both signs over 16 bits each, then and
        return tl.inline_asm_elementwise(
            "{.reg .b32 keep; prmt.b32 keep, $2, $3, 0xFFBB; and.b32 $0, $1, keep;}",
            "=r,r,r,r",
            [w, sign],
            dtype=w.dtype,
            is_pure=True,
            pack=2,
        )
    return tl.where(sign < 0, w, 0.0)


@triton.jit
def _sign_shift(bits_ptr, offs):
    """Shifts that bring the bits of weights `offs` to the sign of an int32.

    A load that reads nothing, because Triton moves the change to a tensor core's layout in front of
    arithmetic only where that starts from loads. Without it, masked weights take a second trip through
    shared memory and wait for it.
    """
    shift = 31 - offs % 8
    return tl.load(bits_ptr + offs, mask=shift < 0, other=shift.to(tl.uint8)).to(tl.int32)


@triton.jit
def _product_kernel(
    v_ptr,
    w_ptr,
    mask_ptr,
    bias_ptr,
    out_ptr,
    B,
    M,
    C,
    stride_vr,
    stride_vb,
    stride_vc,
    stride_wr,
    stride_wn,
    stride_mr,
    stride_mn,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[r, b, m] = sum_c A[r, m, c] v[r, b, c] + bias[r, m]

    with A = w * mask, or its transpose if TRANSPOSED. EVEN_M, EVEN_C: M and C are multiples of their blocks.
    """
    tiles_b = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    pid_m, pid_b = tl.swizzle2d(pid // tiles_b, pid % tiles_b, tl.cdiv(M, BLOCK_M), tiles_b, 8)
    first_m = pid_m.to(tl.int64) * BLOCK_M
    first_b = pid_b.to(tl.int64) * BLOCK_B
    r = tl.program_id(1).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_b = tl.arange(0, BLOCK_B)
    offs_c = tl.arange(0, BLOCK_C)
    in_m = (offs_m < (M - first_m).to(tl.int32)) | EVEN_M
    in_b = offs_b < (B - first_b).to(tl.int32)

    v_ptr += r * stride_vr + first_b * stride_vb
    w_ptr += r * stride_wr
    mask_ptr += r * stride_mr
    offs_v = offs_c[:, None] * stride_vc + offs_b[None, :] * stride_vb  # [BC, BB]
    if TRANSPOSED:
        w_ptr += first_m
        mask_ptr += first_m // 8
        offs_i = tl.arange(0, BLOCK_M // 8)
        in_mi = (8 * offs_i < (M - first_m).to(tl.int32)) | EVEN_M
        offs_w = offs_m[:, None] + offs_c[None, :] * stride_wn  # [BM, BC]
        offs_bits = offs_i[:, None] + offs_c[None, :] * stride_mn  # [BM / 8, BC]
        shift = _sign_shift(mask_ptr, offs_m)
    else:
        w_ptr += first_m * stride_wn
        mask_ptr += first_m * stride_mn
        offs_i = tl.arange(0, BLOCK_C // 8)
        offs_w = offs_m[:, None] * stride_wn + offs_c[None, :]
        offs_bits = offs_m[:, None] * stride_mn + offs_i[None, :]  # [BM, BC / 8]
        shift = _sign_shift(mask_ptr, offs_c)

    acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
    tl.assume(C > 0)  # else ptxas, for the loop that takes no round, waits for each product before the next
    for c in range(0, C, BLOCK_C):
        in_c = (offs_c < C - c) | EVEN_C
        v = tl.load(v_ptr + offs_v, mask=in_c[:, None] & in_b[None, :], other=0.0)
        w = tl.load(w_ptr + offs_w, mask=in_m[:, None] & in_c[None, :], other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
            w = w.to(tl.float32)
        if TRANSPOSED:
            bits = tl.load(mask_ptr + offs_bits, mask=in_mi[:, None] & in_c[None, :], other=0)
            w = _masked(w, bits, shift, 0)
            w_ptr += BLOCK_C * stride_wn
            mask_ptr += BLOCK_C * stride_mn
        else:
            in_ci = (8 * offs_i < C - c) | EVEN_C
            bits = tl.load(mask_ptr + offs_bits, mask=in_m[:, None] & in_ci[None, :], other=0)
            w = _masked(w, bits, shift, 1)
            w_ptr += BLOCK_C
            mask_ptr += BLOCK_C // 8
        v_ptr += BLOCK_C * stride_vc
        acc = tl.dot(w, v, acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + r * M + first_m + offs_m, mask=in_m, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    out_ptr += (r * B + first_b) * M + first_m
    out_ptrs = out_ptr + offs_b.to(tl.int64)[:, None] * M + offs_m[None, :]
    out = tl.trans(acc).to(out_ptr.dtype.element_ty)  # [BB, BM]
    tl.store(out_ptrs, out, mask=in_b[:, None] & in_m[None, :])


@triton.jit
def _weight_grad_kernel(
    dy_ptr,
    x_ptr,
    factor_ptr,
    out_ptr,
    B,
    N,
    K,
    stride_dyr,
    stride_dyb,
    stride_dyn,
    stride_xr,
    stride_xb,
    stride_xk,
    stride_fr,
    stride_fn,
    SCORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[r, n, k] = factor[r, n, k] sum_b dy[r, b, n] x[r, b, k]

    where the factor is the packed mask, or the weights if SCORES.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    pid_n, pid_k = tl.swizzle2d(pid // tiles_k, pid % tiles_k, tl.cdiv(N, BLOCK_N), tiles_k, 8)
    first_n = pid_n.to(tl.int64) * BLOCK_N
    first_k = pid_k.to(tl.int64) * BLOCK_K
    r = tl.program_id(1).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_b = tl.arange(0, BLOCK_B)
    in_n = offs_n < (N - first_n).to(tl.int32)
    in_k = offs_k < (K - first_k).to(tl.int32)

    dy_ptr += r * stride_dyr + first_n * stride_dyn
    x_ptr += r * stride_xr + first_k * stride_xk
    offs_dy = offs_n[:, None] * stride_dyn + offs_b[None, :] * stride_dyb  # [BN, BB]
    offs_x = offs_b[:, None] * stride_xb + offs_k[None, :] * stride_xk  # [BB, BK]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for b in range(0, B, BLOCK_B):
        in_b = offs_b < B - b
        dy = tl.load(dy_ptr + offs_dy, mask=in_n[:, None] & in_b[None, :], other=0.0)
        x = tl.load(x_ptr + offs_x, mask=in_b[:, None] & in_k[None, :], other=0.0)
        if UPCAST:
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        dy_ptr += BLOCK_B * stride_dyb
        x_ptr += BLOCK_B * stride_xb
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    inside = in_n[:, None] & in_k[None, :]
    factor_ptr += r * stride_fr + first_n * stride_fn
    if SCORES:
        factor_ptrs = factor_ptr + first_k + offs_n[:, None] * stride_fn + offs_k[None, :]
        acc *= tl.load(factor_ptrs, mask=inside, other=0.0).to(tl.float32)
    else:
        offs_i = tl.arange(0, BLOCK_K // 8)
        in_i = 8 * offs_i < (K - first_k).to(tl.int32)
        bits_ptrs = factor_ptr + first_k // 8 + offs_n[:, None] * stride_fn + offs_i[None, :]
        bits = tl.load(bits_ptrs, mask=in_n[:, None] & in_i[None, :], other=0)
        acc = _masked(acc, bits, 31 - offs_k % 8, 1)
    out_ptr += (r * N + first_n) * K + first_k
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def _choose(kind: str, rows: int, columns: int) -> tuple[Tile, int]:
    """The tile for results [R, rows, columns] and the programs a replica takes; R must not matter."""
    large, small = TILES[kind]
    for tile in (large, small):
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        if programs >= LARGE_FROM:
            break
    return tile, programs


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _near(*tensors: Tensor) -> None:
    """Offsets within a tile are 32 bits wide: 128 rows or columns of one."""
    for t in tensors:
        if any(n > 1 and stride >= 2**24 for n, stride in zip(t.shape[1:], t.stride()[1:], strict=True)):
            raise ValueError(f"expected rows less than 2^24 numbers apart, got strides {tuple(t.stride())}")


def launch_product(
    v: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, transposed: bool = False
) -> Tensor:
    """v (w * mask)^T + bias, or v (w * mask) if transposed."""
    if len(parts := within_grid(len(v))) > 1:
        cut = ((v[s], w[s], mask[s], None if bias is None else bias[s]) for s in parts)
        return torch.cat([launch_product(*some, transposed) for some in cut])
    (r, b, c), m = v.shape, w.shape[2 if transposed else 1]
    w, mask, bias = _unit_stride(w), _unit_stride(mask), None if bias is None else bias.contiguous()
    _near(v, w)
    out = v.new_empty(r, b, m)
    name = kind(v.dtype)
    tile, programs = _choose(name, m, b)
    with torch.cuda.device_of(v):
        _product_kernel[programs, r](
            v,
            w,
            mask,
            bias,
            out,
            b,
            m,
            c,
            *v.stride(),
            *w.stride()[:2],
            *mask.stride()[:2],
            TRANSPOSED=transposed,
            HAS_BIAS=bias is not None,
            EVEN_M=m % tile.rows == 0,
            EVEN_C=c % tile.depth == 0,
            BLOCK_M=tile.rows,
            BLOCK_B=tile.columns,
            BLOCK_C=tile.depth,
            PRECISION=precision(name),
            UPCAST=INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def launch_weight_grad(dy: Tensor, x: Tensor, factor: Tensor, scores: bool) -> Tensor:
    """(dy^T x) * factor: the weights for the gradient of the scores, else the packed mask."""
    if len(parts := within_grid(len(x))) > 1:
        return torch.cat([launch_weight_grad(dy[s], x[s], factor[s], scores) for s in parts])
    (r, b, n), k = dy.shape, x.shape[2]
    factor = _unit_stride(factor)
    _near(dy, x, factor)
    out = x.new_empty(r, n, k)
    name = kind(x.dtype)
    tile, programs = _choose(name, n, k)
    with torch.cuda.device_of(x):
        _weight_grad_kernel[programs, r](
            dy,
            x,
            factor,
            out,
            b,
            n,
            k,
            *dy.stride(),
            *x.stride(),
            *factor.stride()[:2],
            SCORES=scores,
            BLOCK_N=tile.rows,
            BLOCK_K=tile.columns,
            BLOCK_B=tile.depth,
            PRECISION=precision(name),
            UPCAST=INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def masked_linear(
    x: Tensor,
    w: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    scores: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """x[r] (w[r] * mask[r])^T + bias[r] of every replica r: [R, B, N].

    Differentiable in x, w, bias and scores. The values of `scores` [R, N, K] do not matter: they are what
    the mask was drawn from, and receive dL/d(w * mask) * w, pruned or not (straight through the mask).
    `kernels`: "triton", "reference" (torch), or "auto": Triton on CUDA, else the reference.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, w, mask, bias, scores)
    return _forward(x, w, mask, bias, scores, kernels)  # type: ignore[no-any-return]


def _check(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, scores: Tensor | None) -> None:
    named = {"x": x, "w": w, "mask": mask, "bias": bias, "scores": scores}
    tensors = {name: t for name, t in named.items() if t is not None}
    got = ", ".join(f"{name} {t.dtype}{list(t.shape)} on {t.device}" for name, t in tensors.items())
    if x.ndim != 3 or w.ndim != 3 or 0 in x.shape or 0 in w.shape:
        raise ValueError(f"expected x[R, B, K] and w[R, N, K], none empty; got {got}")
    (r, _, k), n = x.shape, w.shape[1]
    shapes = {"w": (r, n, k), "mask": (r, n, -(-k // 8)), "bias": (r, n), "scores": (r, n, k)}
    wrong = [f"{name}{list(s)}" for name, s in shapes.items() if name in tensors and tensors[name].shape != s]
    if wrong:
        raise ValueError(f"expected {', '.join(wrong)}; got {got}")
    if mask.dtype != torch.uint8 or any(t.dtype != x.dtype for t in (w, bias) if t is not None):
        raise ValueError(f"expected a uint8 mask and x, w and bias of one dtype; got {got}")
    if any(t.device != x.device for t in tensors.values()):
        raise ValueError(f"expected all on one device; got {got}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, mask, _, _, ctx.kernels = inputs
    ctx.save_for_backward(x, w, mask)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _dx(dy, w, mask, ctx.kernels) if needs[0] else None,
        _dw(dy, x, mask, ctx.kernels) if needs[1] else None,
        None,
        dy.sum(1) if needs[3] else None,
        _ds(dy, x, w, ctx.kernels) if needs[4] else None,
        None,
    )


@operator("masked_linear", _backward, _save)
def _forward(
    x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, scores: Tensor | None, kernels: str
) -> Tensor:
    if use_triton(kernels, x):
        return launch_product(x, w, mask, bias)
    return reference(x, w, mask, bias)


@operator("masked_linear_dx")
def _dx(dy: Tensor, w: Tensor, mask: Tensor, kernels: str) -> Tensor:
    if use_triton(kernels, dy):
        return launch_product(dy, w, mask, None, transposed=True)
    return reference_dx(dy, w, mask)


@operator("masked_linear_dw")
def _dw(dy: Tensor, x: Tensor, mask: Tensor, kernels: str) -> Tensor:
    if use_triton(kernels, dy):
        return launch_weight_grad(dy, x, mask, scores=False)
    return reference_dw(dy, x, mask)


@operator("masked_linear_ds")
def _ds(dy: Tensor, x: Tensor, w: Tensor, kernels: str) -> Tensor:
    if use_triton(kernels, dy):
        return launch_weight_grad(dy, x, w, scores=True)
    return reference_ds(dy, x, w)


@fake(_forward)
def _(x, w, mask, bias, scores, kernels):
    return x.new_empty(*x.shape[:2], w.shape[1])


@fake(_dx)
def _(dy, w, mask, kernels):
    return dy.new_empty(*dy.shape[:2], w.shape[2])


@fake(_dw)
@fake(_ds)
def _(dy, x, factor, kernels):
    return x.new_empty(x.shape[0], dy.shape[2], x.shape[2])
