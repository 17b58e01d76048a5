"""dW, mask and Adam of R LeNet-300-100 at batch 60, 20 % kept, from fixed activations and gradients.

(a) torch: bmm into a gradient, times float masks, torch.optim.Adam with fused=True; (b) bmm, then
    masked_adam_many; (c) linear_grad_update: on CUDA one kernel a layer, the gradient never written, on a CPU
    products of one replica after the other. Before anything is timed, (a), (b) and (c) must have the same
    weights. The floor is `floor` of kernels/linear_grad_update.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselth.kernels.bitmask import pack
from sparselth.kernels.linear_grad_update import floor, linear_grad_update
from sparselth.kernels.masked_update import masked_adam_many

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES, BATCH = [(300, 784), (100, 300), (10, 100)], 60
ALIGN = 16


class Layers:
    """Flat buffers [R, P] of weights, moments and gradients, as the batched engine keeps them."""

    def __init__(self, replicas: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.places, width = [], 0
        for n, k in SHAPES:
            for shape in ((n, k), (n, 1)):
                self.places.append((width, *shape))
                width += -(-shape[0] * shape[1] // ALIGN) * ALIGN
        live = torch.ones(replicas, width, dtype=torch.bool)
        for i, n, k in self.places[::2]:
            live[:, i : i + n * k] = torch.rand(replicas, n * k, generator=draw) < 0.2
        self.live = live.to(DEVICE)
        self.w = (torch.randn(live.shape, generator=draw) * 0.1 * live).to(DEVICE)
        self.g, self.a, self.b = (torch.zeros_like(self.w) for _ in range(3))
        self.flat_bits = pack(self.live)
        self.bits = [pack(t) for t in self.views(self.live)[::2]]
        self.data = [
            [torch.randn(replicas, BATCH, size, generator=draw).mT.to(DEVICE) for size in shape]
            for shape in SHAPES
        ]
        self.step = torch.zeros(replicas, device=DEVICE)
        self.lr = torch.full((replicas,), 1e-3, dtype=torch.float64, device=DEVICE)

    def views(self, flat: Tensor) -> list[Tensor]:
        return [flat[:, i : i + n * k].view(-1, n, k) for i, n, k in self.places]

    def products(self) -> None:
        grads = self.views(self.g)
        for (dy, x), dw, db in zip(self.data, grads[::2], grads[1::2], strict=True):
            torch.bmm(dy, x.mT, out=dw)
            torch.sum(dy, 2, keepdim=True, out=db)


def usual(layers: Layers) -> Callable[[], None]:
    parameter, mask = nn.Parameter(layers.w), layers.live.float()
    parameter.grad = layers.g
    optimizer = torch.optim.Adam([parameter], lr=1e-3, fused=True)

    def step() -> None:
        layers.products()
        layers.g.mul_(mask)
        optimizer.step()

    return step


def many(layers: Layers) -> Callable[[], None]:
    def step() -> None:
        layers.products()
        layers.step.add_(1)
        both = [layers.a], [layers.b]
        masked_adam_many([layers.w], [layers.g], [layers.flat_bits], both, [layers.step], layers.lr)

    return step


def fused(layers: Layers) -> Callable[[], None]:
    views = [layers.views(t) for t in (layers.w, layers.a, layers.b)]

    def step() -> None:
        layers.step.add_(1)
        for i, ((dy, x), bits) in enumerate(zip(layers.data, layers.bits, strict=True)):
            (w, *moments), (bias, *others) = ([v[j] for v in views] for j in (2 * i, 2 * i + 1))
            linear_grad_update(dy, x, w, moments, bits, bias, others, step=layers.step, lr=layers.lr)

    return step


def synchronized(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("replicas", [1, 15] if DEVICE == "cpu" else [1, 15, 100])
def test_linear_grad_update(
    replicas: int, interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    makers = {"a": usual, "b": many, "c": fused}
    states = {name: Layers(replicas) for name in makers}
    steps = {name: synchronized(make(states[name])) for name, make in makers.items()}
    for _ in range(5):
        for step in steps.values():
            step()
    for name in "ab":
        error = (states[name].w - states["c"].w).norm() / states["c"].w.norm()
        assert error < 1e-5, f"({name}) and (c) have other weights: {error:.1e}"
    t = interleaved({name: (step, max(20 // replicas, 1)) for name, step in steps.items()}, rounds=30)
    names = {
        "a": "(a) bmm, float masks, torch's fused Adam",
        "b": "(b) bmm, masked_adam_many",
        "c": "(c) linear_grad_update",
    }
    views = states["c"].views(states["c"].w)
    least = [
        floor(w, BATCH, bits if DEVICE == "cuda" else None, bias)
        for w, bias, bits in zip(views[::2], views[1::2], states["c"].bits, strict=True)
    ]
    rows = [f"{f'LeNet-300-100, {replicas} replicas, 20 % kept, {DEVICE}':<50}ms a step   quartiles"]
    rows += [
        f"  {names[key]:<48}{1e3 * v.median:9.3f}   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}"
        for key, v in t.items()
    ]
    moved, flops = (sum(f[key] for f in least) / 1e6 for key in ("bytes", "flops"))
    rows += [
        f"  (c) / (a) {t['c'].median / t['a'].median:.2f}, (c) / (b) {t['c'].median / t['b'].median:.2f}; "
        f"floor {moved:.2f} MB, {flops:.0f} MFLOP"
    ]
    show("\n".join(rows))
