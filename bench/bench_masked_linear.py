"""The packed-mask layer beside torch's own on w * m: forward, and forward with all gradients.

On CUDA the Triton kernels, against cuBLAS at its best; on a CPU the reference path, whose extra time over the
dense products is what unpacking costs. Every implementation is compared with float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth.check import check
from sparselth.kernels.bitmask import reference_pack
from sparselth.kernels.masked_linear import floor, masked_linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [  # R, B, N, K, dtype
    (1, 60, 300, 784, torch.float32),
    (20, 60, 300, 784, torch.float32),
] + ([(1, 512, 4096, 4096, torch.bfloat16)] if CUDA else [(1, 64, 1024, 1024, torch.float32)])


@pytest.mark.parametrize("sparsity", [0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "R{}-B{}-N{}-K{}-{}".format(*s))
def test_masked_linear(
    shape: tuple[int, int, int, int, torch.dtype],
    sparsity: float,
    interleaved: Callable[..., Any],
    show: Callable[[str], None],
) -> None:
    r, b, n, k, dtype = shape
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((r, b, k), (r, n, k), (r, b, n)))
    keep = torch.rand(r, n, k, generator=g) >= sparsity
    bits, keep = reference_pack(keep).to(DEVICE), keep.to(DEVICE)
    bias = torch.zeros(r, 1, n, device=DEVICE, dtype=dtype)
    x, w = x.requires_grad_(), w.requires_grad_()
    scores, zeroed = torch.zeros_like(w, requires_grad=True), (w * keep).detach().requires_grad_()

    def packed(x: Tensor) -> Tensor:
        return masked_linear(x, w, bits, bias[:, 0], scores)

    def multiplied(x: Tensor) -> Tensor:
        return torch.baddbmm(bias, x, (w * keep).mT)

    def vendor(x: Tensor) -> Tensor:
        return torch.baddbmm(bias, x, zeroed.mT)

    right = x.detach().double() @ (w.detach().double() * keep).mT
    ways = {
        "packed mask": (packed, (x, w)),
        "packed mask, scores": (packed, (x, scores)),
        "torch, w * m in the step": (multiplied, (x, w)),
        "torch, w * m done before": (vendor, (x, zeroed)),
    }
    calls = max(1, round(2e8 / (r * b * n * k)))
    rivals = {}
    for name, (forward, leaves) in ways.items():
        terms = int(keep.sum(-1).max())
        wrong = check(forward(x).detach(), right, "bf16" if dtype == torch.bfloat16 else "fp32", terms=terms)
        assert not wrong.fault, name
        rivals[name, "forward"] = (timed(forward, x), calls)
        rivals[name, "with gradients"] = (timed(step, forward, x, leaves, dy), calls)
    t = interleaved({" / ".join(key): value for key, value in rivals.items()}, rounds=20)
    least = floor(r, b, n, k, w.element_size())
    rows = [f"{'x'.join(map(str, shape[:4]))} (R, B, N, K), {dtype}, {sparsity:.0%} pruned, {DEVICE}"]
    rows += [
        f"  floor of one product: {least['bytes'] / 1e6:.2f} MB, {least['flops'] / 1e9:.3f} GFLOP"
        f"{'forward, ms':>17} (quartiles)        ratio   with gradients (quartiles)    ratio"
    ]
    for name in ways:
        row = f"  {name:<40}"
        for part in ("forward", "with gradients"):
            it, vendors = t[f"{name} / {part}"], t[f"torch, w * m done before / {part}"]
            row += f"{1e3 * it.median:11.3f} ({1e3 * it.low:.3f} to {1e3 * it.high:.3f})"
            row += f" {it.median / vendors.median:8.2f}x"
        rows.append(row)
    show("\n".join(rows))


def step(forward: Callable[[Tensor], Tensor], x: Tensor, leaves: tuple[Tensor, ...], dy: Tensor) -> None:
    torch.autograd.grad(forward(x), leaves, dy)


def timed(function: Callable[..., object], *args: object) -> Callable[[], None]:
    def run() -> None:
        function(*args)
        if CUDA:
            torch.cuda.synchronize()

    return run
