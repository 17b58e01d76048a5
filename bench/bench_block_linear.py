"""Block-sparse inference on a CPU beside the dense product and torch's BSR product, one thread.

y = x W^T with x row by row, for squares pruned in blocks. Before anything is timed, ours is compared with the
dense product in float64. "Memory" is that of values and index over that of the dense weight; "pays after" is
how many calls a conversion costs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.check import check
from sparselth.kernels.block_linear import BlockWeight, block_linear, floor

BLOCKS = (16, 32, 64)
SPARSITIES = (0.8, 0.9, 0.95)


def pruned(size: int, block: int, sparsity: float) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(size, size, generator=draw)
    live = torch.rand(size // block, size // block, generator=draw) >= sparsity
    return w * live.repeat_interleave(block, 0).repeat_interleave(block, 1)


@pytest.mark.parametrize("size", [1024, 4096])
@pytest.mark.parametrize("batch", [1, 64, 256])
def test_squares(size: int, batch: int, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    x = torch.randn(batch, size, generator=torch.Generator().manual_seed(1))
    dense = torch.randn(size, size, generator=torch.Generator().manual_seed(2))
    calls = max(1, int(2e7 / (batch * size**2)))
    rivals: dict[str, tuple[Callable[[], object], int]] = {"dense": (lambda: F.linear(x, dense), calls)}
    weights, conversion = {}, {}
    for block in BLOCKS:
        for sparsity in SPARSITIES:
            w, key = pruned(size, block, sparsity), f"{block} {sparsity}"
            began = time.perf_counter()
            weights[key] = BlockWeight.from_dense(w, block=block)
            conversion[key] = time.perf_counter() - began
            right = x.double() @ w.double().t()
            terms = int((w != 0).sum(1).max())
            assert not check(block_linear(x, weights[key]), right, "fp32", terms=terms).fault
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse (BSR tensor support|invariant checks)")
                bsr = w.to_sparse_bsr((block, block))
            rivals[f"ours {key}"] = (partial(block_linear, x, weights[key]), calls)
            rivals[f"bsr {key}"] = (partial(torch.mm, bsr, x.t()), calls)  # faster than F.linear with it
    found = interleaved(rivals, rounds=6 if batch * size**2 > 5e8 else 12)
    us = found["dense"].low * 1e6
    lines = [
        f"W {size} x {size}, batch {batch}: first quartiles; dense takes {us:.1f} us",
        f"{'block':>5}{'pruned':>8}{'us':>10}{'IQR':>8}{'of dense':>10}{'torch BSR':>11}"
        f"{'GFLOP/s':>9}{'memory':>8}{'pays after':>12}",
    ]
    for block in BLOCKS:
        for sparsity in SPARSITIES:
            key = f"{block} {sparsity}"
            mine, bsr_time = found[f"ours {key}"], found[f"bsr {key}"]
            gained = found["dense"].low - mine.low
            pays = f"{conversion[key] / gained:.0f} calls" if gained > 0 else "never"
            lines.append(
                f"{block:>5}{sparsity:>8.0%}{mine.low * 1e6:>10.1f}{(mine.high - mine.low) * 1e6:>8.1f}"
                f"{found['dense'].low / mine.low:>9.2f}x{found['dense'].low / bsr_time.low:>10.2f}x"
                f"{floor(weights[key], batch)['flops'] / mine.low / 1e9:>9.1f}"
                f"{weights[key].bytes() / (4 * size**2):>8.3f}{pays:>12}"
            )
    show("\n".join(lines))
