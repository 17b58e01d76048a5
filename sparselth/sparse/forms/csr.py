"""Compressed rows of a Linear: torch's product, ours on a CPU as trained and for a batch, ours on CUDA."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels._choose import use_triton
from sparselth.kernels.csr_lanes import LanedCsr, csr_lanes
from sparselth.kernels.csr_linear import CsrIndex, bind_csr_linear
from sparselth.kernels.csr_tiled import TiledCsr, bind_csr_tiled
from sparselth.kernels.step_parts import Call
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Stage, activated, tensor_bytes
from sparselth.sparse.forms.table import Form, Made, register

VECTOR = 8  # floats that the native products take at once, or half of them
INFER_BATCH = 16  # up to which csr_lanes is made for


def _has_csr(stage: Stage, device: Device, batch: int) -> bool:
    return stage.linear and not device.on_gpus and device.dtype == torch.float32


def _csr(stage: Stage, device: Device, batch: int) -> Made:
    weight, bias, relu = stage.weight, stage.bias, stage.relu
    row, column = weight.nonzero().unbind(1)
    starts = torch.zeros(len(weight) + 1, dtype=torch.int32, device="cpu")
    starts[1:] = torch.bincount(row, minlength=len(weight)).cumsum(0)
    values = weight[row, column]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        w = torch.sparse_csr_tensor(
            starts, column.int(), values, weight.shape, check_invariants=False, device="cpu"
        )

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        def run() -> None:
            y.copy_(w @ x)
            if bias is not None:
                y.add_(bias[:, None])
            if relu:
                y.relu_()

        return [run]

    return Made(bind, tensor_bytes([starts, column.int(), values, bias]), w.to_dense)


def _has_native(stage: Stage, device: Device, batch: int) -> bool:
    there = not device.on_gpus and device.dtype == torch.float32 and _native.LIB is not None
    return there and (stage.linear or _of_pixels(stage))


def _of_pixels(stage: Stage) -> bool:
    """Whether it is a convolution of single pixels to single pixels, all channels with all."""
    module = stage.part.module
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.kernel_size != (1, 1):
        return False
    return module.padding in ((0, 0), "same", "valid") and stage.before[1:] == stage.after[1:] == (1, 1)


def _csr_linear(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu, weight = stage.bias, stage.relu, stage.weight.flatten(1)
    behind, shape = stage.activation if stage.apart else "none", stage.weight.shape
    index = CsrIndex.from_dense(weight != 0, backward=False)
    values = index.gather(weight)

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        return [bind_csr_linear(index, values, _padded(x), bias, _padded(y), relu), *activated(y, behind)]

    def dense() -> Tensor:
        return index.to_dense(values).view(shape)

    return Made(bind, tensor_bytes([values, bias]) + index.bytes(), dense)


def _csr_tiled(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu, shape = stage.bias, stage.relu, stage.weight.shape
    behind = stage.activation if stage.apart else "none"
    packed = TiledCsr.from_dense(stage.weight.flatten(1), _vectors(batch))

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        return [bind_csr_tiled(packed, _padded(x), bias, _padded(y), relu), *activated(y, behind)]

    def dense() -> Tensor:
        return packed.to_dense().view(shape)

    return Made(bind, tensor_bytes([bias]) + packed.bytes(), dense)


def _vectors(batch: int) -> int:
    """The batch in whole vectors, for which `columns` has room."""
    return batch if batch == 1 else -(-batch // VECTOR) * VECTOR


def _padded(x: Tensor) -> Tensor:
    """[K, B] or [K, 1, 1, B], with what `columns` has beside it: whole vectors take less time than parts."""
    return x.as_strided((len(x), _vectors(x.shape[-1])), (x.stride(0), x.stride(-1)))


def _has_csr_lanes(stage: Stage, device: Device, batch: int) -> bool:
    there = stage.linear and device.on_gpus and batch <= INFER_BATCH
    return there and use_triton(device.kernels, stage.weight)


def _csr_lanes(stage: Stage, device: Device, batch: int) -> Made:
    bias, relu, kernels = stage.bias, stage.relu, device.kernels
    packed = LanedCsr.from_dense(stage.weight, stage.weight != 0)

    def run(x: Tensor) -> Tensor:
        return csr_lanes(packed, x.t(), bias, relu, kernels).t()

    return Made(run, tensor_bytes([bias, *packed.arrays()]), packed.to_dense)


register(Form("CSR", "torch", "columns", _has_csr, _csr))
register(Form("csr_linear", "ours", "columns", _has_native, _csr_linear))
register(Form("csr_tiled", "ours", "columns", _has_native, _csr_tiled))
register(Form("csr_lanes", "ours", "turned", _has_csr_lanes, _csr_lanes))
