"""What a cell of `neurons` computes, and its file and line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sparselth import tickets
from sparselth.config import Cell
from sparselth.engine.state import Job, State, Stopped
from sparselth.experiments import single_relu
from sparselth.experiments.base import Diverged, Finished, Place
from sparselth.experiments.jobs import job as job_of
from sparselth.experiments.jobs import told, train
from sparselth.experiments.neuron_scores import fit_output, train_neurons
from sparselth.experiments.strong_jobs import Strong, strong
from sparselth.files import save_arrays
from sparselth.frozen import Frozen
from sparselth.models import Model
from sparselth.runs import cell_path
from sparselth.train import accuracies_on_test

if TYPE_CHECKING:
    from typing import Protocol

    class Neurons(Strong, Protocol):
        """Of `neurons.NeuronsConfig`, what is needed here."""

        @property
        def models(self) -> list[Model]: ...
        @property
        def units(self) -> tuple[int, ...]: ...
        @property
        def inputs(self) -> int: ...
        @property
        def digest(self) -> str: ...
        def frozen(self, cell: Cell) -> Frozen: ...


def compute(
    config: Neurons, cell: Cell, place: Place, scores: Tensor | None
) -> Sequence[Finished | Diverged] | None:
    """A cell; `scores` [P] are the first ones of a weight subnetwork, None is a single ReLU's cell."""
    if scores is None:
        return None if place.should_stop() else [_single(config, cell, place)]
    model, recipe = config.models[cell.level], config.recipe
    if cell.arm == "weights":
        mask = model.params.full_mask()
        jobs = [job_of(cell, place, recipe, (mask, scores), 0, None, config.frozen(cell))]
        return train(model, jobs, recipe, config.kernels, place, config.where(model), strong(config))
    return _on_images(config, model, cell, place)


def _on_images(config: Neurons, model: Model, cell: Cell, place: Place) -> list[Finished] | None:
    assert place.data is not None
    data, params, recipe = place.data, model.params, config.recipe
    flat = params.full_mask().new_zeros(1, params.size).float().to(data.device)
    job = Job(cell, State.start(flat, recipe), params.full_mask().to(data.device))
    frozen, kept = config.frozen(cell), None
    try:
        if cell.arm == "neurons":
            kept = train_neurons(
                *(model, job, data, frozen, recipe, place.should_stop),
                lambda: place.evaluated([job]),
            )
        else:
            fit_output(model, job, data, frozen, place.should_stop)
        ((best, final),) = accuracies_on_test(
            model, data, [job], config.kernels, should_stop=place.should_stop
        )
    except Stopped:
        return None
    weights = job.state.weights[0].cpu().numpy()
    mask = np.zeros(params.mask_size, bool)
    for spec in params.weights:
        mask[spec.span] = weights[spec.span] != 0
    content = tickets.Content(mask, weights)
    tickets.save(cell_path(place.run, cell), params, content, **config.where(model) | {"cell": cell.key})
    done = told(model, job, params.kept(job.mask.new_tensor(mask)), best, final)
    width, keep = config.point(cell)
    hidden = [spec.shape[0] for spec in params.weights[:-1]]
    line: dict[str, Any] = {"width": width, "keep": keep if kept is not None else 1.0}
    line["neurons"] = sum(hidden) if kept is None else int(sum(int(one.sum()) for one in kept))
    size = cell_path(place.run, cell).stat().st_size
    return [Finished(cell, line | done.line | {"file_bytes": size}, done.evaluations, done.timings)]


def _single(config: Neurons, cell: Cell, place: Place) -> Finished:
    """A network of one hidden layer of Gaussian weights for max(0, x_1).

    Their law is the same in every direction, so that x_1 is as hard for whole neurons as any other.
    """
    units, began = config.units[cell.level], time.process_time()
    draw = np.random.default_rng([cell.seed, units])
    hidden, output = draw.standard_normal((units, config.inputs)), draw.standard_normal(units)
    target = np.eye(config.inputs)[0]
    if cell.arm.endswith("random-features"):
        found, mask = single_relu.random_features(hidden, target), np.ones(units)
    elif cell.arm.endswith("neurons"):
        found, mask = single_relu.neurons(hidden, output, target, draw)
    else:
        found, mask = single_relu.weights(hidden, output, target, draw)
    header = {"schema": "sparselth.single-relu/1", "config": config.digest, "cell": cell.key, "units": units}
    save_arrays(
        cell_path(place.run, cell),
        {"hidden": hidden, "output": output, "mask": mask.astype(np.uint8)},
        header | {"relative_error": found},
    )
    line = {"units": units, "inputs": config.inputs, "kept": int(mask.sum()), "relative_error": found}
    seconds = time.process_time() - began
    timings = {"train_seconds": seconds, "step_seconds": 0.0, "clock": "processor"}
    return Finished(cell, line, [], timings)
