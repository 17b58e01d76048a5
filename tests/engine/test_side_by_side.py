"""Replicas of a module side by side: as near to float64 as alone, whoever is beside; or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import ADAM, KINDS, SGD, Averages, Kind, job, model_of, module_model, samples
from torch import Tensor, nn

from sparselth.check import check
from sparselth.config import Recipe
from sparselth.data.batches import Batches, Resident
from sparselth.engine.choose import prepare
from sparselth.engine.side_by_side import COMPILED, DRAWS, SHARED, SideBySideSteps, refusal
from sparselth.engine.state import Job
from sparselth.errors import SparselthError
from sparselth.models.module import ModuleModel
from sparselth.models.torch import network
from sparselth.train import fit


class Images(nn.Module):
    """Convolutions, grouped ones among them, and batch norms; a parameter that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.head = nn.Conv2d(8, 12, 1, groups=4), nn.Linear(12 * 9, 4)
        self.scale = nn.Parameter(torch.rand(12, 1, 1) + 0.5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.head((self.scale * F.relu(self.grouped(x))).flatten(1))


class Text(nn.Module):
    """Tied weights, attention under a mask that no state saves, and a count, a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("hidden", torch.full((5, 5), -torch.inf).triu(1), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 2**40  # beyond what floats hold
        h = self.embed(x)
        return self.head(self.norm(h + self.attend(h, h, h, attn_mask=self.hidden, need_weights=False)[0]))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


TAKEN = {
    "images": Kind(Images, (3, 6, 6), 4, recipe=SGD),
    "text": Kind(Text, (5,), 11, tokens=True, recipe=SGD),
    "mlp": Kind(mlp, (6,), 3, recipe=ADAM),
}
MAKERS = [(0.5, 0), (1.0, 1), (0.2, 1), (0.7, 2)]


def in_float64(model: ModuleModel, data: Resident, one: Job, recipe: Recipe) -> Tensor:
    """Weights [P] behind all steps of a job, by torch's own layers and optimizers in float64."""
    net = network(model, one.state.weights[0].clone(), one.who.seed).double()
    named = dict(net.named_parameters())
    batches = Batches(data, [one.who], recipe.batch_size)
    optimizer = (
        torch.optim.Adam(net.parameters(), recipe.lr)
        if recipe.optimizer == "adam"
        else torch.optim.SGD(net.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    )
    for step in range(one.state.step, recipe.steps):
        x, y = batches.first(step)
        optimizer.zero_grad()
        output = net(x[0].double() if x.is_floating_point() else x[0])
        loss = F.cross_entropy(output.flatten(0, -2), y[0].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        for spec in model.params.weights:
            grad = named[spec.name].grad
            assert grad is not None
            grad *= one.mask[spec.span].view(spec.shape)
        optimizer.step()
        with torch.no_grad():
            for spec in model.params.weights:
                named[spec.name].mul_(one.mask[spec.span].view(spec.shape))
    found = torch.zeros(model.params.size, dtype=torch.float64)
    for name, tensor in {**named, **dict(net.named_buffers())}.items():
        for spec in model.params.all:
            if spec.name == name and tensor.is_floating_point():
                found[spec.span] = tensor.detach().flatten()
    return found


@pytest.mark.parametrize("name", TAKEN)
def test_side_by_side_is_as_near_to_float64_as_alone_whoever_is_beside(name: str) -> None:
    kind = TAKEN[name]
    model, data = model_of(kind), samples(kind)
    right = [in_float64(model, data, job(model, kind.recipe, *maker), kind.recipe) for maker in MAKERS]
    alone = [job(model, kind.recipe, *maker) for maker in MAKERS]
    for one in alone:
        fit(model, data, [one], kind.recipe)
    for beside in ([0, 1, 2, 3], [3, 1], [2, 0, 1]):
        together = {i: job(model, kind.recipe, *MAKERS[i]) for i in beside}
        fit(model, data, [*together.values()], kind.recipe)
        for i, one in together.items():
            for spec in model.params.weights + model.params.trained + model.params.statistics:
                if spec.name == "calls":
                    assert torch.equal(*(each.state.weights[0, spec.span] for each in (one, alone[i])))
                    continue
                found, own = (each.state.weights[0, spec.span] for each in (one, alone[i]))
                # what is computed six times from what was rounded six times; keys have no use for their bias
                bound = check(found, right[i][spec.span], "fp32", terms=36 * 64, own=own)
                assert not bound.fault, (beside, i, spec.name, bound.fault)
            assert not one.state.weights[0, : len(one.mask)][~one.mask].any()
            pairs = zip(one.state.evaluations, alone[i].state.evaluations, strict=True)
            for mine, its in pairs:
                assert mine["validation_loss"] == pytest.approx(its["validation_loss"], rel=1e-5)
                assert mine["validation_accuracy"] == pytest.approx(its["validation_accuracy"], abs=0.26)


@pytest.mark.parametrize("name", TAKEN)
def test_they_go_on_to_the_same_bits_wherever_they_were_stopped(name: str) -> None:
    kind = TAKEN[name]
    model, data = model_of(kind), samples(kind)
    straight, stopped = ([job(model, kind.recipe, *maker) for maker in MAKERS] for _ in range(2))
    fit(model, data, straight, kind.recipe)
    for stop in (1, 3):
        left = stop

        def should_stop() -> bool:
            nonlocal left
            left -= 1
            return left < 0

        fit(model, data, stopped, kind.recipe, should_stop=should_stop)
        again = [Job(one.who, replace(one.state), one.mask) for one in stopped]
        for one in again:
            one.state.part()
        stopped = again
    assert all(0 < one.state.step < 6 for one in stopped)
    fit(model, data, stopped, kind.recipe)
    for one, other in zip(stopped, straight, strict=True):
        assert torch.equal(one.state.weights, other.state.weights)
        assert one.state.evaluations == other.state.evaluations


def test_several_take_one_forward_and_one_that_is_left_is_one_alone() -> None:
    kind = TAKEN["mlp"]
    model, data = model_of(kind), samples(kind)
    steps = prepare(model, data, [job(model, ADAM, 1.0, seed) for seed in range(3)], ADAM)
    assert isinstance(steps, SideBySideSteps)
    behind = job(model, ADAM, 0.5, 1)
    alone = job(model, ADAM, 0.5, 1)
    ahead = job(model, ADAM, 1.0, 0)
    fit(model, data, [ahead], replace(ADAM, steps=3))  # so that the others catch up by themselves
    fit(model, data, [behind, ahead], replace(ADAM, steps=3))
    fit(model, data, [alone], replace(ADAM, steps=3))
    assert torch.equal(behind.state.weights, alone.state.weights)
    late = job(model, ADAM, 0.5, 2)  # a ticket that is rewound to step 3
    late.state.step = late.start_step = 3
    fit(model, data, [behind, late], ADAM)
    own = job(model, ADAM, 0.5, 2)
    own.state.step = own.start_step = 3
    fit(model, data, [own], ADAM)
    assert torch.allclose(late.state.weights, own.state.weights, rtol=1e-5, atol=1e-6)


def test_loss_and_accuracy_of_a_users_own() -> None:
    kind = TAKEN["mlp"]
    data = samples(kind)
    data.labels = data.labels.float()
    model = module_model(
        mlp,
        kind.shape,
        loss=lambda output, target: (output[:, 0] - target).square().mean(),
        accuracy=lambda output, target: ((output[:, 0] - target).abs() < 0.5).float().mean(),
    )
    alone, together = ([job(model, ADAM, 0.5, seed) for seed in (0, 1)] for _ in range(2))
    for one in alone:
        fit(model, data, [one], ADAM)
    fit(model, data, together, ADAM)
    assert isinstance(prepare(model, data, together, replace(ADAM, steps=12)), SideBySideSteps)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.state.weights, other.state.weights, rtol=1e-5, atol=1e-6)
        for mine, its in zip(one.state.evaluations, other.state.evaluations, strict=True):
            assert mine["validation_loss"] == pytest.approx(its["validation_loss"], rel=1e-5)


class Counts(nn.Module):
    """Remembers in Python how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.times = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return self.inner(x) if self.times % 2 else -self.inner(x)


class Fixed(nn.Module):
    """What is drawn with the weights, and is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.signs = mlp(), torch.randn(6).sign()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.signs * x)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if float(x.detach().sum()) > 0 else -x)


def compiled() -> nn.Module:
    net = mlp()
    net.compile(backend="eager")
    return net


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * float(np.random.rand()))


class CountsWithin(nn.Module):
    """In a list of a dict, which stays the same object."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kept = mlp(), {"times": [0], "name": "one"}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["times"][0] += 1  # type: ignore[index]
        return self.inner(x * (1 + self.kept["times"][0] % 7))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), DRAWS),
        (Noise, SHARED),
        (Counts, "it keeps times from one call to the next"),
        (CountsWithin, "it keeps kept from one call to the next"),
        (Fixed, "its signs, which is neither parameter nor buffer, differs from seed to seed"),
        (Branches, "vmap"),
        (Averages, "vmap"),
        (compiled, COMPILED),
        (lambda: torch.compile(mlp(), backend="eager"), COMPILED),
    ],
    ids=["dropout", "numpy", "counts", "within", "fixed", "branches", "averages", "compiled", "wrapped"],
)
def test_what_cannot_be_side_by_side_is_told_and_trains_one_by_one(
    make: Callable[[], nn.Module], why: str
) -> None:
    kind = Kind(make, (6,), 3)
    model, data = model_of(kind), samples(kind)
    assert why in refusal(model, data.labels[:2], (0, 1))
    alone, together = ([job(model, ADAM, 0.5, seed) for seed in (0, 1)] for _ in range(2))
    for one in alone:
        fit(model, data, [one], ADAM)
    fit(model, data, together, ADAM)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.state.weights, other.state.weights)


def test_what_differs_from_seed_to_seed_is_the_same_within_one() -> None:
    kind = Kind(Fixed, (6,), 3)
    model, data = model_of(kind), samples(kind)
    assert not refusal(model, data.labels[:2], (1, 1))
    for name in KINDS:
        assert refusal(model_of(KINDS[name]), samples(KINDS[name]).labels[:2], (0,)), name


def test_draws_that_begin_later_are_an_error_not_a_shared_number() -> None:
    calls: list[int] = []  # no attribute of the network's, where it would be found

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            calls.append(0)
            return self.inner(x * (float(np.random.rand()) if len(calls) > 9 else 1.0))

    kind = Kind(Late, (6,), 3)
    model, data = model_of(kind), samples(kind)
    jobs = [job(model, ADAM, 0.5, seed) for seed in (0, 0)]
    recipe = replace(ADAM, steps=12, eval_every=12)
    calls.clear()
    with pytest.raises(SparselthError, match="use `replicas` 1"):
        fit(model, data, jobs, recipe)
