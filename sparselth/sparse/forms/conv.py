"""Convolutions of sparse filters on a CPU, features-major and batch first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels.sparse_conv2d import Conv2dIndex, Slices, bind_sparse_conv2d
from sparselth.kernels.sparse_conv2d_rows import ConvRows, sparse_conv2d_rows_call
from sparselth.kernels.step_parts import Call
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Stage, tensor_bytes
from sparselth.sparse.forms.table import Form, Made, register


def is_square(module: nn.Module) -> bool:
    """Whether the native kernels take a convolution with these settings."""
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
        return False
    square = all(len({*pair}) == 1 for pair in (module.stride, module.padding))
    return square and module.dilation == (1, 1) and module.padding_mode == "zeros"


def _has_native(stage: Stage, device: Device, batch: int) -> bool:
    there = not device.on_gpus and device.dtype == torch.float32 and _native.LIB is not None
    return there and is_square(stage.part.module)


def _settings(stage: Stage) -> tuple[tuple[int, int], int, int]:
    """Size of the images, stride, padding."""
    module = stage.part.module
    assert isinstance(module, nn.Conv2d)
    return (stage.before[1], stage.before[2]), module.stride[0], int(module.padding[0])


def _sparse_conv2d(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu, pool = stage.bias, stage.relu, stage.pool is not None
    index = Conv2dIndex.from_dense(stage.weight != 0, *_settings(stage), backward=False)
    values = index.gather(stage.weight)

    def bind(x: Tensor | Slices, y: Tensor | Slices) -> list[Call]:
        return [bind_sparse_conv2d(index, values, x, bias, y, relu, pool=pool)]

    return Made(bind, tensor_bytes([values, bias]) + index.bytes(), slices=index.slices)


def _sparse_conv2d_rows(stage: Stage, device: Device, batch: int) -> Made:
    packed = ConvRows.from_dense(stage.weight, *_settings(stage), batch)
    run = sparse_conv2d_rows_call(packed, stage.bias, stage.relu, stage.pool is not None)
    return Made(run, tensor_bytes([stage.bias]) + packed.bytes())


register(Form("sparse_conv2d", "ours", "columns", _has_native, _sparse_conv2d))
register(Form("sparse_conv2d_rows", "ours", "rows", _has_native, _sparse_conv2d_rows))
