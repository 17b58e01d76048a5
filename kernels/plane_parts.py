r"""What stands between convolutions on planes, for inference on CPUs: activations, means, factors.

    activate       x = act(x), in place
    plane_means    y[b, c] = mean over p, q of x[b, c, p, q]
    scale_planes   x[b, c, p, q] = x[b, c, p, q] act(s[b, c]), in place

| name | shape         | dtype |         Floor in bytes:
| x    | [B, C, H, W]  | fp32  |         activate, scale_planes   8 a number of x
| y, s | [B, C, 1, 1]  | fp32  |         plane_means              4 a number of x

Images are `Planes`, as `sparse_conv2d_rows` reads and writes them; what lies around an image is neither read
nor written, so that zeros there stay zeros whatever act(0) is. Each function checks once and gives a call for
`sequence`. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from sparselth.kernels import _activations, _native
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels._choose import use_native
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import Call

MANY = 1 << 15  # numbers times a factor from which on a second thread pays
PLANE = 50  # of them are as much work as beginning with another plane
SLOW = {"sigmoid": 7.0, "silu": 7.0}  # of them, this activation of one number


def floor(name: str, numel: int) -> dict[str, int]:
    """Bytes and FLOPs of an op on `numel` numbers of x; an activation counts as four."""
    numbers, flops = {"activate": (8, 4), "plane_means": (4, 1), "scale_planes": (8, 1)}[name]
    return {"bytes": numbers * numel, "flops": flops * numel}


def bind_activate(x: Planes, activation: str, kernels: str = "auto") -> Call:
    """act(x) in place, one of ACTIVATIONS."""
    _activations.number(activation)
    if not use_native(kernels):
        return lambda: x.images.copy_(ACTIVATIONS[activation](x.images))
    return _native.bind("activate_planes", _arguments(x, None, activation, SLOW.get(activation, 1.0)), x)


def bind_plane_means(x: Planes, y: Planes, kernels: str = "auto") -> Call:
    """The mean of each image of x into y, whose images are of 1 x 1 pixels."""
    single = _single("y", y, x)
    if not use_native(kernels):
        return lambda: single.copy_(x.images.mean((2, 3), keepdim=True))
    return _native.bind("plane_means", _arguments(x, single, "none", 0.5), x, y)


def bind_scale_planes(x: Planes, s: Planes, activation: str = "none", kernels: str = "auto") -> Call:
    """x times act(s) in place, one factor for each image of s, which are of 1 x 1 pixels."""
    _activations.number(activation)
    single = _single("s", s, x)
    if not use_native(kernels):
        return lambda: x.images.mul_(ACTIVATIONS[activation](single))
    return _native.bind("scale_planes", _arguments(x, single, activation, 1.0), x, s)


class _Arguments(ctypes.Structure):  # struct plane_parts
    _fields_ = [
        *[(f, ctypes.c_void_p) for f in ("x", "single")],
        *[(f, ctypes.c_int64) for f in ("images", "channels", "height", "width")],
        *[(f, ctypes.c_int64) for f in ("x_image", "x_channel", "x_row", "single_image", "single_channel")],
        *[(f, ctypes.c_int32) for f in ("activation", "threads")],
    ]


def _single(name: str, t: Planes, x: Planes) -> Tensor:
    batch, channels, _ = x.memory.shape
    _native.check(name, t.images, (batch, channels, 1, 1))
    return t.images


def _arguments(x: Planes, single: Tensor | None, activation: str, cost: float) -> _Arguments:
    """`cost`: of a number of x, in numbers times a factor."""
    batch, channels, height, width = x.images.shape
    work = batch * channels * (PLANE + cost * height * width)
    image, channel, row, _ = x.images.stride()
    if row == width:  # all of an image is one row
        height, width = 1, height * width
    return _Arguments(
        x=x.images.data_ptr(),
        single=_native.address(single),
        images=batch,
        channels=channels,
        height=height,
        width=width,
        x_image=image,
        x_channel=channel,
        x_row=row,
        single_image=0 if single is None else single.stride(0),
        single_channel=0 if single is None else single.stride(1),
        activation=_activations.number(activation),
        threads=_native.threads() if work >= MANY else 1,
    )
