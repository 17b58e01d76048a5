r"""Attention among the tokens of each sequence on a CPU, on features-major activations.

    y[:, t] = sum over s of softmax over s of (scale q[:, t] . k[:, s]) v[:, s],    `causal`: over s <= t

| name | shape     | dtype |          Floor, bytes and FLOPs, of N = B T tokens in sequences of T:
| q, y | [H, D, N] | fp32  |          8 (H + G) D N, each number read or written once;
| k, v | [G, D, N] | fp32  |          4 H D N T, half of them where it is causal

H / G queries in a row share keys and values, as in Ainslie et al. 2023 (arXiv:2305.13245); G is mostly H.

torch wants [B, H, T, D] and tokens side by side in what it gives; between products that work features-major
each is laid anew. Here the lanes of a vector are queries, so that q, k, v and y are used as such products
leave and take them, and a softmax needs no sum across lanes.

Rows may lie apart, and heads; nothing between N and the stride of a row is read or written. Results do not
depend on the number of threads, torch's. NaN and infinite products spread as in torch's own formula; a value
of weight 0 counts as 0 times it, of a causal one the values that a few queries behind see.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native
from sparselth.kernels.step_parts import Call

WIDEST = 256  # features of a head: what a thread's scratch has room for
MANY = 1 << 17  # products from which on a second thread pays


def floor(
    heads: int, width: int, batch: int, tokens: int, causal: bool = False, group: int = 1
) -> dict[str, int]:
    """Bytes and FLOPs of `self_attention`; `group`: H / G."""
    numbers = heads * width * batch * tokens
    seen = (tokens + 1) / 2 if causal else tokens
    return {"bytes": 8 * (numbers + numbers // group), "flops": int(4 * numbers * seen)}


def reference(
    q: Tensor, k: Tensor, v: Tensor, tokens: int, scale: float | None = None, causal: bool = False
) -> Tensor:
    """As torch has it, one by one."""
    q, k, v = (t.unflatten(2, (-1, tokens)).permute(2, 0, 3, 1) for t in (q, k, v))  # [B, H, T, D]
    k, v = (t.repeat_interleave(q.shape[1] // max(1, t.shape[1]), 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).permute(1, 3, 0, 2).flatten(2)


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: int,
    scale: float | None = None,
    causal: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """y [H, D, N] of sequences of `tokens`; `scale`: None is 1 / sqrt(D)."""
    y = torch.empty(q.shape, dtype=torch.float32, device="cpu")
    bind_self_attention(q, k, v, y, tokens, scale, causal, kernels)()
    return y


def bind_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    tokens: int,
    scale: float | None = None,
    causal: bool = False,
    kernels: str = "auto",
) -> Call:
    """`self_attention` on fixed tensors; y is other memory than that of q, k and v.

    ValueError: tensors that are not [H or G, D, N], or N that are no whole sequences.
    """
    if q.dim() != 3:
        raise ValueError(f"q: expected [H, D, N], got {[*q.shape]}")
    h, d, n = q.shape
    g = k.shape[0] if k.dim() == 3 else 0
    if h and (not g or h % g):
        raise ValueError(f"k: expected [a divisor of {h}, {d}, {n}], got {[*k.shape]}")
    for name, t in {"q": q, "k": k, "v": v, "y": y}.items():
        _native.check(name, t, (h if t is q or t is y else g, d, n))
        if n > 1 and t.stride(2) != 1:
            raise ValueError(f"{name}: expected tokens side by side, got strides {t.stride()}")
    if tokens < 1 or n % tokens:
        raise ValueError(f"tokens: expected a divisor of {n}, got {tokens}")
    scale = d**-0.5 if scale is None else scale
    if use_native(kernels) and d <= WIDEST:
        arguments = _SelfAttention(
            *(t.data_ptr() for t in (q, k, v, y)),
            *(n // tokens, h, h // max(1, g), d, tokens),
            *(t.stride(axis) for axis in (0, 1) for t in (q, k, v, y)),
            scale=scale,
            causal=causal,
            threads=_native.threads() if h * n * tokens >= MANY else 1,
        )
        return _native.bind("self_attention", arguments, q, k, v, y)

    def run() -> None:
        y.copy_(reference(q, k, v, tokens, scale, causal))

    return run


class _SelfAttention(ctypes.Structure):  # struct self_attention
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "y")],
        *[(name, ctypes.c_int64) for name in ("batch", "heads", "group", "width", "tokens")],
        *[(name, ctypes.c_int64) for name in ("q_head", "k_head", "v_head", "y_head")],
        *[(name, ctypes.c_int64) for name in ("ldq", "ldk", "ldv", "ldy")],
        ("scale", ctypes.c_float),
        *[(name, ctypes.c_int32) for name in ("causal", "threads")],
    ]
