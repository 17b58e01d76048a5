"""Forward and backward of one masked convolution, 10 % of the weights, beside torch's on the same weights.

(a) ours, the mask as bits; (b) torch's convolution of w * mask, a float mask, autograd; (c) torch's dense
convolution and nothing else, in the better of two layouts: the bar for both. Before anything is timed, the
results of (a) and (b) are compared with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.check import check
from sparselth.kernels.bitmask import launch_pack
from sparselth.kernels.masked_conv2d import explain, floor, masked_conv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = {  # batch, channels in and out, kernel, size
    "LeNet-5, first": (60, 1, 6, 5, 28),
    "Conv-4, second": (60, 64, 64, 3, 32),
    "256 channels": (8, 256, 256, 3, 14),
}


@pytest.mark.parametrize("name", LAYERS)
def test_masked_conv2d(name: str, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    batch, c, n, k, size = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(batch, c, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    w = torch.randn(n, c, k, k, device=DEVICE)
    dense_mask = (torch.rand_like(w) < 0.1).float()
    w, mask = w * dense_mask, launch_pack(dense_mask.flatten(1))
    dy = torch.randn(batch, n, size, size, device=DEVICE).to(memory_format=torch.channels_last)

    def step(layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = layer(x, w)
        grads = torch.autograd.grad(y, (x, w), dy)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return [y.detach(), *grads]

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return masked_conv2d(x[None], w[None], mask[None], None, 1, k // 2).squeeze(0)

    def usual(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w * dense_mask, None, 1, k // 2)

    def dense(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, 1, k // 2)

    right = step(usual, x.double(), w.double(), dy.double())
    sums = c * k * k, n * k * k, batch * size * size
    for layer in (ours, usual):
        for a, b, terms in zip(step(layer, x, w, dy), right, sums, strict=True):
            found_here = check(a, b, "tf32" if DEVICE == "cuda" else "fp32", terms=terms)
            assert not found_here.fault
            assert found_here.error <= (1e-3 if DEVICE == "cuda" else 1e-5)
    calls = 20 if c == 1 else 1
    rivals = {
        "ours": (partial(step, ours, x, w, dy), calls),
        "w * mask": (partial(step, usual, x, w, dy), calls),
        "dense, channels-last": (partial(step, dense, x, w, dy), calls),
        "dense, contiguous": (partial(step, dense, x.contiguous(), w, dy.contiguous()), calls),
    }
    t = interleaved(rivals, rounds=15)
    bar = min(t["dense, channels-last"].median, t["dense, contiguous"].median)
    least = floor(x[None], w[None], mask[None], 1, k // 2)
    rows = [f"{name}: batch {batch}, {c} to {n}, {k}x{k}, {size}x{size}, forward and backward, {DEVICE}"]
    rows += [
        f"  {rival:<24}{1e3 * v.median:9.3f} ms   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}"
        f"   {v.median / bar:.2f}x dense"
        for rival, v in t.items()
    ]
    rows.append(f"  floor: 3 x {least['bytes'] / 1e6:.1f} MB and 3 x {least['flops'] / 1e6:.0f} MFLOP")
    if DEVICE == "cuda":
        rows.append(explain())
    show("\n".join(rows))
