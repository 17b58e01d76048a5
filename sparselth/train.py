"""Training R replicas: the step, the loop, evaluation and early stop; nothing about tickets.

Early stop is the evaluation of minimum validation loss, found afterwards: training always runs its
full budget and keeps a copy of the best weights so far (Frankle & Carbin 2019, section 2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparselth.batches import Batches, Chunk, Resident
from sparselth.config import Recipe, Replica
from sparselth.errors import SparselthError
from sparselth.kernels.masked_update import masked_adam, masked_sgd
from sparselth.models import Conv, Model
from sparselth.nn import Network, cross_entropy, cross_entropy_grad

DIVERGED_LOSS = 1e6  # a network that knows nothing loses ln(classes)


class Diverged(SparselthError):
    """A replica's loss is absurd, or its loss, weights or moments are not finite."""


@dataclass
class State:
    """A fit at one step: all that is needed to go on to the same bits. P = `model.flat_size`."""

    step: int
    weights: Tensor  # [R, P]
    moments: list[Tensor]  # each [R, P]: momentum (SGD), or first and second moment (Adam)
    best_weights: Tensor  # [R, P] at the evaluation of minimum validation loss
    best_loss: list[float]
    best_step: list[int]
    kept_weights: Tensor | None = None  # [R, P] at `keep_step`
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @staticmethod
    def start(weights: Tensor, recipe: Recipe, step: int = 0) -> State:
        """The state before the first update; the optimizer starts fresh."""
        r = weights.shape[0]
        moments = [torch.zeros_like(weights) for _ in range(2 if recipe.optimizer == "adam" else 1)]
        return State(step, weights.clone(), moments, weights.clone(), [float("inf")] * r, [step] * r)


def evaluation_batch(model: Model) -> int:
    """Images of one evaluation batch: small where a convolution's shifted copies must fit the cache."""
    return 100 if any(isinstance(layer, Conv) for layer in model.layers) else 500


class Evaluator:
    """Mean cross-entropy and accuracy of R replicas, from evaluation batches that all of them see."""

    def __init__(self, model: Model, weights: Tensor) -> None:
        self.model, self.weights = model, weights
        self.networks: dict[int, Network] = {}

    def measure(self, chunks: Sequence[Chunk]) -> tuple[list[float], list[float]]:
        """(loss, accuracy), each a list of R."""
        r, total = self.weights.shape[0], 0
        loss = torch.zeros(r, dtype=torch.float64, device=self.weights.device)
        right = torch.zeros_like(loss)
        for x, y in chunks:
            n = x.shape[2]
            if n not in self.networks:
                self.networks[n] = Network(self.model, self.weights, n)
            logits = self.networks[n].forward(x.expand(r, -1, -1))
            more = cross_entropy(logits, y.expand(r, -1, -1))
            loss += more[0]
            right += more[1]
            total += n
        return (loss / total).tolist(), (right / total).tolist()


def fit(
    model: Model,
    data: Resident,
    replicas: Sequence[Replica],
    state: State,
    mask: Tensor,
    recipe: Recipe,
    *,
    start_step: int = 0,
    keep_step: int | None = None,
    on_evaluation: Callable[[State], None] = lambda state: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train from `state.step` to `recipe.steps`, in place, and return the state.

    `mask` is bool [R, M]; weights it prunes must be 0 in `state` and stay 0. `start_step` is the step the
    optimizer started at (its own count begins there; the learning rate is that of the true step);
    weights are copied to `state.kept_weights` when `keep_step` is reached. When `should_stop` returns
    True the state is returned as it is, before its last step. Raises Diverged.
    """
    weights, moments = state.weights, state.moments
    grad = torch.zeros_like(weights)
    network = Network(model, weights, recipe.batch_size, grad)
    batches = Batches(data, replicas, recipe.batch_size)
    evaluator = Evaluator(model, weights)
    live = None if all(row.sum() == model.prunable for row in mask) else mask.to(weights)
    count = torch.zeros((), device=weights.device)
    began = time.perf_counter() - state.seconds

    def validate() -> None:
        # replicas of one seed share their validation images
        for seed in dict.fromkeys(who.seed for who in replicas):
            losses, accuracies = evaluator.measure(data.validation(seed))
            for r, who in enumerate(replicas):
                if who.seed != seed:
                    continue
                _check_finite(who, state, r, losses[r])
                state.evaluations.append(
                    {
                        "seed": who.seed,
                        "arm": who.arm,
                        "level": who.level,
                        "draw": who.draw,
                        "step": state.step,
                        "validation_loss": losses[r],
                        "validation_accuracy": accuracies[r],
                    }
                )
                if losses[r] < state.best_loss[r]:
                    state.best_loss[r], state.best_step[r] = losses[r], state.step
                    state.best_weights[r] = weights[r]
        state.seconds = time.perf_counter() - began
        on_evaluation(state)

    while state.step < recipe.steps:
        if should_stop():
            break
        if state.step == keep_step:
            state.kept_weights = weights.clone()
        x, y = batches.at(state.step)
        network.backward(cross_entropy_grad(network.forward(x), y))
        lr = recipe.lr_at(state.step)
        if recipe.optimizer == "adam":
            count.fill_(state.step - start_step + 1)
            masked_adam(weights, grad, live, moments, count, lr, recipe.weight_decay)
        else:
            masked_sgd(weights, grad, live, moments[0], lr, recipe.momentum, recipe.weight_decay)
        state.step += 1
        if state.step % recipe.eval_every == 0 or state.step == recipe.steps:
            validate()
    state.seconds = time.perf_counter() - began
    return state


def _check_finite(who: Replica, state: State, r: int, loss: float) -> None:
    if loss < DIVERGED_LOSS and all(t[r].isfinite().all() for t in (state.weights, *state.moments)):
        return
    raise Diverged(
        f"{who}: training diverged before step {state.step} (validation loss {loss:g}, weights up to "
        f"{state.weights[r].abs().max():g}); use a smaller --lr"
    )


def scores(model: Model, data: Resident, state: State) -> tuple[list[float], list[float]]:
    """Test accuracy of R replicas at early stop and at the end."""
    chunks = data.test()
    return (
        Evaluator(model, state.best_weights).measure(chunks)[1],
        Evaluator(model, state.weights).measure(chunks)[1],
    )
