"""Batch norm: running statistics are torch's, go where the weights go, and are what evaluation takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Batches, Resident
from sparselth.engine.batch import DenseForward
from sparselth.engine.break_even import break_even
from sparselth.engine.dense import Network, cross_entropy_grad, init_weights
from sparselth.engine.paths import choose
from sparselth.engine.replay import Replay
from sparselth.engine.state import Batch, Job, State, measure
from sparselth.engine.vendor import VendorNetwork
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig, start_weights
from sparselth.files import load_arrays
from sparselth.kernels._triton import INTERPRET
from sparselth.measure.race_networks import _load
from sparselth.measure.training import _flat
from sparselth.models import MODELS, AvgPool, BatchNorm, Conv, Layer, Linear, MaxPool, Model, ReLU, get_model
from sparselth.models.torch import network, sequential
from sparselth.runs import RunRecord, cell_path, checkpoint_path
from sparselth.streams import stream
from sparselth.train import accuracies_on_test, fit

LAYERS: tuple[Layer, ...] = (
    *(Conv(3, 5), BatchNorm(), MaxPool(2), ReLU(), Conv(4, 5), BatchNorm(), ReLU(), AvgPool()),
    *(Linear(12), BatchNorm(), ReLU(), Linear(10)),
)
TINY = Model("tiny-norm", (1, 28, 28), LAYERS, {"short": Recipe(steps=40, lr=0.01)}, "")
ADAM = Recipe(steps=40, lr=0.01, batch_size=20, eval_every=10)
SGD = replace(ADAM, lr=0.1, optimizer="sgd", weight_decay=0.01)
TICKET = Cell(0, "ticket", 0)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS.things, TINY.name, TINY)


def images(replicas: int, batch: int, seed: int) -> Tensor:
    return torch.randn(replicas, 784, batch, generator=torch.Generator().manual_seed(seed))


def fresh(seed: int) -> Tensor:
    """Weights [1, P] whose batch norms scale and shift."""
    flat = init_weights(TINY, stream(seed, "ticket", 0, "init"))[None]
    for spec in TINY.norms:
        noise = torch.randn(spec.numel, generator=stream(seed, "ticket", 0, spec.name))
        flat[0, spec.span] += noise / 4
    return flat


def statistics(flat: Tensor) -> dict[str, Tensor]:
    return {spec.name: flat[..., spec.span] for spec in TINY.statistics}


@pytest.mark.parametrize(("vendor", "replicas"), [(False, 1), (False, 3), (True, 1)])
@pytest.mark.parametrize("batch", [1, 7])
def test_running_statistics_are_those_of_torch(vendor: bool, replicas: int, batch: int) -> None:
    flat = torch.cat([fresh(seed) for seed in range(replicas)])
    nets = [network(TINY, row) for row in flat]
    before, grad = flat.clone(), torch.zeros_like(flat)
    ours = VendorNetwork(TINY, flat, grad) if vendor else Network(TINY, flat, batch, grad)
    for step in range(5):
        x = images(replicas, batch, step)
        logits = ours.forward(x)
        for net, row, found in zip(nets, x, logits, strict=True):
            if batch == 1:  # torch refuses a batch norm of one value
                for module in net:
                    module.train(not isinstance(module, nn.BatchNorm1d))
            expected = net(row.T.reshape(-1, 1, 28, 28)).T
            if batch > 1:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(flat[:, : TINY.params.trained_size], before[:, : TINY.params.trained_size])
    for row, net in zip(flat, nets, strict=True):
        norms = [m for m in net if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        for i, norm in enumerate(norms[: 2 if batch == 1 else 3], 1):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            found = statistics(row)
            torch.testing.assert_close(found[f"norm{i}.mean"], norm.running_mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[f"norm{i}.var"], norm.running_var, rtol=1e-5, atol=1e-6)
    if batch == 1:
        assert statistics(flat)["norm3.mean"].all()
        assert (statistics(flat)["norm3.var"] == 1).all()


@pytest.mark.parametrize("vendor", [False, True])
def test_evaluation_takes_running_statistics_and_changes_nothing(vendor: bool, digits: Resident) -> None:
    flat, chunks = fresh(0), digits.validation(0)
    before = flat.clone()
    x = chunks[0][0]
    alone = Network(TINY, flat, 1)
    together = DenseForward(TINY, flat, vendor)
    logits = VendorNetwork(TINY, flat).forward(x) if vendor else Network(TINY, flat, 250).forward(x)
    for i in range(3):  # an image's logits do not depend on the images beside it
        torch.testing.assert_close(alone.forward(x[:, :, i : i + 1].contiguous())[:, :, 0], logits[:, :, i])
    assert measure(together, chunks) == measure(together, chunks)
    assert torch.equal(flat, before)
    for values in statistics(flat).values():
        values.add_(1)
    assert measure(together, chunks) != measure(DenseForward(TINY, before, vendor), chunks)


@pytest.mark.parametrize("kernels", ["auto", "torch", "reference"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_statistics_are_not_trained_and_the_best_ones_are_kept(
    kernels: str, replicas: int, digits: Resident
) -> None:
    """SGD with weight decay: an update that saw them would shrink them."""
    jobs = [
        Job(Cell(seed, "ticket", 0), State.start(fresh(seed), SGD), TINY.params.full_mask(), keep_step=13)
        for seed in range(replicas)
    ]
    recorded: list[dict[str, Tensor]] = []

    def evaluated(some: object) -> None:
        recorded.append({"at": torch.tensor(jobs[0].state.step), "w": jobs[0].state.weights.clone()})

    fit(TINY, digits, jobs, SGD, kernels=kernels, on_evaluation=evaluated)
    state = jobs[0].state
    best = next(r["w"] for r in recorded if r["at"] == state.best_step)
    assert torch.equal(state.best_weights, best)
    assert state.kept_weights is not None
    for moment in state.moments:
        assert not moment[:, TINY.params.trained_size :].any()
    again = Job(TICKET, State.start(fresh(0), SGD), TINY.params.full_mask())
    fit(TINY, digits, [again], replace(SGD, steps=13), kernels=kernels)
    assert torch.equal(state.kept_weights, again.state.weights)
    # what torch's own loop makes of the same batches
    net = network(TINY, fresh(0)[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    source = Batches(digits, [TICKET], 20)
    for step in range(13):
        x, y = source.at(step)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x[0].T.reshape(-1, 1, 28, 28)), y.flatten()))
        optimizer.step()
    expected = _flat(TINY, list(net.parameters()))
    n = TINY.params.trained_size
    assert (again.state.weights[0, :n] - expected[:n]).norm() < 1e-3 * expected[:n].norm()
    for i, norm in enumerate((net[1], net[5], net[10]), 1):
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        found = statistics(again.state.weights[0])
        torch.testing.assert_close(found[f"norm{i}.mean"], norm.running_mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[f"norm{i}.var"], norm.running_var, rtol=1e-3, atol=1e-3)


def test_a_network_with_batch_norms_stays_dense(digits: Resident) -> None:
    assert break_even(TINY, 20, "native") == {}
    state = State.start(fresh(0), ADAM)
    share = {spec.name: 2.0 for spec in TINY.weights}
    fit(TINY, digits, [Job(TICKET, state, TINY.params.full_mask())], replace(ADAM, steps=2), break_even=share)
    assert state.layout is None
    assert state.step == 2


@pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")
@pytest.mark.parametrize("first", [(MaxPool(4), Conv(2, 3), BatchNorm(), ReLU()), ()], ids=["conv", "linear"])
def test_a_replica_that_is_not_active_keeps_every_bit(first: tuple[Layer, ...], few: Resident) -> None:
    model = Model("small", (1, 28, 28), (*first, *LAYERS[-4:]), {}, "")
    weights = torch.stack([init_weights(model, stream(seed, "ticket", 0, "init")) for seed in range(2)])
    weights[1, model.statistics[0].offset] = -0.0
    recipe = replace(SGD, steps=2, batch_size=3)
    jobs = [
        Job(Cell(seed, "ticket", 0), State.start(row[None], recipe), model.params.full_mask())
        for seed, row in enumerate(weights)
    ]
    batch = Batch(model, few, jobs, recipe, choose("triton", "cpu"))
    steps, weights = Replay(batch), batch.weights
    before = weights.view(torch.int32).clone()
    steps.pulse.active.zero_()
    steps.advance(0, 1, lambda: False)
    assert torch.equal(weights.view(torch.int32), before)
    steps.pulse.active[0] = 1
    steps.advance(0, 1, lambda: False)
    assert torch.equal(weights.view(torch.int32)[1], before[1])
    moved = weights.view(torch.int32)[0] != before[0]
    for spec in (*model.norms, *model.statistics):
        assert moved[spec.span].any(), spec.name


def config(recipe: Recipe, rewind: int, kernels: str = "auto") -> ImpConfig:
    return ImpConfig(
        model=TINY.name,
        dataset="mnist5k",
        seeds=(0,),
        arms=("ticket", "reinit", "random-mask"),
        levels=1,
        rate=0.5,
        scope="global",
        one_shot=False,
        rewind=rewind,
        reinits=1,
        device="cpu",
        kernels=kernels,
        recipe=recipe,
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_stopped_cell_goes_on_to_the_same_bits(kernels: str, tmp_path: Path, digits: Resident) -> None:
    found = []
    for name, stop in (("whole", 10**9), ("stopped", 17)):
        run = tmp_path / name
        (run / "cells").mkdir(parents=True)
        (run / "checkpoints").mkdir()
        calls = iter(range(10**9))
        settings = config(SGD, 13, kernels)
        cells = settings.compute(
            [TICKET],
            Place(run, digits, {}, should_stop=lambda calls=calls, stop=stop: next(calls) >= stop),
        )
        if stop < SGD.steps:
            assert cells is None
            kept = load_arrays(checkpoint_path(run, TICKET))[0]
            assert not torch.equal(torch.from_numpy(kept["kept_weights"]), torch.from_numpy(kept["weights"]))
            cells = settings.compute([TICKET], Place(run, digits, {}))
        assert cells is not None
        found.append((cell_path(run, TICKET).read_bytes(), cells[0].evaluations, cells[0].line))
    assert found[0] == found[1]


@pytest.mark.usefixtures("registered")
def test_statistics_in_a_run(imp: Callable[..., RunRecord], digits: Resident) -> None:
    """A ticket takes the statistics of the rewind step, fresh weights begin at 0 and 1; files hold all."""
    record = imp(
        *("--model", TINY.name, "--levels", "1", "--seeds", "0", "--rewind", "20", "--workers", "1"),
        *("--arms", "ticket,reinit,random-mask", "--batch-size", "20", "--lr", "0.01"),
        steps=60,
        out="norms",  # files are remembered by their path within a process
    )
    assert record.complete
    run, settings = record.path, record.config
    state = State.start(init_weights(TINY, stream(0, "ticket", 0, "init"))[None], settings.recipe)
    job = Job(TICKET, state, TINY.params.full_mask(), keep_step=20)
    fit(TINY, digits, [job], settings.recipe)
    assert state.kept_weights is not None
    arrays = load_arrays(cell_path(run, TICKET))[0]
    for name, values in statistics(state.kept_weights[0]).items():
        np.testing.assert_array_equal(arrays[f"rewind/{name}"], values.numpy())
        assert not np.array_equal(arrays[f"bias/{name}"], values.numpy())
    for arm in ("ticket", "random-mask"):
        start = start_weights(settings, Place(run, digits, {}), Cell(0, arm, 1))
        assert torch.equal(start, state.kept_weights[0])
    for name, values in statistics(
        start_weights(settings, Place(run, digits, {}), Cell(0, "reinit", 1))
    ).items():
        assert (values == float(name.endswith("var"))).all()

    ((_, final),) = accuracies_on_test(TINY, digits, [job])
    assert final == record.points[0]["final_accuracy"]
    for who, point in zip(settings.cells(), record.points, strict=True):
        flat, mask, _ = _load(run, TINY, who)
        net = sequential(TINY, flat)
        kinds = {type(module) for module in net}
        assert not kinds & {nn.BatchNorm1d, nn.BatchNorm2d}
        assert not net[0].weight.flatten()[~mask[: TINY.weights[0].numel]].any()
        chunks = digits.test()
        right = sum(int((net(x[0].T.reshape(-1, 1, 28, 28)).argmax(1) == y).sum()) for x, y in chunks)
        assert abs(right / digits.n_test - point["final_accuracy"]) <= 1 / digits.n_test


def test_vgg19_is_the_papers() -> None:
    model = get_model("vgg19")
    convs = [spec.numel for spec, layer, *_ in model.producers if isinstance(layer, Conv)]
    assert (len(convs), sum(convs), model.params.prunable) == (16, 20_018_880, 20_024_000)
    assert sum(isinstance(node.op, BatchNorm) for node in model.nodes) == 16
    assert [shape[1:] for shape in model.shapes[-6:]] == [(2, 2), (2, 2), (2, 2), (2, 2), (1, 1), ()]
    recipe = model.recipes["paper"]
    assert (recipe.steps, recipe.batch_size, recipe.optimizer) == (112_480, 64, "sgd")
    assert (recipe.momentum, recipe.weight_decay, recipe.warmup) == (0.9, 1e-4, 10_000)
    rates = [recipe.lr_at(step) for step in (10_000, 56_240, 84_360)]
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_vgg19_learns_its_batch() -> None:
    """Steps of plain descent on one batch, through the layers of the full network."""
    model = get_model("vgg19")
    flat = init_weights(model, stream(0, "ticket", 0, "init"))[None]
    grad, n = torch.zeros_like(flat), model.params.trained_size
    ours = VendorNetwork(model, flat, grad)
    x = torch.randn(1, 3 * 32 * 32, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4)[None, None]
    losses = []
    for _ in range(4):
        logits = ours.forward(x)
        losses.append(float(F.cross_entropy(logits[0].T, y[0, 0])))
        ours.backward(cross_entropy_grad(logits, y))
        flat[:, :n] -= 0.01 * grad[:, :n]
    assert losses[-1] < 0.5 * losses[0]
    assert model.params.views(grad)["norm1.scale"].any()
