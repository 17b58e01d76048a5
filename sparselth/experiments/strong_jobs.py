"""What `strong` makes of a network that has ended: a file, and a line with its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparselth import entropy, pruning, strong_tickets
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Gather, Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State, Stopped
from sparselth.experiments.base import Finished, Place
from sparselth.experiments.jobs import Finish, finished, told
from sparselth.files import Arrays
from sparselth.frozen import mask_of
from sparselth.models import Model
from sparselth.models.module import ModuleModel
from sparselth.runs import cell_path
from sparselth.streams import drawing_apart, number, seed_everything, stream
from sparselth.train import accuracies_on_test

NORM_BATCHES, NORM_IMAGES = 10, 500  # training images that give a random mask its batch norms' statistics


class Strong(Protocol):
    """Of `strong.StrongConfig`, what is needed here."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def kernels(self) -> str: ...
    def method_of(self, cell: Cell) -> str: ...
    def point(self, cell: Cell) -> tuple[float, float]: ...
    def where(self, model: Model) -> dict[str, Any]: ...
    def needs(self, cell: Cell) -> tuple[Cell, ...]: ...


def strong(config: Strong) -> Finish:
    """How a network of frozen weights ends: as a strong ticket."""

    def finish(
        model: Model, job: Job, place: Place, where: dict[str, Any], at_early_stop: float, final: float
    ) -> Finished:
        assert job.frozen is not None
        state, params = job.state, model.params
        scores = state.weights[0]
        changes = None if state.generations is None else state.generations[0]
        content = strong_tickets.Content.of(
            params, job.frozen, mask_of(job.frozen, params, scores), changes, scores
        )
        found = strong_tickets.save(
            cell_path(place.run, job.who), params, content, **where | {"cell": job.who.key}
        )
        done = told(model, job, content.kept(params), at_early_stop, final)
        return _line(config, place, done, _bytes(found))

    return finish


def weak(config: Strong) -> Finish:
    """How a network of trained weights ends: as any ticket."""

    def finish(model: Model, job: Job, *more: Any) -> Finished:
        place, params = more[0], model.params
        done = finished(model, job, *more)
        mask = job.mask.cpu().numpy()
        coded = sum(
            entropy.encode_matrix(mask[spec.span].reshape(spec.matrix)).size for spec in params.weights
        )
        floats = int(mask.sum()) + sum(spec.numel for spec in params.unpruned)
        return _line(config, place, done, {"mask_bytes": coded, "coded_bytes": coded + 4 * floats})

    return finish


def _bytes(found: Arrays) -> dict[str, int]:
    """Bytes of the mask and of redraws, and of all that the seed does not say."""
    parts = {
        f"{name}_bytes": sum(array.nbytes for key, array in found.items() if key.startswith(f"{name}/"))
        for name in ("mask", "redraws")
    }
    return parts | {"coded_bytes": 8 + sum(array.nbytes for array in found.values())}


def _line(config: Strong, place: Place, done: Finished, more: dict[str, Any]) -> Finished:
    """The line of a cell: which point it is of, what was found, and its bytes."""
    width, keep = config.point(done.cell)
    size = cell_path(place.run, done.cell).stat().st_size
    first = {"method": config.method_of(done.cell), "keep": keep, "width": width}
    return replace(done, line=first | done.line | {"file_bytes": size} | more)


def measured(config: Strong, model: Model, cells: Sequence[Cell], place: Place) -> list[Finished] | None:
    """Random masks: drawn, looked at and written. None where an evaluation was stopped."""
    assert place.data is not None
    params, device, jobs, contents = model.params, place.data.device, [], []
    for cell in cells:
        (ticket,) = config.needs(cell)
        found, _ = strong_tickets.read(cell_path(place.run, ticket), params)
        mask = pruning.shuffle(
            params, torch.from_numpy(found.mask), stream(cell.seed, cell.arm, cell.level, "mask")
        )
        first = None if found.redraws is None else torch.zeros(len(mask), dtype=torch.int32, device="cpu")
        bare = strong_tickets.Content.of(
            params, found.frozen, mask, first, _unit_statistics(model, cell.seed)
        )
        weights = _calibrated(model, bare.weights(params), place, cell.seed)
        contents.append(strong_tickets.Content.of(params, found.frozen, mask, first, weights))
        state = State.start(weights[None].to(device), config.recipe, config.recipe.steps)
        jobs.append(Job(cell, state, (mask != 0).to(device), config.recipe.steps))
    try:
        accuracies = accuracies_on_test(
            model, place.data, jobs, config.kernels, should_stop=place.should_stop
        )
    except Stopped:
        return None
    done = []
    for job, content, (accuracy, _) in zip(jobs, contents, accuracies, strict=True):
        where = config.where(model) | {"cell": job.who.key}
        saved = strong_tickets.save(cell_path(place.run, job.who), params, content, **where)
        one = told(model, job, content.kept(params), accuracy, accuracy)
        line = one.line | {"early_stop_step": 0, "validation_loss_at_early_stop": None, "state_bytes": None}
        done.append(_line(config, place, replace(one, line=line), _bytes(saved)))
    return done


def unweighted(model: ModuleModel, seed: int, flat: Tensor) -> None:
    """Set, in a buffer [P], what is no weight of a module to what its seed draws, biases to 0."""
    drawn = init_weights(model, stream(seed, "ticket", 0, "init"))
    for spec in model.params.unpruned:
        biases = "bias" in spec.name.rpartition(".")[2] and spec in model.params.trained
        flat[spec.span] = 0 if biases else drawn[spec.span]


def _unit_statistics(model: Model, seed: int) -> Tensor:
    """A buffer [P] whose running means are 0 and variances 1."""
    flat = torch.zeros(model.params.size, dtype=torch.float32, device="cpu")
    if isinstance(model, ModuleModel):
        unweighted(model, seed, flat)
        return flat
    for spec in model.params.statistics:
        flat[spec.span] = float(spec.name.endswith(".var"))
    return flat


def _calibrated(model: Model, weights: Tensor, place: Place, seed: int) -> Tensor:
    """The weights [P] with running statistics of batch norms as training images make them."""
    if not model.params.statistics:
        return weights
    from sparselth.models.torch import network

    assert place.data is not None
    data, net = place.data, network(model, weights, seed).to(place.data.device)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    images = data.split(seed)[0][: NORM_BATCHES * NORM_IMAGES]
    if isinstance(model, ModuleModel):
        _show(net, data, images, seed)
        return model.params.gather(net.cpu())[0]
    with torch.no_grad():
        for index in torch.split(images, NORM_IMAGES):
            x, _ = Gather(data, 1, len(index))(index.to(data.device))
            net(x[0].T.reshape(len(index), *model.input))
    found, tensors = weights.clone(), dict(net.named_buffers())
    for spec in model.params.statistics:
        name, _, kind = spec.name.rpartition(".")
        found[spec.span] = tensors[f"{name}.running_{kind}"].cpu()
    return found


@torch.no_grad()
def _show(net: nn.Module, data: Resident, images: Tensor, seed: int) -> None:
    """Let a module in training mode see images, so that its batch norms know them."""
    with drawing_apart(data.device):
        seed_everything(number(seed, "random-mask", 0, "norms"), data.device)
        for index in torch.split(images, NORM_IMAGES):
            net(Gather(data, 1, len(index)).first(index.to(data.device))[0][0])
