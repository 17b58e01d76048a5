"""A batch of 128 images of CIFAR-10's size, shifted and flipped, beside a step of ResNet-20 on one thread.

(a) the batch as it is; (b) `--augment crop-flip`: ours, one gather; (c) the same by torchvision's transforms,
    image after image, as a loader does it; and the step that the batch is for. Before anything is timed, (b)
    is compared with padding, cropping and mirroring one image after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from sparselth.config import Cell
from sparselth.data import Images, get_dataset
from sparselth.data.augment import SHIFT, SIDE
from sparselth.data.batches import Batches, Resident
from sparselth.engine.dense import cross_entropy_grad, init_weights
from sparselth.engine.vendor import VendorNetwork
from sparselth.models import get_model
from sparselth.streams import stream

MODEL, BATCH, WHO = get_model("resnet20"), 128, Cell(0, "ticket", 0)


def made_up() -> Resident:
    """As many random bytes as CIFAR-10 has: what they are does not change what they cost."""
    draw, spec = np.random.default_rng(0), get_dataset("cifar10")
    x = draw.integers(256, size=(spec.n_train, 3072), dtype=np.uint8)
    y = draw.integers(10, size=spec.n_train)
    return Resident(Images(spec, x, y, x[:100], y[:100], "", ""), "cpu", 100)


class Loader:
    """(c): torchvision's crop and flip of one image after another; then scaled together."""

    def __init__(self, data: Resident, batches: Batches) -> None:
        self.data, self.batches, self.step = data, batches, 0
        self.moves = v2.Compose([v2.RandomCrop(32, SHIFT), v2.RandomHorizontalFlip()])

    def __call__(self) -> Tensor:
        raw = self.data.images[self.batches.index(self.step)].view(-1, 3, 32, 32)
        self.step += 1
        moved = torch.stack([self.moves(image) for image in raw]).flatten(1).float()
        return torch.addcmul(self.data.shift.mT, moved, self.data.scale.mT)


def test_augment(interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    data = made_up()
    plain, ours = Batches(data, [WHO], BATCH), Batches(data, [WHO], BATCH, "crop-flip")
    x, y = (t.clone() for t in ours.at(3))
    order = ours.index(3)
    for one, number in zip(x[0].T, order.tolist(), strict=True):
        move, index = divmod(number, len(data.images))
        down, right = divmod(move // 2, SIDE)
        image = F.pad(data.images[index].view(3, 32, 32), [SHIFT] * 4)[
            :, down : down + 32, right : right + 32
        ]
        image = (image.flip(2) if move % 2 else image).flatten().double()
        error = (one.double() - (image * data.scale[:, 0].double() + data.shift[:, 0].double())).abs().max()
        assert error < 1e-5, f"image {index} moved by {move}: {error:.1e}"
    flat = init_weights(MODEL, stream(0, "ticket", 0, "init"))[None]
    network = VendorNetwork(MODEL, flat, torch.zeros_like(flat))
    place = 0

    def at(batches: Batches) -> Callable[[], None]:
        def run() -> None:
            nonlocal place
            place += 1
            batches.at(place % 300)

        return run

    def step() -> None:
        network.backward(cross_entropy_grad(network.forward(x), y))

    ways = {"a": (at(plain), 30), "b": (at(ours), 30), "c": (Loader(data, plain), 3), "step": (step, 1)}
    t = interleaved(ways, rounds=10)
    names = {
        "a": "(a) as they are",
        "b": "(b) moved in one gather",
        "c": "(c) moved one by one, torchvision",
        "step": "forward and backward of resnet20",
    }
    rows = [f"{'128 images of 3 x 32 x 32, one thread':<40}        ms   quartiles"]
    rows += [
        f"  {names[k]:<38}{1e3 * v.median:10.3f}   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}"
        for k, v in t.items()
    ]
    share = (t["b"].median - t["a"].median) / t["step"].median
    show("\n".join([*rows, f"  moving them takes {100 * share:.2f} % of the step"]))
