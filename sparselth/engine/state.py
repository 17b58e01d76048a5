"""A network's training at one step, jobs to go on from there, a batch of them, and what takes its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Chunk, Resident
from sparselth.engine.layout import Layout
from sparselth.engine.memory import Held
from sparselth.engine.paths import Paths
from sparselth.engine.team import Team
from sparselth.frozen import Frozen, effective
from sparselth.models import Model


@dataclass
class State:
    """One network's training at one step: all that is needed to go on to the same bits.

    P = `model.params.size`, running statistics of batch norms among the weights. While `layout` is set,
    training goes on in the compressed domain and the tensors are [1, layout.size]; in a batch they are rows
    of the batch's tensors.

    Of a job whose weights are frozen, `weights` holds scores in their place (`sparselth.frozen`).
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
    step_seconds: float = 0.0  # those that steps took, processor time on a CPU
    pace: list[float] = field(default_factory=list)  # of these a step, between one evaluation and the next
    bytes: int = 0  # weights, gradients, optimizer state, masks and indices while training
    layout: Layout | None = None
    # of frozen weights that change between steps, int32 [1, M]: how often each was redrawn, or whose it is
    generations: Tensor | None = None
    best_generations: Tensor | None = None

    @staticmethod
    def start(weights: Tensor, recipe: Recipe, step: int = 0, generations: Tensor | None = None) -> State:
        """The state before the first update, from weights [1, P]; the optimizer starts fresh."""
        moments = [torch.zeros_like(weights) for _ in range(2 if recipe.optimizer == "adam" else 1)]
        found = State(step, weights.clone(), moments, weights.clone(), float("inf"), step)
        if generations is not None:
            found.generations, found.best_generations = generations.clone(), generations.clone()
        return found

    def keep_best(self, loss: float) -> None:
        """Copy what the evaluation of minimum loss looked at."""
        self.best_loss, self.best_step = loss, self.step
        self.best_weights.copy_(self.weights)
        if self.generations is not None and self.best_generations is not None:
            self.best_generations.copy_(self.generations)

    @property
    def is_best(self) -> bool:
        """Whether the network is that of the evaluation of minimum loss."""
        pairs = (self.best_weights, self.weights), (self.best_generations, self.generations)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

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

    def part(self) -> None:
        """Leave the tensors of a batch, which then can be let go."""
        self.weights, self.best_weights = self.weights.clone(), self.best_weights.clone()
        self.moments = [moment.clone() for moment in self.moments]

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
    are copied to `state.kept_weights` when `keep_step` is reached. A job that diverges says why, and its
    state stays where it was noticed. With `frozen` scores are trained, and no weights; then the mask is full.
    Its data order and all else that training draws are those of `draws`, where that is not who it is. Where a
    `team` trains it, all workers of that have it, and take its steps at one time.
    """

    who: Cell
    state: State
    mask: Tensor
    start_step: int = 0
    keep_step: int | None = None
    diverged: str | None = None
    frozen: Frozen | None = None
    draws: Cell | None = None
    team: Team | None = None

    @property
    def drawn(self) -> Cell:
        """Whose random streams its training has."""
        return self.draws or self.who

    def network(self, model: Model, best: bool = False) -> Tensor:
        """The weights [1, P] that its network computes with now, or at the evaluation of minimum loss."""
        state = self.state
        weights = state.best_weights if best else state.weights
        if self.frozen is None:
            return weights
        generations = state.best_generations if best else state.generations
        some = None if generations is None else generations[0]
        return effective(self.frozen, model.params, weights[0], some)[None]


class Batch:
    """R jobs that stand at one step and train together: from now on their states are rows of its tensors.

    Jobs of one start step lie side by side, and among them those of one seed.
    """

    def __init__(
        self, model: Model, data: Resident, jobs: Iterable[Job], recipe: Recipe, paths: Paths
    ) -> None:
        self.model, self.data, self.recipe, self.paths = model, data, recipe, paths
        self.jobs = sorted(jobs, key=lambda job: (job.start_step, job.who.seed))
        self.who = [job.drawn for job in self.jobs]
        self.weights, *self.moments = _stack([job.state for job in self.jobs])  # each [R, P]

    @property
    def mask(self) -> Tensor:
        """bool [R, M]."""
        return torch.stack([job.mask for job in self.jobs])

    def held(self, gradients: object, images: object) -> Held:
        """What its tensors, and the gradients and images of an engine, are to memory."""
        states = [job.state for job in self.jobs]
        kept = [(state.best_weights, state.kept_weights) for state in states], [job.mask for job in self.jobs]
        layout = [state.layout for state in states]
        return Held(self.weights, gradients, self.moments, layout, (self.data, images), kept)


class Stopped(Exception):
    """An evaluation was left, because `should_stop` said so."""


def never() -> bool:
    """Do not stop."""
    return False


class Steps(Protocol):
    """An engine: what trains and evaluates the R jobs of a batch."""

    state_bytes: int  # gradients, masks and indices
    many: int  # steps that one launch can take

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        """Take `steps` steps from `step` on, and return how many were taken before `should_stop`."""

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        """Mean cross-entropy and accuracy on the validation images, each a list of R.

        Raises Stopped where `should_stop` says so between two chunks of the images.
        """

    def memory(self) -> Held:
        """What it keeps between two steps; what is left of the last one is let go."""


class Forward(Protocol):
    """R networks of fixed weights."""

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and number of right answers of images x [1, K, B] with labels y [1, 1, B].

        Each is float64 [R].
        """


def measure(
    forward: Forward, chunks: Sequence[Chunk], should_stop: Callable[[], bool] = never
) -> tuple[list[float], list[float]]:
    """Mean cross-entropy and accuracy of R networks that all see the same images, each a list of R.

    Raises Stopped where `should_stop` says so between two chunks.
    """
    sums = []
    for x, y in chunks:
        if should_stop():
            raise Stopped
        sums.append(forward.sums(x, y))
    total = sum(x.shape[2] for x, _ in chunks)
    loss, right = (sum(values[1:], values[0]) / total for values in zip(*sums, strict=True))
    return loss.tolist(), right.tolist()


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
