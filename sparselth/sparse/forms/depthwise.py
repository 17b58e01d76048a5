"""Convolutions of each channel by a sparse filter of its own, batch first, on a CPU."""

from __future__ import annotations

import torch
from torch import nn

from sparselth.kernels import _native
from sparselth.kernels.depthwise_rows import (
    DepthwiseRows,
    bind_depthwise_rows,
    depthwise_rows_call,
)
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import Call
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Stage, tensor_bytes
from sparselth.sparse.forms.table import Form, Made, register


def _fits(stage: Stage, device: Device, batch: int) -> bool:
    conv = stage.part.module
    if not isinstance(conv, nn.Conv2d) or stage.pool or stage.select or device.on_gpus:
        return False
    by_itself = conv.groups == conv.in_channels == conv.out_channels
    square = len({*conv.kernel_size}) == len({*conv.stride}) == 1 and conv.kernel_size[0] % 2 == 1
    half = conv.kernel_size[0] // 2
    same = conv.padding == (half, half) or (conv.padding == "same" and conv.stride == (1, 1))
    plain = conv.dilation == (1, 1) and conv.padding_mode == "zeros" and conv.stride[0] <= 2
    return (
        by_itself and square and same and plain and device.dtype == torch.float32 and _native.LIB is not None
    )


def _depthwise_rows(stage: Stage, device: Device, batch: int) -> Made:
    bias, activation = stage.bias, stage.activation
    stride = stage.part.module.stride
    assert isinstance(stride, tuple)
    packed = DepthwiseRows.from_dense(stage.weight, (stage.before[1], stage.before[2]), stride[0])

    def bind(x: Planes, y: Planes) -> list[Call]:
        return [bind_depthwise_rows(packed, x, bias, y, activation)]

    run = depthwise_rows_call(packed, bias, activation)
    return Made(run, tensor_bytes([bias]) + packed.bytes(), packed.to_dense, bind=bind)


register(Form("depthwise_rows", "ours", "rows", _fits, _depthwise_rows))
