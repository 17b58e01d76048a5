"""Iterative magnitude pruning with rewinding, and the control arms (Frankle & Carbin 2019; 2020).

    level 0   train the dense network; keep its weights of the rewind step
    level k   prune the trained weights of the ticket at level k - 1, go back to the kept weights,
              train what is left

A control arm at level k needs nothing but the ticket at level k - 1, so it trains beside the ticket of
level k. `ticket` and `random-mask` go on from the rewind step, with the learning rate of that step, a
fresh optimizer and a data order of their own; arms with fresh weights train the full budget from step 0.
One-shot pruning takes every level's mask from the dense network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselth import pruning, tickets
from sparselth.config import FRESH, ImpConfig, Replica
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.paths import choose
from sparselth.experiments.price import needs
from sparselth.files import Arrays, load_arrays, save_arrays
from sparselth.models import Model, get_model
from sparselth.runs import cell_path, checkpoint_path
from sparselth.streams import stream
from sparselth.train import Job, State, fit, scores

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Finished:
    """A trained cell: its line, its evaluations, what it took."""

    who: Replica
    cell: dict[str, Any]
    evaluations: list[dict[str, Any]]
    timings: dict[str, float]  # train_seconds in all; step_seconds, the median; of a batch its share


def train_cells(
    config: ImpConfig,
    run: Path,
    data: Resident,
    cells: Sequence[Replica],
    break_even: Mapping[str, float],
    on_evaluation: Callable[[Sequence[Job]], None] = lambda jobs: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Finished] | None:
    """Train cells together and write their files; None when stopped, after checkpoints were written.

    Reads only files of finished cells and their own checkpoints, so it can run in any process.
    """
    model = get_model(config.model)
    jobs = [_job(config, model, run, who, data.device) for who in cells]
    saved = time.monotonic()

    def evaluated(some: Sequence[Job]) -> None:
        nonlocal saved
        on_evaluation(some)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            for job in some:
                _save_state(checkpoint_path(run, job.who), job.state.expanded())
            saved = time.monotonic()

    fit(
        model,
        data,
        jobs,
        config.recipe,
        kernels=config.kernels,
        break_even=break_even,
        on_evaluation=evaluated,
        should_stop=should_stop,
    )
    if any(job.state.step < config.recipe.steps for job in jobs):
        for job in jobs:
            _save_state(checkpoint_path(run, job.who), job.state)
        return None
    accuracies = scores(model, data, jobs, config.kernels, break_even)
    return [_finish(config, model, run, job, *pair) for job, pair in zip(jobs, accuracies, strict=True)]


def _job(config: ImpConfig, model: Model, run: Path, who: Replica, device: str) -> Job:
    """A cell as it stands: at its checkpoint, or at its start."""
    mask = find_mask(config, model, run, who)
    continued = who.level > 0 and who.arm not in FRESH
    start_step = config.rewind if continued else 0
    checkpoint = checkpoint_path(run, who)
    if checkpoint.exists():
        state = _load_state(checkpoint, device)
    else:
        weights = start_weights(config, model, run, who)
        weights[: model.params.mask_size] *= mask
        state = State.start(weights[None].to(device), config.recipe, start_step)
    return Job(who, state, mask.to(device), start_step, config.rewind if who.level == 0 else None)


def _finish(
    config: ImpConfig, model: Model, run: Path, job: Job, at_early_stop: float, final: float
) -> Finished:
    state, mask = job.state, job.mask.cpu()
    _save_cell(run, config, model, job.who, mask, state)
    kept = model.params.kept(mask)
    return Finished(
        job.who,
        {
            "weights_remaining": sum(kept.values()) / model.params.prunable,
            "kept": kept,
            "early_stop_step": state.best_step,
            "validation_loss_at_early_stop": state.best_loss,
            "accuracy_at_early_stop": at_early_stop,
            "final_accuracy": final,
            "state_bytes": state.bytes,
            "dense_state_bytes": 4 * model.params.size * (2 + len(state.moments)),
        },
        state.evaluations,
        {
            "train_seconds": state.seconds,
            "step_seconds": statistics.median(state.pace),
        },
    )


def find_mask(config: ImpConfig, model: Model, run: Path, who: Replica) -> Tensor:
    """The mask [M] of a cell, from the trained weights of the ticket it needs."""
    source = needs(config, who)
    if source is None:
        return model.params.full_mask()
    before, _ = tickets.read(cell_path(run, source), model.params)
    rungs = pruning.ladder(model.params, who.level, config.rate, config.scope)
    kernels = choose(config.kernels, config.device).magnitude_threshold.takes
    mask = pruning.prune(
        model.params,
        torch.from_numpy(before.weights[: model.params.mask_size]).to(config.device),
        torch.from_numpy(before.mask).to(config.device),
        rungs[who.level],
        "triton" if kernels == "triton" else "reference",
    ).cpu()
    if who.arm.startswith("random-"):
        mask = pruning.shuffle(model.params, mask, stream(who.seed, who.arm, who.level, "mask", who.draw))
    return mask


def start_weights(config: ImpConfig, model: Model, run: Path, who: Replica) -> Tensor:
    """The weights [P] a cell starts from, before its mask."""
    if who.arm in FRESH or who.level == 0:
        return init_weights(model, stream(who.seed, who.arm, who.level, "init", who.draw))
    first, _ = tickets.read(cell_path(run, Replica(who.seed, "ticket", 0)), model.params)
    assert first.rewound is not None
    return torch.from_numpy(first.rewound)


def _save_cell(run: Path, config: ImpConfig, model: Model, who: Replica, mask: Tensor, state: State) -> None:
    kept = None if state.kept_weights is None else state.kept_weights[0].cpu().numpy()
    tickets.save(
        cell_path(run, who),
        model.params,
        tickets.Content(mask.numpy(), state.weights[0].cpu().numpy(), kept),
        model=config.model,
        dataset=config.dataset,
        config=config.digest,
        cell=who.key,
        rewind_step=config.rewind,
    )


def _save_state(file: Path, state: State) -> None:
    arrays: Arrays = {
        "weights": state.weights.cpu().numpy(),
        "best_weights": state.best_weights.cpu().numpy(),
    }
    arrays |= {f"moments/{i}": moment.cpu().numpy() for i, moment in enumerate(state.moments)}
    if state.kept_weights is not None:
        arrays["kept_weights"] = state.kept_weights.cpu().numpy()
    header = {
        "schema": "sparselth.checkpoint/1",
        "step": state.step,
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "evaluations": state.evaluations,
        "seconds": state.seconds,
        "step_seconds": state.step_seconds,
        "pace": state.pace,
    }
    save_arrays(file, arrays, header)


def _load_state(file: Path, device: str) -> State:
    arrays, header = load_arrays(file)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
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
