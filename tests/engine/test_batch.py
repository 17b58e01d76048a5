"""Dense replicas: each is evaluated on the validation images of its own seed."""

from __future__ import annotations

import pytest
import torch

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.batch import DenseForward, DenseSteps
from sparselth.engine.dense import Network, init_weights
from sparselth.engine.paths import choose
from sparselth.engine.state import Batch, Job, State, measure
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU
from sparselth.streams import stream

MODEL = Model("convs", (1, 28, 28), (Conv(2, 9), ReLU(), MaxPool(2), Linear(10)), {}, "")
ADAM = Recipe(steps=6, lr=1.2e-3, batch_size=7, eval_every=3)


@pytest.mark.parametrize("vendor", [False, True])
def test_validation_images_are_those_of_the_seed(vendor: bool, digits: Resident) -> None:
    weights = init_weights(MODEL, stream(0, "ticket", 0, "init"))[None]
    cells = (
        [Cell(0, "ticket", 0)]
        if vendor
        else [Cell(seed, "ticket", 0, draw) for seed, draw in ((3, 0), (0, 0), (3, 1))]
    )
    jobs = [Job(who, State.start(weights, ADAM), MODEL.params.full_mask()) for who in cells]
    batch = Batch(MODEL, digits, jobs, ADAM, choose("reference", "cpu"))
    losses, accuracies = DenseSteps(batch, vendor).measure()
    for one, loss, accuracy in zip(batch.jobs, losses, accuracies, strict=True):
        found = measure(DenseForward(MODEL, weights, vendor), digits.validation(one.who.seed))
        assert ([loss], [accuracy]) == found
    if not vendor:
        assert len({*losses}) == 2  # two seeds


def test_a_last_batch_of_another_size(digits: Resident) -> None:
    weights = torch.cat([init_weights(MODEL, stream(seed, "ticket", 0, "init"))[None] for seed in range(2)])
    x, y = digits.test()[0]
    chunks = [
        (x[:, :, a:b].contiguous(), y[:, :, a:b].contiguous()) for a, b in ((0, 100), (100, 200), (200, 250))
    ]
    forward = DenseForward(MODEL, weights, vendor=False)
    _, accuracies = measure(forward, chunks)
    assert sorted(forward.networks) == [50, 100]
    logits = Network(MODEL, weights, 250).forward(x.expand(2, -1, -1))
    right = (logits.argmax(1, keepdim=True) == y).double().mean((1, 2))
    assert accuracies == pytest.approx(right.tolist(), abs=1 / 250)
