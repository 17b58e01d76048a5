"""A state goes into its layout and back; a batch's tensors are its states' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.layout import Layout
from sparselth.engine.paths import choose
from sparselth.engine.state import Batch, Job, State, measure
from sparselth.frozen import METHODS, effective
from sparselth.models import get_model
from sparselth.streams import stream

LENET = get_model("lenet-300-100")
ADAM = Recipe(steps=6, lr=1.2e-3, batch_size=7, eval_every=3)


def job(seed: int, start: int = 0, keep: float = 0.05) -> Job:
    weights = init_weights(LENET, stream(seed, "ticket", 0, "init"))
    chance = torch.rand(LENET.params.mask_size, generator=torch.Generator().manual_seed(seed))
    mask = LENET.params.full_mask() & (chance < keep)
    weights[: len(mask)] *= mask
    return Job(Cell(seed, "ticket", 1), State.start(weights[None], ADAM, start), mask, start)


def tensors(state: State) -> list[Tensor]:
    kept = [] if state.kept_weights is None else [state.kept_weights]
    return [state.weights, state.best_weights, *state.moments, *kept]


@pytest.mark.parametrize(("optimizer", "moments"), [("adam", 2), ("sgd", 1)])
def test_a_state_starts_fresh_and_on_its_own(optimizer: str, moments: int) -> None:
    weights = torch.ones(1, 4)
    state = State.start(weights, Recipe(steps=9, lr=1.0, optimizer=optimizer), 7)  # type: ignore[arg-type]
    assert State.start(weights, Recipe(steps=9, lr=1.0)).step == 0
    weights += 1
    assert (state.step, state.best_step, state.best_loss) == (7, 7, float("inf"))
    assert [moment.tolist() for moment in state.moments] == [[[0.0] * 4]] * moments
    for t in (state.weights, state.best_weights):
        assert t.tolist() == [[1.0] * 4]
    state.weights += 1
    assert state.best_weights.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("keeps", [False, True])
def test_a_state_leaves_a_layout_as_it_entered(keeps: bool) -> None:
    one = job(0)
    state, trained = one.state, torch.zeros(LENET.params.size, dtype=torch.bool)
    if keeps:
        state.kept_weights = state.weights.clone()
    layout = Layout(LENET, one.mask, frozenset(spec.name for spec in LENET.weights))
    for spec in LENET.weights:
        trained[spec.span] = layout.trained(spec).flatten()
    for moment in state.moments:  # of what is left out they are 0
        moment[0] = torch.randn(len(trained)) * trained
    before = [t.clone() for t in tensors(state)]
    state.enter(layout)
    assert {t.shape[1] for t in tensors(state)} == {layout.size}
    for found, expected in zip(tensors(state.expanded()), before, strict=True):
        assert torch.equal(found, expected)
    assert state.layout is layout
    state.leave()
    assert state.layout is None
    assert all(map(torch.equal, tensors(state), before))


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_states_of_a_batch_are_rows_of_its_tensors(jobs: int, digits: Resident) -> None:
    every = [job(*who) for who in ((2, 0), (1, 3), (1, 0), (2, 0), (0, 3))]
    some = every[:jobs]
    before = {id(one): [t.clone() for t in tensors(one.state)] for one in some}
    batch = Batch(LENET, digits, some, ADAM, choose("auto", "cpu"))
    starts = [(one.start_step, one.who.seed) for one in some]
    assert [(one.start_step, one.who.seed) for one in batch.jobs] == sorted(starts)
    assert batch.who == [one.who for one in batch.jobs]
    assert torch.equal(batch.mask, torch.stack([one.mask for one in batch.jobs]))
    for one in some:
        assert all(map(torch.equal, tensors(one.state), before[id(one)]))
    for t in (batch.weights, *batch.moments):
        t += torch.arange(float(jobs))[:, None] + 1
    for r, one in enumerate(batch.jobs):
        weights, best, *moments = before[id(one)]
        assert torch.equal(one.state.weights, weights + (r + 1))
        assert torch.equal(one.state.best_weights, best)
        assert all(
            torch.equal(now, old + (r + 1)) for now, old in zip(one.state.moments, moments, strict=True)
        )


def test_what_a_batch_holds(digits: Resident) -> None:
    jobs = [job(0), job(1)]
    jobs[0].state.kept_weights = jobs[0].state.weights.clone()
    batch = Batch(LENET, digits, jobs, ADAM, choose("auto", "cpu"))
    held = batch.held("gradients", "images")
    assert held.weights is batch.weights
    assert held.moments is batch.moments
    assert (held.gradients, held.layout, held.images) == ("gradients", [None, None], (digits, "images"))
    (first, second), masks = held.kept  # type: ignore[misc]
    assert first[0] is jobs[0].state.best_weights
    assert first[1] is jobs[0].state.kept_weights
    assert second[0] is jobs[1].state.best_weights
    assert second[1] is None
    assert [mask is one.mask for mask, one in zip(masks, jobs, strict=True)] == [True, True]


def test_a_mean_counts_images_not_batches() -> None:
    class Known:
        def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            n = x.shape[2]
            assert y.shape == (1, 1, n)
            return torch.tensor([n * 2.0, 3.0], dtype=torch.float64), torch.tensor(
                [1.0, n], dtype=torch.float64
            )

    chunks = [(torch.zeros(1, 4, n), torch.zeros(1, 1, n, dtype=torch.int64)) for n in (5, 4, 3)]
    assert measure(Known(), chunks) == ([2.0, 9 / 12], [3 / 12, 1.0])


def test_generations_are_kept_with_the_scores_that_were_best() -> None:
    draws = torch.arange(4, dtype=torch.int32)[None]
    state = State.start(torch.ones(1, 4), ADAM, 2, draws)
    draws += 5
    assert state.generations is not None
    assert state.best_generations is not None
    for found in (state.generations, state.best_generations):
        assert found.tolist() == [[0, 1, 2, 3]]
    assert state.generations is not state.best_generations
    assert state.is_best
    state.generations += 1
    assert not state.is_best
    assert state.best_generations.tolist() == [[0, 1, 2, 3]]
    state.weights += 1
    state.step = 3
    best = state.best_weights
    state.keep_best(0.25)
    assert (state.best_loss, state.best_step) == (0.25, 3)
    assert state.best_weights is best  # a row of a batch's tensor stays one
    assert state.best_weights.tolist() == [[2.0] * 4]
    assert state.best_generations.tolist() == [[1, 2, 3, 4]]
    assert state.is_best
    state.weights += 1
    assert not state.is_best
    plain = State.start(torch.ones(1, 4), ADAM)
    assert (plain.generations, plain.best_generations, plain.is_best) == (None, None, True)
    plain.weights += 1
    assert not plain.is_best
    plain.keep_best(0.5)
    assert plain.is_best
    plain.best_generations = draws
    assert not plain.is_best


@pytest.mark.parametrize("name", ["iterand", "edge-popup"])
def test_a_job_s_network_is_what_its_scores_make_of_frozen_weights(name: str) -> None:
    method, params = METHODS[name], LENET.params
    frozen = method.frozen(3, law="normal")
    scores = method.start(frozen, params, torch.Generator().manual_seed(1))
    draws = torch.zeros(1, params.mask_size, dtype=torch.int32) if method.has_generations else None
    state = State.start(scores[None], ADAM, 0, draws)
    own = Job(Cell(0, "ticket", 0), state, params.full_mask(), frozen=frozen)
    first = effective(frozen, params, scores, None if draws is None else draws[0])
    state.weights = state.weights.flip(1)
    now = draws
    if state.generations is not None:
        now = state.generations = state.generations + 1
    expected = effective(frozen, params, scores.flip(0), None if now is None else now[0])
    assert torch.equal(own.network(LENET), expected[None])
    assert torch.equal(own.network(LENET, best=True), first[None])
    assert not torch.equal(first, expected)
    trained = Job(Cell(0, "ticket", 0), state, params.full_mask())
    assert trained.network(LENET) is state.weights
    assert trained.network(LENET, best=True) is state.best_weights


def test_a_state_that_parts_from_a_batch_has_tensors_of_its_own(digits: Resident) -> None:
    jobs = [job(0), job(1)]
    batch = Batch(LENET, digits, jobs, ADAM, choose("reference", "cpu"))
    state = batch.jobs[1].state
    before = [t.clone() for t in tensors(state)]
    state.part()
    for t in (batch.weights, *batch.moments):
        t += 1
    batch.jobs[0].state.best_weights += 1
    assert all(map(torch.equal, tensors(state), before))
    for found in tensors(state):
        assert found.untyped_storage().nbytes() == 4 * LENET.params.size  # the batch can be let go
