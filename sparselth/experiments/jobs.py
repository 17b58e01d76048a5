"""Cells that train a network each: from a checkpoint or their start to a ticket file and a line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselth import tickets
from sparselth.config import Cell, Recipe
from sparselth.engine.state import Job, State
from sparselth.errors import SparselthError
from sparselth.experiments.base import Finished, Place
from sparselth.files import Arrays, load_arrays, save_arrays
from sparselth.models import Model
from sparselth.runs import cell_path, checkpoint_path
from sparselth.train import accuracies_on_test, fit

CHECKPOINT_SECONDS = 60.0
CHECKPOINT_BYTES = 1 << 28  # beside weights: evaluations, a line each


def job(
    cell: Cell,
    place: Place,
    recipe: Recipe,
    start: tuple[Tensor, Tensor],
    start_step: int,
    keep_step: int | None,
) -> Job:
    """A cell as it stands: at its checkpoint, or at its start, a mask [M] and weights [P] before the mask."""
    assert place.data is not None
    (mask, weights), device = start, place.data.device
    weights[: len(mask)] *= mask
    state = State.start(weights[None], recipe, start_step)
    if (checkpoint := checkpoint_path(place.run, cell)).exists():
        with suppress(SparselthError):  # what is none is as good as nothing: the cell begins again
            state = _load_state(checkpoint, state, recipe, keep_step)
    return Job(cell, _moved(state, device), mask.to(device), start_step, keep_step)


def train(
    model: Model, jobs: Sequence[Job], recipe: Recipe, kernels: str, place: Place, where: dict[str, Any]
) -> list[Finished] | None:
    """Train cells together and write their files; None when stopped, after checkpoints were written.

    `where` they come from is what their files say of it, beside the cell.
    """
    assert place.data is not None
    saved = time.monotonic()

    def evaluated(some: Sequence[Job]) -> None:
        nonlocal saved
        place.evaluated(some)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            for job in some:
                _save_state(checkpoint_path(place.run, job.who), job.state.expanded(), where)
            saved = time.monotonic()

    fit(
        model,
        place.data,
        jobs,
        recipe,
        kernels=kernels,
        break_even=place.break_even,
        on_evaluation=evaluated,
        should_stop=place.should_stop,
    )
    if any(job.state.step < recipe.steps for job in jobs):
        for job in jobs:
            _save_state(checkpoint_path(place.run, job.who), job.state, where)
        return None
    accuracies = accuracies_on_test(model, place.data, jobs, kernels, place.break_even)
    return [_finished(model, job, place, where, *pair) for job, pair in zip(jobs, accuracies, strict=True)]


def _finished(
    model: Model, job: Job, place: Place, where: dict[str, Any], at_early_stop: float, final: float
) -> Finished:
    state, mask, params = job.state, job.mask.cpu(), model.params
    rewound = None if state.kept_weights is None else state.kept_weights[0].cpu().numpy()
    content = tickets.Content(mask.numpy(), state.weights[0].cpu().numpy(), rewound)
    tickets.save(cell_path(place.run, job.who), params, content, **where | {"cell": job.who.key})
    kept = params.kept(mask)
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
            "step_seconds": statistics.median(state.pace),
            "clock": "wall" if state.weights.is_cuda else "processor",
        },
    )


def _save_state(file: Path, state: State, where: dict[str, Any]) -> None:
    arrays: Arrays = {
        "weights": state.weights.cpu().numpy(),
        "best_weights": state.best_weights.cpu().numpy(),
    }
    arrays |= {f"moments/{i}": moment.cpu().numpy() for i, moment in enumerate(state.moments)}
    if state.kept_weights is not None:
        arrays["kept_weights"] = state.kept_weights.cpu().numpy()
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
    }
    save_arrays(file, arrays, header)


def _moved(state: State, device: str) -> State:
    state.weights, state.best_weights = state.weights.to(device), state.best_weights.to(device)
    state.moments = [moment.to(device) for moment in state.moments]
    state.kept_weights = None if state.kept_weights is None else state.kept_weights.to(device)
    return state


def _load_state(file: Path, start: State, recipe: Recipe, keep_step: int | None) -> State:
    """The state in a checkpoint of a cell that begins at `start`; SparselthError where it is none of such."""
    arrays, header = load_arrays(file, most=32 * start.weights.numel() + CHECKPOINT_BYTES)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    right = _is_state(header, start, recipe)
    names = {"weights", "best_weights", *(f"moments/{i}" for i in range(len(start.moments)))}
    if right and keep_step is not None and keep_step < header["step"]:
        names.add("kept_weights")
    fitting = {
        name for name, t in tensors.items() if t.dtype == torch.float32 and t.shape == start.weights.shape
    }
    if not right or not names <= fitting or fitting != tensors.keys():
        raise SparselthError(f"{file}: is no checkpoint of this cell")
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
    )


def _is_state(header: dict[str, Any], start: State, recipe: Recipe) -> bool:
    """Whether a header holds the numbers of a state between `start` and the end of training."""
    names = ("step", "best_step", "best_loss", "seconds", "step_seconds", "evaluations", "pace")
    step, best, loss, seconds, stepping, evaluations, pace = (header.get(name) for name in names)
    numbers = [loss, seconds, stepping, *(pace if isinstance(pace, list) else [None])]
    return (
        all(type(one) is int and start.step <= one <= recipe.steps for one in (step, best))
        and all(type(number) in (int, float) for number in numbers)
        and isinstance(evaluations, list)
        and all(isinstance(one, dict) and type(one.get("step")) is int for one in evaluations)
    )
