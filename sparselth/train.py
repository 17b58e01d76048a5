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
from sparselth.engine.choose import Group, groups, images_of_test, steps
from sparselth.engine.state import Batch, Job, Stopped, never
from sparselth.models import Model
from sparselth.models.module import ModuleModel

DIVERGED_LOSS = 1e6  # of cross-entropy: a network that knows nothing loses ln(classes)


def fit(
    model: Model,
    data: Resident,
    jobs: Sequence[Job],
    recipe: Recipe,
    *,
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
    on_evaluation: Callable[[Sequence[Job]], None] = lambda jobs: None,
    should_stop: Callable[[], bool] = never,
    should_pause: Callable[[], bool] = never,
) -> None:
    """Train every job to `recipe.steps`, in place.

    `kernels` and `break_even` choose the engines (`engine.choose.groups`). When `should_stop` returns True
    the states are left as they are, before their next step or evaluation; `should_pause` is asked between
    steps alone. A job whose loss is absurd, or whose loss, weights or moments are not finite, has diverged:
    `Job.diverged` says so, and the others go on.
    """
    if not jobs:
        return
    for group in groups(model, jobs, kernels, break_even, data):
        group.enter(recipe)
        try:
            _fit(group, data, recipe, on_evaluation, should_stop, lambda: should_stop() or should_pause())
        finally:
            group.leave()


def is_done(job: Job, recipe: Recipe) -> bool:
    """Whether `fit` has nothing left to do for a job."""
    return job.diverged is not None or (job.state.step >= recipe.steps and not _is_due(job, recipe))


def _fit(
    group: Group,
    data: Resident,
    recipe: Recipe,
    on_evaluation: Callable[[Sequence[Job]], None],
    should_stop: Callable[[], bool],
    leaves: Callable[[], bool],
) -> None:
    """Train jobs that take the same way; those that are behind catch up first, then they go on together."""
    while jobs := [job for job in group.jobs if not is_done(job, recipe)]:
        stands = [(job.state.step, not _is_due(job, recipe)) for job in jobs]
        first = min(stands)
        now = [job for job, at in zip(jobs, stands, strict=True) if at == first]
        until = min((at[0] for at in stands if at > first), default=recipe.steps)
        batch = Batch(group.model, data, now, recipe, group.paths)
        if not _stretch(batch, until, on_evaluation, should_stop, leaves):
            return


def _evaluates(recipe: Recipe, step: int) -> bool:
    """Whether networks are evaluated after so many steps."""
    return step % recipe.eval_every == 0 or step == recipe.steps


def _is_due(job: Job, recipe: Recipe) -> bool:
    """Whether a job was stopped between its last step and the evaluation behind it."""
    state = job.state
    evaluated = state.evaluations[-1]["step"] if state.evaluations else job.start_step
    return state.step > evaluated and _evaluates(recipe, state.step)


def _stretch(
    batch: Batch,
    until: int,
    on_evaluation: Callable[[Sequence[Job]], None],
    should_stop: Callable[[], bool],
    leaves: Callable[[], bool],
) -> bool:
    """Train a batch to the step `until`, or until one of its jobs diverges; False when stopped before.

    `leaves` is asked between steps, `should_stop` within an evaluation.
    """
    began = time.perf_counter()
    jobs, recipe, weights = batch.jobs, batch.recipe, batch.weights
    states, r = [job.state for job in jobs], len(jobs)
    # what steps take on a CPU does not count who else has its cores
    clock = time.perf_counter if weights.is_cuda else time.process_time
    engine = steps(batch)
    for state in states:
        state.bytes = sum(4 * t[:1].numel() for t in (weights, *batch.moments)) + engine.state_bytes // r
    step, taken, spent = states[0].step, 0, 0.0
    keep, due = {job.keep_step for job in jobs}, _is_due(jobs[0], recipe)
    while due or step < until:
        stopped = False
        if not due:
            for job in jobs:
                if job.keep_step == step:
                    job.state.kept_weights = job.state.weights.clone()
            ends = [until, step - step % recipe.eval_every + recipe.eval_every]
            end = min([*ends, *(k for k in keep if k is not None and k > step)])
            start = clock()
            done = engine.advance(step, end - step, leaves)
            if weights.is_cuda:
                torch.cuda.synchronize()
            spent, taken, step = spent + clock() - start, taken + done, step + done
            for state in states:
                state.step = step
            stopped = step < end
            if due := not stopped and _evaluates(recipe, step):
                for state in states:
                    state.pace.append(spent / (r * taken))
        if due:
            try:
                losses, accuracies = engine.measure(should_stop)
            except Stopped:
                stopped = True
            else:
                _find_diverged(batch, losses)
                for job, loss, accuracy in zip(jobs, losses, accuracies, strict=True):
                    if job.diverged is None:
                        _evaluated(job, loss, accuracy)
        if stopped or due or step == until:
            now = time.perf_counter()
            for state in states:
                state.seconds += (now - began) / r
                state.step_seconds += spent / r
            began, taken, spent = now, 0, 0.0
        if stopped:
            return False
        if due:
            due, going = False, [job for job in jobs if job.diverged is None]
            if going:
                on_evaluation(going)
            if len(going) < r:
                return True
            began = time.perf_counter()
    return True


def _find_diverged(batch: Batch, losses: list[float]) -> None:
    """Mark the jobs that have diverged."""
    # buffers of a module may be infinite from the first, as masks of attention are
    n = batch.model.params.trained_size if isinstance(batch.model, ModuleModel) else batch.weights.shape[1]
    own = isinstance(batch.model, ModuleModel) and batch.model.loss is not None  # whose scale is the user's
    most = float("inf") if own else DIVERGED_LOSS
    finite = (
        torch.stack([t[:, :n].isfinite().all(1) for t in (batch.weights, *batch.moments)]).all(0).tolist()
    )
    for job, loss, good in zip(batch.jobs, losses, finite, strict=True):
        if not (loss < most and good):
            job.diverged = (
                f"training diverged before step {job.state.step} (validation loss {loss:g}, "
                f"weights up to {job.state.weights.abs().max():g}); use a smaller `lr`"
            )
            job.state.part()


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
        state.keep_best(loss)


def accuracies_on_test(
    model: Model,
    data: Resident,
    jobs: Sequence[Job],
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
    should_stop: Callable[[], bool] = never,
) -> list[tuple[float, float]]:
    """Test accuracy of every job at early stop and at the end; the rest as in `fit`.

    Raises Stopped where `should_stop` says so between two chunks of the images.
    """
    if not jobs:
        return []
    chunks, found = images_of_test(model, data, kernels), dict[int, tuple[float, float]]()
    for group in groups(model, jobs, kernels, break_even):
        _, best = group.measure(group.networks(best=True), chunks, should_stop)
        last = best
        if not all(job.state.is_best for job in group.jobs):
            _, last = group.measure(group.networks(), chunks, should_stop)
        found |= {id(job): pair for job, pair in zip(group.jobs, zip(best, last, strict=True), strict=True)}
    return [found[id(job)] for job in jobs]
