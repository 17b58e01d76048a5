"""Convolutions whose filters were pruned in blocks, beside torch's dense ones in two layouts, one thread.

The layers of ResNet-18 on images of 32 x 32 and a projection, with the blocks that `sparselth bench` gives
them. Before anything is timed, ours is compared with float64. "Memory" is that of values and index over that
of the dense weight; "pays after" is how many calls a conversion costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparselth.check import check
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d, floor
from sparselth.measure.layers import block_of, mask_of, parse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = (
    "64x64x3x3@32x32",
    "128x64x3x3@32x32/2",
    "128x128x3x3@16x16",
    "256x256x3x3@8x8",
    "512x512x3x3@4x4",
    "512x256x1x1@8x8/2",
)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


@pytest.mark.parametrize("text", LAYERS)
@pytest.mark.parametrize("batch", [1, 16])
def test_layers(text: str, batch: int, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    layer, draw = parse(text), torch.Generator().manual_seed(0)
    block = block_of(layer)
    assert block
    x = torch.randn(batch, *layer.inputs, generator=draw).to(DEVICE, memory_format=torch.channels_last)
    dense = torch.randn(layer.shape, generator=draw).to(DEVICE)
    turned = dense.contiguous(memory_format=torch.channels_last)
    where = layer.stride, layer.padding
    calls = max(1, int(4e8 / (batch * layer.flops())))

    def timed(run: Callable[[], object]) -> tuple[Callable[[], object], int]:
        def call() -> None:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return call, calls

    rivals = {
        "channels-last": timed(partial(F.conv2d, x, turned, None, *where)),
        "contiguous": timed(partial(F.conv2d, x.contiguous(), dense, None, *where)),
    }
    weights, conversion = {}, {}
    for sparsity in SPARSITIES:
        mask, _ = mask_of(layer, "block", sparsity, draw)
        w = dense * mask.to(DEVICE)
        began = time.perf_counter()
        weights[sparsity] = BlockFilters.from_dense(w, block=block)
        conversion[sparsity] = time.perf_counter() - began
        right = F.conv2d(x.double(), w.double(), None, *where)
        run = partial(block_conv2d, x, weights[sparsity], None, *where)
        terms = int((w != 0).flatten(1).sum(1).max())
        found = check(run(), right, "tf32" if DEVICE == "cuda" else "fp32", terms=terms)
        assert not found.fault
        assert found.error <= 1e-3
        rivals[f"{sparsity}"] = timed(run)
    found = interleaved(rivals, rounds=9)
    best = min(("channels-last", "contiguous"), key=lambda name: found[name].low)
    bar = found[best].low
    lines = [
        f"{text}, batch {batch}, blocks of {block}, {DEVICE}: first quartiles; "
        f"dense takes {bar * 1e6:.1f} us, {best}",
        f"{'pruned':>6}{'us':>10}{'IQR':>8}{'of dense':>10}{'GFLOP/s':>9}{'memory':>8}{'pays after':>14}",
    ]
    for sparsity, weight in weights.items():
        mine = found[f"{sparsity}"]
        pays = f"{conversion[sparsity] / (bar - mine.low):.0f} calls" if mine.low < bar else "never"
        lines.append(
            f"{sparsity:>6.0%}{mine.low * 1e6:>10.1f}{(mine.high - mine.low) * 1e6:>8.1f}"
            f"{bar / mine.low:>9.2f}x{floor(x, weight, *where)['flops'] / mine.low / 1e9:>9.1f}"
            f"{weight.bytes() / (4 * dense.numel()):>8.3f}{pays:>14}"
        )
    show("\n".join(lines))
