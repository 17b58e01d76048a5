"""Every op of kernels/ that returns floating-point numbers, on a small input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparselth.kernels import masked_conv2d as conv
from sparselth.kernels import masked_linear as linear
from sparselth.kernels import step_parts, token_parts
from sparselth.kernels.bitmask import pack
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d
from sparselth.kernels.block_linear import BlockWeight, block_linear
from sparselth.kernels.csr_lanes import LanedCsr, csr_lanes
from sparselth.kernels.csr_linear import CsrIndex, csr_input_grad, csr_linear, csr_weight_grad
from sparselth.kernels.csr_tiled import TiledCsr, csr_tiled
from sparselth.kernels.depthwise_rows import DepthwiseRows, depthwise_rows
from sparselth.kernels.max_pool_rows import max_pool_rows
from sparselth.kernels.seed_conv2d import seed_conv2d
from sparselth.kernels.seed_linear import SeedWeight, seed_linear
from sparselth.kernels.slot_linear import Slots, slot_linear
from sparselth.kernels.sparse_conv2d import (
    Conv2dIndex,
    sparse_conv2d,
    sparse_conv2d_input_grad,
    sparse_conv2d_weight_grad,
)
from sparselth.kernels.sparse_conv2d_rows import ConvRows, sparse_conv2d_rows
from sparselth.kernels.two_four_linear import TwoFour, two_four_linear

draw = torch.Generator().manual_seed(0)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=draw).to(dtype)


MATRIX = some(16, 32) * (torch.rand(16, 32, generator=draw) < 0.4)
FILTERS = some(16, 16, 3, 3) * (torch.rand(16, 16, 3, 3, generator=draw) < 0.4)
WIDE = some(64, 64, dtype=torch.float16)
INDEX, TAPS = CsrIndex.from_dense(MATRIX != 0), Conv2dIndex.from_dense(FILTERS != 0, (6, 6), padding=1)
LABELS, PIXELS = torch.arange(4), torch.ones(5, 9).byte()
IMAGES = some(16, 6, 6, 4)
HALF = torch.float16
TWO_FOUR = TwoFour.from_dense(some(32, 64, dtype=HALF))
LINEAR_MASK, CONV_MASK = pack(torch.ones(1, 16, 32)), pack(torch.ones(1, 3, 36))
TILED, LANED = TiledCsr.from_dense(MATRIX, 4), LanedCsr.from_dense(MATRIX, MATRIX != 0)
SLOTS = Slots.from_dense(WIDE)
ROWS = ConvRows.from_dense(FILTERS, (6, 6))
CHANNELS = DepthwiseRows.from_dense(FILTERS[:, :1].contiguous(), (6, 6))
SEEDED = SeedWeight.of(torch.ones(16, 32), 1, 2)
SEEDED_FILTERS = SeedWeight.of(torch.ones(3, 4, 3, 3), 1, 2)
GEOMETRY = conv.geometry((3, 3), 1, 1, 1)

# name: (the op, its tensors by name)
Op = tuple[Callable[..., Any], dict[str, Tensor]]
OPS: dict[str, Op] = {
    "csr_linear": (
        lambda values, x, bias, **k: csr_linear(INDEX, values, x, bias, **k),
        {"values": INDEX.gather(MATRIX), "x": some(32, 4), "bias": some(16)},
    ),
    "csr_input_grad": (
        lambda values, dy, **k: csr_input_grad(INDEX, values, dy, **k),
        {"values": INDEX.gather(MATRIX), "dy": some(16, 4)},
    ),
    "csr_weight_grad": (
        lambda dy, x, **k: csr_weight_grad(INDEX, dy, x, **k),
        {"dy": some(16, 4), "x": some(32, 4)},
    ),
    "csr_tiled": (
        lambda values, x, bias, **k: csr_tiled(replace(TILED, values=values), x, bias, **k),
        {"values": TILED.values, "x": some(32, 4), "bias": some(16)},
    ),
    "csr_lanes": (
        lambda values, x, bias, **k: csr_lanes(replace(LANED, values=values), x, bias, **k),
        {"values": LANED.values, "x": some(32, 4), "bias": some(16)},
    ),
    "slot_linear": (
        lambda values, x, bias, **k: slot_linear(replace(SLOTS, values=values), x, bias, **k),
        {"values": SLOTS.values, "x": some(64, 8, dtype=HALF).t(), "bias": some(64, dtype=HALF)},
    ),
    "block_linear": (
        lambda w, x, bias, **k: block_linear(x, BlockWeight.from_dense(w, block=16), bias, **k),
        {"w": MATRIX, "x": some(4, 32), "bias": some(16)},
    ),
    "block_conv2d": (
        lambda w, x, bias, **k: block_conv2d(x, BlockFilters.from_dense(w, block=16), bias, padding=1, **k),
        {"w": FILTERS, "x": some(2, 16, 6, 6), "bias": some(16)},
    ),
    "two_four_linear": (
        lambda half, x, bias, **k: two_four_linear(replace(TWO_FOUR, half=half), x, bias, **k),
        {"half": TWO_FOUR.half, "x": some(8, 64, dtype=HALF), "bias": some(32, dtype=HALF)},
    ),
    "sparse_conv2d": (
        lambda values, x, bias, **k: sparse_conv2d(TAPS, values, x, bias, **k),
        {"values": TAPS.gather(FILTERS), "x": IMAGES, "bias": some(16)},
    ),
    "sparse_conv2d_input_grad": (
        lambda values, dy, **k: sparse_conv2d_input_grad(TAPS, values, dy, **k),
        {"values": TAPS.gather(FILTERS), "dy": IMAGES},
    ),
    "sparse_conv2d_weight_grad": (
        lambda dy, x, **k: sparse_conv2d_weight_grad(TAPS, dy, x, **k)[0],
        {"dy": IMAGES, "x": IMAGES.clone()},
    ),
    "sparse_conv2d_rows": (
        lambda values, x, bias, **k: sparse_conv2d_rows(replace(ROWS, values=values), x, bias, **k),
        {"values": ROWS.values, "x": some(2, 16, 6, 6), "bias": some(16)},
    ),
    "depthwise_rows": (
        lambda values, x, bias, **k: depthwise_rows(replace(CHANNELS, values=values), x, bias, **k),
        {"values": CHANNELS.values, "x": some(2, 16, 6, 6), "bias": some(16)},
    ),
    "bias_relu": (step_parts.bias_relu, {"y": some(16, 4), "bias": some(16)}),
    "relu_backward": (
        lambda dy, y, **k: step_parts.relu_backward(dy, y, **k)[1],
        {"dy": IMAGES, "y": IMAGES},
    ),
    "cross_entropy_grad": (
        lambda logits, **k: step_parts.cross_entropy_grad(logits, LABELS, **k),
        {"logits": some(10, 4)},
    ),
    "cross_entropy": (
        lambda logits, **k: step_parts.cross_entropy(logits, LABELS, **k),
        {"logits": some(10, 4)},
    ),
    "max_pool": (step_parts.max_pool, {"x": IMAGES}),
    "max_pool_rows": (
        lambda x, **k: max_pool_rows(x, (3, 3), (2, 2), (1, 1), **k),
        {"x": some(2, 4, 6, 6)},
    ),
    "max_pool_backward": (
        step_parts.max_pool_backward,
        {"dy": some(16, 3, 3, 4), "x": IMAGES, "y": some(16, 3, 3, 4)},
    ),
    "transpose": (step_parts.transpose, {"x": some(16, 4)}),
    "layer_norm": (token_parts.layer_norm, {"x": some(16, 4), "weight": some(16), "bias": some(16)}),
    "gelu": (token_parts.gelu, {"x": some(16, 4)}),
    "add": (token_parts.add, {"a": some(16, 4), "b": some(16, 4)}),
    "gather": (
        lambda scale, shift, **k: step_parts.gather(
            PIXELS, torch.arange(5, device="cpu"), LABELS, scale, shift, **k
        )[0],
        {"scale": some(9), "shift": some(9)},
    ),
    "seed_linear": (
        lambda x, bias, scores, **k: seed_linear(x, SEEDED, bias, scores, **k),
        {"x": some(4, 32), "bias": some(16), "scores": some(16, 32)},
    ),
    "seed_conv2d": (
        lambda x, bias, scores, **k: seed_conv2d(x, SEEDED_FILTERS, bias, scores, padding=1, **k),
        {"x": some(2, 4, 6, 6), "bias": some(3), "scores": some(3, 4, 3, 3)},
    ),
    "masked_linear": (
        lambda x, w, bias, **k: linear.masked_linear(x, w, LINEAR_MASK, bias, **k),
        {"x": some(1, 4, 32), "w": some(1, 16, 32), "bias": some(1, 16)},
    ),
    "masked_conv2d": (
        lambda x, w, bias, **k: conv.masked_conv2d(x, w, CONV_MASK, bias, padding=1, **k),
        {"x": some(1, 2, 4, 6, 6), "w": some(1, 3, 4, 3, 3), "bias": some(1, 3)},
    ),
    "masked_conv2d forward": (
        lambda x, w, bias, **k: conv.forward(x, w, CONV_MASK, bias, GEOMETRY, **k),
        {"x": some(1, 2, 4, 6, 6), "w": some(1, 3, 4, 3, 3), "bias": some(1, 3)},
    ),
}
