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


def test_the_states_of_a_batch_are_rows_of_its_tensors(digits: Resident) -> None:
    jobs = [job(*who) for who in ((2, 0), (1, 3), (1, 0), (2, 0), (0, 3))]
    before = {id(one): [t.clone() for t in tensors(one.state)] for one in jobs}
    batch = Batch(LENET, digits, jobs, ADAM, choose("auto", "cpu"))
    assert [(one.start_step, one.who.seed) for one in batch.jobs] == [(0, 1), (0, 2), (0, 2), (3, 0), (3, 1)]
    assert batch.who == [one.who for one in batch.jobs]
    assert torch.equal(batch.mask, torch.stack([one.mask for one in batch.jobs]))
    for one in jobs:
        assert all(map(torch.equal, tensors(one.state), before[id(one)]))
    for t in (batch.weights, *batch.moments):
        t += torch.arange(5.0)[:, None] + 1
    for r, one in enumerate(batch.jobs):
        weights, best, *moments = before[id(one)]
        assert torch.equal(one.state.weights, weights + (r + 1))
        assert torch.equal(one.state.best_weights, best)
        assert all(
            torch.equal(now, old + (r + 1)) for now, old in zip(one.state.moments, moments, strict=True)
        )


def test_a_mean_counts_images_not_batches() -> None:
    class Known:
        def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            n = x.shape[2]
            return torch.tensor([n * 2.0, 3.0], dtype=torch.float64), torch.tensor(
                [1.0, n], dtype=torch.float64
            )

    chunks = [(torch.zeros(1, 4, n), torch.zeros(1, 1, n, dtype=torch.int64)) for n in (5, 5, 2)]
    assert measure(Known(), chunks) == ([2.0, 9 / 12], [3 / 12, 1.0])
