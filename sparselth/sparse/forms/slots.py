"""A Linear in 16 bits on CUDA: weights in slots, and two of every four for sparse tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from sparselth.kernels._choose import use_triton
from sparselth.kernels.slot_linear import WIDEST, Slots, slot_linear
from sparselth.kernels.two_four_linear import CAPABILITY, COLUMNS, ROWS, TwoFour, two_four_linear
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Stage, tensor_bytes
from sparselth.sparse.forms.table import Form, Made, register

SLOT_BATCH = 128  # up to which slot_linear is made for


def _in_half(stage: Stage, device: Device) -> bool:
    return stage.linear and device.on_gpus and device.dtype != torch.float32


def _has_slots(stage: Stage, device: Device, batch: int) -> bool:
    there = _in_half(stage, device) and batch <= SLOT_BATCH and stage.weight.shape[1] <= WIDEST
    return there and use_triton(device.kernels, stage.weight)


def _slot_linear(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu, kernels = stage.bias, stage.relu, device.kernels
    slots = Slots.from_dense(stage.weight)

    def run(x: Tensor) -> Tensor:
        return slot_linear(slots, x, bias, relu, kernels)

    return Made(run, tensor_bytes([bias]) + slots.bytes(), slots.to_dense)


def _has_two_four(stage: Stage, device: Device, batch: int) -> bool:
    able = not device.cuda or torch.cuda.get_device_capability(device.at) >= CAPABILITY
    n, k = stage.weight.shape if stage.linear else (1, 1)
    return _in_half(stage, device) and able and n % ROWS == k % COLUMNS == 0


def _two_four_linear(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu = stage.bias, stage.relu
    weight = TwoFour.from_dense(stage.weight)

    def run(x: Tensor) -> Tensor:
        return two_four_linear(weight, x, bias, relu).contiguous()

    return Made(run, tensor_bytes([bias]) + weight.bytes(), weight.to_dense)


register(Form("slot_linear", "ours", "rows", _has_slots, _slot_linear))
register(Form("two_four_linear", "torch", "rows", _has_two_four, _two_four_linear))
