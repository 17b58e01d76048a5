r"""Convolution of each channel with a sparse filter of its own, for inference on CPUs.

    y[b, c, p, q] = act(bias[c] + sum over kept (c, i, j) of v x[b, c, p s + i - pad, q s + j - pad])

| name   | shape           | dtype |          Floor, bytes and FLOPs:
| x      | [B, C, H, W]    | fp32  |          x, y and the bias once each,
| y      | [B, C, P, Q]    | fp32  |          4 + 1 bytes a kept weight,
| bias   | [C]             | fp32  |          2 kept P Q B FLOPs
| packed | `DepthwiseRows` |       |  the kept weights and where they are

Kernels have k x k places, k odd; the stride s is 1 or 2 and pad is k // 2: P = ceil(H / s), Q = ceil(W / s).
`sparse_conv2d_rows` takes what these filters are, too, but goes through all channels for each of them; here a
channel is copied to where the first-level cache holds it and no other is looked at. x and y may be `Planes`.

A pruned weight is not multiplied: NaN and infinity in x reach y through kept weights only. The zeros around
the image are multiplied like any pixel. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _activations, _native
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels._choose import use_native
from sparselth.kernels.sparse_conv2d_rows import LINE, Planes

LARGEST = 15  # places of a kernel's side
ROOM = 1 << 16  # floats that a thread has for a channel: SCRATCH of native.h
RUN = 13 * LINE  # places of y that registers hold
PLANE = 512  # numbers that are as much work as beginning with another channel
WORK = 1 << 16  # numbers that pay for another thread


@dataclass(frozen=True, eq=False)
class DepthwiseRows:
    """The kept weights of W [C, 1, k, k], channel by channel, for images of one size."""

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    stride: int
    lead: int  # zeros in front of a channel's numbers, in floats
    pitch: int  # floats from one of its planes to the next
    period: int  # places of y from which on masks are the same again
    starts: Tensor  # int32 [C + 1]: where the kept weights of a channel begin
    taps: Tensor  # uint8 [kept]: i k + j
    values: Tensor  # fp32 [kept]
    reads: Tensor  # uint8 [C]: a bit for each plane that is read
    cells: Tensor  # int32 [k k]: from a place of y to its input in the planes
    cuts: Tensor  # int32 [k k]: where the mask of a place of the kernel begins
    masks: Tensor  # int32, for each column distance: -1 where its input is in the row, else 0

    @staticmethod
    def from_dense(weight: Tensor, size: tuple[int, int], stride: int = 1) -> DepthwiseRows:
        """The numbers of a weight that are not zero, for images of this size."""
        if weight.dim() != 4 or weight.dtype != torch.float32 or not weight.is_cpu:
            raise ValueError(
                f"expected a weight [C, 1, k, k] in fp32 on a CPU, "
                f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
            )
        weight = weight.detach()
        c, one, k, wide = weight.shape
        if (one, wide, k % 2) != (1, k, 1) or k > LARGEST or stride not in (1, 2) or min(size) < 1:
            raise ValueError(
                f"expected a weight [C, 1, k, k] with an odd k up to {LARGEST}, stride 1 or 2, and images, "
                f"got {list(weight.shape)}, stride {stride}, images of {size[0]} x {size[1]}"
            )
        down, across = (-(-side // stride) for side in size)
        far = -(-(k // 2) // stride)  # rows and columns of zeros that are read
        around = max(1, far * (across + 1))  # or more than that: vectors write beyond a row
        lead = _lines(around)
        pitch = lead + _lines(_lines(down * across) + around)
        if stride**2 * pitch + _lines(down * across) > ROOM:
            raise ValueError(f"images of {size[0]} x {size[1]} are too large")

        step = torch.arange(k, device="cpu") - k // 2
        whole, rest = step.div(stride, rounding_mode="floor"), step % stride
        plane = rest[:, None] * stride + rest
        cells = plane * pitch + whole[:, None] * across + whole
        period = lcm(across, LINE)
        column = torch.arange(period + RUN, device="cpu") % across
        inputs = torch.arange(-far, far + 1, device="cpu")[:, None] + column
        masks = -((inputs >= 0) & (inputs < across)).int()

        channel, i, j = weight[:, 0].nonzero().unbind(1)
        starts = torch.zeros(c + 1, dtype=torch.int32, device="cpu")
        starts[1:] = torch.bincount(channel, minlength=c).cumsum(0)
        read = torch.zeros(c, 4, dtype=torch.bool, device="cpu")
        read[channel, plane[i, j]] = True
        bits = 2 ** torch.arange(4, device="cpu")
        return DepthwiseRows(
            shape=(c, 1, k, k),
            size=(size[0], size[1]),
            stride=stride,
            lead=lead,
            pitch=pitch,
            period=period,
            starts=starts,
            taps=(i * k + j).to(torch.uint8),
            values=weight[channel, 0, i, j],
            reads=(read * bits).sum(1).to(torch.uint8),
            cells=cells.flatten().int(),
            cuts=((whole + far) * masks.shape[1]).expand(k, k).flatten().int(),
            masks=masks,
        )

    @property
    def out(self) -> tuple[int, int]:
        """P and Q."""
        return -(-self.size[0] // self.stride), -(-self.size[1] // self.stride)

    @property
    def kept(self) -> int:
        return self.values.numel()

    def bytes(self) -> int:
        """Memory of values and index."""
        held = self.starts, self.taps, self.values, self.reads, self.cells, self.cuts, self.masks
        return sum(t.numel() * t.element_size() for t in held)

    def to_dense(self) -> Tensor:
        """The dense [C, 1, k, k], 0 where nothing is kept."""
        dense = self.values.new_zeros(self.shape)
        channel = torch.repeat_interleave(self.starts.diff().long())
        dense.flatten(1)[channel, self.taps.long()] = self.values
        return dense


def _lines(floats: int) -> int:
    """As many in whole cache lines."""
    return -(-floats // LINE) * LINE


def floor(packed: DepthwiseRows, batch: int) -> dict[str, int]:
    """Bytes and FLOPs of `depthwise_rows`."""
    c, (h, w), (p, q) = packed.shape[0], packed.size, packed.out
    return {
        "bytes": 5 * packed.kept + 4 * c + 4 * batch * c * (h * w + p * q),
        "flops": 2 * packed.kept * p * q * batch,
    }


def reference(
    packed: DepthwiseRows, x: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """The dense convolution."""
    c, _, k, _ = packed.shape
    y = F.conv2d(x, packed.to_dense().to(x.dtype), bias, packed.stride, k // 2, groups=c)
    return ACTIVATIONS[activation](y)


def depthwise_rows(
    packed: DepthwiseRows,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    kernels: str = "auto",
) -> Tensor:
    """act(conv(x, W) + b) as [B, C, P, Q]; act is one of ACTIVATIONS."""
    return depthwise_rows_call(packed, bias, activation, kernels)(x)


def depthwise_rows_call(
    packed: DepthwiseRows, bias: Tensor | None = None, activation: str = "none", kernels: str = "auto"
) -> Callable[[Tensor], Tensor]:
    """`depthwise_rows` of any x, for repeated calls: what a batch needs is made once."""
    _activations.number(activation)
    _native.refuse_gradient(bias=bias, values=packed.values)
    c, native = packed.shape[0], use_native(kernels)
    _native.vector("bias", bias, c)
    made: dict[tuple[int, int], _Arguments] = {}

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        _native.check("x", x, (len(x), c, *packed.size))
        if not native:
            return reference(packed, x, bias, activation)
        y = x.new_empty(len(x), c, *packed.out)
        key = len(x), _native.threads()
        if key not in made:
            made[key] = _arguments(packed, len(x), bias, activation)
        arguments = _Arguments.from_buffer_copy(made[key])  # threads may call at once
        arguments.x, arguments.y = x.data_ptr(), y.data_ptr()
        _native.bind("depthwise_rows", arguments)()
        return y

    return run


def bind_depthwise_rows(
    packed: DepthwiseRows,
    x: Tensor | Planes,
    bias: Tensor | None,
    y: Tensor | Planes,
    activation: str = "none",
    kernels: str = "auto",
) -> Callable[[], None]:
    """`depthwise_rows` on fixed tensors or planes: each call of what this returns is one foreign call."""
    _activations.number(activation)
    _native.refuse_gradient(bias=bias, values=packed.values)
    inner, outer = (t.images if isinstance(t, Planes) else t for t in (x, y))
    batch, c = len(inner), packed.shape[0]
    for name, t, size in (("x", inner, packed.size), ("y", outer, packed.out)):
        _native.check(name, t, (batch, c, *size))
        if size[1] > 1 and t.numel() and t.stride(3) != 1:
            raise ValueError(f"{name}: expected rows of pixels side by side, got strides {t.stride()}")
    _native.vector("bias", bias, c)
    if not use_native(kernels):

        def run() -> None:
            outer.copy_(reference(packed, inner, bias, activation))

        return run
    arguments = _arguments(packed, batch, bias, activation)
    arguments.x, arguments.y = inner.data_ptr(), outer.data_ptr()
    arguments.x_image, arguments.x_channel, arguments.x_row, _ = inner.stride()
    arguments.y_image, arguments.y_channel, arguments.y_row, _ = outer.stride()
    arguments.room = isinstance(y, Planes) and y.bare
    return _native.bind("depthwise_rows", arguments, packed, inner, bias, outer)


class _Arguments(ctypes.Structure):  # struct depthwise_rows
    _fields_ = [
        *[(f, ctypes.c_void_p) for f in ("starts", "taps", "values", "reads", "cells", "cuts", "masks")],
        *[(f, ctypes.c_void_p) for f in ("bias", "x", "y")],
        *[(f, ctypes.c_int64) for f in ("images", "channels", "height", "width", "down", "across")],
        *[(f, ctypes.c_int64) for f in ("step", "lead", "pitch", "period")],
        *[(f, ctypes.c_int64) for f in ("x_image", "x_channel", "x_row", "y_image", "y_channel", "y_row")],
        *[(f, ctypes.c_int32) for f in ("activation", "room", "threads")],
    ]


def _arguments(packed: DepthwiseRows, batch: int, bias: Tensor | None, activation: str) -> _Arguments:
    """For tensors [B, C, H, W], whose addresses are still wanted."""
    c, (h, w), (p, q) = packed.shape[0], packed.size, packed.out
    work = batch * (c * (PLANE + h * w + p * q) + 2 * packed.kept * p * q)
    return _Arguments(
        starts=packed.starts.data_ptr(),
        taps=packed.taps.data_ptr(),
        values=packed.values.data_ptr(),
        reads=packed.reads.data_ptr(),
        cells=packed.cells.data_ptr(),
        cuts=packed.cuts.data_ptr(),
        masks=packed.masks.data_ptr(),
        bias=_native.address(bias),
        images=batch,
        channels=c,
        height=h,
        width=w,
        down=p,
        across=q,
        step=packed.stride,
        lead=packed.lead,
        pitch=packed.pitch,
        period=packed.period,
        x_image=c * h * w,
        x_channel=h * w,
        x_row=w,
        y_image=c * p * q,
        y_channel=p * q,
        y_row=q,
        activation=_activations.number(activation),
        room=False,
        threads=min(_native.threads(), 1 + work // WORK),
    )
