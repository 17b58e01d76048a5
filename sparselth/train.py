"""Training jobs, one network each: the loop and early stop; nothing about tickets.

Early stop is the evaluation of minimum validation loss, found afterwards: training always runs its
full budget and keeps a copy of the best weights so far (Frankle & Carbin 2019, section 2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from sparselth.config import Recipe
from sparselth.data.batches import Resident
from sparselth.engine.choose import Group, groups, steps
from sparselth.engine.state import Batch, Job
from sparselth.errors import SparselthError
from sparselth.models import Model

DIVERGED_LOSS = 1e6  # a network that knows nothing loses ln(classes)


class Diverged(SparselthError):
    """A replica's loss is absurd, or its loss, weights or moments are not finite."""


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

    `kernels` and `break_even` choose the engines (`engine.choose.groups`). When `should_stop` returns True
    the states are left as they are, before their last step. Raises Diverged.
    """
    if not jobs:
        return
    for group in groups(model, jobs, kernels, break_even):
        group.enter(recipe)
        try:
            _fit(group, data, recipe, on_evaluation, should_stop)
        finally:
            group.leave()


def _fit(
    group: Group,
    data: Resident,
    recipe: Recipe,
    on_evaluation: Callable[[Sequence[Job]], None],
    should_stop: Callable[[], bool],
) -> None:
    """Train jobs that take the same way; those that are behind catch up first, then they go on together."""
    jobs = group.jobs
    while (step := min(job.state.step for job in jobs)) < recipe.steps:
        now = [job for job in jobs if job.state.step == step]
        until = min((job.state.step for job in jobs if job.state.step > step), default=recipe.steps)
        batch = Batch(group.model, data, now, recipe, group.paths)
        if not _stretch(batch, until, on_evaluation, should_stop):
            return


def _stretch(
    batch: Batch,
    until: int,
    on_evaluation: Callable[[Sequence[Job]], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Train a batch to the step `until`; False when stopped before."""
    began = time.perf_counter()
    jobs, recipe, weights = batch.jobs, batch.recipe, batch.weights
    states, r = [job.state for job in jobs], len(jobs)
    # what steps take on a CPU does not count who else has its cores
    clock = time.perf_counter if weights.is_cuda else time.process_time
    engine = steps(batch)
    for state in states:
        state.bytes = sum(4 * t[:1].numel() for t in (weights, *batch.moments)) + engine.state_bytes // r
    step, taken, spent = states[0].step, 0, 0.0
    keep = {job.keep_step for job in jobs}
    while step < until:
        for job in jobs:
            if job.keep_step == step:
                job.state.kept_weights = job.state.weights.clone()
        ends = [until, step - step % recipe.eval_every + recipe.eval_every]
        end = min([*ends, *(k for k in keep if k is not None and k > step)])
        start = clock()
        done = engine.advance(step, end - step, should_stop)
        if weights.is_cuda:
            torch.cuda.synchronize()
        spent, taken, step = spent + clock() - start, taken + done, step + done
        for state in states:
            state.step = step
        stopped = step < end
        if not stopped and (step % recipe.eval_every == 0 or step == recipe.steps):
            losses, accuracies = engine.measure()
            _check_finite(batch, losses)
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


def _check_finite(batch: Batch, losses: list[float]) -> None:
    finite = torch.stack([t.isfinite().all(1) for t in (batch.weights, *batch.moments)]).all(0).tolist()
    for job, loss, good in zip(batch.jobs, losses, finite, strict=True):
        if not (loss < DIVERGED_LOSS and good):
            raise Diverged(
                f"{job.who}: training diverged before step {job.state.step} (validation loss {loss:g}, "
                f"weights up to {job.state.weights.abs().max():g}); use a smaller `lr`"
            )


def accuracies_on_test(
    model: Model,
    data: Resident,
    jobs: Sequence[Job],
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
) -> list[tuple[float, float]]:
    """Test accuracy of every job at early stop and at the end; the rest as in `fit`."""
    chunks, found = data.test(), dict[int, tuple[float, float]]()
    for group in groups(model, jobs, kernels, break_even):
        states = [job.state for job in group.jobs]
        _, best = group.measure(torch.cat([state.best_weights for state in states]), chunks)
        last = best
        if not all(torch.equal(state.best_weights, state.weights) for state in states):
            _, last = group.measure(torch.cat([state.weights for state in states]), chunks)
        found |= {id(job): pair for job, pair in zip(group.jobs, zip(best, last, strict=True), strict=True)}
    return [found[id(job)] for job in jobs]
