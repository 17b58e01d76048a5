"""The optimizer's step alone, all weights under 20 % masks: torch.optim, and masked by hand, beside ours.

(a) torch.optim with fused=True, no masks: what a step costs at least; (b) the same, gradients multiplied by
    float masks before; (c) weights multiplied after, too, as most code does it; (d) sparselth.optim. The
    floor is `floor` of kernels/masked_update.py on CUDA, where pruned sectors are skipped; on a CPU it is
    that of dense lanes. Before anything is timed, (b) and (d) must have the same live weights.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselth.kernels.bitmask import pack
from sparselth.kernels.masked_update import floor
from sparselth.optim import MaskedAdam, MaskedAdamW, MaskedSGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = {"lenet-300-100": (784, 300, 100, 10), "mlp-1024": (1024, 1024, 1024, 1024)}
PAIRS: dict[str, tuple[Any, Any, dict[str, float]]] = {
    "sgd": (torch.optim.SGD, MaskedSGD, {"momentum": 0.9, "weight_decay": 1e-4}),
    "adam": (torch.optim.Adam, MaskedAdam, {}),
    "adamw": (torch.optim.AdamW, MaskedAdamW, {}),
}


class Network:
    """Parameters with fixed gradients and their masks; calling it takes a step."""

    def __init__(self, widths: tuple[int, ...], make: Callable[..., Any], by_hand: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weights, self.biases, self.masks = [], [], []
        for n_in, n_out in pairwise(widths):
            mask = torch.rand(n_out, n_in, generator=draw) < 0.2
            weight = nn.Parameter((torch.randn(n_out, n_in, generator=draw) * mask).to(DEVICE))
            bias = nn.Parameter(torch.zeros(n_out, device=DEVICE))
            for p in (weight, bias):
                p.grad = torch.randn(p.shape, generator=draw).to(DEVICE)
            self.weights.append(weight)
            self.biases.append(bias)
            self.masks.append(mask.to(DEVICE))
        self.floats = [mask.float() for mask in self.masks]
        self.by_hand = by_hand
        self.optimizer = make(self.weights + self.biases, dict(zip(self.weights, self.masks, strict=True)))

    def __call__(self) -> None:
        if self.by_hand:
            for weight, mask in zip(self.weights, self.floats, strict=True):
                assert weight.grad is not None
                weight.grad.mul_(mask)
        self.optimizer.step()
        if self.by_hand > 1:
            with torch.no_grad():
                for weight, mask in zip(self.weights, self.floats, strict=True):
                    weight.mul_(mask)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def floor(self, moments: int) -> dict[str, int]:
        bits: list[Tensor | None] = [pack(mask.view(1, -1)) for mask in self.masks]
        on_cpu: list[Tensor | None] = [None] * len(bits)
        return floor(
            self.weights + self.biases, (bits if DEVICE == "cuda" else on_cpu) + [None] * len(bits), moments
        )


@pytest.mark.parametrize("model", WIDTHS)
@pytest.mark.parametrize("name", PAIRS)
def test_masked_update(
    name: str, model: str, interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    theirs, ours, options = PAIRS[name]

    def torchs(params: list[Tensor], masks: dict[Tensor, Tensor]) -> Any:
        return theirs(params, lr=1e-3, fused=True, **options)

    def masked(params: list[Tensor], masks: dict[Tensor, Tensor]) -> Any:
        return ours(params, lr=1e-3, masks=masks, **options)

    networks = {
        "a": Network(WIDTHS[model], torchs, 0),
        "b": Network(WIDTHS[model], torchs, 1),
        "c": Network(WIDTHS[model], torchs, 2),
        "d": Network(WIDTHS[model], masked, 0),
    }
    for _ in range(5):
        networks["b"]()
        networks["d"]()
    for p, q in zip(networks["b"].weights, networks["d"].weights, strict=True):
        assert torch.equal(p, q) if DEVICE == "cpu" else torch.allclose(p, q, rtol=1e-5, atol=1e-7)
    calls = 100 if model == "lenet-300-100" else 5
    t = interleaved({key: (network, calls) for key, network in networks.items()}, rounds=40)
    names = {
        "a": "(a) torch.optim, no masks",
        "b": "(b) gradients masked by hand",
        "c": "(c) weights masked by hand, too",
        "d": "(d) sparselth.optim",
    }
    least = networks["d"].floor(1 if name == "sgd" else 2)
    rows = [f"{f'{name}, {model}, 20 % kept, {DEVICE}':<50}ms a step   quartiles"]
    rows += [
        f"  {names[key]:<48}{1e3 * v.median:9.3f}   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}"
        for key, v in t.items()
    ]
    rows += [
        f"  (d) / (a) {t['d'].median / t['a'].median:.2f}, (d) / (b) {t['d'].median / t['b'].median:.2f}, "
        f"(d) / (c) {t['d'].median / t['c'].median:.2f}; floor {least['bytes'] / 1e6:.2f} MB, "
        f"(d) moves {least['bytes'] / t['d'].median / 1e9:.1f} GB of it a second",
    ]
    show("\n".join(rows))
