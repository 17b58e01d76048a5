r"""Max pooling of images as torch has them, for CPUs: torch's own goes pixel by pixel.

    y[b, c, p, q] = max over i, j of x[b, c, p s + i - pad, q s + j - pad], then ReLU where asked for

| name | shape         | dtype |         Floor: x and y once each.
| x    | [B, C, H, W]  | fp32  |
| y    | [B, C, P, Q]  | fp32  |

Kernel, stride and padding are pairs, down and across; pixels of a row lie side by side, all else may have
any strides. NaN spreads as in torch. A row of y is the largest of each column of its rows of x, then of each
window.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native

WIDEST = 1 << 15  # pixels of a row, its padding with it
MANY = 1 << 16  # numbers in x from which on a second thread pays
Pair = tuple[int, int]


def floor(x: Tensor, y: Tensor) -> dict[str, int]:
    """Bytes and FLOPs of `max_pool_rows`."""
    return {"bytes": 4 * (x.numel() + y.numel()), "flops": x.numel()}


def reference(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool = False) -> Tensor:
    """As torch does it."""
    y = F.max_pool2d(x, kernel, stride, padding)
    return y.relu() if relu else y


def max_pool_rows(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool = False, kernels: str = "auto"
) -> Tensor:
    """The largest of each window as [B, C, P, Q]."""
    _native.refuse_gradient(x=x)
    y = x.new_empty(*x.shape[:2], *places(x, kernel, stride, padding))
    bind_max_pool_rows(x.contiguous(), y, kernel, stride, padding, relu, kernels)()
    return y


def places(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """P and Q; ValueError where there is no such pool."""
    inside = all(0 <= 2 * pad <= k for k, pad in zip(kernel, padding, strict=True))
    rooms = [size + 2 * pad - k for size, k, pad in zip(x.shape[2:], kernel, padding, strict=True)]
    wide = x.shape[3] + 2 * padding[1]
    if not inside or min(*rooms, *stride) < 0 or 0 in stride or wide > WIDEST:
        raise ValueError(
            f"expected windows that images of {x.shape[2]} x {x.shape[3]} hold, rows of at most {WIDEST} "
            f"with padding, got kernel {kernel}, stride {stride}, padding {padding}"
        )
    return rooms[0] // stride[0] + 1, rooms[1] // stride[1] + 1


def bind_max_pool_rows(
    x: Tensor,
    y: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    relu: bool = False,
    kernels: str = "auto",
) -> Callable[[], None]:
    """`max_pool_rows` on fixed tensors: each call of what this returns is one foreign call."""
    down, across = places(x, kernel, stride, padding)
    b, c, h, w = x.shape
    for name, t, shape in (("x", x, (b, c, h, w)), ("y", y, (b, c, down, across))):
        _native.check(name, t, shape)
        if shape[3] > 1 and t.numel() and t.stride(3) != 1:
            raise ValueError(f"{name}: expected rows of pixels side by side, got strides {t.stride()}")
    if not use_native(kernels):

        def run() -> None:
            y.copy_(reference(x, kernel, stride, padding, relu))

        return run
    arguments = _Arguments(
        x=x.data_ptr(),
        y=y.data_ptr(),
        images=b,
        channels=c,
        height=h,
        width=w,
        down=down,
        across=across,
        kernel_down=kernel[0],
        kernel_across=kernel[1],
        step_down=stride[0],
        step_across=stride[1],
        padding_down=padding[0],
        padding_across=padding[1],
        x_image=x.stride(0),
        x_channel=x.stride(1),
        x_row=x.stride(2),
        y_image=y.stride(0),
        y_channel=y.stride(1),
        y_row=y.stride(2),
        relu=relu,
        threads=min(_native.threads(), 1 + x.numel() // MANY),
    )
    return _native.bind("max_pool_rows", arguments, x, y)


class _Arguments(ctypes.Structure):  # struct max_pool_rows
    _fields_ = [
        *[(f, ctypes.c_void_p) for f in ("x", "y")],
        *[(f, ctypes.c_int64) for f in ("images", "channels", "height", "width", "down", "across")],
        *[(f, ctypes.c_int64) for f in ("kernel_down", "kernel_across", "step_down", "step_across")],
        *[(f, ctypes.c_int64) for f in ("padding_down", "padding_across")],
        *[(f, ctypes.c_int64) for f in ("x_image", "x_channel", "x_row", "y_image", "y_channel", "y_row")],
        *[(f, ctypes.c_int32) for f in ("relu", "threads")],
    ]
