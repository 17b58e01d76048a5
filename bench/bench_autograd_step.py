"""One dense training step through autograd, ResNet-20 on CIFAR-10, batch 128, SGD, one thread.

(a) the plain loop on resident tensors: torch.optim.SGD(fused=True), images and network as torch has them;
(b) the same, channels-last; (c) the autograd engine, which gathers bytes, scales them, seeds whatever the
forward may draw and updates one flat buffer. Each lives in a process of its own. Before anything is timed,
(b) and (c) must have trained to equal weights, (a) to nearly those: in its layout torch rounds batch norms
otherwise.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparselth.clock import Timing
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
STRIDE = 2  # steps in turn
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
        for _ in range(STRIDE):
            self.one()

    def weights(self) -> dict[str, np.ndarray]:
        there = tensors(MODEL, self.net)
        return {spec.name: there[spec.name].detach().contiguous().numpy() for spec in MODEL.weights}

    def one(self) -> None:
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
        self.step += self.steps.advance(self.step, STRIDE, lambda: False)

    def weights(self) -> dict[str, np.ndarray]:
        flat = self.job.state.weights[0]
        return {spec.name: flat[spec.span].view(spec.shape).numpy() for spec in MODEL.weights}


class Apart:
    """A loop in a process of its own, as in a run: another's activations would move its heap."""

    def __init__(self, make: Callable[[], Plain | Ours]) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=self.live, args=(make, theirs), daemon=True)
        self.process.start()

    @staticmethod
    def live(make: Callable[[], Plain | Ours], pipe: Connection) -> None:
        torch.set_num_threads(1)
        loop = make()
        while pipe.recv():
            began = time.process_time()
            loop()
            pipe.send((time.process_time() - began, loop.weights()))

    def __call__(self) -> None:
        self.pipe.send(True)
        self.took, self.weights = self.pipe.recv()
        self.took /= STRIDE


def each_of(t: Timing) -> Timing:
    """Of a step, from the time of STRIDE."""
    return replace(t, median=t.median / STRIDE, low=t.low / STRIDE, high=t.high / STRIDE)


def test_autograd_step(interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    try:
        images = load("cifar10", data_dir(None))
    except MissingData:
        pytest.skip("needs CIFAR-10 in --data-dir, which $SPARSELTH_DATA names")
    data = Resident(images, "cpu", 100)
    flat = init_weights(MODEL, stream(0, "ticket", 0, "init"))
    plain = Apart(lambda: Plain(data, flat, torch.contiguous_format))
    last = Apart(lambda: Plain(data, flat, torch.channels_last))
    ours = Apart(lambda: Ours(data, flat))
    loops = {"plain": plain, "channels-last": last, "ours": ours}
    for loop in loops.values():
        loop()
    for loop, most in ((last, 1e-6), (plain, 2e-2)):
        for name, mine in ours.weights.items():
            error = np.linalg.norm(mine - loop.weights[name]) / np.linalg.norm(mine)
            assert error < most, f"{name}: trained to different weights, {error:.1e}"
    spent: dict[str, list[float]] = {name: [] for name in loops}

    def noted(name: str) -> None:
        loops[name]()
        spent[name].append(loops[name].took)

    found = interleaved({name: (partial(noted, name), 1) for name in loops}, rounds=15)
    found = {name: each_of(t) for name, t in found.items()}
    best = min(found["plain"].median, found["channels-last"].median)
    lines = [f"ResNet-20, batch {RECIPE.batch_size}, a step in ms (quartiles), beside plain; processor ms"]
    for name, t in found.items():
        lines.append(
            f"{name:<16}{1e3 * t.median:8.1f}  ({1e3 * t.low:.1f} to {1e3 * t.high:.1f})  "
            f"{t.median / best:.3f}  {1e3 * statistics.median(spent[name]):8.1f}"
        )
    show("\n".join(lines))
