"""A training step in a plain torch loop, its layers compressed: does any model train faster and smaller?

ResNet-18 as on CIFAR-10 (torchvision's, with a 3 x 3 stem and without its pool), batch 128, SGD, all cores:
    eager, channels-last   torch's dense step; the mask costs nothing there, as it is applied nowhere
    compressed             `sparselth.compress(model, masks)` in the same loop
LeNet-300-100, batch 60, fused Adam, one thread:
    engine                 our own compressed engine's step, as `imp` takes it
    compressed             the plain loop
    dense                  the plain loop, dense
    floor                  the plain loop over layers that compute nothing: outputs and gradients lie ready

MB are of weights, gradients, momentum and indices. Masks are random, of one density everywhere.
Before anything is timed every compressed layer is held against float64, outputs and gradients, on what 8
images and their loss give it in the dense masked network; of LeNet the whole gradient, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_sparse_train import RECIPE, resident, sparselth_step
from sparselth import compress
from sparselth.clock import Race, Timing, wall
from sparselth.measure.layer_gradients import check_layers
from sparselth.models import get_model
from sparselth.sparse.compress import compressed_state
from sparselth.sparse.trainable import Compressed


def masked(model: nn.Module, density: float) -> dict[str, Tensor]:
    """Random masks of all weights, and zeros where they prune."""
    draw = torch.Generator().manual_seed(1)
    found = {
        n: torch.rand(p.shape, generator=draw) < density for n, p in model.named_parameters() if p.dim() > 1
    }
    with torch.no_grad():
        for name, mask in found.items():
            model.get_parameter(name).mul_(mask)
    return found


def stepping(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    def step() -> None:
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def error(fast: nn.Module, model: nn.Module, masks: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    """Of the gradients of all kept weights, against float64, relative."""
    right, own = deepcopy(model).double(), deepcopy(fast)
    F.cross_entropy(own(x), y).backward()
    F.cross_entropy(right(x.double()), y).backward()
    pairs = [
        (p.grad, q.grad[masks[n]] if p.dim() < q.dim() else q.grad)
        for (n, q), p in zip(right.named_parameters(), own.parameters(), strict=True)
    ]
    off = sum(float((a - b).norm()) ** 2 for a, b in pairs) ** 0.5
    return off / sum(float(b.norm()) ** 2 for _, b in pairs) ** 0.5


def right(fast: nn.Module, model: nn.Module, masks: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
    """Every compressed layer against float64, by rounding alone."""
    found = check_layers(fast, model, masks, lambda net: net(x.double()), lambda out: F.cross_entropy(out, y))
    assert found
    assert not {name: one.fault for name, one in found.items() if one.fault}


def megabytes(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Weights, gradients, the optimizer's state and, of compressed layers, indices."""
    tensors = [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None)]
    tensors += [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    index = sum(m.index_bytes() for m in net.modules() if isinstance(m, Compressed))
    return (sum(t.numel() * t.element_size() for t in tensors) + index) / 1e6


class Nothing(torch.autograd.Function):
    """An output and gradients that lie ready, of parameters that autograd and the optimizer know."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slopes: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.slopes = slopes
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, None, *ctx.slopes


class Floor(nn.Module):
    """Of any network with such parameters and outputs: what a loop of torch takes beside the layers."""

    def __init__(self, like: nn.Module, y: Tensor) -> None:
        super().__init__()
        self.own = nn.ParameterList(p.detach().clone() for p in like.parameters())
        self.y, self.slopes = y, [torch.zeros_like(p) for p in self.own]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Nothing.apply(self.y, self.slopes, *self.own)
        return found


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_resnet18(sparsity: float, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    masks = masked(model, 1 - sparsity)
    fast = compress(model, masks)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    right(fast, model, masks, x[:8], y[:8])
    nets = {
        "eager": (model, x),
        "channels-last": (
            deepcopy(model).to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        ),
        "compressed": (fast, x),
    }
    optimizers = {n: torch.optim.SGD(net.parameters(), 0.01, 0.9) for n, (net, _) in nets.items()}
    rivals = {
        name: (stepping(net, optimizers[name], lambda x=x: (x, y)), 1) for name, (net, x) in nets.items()
    }
    t = interleaved(rivals, rounds=3)
    best = min(t["eager"].median, t["channels-last"].median)
    lines = [
        f"ResNet-18, 32 x 32 images, batch 128, {sparsity:.0%} sparse, {torch.get_num_threads()} threads"
    ]
    for name, timing in t.items():
        size = megabytes(nets[name][0], optimizers[name])
        lines.append(
            f"{name:<16}{timing.median:7.2f} s   {timing.low:.2f} to {timing.high:.2f}   "
            f"{best / timing.median:5.2f}x the best dense   {size:6.1f} MB"
        )
    lines.append(
        f"{sum(one.compressed for one in fast.compression)} of {len(fast.compression)} layers compressed"
    )
    show("\n".join(lines))


def lenet(sparsity: float, size: int = 60, rounds: int = 15) -> dict[str, Timing]:
    """Steps of our engine and of plain loops over the compressed network, the dense one and none, in turn."""
    race = Race({name: wall(*pair) for name, pair in lenet_steps(sparsity, size).items()}, share=None)
    for _ in range(rounds + 1):
        race.round()
    return race.timings(skip=1)


def lenet_steps(sparsity: float, size: int = 60) -> dict[str, tuple[Callable[[], object], int]]:
    """By name a function, and how often it is called a round; checked against float64."""
    spec = get_model("lenet-300-100")
    data = resident(spec)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    masks = masked(model, 1 - sparsity)
    fast = compress(model, masks, below=1.0)
    images = data.images[:3600].float() * data.scale.T + data.shift.T
    right(fast, model, masks, images[:60], data.labels[:60])
    assert (wrong := error(fast, model, masks, images[:60], data.labels[:60])) < 1e-6, wrong
    place = 0

    def batch() -> tuple[Tensor, Tensor]:
        nonlocal place
        place = (place + size) % (len(images) - size + 1)
        return images[place : place + size], data.labels[place : place + size]

    mask = torch.cat([masks[f"{i}.weight"].flatten() for i in (0, 2, 4)])
    whole = spec.params.full_mask()
    for i, one in zip((0, 2, 4), spec.weights, strict=True):
        whole[one.span] = masks[f"{i}.weight"].flatten()
    assert int(whole.sum()) == int(mask.sum())
    share = {one.name: 2.0 for one in spec.weights}
    rivals: dict[str, tuple[Callable[[], object], int]]
    rivals = {"engine": (sparselth_step(spec, data, whole, "auto", share, size)[0], 20)}
    floor = Floor(fast, torch.randn(size, 10))
    for name, net in (("compressed", fast), ("dense", model), ("floor", floor)):
        optimizer = torch.optim.Adam(net.parameters(), lr=RECIPE.lr, fused=True)
        rivals[name] = stepping(net, optimizer, batch), 20
    assert len(compressed_state(fast)["0.weight"]) == int(masks["0.weight"].sum())
    return rivals


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_lenet(sparsity: float, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    t = interleaved(lenet_steps(sparsity), rounds=15)
    lines = [f"LeNet-300-100, batch 60, Adam, {sparsity:.0%} sparse, one thread"]
    for name, timing in t.items():
        lines.append(
            f"{name:<16}{1e3 * timing.median:7.3f} ms   {1e3 * timing.low:.3f} to {1e3 * timing.high:.3f}   "
            f"{timing.median / t['engine'].median:5.2f} times the engine's"
        )
    show("\n".join(lines))
