"""Trainings of R networks, for tests and for bench/gpu: models, made-up images, cells, and what must hold.

The checks raise Wrong: the whole of `fit` beside the reference path, graphs beside the same launches one by
one, a stop and going on, an idle step, replicas alone and in company. In Triton's interpreter the models are
tiny. Images are made up, in the sizes of MNIST and CIFAR-10: a pattern for each class under noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracle import DEVICE, Wrong, must_be_zero, must_repeat, pick, same_bits
from sparselth.config import Cell, Recipe
from sparselth.data import Images, get_dataset
from sparselth.data.batches import Batches, Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.paths import choose
from sparselth.engine.replay import Replay
from sparselth.engine.state import Batch, Job, State
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.streams import stream
from sparselth.train import fit

MODELS = {"fc": "lenet-300-100", "conv2": "conv2", "cnn": "lenet5"}
TINY = {
    "fc": Model("fc", (1, 6, 6), (Linear(12), ReLU(), Linear(10)), {}, ""),
    "conv2": Model(
        "conv2", (3, 6, 6), (Conv(4, 3, 1), ReLU(), MaxPool(), Linear(10)), {}, "", dataset="cifar10"
    ),
    "cnn": Model("cnn", (1, 8, 8), (Conv(2, 3), MaxPool(), ReLU(), Linear(12), ReLU(), Linear(10)), {}, ""),
}
NEAR = 1e-4  # relative, of weights and moments after 25 steps, whatever the order of sums
LR = 1.2e-3


def never() -> bool:
    return False


def model_of(part: str) -> Model:
    return TINY[part] if DEVICE == "cpu" else get_model(MODELS[part])


def made_up(model: Model, n_train: int, n_test: int) -> Images:
    """Images [n, C * H * W] for a model: a random pattern for each class, half of it noise."""
    numbers, k = np.random.default_rng(0), prod(model.input)
    patterns = numbers.integers(0, 128, (model.classes, k), dtype=np.uint8)

    def some(n: int) -> tuple[Any, Any]:
        labels = numbers.integers(0, model.classes, n)
        return patterns[labels] + numbers.integers(0, 128, (n, k), dtype=np.uint8), labels

    spec = replace(get_dataset(model.dataset), title="made-up images", n_train=n_train, n_test=n_test)
    return Images(spec, *some(n_train), *some(n_test), "made up", "made up")


@lru_cache(maxsize=2)
def data_of(part: str, images: int | None) -> Resident:
    """As many images, or None: as many as the real set has."""
    model = model_of(part)
    spec = get_dataset(model.dataset)
    n_train, n_test = (spec.n_train, spec.n_test) if images is None else (images, 10)
    return Resident(made_up(model, n_train, n_test), DEVICE, pick(5, model.evaluation_batch or 1000))


def job(model: Model, recipe: Recipe, seed: int, keep: float = 1.0, start: int = 0) -> Job:
    """A cell with random weights, of which a random mask keeps about `keep`."""
    weights, mask = init_weights(model, stream(seed, "ticket", 1, "init")), model.params.full_mask()
    mask &= torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(seed)) < keep
    weights[: model.params.mask_size] *= mask
    state = State.start(weights[None].to(DEVICE), recipe, start)
    return Job(Cell(seed, "ticket", 1), state, mask.to(DEVICE), start)


@dataclass
class Setup:
    """A part's model and images, and a recipe that meets graphs of many steps and of one."""

    part: str
    images: int | None = pick(64, 6000)

    def __post_init__(self) -> None:
        self.model = model_of(self.part)
        self.data = data_of(self.part, self.images)
        steps, every, batch = pick((2, 2, 3), (50, 25, 60))
        self.recipe = Recipe(steps=steps, lr=LR, batch_size=batch, eval_every=every)

    def jobs(self, cells: Sequence[tuple[int, float, int]]) -> list[Job]:
        return [job(self.model, self.recipe, *cell) for cell in cells]

    def order(self, jobs: Sequence[Job]) -> Tensor:
        """Image indices of an epoch, [steps, R, B]."""
        drawn = Batches(self.data, [one.who for one in jobs], self.recipe.batch_size).draw(0)
        return drawn.transpose(0, 1).contiguous().to(DEVICE)

    def trained(self, cells: Sequence[tuple[int, float, int]], kernels: str, **more: Any) -> list[Job]:
        jobs = self.jobs(cells)
        fit(self.model, self.data, jobs, self.recipe, kernels=kernels, **more)
        return jobs

    def replay(self, jobs: Sequence[Job], kernels: str) -> tuple[Replay, list[Tensor]]:
        """What trains the jobs, and its weights and moments [R, P]."""
        batch = Batch(self.model, self.data, jobs, self.recipe, choose(kernels, DEVICE))
        return Replay(batch), [batch.weights, *batch.moments]


# Checks


def named(one: Job) -> dict[str, Tensor]:
    state = one.state
    moments = {f"moment {i}": moment for i, moment in enumerate(state.moments)}
    return {"weights": state.weights, "best weights": state.best_weights} | moments


def must_be_near(found: Mapping[str, Tensor], right: Mapping[str, Tensor], bound: float) -> float:
    """The largest relative error; Wrong beyond `bound`."""
    errors = {
        name: float((found[name].double() - r.double()).norm() / r.double().norm().clamp(min=1e-30))
        for name, r in right.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    if not max(errors.values()) <= bound:
        raise Wrong(f"{worst}: off by {errors[worst]:.1e}, allowed {bound:.0e}")
    return errors[worst]


def losses(one: Job) -> dict[str, Tensor]:
    found = [e["validation_loss"] for e in one.state.evaluations]
    return {"validation losses": torch.tensor(found, dtype=torch.float64)}


def cells_of() -> list[tuple[int, float, int]]:
    """Seeds, shares kept and first steps: dense, pruned, nearly empty, and one that comes in late."""
    late = pick(1, 7)
    return [(0, 1.0, 0), (1, 0.3, 0), (2, 0.05, 0), (3, 0.5, late)][: pick(2, 4)]


def beside_the_reference(part: str, kernels: str) -> dict[str, float]:
    """All of `fit`, evaluations too, beside plain torch, whose gradients are products written out."""
    setup, cells = Setup(part), cells_of()
    setup.recipe = replace(setup.recipe, steps=pick(2, 25))
    found, right = (setup.trained(cells, k) for k in (kernels, "reference"))
    errors = [0.0]
    for ours, theirs in zip(found, right, strict=True):
        pruned = ~ours.mask[None, : setup.model.params.mask_size] & setup.model.params.full_mask().to(DEVICE)
        must_be_zero(ours.state.weights[:, : setup.model.params.mask_size], pruned, "pruned weights")
        wanted = {k: t for k, t in named(theirs).items() if k != "best weights"}
        errors += [must_be_near(named(ours), wanted, NEAR), must_be_near(losses(ours), losses(theirs), NEAR)]
    return {"error": max(errors)}


def beside_single_launches(part: str, kernels: str) -> None:
    """Graphs beside the launches that they hold: our kernels to the bit, the vendor's near."""
    setup = Setup(part)
    steps = setup.recipe.eval_every
    found = []
    for graphs in (True, False):
        replay, tensors = setup.replay(setup.jobs([c for c in cells_of() if c[2] == 0]), kernels)
        if graphs:
            replay.advance(0, steps, never)
            measured = replay.measure()
        else:
            replay.clock.zero_()
            for step in range(steps):
                replay.orders.enter(step // replay.batches.steps_per_epoch)
                replay._step()
            replay._evaluate()
            measured = replay.means()
        losses = torch.tensor(measured[0], dtype=torch.float64)
        found.append(dict(zip(("weights", "first", "second", "loss"), (*tensors, losses), strict=True)))
    if kernels == "triton":
        must_repeat(found[1], found[0], "launches one by one")
    else:
        must_be_near(found[0], found[1], NEAR)


def stopped(part: str) -> None:
    """Stopped and gone on with, to the bits of a training that was not stopped."""
    setup, cells = Setup(part), cells_of()
    whole = setup.trained(cells, "triton")
    left = [pick(1, 3)]

    def enough() -> bool:
        left[0] -= 1
        return left[0] < 0

    jobs = setup.trained(cells, "triton", should_stop=enough)
    if all(one.state.step == setup.recipe.steps for one in jobs):
        raise Wrong("was not stopped")
    fit(setup.model, setup.data, jobs, setup.recipe, kernels="triton")
    for one, other in zip(jobs, whole, strict=True):
        must_repeat(named(one), named(other), "a stop")
        if one.state.evaluations != other.state.evaluations:
            raise Wrong("evaluations differ after a stop")


def idle(part: str, kernels: str) -> None:
    """Capturing graphs, and a step in which nobody is active, leave all weights and moments as they are."""
    setup = Setup(part)
    jobs = setup.jobs([(0, 1.0, 0), (1, 0.3, 0)])
    for one in jobs:
        for moment in one.state.moments:
            moment.fill_(0.1)[:, : setup.model.params.mask_size] *= one.mask
    states = [[one.state.weights, *one.state.moments] for one in jobs]
    before = [torch.cat(rows) for rows in zip(*states, strict=True)]
    replay, tensors = setup.replay(jobs, kernels)
    for when in ("graphs were captured", "an idle step"):
        for t, old in zip(tensors, before, strict=True):
            if not same_bits(t, old):
                raise Wrong(f"weights or moments changed: {when}")
        replay.pulse.active.zero_()
        replay.clock.zero_()
        replay.run[1]()
        replay.evaluate()


def alone(part: str, kernels: str, replicas: int) -> dict[str, float]:
    """A replica in company and alone: through our kernels the same bits, through the vendor's near."""
    setup = Setup(part)
    cells = [(seed, (1.0, 0.3, 0.05)[seed % 3], 0) for seed in range(replicas)]
    together = setup.trained(cells, kernels)
    errors, differing = [0.0], []
    for i in sorted({0, replicas // 2, replicas - 1}):
        (one,) = setup.trained([cells[i]], kernels)
        found, right = named(together[i]), named(one)
        if kernels == "triton":
            must_repeat(found, right, f"company of {replicas}")
            if not same_bits(*(losses(x)["validation losses"] for x in (together[i], one))):
                differing.append(i)
        else:
            found.pop("best weights")  # of another evaluation where two losses are nearly equal
            right.pop("best weights")
            errors += [must_be_near(found, right, NEAR)]
            errors += [must_be_near(losses(together[i]), losses(one), NEAR)]
    if differing:
        raise Wrong(f"the weights are equal, but validation losses of replicas {differing} are not")
    return {"error": max(errors)}


def short_epochs(part: str) -> dict[str, float]:
    """Epochs of 8 steps, so that the host draws the order of the next one while the device lags behind."""
    batch, epochs = pick((3, 2), (60, 5))
    setup = Setup(part, images=batch * 28 // 3)
    if (found := setup.data.n_train // batch) != 8:
        raise Wrong(f"{found} steps an epoch")
    setup.recipe = replace(setup.recipe, steps=8 * epochs, eval_every=8 * epochs, batch_size=batch)
    cells = [(0, 1.0, 0), (1, 0.3, 0)]
    ours, right = (setup.trained(cells, kernels) for kernels in (pick("triton", "auto"), "reference"))
    wanted = [{k: t for k, t in named(one).items() if k != "best weights"} for one in right]
    errors = [must_be_near(named(a), b, 10 * NEAR) for a, b in zip(ours, wanted, strict=True)]
    return {"error": max(errors)}
