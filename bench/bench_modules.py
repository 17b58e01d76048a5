"""Whole networks that people use, pruned to one weight in ten: torch's own best beside `sparse.convert`.

Random masks of equal density in every Linear, convolution and attention. Each way is checked against float64
in the same run, then all take turns. What pytest-benchmark times is a round of all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils import _pytree as pytree

from decoders import Decoder, past
from sparselth import sparse
from sparselth.check import check

KEPT = 0.1
zoo = torchvision.models


def cifar_resnet18() -> nn.Module:
    """With the stem for small images."""
    model = zoo.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def images(batch: int, size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(batch, 3, size, size),)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "resnet18, CIFAR stem, batch 64": (cifar_resnet18, images(64, 32)),
    "resnet50, batch 1": (zoo.resnet50, images(1, 224)),
    "resnet50, batch 16": (zoo.resnet50, images(16, 224)),
    "vit_b_16, batch 1": (zoo.vit_b_16, images(1, 224)),
    "vit_b_16, batch 8": (zoo.vit_b_16, images(8, 224)),
    "decoder of GPT-2 small's size, one token": (
        lambda: Decoder(50257, 768, 12, 12),
        lambda: (torch.tensor([[5]]), past(12, 12, 64, 768, 1)),
    ),
    "mobilenet_v3_small, batch 1": (zoo.mobilenet_v3_small, images(1, 224)),
}


def pruned(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics as after training, and zeros for what is pruned."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, p in model.named_parameters():
        if p.dim() > 1 and "pos_embedding" not in name:
            p.mul_(torch.rand(p.shape) < KEPT)
    return model.eval()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_module(
    name: str, threads: int, interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    make, inputs = NETWORKS[name]
    with torch.no_grad():
        model, given = pruned(make()), inputs()
        converted = sparse.convert(model, None, given)
        turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
        laid = pytree.tree_map(_turned, given)
        ways = {
            "eager": partial(model, *given),
            "channels-last": partial(turned, *laid),
            "sparselth": partial(converted, *given),
        }
        wide = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, given)
        exact = pytree.tree_leaves(copy.deepcopy(model).double()(*wide))
        own = pytree.tree_leaves(model(*given))
        for way, call in ways.items():
            for found, right, torchs in zip(pytree.tree_leaves(call()), exact, own, strict=True):
                assert check(found, right, "fp32", terms=5000, own=torchs).fault is None, way
        taken = interleaved({way: (call, 1) for way, call in ways.items()}, rounds=15)
    best = min(("eager", "channels-last"), key=lambda way: taken[way].median)
    lines = [f"{name}, {threads} threads, {100 * KEPT:.0f} % kept; convert {converted.report.seconds:.0f} s"]
    for way, t in taken.items():
        gain = taken[best].median / t.median
        lines.append(
            f"  {way:<14} {1e3 * t.median:9.2f} ms [{1e3 * t.low:.2f}, {1e3 * t.high:.2f}]  {gain:5.2f}x"
        )
    held, dense = sparse.weight_bytes(converted), sum(4 * p.numel() for p in model.parameters())
    lines.append(f"  weights {held / 1e6:.1f} MB, dense {dense / 1e6:.1f} MB")
    show("\n".join(lines))


def _turned(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and t.shape[1] == 3 else t
