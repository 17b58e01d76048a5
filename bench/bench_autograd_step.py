"""One dense training step through autograd, ResNet-20 on CIFAR-10, batch 128, SGD, one thread.

(a) the plain loop on resident tensors: torch.optim.SGD(fused=True), images and network as torch has them;
(b) the same, channels-last; (c) the autograd engine, which gathers bytes, scales them, seeds whatever the
forward may draw and updates one flat buffer. Before anything is timed, (b) and (c) must have trained to equal
weights, and (a) to nearly those: torch rounds batch norms otherwise in another layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparselth.config import Cell, Recipe
from sparselth.data import MissingData, data_dir, load
from sparselth.data.batches import Batches, Resident
from sparselth.engine.choose import prepare
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.models import get_model
from sparselth.models.torch import network, tensors
from sparselth.streams import stream

MODEL = get_model("resnet20")
WHO = Cell(0, "ticket", 0)
RECIPE = Recipe(steps=10_000, lr=0.01, batch_size=128, optimizer="sgd", weight_decay=1e-4)


class Plain:
    """(a) and (b): a step as tutorials have it, fp32 images gathered from one tensor."""

    def __init__(self, data: Resident, flat: torch.Tensor, memory: torch.memory_format) -> None:
        self.net = network(MODEL, flat).to(memory_format=memory)
        scaled = torch.addcmul(data.shift, data.images.T.float(), data.scale)
        pixels = scaled.T.reshape(-1, *data.shape)
        self.pixels, self.labels = pixels.contiguous(memory_format=memory), data.labels
        self.optimizer = torch.optim.SGD(
            *(self.net.parameters(), RECIPE.lr, RECIPE.momentum),
            weight_decay=RECIPE.weight_decay,
            fused=True,
        )
        self.batches, self.step = Batches(data, [WHO], RECIPE.batch_size), 0

    def __call__(self) -> None:
        index = self.batches.index(self.step)
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.pixels[index]), self.labels[index]).backward()
        self.optimizer.step()
        self.step += 1


class Ours:
    """(c): the step of `sparselth.train.fit`."""

    def __init__(self, data: Resident, flat: torch.Tensor) -> None:
        state = State.start(flat[None], RECIPE)
        self.job = Job(WHO, state, MODEL.params.full_mask())
        self.steps, self.step = prepare(MODEL, data, [self.job], RECIPE, "autograd"), 0

    def __call__(self) -> None:
        self.steps.advance(self.step, 1, lambda: False)
        self.step += 1


def test_autograd_step(interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    try:
        images = load("cifar10", data_dir(None))
    except MissingData:
        pytest.skip("needs CIFAR-10 in --data-dir, which $SPARSELTH_DATA names")
    data = Resident(images, "cpu", 100)
    flat = init_weights(MODEL, stream(0, "ticket", 0, "init"))
    plain = Plain(data, flat, torch.contiguous_format)
    last = Plain(data, flat, torch.channels_last)
    ours = Ours(data, flat)
    for _ in range(3):
        plain(), last(), ours()
    for loop, most in ((last, 1e-6), (plain, 2e-2)):
        there = tensors(MODEL, loop.net)
        for spec in MODEL.weights:
            mine = ours.job.state.weights[0, spec.span].view(spec.shape)
            error = (mine - there[spec.name].detach()).norm() / mine.norm()
            assert error < most, f"{spec.name}: trained to different weights, {error:.1e}"
    found = interleaved({"plain": (plain, 1), "channels-last": (last, 1), "ours": (ours, 1)}, rounds=25)
    best = min(found["plain"].median, found["channels-last"].median)
    lines = [f"ResNet-20, batch {RECIPE.batch_size}, a step in ms (quartiles)"]
    for name, t in found.items():
        lines.append(
            f"{name:<16}{1e3 * t.median:8.1f}  ({1e3 * t.low:.1f} to {1e3 * t.high:.1f})  "
            f"{t.median / best:.3f} of the faster plain loop"
        )
    show("\n".join(lines))
