r"""Batch norm in training, of images that lie features-major on a CPU, and its gradients.

    mean, var = moments of x[c, :],  y = (x - mean) / sqrt(var + eps) * scale + shift
    u = (x - mean) / sqrt(var + eps),  dx = scale / sqrt(var + eps) (dy - average of dy - u average of dy u)

| name          | shape  | dtype |      Floor in bytes: a channel of a stage of ResNet-18 stays in the
| x, y, dy, dx  | [C, L] | fp32  |      second-level cache between its two passes, so forward reads x and
| scale, shift  | [C]    | fp32  |      writes y once, 8 a number; backward reads x and dy and writes dx, 12
| mean, var     | [C]    | fp64  |

L is the pixels of a channel in all images, H * W * B. var divides by L. Without scale and shift they are 1
and 0. torch takes a channel that lies so for one long image and sums it one number at a time; here the
moments are put together in double from stretches of 2,048. Results do not depend on the number of threads,
which is torch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native


def floor(numel: int, backward: bool = False) -> dict[str, int]:
    """Bytes and FLOPs of `batch_norm` or `batch_norm_backward` on so many numbers."""
    return {"bytes": (12 if backward else 8) * numel, "flops": (8 if backward else 6) * numel}


def reference(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var in plain torch, in the dtype of x."""
    var, mean = torch.var_mean(x, 1, correction=0)
    y = (x - mean[:, None]) * (var + eps).rsqrt()[:, None]
    y = y if scale is None else y * scale[:, None]
    return y if shift is None else y + shift[:, None], mean, var


def reference_grads(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dshift in plain torch."""
    narrow = (var + eps).rsqrt()[:, None]
    unit = (x - mean[:, None]) * narrow
    dscale, dshift = (dy * unit).sum(1), dy.sum(1)
    slope = narrow if scale is None else narrow * scale[:, None]
    n = max(1, x.shape[1])
    return slope * (dy - dshift[:, None] / n - unit * dscale[:, None] / n), dscale, dshift


def batch_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Fill y; mean and var, fp64."""
    c = _check({"x": x, "y": y}, {"scale": scale, "shift": shift})
    if not use_native(kernels):
        slope, rest = (None if t is None else t.double() for t in (scale, shift))
        found, mean, var = reference(x.double(), slope, rest, eps)
        y.copy_(found)
        return mean, var
    mean, var = (torch.empty(c, dtype=torch.float64, device="cpu") for _ in range(2))
    _call("batch_norm", x, eps, mean=mean, var=var, y=y, scale=scale, shift=shift)
    return mean, var


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    dx: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Fill dx where it is given; dscale and dshift."""
    images = {"x": x, "dy": dy} if dx is None else {"x": x, "dy": dy, "dx": dx}
    c = _check(images, {"scale": scale})
    for name, t in (("mean", mean), ("var", var)):
        _native.check(name, t, (c,), torch.float64, contiguous=True)
    if not use_native(kernels):
        found, dscale, dshift = reference_grads(
            dy.double(), x.double(), mean, var, None if scale is None else scale.double(), eps
        )
        if dx is not None:
            dx.copy_(found)
        return dscale.float(), dshift.float()
    dscale, dshift = (torch.empty(c, dtype=torch.float32, device="cpu") for _ in range(2))
    _call(
        "batch_norm_backward",
        x,
        eps,
        mean=mean,
        var=var,
        dy=dy,
        dx=dx,
        scale=scale,
        dscale=dscale,
        dshift=dshift,
    )
    return dscale, dshift


def _check(images: dict[str, Tensor], vectors: dict[str, Tensor | None]) -> int:
    """Raise where a tensor is not what C reads; channels."""
    shape = images["x"].shape
    if len(shape) != 2:
        raise ValueError(f"x: expected [C, L], got {list(shape)}")
    for name, t in images.items():
        _native.check(name, t, shape, contiguous=True)
    for name, v in vectors.items():
        _native.vector(name, v, shape[0])
    return shape[0]


def _call(entry: str, x: Tensor, eps: float, **tensors: Tensor | None) -> None:
    c, length = x.shape
    given = {name: _native.address(t) for name, t in tensors.items()}
    arguments = _BatchNorm(
        x=x.data_ptr(), eps=eps, channels=c, length=length, threads=_native.threads(), **given
    )
    _native.bind(entry, arguments, x, *tensors.values())()


class _BatchNorm(ctypes.Structure):  # struct batch_norm
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "scale", "shift", "y", "dy", "dx", "dscale", "dshift")],
        *[(name, ctypes.c_void_p) for name in ("mean", "var")],
        ("eps", ctypes.c_double),
        *[(name, ctypes.c_int64) for name in ("channels", "length")],
        ("threads", ctypes.c_int32),
    ]
