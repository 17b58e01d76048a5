"""Dense products, and layers without weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels.max_pool_rows import bind_max_pool_rows, max_pool_rows
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import Call, bind_bias_relu, bind_max_pool
from sparselth.kernels.token_parts import bind_gelu
from sparselth.sparse.compaction import POINTWISE, rebuilt
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Stage, activated, activation_of, tensor_bytes
from sparselth.sparse.forms.table import Form, Made, register


def _dense(stage: Stage, device: Device, batch: int) -> Made:
    """As torch does it."""
    run = stage.behind(_product(stage.part.module, stage))
    native = device.dtype == torch.float32 and not device.on_gpus
    images = native and len(stage.before) == len(stage.after) == 3
    bind = None if stage.product or not images else partial(_bind_images, run)
    return Made(run, stage.dense_bytes, _held(stage.part.module), bind=bind)


def _bind_images(run: Callable[[Tensor], Tensor], x: Planes, y: Planes) -> list[Call]:
    given, found = x.images, y.images
    return [lambda: found.copy_(run(given))]


def _held(module: nn.Module) -> Callable[[], Tensor] | None:
    """How to get the weight of a product back."""
    weight = module.weight.detach() if isinstance(module, nn.Linear | nn.Conv2d) else None
    return None if weight is None else weight.contiguous


def _product(module: nn.Module, stage: Stage) -> Callable[[Tensor], Tensor]:
    if stage.select:
        return nn.Sequential(stage.select.module, module).eval().forward  # no module of whoever holds it
    if isinstance(module, nn.Linear):  # a module's call takes microseconds, as long as a small layer
        w, bias = module.weight, module.bias
        return lambda x: F.linear(x, w, bias)
    return module.forward


def _has_images(stage: Stage, device: Device, batch: int) -> bool:
    module = stage.part.module  # torch crashes or errs on dilated filters where the channels come last
    dilated = isinstance(module, nn.Conv2d) and not device.on_gpus and module.dilation != (1, 1)
    return len(stage.before) == 3 and not stage.linear and not dilated


def _channels_last(stage: Stage, device: Device, batch: int) -> Made:
    module = stage.part.module
    if isinstance(module, nn.Conv2d):
        turned = module.weight.detach().clone(memory_format=torch.channels_last)
        module = rebuilt(module, turned, module.bias)
    return Made(stage.behind(_product(module, stage)), stage.dense_bytes, _held(module))


def _has_maxima(stage: Stage, device: Device, batch: int) -> bool:
    pool = stage.part.module
    plain = isinstance(pool, nn.MaxPool2d) and _pair(pool.dilation) == (1, 1) and not pool.ceil_mode
    return plain and not device.on_gpus and min(_pair(pool.kernel_size)) > 1


def _maxima(stage: Stage, device: Device, batch: int) -> Made:
    """Of rows, then of columns, over whole images: torch's own goes pixel by pixel."""
    pool = stage.part.module
    (down, across), strides, (high, wide) = map(_pair, (pool.kernel_size, pool.stride, pool.padding))

    def run(x: Tensor) -> Tensor:
        if high or wide:
            x = F.pad(x, (wide, wide, high, high), value=-math.inf)
        rows = _largest([x[:, :, i : x.shape[2] - down + i + 1 : strides[0]] for i in range(down)])
        return _largest([rows[..., j : x.shape[3] - across + j + 1 : strides[1]] for j in range(across)])

    return Made(stage.behind(run), stage.dense_bytes)


def _has_max_pool(stage: Stage, device: Device, batch: int) -> bool:
    there = _native.LIB is not None and device.dtype == torch.float32 and len(stage.before) == 3
    return there and _has_maxima(stage, device, batch)


def _max_pool_rows(stage: Stage, device: Device, batch: int) -> Made:
    pool, relu = stage.part.module, stage.relu
    kernel, stride, padding = map(_pair, (pool.kernel_size, pool.stride, pool.padding))

    def run(x: Tensor) -> Tensor:
        return max_pool_rows(x, kernel, stride, padding, relu)

    def bind(x: Planes, y: Planes) -> list[Call]:
        return [bind_max_pool_rows(x.images, y.images, kernel, stride, padding, relu)]

    return Made(run, stage.dense_bytes, bind=bind)


def _largest(parts: list[Tensor]) -> Tensor:
    y = torch.maximum(parts[0], parts[1])
    for part in parts[2:]:
        torch.maximum(y, part, out=y)
    return y


def _pair(size: Any) -> tuple[int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)  # torch takes lists, and one of one number, too
    return sizes[0], sizes[-1]


def _has_columns(stage: Stage, device: Device, batch: int) -> bool:
    bare = stage.linear and stage.bias is None and not stage.relu
    return stage.linear and not device.on_gpus and (device.dtype == torch.float32 or bare)


def _dense_columns(stage: Stage, device: Device, batch: int) -> Made:
    w, bias, relu = stage.weight, stage.bias, stage.relu

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        if relu:
            return [partial(torch.mm, w, x, out=y), bind_bias_relu(y, bias)]
        if bias is None:
            return [partial(torch.mm, w, x, out=y)]
        return [partial(torch.addmm, bias[:, None], w, x, out=y)]

    return Made(bind, tensor_bytes([w, bias]), w.contiguous)


def _has_no_weights(stage: Stage, device: Device, batch: int) -> bool:
    return not stage.product and not device.on_gpus


def _no_weights(stage: Stage, device: Device, batch: int) -> Made:
    module = stage.part.module
    in_place = isinstance(module, (nn.Flatten, nn.ReLU, *POINTWISE))
    return Made(partial(_bind, module, stage.relu), stage.dense_bytes, in_place=in_place)


def _bind(module: nn.Module, relu: bool, x: Tensor, y: Tensor) -> list[Call]:
    if isinstance(module, nn.Flatten):
        return []
    if isinstance(module, nn.MaxPool2d) and halves(module):
        return [bind_max_pool(x, y, relu)]
    if activation := activated(y, activation_of(module)):
        return activation
    if isinstance(module, nn.GELU):
        return [bind_gelu(x.flatten(0, -2), y.flatten(0, -2), module.approximate == "tanh")]
    if isinstance(module, POINTWISE):
        return [lambda: y.copy_(module(x))]
    return [partial(_pool, module, relu, x, y)]


def halves(pool: nn.MaxPool2d) -> bool:
    """Whether it takes the maximum of 2 x 2 pixels."""
    settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    return all(v in (n, (n, n)) for v, n in zip(settings, (2, 2, 0, 1), strict=True)) and not pool.ceil_mode


def _pool(module: nn.Module, relu: bool, x: Tensor, y: Tensor) -> None:
    z = module(x.permute(3, 0, 1, 2))
    y.copy_((F.relu(z) if relu else z).permute(1, 2, 3, 0))


register(Form("dense", "dense", "rows", lambda stage, device, batch: True, _dense))
register(Form("channels-last", "dense", "channels-last", _has_images, _channels_last))
register(Form("maxima", "dense", "rows", _has_maxima, _maxima))
register(Form("max_pool_rows", "dense", "rows", _has_max_pool, _max_pool_rows))
register(Form("dense columns", "dense", "columns", _has_columns, _dense_columns))
register(Form("columns", "dense", "columns", _has_no_weights, _no_weights))
