"""Dense replicas: each is evaluated on the validation images of its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Batches, Resident
from sparselth.engine import batch
from sparselth.engine.batch import DenseForward, DenseSteps
from sparselth.engine.dense import Network, cross_entropy_grad, init_weights
from sparselth.engine.paths import choose
from sparselth.engine.state import Batch, Job, State, measure, never
from sparselth.engine.vendor import VendorNetwork
from sparselth.models import BatchNorm, Conv, Linear, MaxPool, Model, ReLU
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
    together = Batch(MODEL, digits, jobs, ADAM, choose("reference", "cpu"))
    losses, accuracies = DenseSteps(together, vendor).measure()
    for one, loss, accuracy in zip(together.jobs, losses, accuracies, strict=True):
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


# ---- what steps are made of, by an update that writes down what it gets

LAYERS = MaxPool(4), Conv(2, 3), BatchNorm(), ReLU(), MaxPool(5), Linear(10)
NORMS = Model("norms", (1, 28, 28), LAYERS, {}, "")
PLAN = Recipe(steps=9, lr=1.0, batch_size=7, warmup=6, optimizer="adam", eval_every=3)


def jobs_of(model: Model, cells: Sequence[tuple[int, int, bool]]) -> list[Job]:
    """A job for each (start step, seed, pruned)."""
    found = []
    for i, (start, seed, pruned) in enumerate(cells):
        weights = init_weights(model, stream(i, "ticket", 0, "init"))
        mask = model.params.full_mask()
        mask[:: 2 if pruned else len(mask)] &= not pruned
        weights[: len(mask)] *= mask
        state = State.start(weights[None], PLAN, 4)
        found.append(Job(Cell(seed, "ticket", 0, i), state, mask, start))
    return found


class Updates:
    """In the place of `bind_update`: what it was given, and when which update was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given, self.called = list[Any](), list[Any]()
        monkeypatch.setattr(batch, "bind_update", self.bind)

    def bind(self, *given: Any) -> Any:
        i = len(self.given)
        self.given.append(given)
        return lambda *at: self.called.append((i, *at)), 10 + i


def test_each_start_step_has_an_update_of_its_rows(few: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, n, m = Updates(monkeypatch), NORMS.params.trained_size, NORMS.params.mask_size
    assert n < NORMS.params.size
    cells = [(0, 3, False), (2, 0, True), (2, 1, False), (2, 1, False), (3, 1, False), (3, 2, False)]
    jobs = jobs_of(NORMS, cells)
    together = Batch(NORMS, few, jobs, PLAN, choose("reference", "cpu"))
    steps = DenseSteps(together, vendor=False)
    assert steps.grad.shape == together.weights.shape
    assert not steps.grad.any()
    assert steps.state_bytes == 4 * steps.grad.numel() + 10 + 11 + 12
    assert [start for start, _ in steps.updates] == [0, 2, 3]
    for (weights, grad, moments, live, *rest), span in zip(
        updates.given, (slice(0, 1), slice(1, 4), slice(4, 6)), strict=True
    ):
        pairs = [(weights, together.weights), (grad, steps.grad)]
        for found, whole in (*pairs, *zip(moments, together.moments, strict=True)):
            expected = whole[span, :n]
            assert (found.data_ptr(), found.shape) == (expected.data_ptr(), expected.shape)
        assert len(moments) == 2
        assert rest == [PLAN, together.paths]
        if span.start == 1:
            assert torch.equal(live, together.mask[span])
        else:
            assert live is None  # of nothing pruned there is no mask
    assert m < n

    asked: list[int] = []
    at = Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, step: asked.append(step) or at(self, step))
    calls = iter(range(9))
    assert steps.advance(4, 3, lambda: next(calls) == 2) == 2
    assert asked == [4, 5]
    rates = {step: PLAN.lr_at(step) for step in (4, 5)}
    assert rates[4] != rates[5]
    assert updates.called == [
        (i, step - start + 1, rates[step]) for step in (4, 5) for i, start in enumerate((0, 2, 3))
    ]
    assert steps.advance(6, 2, lambda: False) == 2
    assert (asked, steps.many) == ([4, 5, 6, 7], 1)


def test_a_step_computes_the_gradient_of_the_step_s_images(
    few: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every replica, and through torch's own layers."""
    Updates(monkeypatch)
    found = []
    for vendor in (False, True):
        jobs = jobs_of(MODEL, [(0, 3, True), (2, 0, True)][: 2 - vendor])
        together = Batch(MODEL, few, jobs, PLAN, choose("reference", "cpu"))
        steps = DenseSteps(together, vendor)
        assert isinstance(steps.network, VendorNetwork if vendor else Network)
        steps.advance(4, 1, lambda: False)
        found.append(steps.grad.clone())
        images, labels = Batches(few, together.who, 7).at(4)
        expected = torch.zeros_like(together.weights)
        other = Network(MODEL, together.weights, 7, expected)
        other.backward(cross_entropy_grad(other.forward(images), labels))
        torch.testing.assert_close(steps.grad, expected, rtol=1e-4, atol=1e-6)
        assert (steps.batches.batch, steps.batches.replicas) == (7, together.who)
        steps.measure()
        kinds = {type(network) for network in steps.forwards[0][1].networks.values()}
        assert kinds == {VendorNetwork if vendor else Network}
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0][:1], rtol=1e-4, atol=1e-6)


def test_rows_of_a_seed_see_its_validation_images_and_stop_between_two_chunks(
    few: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    Updates(monkeypatch)
    jobs = jobs_of(MODEL, [(0, 3, False), (2, 0, True), (2, 1, False), (2, 1, False), (3, 1, False)])
    together = Batch(MODEL, few, jobs, PLAN, choose("reference", "cpu"))
    steps = DenseSteps(together, vendor=False)
    rows = [(seed, len(forward.weights)) for seed, forward in steps.forwards]
    assert rows == [(3, 1), (0, 1), (1, 2), (1, 1)]
    place = 0
    for _, forward in steps.forwards:
        assert forward.weights.data_ptr() == together.weights[place].data_ptr()
        place += len(forward.weights)
    told: list[Any] = []

    def measured(forward: Any, chunks: Any, stop: Any) -> Any:
        i = [f for _, f in steps.forwards].index(forward)
        told.append((chunks, stop))
        return [10.0 * i] * len(forward.weights), [10.0 * i + 1] * len(forward.weights)

    monkeypatch.setattr(batch, "measure", measured)
    monkeypatch.setattr(few, "validation", lambda seed: ("images of", seed))
    stop = lambda: True  # noqa: E731
    assert steps.measure(stop) == ([0.0, 10.0, 20.0, 20.0, 30.0], [1.0, 11.0, 21.0, 21.0, 31.0])
    assert told == [(("images of", seed), stop) for seed in (3, 0, 1, 1)]
    steps.measure()
    assert told[-1][1] is never


@pytest.mark.parametrize("vendor", [False, True])
def test_what_is_held_between_two_steps(vendor: bool, few: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    Updates(monkeypatch)
    together = Batch(MODEL, few, jobs_of(MODEL, [(0, 3, False)]), PLAN, choose("reference", "cpu"))
    steps = DenseSteps(together, vendor)
    steps.advance(4, 1, lambda: False)
    monkeypatch.setattr(Batch, "held", lambda self, *of: (self, *of))
    held: Any = steps.memory()
    assert [*map(id, held)] == [id(together), id(steps.grad), id(steps.batches)]
    if isinstance(steps.network, VendorNetwork):
        assert steps.network.kept == []
