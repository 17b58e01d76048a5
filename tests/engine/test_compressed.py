"""Training in the compressed domain: the numbers of dense training with masks, at any mix of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.batch import DenseForward
from sparselth.engine.compressed import CompressedForward
from sparselth.engine.dense import init_weights
from sparselth.engine.layout import Layout
from sparselth.engine.state import Job, State, measure
from sparselth.kernels import _native
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.runs import RunRecord
from sparselth.streams import stream
from sparselth.train import accuracies_on_test, fit

LENET, LENET5 = get_model("lenet-300-100"), get_model("lenet5")
TICKET = Cell(0, "ticket", 1)
ADAM = Recipe(steps=12, lr=1.2e-3, batch_size=23, eval_every=6)
SGD = replace(ADAM, lr=0.05, optimizer="sgd", weight_decay=1e-3)
LIBRARIES = ["torch", pytest.param("native", marks=pytest.mark.skipif(not _native.LIB, reason=_native.WHY))]


def start(model: Model, recipe: Recipe, keep: float, seed: int = 0) -> tuple[State, torch.Tensor]:
    """A state with a random mask; the output layer keeps its root."""
    weights = init_weights(model, stream(seed, "ticket", 0, "init"))
    mask = model.params.full_mask()
    chance = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(seed))
    for spec in model.weights:
        span = spec.span
        mask[span] &= chance[span] < (keep**0.5 if spec.output else keep)
    weights[: model.params.mask_size] *= mask
    return State.start(weights[None], recipe), mask


def every(model: Model, share: float = 1.0) -> dict[str, float]:
    return {spec.name: share for spec in model.weights}


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 2e-6) -> bool:
    return bool((found - expected).norm() <= bound * expected.norm())


@pytest.mark.parametrize("kernels", LIBRARIES)
@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("keep", [0.3, 0.05, 0.005])
@pytest.mark.parametrize("model", [LENET, LENET5], ids=lambda model: model.name)
def test_the_numbers_are_those_of_dense_training(
    model: Model, keep: float, recipe: Recipe, kernels: str, digits: Resident
) -> None:
    runs = {}
    for name in ("reference", kernels):
        state, mask = start(model, recipe, keep)
        job = Job(TICKET, state, mask)
        fit(model, digits, [job], recipe, kernels=name, break_even=every(model))
        assert state.layout is None
        (accuracies,) = accuracies_on_test(model, digits, [job], name, every(model))
        runs[name] = state, mask, accuracies
    (state, mask, accuracies), (expected, _, right) = runs[kernels], runs["reference"]
    m = model.params.mask_size
    for found, dense in zip(
        (state.weights, state.best_weights, *state.moments),
        (expected.weights, expected.best_weights, *expected.moments),
        strict=True,
    ):
        assert close(found, dense, 1e-5)
        assert not found[0, :m][~mask].any()
    assert state.best_step == expected.best_step
    for line, other in zip(state.evaluations, expected.evaluations, strict=True):
        assert line["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)
    assert accuracies[0] == pytest.approx(right[0], abs=2e-3)  # a logit that ties may fall either way
    if kernels == "native":
        assert state.bytes < expected.bytes * (keep + 0.15)


@st.composite
def networks(draw: st.DrawFn) -> Model:
    """Small networks with everything a chain can meet: pools before and after ReLU, none, layers in a row."""
    layers: list[Conv | MaxPool | ReLU | Linear] = []
    size = 28
    for _ in range(draw(st.integers(0, 2))):
        kernel, padding = draw(st.sampled_from([1, 3, 5])), draw(st.integers(0, 2))
        layers.append(Conv(draw(st.integers(1, 4)), kernel, padding))
        size += 2 * padding - kernel + 1
        order: list[MaxPool | ReLU] = draw(
            st.sampled_from([[], [ReLU()], [MaxPool(2)], [MaxPool(2), ReLU()], [ReLU(), MaxPool(2)]])
        )
        layers += order
        size //= 2 if MaxPool(2) in order else 1
    for _ in range(draw(st.integers(0, 2))):
        layers += [Linear(draw(st.integers(1, 40))), *draw(st.sampled_from([[ReLU()], []]))]
    return Model("random", (1, 28, 28), (*layers, Linear(10)), {}, "")


@pytest.mark.parametrize("kernels", LIBRARIES)
@given(
    model=networks(),
    keep=st.sampled_from([0.6, 0.2, 0.03, 0.0]),
    seed=st.integers(0, 10**6),
    compressed=st.integers(0, 63),
)
@settings(max_examples=25)
def test_random_networks_and_mixes_of_layers(
    kernels: str, model: Model, keep: float, seed: int, compressed: int, digits: Resident
) -> None:
    recipe = replace(SGD, steps=2, batch_size=7, eval_every=2, lr=1e-3)
    share = {spec.name: float(compressed >> i & 1) * 1.1 for i, spec in enumerate(model.weights)}
    found, expected = [], []
    for name, states in ((kernels, found), ("reference", expected)):
        state, mask = start(model, recipe, keep, seed)
        fit(model, digits, [Job(TICKET, state, mask)], recipe, kernels=name, break_even=share)
        states.append(state)
    assert close(found[0].weights, expected[0].weights)
    assert close(found[0].moments[0], expected[0].moments[0], 1e-4)


@pytest.mark.parametrize("share", [1.1, 0.0])
def test_a_network_that_begins_with_a_pool_trains(share: float, digits: Resident) -> None:
    model = Model("pooled", (1, 28, 28), (MaxPool(2), Linear(30), ReLU(), Linear(10)), {}, "")
    found = []
    for kernels in ("auto", "reference"):
        state, mask = start(model, ADAM, 0.1)
        fit(model, digits, [Job(TICKET, state, mask)], ADAM, kernels=kernels, break_even=every(model, share))
        found.append(state.weights)
    assert close(*found)


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize("kernels", LIBRARIES)
def test_images_stay_laid_out_and_weights_do_not(kernels: str, share: float, digits: Resident) -> None:
    state, mask = start(LENET, ADAM, 0.1)
    names = frozenset(spec.name for spec in LENET.weights if share)
    layout = Layout(LENET, mask, names)
    layout.leave_out(state.weights)
    weights = layout.compress(state.weights)
    forward = CompressedForward(LENET, layout, weights, kernels)
    for chunks in (digits.validation(0), digits.validation(1), digits.test(), digits.validation(0)):
        weights *= 1.5
        found = measure(forward, chunks)
        loss, accuracy = measure(DenseForward(LENET, layout.expand(weights), False), chunks)
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert found[1] == pytest.approx(accuracy, abs=2e-3)


@pytest.mark.parametrize(("stop", "step"), [(1, 1), (6, 6), (7, 6), (9, 7)])
@pytest.mark.skipif(not _native.LIB, reason=_native.WHY)
def test_stopping_anywhere_changes_no_bit(stop: int, step: int, digits: Resident) -> None:
    """`should_stop` is asked before every step, and before each of two chunks of an evaluation."""
    share = every(LENET, 0.2)  # the output layer, with more, stays dense
    whole, mask = start(LENET, ADAM, 0.1)
    fit(LENET, digits, [Job(TICKET, whole, mask)], ADAM, break_even=share)
    state, _ = start(LENET, ADAM, 0.1)
    calls = iter(range(1000))
    fit(
        LENET,
        digits,
        [Job(TICKET, state, mask)],
        ADAM,
        break_even=share,
        should_stop=lambda: next(calls) == stop,
    )
    assert state.step == step
    fit(LENET, digits, [Job(TICKET, state, mask)], ADAM, break_even=share)
    assert torch.equal(state.weights, whole.weights)
    assert all(map(torch.equal, state.moments, whole.moments))
    assert state.evaluations == whole.evaluations


@pytest.mark.skipif(not _native.LIB, reason=_native.WHY)
def test_a_checkpoint_in_the_middle_is_expanded(digits: Resident) -> None:
    shapes = []
    state, mask = start(LENET, ADAM, 0.1)

    def seen(jobs: Sequence[Job]) -> None:
        assert jobs[0].state is state
        assert state.layout is not None
        whole = state.expanded()
        assert whole.layout is None
        shapes.extend(t.shape[1] for t in (whole.weights, whole.best_weights, *whole.moments))
        assert state.weights.shape[1] == state.layout.size

    fit(LENET, digits, [Job(TICKET, state, mask)], ADAM, break_even=every(LENET), on_evaluation=seen)
    assert set(shapes) == {LENET.params.size}


def test_imp_says_what_a_level_costs(
    imp: Callable[..., RunRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    record = imp("--levels", "4", "--rate", "0.6", "--seeds", "0", "--arms", "ticket")
    assert "of dense" in capsys.readouterr().out
    for point in record.points:
        assert point["step_seconds"] > 0
        assert point["dense_state_bytes"] == 16 * LENET.params.size
    first, *_, last = record.points
    assert first["dense_state_bytes"] <= first["state_bytes"] < 1.2 * first["dense_state_bytes"]
    assert last["weights_remaining"] < 0.04
    if _native.LIB:
        assert last["state_bytes"] < 0.12 * last["dense_state_bytes"]
