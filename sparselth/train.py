"""Training R replicas: the step, the loop, evaluation and early stop; nothing about tickets.

Early stop is the evaluation of minimum validation loss, found afterwards: training always runs its
full budget and keeps a copy of the best weights so far (Frankle & Carbin 2019, section 2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselth import pruning
from sparselth.batches import Batches, Chunk, Resident
from sparselth.compressed import CompressedEvaluator, CompressedSteps
from sparselth.config import Recipe, Replica
from sparselth.dispatch import Paths, choose
from sparselth.errors import SparselthError
from sparselth.kernels import bitmask
from sparselth.kernels.masked_update import (
    Step,
    bind_masked_adam,
    bind_masked_sgd,
    masked_adam,
    masked_adam_many,
    masked_sgd,
    masked_sgd_many,
)
from sparselth.layout import Layout
from sparselth.models import Conv, MaxPool, Model
from sparselth.nn import Network, cross_entropy, cross_entropy_grad
from sparselth.vendor import VendorNetwork

DIVERGED_LOSS = 1e6  # a network that knows nothing loses ln(classes)


class Diverged(SparselthError):
    """A replica's loss is absurd, or its loss, weights or moments are not finite."""


@dataclass
class State:
    """A fit at one step: all that is needed to go on to the same bits. P = `model.flat_size`.

    While `layout` is set, training goes on in the compressed domain and the tensors are [1, layout.size].
    """

    step: int
    weights: Tensor  # [R, P]
    moments: list[Tensor]  # each [R, P]: momentum (SGD), or first and second moment (Adam)
    best_weights: Tensor  # [R, P] at the evaluation of minimum validation loss
    best_loss: list[float]
    best_step: list[int]
    kept_weights: Tensor | None = None  # [R, P] at `keep_step`
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0  # of `seconds`, those that steps took
    pace: list[float] = field(default_factory=list)  # seconds a step, between one evaluation and the next
    bytes: int = 0  # weights, gradients, optimizer state, masks and indices while training
    layout: Layout | None = None

    @staticmethod
    def start(weights: Tensor, recipe: Recipe, step: int = 0) -> State:
        """The state before the first update; the optimizer starts fresh."""
        r = weights.shape[0]
        moments = [torch.zeros_like(weights) for _ in range(2 if recipe.optimizer == "adam" else 1)]
        return State(step, weights.clone(), moments, weights.clone(), [float("inf")] * r, [step] * r)

    def enter(self, layout: Layout) -> None:
        """Compress every tensor, in place."""
        layout.leave_out(self.weights)
        self._convert(layout.compress, layout.compress)
        self.layout = layout

    def leave(self) -> None:
        """Expand every tensor, in place."""
        if (layout := self.layout) is not None:
            self._convert(layout.expand, partial(layout.expand, weights=False))
            self.layout = None

    def expanded(self) -> State:
        """This state with its tensors [R, P]."""
        found = replace(self)
        found.leave()
        return found

    def _convert(self, weights: Callable[[Tensor], Tensor], moments: Callable[[Tensor], Tensor]) -> None:
        self.weights, self.best_weights = weights(self.weights), weights(self.best_weights)
        self.moments = [moments(moment) for moment in self.moments]
        if self.kept_weights is not None:
            self.kept_weights = weights(self.kept_weights)


def evaluation_batch(model: Model) -> int:
    """Images of one evaluation batch: small where a convolution's shifted copies must fit the cache."""
    return 100 if any(isinstance(layer, Conv) for layer in model.layers) else 500


class Evaluator:
    """Mean cross-entropy and accuracy of R replicas, from evaluation batches that all of them see."""

    def __init__(self, model: Model, weights: Tensor, vendor: bool = False) -> None:
        self.model, self.weights, self.vendor = model, weights, vendor
        self.networks: dict[int, Network | VendorNetwork] = {}

    def measure(self, chunks: Sequence[Chunk]) -> tuple[list[float], list[float]]:
        """(loss, accuracy), each a list of R."""
        r, total = self.weights.shape[0], 0
        loss = torch.zeros(r, dtype=torch.float64, device=self.weights.device)
        right = torch.zeros_like(loss)
        for x, y in chunks:
            n = x.shape[2]
            if n not in self.networks:
                self.networks[n] = (
                    VendorNetwork(self.model, self.weights)
                    if self.vendor
                    else Network(self.model, self.weights, n)
                )
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
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
    on_evaluation: Callable[[State], None] = lambda state: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train from `state.step` to `recipe.steps`, in place, and return the state.

    `mask` is bool [R, M]; weights it prunes must be 0 in `state` and stay 0. `start_step` is the step the
    optimizer started at (its own count begins there; the learning rate is that of the true step);
    weights are copied to `state.kept_weights` when `keep_step` is reached. `kernels` is what
    `sparselth.dispatch` chooses by; a single replica's layers with a smaller share of survivors than
    `break_even`, by name, are trained in the compressed domain where there are kernels for it. When
    `should_stop` returns True the state is returned as it is, before its last step. Raises Diverged.
    """
    paths = choose(kernels, state.weights.device.type)
    if compressed := _compressed(model, mask, break_even or {}, paths):
        state.enter(Layout(model, mask[0], compressed, decays=recipe.weight_decay > 0))
    try:
        _fit(
            model,
            data,
            replicas,
            state,
            mask,
            recipe,
            start_step,
            keep_step,
            paths,
            on_evaluation,
            should_stop,
        )
    finally:
        state.leave()
    return state


def _compressed(model: Model, mask: Tensor, break_even: Mapping[str, float], paths: Paths) -> frozenset[str]:
    """The layers that are trained in the compressed domain."""
    pools = {layer.size for layer in model.layers if isinstance(layer, MaxPool)}
    if len(mask) > 1 or not pools <= {2} or paths.csr_linear.takes not in ("native", "torch"):
        return frozenset()
    kept = pruning.kept(model, mask[0])
    found = {s.name for s in model.weights if kept[s.name] < break_even.get(s.name, 0.0) * s.numel}
    # Convolutions go together, weighted by their work, since the vendor's want another layout of the images.
    convs = {s.name: prod(after[1:]) for s, layer, _, after in model.producers if isinstance(layer, Conv)}
    gain = sum(
        convs.get(s.name, 0) * (min(break_even.get(s.name, 0.0), 1.05) * s.numel - kept[s.name])
        for s in model.weights
    )
    if convs and gain <= 0 and paths.masked_conv2d.takes == "vendor":
        return frozenset()
    return frozenset(found | set(convs) if gain > 0 else found - set(convs))


def _takes_vendor(model: Model, weights: Tensor, paths: Paths) -> bool:
    """Whether a dense network goes through `VendorNetwork`: one replica with convolutions."""
    convolves = any(isinstance(layer, Conv) for layer in model.layers)
    return paths.masked_conv2d.takes == "vendor" and len(weights) == 1 and convolves


class Steps(Protocol):
    """What computes gradients and evaluates, dense or compressed."""

    grad: Tensor
    index_bytes: int  # memory of masks and indices

    def gradients(self, step: int) -> None:
        """Forward and backward on the batch of a step."""

    def measure(self, chunks: Sequence[Chunk]) -> tuple[list[float], list[float]]:
        """Mean cross-entropy and accuracy, each a list of R."""


class _Dense:
    """R replicas through `Network`, or one through `VendorNetwork`."""

    def __init__(
        self,
        model: Model,
        state: State,
        data: Resident,
        replicas: Sequence[Replica],
        mask: Tensor,
        recipe: Recipe,
        paths: Paths,
    ) -> None:
        self.grad = torch.zeros_like(state.weights)
        linear, conv = paths.masked_linear.takes, paths.masked_conv2d.takes
        self.batches = Batches(data, replicas, recipe.batch_size)
        self.index_bytes = 0
        self.network: Network | VendorNetwork
        if _takes_vendor(model, state.weights, paths):
            self.network = VendorNetwork(model, state.weights, self.grad)
            self.measure = Evaluator(model, state.weights, vendor=True).measure
            return
        conv = "torch" if conv == "vendor" else conv
        bits = pruning.packed(model, mask) if (linear, conv) != ("torch", "torch") else {}
        self.index_bytes = sum(t.numel() for t in bits.values())
        self.network = Network(model, state.weights, recipe.batch_size, self.grad, bits, linear, conv)
        self.measure = Evaluator(model, state.weights).measure

    def gradients(self, step: int) -> None:
        x, y = self.batches.at(step)
        self.network.backward(cross_entropy_grad(self.network.forward(x), y))


def _fit(
    model: Model,
    data: Resident,
    replicas: Sequence[Replica],
    state: State,
    mask: Tensor,
    recipe: Recipe,
    start_step: int,
    keep_step: int | None,
    paths: Paths,
    on_evaluation: Callable[[State], None],
    should_stop: Callable[[], bool],
) -> None:
    steps: Steps
    if state.layout is None:
        steps = _Dense(model, state, data, replicas, mask, recipe, paths)
    else:
        steps = CompressedSteps(
            model, state.layout, state.weights, data, replicas[0], recipe, paths.csr_linear.takes
        )
        mask = state.layout.mask(mask[0])
    dense = bool((mask.sum(1) == (model.prunable if state.layout is None else mask.shape[1])).all())
    update, mask_bytes = _updater(state, steps.grad, None if dense else mask, recipe, paths)
    buffers = (state.weights, steps.grad, *state.moments)
    state.bytes = sum(4 * t.numel() for t in buffers) + steps.index_bytes + mask_bytes
    began, training, done = time.perf_counter() - state.seconds, time.perf_counter(), state.step

    def validate() -> None:
        # replicas of one seed share their validation images
        for seed in dict.fromkeys(who.seed for who in replicas):
            losses, accuracies = steps.measure(data.validation(seed))
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
                    state.best_weights[r] = state.weights[r]
        state.seconds = time.perf_counter() - began
        on_evaluation(state)

    while state.step < recipe.steps:
        if should_stop():
            break
        if state.step == keep_step:
            state.kept_weights = state.weights.clone()
        steps.gradients(state.step)
        update(state.step - start_step + 1, recipe.lr_at(state.step))
        state.step += 1
        if state.step % recipe.eval_every == 0 or state.step == recipe.steps:
            took = time.perf_counter() - training
            state.step_seconds += took
            state.pace.append(took / (state.step - done))
            validate()
            training, done = time.perf_counter(), state.step
    state.step_seconds += time.perf_counter() - training
    state.seconds = time.perf_counter() - began


def _updater(
    state: State, grad: Tensor, mask: Tensor | None, recipe: Recipe, paths: Paths
) -> tuple[Step, int]:
    """The masked update, as a function of the optimizer's own step, from 1, and the learning rate.

    Beside it the bytes of its mask; `mask` None means that nothing is pruned.
    """
    weights, moments = state.weights, state.moments
    adam, momentum, decay = recipe.optimizer == "adam", recipe.momentum, recipe.weight_decay
    takes = paths.masked_update.takes
    if takes == "torch":
        live = None if mask is None else mask.to(weights)
        count = torch.zeros((), device=weights.device)

        def update(step: int, lr: float) -> None:
            if adam:
                masked_adam(weights, grad, live, moments, count.fill_(step), lr, decay)
            else:
                masked_sgd(weights, grad, live, moments[0], lr, momentum, decay)

        return update, 0 if live is None else 4 * live.numel()
    bits = None if mask is None else _bits(mask, weights)
    size = 0 if bits is None else bits.numel()
    buffers = moments if adam or momentum else []
    if takes == "native":
        if adam:
            first, second = moments
            return bind_masked_adam(weights, grad, (first, second), bits, weight_decay=decay), size
        buffer = buffers[0] if buffers else None
        return bind_masked_sgd(weights, grad, buffer, bits, momentum=momentum, weight_decay=decay), size
    counts = torch.zeros(len(weights), device=weights.device)
    rates = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    lists = [weights], [grad], [bits]

    def launch(step: int, lr: float) -> None:
        rates.fill_(lr)
        if adam:
            both = [moments[0]], [moments[1]]
            masked_adam_many(*lists, both, [counts.fill_(step)], rates, weight_decay=decay, kernels="triton")
        else:
            masked_sgd_many(
                *lists, buffers or None, rates, momentum=momentum, weight_decay=decay, kernels="triton"
            )

    return launch, size


def _bits(mask: Tensor, weights: Tensor) -> Tensor:
    """The packed mask of a whole buffer: what follows the weights is not pruned."""
    every = torch.ones(weights.shape, dtype=torch.bool, device=weights.device)
    every[:, : mask.shape[1]] = mask
    found: Tensor = bitmask.pack(every)
    return found


def _check_finite(who: Replica, state: State, r: int, loss: float) -> None:
    if loss < DIVERGED_LOSS and all(t[r].isfinite().all() for t in (state.weights, *state.moments)):
        return
    raise Diverged(
        f"{who}: training diverged before step {state.step} (validation loss {loss:g}, weights up to "
        f"{state.weights[r].abs().max():g}); use a smaller --lr"
    )


def scores(
    model: Model,
    data: Resident,
    state: State,
    mask: Tensor | None = None,
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
) -> tuple[list[float], list[float]]:
    """Test accuracy of R replicas at early stop and at the end; the rest as in `fit`."""
    chunks, both = data.test(), [state.best_weights, state.weights]
    if torch.equal(*both):
        both = both[:1]
    paths = choose(kernels, state.weights.device.type)
    if mask is not None and (compressed := _compressed(model, mask, break_even or {}, paths)):
        layout = Layout(model, mask[0], compressed)
        evaluators = (
            CompressedEvaluator(model, layout, layout.compress(weights), paths.csr_linear.takes)
            for weights in both
        )
        found = [evaluator.measure(chunks)[1] for evaluator in evaluators]
    else:
        vendor = _takes_vendor(model, state.weights, paths)
        found = [Evaluator(model, weights, vendor).measure(chunks)[1] for weights in both]
    return found[0], found[-1]
