"""Batches of replicas: what one computes is, to the bit, what it computes alone, at any R, with anyone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselth import pruning
from sparselth.batches import Resident
from sparselth.config import Recipe, Replica
from sparselth.kernels._triton import INTERPRET
from sparselth.models import AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.nn import init_weights
from sparselth.streams import stream
from sparselth.train import Job, State, fit, scores

LENET = get_model("lenet-300-100")
SMALL = Model("small", (1, 28, 28), (Linear(20), ReLU(), Linear(10)), {}, "")
CONVS = Model("convs", (1, 28, 28), (Conv(2, 9), ReLU(), MaxPool(2), Linear(12), ReLU(), Linear(10)), {}, "")
NORMS = Model(
    "norms",
    (1, 28, 28),
    (
        *(Conv(2, 9), BatchNorm(), MaxPool(2), ReLU(), Conv(3, 3), BatchNorm(), ReLU(), AvgPool()),
        *(Linear(12), BatchNorm(), ReLU(), Linear(10)),
    ),
    {},
    "",
)
FEW_NORMS = replace(NORMS, name="few-norms", layers=(MaxPool(4), Conv(2, 3), BatchNorm(), *NORMS.layers[6:]))
ADAM = Recipe(steps=6, lr=1.2e-3, batch_size=7, eval_every=3)
SGD = replace(ADAM, lr=0.05, optimizer="sgd", weight_decay=1e-3)
interpreted = pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")


def job(model: Model, recipe: Recipe, seed: int, keep: float, start: int = 0, arm: str = "ticket") -> Job:
    """A cell with random weights and a random mask that keeps about `keep` of them."""
    who = Replica(seed, arm, 1)
    weights = init_weights(model, stream(seed, arm, 1, "init"))
    mask = pruning.full_mask(model)
    chance = torch.rand(model.mask_size, generator=torch.Generator().manual_seed(seed))
    mask &= chance < keep
    weights[: model.mask_size] *= mask
    return Job(who, State.start(weights[None], recipe, start), mask, start)


def same(ours: Job, alone: Job) -> None:
    a, b = ours.state, alone.state
    for found, expected in zip(
        (a.weights, a.best_weights, *a.moments), (b.weights, b.best_weights, *b.moments), strict=True
    ):
        assert torch.equal(found, expected), ours.who
    assert a.evaluations == b.evaluations
    assert (a.step, a.best_step, a.best_loss) == (b.step, b.best_step, b.best_loss)


cells = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from([1.0, 0.5, 0.1, 0.02]),
        st.sampled_from([0, 0, 2, 5]),
        st.sampled_from(["ticket", "reinit", "random-mask"]),
    ),
    min_size=1,
    max_size=7,
    unique_by=lambda cell: (cell[0], cell[3]),
)


@pytest.mark.parametrize("kernels", ["auto", "torch", "reference"])
@pytest.mark.parametrize("model", [LENET, CONVS, NORMS], ids=lambda model: model.name)
@given(cells=cells, recipe=st.sampled_from([ADAM, SGD, replace(SGD, momentum=0.0)]))
@settings(max_examples=12)
def test_a_replica_of_any_batch_equals_itself_alone(
    kernels: str, model: Model, cells: list[tuple[int, float, int, str]], recipe: Recipe, few: Resident
) -> None:
    share = {spec.name: 0.3 for spec in model.weights}
    jobs = [job(model, recipe, *cell) for cell in cells]
    fit(model, few, jobs, recipe, kernels=kernels, break_even=share)
    together = scores(model, few, jobs, kernels, share)
    for found, cell, pair in zip(jobs, cells, together, strict=True):
        alone = job(model, recipe, *cell)
        fit(model, few, [alone], recipe, kernels=kernels, break_even=share)
        same(found, alone)
        assert scores(model, few, [alone], kernels, share) == [pair]


@interpreted
@pytest.mark.parametrize(
    ("model", "recipe", "replicas"),
    [
        (SMALL, ADAM, 3),
        (SMALL, ADAM, 1),
        (SMALL, replace(SGD, momentum=0.0), 2),
        (CONVS, SGD, 2),
        (FEW_NORMS, SGD, 2),
    ],
    ids=["small-adam", "small-adam-1", "small-sgd", "convs-sgd", "few-norms"],
)
def test_a_replica_of_a_triton_batch_equals_itself_alone(
    model: Model, recipe: Recipe, replicas: int, few: Resident
) -> None:
    steps = 1 if model is CONVS else 2
    recipe = replace(recipe, steps=steps, eval_every=steps, batch_size=3)
    cells = [(seed, (1.0, 0.3, 0.1)[seed], (0, steps - 1, 0)[seed]) for seed in range(replicas)]
    jobs = [job(model, recipe, *cell) for cell in cells]
    fit(model, few, jobs, recipe, kernels="triton")
    for found, cell in zip(jobs, cells, strict=True):
        alone, reference = job(model, recipe, *cell), job(model, recipe, *cell)
        fit(model, few, [alone], recipe, kernels="triton")
        same(found, alone)
        fit(model, few, [reference], recipe, kernels="reference")
        expected = reference.state
        # a batch norm of three images divides rounding by what may be a small deviation
        bound = 1e-4 if model.norms else 1e-5
        for ours, right in zip(
            (found.state.weights, *found.state.moments), (expected.weights, *expected.moments), strict=True
        ):
            assert (ours - right).norm() <= bound * right.norm()
        assert found.state.best_loss == pytest.approx(expected.best_loss, rel=bound)


def test_replicas_see_their_own_images_and_rates(digits: Resident) -> None:
    """Replicas that are alike in all but one thing come out different."""
    jobs = [job(SMALL, ADAM, 0, 1.0) for _ in range(3)]
    jobs[1].who = Replica(0, "ticket", 2)  # another order of the images
    jobs[2].state.step = jobs[2].start_step = 3  # fewer steps
    fit(SMALL, digits, jobs, ADAM, kernels="reference")
    first, *others = (tuple(job.state.weights[0, :100].tolist()) for job in jobs)
    assert len({first, *others}) == 3


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("model", [LENET, NORMS], ids=lambda model: model.name)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_batch_goes_on_to_the_same_bits(
    kernels: str, model: Model, stop: int, digits: Resident
) -> None:
    cells = [(0, 1.0, 0), (1, 0.1, 0), (2, 0.5, 2)]
    whole, stopped = ([job(model, ADAM, *cell) for cell in cells] for _ in range(2))
    fit(model, digits, whole, ADAM, kernels=kernels)
    calls = iter(range(1000))
    fit(model, digits, stopped, ADAM, kernels=kernels, should_stop=lambda: next(calls) >= stop)
    assert min(job.state.step for job in stopped) < ADAM.steps
    fit(model, digits, stopped, ADAM, kernels=kernels)
    for found, expected in zip(stopped, whole, strict=True):
        same(found, expected)
