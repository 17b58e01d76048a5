"""Whole neurons of frozen weights, kept by trained scores; and random features, whose output layer is fitted.

Of chains of fully connected layers. A neuron's score takes the gradient of its mask, straight-through: the
sum over the batch of dL/d(its output) times its output, whether it is kept or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import cos, pi, sqrt
from typing import Any

import torch
from torch import Tensor

from sparselth.config import Recipe
from sparselth.data.batches import Batches, Resident
from sparselth.engine.dense import cross_entropy_grad
from sparselth.engine.state import Job, State, Stopped
from sparselth.frozen import Frozen, weights_of
from sparselth.models import Model
from sparselth.params import matrix
from sparselth.streams import stream

RATE, FIRST, SECOND = 0.01, 0.9, 0.999  # of Adam, which trains scores
PENALTIES = (1e-6, 1e-4, 1e-2)  # on output weights of unit features; the validation images choose
ROUNDS, MEMORY = 150, 20  # of L-BFGS


def frozen_layers(model: Model, frozen: Frozen, device: str) -> list[Tensor]:
    """The frozen weights of every layer, [N, K]."""
    flat = weights_of(frozen, model.params, None, device)
    return [matrix(spec, flat) for spec in model.params.weights]


def features(layers: list[Tensor], x: Tensor, masks: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs [N, B] of every hidden layer for images x [K, B], before their masks [N]."""
    found = list[Tensor]()
    for i, layer in enumerate(layers[:-1]):
        before = x if not i else found[-1] if masks is None else found[-1] * masks[i - 1][:, None]
        found.append((layer @ before).clamp_min_(0))
    return found


def buffer(model: Model, layers: list[Tensor], masks: list[Tensor] | None = None) -> Tensor:
    """A network [P] of these layers, the rows of dropped neurons 0."""
    flat = torch.zeros(model.params.size, dtype=torch.float32, device=layers[0].device)
    for i, (spec, layer) in enumerate(zip(model.params.weights, layers, strict=True)):
        kept = layer if masks is None or i == len(layers) - 1 else layer * masks[i][:, None]
        flat[spec.span] = kept.flatten()
    return flat


def slopes(layers: list[Tensor], outputs: list[Tensor], masks: list[Tensor], y: Tensor) -> list[Tensor]:
    """The gradient of the mean cross-entropy by the masks [N] of every hidden layer; labels [1, 1, B]."""
    grad = cross_entropy_grad((layers[-1] @ (outputs[-1] * masks[-1][:, None]))[None], y)[0]
    found = list[Tensor]()
    for layer, output, mask in zip(layers[:0:-1], outputs[::-1], masks[::-1], strict=True):
        grad = layer.T @ grad
        found.append((grad * output).sum(1))
        grad *= mask[:, None] * (output > 0)
    return found[::-1]


def train_neurons(
    model: Model,
    job: Job,
    data: Resident,
    frozen: Frozen,
    recipe: Recipe,
    should_stop: Callable[[], bool],
    told: Callable[[], None],
) -> list[Tensor]:
    """Train scores of all hidden neurons, and give the masks they end with; `job` becomes the network.

    Raises Stopped where `should_stop` says so between two steps.
    """
    state, layers, began = job.state, frozen_layers(model, frozen, data.device), time.process_time()
    layers = [layer * sqrt(1 / frozen.keep) if i else layer for i, layer in enumerate(layers)]
    generator = stream(job.who.seed, job.who.arm, job.who.level, "scores")
    scores = [
        torch.rand(len(layer), generator=generator, device="cpu", dtype=torch.float32)
        for layer in layers[:-1]
    ]
    scores = [score.to(data.device) for score in scores]
    moments = [(torch.zeros_like(score), torch.zeros_like(score)) for score in scores]
    batches = Batches(data, [job.who], recipe.batch_size, recipe.augment)
    masks = [_top(score, frozen) for score in scores]
    for step in range(recipe.steps):
        if should_stop():
            raise Stopped
        x, y = batches.at(step)
        outputs = features(layers, x[0], masks)
        rate = RATE * (1 + cos(pi * step / recipe.steps)) / 2
        found = zip(scores, moments, slopes(layers, outputs, masks, y), strict=True)
        for score, (first, second), slope in found:
            first.lerp_(slope, 1 - FIRST)
            second.lerp_(slope**2, 1 - SECOND)
            size = (second / (1 - SECOND ** (step + 1))).sqrt_().add_(1e-12)
            score -= rate * first / (1 - FIRST ** (step + 1)) / size
        masks = [_top(score, frozen) for score in scores]
        if (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.steps:
            spent, state.step = time.process_time() - began, step + 1
            state.pace.append(spent / recipe.eval_every)
            state.step_seconds += spent
            state.seconds += spent
            state.weights = buffer(model, layers, masks)[None]
            _evaluate(job, layers, masks, data)
            told()
            began = time.process_time()
    return masks


def _top(scores: Tensor, frozen: Frozen) -> Tensor:
    """1 for the share of neurons with the largest scores, 0 for the others."""
    mask = torch.zeros_like(scores)
    mask[scores.argsort(descending=True, stable=True)[: frozen.kept(len(scores))]] = 1
    return mask


def _evaluate(job: Job, layers: list[Tensor], masks: list[Tensor], data: Resident) -> None:
    """Look at the validation images, and note the best network."""
    loss, right, total = 0.0, 0, 0
    for x, y in data.validation(job.who.seed):
        logits = layers[-1] @ (features(layers, x[0], masks)[-1] * masks[-1][:, None])
        loss += torch.nn.functional.cross_entropy(logits.T, y[0, 0], reduction="sum").item()
        right += int((logits.argmax(0) == y[0, 0]).sum())
        total += y.numel()
    note(job, loss / total, right / total)


def note(job: Job, loss: float, accuracy: float) -> None:
    """A line of evaluations, and the best network so far."""
    who, state = job.who, job.state
    line: dict[str, Any] = {"seed": who.seed, "arm": who.arm, "level": who.level, "draw": who.draw}
    found = {"step": state.step, "validation_loss": loss, "validation_accuracy": accuracy}
    state.evaluations.append(line | found)
    if loss < state.best_loss:
        state.best_loss, state.best_step, state.best_weights = loss, state.step, state.weights.clone()


def fit_output(
    model: Model, job: Job, data: Resident, frozen: Frozen, should_stop: Callable[[], bool]
) -> State:
    """The state of the network whose output layer is fitted by logistic regression on frozen features."""
    state, began = job.state, time.process_time()
    layers = frozen_layers(model, frozen, data.device)
    train, _ = data.split(job.who.seed)
    x = torch.cat([_last(layers, data, some) for some in torch.split(train, 5000)], 1)
    y = data.labels[train.to(data.device)]
    mean, size = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp_min_(1e-6)
    unit = (x - mean) / size
    for penalty in PENALTIES:
        weight, bias = logistic(unit, y, model.classes, penalty, should_stop)
        weight = weight / size.T
        layers[-1], shift = weight, bias - weight @ mean[:, 0]
        flat = buffer(model, layers)
        flat[model.params.trained[len(layers) - 1].span] = shift
        state.step += ROUNDS
        state.weights = flat[None]
        loss, right, total = 0.0, 0, 0
        for images, labels in data.validation(job.who.seed):
            logits = weight @ features(layers, images[0])[-1] + shift[:, None]
            loss += torch.nn.functional.cross_entropy(logits.T, labels[0, 0], reduction="sum").item()
            right += int((logits.argmax(0) == labels[0, 0]).sum())
            total += labels.numel()
        note(job, loss / total, right / total)
    state.weights = state.best_weights
    state.seconds = state.step_seconds = time.process_time() - began
    state.pace = [state.seconds / state.step]
    return state


def _last(layers: list[Tensor], data: Resident, index: Tensor) -> Tensor:
    """The last hidden layer's outputs [N, B] for training images."""
    images = data.images[index.to(data.device)].T.float()
    return features(layers, torch.addcmul(data.shift, images, data.scale))[-1]


def logistic(
    x: Tensor, y: Tensor, classes: int, penalty: float, should_stop: Callable[[], bool]
) -> tuple[Tensor, Tensor]:
    """Weights [C, N] and biases [C] of least cross-entropy and penalty on features x [N, B], by L-BFGS."""
    weight = torch.zeros(classes, len(x), dtype=torch.float32, device=x.device)
    bias = torch.zeros(classes, dtype=torch.float32, device=x.device)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=ROUNDS, history_size=MEMORY, line_search_fn="strong_wolfe"
    )
    right = torch.nn.functional.one_hot(y, classes).T.float()

    def slope() -> Tensor:
        if should_stop():
            raise Stopped
        logits = weight @ x + bias[:, None]
        loss = torch.nn.functional.cross_entropy(logits.T, y) + penalty * (weight**2).sum() / 2
        side = (logits.softmax(0) - right) / len(y)
        weight.grad, bias.grad = side @ x.T + penalty * weight, side.sum(1)
        return loss

    with torch.no_grad():
        search.step(slope)  # type: ignore[no-untyped-call]
    return weight, bias
