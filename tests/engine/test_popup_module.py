"""Scores over frozen weights of a module: those of the same network built in; resumed; nothing else moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from modules import KINDS, model_of, module_model, samples
from torch import nn

from sparselth import strong_tickets
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.choose import prepare
from sparselth.engine.popup_module import PopupModuleSteps
from sparselth.engine.state import Job, State
from sparselth.experiments.strong_jobs import unweighted
from sparselth.frozen import METHODS, mask_of, weights_of
from sparselth.models import BatchNorm, Conv, Linear, Model, ReLU
from sparselth.models.module import ModuleModel
from sparselth.models.torch import network
from sparselth.streams import stream
from sparselth.train import accuracies_on_test, fit

RECIPE = Recipe(steps=6, lr=0.2, batch_size=8, eval_every=3, optimizer="sgd", weight_decay=1e-4)
# no pool: on the black of digits its inputs are equal, and which is the largest is the kernel's choice
LAYERS = Conv(4, 5, 0, 3), BatchNorm(), ReLU(), Linear(12), ReLU(), Linear(10)
CHAIN = Model("chain", (1, 28, 28), LAYERS, {}, "")


def frozen_job(model: Model, name: str, recipe: Recipe = RECIPE, seed: int = 0) -> Job:
    method = METHODS[name]
    frozen = method.frozen(seed, keep=0.4, every=2 if method.has_generations else 0)
    scores = method.start(frozen, model.params, stream(seed, "ticket", 0, "scores"))
    if isinstance(model, ModuleModel):
        unweighted(model, seed, scores)
    changes = torch.zeros(1, model.params.mask_size, dtype=torch.int32) if method.has_generations else None
    state = State.start(scores[None], recipe, 0, changes)
    return Job(Cell(seed, "ticket", 0), state, model.params.full_mask(), frozen=frozen)


def users() -> ModuleModel:
    """The chain as plain modules; the biases that it draws are set to 0."""
    flat = torch.ones(CHAIN.params.size) / 9
    for spec in CHAIN.norms[::2] + CHAIN.statistics[1::2]:
        flat[spec.span] = 1
    flat[CHAIN.statistics[0].span] = 0
    return module_model(lambda: network(CHAIN, flat), CHAIN.input, classes=10)


@pytest.mark.parametrize("name", METHODS)
def test_a_module_has_the_scores_of_the_same_network_built_in(name: str, digits: Resident) -> None:
    recipe = replace(RECIPE, lr=2.0) if name == "supermask" else RECIPE
    built_in = frozen_job(CHAIN, name, recipe)
    fit(CHAIN, digits, [built_in], recipe, kernels="torch")
    model = users()
    own = frozen_job(model, name, recipe)
    start = own.state.weights.clone()
    fit(model, digits, [own], recipe)
    for mine, its in zip(model.params.weights, CHAIN.params.weights, strict=True):
        found, right = own.state.weights[0, mine.span], built_in.state.weights[0, its.span]
        assert mine.shape == its.shape
        assert not torch.equal(found, start[0, mine.span])
        assert float((found - right).abs().max()) < 1e-4 * float(right.abs().max()), mine.name
    for spec in model.params.trained:
        assert torch.equal(own.state.weights[0, spec.span], start[0, spec.span]), spec.name
    for one, other in zip(own.state.evaluations, built_in.state.evaluations, strict=True):
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["edge-popup", "iterand", "supermask"])
@pytest.mark.parametrize("name", KINDS)
def test_it_goes_on_to_the_same_bits_wherever_it_was_stopped(name: str, method: str) -> None:
    model, data = model_of(KINDS[name]), samples(KINDS[name])
    recipe = replace(RECIPE, batch_size=7)
    straight, stopped = frozen_job(model, method, recipe), frozen_job(model, method, recipe)
    fit(model, data, [straight], recipe)
    left = 4

    def should_stop() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    fit(model, data, [stopped], recipe, should_stop=should_stop)
    assert 0 < stopped.state.step < 6
    again = Job(stopped.who, replace(stopped.state), stopped.mask, frozen=stopped.frozen)
    again.state.part()
    fit(model, data, [again], recipe)
    assert torch.equal(again.state.weights.view(torch.int32), straight.state.weights.view(torch.int32))
    assert again.state.evaluations == straight.state.evaluations


@pytest.mark.parametrize("name", KINDS)
def test_the_network_is_what_its_file_says(name: str) -> None:
    """Weights of the seed under the mask; whatever else is as it was drawn, or as the forward left it."""
    model, data = model_of(KINDS[name]), samples(KINDS[name])
    one = frozen_job(model, "edge-popup", replace(RECIPE, batch_size=7))
    fit(model, data, [one], replace(RECIPE, batch_size=7))
    assert one.frozen is not None
    scores, params = one.state.weights[0], model.params
    mask = mask_of(one.frozen, params, scores)
    content = strong_tickets.Content.of(params, one.frozen, mask, None, scores)
    found = strong_tickets.arrays(params, content)
    again = strong_tickets.content_of(
        "",
        params,
        found,
        {"frozen": {**vars(one.frozen)}},  # type: ignore[arg-type]
    ).weights(params)
    assert torch.equal(again.view(torch.int32), one.network(model)[0].view(torch.int32))
    drawn = weights_of(one.frozen, params)
    front = again[: params.mask_size]
    assert torch.equal(front, drawn * mask)
    net = network(model, again).eval()
    right = sum(int((net(x).argmax(-1) == y).sum()) for x, y in data.test_first())
    total = sum(y.numel() for _, y in data.test_first())
    assert accuracies_on_test(model, data, [one])[0][1] == pytest.approx(right / total)
    assert isinstance(prepare(model, data, [one], replace(RECIPE, batch_size=7)), PopupModuleSteps)
    for name, tensor in net.named_parameters():
        if "bias" in name.rpartition(".")[2]:
            assert not tensor.any(), name
    if isinstance(net, nn.Module) and hasattr(net, "calls"):
        assert int(net.calls) == 6 * 2**40  # type: ignore[arg-type]
