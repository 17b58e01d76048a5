"""Weights pruned in blocks: dense products of the live ones, by torch on a CPU, by Triton on CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparselth.kernels._choose import use_triton
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d
from sparselth.kernels.block_linear import BlockWeight, block_linear
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Stage, tensor_bytes
from sparselth.sparse.forms.table import Form, Made, register


def _has_blocks(stage: Stage, device: Device) -> bool:
    there = not device.on_gpus or use_triton(device.kernels, stage.weight)
    return there and stage.block is not None


def _has_linear(stage: Stage, device: Device, batch: int) -> bool:
    return stage.linear and _has_blocks(stage, device)


def _block_linear(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu, kernels = stage.bias, stage.relu, device.kernels
    assert stage.block
    weight = BlockWeight.from_dense(stage.weight, None, stage.block)

    def run(x: Tensor) -> Tensor:
        return block_linear(x, weight, bias, relu, kernels)

    return Made(run, tensor_bytes([bias]) + weight.bytes(), weight.to_dense)


def _has_conv2d(stage: Stage, device: Device, batch: int) -> bool:
    module = stage.part.module
    plain = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and stage.groups == 1
    return plain and not isinstance(module.padding, str) and _has_blocks(stage, device)


def _block_conv2d(stage: Stage, device: Device, batch: int) -> Made:
    module, bias, relu, kernels = stage.part.module, stage.bias, stage.relu, device.kernels
    pool = stage.pool.module if stage.pool else None
    stride: Any = module.stride  # and not the module: its weight is dense
    padding: Any = module.padding
    dilation: Any = module.dilation
    assert stage.block
    weight = BlockFilters.from_dense(stage.weight, None, stage.block)

    def run(x: Tensor) -> Tensor:
        y = block_conv2d(x, weight, bias, stride, padding, dilation, relu, kernels)
        return pool(y) if pool else y

    whole = stage.behind(run) if stage.apart else run
    return Made(whole, tensor_bytes([bias]) + weight.bytes(), weight.to_dense)


register(Form("block_linear", "ours", "rows", _has_linear, _block_linear))
register(Form("block_conv2d", "ours", "channels-last", _has_conv2d, _block_conv2d))
