"""Scores over frozen weights: a job is its own, goes on to the same bits, trains no weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.choose import groups
from sparselth.engine.state import Job, State
from sparselth.experiments.jobs import _goes_on, _load_state, save_state
from sparselth.frozen import METHODS, effective, mask_of, weights_of
from sparselth.kernels import _native
from sparselth.kernels._triton import INTERPRET
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Layer, Linear, Model, Node, ReLU
from sparselth.streams import stream
from sparselth.train import accuracies_on_test, fit

LAYERS: tuple[Layer | Node, ...] = (
    *(Conv(3, 5, 0, 2), BatchNorm(), ReLU(), Conv(3, 3, 1), BatchNorm()),
    *(Node(Add(), (2, 4)), ReLU(), AvgPool(), Linear(10)),
)
NORMED = Model("tiny-residual", (1, 28, 28), LAYERS, {}, "")
FC = Model("tiny-fc", (1, 28, 28), (Linear(20), ReLU(), Linear(10)), {}, "")
RECIPE = Recipe(
    steps=12, lr=0.5, batch_size=20, optimizer="sgd", weight_decay=1e-3, eval_every=4, cosine=True
)
native = pytest.mark.skipif(not _native.LIB, reason=_native.WHY)
interpreted = pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")
KERNELS = ["reference", pytest.param("native", marks=native)]


def job(model: Model, name: str, seed: int = 0, recipe: Recipe = RECIPE, **given: Any) -> Job:
    """A method's first step; one that changes weights does so often."""
    method = METHODS[name]
    often: dict[str, Any] = {"every": 3, "share": 0.3} if method.has_generations else {}
    frozen = method.frozen(seed, **often | given)
    flat = method.start(frozen, model.params, stream(seed, name, 0, "scores"))
    generations = None
    if method.has_generations:
        generations = torch.zeros(1, model.params.mask_size, dtype=torch.int32)
    state = State.start(flat[None], recipe, 0, generations)
    return Job(Cell(seed, name, 0), state, model.params.full_mask(), frozen=frozen)


def tensors(state: State) -> dict[str, Tensor | None]:
    moments = {f"moments/{i}": moment for i, moment in enumerate(state.moments)}
    names = ("weights", "best_weights", "generations", "best_generations")
    return {name: getattr(state, name) for name in names} | moments


def assert_equal(one: State, other: State) -> None:
    """To the bit, and what evaluations found with it."""
    for (name, a), b in zip(tensors(one).items(), tensors(other).values(), strict=True):
        assert (a is None) is (b is None), name
        if a is not None and b is not None:
            assert torch.equal(a, b), name
    assert one.evaluations == other.evaluations
    assert (one.step, one.best_step, one.best_loss) == (other.step, other.best_step, other.best_loss)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("model", [FC, NORMED], ids=lambda model: model.name)
def test_a_replica_does_not_depend_on_those_beside_it(model: Model, kernels: str, digits: Resident) -> None:
    """All methods, laws and seeds in one batch, and each alone."""
    asked: Sequence[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name in METHODS),
        ("edge-popup", {"keep": 0.1, "law": "normal", "scope": "global", "scaled": True, "seed": 3}),
        ("iterand", {"law": "uniform", "seed": 3}),
    ]
    together = [job(model, name, **given) for name, given in asked]
    fit(model, digits, together, RECIPE, kernels=kernels)
    for one, (name, given) in zip(together, asked, strict=True):
        alone = job(model, name, **given)
        fit(model, digits, [alone], RECIPE, kernels=kernels)
        assert alone.diverged is None
        assert_equal(alone.state, one.state)


@pytest.mark.parametrize(
    ("name", "optimizer", "kernels"),
    [
        *((name, optimizer, "torch") for name in METHODS for optimizer in ("sgd", "adam")),
        pytest.param("iterand", "sgd", "triton", marks=interpreted),
        pytest.param("biprop", "adam", "triton", marks=interpreted),
    ],
)
def test_every_path_takes_the_same_steps(name: str, optimizer: str, kernels: str, few: Resident) -> None:
    """As dense torch does, up to rounding; thresholds in Triton's interpreter are those of a device."""
    recipe = Recipe(steps=2, lr=0.05, batch_size=20, optimizer=optimizer, eval_every=2)  # type: ignore[arg-type]
    found = []
    for way in ("reference", kernels):
        one = job(FC, name, recipe=recipe, every=1, share=0.1)
        fit(FC, few, [one], recipe, kernels=way)
        found.append(one)
    right, other = found
    torch.testing.assert_close(other.state.weights, right.state.weights, rtol=1e-4, atol=1e-5)
    same = (other.network(FC) == right.network(FC)).float().mean()
    assert same > 0.99 or name == "biprop"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("stop", [2, 3, 7, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_job_that_was_stopped_goes_on_to_the_same_bits(
    name: str, stop: int, kernels: str, digits: Resident, tmp_path: Path
) -> None:
    """From its checkpoint, between redraws and at one, before an evaluation and behind it."""
    straight = job(NORMED, name)
    fit(NORMED, digits, [straight], RECIPE, kernels=kernels)
    stopped, asked = job(NORMED, name), iter(range(100))
    fit(NORMED, digits, [stopped], RECIPE, kernels=kernels, should_stop=lambda: next(asked) >= stop)
    assert stopped.state.step < RECIPE.steps
    file = tmp_path / "checkpoint.safetensors"
    save_state(file, stopped.state, {"config": ""})
    again = job(NORMED, name)
    found = _load_state(file, "cpu")
    assert _goes_on(found, again.state, RECIPE, None)
    again.state = found
    fit(NORMED, digits, [again], RECIPE, kernels=kernels)
    assert_equal(again.state, straight.state)


def test_a_checkpoint_without_generations_or_with_others_is_none_of_the_method(tmp_path: Path) -> None:
    one, other = job(FC, "iterand"), job(FC, "edge-popup")
    for mine, theirs in ((one, other), (other, one)):
        assert not _goes_on(mine.state, theirs.state, RECIPE, None)
    assert one.state.generations is not None
    short = replace(one.state, generations=one.state.generations[:, :-1])
    assert not _goes_on(short, one.state, RECIPE, None)
    assert _goes_on(one.state, one.state, RECIPE, None)


@pytest.mark.parametrize("model", [FC, NORMED], ids=lambda model: model.name)
@pytest.mark.parametrize("name", METHODS)
def test_training_touches_no_weight(name: str, model: Model, digits: Resident) -> None:
    """The frozen weights before and after, and those that the network computes with, are the same numbers."""
    one = job(model, name)
    assert one.frozen is not None
    params, m = model.params, model.params.mask_size

    def digest() -> str:
        generations = None if one.state.generations is None else torch.zeros_like(one.state.generations[0])
        assert one.frozen is not None
        return hashlib.sha256(weights_of(one.frozen, params, generations).numpy().tobytes()).hexdigest()

    before, scores = digest(), one.state.weights.clone()
    fit(model, digits, [one], RECIPE)
    assert digest() == before
    after = one.state.weights
    trained = params.full_mask()
    assert not torch.equal(after[0, :m][trained], scores[0, :m][trained])
    running = {spec.name for spec in params.statistics}
    for spec in params.unpruned:  # biases stay 0, batch norms neither scale nor shift, statistics run
        assert torch.equal(after[:, spec.span], scores[:, spec.span]) is (spec.name not in running), spec.name
    assert not after[0, :m][~trained].any()
    if name not in ("biprop", "supermask"):
        network, mask = one.network(model)[0, :m], mask_of(one.frozen, params, after[0])
        some = None if one.state.generations is None else one.state.generations[0]
        assert torch.equal(network, weights_of(one.frozen, params, some) * mask)


def test_early_stop_keeps_the_network_it_looked_at(digits: Resident) -> None:
    """Redraws behind it are none of it."""
    one = job(FC, "iterand", recipe=replace(RECIPE, lr=30.0))
    seen: dict[int, Tensor] = {}

    def evaluated(jobs: Sequence[Job]) -> None:
        seen[jobs[0].state.step] = jobs[0].network(FC)

    fit(FC, digits, [one], replace(RECIPE, lr=30.0, steps=24), on_evaluation=evaluated)
    state = one.state
    assert state.generations is not None
    assert state.best_step < 24, "a rate at which the loss rises"
    assert state.best_generations is not None
    assert not torch.equal(state.best_generations, state.generations)
    assert torch.equal(one.network(FC, best=True), seen[state.best_step])
    (best, last), both = accuracies_on_test(FC, digits, [one])[0], job(FC, "iterand")
    for accuracy, network in ((best, seen[state.best_step]), (last, seen[24])):
        both.frozen, both.state = None, State.start(network, RECIPE)
        assert accuracies_on_test(FC, digits, [both])[0][0] == accuracy


@pytest.mark.parametrize("name", METHODS)
def test_what_is_evaluated_is_the_network_of_the_scores(name: str, digits: Resident) -> None:
    one = job(NORMED, name)
    fit(NORMED, digits, [one], RECIPE)
    assert one.frozen is not None
    some = None if one.state.generations is None else one.state.generations[0]
    network = effective(one.frozen, NORMED.params, one.state.weights[0], some)[None]
    plain = Job(one.who, State.start(network, RECIPE), NORMED.params.full_mask())
    (group,) = groups(NORMED, [plain])
    losses, accuracies = group.measure(network, digits.validation(0))
    assert one.state.evaluations[-1]["validation_loss"] == losses[0]
    assert one.state.evaluations[-1]["validation_accuracy"] == accuracies[0]


def test_frozen_jobs_train_apart_from_trained_ones(digits: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselth.engine.choose.trains_alone", lambda paths, device: False)
    flat = job(FC, "edge-popup").state.weights
    flat[:, : FC.params.mask_size] *= 0.1
    trained = Job(Cell(0, "dense", 0), State.start(flat, RECIPE), FC.params.full_mask())
    jobs = [job(FC, "edge-popup"), trained, job(FC, "signed")]
    found = [*groups(FC, jobs, "reference")]
    assert [[one.who.arm for one in group.jobs] for group in found] == [["dense"], ["edge-popup", "signed"]]
    fit(FC, digits, jobs, RECIPE, kernels="reference")
    assert all(one.state.step == RECIPE.steps for one in jobs)
    assert not torch.equal(trained.state.weights, flat)


@pytest.mark.parametrize(
    ("name", "lr"), [("edge-popup", 0.5), ("iterand", 0.5), ("recycle", 0.5), ("biprop", 0.5)]
)
def test_scores_learn(name: str, lr: float, digits: Resident) -> None:
    """Digits, from weights that never move."""
    recipe = replace(RECIPE, steps=150, lr=lr, batch_size=60, eval_every=150)
    wide = Model("wide", (1, 28, 28), (Linear(100), ReLU(), Linear(10)), {}, "")
    one = job(wide, name, recipe=recipe, every=50, share=0.1)
    ((before, _),) = accuracies_on_test(wide, digits, [one])
    fit(wide, digits, [one], recipe)
    ((after, _),) = accuracies_on_test(wide, digits, [one])
    assert before < 0.35
    assert after > 0.8
