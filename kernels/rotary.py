r"""Rotary positions on a CPU, features-major: each feature of a head mixed with another one of it.

    y[h, d, n] = x[h, first[d], n] a[d, n] + x[h, second[d], n] b[d, n]

| name          | shape     | dtype |          Floor, bytes and FLOPs:
| x, y          | [H, D, N] | fp32  |          8 H D N + 8 D N + 8 D, each number read or written once
| a, b          | [D, N]    | fp32  |          3 H D N
| first, second | [D]       | int32 |

Su et al. 2021 (arXiv:2104.09864) turn pairs of features by an angle that grows with a token's position: a is
its cosine, b its sine with a sign, `first` each feature and `second` the other one of its pair, neighbours or
half a head apart. torch has two products, a sum, a negation and a concatenation for it, on [B, H, T, D].

Rows may lie apart, and heads; nothing between N and the stride of a row is read or written. Results do not
depend on the number of threads, torch's. NaN spreads from what is read.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native
from sparselth.kernels.step_parts import Call

MANY = 1 << 16  # numbers from which on a second thread pays


def floor(heads: int, width: int, columns: int) -> dict[str, int]:
    """Bytes and FLOPs of `rotary`."""
    return {"bytes": 8 * width * (heads * columns + columns + 1), "flops": 3 * heads * width * columns}


def reference(x: Tensor, first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """By its formula."""
    return x[:, first.long()] * a + x[:, second.long()] * b


def rotary(x: Tensor, first: Tensor, second: Tensor, a: Tensor, b: Tensor, kernels: str = "auto") -> Tensor:
    """y [H, D, N]."""
    y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    bind_rotary(x, first, second, a, b, y, kernels)()
    return y


def bind_rotary(
    x: Tensor, first: Tensor, second: Tensor, a: Tensor, b: Tensor, y: Tensor, kernels: str = "auto"
) -> Call:
    """`rotary` on fixed tensors; y is other memory than that of x.

    ValueError: tensors that are not [H, D, N], [D, N] and [D] of one H, D and N; features that no head has.
    """
    if x.dim() != 3:
        raise ValueError(f"x: expected [H, D, N], got {[*x.shape]}")
    h, d, n = x.shape
    for name, t in {"x": x, "y": y}.items():
        _native.check(name, t, (h, d, n))
        if n > 1 and t.stride(2) != 1:
            raise ValueError(f"{name}: expected tokens side by side, got strides {t.stride()}")
    if x.data_ptr() == y.data_ptr() and x.numel():
        raise ValueError("y: expected other memory than that of x")
    for name, t in {"a": a, "b": b}.items():
        _native.matrix(name, t, d, n)
    for name, t in {"first": first, "second": second}.items():
        if t.shape != (d,) or t.dtype != torch.int32 or not t.is_cpu or not t.is_contiguous():
            raise ValueError(f"{name}: expected int32 [{d}] on a CPU, got {t.dtype} {[*t.shape]}")
        if d and not 0 <= int(t.min()) <= int(t.max()) < d:
            raise ValueError(f"{name}: expected features 0 to {d - 1}, got {int(t.min())} to {int(t.max())}")
    if use_native(kernels):
        arguments = _Rotary(
            *(t.data_ptr() for t in (x, first, second, a, b, y)),
            *(h, d, n),
            *(x.stride(0), y.stride(0), x.stride(1), a.stride(0), b.stride(0), y.stride(1)),
            threads=_native.threads() if x.numel() >= MANY else 1,
        )
        return _native.bind("rotary", arguments, x, first, second, a, b, y)

    def run() -> None:
        y.copy_(reference(x, first, second, a, b))

    return run


class _Rotary(ctypes.Structure):  # struct rotary
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "first", "second", "a", "b", "y")],
        *[(name, ctypes.c_int64) for name in ("heads", "width", "columns")],
        *[(name, ctypes.c_int64) for name in ("x_head", "y_head", "ldx", "lda", "ldb", "ldy")],
        ("threads", ctypes.c_int32),
    ]
