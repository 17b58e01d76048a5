r"""The gradient of R linear layers, its mask and the optimizer's step in one kernel: dW is never written.

    g[r] = mask[r] ? dy[r] x[r]^T : 0;  then the step of masked_update on (w[r], g[r]), in place
    the same on the bias, which is never pruned, with g[r] = sum_b dy[r, :, b]

| name       | shape               | dtype |              Floor, bytes: Adam 24 a weight, SGD 8 and 8 more
| dy         | [R, N, B]           | fp32  |              with momentum, the mask 1/8, dy and x once each.
| x          | [R, K, B]           | fp32  |              Eight pruned weights in a row (one byte of the mask,
| weight     | [R, N, K]           | fp32  |              32 bytes elsewhere) count nothing, for they are
| moments    | as weight           | fp32  |              neither read nor written.  FLOPs: 2 R N K B
| bits       | [R, N, ceil(K / 8)] | uint8 |              DRAM fetches 64, though, for one live of two.
| bias       | [R, N] or [R, N, 1] | fp32  |  its moments likewise
| step       | [R]                 | fp32  |  of the optimizer, from 1
| lr         | [R]                 | fp64  |  or fp32
| active     | [R]                 | bool  |  or uint8; a replica that is not is left as it is, to the bit

Weights may be views of a flat buffer [R, P]: rows follow each other, replicas lie anywhere. Fast, with 16
bytes an access, are shapes with K % 4 == 0 whose pointers and replicas lie multiples of 16 bytes apart (784,
300 and 100 alike, no padding), x with K in a row and dy with N in a row, N % 4 == 0; all else is right, but
takes 4 bytes an access. This is for small batches: a tile of weights reads all its rows of dy and x again.

Nothing comes to the host, so a CUDA graph can hold the launch. dx needs the old weights: take it first. What
a replica computes does not depend on the others: its programs know neither R nor the rest.

The account of 100 x 300 x 784, B = 60, Adam, nothing pruned: 593 MB, 198 us on an H100 (3.0 TB/s), 138 us
on an H200 (4.3). 12,500 programs of 4 warps, each 402 instructions, 4 x 330 of the product and 1,042 of the
update: 138 M in all, 149 us at four a cycle on 132 multiprocessors of 1.755 GHz. 120 registers, so 4 programs
a multiprocessor, up to 98 KB in flight, which load, compute and store in turn. One launch. Expected 240-280
us on an H100, 190-230 on an H200: 0.6-0.8 of a copy's bandwidth; goal 0.6.

Rounding is that of masked_update's kernel: IEEE division and square root, step sizes in fp64, no contraction;
dW is summed in fp32 over the batch in turn, its products in TF32 where torch's own are.

On a CPU this is the reference, replica by replica; fast there are torch's product and `bind_masked_adam`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels._choose import use_triton
from sparselth.kernels._tiles import Tile, kind
from sparselth.kernels._triton import tl, triton
from sparselth.kernels.bitmask import unpack
from sparselth.kernels.masked_update import BETA1, BETA2, EPS, masked_adam_many, masked_sgd_many, update

# 16 weights a thread in at most 128 registers, so that 4 programs share a multiprocessor: with 8 weights the
# product would read shared memory more often for each, with 32 they would not fit the registers. Of 300 x 784
# weights 125 tiles of 64 x 32 have 9 % that is not there, 130 of 32 x 64 had 13 %
TILES = {"ieee": Tile(64, 32, 16, 4, 2), "tf32": Tile(32, 64, 32, 4, 2)}
NEAR = 2**24  # offsets within a tile are 32 bits wide
MOST = 65_535  # replicas of a launch: the second axis of a grid has no more
MOMENTS = {"adam": 2, "sgd": 1}


def reference(dy: Tensor, x: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dW, db) of every replica, each by a product of its own, so that company does not change its bits."""
    dw = torch.stack([left @ right.mT for left, right in zip(dy, x, strict=True)])
    return dw if bits is None else torch.where(unpack(bits, x.shape[1]), dw, 0), dy.sum(2)


def floor(
    weight: Tensor, batch: int, bits: Tensor | None = None, bias: Tensor | None = None, moments: int = 2
) -> dict[str, int]:
    """Least bytes and FLOPs of a step; `moments` is 2 for Adam, 1 for SGD with momentum.

    Of what is pruned 64 bytes in a row are not fetched and 32 not written; replicas begin with such a row.
    """
    r, n, k = weight.shape
    state, rest = 8 * weight.numel(), 4 * r * batch * (n + k)  # of a weight or a moment: read, and written
    if bits is not None:
        touched = (bits != 0).repeat_interleave(8, 2)[..., :k].flatten(1)
        fetched = F.pad(touched, (0, -n * k % 16)).view(r, -1, 16).any(2)
        state, rest = 64 * int(fetched.sum()) + 4 * int(touched.sum()), rest + bits.numel()
    state += 0 if bias is None else 8 * bias.numel()
    return {
        "bytes": (1 + moments) * state + rest,
        "flops": 2 * r * n * k * batch,
    }


@triton.jit
def _kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    bits_ptr,
    bias_ptr,
    bias_a_ptr,
    bias_b_ptr,
    step_ptr,
    lr_ptr,
    active_ptr,
    B,
    N,
    K,
    stride_dyr,
    stride_dyn,
    stride_dyb,
    stride_xr,
    stride_xk,
    stride_xb,
    stride_wr,
    stride_bitsr,
    stride_biasr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    decay,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    MOMENTS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    UNIT_DY: tl.constexpr,
    UNIT_X: tl.constexpr,
    UNIT_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one replica's weights; the first tile of a row of tiles updates the bias, too.

    Triton knows of an argument at most that it is a multiple of 16, but sees that 4 * K is one of 4. So N,
    stride_dyr and stride_dyb count UNIT_DY numbers, stride_xr and stride_xb UNIT_X, K and stride_wr UNIT_W.
    """
    r = tl.program_id(1).to(tl.int64)
    if HAS_ACTIVE:
        active = tl.load(active_ptr + r)
        if active == 0:
            return
    N = N * UNIT_DY
    K = K * UNIT_W
    stride_dyb = stride_dyb * UNIT_DY
    stride_xb = stride_xb * UNIT_X
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_n = tl.program_id(0) // tiles_k
    pid_k = tl.program_id(0) % tiles_k
    first_n = pid_n.to(tl.int64) * BLOCK_N
    first_k = pid_k.to(tl.int64) * BLOCK_K
    left_n = (N - first_n).to(tl.int32)
    left_k = (K - first_k).to(tl.int32)

    lr = tl.load(lr_ptr + r).to(tl.float64)
    rate, root = -lr, lr
    if MOMENTS == 2:
        step = tl.load(step_ptr + r).to(tl.float64)
        rate = rate / (1.0 - tl.exp(step * log_beta1))
        root = tl.sqrt(1.0 - tl.exp(step * log_beta2))
    rate, root = rate.to(tl.float32), root.to(tl.float32)

    offs_n = tl.arange(0, BLOCK_N)
    offs_b = tl.arange(0, BLOCK_B)
    in_n = offs_n < left_n
    dy_ptr += r * stride_dyr * UNIT_DY + first_n * stride_dyn
    offs_dy = offs_n[:, None] * stride_dyn + offs_b[None, :] * stride_dyb  # [BN, BB]
    if HAS_BIAS:
        db = tl.zeros((BLOCK_N,), tl.float32)
        if pid_k == 0:
            for i in range(0, B, BLOCK_B):
                inside = in_n[:, None] & (offs_b < B - i)[None, :]
                db += tl.sum(tl.load(dy_ptr + i * stride_dyb + offs_dy, mask=inside, other=0.0), axis=1)
            offs_bias = r * stride_biasr + first_n + offs_n
            update(
                bias_ptr,
                bias_a_ptr,
                bias_b_ptr,
                offs_bias,
                tl.load(bias_ptr + offs_bias, mask=in_n, other=0.0),
                db,
                in_n,
                in_n,
                beta1,
                beta2,
                rest1,
                rest2,
                eps,
                decay,
                rate,
                root,
                MOMENTS,
                NESTEROV=False,
                DECOUPLED=False,
            )

    offs_k = tl.arange(0, BLOCK_K)
    in_k = offs_k < left_k
    x_ptr += r * stride_xr * UNIT_X + first_k * stride_xk
    offs_x = offs_b[:, None] * stride_xb + offs_k[None, :] * stride_xk  # [BB, BK]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in range(0, B, BLOCK_B):
        in_b = offs_b < B - i
        dy = tl.load(dy_ptr + offs_dy, mask=in_n[:, None] & in_b[None, :], other=0.0)
        x = tl.load(x_ptr + offs_x, mask=in_b[:, None] & in_k[None, :], other=0.0)
        dy_ptr += BLOCK_B * stride_dyb
        x_ptr += BLOCK_B * stride_xb
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    # eight weights in a row, a byte of the mask, to a thread
    offs_i = tl.arange(0, BLOCK_K // 8)
    offs_bit = tl.arange(0, 8)
    offs_e = 8 * offs_i[:, None] + offs_bit[None, :]  # [BK / 8, 8]
    touched = in_n[:, None, None] & (offs_e < left_k)[None, :, :]  # [BN, BK / 8, 8]
    live = touched
    if HAS_BITS:
        bytes_k = tl.cdiv(K, 8)
        bits_ptr += r * stride_bitsr + first_n * bytes_k + first_k // 8
        inside = in_n[:, None] & (8 * offs_i < left_k)[None, :]
        byte = tl.load(bits_ptr + offs_n[:, None] * bytes_k + offs_i[None, :], mask=inside, other=0)
        byte = byte.to(tl.int32)
        touched = touched & (byte != 0)[:, :, None]
        live = (byte[:, :, None] >> offs_bit[None, None, :]) & 1 != 0
    at = r * stride_wr * UNIT_W + first_n * K + first_k
    offs = offs_n[:, None, None] * K + offs_e[None, :, :]
    g = tl.reshape(acc, (BLOCK_N, BLOCK_K // 8, 8))
    if MOMENTS > 0:
        a_ptr += at
    if MOMENTS > 1:
        b_ptr += at
    w_ptr += at
    update(
        w_ptr,
        a_ptr,
        b_ptr,
        offs,
        tl.load(w_ptr + offs, mask=touched, other=0.0),
        g,
        touched,
        live,
        beta1,
        beta2,
        rest1,
        rest2,
        eps,
        decay,
        rate,
        root,
        MOMENTS,
        NESTEROV=False,
        DECOUPLED=False,
    )


@torch.no_grad()
def linear_grad_update(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    moments: Sequence[Tensor],
    bits: Tensor | None,
    bias: Tensor | None = None,
    bias_moments: Sequence[Tensor] = (),
    *,
    step: Tensor,
    lr: Tensor,
    active: Tensor | None = None,
    momentum: float = 0.9,
    betas: tuple[float, float] = (BETA1, BETA2),
    eps: float = EPS,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    kernels: str = "auto",
) -> None:
    """One step of "adam" or "sgd" in place, from inputs x [R, K, B] and the outputs' gradient dy [R, N, B].

    `bits` None means that nothing is pruned. There are two moments for Adam, one for SGD, none for SGD
    without momentum; they start at 0. `kernels`: "triton", "reference" (torch), or "auto": Triton on CUDA,
    else the reference.
    """
    if optimizer not in MOMENTS:
        raise ValueError(f'expected optimizer "adam" or "sgd", got "{optimizer}"')
    count = 0 if optimizer == "sgd" and momentum == 0 else MOMENTS[optimizer]
    _check(dy, x, weight, moments, bits, bias, bias_moments, step, lr, active, count)
    if use_triton(kernels, weight):
        logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
        hyper = (*betas, 1 - betas[0], 1 - betas[1], eps, weight_decay, *logs)
        if optimizer == "sgd":
            hyper = (momentum, 0.0, 0.0, 0.0, 0.0, weight_decay, 0.0, 0.0)
        for part in (slice(first, first + MOST) for first in range(0, len(lr), MOST)):
            every = (dy, x, weight, moments, bits, bias, bias_moments, step, lr, active)
            some: list[Any] = [_some(t, part) for t in every]
            _launch(*[*some, hyper])
        return
    dw, db = reference(dy, x, bits)
    for r in range(len(lr)):
        if active is not None and not active[r]:
            continue
        rows = [(weight[r], dw[r], [m[r] for m in moments])]
        if bias is not None:
            rows += [(bias[r].view(-1), db[r], [m[r].view(-1) for m in bias_moments])]
        w, g = [row[0] for row in rows], [row[1] for row in rows]
        states = [[row[2][i] for row in rows] for i in range(count)]
        masks: list[Tensor | None] = [None] * len(rows)  # g is masked already
        rate = lr[r : r + 1].double()
        if optimizer == "adam":
            options: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
            steps = [step[r : r + 1]] * len(rows)
            masked_adam_many(w, g, masks, (states[0], states[1]), steps, rate, **options, kernels="reference")
        else:
            options = {"momentum": momentum, "weight_decay": weight_decay}
            masked_sgd_many(w, g, masks, states[0] if count else None, rate, **options, kernels="reference")


def _check(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    moments: Sequence[Tensor],
    bits: Tensor | None,
    bias: Tensor | None,
    bias_moments: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    active: Tensor | None,
    count: int,
) -> None:
    if dy.ndim != 3 or x.ndim != 3 or not dy.numel() or not x.numel():
        raise ValueError(f"expected dy [R, N, B] and x [R, K, B], got {list(dy.shape)} and {list(x.shape)}")
    (r, n, b), k = dy.shape, x.shape[1]
    if len(moments) != count or len(bias_moments) != (0 if bias is None else count):
        got = f"{len(moments)} and {len(bias_moments)}"
        raise ValueError(f"expected {count} moments, of a bias too where there is one, got {got}")

    def expect(name: str, t: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        if t.dtype not in dtypes or t.shape != shape or t.device != weight.device:
            wanted = f"{' or '.join(map(str, dtypes))} {list(shape)} on {weight.device}"
            raise ValueError(f"expected {name} as {wanted}, got {_said(t)}")

    expect("dy", dy, (r, n, b), torch.float32)
    expect("x", x, (r, k, b), torch.float32)
    parameters: list[tuple[Tensor, Sequence[Tensor], tuple[int, ...], str]]
    parameters = [(weight, moments, (r, n, k), "weight")]
    if bias is not None:
        parameters.append((bias, bias_moments, (r, n, 1)[: bias.ndim], "bias"))
    for parameter, states, shape, name in parameters:
        for of, t in ((name, parameter), *((f"a moment of the {name}", state) for state in states)):
            expect(of, t, shape, torch.float32)
            if not t[0].is_contiguous() or (r > 1 and t.stride(0) != parameter.stride(0)):
                raise ValueError(
                    f"expected {of} contiguous within a replica, moments laid out as it, got {_said(t)}"
                )
    if bits is not None:
        expect("bits", bits, (r, n, -(-k // 8)), torch.uint8)
        if not bits[0].is_contiguous():
            raise ValueError(f"expected bits contiguous within a replica, got {_said(bits)}")
    vectors = [("step", step, [torch.float32]), ("lr", lr, [torch.float64, torch.float32])]
    vectors += [] if active is None else [("active", active, [torch.bool, torch.uint8])]
    for name, t, dtypes in vectors:
        expect(name, t, (r,), *dtypes)
        if not t.is_contiguous():
            raise ValueError(f"expected {name} contiguous, got {_said(t)}")


def _said(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}, strides {list(t.stride())}, on {t.device}"


def _some(t: Any, part: slice) -> Any:
    """Some replicas of a tensor, of several, or of None."""
    if isinstance(t, Tensor):
        return t[part]
    return None if t is None else [_some(other, part) for other in t]


def _unit(*sizes: int) -> int:
    return 1 if any(size % 4 for size in sizes) else 4


def _launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    moments: Sequence[Tensor],
    bits: Tensor | None,
    bias: Tensor | None,
    bias_moments: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    active: Tensor | None,
    hyper: tuple[float, ...],
) -> None:
    (r, n, b), k = dy.shape, x.shape[1]
    if max(*dy.stride()[1:], *x.stride()[1:], k) >= NEAR:
        raise ValueError(f"expected rows less than 2^24 numbers apart, got {_said(dy)} and {_said(x)}")
    state = [weight, *moments]
    unit_dy, unit_x = _unit(n, dy.stride(0), dy.stride(2)), _unit(x.stride(0), x.stride(2))
    unit_w = _unit(k, weight.stride(0))
    name = kind(weight.dtype)
    tile = TILES[name]
    absent = [None] * (2 - len(moments))
    with torch.cuda.device_of(weight):
        _kernel[triton.cdiv(n, tile.rows) * triton.cdiv(k, tile.columns), r](
            dy,
            x,
            *state,
            *absent,
            bits,
            bias,
            *bias_moments,
            *(absent if bias is not None else [None, None]),
            step,
            lr,
            active if active is None else active.view(torch.uint8),
            b,
            n // unit_dy,
            k // unit_w,
            dy.stride(0) // unit_dy,
            dy.stride(1),
            dy.stride(2) // unit_dy,
            x.stride(0) // unit_x,
            x.stride(1),
            x.stride(2) // unit_x,
            weight.stride(0) // unit_w,
            0 if bits is None else bits.stride(0),
            0 if bias is None else bias.stride(0),
            *hyper,
            MOMENTS=len(moments),
            HAS_BITS=bits is not None,
            HAS_BIAS=bias is not None,
            HAS_ACTIVE=active is not None,
            UNIT_DY=unit_dy,
            UNIT_X=unit_x,
            UNIT_W=unit_w,
            BLOCK_N=tile.rows,
            BLOCK_K=tile.columns,
            BLOCK_B=tile.depth,
            PRECISION=name,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
    torch.autograd.graph.increment_version(state if bias is None else [*state, bias, *bias_moments])
