r"""Masked optimizer steps over the flat buffers of R replicas, and over lists of tensors in one launch.

    g <- m ? g : 0;  then SGD with momentum, Adam or AdamW on (w, g), in place

| name   | shape            | dtype |                              Floor, fp32, dense lanes, bytes a weight:
| w, g   | [R, P]           | fp32  |  weights, their gradients      SGD 4 * 5 = 20, Adam 4 * 7 = 28,
| mask   | [R, M]           | fp32  |  0 or 1 for the first M <= P   the mask 4 more, packed 1/8 more;
| mask   | [R, ceil(P / 8)] | uint8 |  for lists: packed bits        about 6 and 14 FLOPs
| a, b   | [R, P]           | fp32  |  momentum; the two moments
| lr     | [R]              | fp64  |  for lists: on the device, so that a CUDA graph can hold the launch
| step   | [R]              | fp32  |  for lists: one of each tensor, likewise; counts from 1
| active | [R]              | uint8 |  for lists: a replica with 0 is neither read nor written, likewise

On a CPU `bind_masked_sgd` and `bind_masked_adam` take the native kernel (native/masked_update.inc) on w, g,
a, b [R, P] with packed bits, or on vectors [P] that hold the kept weights alone, without a mask.

Zeros live in the weights: where the mask is 0 and w, a, b start at 0 they stay exactly 0, because a
masked gradient leaves every moment at 0 and weight decay multiplies a weight of 0. On a CPU the steps are
those of `torch.optim` on the masked gradient, to the bit, where torch's own fused kernels take them.

The Triton and the native kernel round as those do: the same order, fused multiply-adds where they have them,
IEEE division and square root, step sizes in fp64, contraction off. So they too give torch's bits for the CPU,
but for beta1 of 0.5 and less, for subnormal numbers, and for the last P % 16 weights of a tensor, which torch
computes partly in fp64: there 2 ulp of the largest term. A weight's bits do not depend on its place, so that
native steps with and without the pruned weights agree. (Interpreters before Triton 3.9, and the native
level "plain", round a fused multiply-add twice: also 2 ulp. On a GPU the bits were not compared yet; torch's
own CUDA kernels round in another order.)
Eight weights whose mask byte is 0, one 32-byte sector of each array, are neither read nor written.

Adam on 6.7e7 weights, a fifth of them kept at random, expected (H200 | H100, copies at 4.3 | 3.0 TB/s):
    bytes         25.66 a weight, 1.72 GB: read in granules of 64 bytes, 1 - 0.8^16 = 0.97 of them, w g a b
                  15.55; written in sectors of 32, 1 - 0.8^8 = 0.83 of them, w a b 9.99; the mask 0.13
    instructions  77 a weight in the loop, 46 of them two quotients and a root; 5.2e9, 155 us at full rate
    in flight     79 registers: 6 programs of 128 threads a SM, 96 KB; the mask bytes of a round come a round
                  ahead, so that its loads wait for nothing
    time          one launch, at 0.9 of a copy 445 | 638 us; goal 0.85 of a copy, 471 | 675 us
Torch's fused Adam and two products with float masks move 28 + 2 * 12 = 52 bytes: 2.0 times as many; goal 1.8.
From some 5 % of weights kept down, instructions take longer than memory.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native, use_triton
from sparselth.kernels._triton import tl, triton
from sparselth.kernels.bitmask import count, unpack

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
BLOCK, NARROW, WARPS = 1024, 256, 4  # weights of a round, and of a round of single weights
FEW = 1 << 20  # weights up to which a program takes one round, so that they fill the device
MANY = 1 << 16  # weights from which on a second CPU thread pays


def sgd_reference(
    w: Tensor, g: Tensor, mask: Tensor, a: Tensor, lr: float, momentum: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """New (w, a) by the textbook formula; for tests."""
    g = _masked(g, mask) + weight_decay * w
    a = momentum * a + g
    return w - lr * a, a


def adam_reference(
    w: Tensor, g: Tensor, mask: Tensor, a: Tensor, b: Tensor, step: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New (w, a, b) by the formula of Kingma & Ba 2015; `step` counts from 1; for tests."""
    g = _masked(g, mask) + weight_decay * w
    a = BETA1 * a + (1 - BETA1) * g
    b = BETA2 * b + (1 - BETA2) * g * g
    corrected = (b / (1 - BETA2**step)).sqrt() + EPS
    return w - lr * (a / (1 - BETA1**step)) / corrected, a, b


def _masked(g: Tensor, mask: Tensor) -> Tensor:
    g = g.clone()
    g[:, : mask.shape[1]] *= mask
    return g


def masked_sgd(
    w: Tensor, g: Tensor, mask: Tensor | None, a: Tensor, lr: float, momentum: float, weight_decay: float
) -> None:
    """One SGD step in place; `a` starts at 0; `mask` None means that nothing is pruned."""
    if mask is not None:
        g[:, : mask.shape[1]].mul_(mask)
    torch._fused_sgd_(
        [w],
        [g],
        [a] if momentum else [],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,  # a = 0 makes the first step like every other
    )


def masked_adam(
    w: Tensor,
    g: Tensor,
    mask: Tensor | None,
    moments: Sequence[Tensor],
    step: Tensor,
    lr: float,
    weight_decay: float,
) -> None:
    """One Adam step in place; `moments` are (a, b); `mask` None means that nothing is pruned.

    `step`, a 0-dim fp32 tensor, counts from 1.
    """
    if mask is not None:
        g[:, : mask.shape[1]].mul_(mask)
    torch._fused_adam_(
        [w],
        [g],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        lr=lr,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=weight_decay,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )


Step = Callable[[int, float], None]  # of the optimizer's own step, from 1, and the learning rate


def bind_masked_sgd(
    w: Tensor,
    g: Tensor,
    a: Tensor | None,
    bits: Tensor | None = None,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    kernels: str = "auto",
) -> Step:
    """A function that takes one SGD step on fixed CPU tensors, in place; g stays as it is.

    `a` starts at 0; without momentum it is None.
    """
    if (a is None) != (momentum == 0):
        raise ValueError(
            f"expected a momentum buffer if and only if there is momentum, got momentum {momentum}"
        )
    if use_native(kernels):
        moments = 0 if a is None else 1
        call, s = _bind(w, g, a, None, bits, moments=moments, nesterov=nesterov)
        s.beta1, s.decay = momentum, weight_decay

        def run(step: int, lr: float) -> None:
            s.rate = -lr
            call()

        return run
    live = _live(w, g, a, None, bits)

    def run_torch(step: int, lr: float) -> None:
        torch._fused_sgd_(
            [w],
            [g if live is None else (g.view(torch.int32) & live).view(torch.float32)],
            [] if a is None else [a],
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
        )

    return run_torch


def bind_masked_adam(
    w: Tensor,
    g: Tensor,
    moments: tuple[Tensor, Tensor],
    bits: Tensor | None = None,
    *,
    betas: tuple[float, float] = (BETA1, BETA2),
    eps: float = EPS,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    kernels: str = "auto",
) -> Step:
    """A function that takes one Adam step, AdamW's where `decoupled`, on fixed CPU tensors, in place.

    g stays as it is; both moments start at 0.
    """
    a, b = moments
    beta1, beta2 = betas
    if use_native(kernels):
        call, s = _bind(w, g, a, b, bits, moments=2, decoupled=decoupled)
        s.rest1, s.rest2, s.beta2, s.eps, s.decay = 1 - beta1, 1 - beta2, beta2, eps, weight_decay

        def run(step: int, lr: float) -> None:
            s.rate = -lr / (1 - beta1**step)
            s.root = math.sqrt(1 - beta2**step)
            if decoupled:
                s.decay = 1 - lr * weight_decay
            call()

        return run
    live, count = _live(w, g, a, b, bits), torch.zeros((), dtype=torch.float32, device="cpu")
    update = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def run_torch(step: int, lr: float) -> None:
        update(
            [w],
            [g if live is None else (g.view(torch.int32) & live).view(torch.float32)],
            [a],
            [b],
            [],
            [count.fill_(step)],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return run_torch


class _Update(ctypes.Structure):  # struct masked_update
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("w", "g", "a", "b", "bits")],
        *[(name, ctypes.c_int64) for name in ("replicas", "size")],
        *[
            (name, ctypes.c_float)
            for name in ("beta1", "beta2", "rest1", "rest2", "eps", "decay", "rate", "root")
        ],
        *[(name, ctypes.c_int32) for name in ("moments", "nesterov", "decoupled", "threads")],
    ]


def _bind(
    w: Tensor, g: Tensor, a: Tensor | None, b: Tensor | None, bits: Tensor | None, **options: int
) -> tuple[Callable[[], None], _Update]:
    _check_flat(w, g, a, b, bits)
    s = _Update(
        **{name: _native.address(t) for name, t in zip("wgab", (w, g, a, b), strict=True)},
        bits=_native.address(bits),
        replicas=len(w) if w.dim() == 2 else 1,
        size=w.shape[-1],
        threads=_native.threads() if w.numel() >= MANY else 1,
        **options,
    )
    return _native.bind("masked_update", s, w, g, a, b, bits), s


def _live(w: Tensor, g: Tensor, a: Tensor | None, b: Tensor | None, bits: Tensor | None) -> Tensor | None:
    """The mask as integers, all ones where a weight is kept: what they are and-ed with ends, NaN too."""
    _check_flat(w, g, a, b, bits)
    return None if bits is None else unpack(bits, w.shape[-1]).to(torch.int32).neg_()


def _check_flat(w: Tensor, g: Tensor, a: Tensor | None, b: Tensor | None, bits: Tensor | None) -> None:
    for name, t in (("weights", w), ("gradient", g), ("moment", a), ("moment", b)):
        fits = t is None or (t.is_cpu and t.dtype == torch.float32 and t.shape == w.shape)
        if t is not None and not (fits and t.is_contiguous() and t.dim() in (1, 2)):
            raise ValueError(
                f"expected the {name} as contiguous fp32 {list(w.shape)} on a CPU, got {_said(t)}"
            )
    shape = (*w.shape[:-1], -(-w.shape[-1] // 8))
    if bits is not None and (
        not bits.is_cpu or bits.dtype != torch.uint8 or bits.shape != shape or not bits.is_contiguous()
    ):
        raise ValueError(f"expected a mask as uint8 {list(shape)} on a CPU, got {_said(bits)}")


@triton.jit
def update(
    w_ptr,
    a_ptr,
    b_ptr,
    offs,
    w,
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
    MOMENTS: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr,
):
    """Update weights w by gradients g and store them; the order of operations is that of torch's CPU kernels.

    `touched` is read and written, `live` not pruned; `rate` is the step size, negative, `root` what Adam's
    second root is divided by.
    """
    if DECOUPLED:
        w = w * decay
    else:
        g = tl.fma(w, decay, g)
    if MOMENTS == 2:
        a = tl.load(a_ptr + offs, mask=touched, other=0.0)
        b = tl.load(b_ptr + offs, mask=touched, other=0.0)
        a = tl.fma(g - a, rest1, a)
        b = tl.fma(g * rest2, g, b * beta2)
        tl.store(b_ptr + offs, tl.where(live, b, 0.0), mask=touched)
        # IEEE roots and quotients of 0 take a slow path, and one lane takes its warp along
        up, down = tl.where(live, a * rate, 1.0), tl.where(live, b, 1.0)
        w = w + tl.div_rn(up, tl.div_rn(tl.sqrt_rn(down), root) + eps)
    else:
        a = g
        if MOMENTS == 1:
            a = tl.load(a_ptr + offs, mask=touched, other=0.0) * beta1 + g
            g = tl.fma(a, beta1, g) if NESTEROV else a
        w = tl.fma(g, rate, w)
    if MOMENTS > 0:
        tl.store(a_ptr + offs, tl.where(live, a, 0.0), mask=touched)
    # a gradient of NaN or infinity stays in its own lane, and here it ends
    tl.store(w_ptr + offs, tl.where(live, w, 0.0), mask=touched)


@triton.jit
def _update_kernel(
    table_ptr,
    chunk_ptr,
    active_ptr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    weight_decay: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    MOMENTS: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
):
    """One chunk of one replica of one tensor: `_tables` says which and where everything lies."""
    chunk_ptr += 4 * tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + 9 * tl.load(chunk_ptr)
    r = tl.load(chunk_ptr + 1)
    i = tl.load(chunk_ptr + 2)
    end = tl.load(chunk_ptr + 3)
    if active_ptr is not None:
        end = tl.where(tl.load(active_ptr + r) == 0, i, end)
    p = tl.load(row_ptr + 7)
    stride = tl.load(row_ptr + 8)
    w_at = tl.load(row_ptr) + 4 * r * stride
    g_at = tl.load(row_ptr + 1) + 4 * r * stride
    a_at = tl.load(row_ptr + 2)
    b_at = tl.load(row_ptr + 3)
    a_at += tl.where(a_at == 0, 0, 4 * r * stride)
    b_at += tl.where(b_at == 0, 0, 4 * r * stride)
    bits_at = tl.load(row_ptr + 4)
    bits_ptr = (bits_at + r * tl.cdiv(p, 8)).to(tl.pointer_type(tl.uint8))
    masked_end = tl.where(bits_at == 0, 0, end)  # without a mask no byte is read

    lr = tl.load(tl.load(row_ptr + 6).to(tl.pointer_type(tl.float64)) + r)
    rate, root = -lr, lr
    if MOMENTS == 2:
        step = tl.load(tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32)) + r).to(tl.float64)
        rate = rate / (1.0 - tl.exp(step * log_beta1))
        root = tl.sqrt(1.0 - tl.exp(step * log_beta2))
    rate, root = rate.to(tl.float32), root.to(tl.float32)
    decay = (1.0 - lr * weight_decay).to(tl.float32) if DECOUPLED else tl.cast(weight_decay, tl.float32)

    # where all four pointers allow it 8 weights, a byte of the mask, at a time; then what is left
    aligned = ((w_at | g_at | a_at | b_at) & 15) == 0
    whole = tl.where(aligned, end - (end - i) % 8, i)
    offs_byte = tl.arange(0, BLOCK // 8)
    offs_bit = tl.arange(0, 8)
    offs = 8 * offs_byte[:, None] + offs_bit[None, :]  # [BLOCK / 8, 8]
    read = i + 8 * offs_byte < tl.minimum(whole, masked_end)
    following = tl.load(bits_ptr + i // 8 + offs_byte, mask=read, other=255)
    while i < whole:
        # the bytes of the next round, lest its loads wait for them first
        byte = following.to(tl.int32)
        read = i + BLOCK + 8 * offs_byte < tl.minimum(whole, masked_end)
        following = tl.load(bits_ptr + (i + BLOCK) // 8 + offs_byte, mask=read, other=255)
        inside = i + 8 * offs_byte < whole
        touched = (inside & (byte != 0))[:, None]
        live = (byte[:, None] >> offs_bit[None, :]) & 1 != 0
        w_ptr = tl.multiple_of((w_at + 4 * i).to(tl.pointer_type(tl.float32)), 16)
        g_ptr = tl.multiple_of((g_at + 4 * i).to(tl.pointer_type(tl.float32)), 16)
        update(
            w_ptr,
            tl.multiple_of((a_at + 4 * i).to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of((b_at + 4 * i).to(tl.pointer_type(tl.float32)), 16),
            offs,
            tl.load(w_ptr + offs, mask=touched, other=0.0),
            tl.load(g_ptr + offs, mask=touched, other=0.0),
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
            NESTEROV,
            DECOUPLED,
        )
        i += BLOCK
    i = whole
    offs = tl.arange(0, NARROW)
    while i < end:
        inside = i + offs < end
        byte = tl.load(bits_ptr + (i + offs) // 8, mask=i + offs < masked_end, other=255).to(tl.int32)
        touched = inside & (byte != 0)
        live = (byte >> ((i + offs) % 8).to(tl.int32)) & 1 != 0
        w_ptr = (w_at + 4 * i).to(tl.pointer_type(tl.float32))
        g_ptr = (g_at + 4 * i).to(tl.pointer_type(tl.float32))
        update(
            w_ptr,
            (a_at + 4 * i).to(tl.pointer_type(tl.float32)),
            (b_at + 4 * i).to(tl.pointer_type(tl.float32)),
            offs,
            tl.load(w_ptr + offs, mask=touched, other=0.0),
            tl.load(g_ptr + offs, mask=touched, other=0.0),
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
            NESTEROV,
            DECOUPLED,
        )
        i += NARROW


Column = Sequence[Tensor | None] | None
Lists = tuple[Sequence[Tensor], Column, Column, Column, Column, Column]  # w, g, a, b, masks, steps
Row = tuple[Any, ...]
Tables = tuple[Tensor, Tensor]

_TABLES: dict[tuple[int, ...], Tables] = {}
# a CUDA graph reads its tables for as long as it lives, and it is of no use without its weights
_CAPTURED: dict[tuple[int, ...], tuple[Tables, list[StorageWeakRef]]] = {}


@torch.no_grad()
def masked_sgd_many(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    buffers: Sequence[Tensor] | None,
    lr: Tensor,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    active: Tensor | None = None,
    kernels: str = "auto",
) -> None:
    """One SGD step in place over a list of tensors of R replicas.

    `weights`, `grads` and `buffers` are fp32 [R, ...], laid out alike, each replica dense; a mask is None or
    the packed bits of a tensor of P weights a replica, in the order of memory; `lr` is fp64 [R]. Buffers
    start at 0; without momentum they are None. A replica whose `active`, uint8 [R], is 0 stays as it is.
    On CUDA all of it is one launch. To capture it into a CUDA graph, take a step with the same tensors first.
    """
    if (buffers is None) != (momentum == 0):
        raise ValueError(f"expected buffers if and only if there is momentum, got momentum {momentum}")
    lists: Lists = (weights, grads, buffers, None, masks, None)
    if use_triton(kernels, lr):
        hyper = (momentum, 0.0, 0.0, 0.0, 0.0, weight_decay, 0.0, 0.0)
        constants = {"MOMENTS": 0 if buffers is None else 1, "NESTEROV": nesterov, "DECOUPLED": False}
        _launch(lists, lr, active, hyper, **constants)
        return
    for (w, g, a, *_), rate in _replicas(lists, lr, active):
        torch._fused_sgd_(
            [w],
            [g],
            [] if a is None else [a],
            weight_decay=weight_decay,
            momentum=momentum,
            lr=rate,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
        )


@torch.no_grad()
def masked_adam_many(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    betas: tuple[float, float] = (BETA1, BETA2),
    eps: float = EPS,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    active: Tensor | None = None,
    kernels: str = "auto",
) -> None:
    """One Adam step in place over a list of tensors, AdamW's where `decoupled`; see `masked_sgd_many`.

    `moments` are laid out as `weights`; `steps` hold one fp32 [R] for each tensor.
    """
    lists: Lists = (weights, grads, *moments, masks, steps)
    if use_triton(kernels, lr):
        logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
        hyper = (*betas, 1 - betas[0], 1 - betas[1], eps, weight_decay, *logs)
        _launch(lists, lr, active, hyper, MOMENTS=2, NESTEROV=False, DECOUPLED=decoupled)
        return
    update = torch._fused_adamw_ if decoupled else torch._fused_adam_
    for (w, g, a, b, _, step), rate in _replicas(lists, lr, active):
        update(
            [w],
            [g],
            [a],
            [b],
            [],
            [step],
            lr=rate,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def floor(weights: Sequence[Tensor], masks: Sequence[Tensor | None], moments: int) -> dict[str, int]:
    """Least bytes and FLOPs of a step over a list; `moments` is 1 for SGD with momentum, 2 for Adam.

    Bytes as DRAM moves them: what is read comes in granules of 64 bytes, 16 weights, of which one is kept;
    what is written goes back in sectors of 32, 8 weights. Every replica is taken to begin with a granule.
    """
    read = written = live = 0
    for w, bits in zip(weights, masks, strict=True):
        if bits is None:
            lanes = granules = w.numel()
        else:
            lanes = 8 * int(bits.count_nonzero())
            pairs = functional.pad(bits, (0, bits.shape[1] % 2)).view(-1, 2)
            granules = 16 * int(pairs.any(1).count_nonzero())
            read += bits.numel()
        read += 4 * (2 + moments) * granules
        written += 4 * (1 + moments) * lanes
        live += w.numel() if bits is None else int(count(bits))
    return {"bytes": read + written, "flops": (14 if moments == 2 else 6) * live}


def expected_bytes(density: float, moments: int) -> float:
    """Bytes of `floor` a weight, on average over random masks that keep each weight with that probability."""
    granule, sector = (1 - (1 - density) ** lanes for lanes in (16, 8))
    return 4 * (2 + moments) * granule + 4 * (1 + moments) * sector + 1 / 8


def _replicas(lists: Lists, lr: Tensor, active: Tensor | None) -> Iterator[tuple[Row, float]]:
    """Every active replica of every tensor as vectors, its gradient masked, and its learning rate."""
    rates = lr.tolist()
    awake = [True] * len(rates) if active is None else active.tolist()
    for row in _rows(lists, lr):
        p, stride = row[0].numel() // len(rates), _stride(row[0], len(rates))
        *laid, bits, step = row
        flat: list[Any] = [None if t is None else t.as_strided((len(rates), p), (stride, 1)) for t in laid]
        for r, rate in enumerate(rates):
            if not awake[r]:
                continue
            cut: list[Any] = [None if t is None else t[r] for t in flat]
            if bits is not None:
                cut[1] = torch.where(unpack(bits[r], p), cut[1], 0.0)
            yield (*cut, None, None if step is None else step.view(-1)[r]), rate


def _rows(lists: Lists, lr: Tensor) -> list[Row]:
    """One row for each tensor, checked."""
    lengths = [len(column) for column in lists if column is not None]
    if len(set(lengths)) != 1:
        raise ValueError(f"expected lists of equal lengths, got {lengths}")
    if lr.dtype != torch.float64 or lr.ndim != 1 or not lr.is_contiguous() or not len(lr):
        raise ValueError(f"expected lr as fp64 [R], got {_said(lr)}")
    r = len(lr)
    columns = [[None] * lengths[0] if column is None else column for column in lists]
    rows: list[Row] = list(zip(*columns, strict=True))
    for w, g, a, b, mask, step in rows:
        whole = is_dense(w.view(-1) if w.ndim and len(w) == 1 and w[0].is_contiguous() else w)
        if w.dtype != torch.float32 or w.device != lr.device or (r == 1 and not whole):
            raise ValueError(f"expected weights as dense fp32 on {lr.device}, got {_said(w)}")
        if r != 1 and (w.ndim == 0 or len(w) != r or not w[0].is_contiguous()):
            raise ValueError(f"expected weights [{r}, ...], each replica contiguous, got {_said(w)}")
        for name, t in (("gradient", g), ("moment", a), ("moment", b)):
            if t is not None and not alike(t, w):
                raise ValueError(f"expected the {name} as its weights, {_said(w)}, got {_said(t)}")
        bits = (r, -(-w.numel() // (8 * r)))
        if mask is not None and (mask.dtype != torch.uint8 or mask.shape != bits or not mask.is_contiguous()):
            raise ValueError(f"expected a mask as uint8 {list(bits)}, got {_said(mask)}")
        if step is not None and (
            step.dtype != torch.float32 or step.numel() != r or not step.is_contiguous()
        ):
            raise ValueError(f"expected a step as fp32 [{r}], got {_said(step)}")
        for t in (mask, step):
            if t is not None and t.device != w.device:
                raise ValueError(f"expected masks and steps on {w.device}, got {_said(t)}")
    return rows


def _stride(w: Tensor, replicas: int) -> int:
    """Numbers from one replica to the next."""
    return w.stride(0) if replicas > 1 else w.numel()


def is_dense(t: Tensor) -> bool:
    """Whether a tensor's numbers fill one piece of memory, in whatever order of axes."""
    return t.stride() == torch.empty_like(t, device="meta").stride()


def alike(t: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, device and shape and lie in memory in the same order."""
    return (t.dtype, t.device, t.shape) == (other.dtype, other.device, other.shape) and (
        t.stride() == other.stride()
        or all(n == 1 or i == j for n, i, j in zip(t.shape, t.stride(), other.stride(), strict=True))
    )


def _said(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}, strides {list(t.stride())}, on {t.device}"


def _launch(
    lists: Lists, lr: Tensor, active: Tensor | None, hyper: tuple[float, ...], **constants: int
) -> None:
    if active is not None and (
        active.dtype != torch.uint8 or active.shape != lr.shape or active.device != lr.device
    ):
        raise ValueError(f"expected active as uint8 [{len(lr)}] on {lr.device}, got {_said(active)}")
    columns = [column for column in lists if column is not None]
    key = (
        lr.numel(),
        lr.data_ptr(),
        *(n for w in lists[0] for n in (w.numel(), _stride(w, len(lr)))),
        *(0 if t is None else t.data_ptr() for column in columns for t in column),
    )
    capturing = _capturing(lr)
    tables = _TABLES.get(key)
    if tables is None:
        if capturing:
            raise ValueError(
                "expected a step with the same tensors, gradients too, before a CUDA graph captures it"
            )
        if len(_TABLES) >= 64:  # gradients that never come back to the same place
            _TABLES.clear()
        _let_go()
        tables = _TABLES[key] = _tables(lists, lr)
    if capturing:
        _let_go()
        _CAPTURED[key] = tables, [StorageWeakRef(w.untyped_storage()) for w in lists[0]]
    table, chunks = tables
    if len(chunks):
        with torch.cuda.device_of(lr):
            _update_kernel[(len(chunks),)](
                table,
                chunks,
                active,
                *hyper,
                **constants,
                BLOCK=BLOCK,
                NARROW=NARROW,
                num_warps=WARPS,
                num_stages=1,
                enable_fp_fusion=False,
            )
    torch.autograd.graph.increment_version(lists[0])


def _capturing(lr: Tensor) -> bool:
    return lr.is_cuda and torch.cuda.is_current_stream_capturing()


def _let_go() -> None:
    """Of the tables of graphs whose weights are gone."""
    gone = [key for key, (_, weights) in _CAPTURED.items() if any(w.expired() for w in weights)]
    for key in gone:
        del _CAPTURED[key]


def _tables(lists: Lists, lr: Tensor) -> Tables:
    """Addresses [T, 9] of w, g, a, b, mask, step, lr, the weights of a replica, and how far apart replicas
    are; then the chunks."""
    rows, r = _rows(lists, lr), len(lr)
    table = [
        [
            *(0 if t is None else t.data_ptr() for t in row),
            *(lr.data_ptr(), row[0].numel() // r, _stride(row[0], r)),
        ]
        for row in rows
    ]
    sizes = tuple(row[0].numel() // r for row in rows)
    return torch.tensor(table, dtype=torch.int64, device="cpu").to(lr.device), _chunks(sizes, r, lr.device)


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], replicas: int, device: torch.device) -> Tensor:
    """One program's work a row, [C, 4]: tensor, replica, first weight, last + 1."""
    chunk = BLOCK if replicas * sum(sizes) <= FEW else 4 * BLOCK
    rows = [
        (t, r, i, min(i + chunk, p))
        for t, p in enumerate(sizes)
        for r in range(replicas)
        for i in range(0, p, chunk)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4).to(device)
