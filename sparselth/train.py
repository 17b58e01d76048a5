"""Training jobs, one network each: the loop, evaluation and early stop; nothing about tickets.

Jobs that take the same way train as the replicas of one batch; on a CPU, where one network fills the
caches, our C kernels take them one after another. What a job computes does not depend on the others.

Early stop is the evaluation of minimum validation loss, found afterwards: training always runs its
full budget and keeps a copy of the best weights so far (Frankle & Carbin 2019, section 2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselth.config import Recipe, Replica
from sparselth.data.batches import Batches, Chunk, Resident
from sparselth.engine.compressed import CompressedEvaluator, CompressedSteps
from sparselth.engine.dense import Network, cross_entropy, cross_entropy_grad
from sparselth.engine.layout import Layout, compressible
from sparselth.engine.paths import Paths, choose
from sparselth.engine.replay import Replay
from sparselth.engine.vendor import VendorNetwork
from sparselth.errors import SparselthError
from sparselth.kernels import bitmask
from sparselth.kernels.masked_update import (
    Step,
    bind_masked_adam,
    bind_masked_sgd,
    masked_adam,
    masked_sgd,
)
from sparselth.models import Conv, Model

DIVERGED_LOSS = 1e6  # a network that knows nothing loses ln(classes)


class Diverged(SparselthError):
    """A replica's loss is absurd, or its loss, weights or moments are not finite."""


@dataclass
class State:
    """One network's training at one step: all that is needed to go on to the same bits.

    P = `model.params.size`, running statistics of batch norms among the weights. While `layout` is set,
    training goes on in the compressed domain and the tensors are [1, layout.size]; in a batch they are rows
    of the batch's tensors.
    """

    step: int
    weights: Tensor  # [1, P]
    moments: list[Tensor]  # each [1, P]: momentum (SGD), or first and second moment (Adam)
    best_weights: Tensor  # [1, P] at the evaluation of minimum validation loss
    best_loss: float
    best_step: int
    kept_weights: Tensor | None = None  # [1, P] at the job's `keep_step`
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of a batch of R, an R-th
    step_seconds: float = 0.0  # of `seconds`, those that steps took
    pace: list[float] = field(default_factory=list)  # seconds a step, between one evaluation and the next
    bytes: int = 0  # weights, gradients, optimizer state, masks and indices while training
    layout: Layout | None = None

    @staticmethod
    def start(weights: Tensor, recipe: Recipe, step: int = 0) -> State:
        """The state before the first update, from weights [1, P]; the optimizer starts fresh."""
        moments = [torch.zeros_like(weights) for _ in range(2 if recipe.optimizer == "adam" else 1)]
        return State(step, weights.clone(), moments, weights.clone(), float("inf"), step)

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
        """This state with its tensors [1, P]."""
        found = replace(self)
        found.leave()
        return found

    def _convert(self, weights: Callable[[Tensor], Tensor], moments: Callable[[Tensor], Tensor]) -> None:
        self.weights, self.best_weights = weights(self.weights), weights(self.best_weights)
        self.moments = [moments(moment) for moment in self.moments]
        if self.kept_weights is not None:
            self.kept_weights = weights(self.kept_weights)


@dataclass
class Job:
    """A network to train from `state.step` on.

    `mask` is bool [M]; weights it prunes must be 0 in `state` and stay 0. `start_step` is the step the
    optimizer started at (its own count begins there; the learning rate is that of the true step); weights
    are copied to `state.kept_weights` when `keep_step` is reached.
    """

    who: Replica
    state: State
    mask: Tensor
    start_step: int = 0
    keep_step: int | None = None


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
    jobs: Sequence[Job],
    recipe: Recipe,
    *,
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
    on_evaluation: Callable[[Sequence[Job]], None] = lambda jobs: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train every job to `recipe.steps`, in place.

    `kernels` is what `engine.paths` chooses by; on a CPU layers with a smaller share of survivors than
    `break_even`, by name, are trained in the compressed domain where there are kernels for it. When
    `should_stop` returns True the states are left as they are, before their last step. Raises Diverged.
    """
    if not jobs:
        return
    paths = choose(kernels, jobs[0].state.weights.device.type)
    for group, compressed in _groups(model, jobs, break_even, paths):
        state = group[0].state
        if compressed:
            state.enter(Layout(model, group[0].mask, compressed, decays=recipe.weight_decay > 0))
        try:
            _fit(model, data, group, recipe, paths, on_evaluation, should_stop)
        finally:
            state.leave()


def prepare(
    model: Model,
    data: Resident,
    jobs: Sequence[Job],
    recipe: Recipe,
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
) -> Steps:
    """What takes the steps of jobs in `fit`, to time it; the state of one job is compressed if that pays."""
    paths = choose(kernels, jobs[0].state.weights.device.type)
    ((group, compressed),) = _groups(model, jobs, break_even, paths)
    if compressed:
        state = group[0].state
        state.enter(Layout(model, group[0].mask, compressed, decays=recipe.weight_decay > 0))
    weights, *moments = _stack([job.state for job in group])
    return _steps(model, data, group, weights, moments, recipe, paths)


def _groups(
    model: Model, jobs: Sequence[Job], break_even: Mapping[str, float] | None, paths: Paths
) -> Iterator[tuple[list[Job], frozenset[str]]]:
    """Who trains together, and which of their layers are compressed: a job's mask alone decides."""
    together = []
    for job in jobs:
        compressed = _compressed(model, job.mask, break_even or {}, paths)
        if compressed or paths.masked_update.takes == "native":
            yield [job], compressed
        else:
            together.append(job)
    if together:
        yield together, frozenset()


def _compressed(model: Model, mask: Tensor, break_even: Mapping[str, float], paths: Paths) -> frozenset[str]:
    """The layers that are trained in the compressed domain."""
    if not compressible(model) or paths.csr_linear.takes not in ("native", "torch"):
        return frozenset()
    kept = model.params.kept(mask)
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


def _takes_vendor(model: Model, paths: Paths) -> bool:
    """Whether dense networks go through `VendorNetwork`, one at a time: they have convolutions."""
    return paths.masked_conv2d.takes == "vendor" and model.convolves


def _fit(
    model: Model,
    data: Resident,
    jobs: list[Job],
    recipe: Recipe,
    paths: Paths,
    on_evaluation: Callable[[Sequence[Job]], None],
    should_stop: Callable[[], bool],
) -> None:
    """Train jobs that take the same way; those that are behind catch up first, then they go on together."""
    while (step := min(job.state.step for job in jobs)) < recipe.steps:
        now = [job for job in jobs if job.state.step == step]
        until = min((job.state.step for job in jobs if job.state.step > step), default=recipe.steps)
        if not _stretch(model, data, now, until, recipe, paths, on_evaluation, should_stop):
            return


class Steps(Protocol):
    """What trains and evaluates R jobs that stand at the same step."""

    state_bytes: int  # gradients, masks and indices
    many: int  # steps that one launch can take

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        """Take `steps` steps from `step` on, and return how many were taken before `should_stop`."""

    def measure(self) -> tuple[list[float], list[float]]:
        """Mean cross-entropy and accuracy on the validation images, each a list of R."""


def _stretch(
    model: Model,
    data: Resident,
    jobs: list[Job],
    until: int,
    recipe: Recipe,
    paths: Paths,
    on_evaluation: Callable[[Sequence[Job]], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Train jobs that stand at one step to the step `until`; False when stopped before."""
    jobs = sorted(jobs, key=lambda job: (job.start_step, job.who.seed))
    began = time.perf_counter()
    states, r = [job.state for job in jobs], len(jobs)
    weights, *moments = _stack(states)
    steps = _steps(model, data, jobs, weights, moments, recipe, paths)
    for state in states:
        state.bytes = sum(4 * t[:1].numel() for t in (weights, *moments)) + steps.state_bytes // r
    step, taken, spent = states[0].step, 0, 0.0
    keep = {job.keep_step for job in jobs}
    while step < until:
        for job in jobs:
            if job.keep_step == step:
                job.state.kept_weights = job.state.weights.clone()
        ends = [until, step - step % recipe.eval_every + recipe.eval_every]
        end = min([*ends, *(k for k in keep if k is not None and k > step)])
        start = time.perf_counter()
        done = steps.advance(step, end - step, should_stop)
        if weights.is_cuda:
            torch.cuda.synchronize()
        spent, taken, step = spent + time.perf_counter() - start, taken + done, step + done
        for state in states:
            state.step = step
        stopped = step < end
        if not stopped and (step % recipe.eval_every == 0 or step == recipe.steps):
            losses, accuracies = steps.measure()
            _check_finite(jobs, weights, moments, losses)
            for job, loss, accuracy in zip(jobs, losses, accuracies, strict=True):
                _evaluated(job, loss, accuracy)
                job.state.pace.append(spent / (r * taken))
        if stopped or step == until or step % recipe.eval_every == 0:
            now = time.perf_counter()
            for state in states:
                state.seconds += (now - began) / r
                state.step_seconds += spent / r
            began, taken, spent = now, 0, 0.0
        if stopped:
            return False
        if step % recipe.eval_every == 0 or step == recipe.steps:
            on_evaluation(jobs)
            began = time.perf_counter()
    return True


def _stack(states: list[State]) -> list[Tensor]:
    """Weights and moments [R, P], of which the states' own become rows; likewise the best weights."""
    if len(states) == 1:
        return [states[0].weights, *states[0].moments]
    weights = torch.cat([state.weights for state in states])
    best = torch.cat([state.best_weights for state in states])
    moments = [torch.cat(rows) for rows in zip(*(state.moments for state in states), strict=True)]
    for r, state in enumerate(states):
        row = slice(r, r + 1)
        state.weights, state.best_weights = weights[row], best[row]
        state.moments = [moment[row] for moment in moments]
    return [weights, *moments]


def _evaluated(job: Job, loss: float, accuracy: float) -> None:
    who, state = job.who, job.state
    state.evaluations.append(
        {
            "seed": who.seed,
            "arm": who.arm,
            "level": who.level,
            "draw": who.draw,
            "step": state.step,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
        }
    )
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        state.best_weights.copy_(state.weights)


def _check_finite(jobs: list[Job], weights: Tensor, moments: list[Tensor], losses: list[float]) -> None:
    finite = torch.stack([t.isfinite().all(1) for t in (weights, *moments)]).all(0).tolist()
    for job, loss, good in zip(jobs, losses, finite, strict=True):
        if not (loss < DIVERGED_LOSS and good):
            raise Diverged(
                f"{job.who}: training diverged before step {job.state.step} (validation loss {loss:g}, "
                f"weights up to {job.state.weights.abs().max():g}); use a smaller --lr"
            )


def _steps(
    model: Model,
    data: Resident,
    jobs: list[Job],
    weights: Tensor,
    moments: list[Tensor],
    recipe: Recipe,
    paths: Paths,
) -> Steps:
    if jobs[0].state.layout is not None:
        return Compressed(model, data, jobs[0], recipe, paths)
    mask = torch.stack([job.mask for job in jobs])
    if paths.masked_update.takes == "triton":
        starts = [job.start_step for job in jobs]
        who = [job.who for job in jobs]
        return Replay(model, data, who, weights, moments, mask, recipe, starts, paths)
    return _Dense(model, data, jobs, weights, moments, mask, recipe, paths)


class _Dense:
    """R replicas through `Network`, or one through `VendorNetwork`."""

    many = 1

    def __init__(
        self,
        model: Model,
        data: Resident,
        jobs: list[Job],
        weights: Tensor,
        moments: list[Tensor],
        mask: Tensor,
        recipe: Recipe,
        paths: Paths,
    ) -> None:
        self.data, self.recipe = data, recipe
        self.grad = torch.zeros_like(weights)
        self.batches = Batches(data, [job.who for job in jobs], recipe.batch_size)
        self.network: Network | VendorNetwork
        vendor = _takes_vendor(model, paths)
        if vendor:
            self.network = VendorNetwork(model, weights, self.grad)
        else:
            self.network = Network(model, weights, recipe.batch_size, self.grad)
        self.updates: list[tuple[int, Step]] = []  # the optimizer's first step, and its update
        self.state_bytes = 4 * self.grad.numel()
        rows, n = 0, model.params.trained_size
        for start, some in groupby(jobs, lambda job: job.start_step):
            span = slice(rows, rows := rows + len([*some]))
            full = bool((mask[span].sum(1) == model.params.prunable).all())
            update, size = _updater(
                *(weights[span, :n], self.grad[span, :n], [moment[span, :n] for moment in moments]),
                *(None if full else mask[span], recipe, paths),
            )
            self.updates.append((start, update))
            self.state_bytes += size
        # replicas of one seed share their validation images; a seed's rows lie side by side in a span
        self.evaluators: list[tuple[int, Evaluator]] = []
        rows = 0
        for (_, seed), some in groupby(jobs, lambda job: (job.start_step, job.who.seed)):
            span = slice(rows, rows := rows + len([*some]))
            self.evaluators.append((seed, Evaluator(model, weights[span], vendor)))

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        for i in range(steps):
            if should_stop():
                return i
            x, y = self.batches.at(step + i)
            self.network.backward(cross_entropy_grad(self.network.forward(x), y))
            for start, update in self.updates:
                update(step + i - start + 1, self.recipe.lr_at(step + i))
        return steps

    def measure(self) -> tuple[list[float], list[float]]:
        losses, accuracies = list[float](), list[float]()
        for seed, evaluator in self.evaluators:
            found = evaluator.measure(self.data.validation(seed))
            losses += found[0]
            accuracies += found[1]
        return losses, accuracies


class Compressed:
    """One replica in the compressed domain."""

    many = 1

    def __init__(self, model: Model, data: Resident, job: Job, recipe: Recipe, paths: Paths) -> None:
        state, layout = job.state, job.state.layout
        assert layout is not None
        self.data, self.job, self.recipe = data, job, recipe
        self.steps = CompressedSteps(
            model, layout, state.weights, data, job.who, recipe, paths.csr_linear.takes
        )
        mask = layout.mask(job.mask)
        self.update, size = _updater(
            *(state.weights, self.steps.grad, state.moments),
            *(None if mask.all() else mask, recipe, paths),
        )
        self.state_bytes = 4 * self.steps.grad.numel() + self.steps.index_bytes + size

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        for i in range(steps):
            if should_stop():
                return i
            self.steps.gradients(step + i)
            self.update(step + i - self.job.start_step + 1, self.recipe.lr_at(step + i))
        return steps

    def measure(self) -> tuple[list[float], list[float]]:
        return self.steps.measure(self.data.validation(self.job.who.seed))


def _updater(
    weights: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    mask: Tensor | None,
    recipe: Recipe,
    paths: Paths,
) -> tuple[Step, int]:
    """The masked update, as a function of the optimizer's own step, from 1, and the learning rate.

    Beside it the bytes of its mask; `mask` None means that nothing is pruned.
    """
    if (
        not weights.is_contiguous()
    ):  # with running statistics behind each row; torch's update knows no strides
        rows = [slice(r, r + 1) for r in range(len(weights))]
        each = [
            _updater(
                *(weights[row], grad[row], [moment[row] for moment in moments]),
                *(None if mask is None else mask[row], recipe, paths),
            )
            for row in rows
        ]

        def update_each(step: int, lr: float) -> None:
            for one, _ in each:
                one(step, lr)

        return update_each, sum(size for _, size in each)
    adam, momentum, decay = recipe.optimizer == "adam", recipe.momentum, recipe.weight_decay
    if paths.masked_update.takes == "torch":
        live = None if mask is None else mask.to(weights)
        count = torch.zeros((), device=weights.device, dtype=torch.float32)

        def update(step: int, lr: float) -> None:
            if adam:
                masked_adam(weights, grad, live, moments, count.fill_(step), lr, decay)
            else:
                masked_sgd(weights, grad, live, moments[0], lr, momentum, decay)

        return update, 0 if live is None else 4 * live.numel()
    bits = None if mask is None else _bits(mask, weights)
    size = 0 if bits is None else bits.numel()
    if adam:
        first, second = moments
        return bind_masked_adam(weights, grad, (first, second), bits, weight_decay=decay), size
    buffer = moments[0] if momentum else None
    return bind_masked_sgd(weights, grad, buffer, bits, momentum=momentum, weight_decay=decay), size


def _bits(mask: Tensor, weights: Tensor) -> Tensor:
    """The packed mask of a whole buffer: what follows the weights is not pruned."""
    every = torch.ones(weights.shape, dtype=torch.bool, device=weights.device)
    every[:, : mask.shape[1]] = mask
    found: Tensor = bitmask.pack(every)
    return found


def scores(
    model: Model,
    data: Resident,
    jobs: Sequence[Job],
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
) -> list[tuple[float, float]]:
    """Test accuracy of every job at early stop and at the end; the rest as in `fit`."""
    chunks, found = data.test(), dict[int, tuple[float, float]]()
    paths = choose(kernels, jobs[0].state.weights.device.type)
    for group, compressed in _groups(model, jobs, break_even, paths):
        pairs = []
        for name in ("best_weights", "weights"):
            weights = torch.cat([getattr(job.state, name) for job in group])
            if compressed:
                layout = Layout(model, group[0].mask, compressed)
                evaluator = CompressedEvaluator(
                    model, layout, layout.compress(weights), paths.csr_linear.takes
                )
                pairs.append(evaluator.measure(chunks)[1])
            elif pairs and all(torch.equal(j.state.best_weights, j.state.weights) for j in group):
                pairs.append(pairs[0])
            else:
                pairs.append(Evaluator(model, weights, _takes_vendor(model, paths)).measure(chunks)[1])
        found |= {id(job): pair for job, *pair in zip(group, *pairs, strict=True)}  # type: ignore[misc]
    return [found[id(job)] for job in jobs]
