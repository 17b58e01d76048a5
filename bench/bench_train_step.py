"""One training step of LeNet-300-100, batch 60, Adam, a 20 % mask, one thread; and two seeds on two cores.

(a) the usual loop: torchvision data set, transforms, DataLoader, torch.optim.Adam, masks multiplied into
    gradients and weights; (b) the same on resident tensors; (c) sparselth. (a) / (b) is the gain of the
    data path, (b) / (c) that of the step. Before anything is timed, (b) and (c) must train to equal weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth import pruning
from sparselth.config import Cell, Recipe
from sparselth.data import Images, MissingData, data_dir, load
from sparselth.data.batches import Batches, Resident
from sparselth.engine.dense import Network, cross_entropy_grad, init_weights
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.plan import Watcher
from sparselth.experiments.pool import Pool
from sparselth.kernels.masked_update import masked_adam
from sparselth.measure import usual
from sparselth.models import get_model
from sparselth.models.torch import masks, network
from sparselth.runs import open_run
from sparselth.streams import stream

MODEL, BATCH, LR = get_model("lenet-300-100"), 60, 1.2e-3
WHO = Cell(0, "ticket", 0)


@pytest.fixture(scope="module")
def images() -> Images:
    """MNIST where it is found, else the digits inside the package."""
    try:
        return load("mnist", data_dir(None))
    except MissingData:
        return load("mnist5k", Path())


def start() -> tuple[Tensor, Tensor]:
    """Masked initial weights [1, P] and the mask [M] of the largest 20 % of each layer."""
    flat = init_weights(MODEL, stream(0, "ticket", 0, "init"))[None]
    full = MODEL.params.full_mask()
    keep = {spec.name: round(0.2 * spec.numel) for spec in MODEL.weights}
    mask = pruning.prune(MODEL.params, flat[0, : MODEL.params.mask_size], full, keep)
    flat[:, : MODEL.params.mask_size] *= mask
    return flat, mask


class ResidentLoop:
    """(b): the usual step, fp32 images gathered from one tensor."""

    def __init__(self, data: Resident) -> None:
        scaled = torch.addcmul(data.shift, data.images.T.float(), data.scale)
        self.pixels, self.labels = scaled.T.contiguous(), data.labels
        flat, mask = start()
        self.net = network(MODEL, flat[0])
        self.masks = masks(MODEL, self.net, mask)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LR)
        self.order, self.place = Batches(data, [WHO], BATCH).draw(0)[0], 0

    def __call__(self) -> None:
        index = self.order[self.place % len(self.order)]
        self.place += 1
        usual.step(self.net, self.masks, self.optimizer, self.pixels[index], self.labels[index])


class OurLoop:
    """(c): the step of `sparselth.train.fit`."""

    def __init__(self, data: Resident) -> None:
        self.flat, mask = start()
        self.mask, self.grad = mask.float()[None], torch.zeros_like(self.flat)
        self.moments = [torch.zeros_like(self.flat) for _ in range(2)]
        self.network, self.batches = Network(MODEL, self.flat, BATCH, self.grad), Batches(data, [WHO], BATCH)
        self.place, self.count = 0, torch.zeros(())

    def __call__(self) -> None:
        x, y = self.batches.at(self.place)
        self.network.backward(cross_entropy_grad(self.network.forward(x), y))
        self.place += 1
        masked_adam(self.flat, self.grad, self.mask, self.moments, self.count.fill_(self.place), LR, 0.0)


class Products:
    """The floor: the dense products of the step alone, by the vendor's library."""

    def __init__(self) -> None:
        self.triples = []
        for i, spec in enumerate(MODEL.weights):
            n, k = spec.matrix
            w, x, y = torch.randn(n, k), torch.randn(BATCH, k), torch.randn(BATCH, n)
            self.triples.append((w, x, y, i > 0))

    def __call__(self) -> None:
        for w, x, y, needs_dx in self.triples:
            torch.mm(x, w.T)
            torch.mm(y.T, x)
            if needs_dx:
                torch.mm(y, w)


def test_train_step(images: Images, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    data = Resident(images, "cpu", 500)
    flat, mask = start()
    loop = usual.loop(images, MODEL, Recipe(steps=1, lr=LR, batch_size=BATCH), flat[0], mask)
    resident, ours = ResidentLoop(data), OurLoop(data)
    for _ in range(20):
        resident()
        ours()
    ours_named = MODEL.params.views(ours.flat)
    for linear, spec in zip(resident.net[1::2], MODEL.weights, strict=True):
        error = (ours_named[spec.name][0] - linear.weight).norm() / linear.weight.norm()
        assert error < 1e-3, f"{spec.name}: (b) and (c) trained to different weights, {error:.1e}"
    rivals = {"a": (loop, 10), "b": (resident, 30), "c": (ours, 60), "floor": (Products(), 60)}
    t = interleaved(rivals, rounds=40)
    names = {
        "a": "(a) usual loop",
        "b": "(b) resident tensors",
        "c": "(c) sparselth",
        "floor": "dense products alone",
    }
    rows = [f"{'LeNet-300-100, ' + images.spec.name + ', batch 60, Adam, 20 %':<50}ms a step   quartiles"]
    rows += [
        f"  {names[k]:<48}{1e3 * v.median:9.3f}   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}"
        for k, v in t.items()
    ]
    rows += [
        f"  data-path gain (a) / (b) {t['a'].median / t['b'].median:.2f}x, "
        f"step gain (b) / (c) {t['b'].median / t['c'].median:.2f}x, "
        f"together {t['a'].median / t['c'].median:.2f}x; "
        f"(c) takes {t['c'].median / t['floor'].median:.2f}x its floor",
    ]
    show("\n".join(rows))


@pytest.mark.parametrize("model", ["lenet-300-100", "lenet5"])
def test_two_seeds_on_two_cores(
    model: str,
    images: Images,
    tmp_path: Path,
    interleaved: Callable[..., Any],
    show: Callable[[str], None],
) -> None:
    """The ticket chain of one seed beside that of two, one worker a seed."""
    steps = {"lenet-300-100": 1000, "lenet5": 300}[model]
    numbers = iter(range(10**6))

    def train(*seeds: int) -> Callable[[], None]:
        config = ImpConfig(
            model=model,
            dataset=images.spec.name,
            seeds=seeds,
            arms=("ticket",),
            levels=1,
            rate=0.2,
            scope="layer",
            one_shot=False,
            rewind=0,
            reinits=1,
            device="cpu",
            kernels="auto",
            recipe=Recipe(steps=steps, lr=LR),
        )

        def run() -> None:
            path = tmp_path / str(next(numbers))
            with (
                open_run(path, config, {}, resume=False) as folder,
                Pool(config, images, path, len(seeds), {}) as pool,
            ):
                pool.run(folder, Watcher())

        return run

    t = interleaved({"one seed": (train(0), 1), "two seeds": (train(0, 1), 1)}, rounds=9)
    one, two = t["one seed"], t["two seeds"]
    show(
        f"{model}, {images.spec.name}, dense and level 1, {steps} steps each\n"
        f"  one seed  {one.median:6.2f} s   {one.low:.2f} to {one.high:.2f}\n"
        f"  two seeds {two.median:6.2f} s   {two.low:.2f} to {two.high:.2f}\n"
        f"  two seeds on two cores take {two.median / one.median:.2f}x the time of one"
    )
