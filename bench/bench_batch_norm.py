"""Batch norm of training and its gradients on features-major images, a stage of ResNet-18, one thread.

(a) torch's on the same memory, one long image a channel; (b) torch's on channels-last images; (c) ours, into
the same memory every time. Before anything is timed (a) and (c) must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sparselth.kernels.batch_norm import batch_norm, batch_norm_backward, floor

C, SIDE, BATCH = 64, 32, 128


def test_batch_norm(interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    x, dy = torch.randn(2, C, SIDE * SIDE * BATCH)
    scale, shift, y, dx = torch.rand(C), torch.rand(C), torch.empty_like(x), torch.empty_like(x)

    def ours() -> None:
        mean, var = batch_norm(x, y, scale, shift)
        batch_norm_backward(dy, x, mean, var, dx, scale)

    def torchs(image: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        image = image.detach().requires_grad_()
        given = [image, scale.clone().requires_grad_(), shift.clone().requires_grad_()]
        out = F.batch_norm(image, None, None, given[1], given[2], True)
        return torch.autograd.grad(out, given, slope)[0]

    ours()
    torch.testing.assert_close(dx, torchs(x[None], dy[None])[0], rtol=1e-4, atol=1e-5)
    images = [
        t.view(C, SIDE, SIDE, BATCH).permute(3, 0, 1, 2).contiguous(memory_format=torch.channels_last)
        for t in (x, dy)
    ]
    t = interleaved(
        {
            "(a) torch, features-major": (lambda: torchs(x[None], dy[None]), 1),
            "(b) torch, channels-last": (lambda: torchs(*images), 1),
            "(c) sparselth": (ours, 1),
        },
        rounds=10,
    )
    rows = [
        f"batch norm, {C} channels, {SIDE} x {SIDE}, batch {BATCH}, forward and backward     ms   quartiles"
    ]
    rows += [
        f"  {k:<44}{1e3 * v.median:8.1f}   {1e3 * v.low:.1f} to {1e3 * v.high:.1f}" for k, v in t.items()
    ]
    moved = floor(x.numel())["bytes"] + floor(x.numel(), backward=True)["bytes"]
    rows.append(f"  (c) moves the bytes of its floor at {moved / t['(c) sparselth'].median / 1e9:.1f} GB/s")
    show("\n".join(rows))
