"""Cells that train a network each: from a checkpoint or their start to a ticket file and a line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselth import tickets
from sparselth.config import Cell, Recipe
from sparselth.engine.state import Job, State, Stopped
from sparselth.errors import SparselthError
from sparselth.experiments.base import Diverged, Finished, Place
from sparselth.files import ARRAYS_BYTES, Arrays, load_arrays, save_arrays
from sparselth.frozen import METHODS, Frozen
from sparselth.models import Model
from sparselth.runs import cell_path, checkpoint_path
from sparselth.train import accuracies_on_test, fit, is_done

CHECKPOINT_SECONDS = 60.0  # at the next evaluation
PAUSE_SECONDS = 120.0  # where none comes, because steps are long: between two steps
CHECKPOINT_BYTES = 1 << 28  # beside weights: evaluations, a line each


def job(
    cell: Cell,
    place: Place,
    recipe: Recipe,
    start: tuple[Tensor, Tensor],
    start_step: int,
    keep_step: int | None,
    frozen: Frozen | None = None,
) -> Job:
    """A cell as it stands: at its checkpoint, or at its start, a mask [M] and weights [P] before the mask.

    With `frozen` the weights are scores, and the mask is full.
    """
    assert place.data is not None
    (mask, weights), device = start, place.data.device
    if place.team:
        place.team.follow(mask, weights)
    weights[: len(mask)] *= mask
    generations = None
    if frozen is not None and METHODS[frozen.method].has_generations:
        generations = torch.zeros(1, len(mask), dtype=torch.int32, device=device)
    state = State.start(weights[None].to(device), recipe, start_step, generations)
    if (checkpoint := checkpoint_path(place.run, cell)).exists():
        with suppress(SparselthError):  # what is none is as good as nothing: the cell begins again
            found = _load_state(checkpoint, device, 32 * weights.numel() + CHECKPOINT_BYTES)
            state = found if _goes_on(found, state, recipe, keep_step) else state
    return Job(cell, state, mask.to(device), start_step, keep_step, frozen=frozen, team=place.team)


Finish = Callable[[Model, Job, Place, dict[str, Any], float, float], Finished]


def finished(
    model: Model, job: Job, place: Place, where: dict[str, Any], at_early_stop: float, final: float
) -> Finished:
    """Write the ticket file of a trained network, and say what was found; accuracies are on the test."""
    state, mask, params = job.state, job.mask.cpu(), model.params
    rewound = None if state.kept_weights is None else state.kept_weights[0].cpu().numpy()
    content = tickets.Content(mask.numpy(), state.weights[0].cpu().numpy(), rewound)
    tickets.save(cell_path(place.run, job.who), params, content, **where | {"cell": job.who.key})
    return told(model, job, params.kept(mask), at_early_stop, final)


def told(model: Model, job: Job, kept: dict[str, int], at_early_stop: float, final: float) -> Finished:
    """What a trained network found, with `kept` weights of every tensor."""
    state, params = job.state, model.params
    return Finished(
        job.who,
        {
            "weights_remaining": sum(kept.values()) / params.prunable,
            "kept": kept,
            "early_stop_step": state.best_step,
            "validation_loss_at_early_stop": state.best_loss,
            "accuracy_at_early_stop": at_early_stop,
            "final_accuracy": final,
            "state_bytes": state.bytes,
            "dense_state_bytes": 4 * params.size * (2 + len(state.moments)),
        },
        state.evaluations,
        {
            "train_seconds": state.seconds,
            "step_seconds": statistics.median(state.pace) if state.pace else 0.0,
            "clock": "wall" if state.weights.is_cuda else "processor",
        },
    )


def train(
    model: Model,
    jobs: Sequence[Job],
    recipe: Recipe,
    kernels: str,
    place: Place,
    where: dict[str, Any],
    finish: Finish = finished,
) -> list[Finished | Diverged] | None:
    """Train cells together and write their files; None when stopped, after checkpoints were written.

    `where` they come from is what their files say of it, beside the cell; `finish` writes one and reports. Of
    a team who leads does both, and masks and weights are checked to be the same on all before and after.
    """
    assert place.data is not None
    saved, asked, paused = time.monotonic(), 0, False

    def save(some: Sequence[Job]) -> None:
        nonlocal saved
        for job in some if place.leads else ():
            if job.diverged is None:
                save_state(checkpoint_path(place.run, job.who), job.state.expanded(), where)
        saved = time.monotonic()

    def evaluated(some: Sequence[Job]) -> None:
        place.evaluated(some)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(some)

    def overdue() -> bool:
        """Whether to save before the next step; at least one step is taken in between."""
        nonlocal asked, paused
        asked += 1
        paused = asked > 1 and time.monotonic() - saved > PAUSE_SECONDS
        if place.team:
            paused = place.team.agree(paused)
        return paused

    _check_teams(jobs)
    while not all(is_done(job, recipe) for job in jobs):
        asked, paused = 0, False
        fit(
            model,
            place.data,
            jobs,
            recipe,
            kernels=kernels,
            break_even=place.break_even,
            on_evaluation=evaluated,
            should_stop=place.should_stop,
            should_pause=overdue,
        )
        if not all(is_done(job, recipe) for job in jobs):
            save(jobs)
            if not paused or place.should_stop():
                return None
    going = [job for job in jobs if job.diverged is None]
    _check_teams(going)
    try:
        accuracies = accuracies_on_test(
            model, place.data, going, kernels, place.break_even, place.should_stop
        )
    except Stopped:
        save(jobs)
        return None
    if not place.leads:
        return []
    pairs = zip(going, accuracies, strict=True)
    return [
        *(Diverged(job.who, job.diverged) for job in jobs if job.diverged),
        *(finish(model, job, place, where, *pair) for job, pair in pairs),
    ]


def _check_teams(jobs: Sequence[Job]) -> None:
    """Raise SparselthError where the workers of a team do not hold the same network."""
    for job in jobs:
        if job.team is not None:
            stand = torch.tensor([job.state.step, job.state.best_step], device="cpu")
            job.team.check(job.who, "mask", [job.mask])
            job.team.check(job.who, "weights", [stand, job.state.weights, *job.state.moments])


def save_state(file: Path, state: State, where: dict[str, Any]) -> None:
    arrays: Arrays = {
        "weights": state.weights.cpu().numpy(),
        "best_weights": state.best_weights.cpu().numpy(),
    }
    arrays |= {f"moments/{i}": moment.cpu().numpy() for i, moment in enumerate(state.moments)}
    if state.kept_weights is not None:
        arrays["kept_weights"] = state.kept_weights.cpu().numpy()
    if state.generations is not None and state.best_generations is not None:
        arrays["generations"] = state.generations.cpu().numpy()
        arrays["best_generations"] = state.best_generations.cpu().numpy()
    header = {
        "schema": "sparselth.checkpoint/1",
        "cell": file.stem,
        "config": where["config"],
        "step": state.step,
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "evaluations": state.evaluations,
        "seconds": state.seconds,
        "step_seconds": state.step_seconds,
        "pace": state.pace,
        "bytes": state.bytes,
    }
    save_arrays(file, arrays, header)


def _load_state(file: Path, device: str, most: int = ARRAYS_BYTES) -> State:
    arrays, header = load_arrays(file, most=most)
    try:
        # cloned: they begin in memory where torch's own do, and MKL rounds by that
        tensors = {name: torch.from_numpy(array).clone().to(device) for name, array in arrays.items()}
        return State(
            header["step"],
            tensors["weights"],
            [tensors[name] for name in sorted(tensors) if name.startswith("moments/")],
            tensors["best_weights"],
            header["best_loss"],
            header["best_step"],
            tensors.get("kept_weights"),
            header["evaluations"],
            header["seconds"],
            header["step_seconds"],
            header["pace"],
            header.get("bytes", 0),
            generations=tensors.get("generations"),
            best_generations=tensors.get("best_generations"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SparselthError(f"{file}: is no checkpoint ({error})") from error


def _goes_on(state: State, start: State, recipe: Recipe, keep_step: int | None) -> bool:
    """Whether a state that was read is one between `start` and the end of training."""
    tensors = [state.weights, state.best_weights, *state.moments]
    tensors += [state.kept_weights] if state.kept_weights is not None else []
    numbers = [state.best_loss, state.seconds, state.step_seconds, state.bytes]
    numbers += state.pace if isinstance(state.pace, list) else [None]
    return (
        all(type(one) is int and start.step <= one <= recipe.steps for one in (state.step, state.best_step))
        and all(type(number) in (int, float) for number in numbers)
        and isinstance(state.evaluations, list)
        and all(isinstance(one, dict) and type(one.get("step")) is int for one in state.evaluations)
        and all(t.dtype == torch.float32 and t.shape == start.weights.shape for t in tensors)
        and len(state.moments) == len(start.moments)
        and _alike(state.generations, start.generations)
        and _alike(state.best_generations, start.best_generations)
        and (keep_step is None or keep_step >= state.step or state.kept_weights is not None)
    )


def _alike(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found.dtype == expected.dtype and found.shape == expected.shape
