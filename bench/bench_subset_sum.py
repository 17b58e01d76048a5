"""Subset sums of 20 numbers by halves, in C and in torch: a thousand weights of a pruned random network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparselth.kernels.subset_sum import subset_sum

COUNT, N = 1000, 20


def test_subset_sum(interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**50), 2**50, (COUNT, N), generator=g)
    targets = torch.randint(-(2**50), 2**50, (COUNT,), generator=g)
    found = [(values * subset_sum(values, targets, None, how)).sum(1) for how in ("native", "reference")]
    assert torch.equal(*found)
    rivals = {
        how: ((lambda how=how: subset_sum(values, targets, None, how)), 1) for how in ("native", "reference")
    }
    times = interleaved(rivals, rounds=10)
    ours, torchs = (1e6 * times[how].median / COUNT for how in ("native", "reference"))
    show(f"subset_sum, {N} numbers: {ours:.1f} us each in C, {torchs:.1f} us in torch, {torchs / ours:.1f}x")
