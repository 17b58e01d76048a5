"""Networks of every kind, as users write them, and the few samples they are trained on in tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.data.sets import DatasetSpec, Images
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.models.module import ModuleModel
from sparselth.streams import stream

ADAM = Recipe(steps=6, lr=3e-3, batch_size=7, eval_every=3)
SGD = Recipe(steps=6, lr=0.02, batch_size=7, eval_every=3, optimizer="sgd", weight_decay=1e-3)


class Convolutions(nn.Module):
    """Grouped, depthwise and transposed convolutions, batch norms, two kinds of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth, self.grouped = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, groups=4)
        self.up, self.drop = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2), nn.Dropout2d(0.3)
        self.head = nn.Linear(6 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.drop(self.up(F.max_pool2d(F.relu(self.grouped(self.depth(x))), 1)))
        return self.head(F.dropout(F.adaptive_avg_pool2d(x, 8).flatten(1), 0.2, self.training))


class Words(nn.Module):
    """Attention over embedded words, a causal mask as a buffer; the output has the weights of the input."""

    def __init__(self, out: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.places = nn.Parameter(torch.randn(5, 8) / 5)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm, self.recur = nn.LayerNorm(8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, out, bias=False)
        if out == 11:
            self.head.weight = self.embed.weight
        self.register_buffer("hidden", torch.full((5, 5), -torch.inf).triu(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 2**40  # a new tensor every time, beyond what floats hold
        h = self.embed(x) + self.places
        h = h + self.attend(h, h, h, attn_mask=self.hidden, need_weights=False)[0]
        return self.head(self.recur(self.norm(h))[0])


class Averages(nn.Module):
    """A batch norm that averages over all batches: it reads how many it saw; and numpy's own draws."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 9), nn.BatchNorm1d(9, momentum=None), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * float(np.random.rand())
        return self.two(F.relu(self.norm(self.one(x))))


@dataclass(frozen=True)
class Kind:
    """A network and what it is trained on."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    tokens: bool = False
    recipe: Recipe = ADAM


KINDS = {
    "convolutions": Kind(Convolutions, (3, 6, 6), 4, recipe=SGD),
    "words": Kind(Words, (5,), 11, tokens=True),
    "averages": Kind(Averages, (6,), 3),
}


def samples(kind: Kind) -> Resident:
    """40 samples to train and to validate on, 9 to test."""
    draw, size = np.random.default_rng(0), int(np.prod(kind.shape))
    x = draw.integers(11, size=(49, size)) if kind.tokens else draw.normal(size=(49, size)).astype("float32")
    y = draw.integers(kind.classes, size=(49, *kind.shape) if kind.tokens else 49)
    spec = DatasetSpec(
        name="drawn",
        title="",
        shape=kind.shape,
        classes=kind.classes,
        n_train=40,
        n_test=9,
        tokens=kind.tokens,
    )
    return Resident(Images(spec, x[:40], y[:40], x[40:], y[40:], "", ""), "cpu", 4)


def module_model(make: Callable[[], nn.Module], shape: tuple[int, ...], **more: object) -> ModuleModel:
    """What `get_model` gives for a file with such a function, for samples of that shape."""
    return ModuleModel(
        name="net.py:make",
        input=shape,
        layers=(),
        recipes={"short": ADAM},
        source="",
        make=lambda _: make(),
        **more,  # type: ignore[arg-type]
    )


def model_of(kind: Kind) -> ModuleModel:
    return module_model(kind.make, kind.shape, classes=kind.classes, tokens=kind.tokens, samples="drawn")


def job(model: ModuleModel, recipe: Recipe, keep: float = 1.0, seed: int = 0, level: int = 1) -> Job:
    """A network with a random mask that keeps about that share."""
    weights = init_weights(model, stream(seed, "ticket", 0, "init"))
    chance = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(seed))
    mask = model.params.full_mask() & (chance < keep)
    weights[: len(mask)] *= mask
    return Job(Cell(seed, "ticket", level), State.start(weights[None], recipe), mask)
