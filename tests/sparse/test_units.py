"""Compaction of graphs: what is dead goes across sums, concatenations, norms, depthwise filters, exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from conversions import prefer, timing
from sparselth import sparse
from sparselth.check import check


@pytest.fixture(autouse=True)
def the_graph_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("dense", "converted"))
    torch.manual_seed(0)


class Residual(nn.Module):
    """Two branches, summed, normed, gated, concatenated with a third, by a depthwise filter to a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.b = nn.Conv2d(width, 6, 3, padding=1), nn.Conv2d(6, width, 1)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width, bias=False)
        self.gate = nn.Conv2d(width, width, 1)
        self.after, self.third = nn.BatchNorm2d(width), nn.Conv2d(width, 4, 3)
        self.head = nn.Linear(width + 4, 5)
        for norm in (self.norm, self.after):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = x + self.b(F.relu(self.a(x)))
        y = F.relu(self.after(y))
        y = y * self.gate(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        z = torch.cat([self.depthwise(y), self.third(y)], 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(z, 1), 1))


def units(converted: sparse.Converted) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) left of each layer that lost some in the graph."""
    return {u.name: (u.inputs[1], u.outputs[1]) for u in converted.report.units}


def right(
    model: nn.Module, masks: dict[str, Tensor], converted: sparse.Converted, *shapes: tuple[int, ...]
) -> None:
    twin = copy.deepcopy(model).requires_grad_(False)
    for name, mask in masks.items():
        dict(twin.named_parameters())[name].mul_(mask)
    for shape in shapes:
        x = torch.randn(shape)
        own = twin(x)
        exact = twin.double()(x.double())
        twin.float()
        assert check(converted(x), exact, "fp32", terms=500, own=own).fault is None


def full(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}


def test_a_channel_goes_where_no_consumer_reads_it_and_a_sum_ties_its_inputs() -> None:
    model = Residual().eval()
    masks = full(model)
    dead = [1, 4, 5]
    for name in ("a", "gate", "third"):
        masks[f"{name}.weight"][:, dead] = False
    masks["head.weight"][:, dead] = False
    x = torch.randn(4, 3, 7, 7)
    whole = sparse.convert(model, masks, x)
    left = {"stem": (3, 5), "a": (5, 6), "b": (6, 5), "gate": (5, 5), "third": (5, 4), "head": (9, 5)}
    assert (
        units(whole) == left
    )  # nobody reads them, so they go everywhere, norms and depthwise filter included
    right(model, masks, whole, (4, 3, 7, 7), (2, 3, 9, 6))
    masks["a.weight"][0, 1] = True  # one branch reads one of them: the sum keeps it in both
    one = sparse.convert(model, masks, x)
    assert units(one)["stem"] == (3, 6)
    assert units(one)["b"][1] == 6
    right(model, masks, one, (4, 3, 7, 7), (2, 3, 9, 6))


def test_a_unit_without_inputs_is_zero_behind_its_relu_and_no_consumer_reads_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 6, 3), nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.a(x)) + F.relu(self.b(x)))

    model = Net().eval()
    masks = full(model)
    for name in ("a", "b"):
        masks[f"{name}.weight"][[0, 2]] = False
        with torch.no_grad():
            getattr(model, name).bias.fill_(-0.5)
    masks["b.weight"][2, 0] = True  # alive in one of the two: the sum is not zero
    converted = sparse.convert(model, masks, torch.randn(2, 2, 9, 9))
    assert units(converted) == {"a": (2, 5), "b": (2, 5), "c": (5, 3)}
    right(model, masks, converted, (2, 2, 9, 9), (3, 2, 11, 8))
    with torch.no_grad():
        model.b.bias.fill_(0.5)  # now a constant that is not zero
    converted = sparse.convert(model, masks, torch.randn(2, 2, 9, 9))
    assert "a" not in units(converted) or units(converted)["a"][1] == 6
    right(model, masks, converted, (2, 2, 9, 9))


@pytest.mark.parametrize("how", ["shared", "shape", "returned", "layer norm", "untied"])
def test_what_else_reaches_a_unit_keeps_it(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Any:
            y = F.relu(self.a(x))
            if how == "shared":
                return self.c(self.b(self.b(y)))
            if how == "shape":
                return self.c(y * y.size(1))
            if how == "layer norm":
                return self.c(self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            return (self.c(y) + y[:, 5:].mean()) if how == "untied" else self.c(y) + y.sum()

    model = Net().eval()
    masks = full(model)
    masks["c.weight"][:, 2:] = False
    converted = sparse.convert(model, masks, torch.randn(2, 3, 5, 5))
    assert "a" not in units(converted) or units(converted)["a"][1] == 6
    right(model, masks, converted, (2, 3, 5, 5), (1, 3, 4, 7))


def test_all_may_be_dead() -> None:
    model = Residual().eval()
    for density in (-1.0, 0.02, 0.1):
        masks = {n: torch.rand(m.shape) < density for n, m in full(model).items()}
        converted = sparse.convert(model, masks, torch.randn(2, 3, 7, 7))
        right(model, masks, converted, (2, 3, 7, 7), (3, 3, 8, 9))


def test_filters_pruned_whole_make_a_resnet_smaller() -> None:
    """Half of the inner filters of each block, as structured pruning leaves them."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    masks = full(model)
    for name, mask in masks.items():
        if ".conv1." in name:
            mask[::2] = False
            block = model.get_submodule(name.removesuffix(".conv1.weight"))
            with torch.no_grad():
                block.bn1.bias[::2] = -0.1  # with statistics of zero mean: zero behind the ReLU
    x = torch.randn(1, 3, 33, 33)
    converted = sparse.convert(model, masks, x)
    before = sum(p.numel() for p in model.parameters()) * 4
    assert units(converted)["layer3.0.conv1"] == (128, 128)
    assert units(converted)["layer3.0.conv2"] == (128, 256)
    assert sparse.weight_bytes(converted) < 0.6 * before
    right(model, masks, converted, (1, 3, 33, 33))
