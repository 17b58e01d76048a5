r"""Attention of one new token on a CPU, as a decoder has it with a cache of the keys and values before it.

    keys = past_keys, k    values = past_values, v    one behind the other, in memory of their own
    y = sum over s of softmax over s of (scale q . keys[s]) values[s]

| name                   | shape            | dtype |
| q, y                   | [B, H, 1, D]     | fp32  |          Floor, bytes and FLOPs:
| k, v                   | [B, G, 1, D]     | fp32  |          4 S + 4 numbers for each of B G D, 2 of
| past_keys, past_values | [B, G, S, D]     | fp32  |          B H D, each read or written once;
| keys, values           | [B, G, S + 1, D] | fp32  |          4 FLOPs for each of S + 1 keys and B H D

H / G queries in a row share keys and values, as in Ainslie et al. 2023 (arXiv:2305.13245); G is mostly H.

torch has three calls for it, two that copy and one that reads the copies. Here what is copied is used while
it is in registers. y lies as [B, 1, H, D], so that its heads side by side are a view. Tensors may lie in any
way in which the numbers of D are neighbours. Results do not depend on the number of threads, torch's.

NaN spreads as in torch; so do infinite products, but for heads where an infinite value has weight 0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native
from sparselth.kernels.step_parts import Call

MANY = 1 << 15  # numbers of the past from which on a second thread pays

Found = tuple[Tensor, Tensor, Tensor]  # y, keys, values


def floor(batch: int, heads: int, past: int, width: int, group: int = 1) -> dict[str, int]:
    """Bytes and FLOPs of `token_attention`; `group`: H / G."""
    each = batch * heads * width
    kept = each // group
    return {"bytes": 4 * (kept * (4 * past + 4) + 2 * each), "flops": 4 * each * (past + 1)}


def reference(
    q: Tensor, k: Tensor, v: Tensor, past_keys: Tensor, past_values: Tensor, scale: float | None = None
) -> Found:
    """As torch has it, one by one."""
    keys, values = torch.cat([past_keys, k], -2), torch.cat([past_values, v], -2)
    each = q.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # the queries of a group as rows
    scores = each @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ values).reshape(q.shape), keys, values


def follows(new: Sequence[int], past_keys: Tensor, past_values: Tensor) -> bool:
    """Whether k and v of this shape, [B, G, 1, D], can stand behind these."""
    past = past_keys, past_values
    if any(t.dim() != 4 or t.dtype != torch.float32 or not t.is_cpu or t.stride(3) != 1 for t in past):
        return False
    b, g, _, d = new
    return past_keys.shape == past_values.shape == (b, g, past_keys.shape[2], d)


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    scale: float | None = None,
    kernels: str = "auto",
) -> Found:
    """y, keys and values; `scale`: None is 1 / sqrt(D)."""
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"q: expected [B, H, 1, D], got {[*q.shape]}")
    b, h, _, d = q.shape
    y = torch.empty(b, 1, h, d, dtype=torch.float32, device="cpu").transpose(1, 2)
    bound = TokenAttention(q, k, v, y, scale, kernels)
    if not follows(k.shape, past_keys, past_values):
        raise ValueError(
            f"past_keys, past_values: expected fp32 [{b}, {k.shape[1]}, S, {d}] on a CPU, the numbers of D "
            f"side by side, got {[*past_keys.shape]} and {[*past_values.shape]}"
        )
    found = bound.follow(past_keys, past_values)
    bound.run()
    return y, *found


class TokenAttention:
    """`token_attention` on fixed q, k, v and y; each `run` is of the past that it follows."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, y: Tensor, scale: float | None = None, kernels: str = "auto"
    ) -> None:
        """ValueError: tensors that are not [B, H or G, 1, D]; y lies as [B, 1, H, D]."""
        b, h, _, d = q.shape
        g = k.shape[1] if k.dim() == 4 else 0
        if h and (not g or h % g):
            raise ValueError(f"k: expected [{b}, a divisor of {h}, 1, {d}], got {[*k.shape]}")
        for name, t in {"q": q, "k": k, "v": v, "y": y}.items():
            _native.check(name, t, (b, h if t is q or t is y else g, 1, d))
            if d > 1 and t.stride(3) != 1:
                raise ValueError(f"{name}: expected the numbers of D side by side, got strides {t.stride()}")
        if not y.transpose(1, 2).is_contiguous():
            raise ValueError(f"y: expected heads side by side, got strides {y.stride()}")
        self.new, self.scale = (q, k, v, y), d**-0.5 if scale is None else scale
        self.held: tuple[Tensor, ...] = ()  # what the next run reads and writes
        self.run: Call = self._run
        self.native = use_native(kernels)
        if self.native:
            self.arguments = _TokenAttention(
                *(t.data_ptr() for t in self.new),
                *(b, g, h // max(1, g), d),
                *(stride for t in (q, k, v) for stride in t.stride()[:2]),
                scale=self.scale,
            )
            self.run = _native.bind("token_attention", self.arguments, q, k, v, y)

    def follow(self, past_keys: Tensor, past_values: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values, that the next run fills. Who calls it has asked `follows`; nothing is checked."""
        b, h, s, d = past_keys.shape
        keys, values = (torch.empty(b, h, s + 1, d, dtype=torch.float32, device="cpu") for _ in "kv")
        self.held = past_keys, past_values, keys, values
        if self.native:
            a = self.arguments
            a.past_keys, a.past_values, a.keys, a.values = (t.data_ptr() for t in self.held)
            a.keys_batch, a.keys_head, a.keys_row, _ = past_keys.stride()
            a.values_batch, a.values_head, a.values_row, _ = past_values.stride()
            a.past, a.threads = s, _native.threads() if past_keys.numel() >= MANY else 1
        return keys, values

    def leave(self) -> None:
        """Hold nothing of others any more."""
        self.held = ()

    def _run(self) -> None:
        (q, k, v, y), (past_keys, past_values, keys, values) = self.new, self.held
        found = reference(q, k, v, past_keys, past_values, self.scale)
        for to, new in zip((y, keys, values), found, strict=True):
            to.copy_(new)


class _TokenAttention(ctypes.Structure):  # struct token_attention
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "y")],
        *[(name, ctypes.c_int64) for name in ("batch", "heads", "group", "width")],
        *[(name, ctypes.c_int64) for name in ("q_batch", "q_row", "k_batch", "k_head", "v_batch", "v_head")],
        *[(name, ctypes.c_void_p) for name in ("past_keys", "past_values", "keys", "values")],
        *[(name, ctypes.c_int64) for name in ("past", "keys_batch", "keys_head", "keys_row")],
        *[(name, ctypes.c_int64) for name in ("values_batch", "values_head", "values_row")],
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]
