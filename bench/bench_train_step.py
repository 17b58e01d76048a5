"""One training step of LeNet-300-100, batch 60, Adam, a 20 % mask, one thread; and two seeds on two cores.

(a) the usual loop: torchvision data set, transforms, DataLoader, torch.optim.Adam, masks multiplied into
    gradients and weights; (b) the same on resident tensors; (c) sparselth. (a) / (b) is the gain of the
    data path, (b) / (c) that of the step. Before anything is timed, (b) and (c) must train to equal weights.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sparselth import pruning
from sparselth.batches import Batches, Resident
from sparselth.config import ImpConfig, Recipe, Replica
from sparselth.data import Images, MissingData, data_dir, load
from sparselth.experiments.workers import Pool
from sparselth.kernels.masked_update import masked_adam
from sparselth.models import get_model
from sparselth.nn import Network, cross_entropy_grad, init_weights, views
from sparselth.runs import open_run
from sparselth.streams import stream

MODEL, BATCH, LR = get_model("lenet-300-100"), 60, 1.2e-3
WHO = Replica(0, "ticket", 0)


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
    full = pruning.full_mask(MODEL)
    keep = {spec.name: round(0.2 * spec.numel) for spec in MODEL.weights}
    mask = pruning.prune(MODEL, flat[0, : MODEL.mask_size], full, keep)
    flat[:, : MODEL.mask_size] *= mask
    return flat, mask


def usual_network(flat: Tensor, mask: Tensor) -> tuple[nn.Sequential, dict[nn.Parameter, Tensor]]:
    """The same network in torch.nn, with a dense float mask for every weight."""
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    masks = {}
    named, bits = views(MODEL, flat), mask.float()
    for linear, spec in zip(net[::2], MODEL.weights, strict=True):
        linear.weight.data.copy_(named[spec.name][0])
        linear.bias.data.zero_()
        masks[linear.weight] = bits[spec.offset : spec.offset + spec.numel].view(spec.shape)
    return net, masks


def usual_step(
    net: nn.Sequential, masks: dict[nn.Parameter, Tensor], optimizer: torch.optim.Adam, x: Tensor, y: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    for weight, mask in masks.items():
        assert weight.grad is not None
        weight.grad.mul_(mask)
    optimizer.step()
    with torch.no_grad():
        for weight, mask in masks.items():
            weight.mul_(mask)


def usual_loop(images: Images, folder: Path) -> Callable[[], None]:
    """(a), from IDX files in torchvision's layout."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, pixels, labels in (
        ("train", images.train_images, images.train_labels),
        ("t10k", images.test_images, images.test_labels),
    ):
        n = len(labels)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, n, 28, 28) + pixels.tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, n) + labels.astype(np.uint8).tobytes()
        )
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(images.spec.mean, images.spec.std),
        ]
    )
    data = torchvision.datasets.MNIST(str(folder), train=True, transform=transform)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    net, masks = usual_network(*start())
    optimizer, batches = torch.optim.Adam(net.parameters(), lr=LR), endless()

    def step() -> None:
        x, y = next(batches)
        usual_step(net, masks, optimizer, x.flatten(1), y)

    return step


class ResidentLoop:
    """(b): the usual step, fp32 images gathered from one tensor."""

    def __init__(self, data: Resident) -> None:
        scaled = torch.addcmul(data.shift, data.images.T.float(), data.scale)
        self.pixels, self.labels = scaled.T.contiguous(), data.labels
        self.net, self.masks = usual_network(*start())
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LR)
        self.order, self.place = Batches(data, [WHO], BATCH)._draw(0)[:, 0], 0

    def __call__(self) -> None:
        index = self.order[self.place % len(self.order)]
        self.place += 1
        usual_step(self.net, self.masks, self.optimizer, self.pixels[index], self.labels[index])


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


def test_train_step(
    images: Images, tmp_path: Path, interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    data = Resident(images, "cpu", 500)
    usual, resident, ours = usual_loop(images, tmp_path), ResidentLoop(data), OurLoop(data)
    for _ in range(20):
        resident()
        ours()
    ours_named = views(MODEL, ours.flat)
    for linear, spec in zip(resident.net[::2], MODEL.weights, strict=True):
        error = (ours_named[spec.name][0] - linear.weight).norm() / linear.weight.norm()
        assert error < 1e-3, f"{spec.name}: (b) and (c) trained to different weights, {error:.1e}"
    rivals = {"a": (usual, 10), "b": (resident, 30), "c": (ours, 60), "floor": (Products(), 60)}
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
                pool.run(folder, Nobody())

        return run

    t = interleaved({"one seed": (train(0), 1), "two seeds": (train(0, 1), 1)}, rounds=9)
    one, two = t["one seed"], t["two seeds"]
    show(
        f"{model}, {images.spec.name}, dense and level 1, {steps} steps each\n"
        f"  one seed  {one.median:6.2f} s   {one.low:.2f} to {one.high:.2f}\n"
        f"  two seeds {two.median:6.2f} s   {two.low:.2f} to {two.high:.2f}\n"
        f"  two seeds on two cores take {two.median / one.median:.2f}x the time of one"
    )


class Nobody:
    def started(self, *_: object) -> None: ...
    def evaluated(self, *_: object) -> None: ...
    def finished(self, *_: object) -> None: ...
    def tick(self) -> None: ...
