"""Convolutions of sparse filters on a CPU, features-major and batch first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels.sparse_conv2d import (
    Conv2dIndex,
    Slices,
    bind_sparse_conv2d,
    bind_sparse_conv2d_add,
)
from sparselth.kernels.sparse_conv2d_rows import (
    ConvRows,
    Planes,
    bind_sparse_conv2d_rows,
    sparse_conv2d_rows_call,
)
from sparselth.kernels.step_parts import Call
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Stage, activated, tensor_bytes, without_weight
from sparselth.sparse.forms.table import Form, Made, register

WIDEST = 1 << 26  # weights that filters have room for


@dataclass(frozen=True)
class Filters:
    """A convolution without groups and dilation, with equal strides and zeros on all sides.

    What another one has no weights for, is 0 here: the inputs of other groups, the taps that dilation leaves
    out, what lies beyond fewer zeros on one side. A sparse product takes no time for them.
    """

    weight: Tensor  # [N, C, kh, kw]
    stride: int
    padding: int

    @staticmethod
    def of(module: nn.Module, weight: Tensor) -> Filters | None:
        """Those of this module; None where there are none."""
        shape = _wide(module)
        if shape is None or math.prod(shape) > WIDEST:
            return None
        assert isinstance(module, nn.Conv2d)
        if shape != weight.shape:
            wide = weight.new_zeros(shape)
            for own, place in zip(weight.chunk(module.groups), _taps(module, wide), strict=True):
                place.copy_(own)
            weight = wide
        return Filters(weight, module.stride[0], max(_sides(module)))

    @staticmethod
    def narrow(module: nn.Module, weight: Tensor) -> Tensor:
        """The weight of the module from that of its filters."""
        assert isinstance(module, nn.Conv2d)
        return torch.cat(_taps(module, weight)).contiguous()


def is_square(module: nn.Module) -> bool:
    """Whether the native kernels take a convolution with these settings."""
    return _wide(module) is not None


def _wide(module: nn.Module) -> tuple[int, int, int, int] | None:
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros" or len({*module.stride}) > 1:
        return None
    sides, (kh, kw), (over, along) = _sides(module), module.kernel_size, module.dilation
    top, bottom, left, right = (max(sides) - side for side in sides)
    high, wide = top + over * (kh - 1) + 1 + bottom, left + along * (kw - 1) + 1 + right
    return module.out_channels, module.in_channels, high, wide


def _taps(module: nn.Conv2d, wide: Tensor) -> list[Tensor]:
    """Of such filters the weights that the module has, group by group."""
    (kh, kw), (over, along), sides = module.kernel_size, module.dilation, _sides(module)
    top, left, c = max(sides) - sides[0], max(sides) - sides[2], module.in_channels // module.groups
    return [
        own[:, g * c : (g + 1) * c, top:, left:][:, :, : over * kh : over, : along * kw : along][
            :, :, :kh, :kw
        ]
        for g, own in enumerate(wide.chunk(module.groups))
    ]


def _sides(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros above, below, left and right of an image."""
    if not isinstance(module.padding, str):
        down, across = module.padding
        return int(down), int(down), int(across), int(across)
    if module.padding == "valid":
        return 0, 0, 0, 0
    down, across = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return down // 2, down - down // 2, across // 2, across - across // 2


def _has_native(stage: Stage, device: Device, batch: int) -> bool:
    there = not device.on_gpus and device.dtype == torch.float32 and _native.LIB is not None
    return there and is_square(stage.part.module)


def _filters(stage: Stage) -> Filters:
    """ValueError where they would be too many."""
    found = Filters.of(stage.whole, stage.weight)
    if found is None:
        raise ValueError(f"more than {WIDEST:,} places for weights without groups")
    return found


def _sparse_conv2d(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu, pool, whole = stage.bias, stage.relu, stage.pool is not None, without_weight(stage.whole)
    behind = stage.activation if stage.apart else "none"
    filters, size = _filters(stage), (stage.before[1], stage.before[2])
    index = Conv2dIndex.from_dense(filters.weight != 0, size, filters.stride, filters.padding, backward=False)
    values = index.gather(filters.weight)

    def bind(x: Tensor | Slices, y: Tensor | Slices) -> list[Call]:
        product = bind_sparse_conv2d(index, values, x, bias, y, relu, pool=pool)
        return [product] if isinstance(y, Slices) else [product, *activated(y, behind)]

    def adds(x: Tensor, y: Tensor, activation: str) -> list[Call]:
        rectify = activation == "relu"
        product = bind_sparse_conv2d_add(index, values, x, bias, y, rectify)
        return [product] if rectify else [product, *activated(y, activation)]

    def weight() -> Tensor:
        return Filters.narrow(whole, index.to_dense(values))

    size_of_all = tensor_bytes([values, bias]) + index.bytes()
    slices = None if stage.apart else index.slices
    more = adds if stage.activation == "none" and not pool else None
    return Made(bind, size_of_all, weight, slices=slices, adds=more)


def _sparse_conv2d_rows(stage: Stage, device: Device, batch: int) -> Made:
    filters, size, whole = _filters(stage), (stage.before[1], stage.before[2]), without_weight(stage.whole)
    bias, activation, pool = stage.bias, stage.activation, stage.pool is not None
    packed = ConvRows.from_dense(filters.weight, size, filters.stride, filters.padding, batch)
    run = sparse_conv2d_rows_call(packed, bias, activation, pool)
    size_of_all = tensor_bytes([bias]) + packed.bytes()

    def weight() -> Tensor:
        return Filters.narrow(whole, packed.to_dense())

    def bind(x: Planes, y: Planes) -> list[Call]:
        return [bind_sparse_conv2d_rows(packed, x, bias, y, activation)]

    def adds(x: Planes, y: Planes, activation: str) -> list[Call]:
        return [bind_sparse_conv2d_rows(packed, x, bias, y, activation, adds=True)]

    if pool:
        return Made(run, size_of_all, weight)
    more = adds if activation == "none" else None
    return Made(run, size_of_all, weight, adds=more, bind=bind, planes=packed.room)


register(Form("sparse_conv2d", "ours", "columns", _has_native, _sparse_conv2d))
register(Form("sparse_conv2d_rows", "ours", "rows", _has_native, _sparse_conv2d_rows))
