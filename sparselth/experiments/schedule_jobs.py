"""What cells of `schedule` start from, and pruning within a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselth import pruning, tickets
from sparselth.config import Cell, Recipe
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job
from sparselth.experiments.base import Diverged, Finished, Place
from sparselth.experiments.jobs import job, save_state, train
from sparselth.models import Model
from sparselth.runs import cell_path, checkpoint_path
from sparselth.scores import SCORES
from sparselth.streams import stream
from sparselth.train import fit


class Kind(Protocol):
    """Of `schedule.Plan`, what is needed here."""

    @property
    def schedule(self) -> str: ...
    @property
    def scope(self) -> str: ...


class Schedule(Protocol):
    """Of `schedule.ScheduleConfig`, what is needed here."""

    @property
    def model(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def network(self) -> Model: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def kernels(self) -> str: ...
    @property
    def rewind(self) -> int: ...
    @property
    def plans(self) -> Any: ...
    @property
    def ladders(self) -> dict[str, list[dict[str, int]]]: ...
    @property
    def prune_steps(self) -> list[int]: ...
    def cubic(self, step: int, scope: str) -> dict[str, int]: ...
    def needs(self, cell: Cell) -> tuple[Cell, ...]: ...


def start(config: Schedule, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
    """The mask [M] of a cell, and the weights [P] it starts from."""
    params = config.network.params
    full, plan = params.full_mask(), config.plans.get(cell.arm)
    drawn = init_weights(config.network, stream(cell.seed, "dense", 0, "init"))
    if plan is None or plan.schedule == "cubic":
        return full, drawn
    rung = config.ladders[cell.arm][cell.level]
    if plan.schedule == "erk":
        generator, empty = (
            stream(cell.seed, "erk", 1, "mask"),
            torch.empty(0, device="cpu", dtype=torch.float32),
        )
        found = SCORES["erk"].of(config.network, drawn, full, (empty, empty), generator, start=lambda: drawn)
        size = found - found.min() + 1  # in its order, from 1 on
        return pruning.prune(params, size.float(), full, rung, "reference"), drawn
    before, _ = tickets.read(cell_path(place.run, *config.needs(cell)), params)
    first, _ = tickets.read(cell_path(place.run, Cell(cell.seed, "dense", 0)), params)
    assert first.rewound is not None
    size, mask = torch.from_numpy(before.weights)[: params.mask_size].abs(), torch.from_numpy(before.mask)
    return pruning.prune(params, size, mask, rung, "reference"), torch.from_numpy(first.rewound)


def gradual(config: Schedule, cell: Cell, place: Place) -> list[Finished | Diverged] | None:
    """A network that is pruned as it trains; None when stopped, after a checkpoint was written."""
    model, recipe = config.network, config.recipe
    one = job(cell, place, recipe, start(config, cell, place), 0, None)
    if one.state.step:  # gone on with: zeros lie in the weights
        alive = one.state.weights[0, : len(one.mask)] != 0
        one.mask = one.mask & alive
    where: dict[str, Any] = {
        "model": config.model,
        "dataset": config.dataset,
        "config": config.digest,
        "cell": cell.key,
    }
    where |= {"rewind_step": config.rewind}
    for step in config.prune_steps:
        if step < one.state.step or (step == one.state.step and _evaluated(one, step)):
            continue
        reached = _until(config, one, step, place)
        if one.diverged:
            return [Diverged(cell, one.diverged)]
        if not reached:
            save_state(checkpoint_path(place.run, cell), one.state.expanded(), where)
            return None
        _prune(config, one, config.cubic(step, config.plans[cell.arm].scope))
    return train(model, [one], recipe, config.kernels, place, where)


def _until(config: Schedule, one: Job, step: int, place: Place) -> bool:
    """Train a job up to its evaluation at a step; False when stopped before."""
    assert place.data is not None
    reached = False

    def evaluated(jobs: Sequence[Job]) -> None:
        nonlocal reached
        place.evaluated(jobs)
        reached = jobs[0].state.step >= step

    fit(
        *(config.network, place.data, [one], config.recipe),
        kernels=config.kernels,
        break_even=place.break_even,
        on_evaluation=evaluated,
        should_stop=lambda: reached or place.should_stop(),
    )
    return reached


def _evaluated(one: Job, step: int) -> bool:
    return bool(one.state.evaluations) and one.state.evaluations[-1]["step"] >= step


def _prune(config: Schedule, one: Job, rung: dict[str, int]) -> None:
    """Drop the smallest weights, and what the optimizer knows of them; early stop begins again."""
    params, state = config.network.params, one.state
    size = state.weights[0, : params.mask_size].abs()
    one.mask = pruning.prune(params, size.cpu(), one.mask.cpu(), rung, "reference").to(one.mask.device)
    for tensor in (state.weights, *state.moments):
        tensor[:, : params.mask_size] *= one.mask
    state.best_weights, state.best_loss, state.best_step = state.weights.clone(), float("inf"), state.step
