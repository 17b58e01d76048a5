"""Networks that several workers train, each on its share of every batch, beside one process and float64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modules import KINDS, SGD, job, model_of, module_model, samples
from teams import together
from torch import Tensor, nn

from sparselth.check import check
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Batches, Resident
from sparselth.engine.autograd import AutogradNetwork, mean_loss
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.engine.team import Parted, Team
from sparselth.errors import SparselthError
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Linear, Model, Node, ReLU
from sparselth.models.torch import network
from sparselth.streams import number, stream
from sparselth.train import accuracies_on_test, fit

pytestmark = [pytest.mark.host, pytest.mark.forks]

WHO = Cell(3, "reinit", 2)


@given(batch=st.integers(1, 300), size=st.integers(1, 17))
def test_shares_are_the_batch_in_even_parts(batch: int, size: int) -> None:
    names = tuple(map(str, range(size)))
    shares = [Team(names, rank).share(batch) for rank in range(size)]
    assert [i for share in shares for i in range(batch)[share]] == [*range(batch)]
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_the_first_has_the_word_and_sums_are_the_same_on_all() -> None:
    def work(team: Team) -> Any:
        own = torch.full((3,), float(team.rank + 1))
        mask, rows = torch.tensor([team.leads, not team.leads]), team.rows(own)
        team.follow(mask)
        team.add(own)
        words = [team.agree(wish) for wish in (team.leads, not team.leads)]
        return own.tolist(), rows.tolist(), mask.tolist(), words

    found = together(work, 3)
    assert found == [([6.0] * 3, [[1.0] * 3, [2.0] * 3, [3.0] * 3], [True, False], [True, False])] * 3


def test_one_bit_that_is_another_is_found_and_named() -> None:
    def work(team: Team) -> None:
        mask, weights = torch.ones(100, dtype=torch.bool), torch.zeros(100)
        team.check(WHO, "mask", [mask])
        team.check(WHO, "weights", [mask, weights])
        weights[7] = -0.0 if team.rank == 1 else 0.0
        team.check(WHO, "weights", [mask, weights])

    for error in together(work):
        assert isinstance(error, SparselthError)
        said = "seed 3 reinit level 2: the weights of worker 1 came out other than the weights of worker 0; "
        assert str(error).startswith(said)


def test_who_is_left_says_so_at_once() -> None:
    def work(team: Team) -> None:
        if team.leads:
            team.add(torch.zeros(5))

    error, gone = together(work)
    assert isinstance(error, Parted)
    assert str(error).startswith("worker 0 has lost the others of its team")
    assert gone is None


def test_shares_of_a_loss_add_up_to_it_whatever_is_left_out_of_them() -> None:
    draw = torch.Generator().manual_seed(0)
    output = torch.randn(7, 5, 11, generator=draw, dtype=torch.float64)
    target = torch.randint(11, (7, 5), generator=draw)
    target[:3, 1:] = -100  # most of the first share, and all of its first samples
    target[:2] = -100
    words = model_of(KINDS["words"])
    own = module_model(nn.Identity, (5,), loss=lambda x, y: (x.mean((1, 2)) * y[:, 0]).mean())
    for model in (words, own):
        whole = mean_loss(model, output, target)
        parts = [mean_loss(model, output[s], target[s], target) for s in (slice(0, 2), slice(2, 7))]
        assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


RESIDUAL = Model(
    "residual",
    (1, 28, 28),
    (
        *(Conv(4, 3, 1, 2), BatchNorm(), ReLU(), Conv(4, 3, 1), BatchNorm()),
        *(Node(Add(), (4, 2)), ReLU(), AvgPool(), Linear(10)),
    ),
    {},
    "",
)
MLP = Model("mlp", (1, 28, 28), (Linear(12), BatchNorm(), ReLU(), Linear(10)), {}, "")
ODD = replace(SGD, batch_size=61, steps=4, eval_every=2)


def half(model: Model, recipe: Recipe, team: Team | None = None) -> Job:
    """A job under a mask of about half the weights."""
    weights = init_weights(model, stream(0, "ticket", 0, "init"))
    mask = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(1)) < 0.5
    weights[: len(mask)] *= mask
    return Job(Cell(0, "ticket", 1), State.start(weights[None], recipe), mask, team=team)


def of_float64(model: Model, data: Resident, one: Job, recipe: Recipe) -> Tensor:
    """The weights [P] behind plain steps of torch in float64 on whole batches."""
    net, mask = network(model, one.state.weights[0]).double(), one.mask
    optimizer = torch.optim.SGD(
        net.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    of = dict(zip((spec.name for spec in model.weights), spans(net), strict=True))
    batches = Batches(data, [one.who], recipe.batch_size)
    for step in range(recipe.steps):
        x, y = batches.first(step)
        optimizer.zero_grad()
        F.cross_entropy(net(x[0].double()), y[0]).backward()  # type: ignore[no-untyped-call]
        for spec in model.weights:
            grad = of[spec.name].grad
            assert grad is not None
            grad *= mask[spec.span].view(grad.shape)
        optimizer.step()
    return torch.cat([t.detach().flatten() for t in net.state_dict().values() if t.is_floating_point()])


def spans(net: nn.Module) -> list[nn.Parameter]:
    """The weights of products, in their order."""
    return [one.weight for one in net.modules() if isinstance(one, nn.Linear | nn.Conv2d)]


def flat(model: Model, weights: Tensor) -> Tensor:
    """Weights [P] in the order of a module's state."""
    net = network(model, weights)
    return torch.cat([t.flatten() for t in net.state_dict().values() if t.is_floating_point()])


@pytest.mark.parametrize("model", [RESIDUAL, MLP], ids=lambda model: model.name)
def test_a_split_network_is_as_near_to_float64_as_one_worker_s(model: Model, digits: Resident) -> None:
    """Odd batches and batch norms: gradients, running statistics, evaluations.

    Sums of shares round otherwise than those of whole batches, and no worse: what is allowed is three times
    the error of one worker, about 2e-6. The mean of two shares of 30 and 31 is 5e-4 off or more; with
    statistics of shares the workers no longer agree.
    """

    def work(team: Team) -> Any:
        one = half(model, ODD, team)
        fit(model, digits, [one], ODD, kernels="autograd")
        tests = accuracies_on_test(model, digits, [one], "autograd")
        state = one.state
        return state.weights, state.moments, state.best_weights, state.evaluations, tests

    (weights, *rest), others = together(work)
    for mine, theirs in zip((weights, *rest[0], rest[1]), (others[0], *others[1], others[2]), strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
    assert rest[2:] == [*others[3:]]
    alone, start = half(model, ODD), half(model, ODD)
    fit(model, digits, [alone], ODD, kernels="autograd")
    right, first = of_float64(model, digits, start, ODD), flat(model, start.state.weights[0])
    moved, own = (flat(model, w[0]) - first for w in (weights, alone.state.weights))
    found = check(moved, right - first, "fp32", terms=4 * 61, own=own)
    assert found.fault is None
    assert not weights[0, : len(alone.mask)][~alone.mask].any()
    for mine, one in zip(rest[2], alone.state.evaluations, strict=True):
        assert mine["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
        assert mine["validation_accuracy"] == pytest.approx(one["validation_accuracy"], abs=2 / 250)


def test_evaluations_of_a_team_look_at_every_sample_once() -> None:
    """Chunks that do not divide, and a chunk for one of two."""
    kind = KINDS["averages"]
    model, data = model_of(kind), samples(kind)
    one = job(model, kind.recipe)
    chunks = data.test_first()
    assert len(chunks) == 3

    def measured(team: Team | None, some: Any) -> Any:
        return AutogradNetwork(model, one.who, one.state.weights).measure(some, team=team)

    for some in (chunks, chunks[:1]):
        alone = measured(None, some)
        first, other = together(lambda team, some=some: measured(team, some))
        assert first == other
        assert first[0] == pytest.approx(alone[0], rel=1e-12)
        assert first[1] == pytest.approx(alone[1], rel=1e-12)


class Norms(nn.Module):
    """Batch norms without a scale, without statistics, averaging over all batches, on [B, C, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 9)
        self.bare = nn.BatchNorm1d(9, affine=False)
        self.blind = nn.BatchNorm1d(9, track_running_stats=False)
        self.average, self.rows = nn.BatchNorm1d(9, momentum=None), nn.BatchNorm1d(3)
        self.two = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.blind(self.bare(100 + self.one(x))))
        return self.two(self.rows(x.unflatten(1, (3, 3))).flatten(1).tanh())


def test_batch_norms_of_a_module_see_the_whole_batch() -> None:
    """Also where a mean of 100 would drown a variance that is taken from squares."""
    kind = replace(KINDS["averages"], make=Norms)
    model, data, recipe = model_of(kind), samples(kind), replace(SGD, steps=3)
    data.chunk = 20  # `blind` evaluates by its chunk, too, and of one sample nothing

    def trained(team: Team | None) -> Job:
        one = replace(job(model, recipe), team=team)
        fit(model, data, [one], recipe)
        return one

    alone, first = trained(None), job(model, recipe).state.weights
    weights = together(lambda team: trained(team).state.weights)
    assert torch.equal(*weights)
    found = check(weights[0] - first, (alone.state.weights - first).double(), "fp32", largest=1e-4)
    assert found.largest < 1e-4, found
    net = network(model, weights[0][0])
    assert int(net.average.num_batches_tracked) == 3  # type: ignore[union-attr,arg-type]


def test_what_workers_draw_is_drawn_apart() -> None:
    """As dropout does: two shares are not given the same; who leads draws what one worker would."""
    kind = KINDS["convolutions"]
    model, data = model_of(kind), samples(kind)

    def work(team: Team) -> Any:
        seeds, dropout = list[int](), F.dropout

        def telling(x: Tensor, *more: Any) -> Tensor:
            seeds.extend([torch.initial_seed()] * bool(more[-1]))  # where it trains
            return dropout(x, *more)

        F.dropout = telling  # type: ignore[assignment]
        one = replace(job(model, kind.recipe), team=team)
        fit(model, data, [one], replace(kind.recipe, steps=1))
        return seeds[0], one.state.weights

    (first, weights), (second, same) = together(work)
    assert first == number(0, "ticket", 1, "step/0")
    assert second == number(0, "ticket", 1, "step/0/worker/1")
    assert torch.equal(weights, same)


def test_stops_and_pauses_come_to_all_at_one_step() -> None:
    """Though one clock says so and the others do not; what goes on comes to the same bits."""
    kind = KINDS["convolutions"]
    model, data = model_of(kind), samples(kind)

    def work(team: Team) -> Any:
        straight = replace(job(model, kind.recipe), team=team)
        fit(model, data, [straight], kind.recipe)
        one, left, stands = replace(job(model, kind.recipe), team=team), [2 if team.leads else 1], list[int]()

        def stop() -> bool:
            left[0] -= 1
            return team.agree(left[0] < 0)

        fit(model, data, [one], kind.recipe, should_stop=stop)
        stands.append(one.state.step)
        again = replace(one, state=deepcopy(one.state))
        fit(model, data, [again], kind.recipe)
        return stands, torch.equal(again.state.weights, straight.state.weights)

    assert together(work) == [([2], True)] * 2
