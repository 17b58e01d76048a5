"""The autograd engine: any module, and graphs on request; the same bits alone, resumed, in a user's file."""

from __future__ import annotations

import random
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import ADAM, KINDS, SGD, Kind, job, model_of, module_model, samples
from torch import Tensor, nn

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Batches, Resident
from sparselth.engine.autograd import AutogradNetwork, AutogradSteps, sums
from sparselth.engine.choose import prepare
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.errors import SparselthError, UsageError
from sparselth.kernels._triton import INTERPRET
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, Node, ReLU
from sparselth.models.torch import network
from sparselth.streams import number, stream
from sparselth.train import accuracies_on_test, fit

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
CHAIN = Model("chain", (1, 28, 28), (Conv(3, 5), MaxPool(), ReLU(), Linear(12), ReLU(), Linear(10)), {}, "")
MLP = Model("mlp", (1, 28, 28), (Linear(12), BatchNorm(), ReLU(), Linear(10)), {}, "")
GRAPHS = {"residual": RESIDUAL, "chain": CHAIN, "mlp": MLP}


def state_of(one: Job) -> list[Tensor]:
    state = one.state
    return [state.weights, state.best_weights, *state.moments]


def same(one: Job, other: Job) -> bool:
    pairs = zip(state_of(one), state_of(other), strict=True)
    equal = all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
    return equal and one.state.evaluations == other.state.evaluations


@pytest.mark.parametrize("name", KINDS)
def test_training_goes_on_to_the_same_bits_wherever_it_was_stopped(name: str) -> None:
    kind = KINDS[name]
    model, data = model_of(kind), samples(kind)
    straight = job(model, kind.recipe, 0.5)
    fit(model, data, [straight], kind.recipe)
    assert straight.diverged is None
    assert straight.state.step == 6
    for stop in (1, 2, 4):
        stopped, left = job(model, kind.recipe, 0.5), stop

        def should_stop() -> bool:
            nonlocal left
            left -= 1
            return left < 0

        fit(model, data, [stopped], kind.recipe, should_stop=should_stop)
        assert 0 < stopped.state.step < 6
        torch.manual_seed(stop)  # another process stands elsewhere
        np.random.seed(stop)
        again = Job(stopped.who, replace(stopped.state), stopped.mask)
        again.state.part()
        fit(model, data, [again], kind.recipe)
        assert same(again, straight)


@pytest.mark.parametrize("name", KINDS)
def test_a_job_is_the_same_whoever_trains_beside_it(name: str) -> None:
    kind = KINDS[name]
    model, data = model_of(kind), samples(kind)
    makers = [(0.5, 0), (1.0, 1), (0.2, 2)]
    alone = [job(model, kind.recipe, *maker) for maker in makers]
    for one in alone:
        fit(model, data, [one], kind.recipe)
    together = [job(model, kind.recipe, *maker) for maker in makers]
    fit(model, data, together[::-1], kind.recipe)
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert not torch.equal(alone[0].state.weights, alone[1].state.weights)
    singly = [accuracies_on_test(model, data, [one])[0] for one in alone]
    assert accuracies_on_test(model, data, together) == singly


interpreted = pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")


@pytest.mark.parametrize("kernels", ["auto", "torch", "reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("name", KINDS)
def test_pruned_weights_and_their_moments_stay_exactly_zero(name: str, kernels: str) -> None:
    kind = KINDS[name]
    model = model_of(kind)
    one = job(model, kind.recipe, 0.3)
    before = one.state.weights.clone()
    fit(model, samples(kind), [one], kind.recipe, kernels=kernels)
    gone = ~one.mask
    for tensor in state_of(one):
        assert not tensor[:, : len(gone)][:, gone].any()
    moved = [s.name for s in model.params.weights + model.params.trained if changed(before, one, s.span)]
    assert (
        len(moved) >= len(model.params.weights + model.params.trained) - 1
    )  # keys have no use for their bias


def changed(before: Tensor, one: Job, span: slice) -> bool:
    return not torch.equal(before[:, span], one.state.weights[:, span])


def test_what_is_drawn_in_a_step_is_the_cell_and_step_alone() -> None:
    """Plain torch, seeded by hand at each step, comes to the same weights."""
    kind = KINDS["convolutions"]
    model, data, recipe = model_of(kind), samples(kind), replace(SGD, weight_decay=0.0, momentum=0.0)
    one = job(model, recipe, 1.0, seed=3)
    net = model.build(3)
    fit(model, data, [one], recipe)
    optimizer, batches = torch.optim.SGD(net.parameters(), recipe.lr), Batches(data, [one.who], 7)
    for step in range(6):
        torch.manual_seed(number(3, "ticket", 1, f"step/{step}"))
        x, y = batches.first(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[0].contiguous(memory_format=torch.channels_last)), y[0])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.allclose(model.params.gather(net), one.state.weights, rtol=1e-5, atol=1e-6)


def test_the_draws_of_others_are_left_alone() -> None:
    kind = KINDS["averages"]
    model, data = model_of(kind), samples(kind)

    def after(trains: bool) -> tuple[Any, ...]:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if trains:
            fit(model, data, [job(model, kind.recipe)], kind.recipe)
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    assert after(trains=True) == after(trains=False)


def test_whole_numbers_and_replaced_buffers_are_kept_and_infinite_ones_do_not_diverge() -> None:
    kind = KINDS["words"]
    model = model_of(kind)
    one = job(model, kind.recipe)
    fit(model, samples(kind), [one], kind.recipe)
    net = network(model, one.state.weights[0])
    assert int(net.calls) == 6 * 2**40  # type: ignore[arg-type]
    assert one.diverged is None
    assert net.head.weight is net.embed.weight  # type: ignore[union-attr]


def test_evaluations_take_running_statistics_and_move_none() -> None:
    kind = KINDS["convolutions"]
    model, data = model_of(kind), samples(kind)
    one = job(model, kind.recipe)
    steps = prepare(model, data, [one], kind.recipe)
    steps.advance(0, 3, lambda: False)
    before = one.state.weights.clone()
    found = steps.measure()
    assert found == steps.measure()
    assert torch.equal(before, one.state.weights)
    net = network(model, before[0]).eval()
    chunks = data.validation_first(0)
    with torch.no_grad():
        hits = sum(int((net(x).argmax(1) == y).sum()) for x, y in chunks)
        losses = sum(float(F.cross_entropy(net(x), y, reduction="sum")) for x, y in chunks)
    total = sum(len(y) for _, y in chunks)
    assert found[1] == [hits / total]
    assert found[0][0] == pytest.approx(losses / total, rel=1e-5)


def test_loss_and_accuracy_of_a_users_own() -> None:
    kind = KINDS["averages"]
    data = samples(kind)
    data.labels = data.labels.float()
    model = module_model(
        kind.make,
        kind.shape,
        loss=lambda output, target: (output[:, 0] - target).square().mean(),
        accuracy=lambda output, target: ((output[:, 0] - target).abs() < 0.5).float().mean(),
    )
    one = job(model, kind.recipe)
    net, chunks = network(model, one.state.weights[0]).eval(), data.validation_first(0)
    loss, right = AutogradNetwork(model, one.who, one.state.weights).measure(chunks)
    x, y = (torch.cat(column) for column in zip(*chunks, strict=True))
    output = net(x)[:, 0].detach()
    assert loss[0] == pytest.approx(float((output - y).square().mean()), rel=1e-5)
    assert right == [pytest.approx(float(((output - y).abs() < 0.5).float().mean()))]
    fit(model, data, [one], replace(kind.recipe, steps=60, lr=0.03))
    assert one.state.best_loss < loss[0]


class Fails(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("no more\nof this")
        return super().forward(x)


def test_what_a_users_code_raises_is_said_in_a_line() -> None:
    data, shape = samples(KINDS["averages"]), KINDS["averages"].shape

    def failing(**more: Any) -> str:
        model = module_model(lambda: (Fails if not more else nn.Linear)(6, 3), shape, **more)
        with pytest.raises(SparselthError) as caught:
            fit(model, data, [job(model, ADAM)], ADAM)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert failing() == "`model` net.py:make: in training: ValueError: no more of this"
    each = failing(loss=lambda output, target: F.cross_entropy(output, target, reduction="none"))
    assert each == "`loss(output, target)` gives shape [7]; expected one number, the mean of a batch"
    none = failing(loss=lambda output, target: None)
    assert "gives NoneType" in none
    assert "in training: KeyError" in failing(loss=lambda output, target: {}["x"])


def test_running_out_of_memory_is_left_to_those_who_can_halve_a_batch() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    model = module_model(lambda: nn.Linear(6, 3), (6,), loss=loss)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        fit(model, samples(KINDS["averages"]), [job(model, ADAM)], ADAM)


def test_targets_that_are_left_out_count_nowhere() -> None:
    kind = KINDS["words"]
    model, data = model_of(kind), samples(kind)
    model.check_labels(np.array([[0, -100, 2, 3, 10]]))
    one = job(model, kind.recipe)
    bound, (x, y) = AutogradNetwork(model, one.who, one.state.weights), data.validation_first(0)[0]
    bound.net.eval()
    y = y.clone()
    y[:, 2:] = -100
    with torch.no_grad():
        loss, right, count = sums(model, bound(x), y)
        output = bound(x)[:, :2]
    assert count == y[:, :2].numel()
    assert int(right) == int((output.argmax(-1) == y[:, :2]).sum())
    expected = F.cross_entropy(output.flatten(0, 1), y[:, :2].flatten(), reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def glorot(model: Model) -> nn.Module:
    """A user's own: plain modules, weights by the law of built-in ones, drawn from torch's generator."""
    flat = torch.zeros(model.params.size)
    for spec in model.weights:
        flat[spec.span] = torch.randn(spec.numel) * sqrt(2 / (spec.fan_in + spec.fan_out))
    for spec in model.norms[::2] + model.statistics[1::2]:
        flat[spec.span] = 1
    return network(model, flat)


@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_users_network_has_the_bits_of_the_same_one_built_in(
    name: str, recipe: Recipe, digits: Resident
) -> None:
    graph = GRAPHS[name]
    own = module_model(lambda: glorot(graph), graph.input, classes=10)
    found = []
    for model in (graph, own):
        weights = init_weights(model, stream(0, "ticket", 0, "init"))
        first = [weights[spec.span] for spec in model.params.weights]
        keep = [torch.rand(len(w), generator=torch.Generator().manual_seed(len(w))) < 0.5 for w in first]
        mask = model.params.full_mask()
        for spec, kept in zip(model.params.weights, keep, strict=True):
            mask[spec.span] = kept
        weights[: len(mask)] *= mask
        one = Job(Cell(0, "ticket", 1), State.start(weights[None], recipe), mask)
        fit(model, digits, [one], recipe, kernels="autograd")
        tensors = {s.name: one.state.weights[0, s.span] for s in model.params.all}
        found.append((tensors, one.state.evaluations, accuracies_on_test(model, digits, [one], "autograd")))
    (built_in, theirs, test), (users, mine, tested) = found
    assert theirs == mine
    assert test == tested
    torchs = {"scale": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var"}
    for label, tensor in built_in.items():
        layer, _, last = label.rpartition(".")
        assert torch.equal(tensor, users[f"{layer}.{torchs.get(last, last)}"]), label


@pytest.mark.parametrize(
    ("name", "recipe", "most"),
    [("chain", ADAM, 1e-5), ("chain", SGD, 1e-6), ("residual", SGD, 1e-6), ("mlp", SGD, 1e-6)],
    ids=["chain-adam", "chain-sgd", "residual-sgd", "mlp-sgd"],
)
def test_autograd_is_within_rounding_of_the_fast_engines(
    name: str, recipe: Recipe, most: float, digits: Resident
) -> None:
    """Adam divides by the size of gradients: what is rounding before a batch norm would be a whole step."""
    graph, found = GRAPHS[name], []
    for kernels in ("auto", "autograd", "reference"):
        weights = init_weights(graph, stream(0, "ticket", 0, "init"))
        one = Job(Cell(0, "ticket", 1), State.start(weights[None], recipe), graph.params.full_mask())
        fit(graph, digits, [one], recipe, kernels=kernels)
        found.append(one.state.weights[0, : graph.params.mask_size])
    fast, autograd, reference = found
    size = float(fast.abs().max())
    assert float((fast - autograd).abs().max()) < most * size
    assert float((reference - autograd).abs().max()) < most * size


class Halves(nn.Sequential):
    """Products in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@pytest.mark.parametrize("way", ["compiled", "autocast"])
def test_a_network_that_compiles_or_casts_itself_trains_under_its_mask(way: str) -> None:
    def plain(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
        return kind(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))

    def own() -> nn.Module:
        if way == "autocast":
            return plain(Halves)
        net = plain()
        net.compile(backend="eager")
        return net

    data, found = samples(KINDS["averages"]), []
    for make in (plain, own):
        model = module_model(make, (6,), classes=3)
        one = job(model, SGD, 0.5)
        fit(model, data, [one], SGD)
        assert one.diverged is None
        assert not one.state.weights[0, : len(one.mask)][~one.mask].any()
        found.append(one)
    first, second = (one.state.weights for one in found)
    if way == "compiled":
        assert same(*found)
    else:
        assert 0 < float((first - second).abs().max()) < 2**-6  # and a ReLU on the other side of 0
        assert not torch.equal(second.bfloat16().float(), second)  # weights are whole


def test_scores_over_frozen_weights_are_refused(digits: Resident) -> None:
    weights = torch.zeros(1, MLP.params.size)
    one = Job(Cell(0, "t", 0), State.start(weights, ADAM), MLP.params.full_mask(), frozen=object())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`kernels` autograd"):
        prepare(MLP, digits, [one], ADAM, "autograd")


def test_a_module_takes_autograd_whatever_is_asked_for() -> None:
    kind = KINDS["averages"]
    for kernels in ("auto", "torch", "reference"):
        steps = prepare(model_of(kind), samples(kind), [job(model_of(kind), ADAM)], ADAM, kernels)
        assert isinstance(steps, AutogradSteps)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_memory_is_counted(kind: Kind) -> None:
    model = model_of(kind)
    steps = prepare(model, samples(kind), [job(model, kind.recipe, 0.5)], kind.recipe)
    assert steps.state_bytes >= 4 * model.params.trained_size
    assert steps.memory().weights is not None
