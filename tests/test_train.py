from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from sparselth import pruning
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.streams import stream
from sparselth.train import _evaluated, accuracies_on_test, fit, is_done

LENET = get_model("lenet-300-100")
TICKET = Cell(0, "ticket", 0)
ADAM = Recipe(steps=120, lr=1.2e-3, eval_every=50)
SGD = Recipe(steps=120, lr=0.05, optimizer="sgd", weight_decay=1e-3, eval_every=50)


def start(seed: int, recipe: Recipe, keep: float = 1.0) -> tuple[State, torch.Tensor]:
    weights = init_weights(LENET, stream(seed, "ticket", 0, "init"))
    mask = LENET.params.full_mask()
    if keep < 1:
        rung = {"all": round(keep * LENET.params.prunable)}
        mask = pruning.prune(LENET.params, weights[: LENET.params.mask_size], mask, rung)
        weights[: LENET.params.mask_size] *= mask
    return State.start(weights[None], recipe), mask


@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
def test_pruned_weights_stay_zero_and_live_ones_move(digits: Resident, recipe: Recipe) -> None:
    state, mask = start(0, recipe, keep=0.2)
    before = state.weights.clone()
    fit(LENET, digits, [Job(TICKET, state, mask)], recipe)
    m = LENET.params.mask_size
    for t in (state.weights, *state.moments, state.best_weights):
        assert not t[0, :m][~mask].any()
    moved = (state.weights != before)[0, :m][mask]
    assert moved.double().mean() > 0.95
    assert state.weights[:, m:].any()


@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize(("stop", "step"), [(1, 1), (49, 49), (50, 50), (51, 50), (77, 75), (125, 120)])
def test_stopping_anywhere_changes_no_bit(digits: Resident, recipe: Recipe, stop: int, step: int) -> None:
    """`should_stop` is asked before every step, and before each of two chunks of an evaluation."""
    whole, mask = start(0, recipe, keep=0.5)
    fit(LENET, digits, [Job(TICKET, whole, mask, keep_step=60)], recipe)
    state, _ = start(0, recipe, keep=0.5)
    calls = iter(range(1000))
    fit(
        LENET,
        digits,
        [Job(TICKET, state, mask, keep_step=60)],
        recipe,
        should_stop=lambda: next(calls) == stop,
    )
    assert state.step == step
    assert not is_done(Job(TICKET, state, mask), recipe)
    fit(LENET, digits, [Job(TICKET, state, mask, keep_step=60)], recipe)
    assert torch.equal(state.weights, whole.weights)
    assert torch.equal(state.best_weights, whole.best_weights)
    assert state.evaluations == whole.evaluations
    assert state.kept_weights is not None
    assert whole.kept_weights is not None
    assert torch.equal(state.kept_weights, whole.kept_weights)


def test_early_stop_is_the_evaluation_of_least_validation_loss(digits: Resident) -> None:
    recipe = replace(ADAM, steps=600, lr=5e-3)  # overfits 3,500 images
    state, mask = start(0, recipe)
    fit(LENET, digits, [Job(TICKET, state, mask)], recipe)
    losses = {line["step"]: line["validation_loss"] for line in state.evaluations}
    assert list(losses) == list(range(50, 601, 50))
    assert state.best_step == min(losses, key=lambda step: losses[step]) < 600
    again, _ = start(0, recipe)
    stopped = replace(recipe, steps=state.best_step)
    fit(LENET, digits, [Job(TICKET, again, mask)], stopped)
    assert torch.equal(again.weights, state.best_weights)
    ((at_early_stop, final),) = accuracies_on_test(LENET, digits, [Job(TICKET, state, mask)])
    assert accuracies_on_test(LENET, digits, [Job(TICKET, again, mask)])[0][1] == at_early_stop
    assert final != at_early_stop


def test_of_equal_losses_the_first_is_the_early_stop() -> None:
    state, mask = start(0, ADAM)
    job = Job(TICKET, state, mask)
    for step, loss in ((50, 0.5), (100, 0.25), (120, 0.25)):
        state.step = step
        state.weights += 1
        _evaluated(job, loss, 0.75)
        if step == 100:
            best = state.weights.clone()
    assert (state.best_step, state.best_loss) == (100, 0.25)
    assert torch.equal(state.best_weights, best)


@pytest.mark.parametrize("keep", [0, 20, 50, 60])
def test_kept_weights_are_those_of_their_step_and_stay(digits: Resident, keep: int) -> None:
    recipe = replace(ADAM, steps=80)
    state, mask = start(0, recipe, keep=0.5)
    fit(LENET, digits, [Job(TICKET, state, mask, keep_step=keep)], recipe)
    short, _ = start(0, recipe, keep=0.5)
    if keep:
        fit(LENET, digits, [Job(TICKET, short, mask)], replace(recipe, steps=keep))
    assert state.kept_weights is not None
    assert torch.equal(state.kept_weights, short.weights)
    assert not torch.equal(state.kept_weights, state.weights)


def test_the_learning_rate_is_that_of_the_step() -> None:
    recipe = Recipe(steps=100, lr=1.0, warmup=10, lr_drops=(50, 80))
    assert recipe.lr_at(0) == pytest.approx(0.1)
    assert recipe.lr_at(9) == recipe.lr_at(49) == 1.0
    assert recipe.lr_at(50) == pytest.approx(0.1)
    assert recipe.lr_at(99) == pytest.approx(0.01)


def test_training_goes_on_with_the_rate_of_the_rewind_step(digits: Resident) -> None:
    recipe = Recipe(steps=40, lr=0.1, optimizer="sgd", lr_drops=(20,))
    state, mask = start(0, recipe)
    state.step = 30
    low = State.start(state.weights, recipe, 30)
    fit(LENET, digits, [Job(TICKET, low, mask, 30)], recipe)
    constant = State.start(state.weights, recipe, 30)
    fit(LENET, digits, [Job(TICKET, constant, mask, 30)], replace(recipe, lr=0.1 * 0.1, lr_drops=()))
    assert torch.equal(low.weights, constant.weights)


def test_adam_corrects_its_bias_from_the_rewind_step(digits: Resident) -> None:
    recipe = replace(ADAM, steps=31)
    state, mask = start(0, recipe)
    before = state.weights.clone()
    state.step = 30
    fit(LENET, digits, [Job(TICKET, state, mask, 30)], recipe)
    moved = (state.weights - before).abs()[0, : LENET.params.mask_size]
    # a first Adam step moves every weight with a gradient by the learning rate
    assert moved[moved > 0].median() == pytest.approx(recipe.lr, rel=0.01)


SMALL = Model("small", (1, 28, 28), (Linear(20), ReLU(), Linear(10)), {}, "")
TINY = Model("tiny", (1, 28, 28), (MaxPool(7), Linear(4), ReLU(), Linear(10)), {}, "")
CONVS = Model("convs", (1, 28, 28), (Conv(2, 9), ReLU(), MaxPool(2), Linear(10)), {}, "")


ENGINES = [("reference", 0.0), ("torch", 0.0), ("torch", 2.0), ("auto", 2.0)]


@pytest.mark.parametrize(
    ("model", "kernels", "even"),
    [(model, *engine) for model in (SMALL, CONVS) for engine in ENGINES] + [(TINY, "triton", 0.0)],
)
def test_a_replica_that_diverges_is_left_and_the_others_go_on(
    model: Model, kernels: str, even: float, few: Resident
) -> None:
    """Through every engine: the others have the bits they have without it."""
    recipe, m = replace(ADAM, steps=2, eval_every=1, batch_size=2), model.params.mask_size
    found: dict[bool, list[Job]] = {}
    for blown in (True, False):
        jobs = []
        for seed in range(3):
            weights, mask = init_weights(model, stream(seed, "reinit", 4, "init")), model.params.full_mask()
            mask &= weights[:m].abs() > weights[:m].abs().median()
            weights[:m] *= mask * (1e25 if seed == 1 else 1.0)
            if seed != 1 or blown:
                jobs.append(Job(Cell(seed, "reinit", 4, 2), State.start(weights[None], recipe), mask))
        heard: list[int] = []

        def told(some: Sequence[Job], heard: list[int] = heard) -> None:
            heard += [job.who.seed for job in some]

        share = {s.name: even for s in model.weights}
        fit(model, few, jobs, recipe, kernels=kernels, break_even=share, on_evaluation=told)
        assert sorted(heard) == [0, 0, 2, 2]
        assert all(is_done(job, recipe) for job in jobs)
        found[blown] = jobs
    first, bad, last = found[True]
    assert first.diverged is last.diverged is None
    assert bad.diverged is not None
    assert bad.diverged.startswith("training diverged before step 1 (validation loss ")
    assert bad.diverged.endswith("; use a smaller `lr`")
    assert bad.state.step == 1
    assert not bad.state.evaluations
    for ours, theirs in zip((first, last), found[False], strict=True):
        assert torch.equal(ours.state.weights, theirs.state.weights)
        assert torch.equal(ours.state.best_weights, theirs.state.best_weights)
        assert ours.state.evaluations == theirs.state.evaluations
        assert len(ours.state.evaluations) == 2
