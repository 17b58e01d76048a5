"""What the same run costs the usual way: one network after another, images from a DataLoader.

PIL image, ToTensor and Normalize for every sample, autograd, torch.optim with its defaults, masks
multiplied into gradients and weights. A sample of steps is timed at the first, the middle and the last
level, on one thread and on as many as torch takes by itself; the faster counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparselth import pruning
from sparselth.config import Cell, Recipe
from sparselth.data import Images
from sparselth.data.augment import SHIFT
from sparselth.engine.dense import init_weights
from sparselth.experiments.training import Training
from sparselth.models import Model
from sparselth.models.module import ModuleModel
from sparselth.models.torch import Masks, masks, network
from sparselth.streams import stream

EVALUATION_BATCH = 1000
VALIDATION = 5000


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets give them, by way of PIL where they are bytes. Needs torchvision."""

    def __init__(self, images: Images, pixels: object, labels: object, augment: str = "none") -> None:
        from torchvision import transforms  # type: ignore[import-untyped]

        spec = images.spec
        scale = transforms.Normalize(spec.mean, spec.std)
        shape = *[1] * (3 - len(spec.shape)), *spec.shape
        self.pixels = torch.as_tensor(pixels, device="cpu").view(-1, *shape)
        self.are_bytes = self.pixels.dtype == torch.uint8
        if self.are_bytes and shape[0] not in (1, 3):  # no picture
            self.pixels, self.are_bytes = self.pixels / 255, False
        moves = [transforms.RandomCrop(self.pixels.shape[2:], SHIFT), transforms.RandomHorizontalFlip()]
        moves *= augment != "none"
        of_bytes = [transforms.ToTensor()] * self.are_bytes
        self.transform = transforms.Compose([*moves, *of_bytes, scale])
        self.labels = torch.as_tensor(labels, device="cpu").tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not self.are_bytes:
            return self.transform(self.pixels[i]), self.labels[i]
        from PIL import Image

        picture = self.pixels[i].permute(1, 2, 0).numpy()
        array = picture[:, :, 0] if picture.shape[2] == 1 else picture
        return self.transform(Image.fromarray(array)), self.labels[i]


def step(net: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step: pruned weights get no gradient, and are zeroed again behind the update."""
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
    for weight, mask in masks.items():
        assert weight.grad is not None
        weight.grad.mul_(mask)
    optimizer.step()
    with torch.no_grad():
        for weight, mask in masks.items():
            weight.mul_(mask)


def loop(images: Images, model: Model, recipe: Recipe, flat: Tensor, mask: Tensor) -> Callable[[], None]:
    """A function that takes the next step of the usual loop, from weights [P] under a mask [M]."""
    loader = DataLoader(
        Pictures(images, images.train_images, images.train_labels, recipe.augment),
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
    )

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    net, batches = network(model, flat), endless()
    dense = masks(model, net, mask)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    def run() -> None:
        x, y = next(batches)
        step(net, dense, optimizer, x, y)

    return run


@dataclass(frozen=True)
class Usual:
    """Seconds of the usual loop on this machine."""

    step: float
    image: float  # of an evaluation
    steps: int  # how many were timed
    images: int
    threads: int

    def run_seconds(self, config: Training, images: Images, cells: Iterable[Cell]) -> tuple[float, float]:
        """Cells of a run one after another: steps, and evaluations as often as the run has them."""
        recipe, training, evaluating = config.recipe, 0.0, 0.0
        most = config.eval_images or len(images.test_labels) + VALIDATION
        validation = min(most, VALIDATION, len(images.train_labels) // 8)
        test = min(most, len(images.test_labels))
        for cell in cells:
            steps = recipe.steps - config.start_step(cell)
            training += steps * self.step
            rounds = -(-steps // recipe.eval_every)
            evaluating += (rounds * validation + 2 * test) * self.image
        return training, evaluating


def fits(config: Training, images: Images) -> bool:
    """Whether the usual loop is one for it: of pictures and their classes."""
    own_loss = isinstance(config.network, ModuleModel) and config.network.loss is not None
    pictures = len(images.spec.shape) == 3 and images.root is None
    return config.has_usual and pictures and bool(images.spec.classes) and not own_loss


def sample(config: Training, images: Images, seconds: float = 2.0) -> Usual:
    """Time the usual loop for about `seconds`."""
    before = torch.get_num_threads()
    choices = sorted({1, before})
    try:
        found = [_sample(config, images, threads, seconds / len(choices)) for threads in choices]
    finally:
        torch.set_num_threads(before)
    return min(found, key=lambda usual: usual.step)


def _sample(config: Training, images: Images, threads: int, seconds: float) -> Usual:
    torch.set_num_threads(threads)
    model = config.network
    flat = init_weights(model, stream(config.seeds[0], "price", 0, "init"))
    params = model.params
    rungs = config.rungs()
    last = len(rungs) - 1
    levels = sorted({0, last // 2, last})
    spent, steps = 0.0, 0
    for level in levels:
        mask = pruning.prune(
            model.params, flat[: model.params.mask_size], model.params.full_mask(), rungs[level]
        )
        weights = flat.clone()
        weights[: params.mask_size] *= mask
        run = loop(images, model, config.recipe, weights, mask)
        run()
        taken, took = _repeat(run, 0.8 * seconds / len(levels))
        spent, steps = spent + took, steps + taken
    net = network(model, flat)
    pictures = Pictures(images, images.test_images, images.test_labels)
    batches = iter(DataLoader(pictures, batch_size=EVALUATION_BATCH))

    @torch.no_grad()
    def evaluate() -> None:
        x, y = next(batches)
        (net(x).argmax(1) == y).sum().item()

    size = min(EVALUATION_BATCH, len(pictures))
    began = time.perf_counter()
    evaluate()
    return Usual(spent / steps, (time.perf_counter() - began) / size, steps, size, threads)


def _repeat(run: Callable[[], None], seconds: float) -> tuple[int, float]:
    """Calls within `seconds`, at least one, and what they took."""
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        run()
        calls += 1
    return calls, time.perf_counter() - began
