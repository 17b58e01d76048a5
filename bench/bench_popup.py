"""One training step of edge-popup on LeNet-300-100, half kept, one thread: the usual way beside ours.

(a) the usual implementation on resident tensors: a parameter of scores, a sort in the forward pass, its
    gradient passed straight through by autograd, torch.optim.SGD; (b) the step of sparselth; (c) sparselth's
    own step of dense training, with SGD and with Adam. Bars: (b) at most 1.5 times (c), less than half of
    (a). Before anything is timed, (a) and (b) must have trained to equal scores and keep the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.config import Cell, Recipe
from sparselth.data import Images, MissingData, data_dir, load
from sparselth.data.batches import Batches, Resident
from sparselth.engine.choose import prepare
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State, Steps, never
from sparselth.frozen import METHODS, mask_of, weights_of
from sparselth.models import get_model
from sparselth.streams import stream

MODEL, WHO = get_model("lenet-300-100"), Cell(0, "edge-popup", 0)
POPUP = METHODS["edge-popup"]
FROZEN = POPUP.frozen(0)


@pytest.fixture(scope="module")
def images() -> Images:
    """MNIST where it is found, else the digits inside the package."""
    try:
        return load("mnist", data_dir(None))
    except MissingData:
        return load("mnist5k", Path())


class Largest(torch.autograd.Function):
    """1 for the half of largest magnitude, else 0, by a sort; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor) -> Tensor:
        order = sizes.flatten().sort().indices
        mask = torch.zeros_like(sizes)
        mask.view(-1)[order[len(order) - FROZEN.kept(len(order)) :]] = 1
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Masked(nn.Linear):
    """A layer of frozen weights and trained scores."""

    def __init__(self, weight: Tensor, scores: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.scores = nn.Parameter(scores.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * Largest.apply(self.scores.abs()))


def scores() -> Tensor:
    """The first scores [P]."""
    return POPUP.start(FROZEN, MODEL.params, stream(0, "edge-popup", 0, "scores"))


class Usual:
    """(a), over images gathered from one tensor."""

    def __init__(self, data: Resident, recipe: Recipe) -> None:
        scaled = torch.addcmul(data.shift, data.images.T.float(), data.scale)
        self.pixels, self.labels = scaled.T.contiguous(), data.labels
        first, weights = scores(), weights_of(FROZEN, MODEL.params)
        layers: list[nn.Module] = []
        for spec in MODEL.params.weights:
            layers += [
                Masked(weights[spec.span].view(spec.shape), first[spec.span].view(spec.shape)),
                nn.ReLU(),
            ]
        self.net, self.recipe = nn.Sequential(*layers[:-1]), recipe
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.order, self.place = Batches(data, [WHO], recipe.batch_size).draw(0)[0], 0

    def __call__(self) -> None:
        index = self.order[self.place % len(self.order)]
        self.place += 1
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.pixels[index]), self.labels[index]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Ours:
    """(b) and (c): the step that `train.fit` takes."""

    def __init__(self, data: Resident, recipe: Recipe, *, frozen: bool) -> None:
        flat = scores() if frozen else init_weights(MODEL, stream(0, "dense", 0, "init"))
        self.job = Job(WHO, State.start(flat[None], recipe), MODEL.params.full_mask())
        self.job.frozen = FROZEN if frozen else None
        self.steps: Steps = prepare(MODEL, data, [self.job], recipe)
        self.place = 0

    def __call__(self) -> None:
        self.steps.advance(self.place, 1, never)
        self.place += 1


@pytest.mark.parametrize("batch", [60, 128])
def test_popup_step(
    batch: int, images: Images, interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    data = Resident(images, "cpu", 500)
    recipe = Recipe(steps=10**6, lr=0.5, batch_size=batch, optimizer="sgd", weight_decay=1e-4)
    adam = replace(recipe, optimizer="adam", lr=1.2e-3, weight_decay=0.0)
    usual, ours = Usual(data, recipe), Ours(data, recipe, frozen=True)
    for _ in range(20):
        usual()
        ours()
    found = ours.job.state.weights[0]
    mask = mask_of(FROZEN, MODEL.params, found)
    for layer, spec in zip(usual.net[::2], MODEL.params.weights, strict=True):
        theirs = layer.scores.detach().flatten()
        error = float((found[spec.span] - theirs).norm() / theirs.norm())
        assert error < 1e-3, f"{spec.name}: (a) and (b) trained to other scores, {error:.1e}"
        same = (Largest.apply(theirs.abs()).bool() == mask[spec.span]).float().mean()
        assert same > 0.999, f"{spec.name}: (a) and (b) keep other weights"
    rivals = {
        "a": (usual, 10),
        "b": (ours, 30),
        "c": (Ours(data, recipe, frozen=False), 30),
        "adam": (Ours(data, adam, frozen=False), 30),
    }
    t = interleaved(rivals, rounds=30)
    names = {
        "a": "(a) scores, sort, autograd",
        "b": "(b) sparselth, edge-popup",
        "c": "(c) sparselth, dense, SGD",
        "adam": "    sparselth, dense, Adam",
    }
    rows = [f"{f'LeNet-300-100, {images.spec.name}, batch {batch}, half kept':<50}ms a step   quartiles"]
    rows += [
        f"  {names[k]:<48}{1e3 * v.median:9.3f}   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}"
        for k, v in t.items()
    ]
    rows.append(
        f"  (b) takes {t['b'].median / t['c'].median:.2f}x the dense step, "
        f"{t['b'].median / t['adam'].median:.2f}x that of Adam, "
        f"{t['b'].median / t['a'].median:.2f}x the usual one"
    )
    show("\n".join(rows))
