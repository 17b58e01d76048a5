"""Random networks, converted by a clock that draws lots: in float64 they are what they were.

Branches, sums, concatenations, strides, groups, dilation, norms, shared layers, tokens, changes in place,
empty and full masks; then other batches and sizes of images. `make properties` tries 500, SPARSELTH_GRAPHS.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversions import times, timing
from sparselth import sparse
from sparselth.check import check
from sparselth.kernels.step_parts import Call

GRAPHS = int(os.environ.get("SPARSELTH_GRAPHS", "30"))
ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    *(torch.relu, F.gelu, F.silu, F.hardswish, torch.tanh, torch.sigmoid, F.relu6),
    *(lambda x: x.relu(), lambda x: F.leaky_relu(x, 0.1), lambda x: F.gelu(x, approximate="tanh")),
    *(lambda x: F.relu(x, inplace=True), lambda x: F.hardswish(x, inplace=True), lambda x: x.relu_()),
]
KINDS = ("conv",) * 5 + ("norm", "act", "act", "pool", "sum", "cat", "tokens", "shared", "gate")
KINDS += "squeeze", "squeeze"
MEANS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: x.mean((-1, -2))[:, :, None, None],
]
KERNELS, DILATIONS = ((1, 1), (3, 3), (2, 3), (3, 1)), ((1, 1), (1, 1), (2, 1), (2, 2))
POOLS = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1)
LAYOUTS = {  # networks in one layout, and the forms of it that are to be fast
    "joined": ("sparse_conv2d", "csr_linear", "columns"),
    "joined rows": ("sparse_conv2d_rows", "depthwise_rows", "csr_tiled", "max_pool_rows"),
}


class Net(nn.Module):
    """Steps that are drawn; each takes earlier results, by number, and adds one."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, Any, tuple[int, ...]]] = []
        self.channels = [draw.choice([1, 2, 3, 5])]
        self.scale = [1]  # by how much the images have shrunk
        for _ in range(draw.randint(2, 9)):
            self._grow(draw)
        ends = [i for i in range(len(self.channels)) if draw.random() < 0.3] or [len(self.channels) - 1]
        self.ends, width = ends, sum(self.channels[i] for i in ends)
        self.head = nn.Linear(width, draw.choice([1, 4, 7]), bias=draw.random() < 0.7)
        self.many = draw.random() < 0.3

    def _add(self, kind: str, what: Any, takes: tuple[int, ...], channels: int, scale: int = 1) -> None:
        self.steps.append((kind, what, takes))
        self.channels.append(channels)
        self.scale.append(self.scale[takes[0]] * scale)

    def _layer(self, module: nn.Module) -> int:
        self.layers.append(module)
        return len(self.layers) - 1

    def _grow(self, draw: random.Random) -> None:
        at = draw.randrange(max(0, len(self.channels) - 3), len(self.channels))
        c = self.channels[at]
        kind = draw.choice(KINDS)
        if kind == "conv":
            groups = draw.choice([g for g in (1, 1, 1, 2, c) if c % g == 0])
            out = groups * draw.choice([1, 2, 3])
            kernel, dilation = draw.choice(KERNELS), draw.choice(DILATIONS)
            stride = draw.choice([(1, 1), (1, 1), (2, 2), (2, 1)]) if self.scale[at] < 4 else (1, 1)
            half = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
            padding: Any = tuple(side + draw.choice([0, 0, 1]) for side in half)
            mode = draw.choice(["zeros"] * 5 + ["reflect"]) if max(padding) < 2 else "zeros"
            if stride == (1, 1) and draw.random() < 0.4:
                padding, mode = "same", "zeros"
            settings = c, out, kernel, stride, padding, dilation, groups
            module = nn.Conv2d(*settings, bias=draw.random() < 0.5, padding_mode=mode)
            self._add("layer", self._layer(module), (at,), out, max(stride))
            if draw.random() < 0.5:
                self._add("layer", self._layer(_norm(out)), (len(self.channels) - 1,), out)
            if draw.random() < 0.5:
                self._add("act", draw.randrange(len(ACTIVATIONS)), (len(self.channels) - 1,), out)
        elif kind == "norm":
            self._add("layer", self._layer(_norm(c)), (at,), c)
        elif kind == "act":
            self._add("act", draw.randrange(len(ACTIVATIONS)), (at,), c)
        elif kind == "pool" and self.scale[at] < 4:
            pool = draw.choice(POOLS)
            self._add("layer", self._layer(pool), (at,), c, 2)
        elif kind in ("sum", "gate"):
            twins = [i for i, n in enumerate(self.channels) if n == c]
            self._add(kind, None, (at, draw.choice(twins)), c)
        elif kind == "cat":
            other = draw.randrange(len(self.channels))
            self._add("cat", None, (at, other), c + self.channels[other])
        elif kind == "tokens":
            out = draw.choice([1, 3, 6])
            layers = nn.ModuleList([nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.Linear(2 * c, out)])
            self._add("tokens", self._layer(layers), (at,), out)
        elif kind == "squeeze":
            layers = nn.ModuleList([nn.Conv2d(c, 3, 1), nn.Conv2d(3, c, 1)])
            draws = [draw.randrange(len(some)) for some in (MEANS, ACTIVATIONS, ACTIVATIONS)]
            self._add(kind, (self._layer(layers), draws, draw.random() < 0.5), (at,), c)
        elif kind == "shared":
            known = [
                what for step, what, takes in self.steps if step == "layer" and self.channels[takes[0]] == c
            ]
            convs = [i for i in known if isinstance(self.layers[i], nn.Conv2d)]
            if convs and self.scale[at] < 4:
                i = draw.choice(convs)
                self._add("layer", i, (at,), self.layers[i].out_channels, 2)

    def forward(self, x: Tensor) -> Any:
        found = [x]
        for kind, what, takes in self.steps:
            y = found[takes[0]]
            if kind == "layer":
                y = self.layers[what](y)
            elif kind == "act":
                y = ACTIVATIONS[what](y if takes[0] else y + 0)  # what changes in place is not the input
            elif kind == "tokens":
                norm, up, down = self.layers[what]
                y = down(F.gelu(up(norm(y.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
            elif kind == "squeeze":
                layers, (mean, act, gate), first = what
                down, up = self.layers[layers]
                s = ACTIVATIONS[gate](up(ACTIVATIONS[act](down(MEANS[mean](y)))))
                y = s * y if first else y * s
            else:
                z = F.adaptive_avg_pool2d(found[takes[1]], y.shape[2:])
                y = y + z if kind == "sum" else y * z.sigmoid() if kind == "gate" else torch.cat([y, z], 1)
            found.append(y)
        out = self.head(torch.cat([found[i].mean((2, 3)) for i in self.ends], 1))
        return {"out": out, "images": found[-1]} if self.many else out


def _norm(c: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(c)
    norm.running_mean.normal_(0, 0.2)
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def outputs(found: Any) -> list[Tensor]:
    return [*found.values()] if isinstance(found, dict) else [found]


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_random_networks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)

    def lots(calls: Mapping[str, Call], sample: Any) -> Any:
        for call in calls.values():
            call()
        found = {n: draw.uniform(1e-3, 1e-2) for n in calls}
        forms = {n: 1e-7 for n in calls if n in LAYOUTS.get(layout, ())}
        return times(found | forms | {n: s for n, s in networks.items() if n in calls})

    layout = draw.choice(["converted", *LAYOUTS])
    networks = {"converted": 1e-8, layout: 1e-9}
    monkeypatch.setattr(timing, "seconds", lots)
    model = Net(draw).eval()
    masks = {
        name: torch.rand(p.shape) < draw.choice([-1, 0.1, 0.4, 2])
        for name, p in model.named_parameters()
        if p.dim() > 1 and draw.random() < 0.9
    }
    for mask in masks.values():  # units without inputs, and such that nobody reads
        for axis in (0, 1):
            if draw.random() < 0.3:
                dead = torch.rand(mask.shape[axis]) < 0.5
                mask.index_fill_(axis, dead.nonzero()[:, 0], False)
    side, c = draw.choice([12, 17]), model.channels[0]
    with torch.no_grad():
        twin = copy.deepcopy(model)
        for name, mask in masks.items():
            dict(twin.named_parameters())[name].mul_(mask)
    before = copy.deepcopy(model.state_dict())
    converted = sparse.convert(model, masks, torch.randn(draw.choice([1, 2, 5]), c, side, side + 1))
    raced = converted.report.networks
    assert converted.report.chosen == (layout if layout in raced else "converted"), converted.report.checks
    assert converted.report.how == "a graph by torch.fx"
    together: list[tuple[Tensor, ...]] = []
    for batch, height in ((2, side), (draw.choice([1, 3, 17]), side), (2, 15)):
        x = torch.randn(batch, c, height, height + 1)
        with torch.no_grad():
            own = outputs(twin(x))
            exact = outputs(twin.double()(x.double()))
            twin.float()
        found = outputs(converted(x))
        assert [t.shape for t in found] == [t.shape for t in exact]
        together += zip(*(map(torch.flatten, t) for t in (found, exact, own)), strict=True)
    for i in range(len(found)):  # of few numbers each may be wrong by chance
        found_, exact_, own_ = (torch.cat(t) for t in zip(*together[i :: len(found)], strict=True))
        assert check(found_, exact_, "fp32", terms=500, own=own_).fault is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
