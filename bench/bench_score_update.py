"""The update of scores over frozen weights alone, half kept: ours beside torch's operations, and dense SGD.

(a) torch's operations with the exact threshold of magnitude_threshold; (b) ours; (c) the native SGD step of
    as many trained weights, which has neither frozen nor effective weights. The floor counts bytes.
    Before anything is timed, (a) and (b) must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparselth.kernels.masked_update import bind_masked_sgd
from sparselth.kernels.score_update import bind_score_update, floor
from sparselth.models import get_model


@pytest.mark.parametrize("name", ["lenet-300-100", "conv4"])
def test_score_update(name: str, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    params, draw = get_model(name).params, torch.Generator().manual_seed(0)
    m, groups = params.mask_size, [[(spec.offset, spec.numel)] for spec in params.weights]
    keep = [spec.numel // 2 for spec in params.weights]
    weights, grad, first = (torch.randn(m, generator=draw) for _ in range(3))
    made = []
    for kernels in ("reference", "native"):
        tensors = first.clone(), grad, torch.zeros(m), weights, torch.zeros(m)
        step = bind_score_update(*tensors, groups, keep, rule="magnitude", momentum=0.9, kernels=kernels)
        for _ in range(3):
            step(0.1)
        made.append((tensors, step))
    (theirs, by_torch), (ours, step) = made
    for spec in params.weights:
        torch.testing.assert_close(ours[0][spec.span], theirs[0][spec.span])
        assert torch.equal(ours[4][spec.span] != 0, theirs[4][spec.span] != 0), (
            "(a) and (b) keep other weights"
        )
    dense = bind_masked_sgd(first.clone()[None], grad[None], torch.zeros(1, m), momentum=0.9)
    rivals = {
        "(a) torch, partition": (lambda: by_torch(1e-3), 1),
        "(b) sparselth": (lambda: step(1e-3), 10),
        "(c) dense SGD": (lambda: dense(1, 1e-3), 10),
    }
    t = interleaved(rivals, rounds=30)
    rows = [f"{f'{name}, {m:,} scores, half of each layer kept':<50}ms   quartiles"]
    rows += [
        f"  {k:<44}{1e3 * v.median:8.3f}   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}" for k, v in t.items()
    ]
    speed = floor(m)["bytes"] / t["(b) sparselth"].median / 1e9
    rows.append(f"  (b) moves the bytes of its floor at {speed:.1f} GB/s")
    show("\n".join(rows))
