"""What a cell of `at-init` computes: a mask before training and the network under it, or where layers end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparselth import pruning, tickets
from sparselth.config import Cell
from sparselth.engine.autograd import errors_named
from sparselth.engine.dense import init_weights
from sparselth.engine.paths import choose
from sparselth.engine.state import Job
from sparselth.experiments.base import Diverged, Finished, Place
from sparselth.experiments.imp import score_batch
from sparselth.experiments.jobs import finished, train
from sparselth.experiments.jobs import job as job_of
from sparselth.files import save_arrays
from sparselth.models import Model
from sparselth.models.module import ModuleModel
from sparselth.runs import cell_path
from sparselth.scores import SCORES, ranked
from sparselth.scores.flow import flow
from sparselth.streams import drawing_apart, number, seed_everything, stream

if TYPE_CHECKING:
    from typing import Protocol

    from sparselth.config import Recipe
    from sparselth.data.batches import Resident

    class AtInit(Protocol):
        """Of `at_init.AtInitConfig`, what is needed here."""

        @property
        def model(self) -> str: ...
        @property
        def dataset(self) -> str: ...
        @property
        def device(self) -> str: ...
        @property
        def kernels(self) -> str: ...
        @property
        def digest(self) -> str: ...
        @property
        def recipe(self) -> Recipe: ...
        @property
        def network(self) -> Model: ...
        @property
        def whole(self) -> dict[str, int]: ...
        @property
        def ranked(self) -> int: ...
        @property
        def seeds(self) -> tuple[int, ...]: ...
        @property
        def points(self) -> dict[int, tuple[str, float]]: ...
        def score_of(self, cell: Cell) -> str | None: ...
        def needs(self, cell: Cell) -> tuple[Cell, ...]: ...
        def rung_at(self, cell: Cell) -> dict[str, int]: ...
        def cells(self) -> list[Cell]: ...


Ranks = Callable[[Tensor], Tensor]


# ---- masks


def start(config: AtInit, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
    """The mask [M] of a cell and the weights [P] it starts from, before the mask."""
    model, params = config.network, config.network.params
    weights = init_weights(model, stream(cell.seed, "ticket", 0, "init"))
    if not cell.level:
        return params.full_mask(), weights
    if cell.arm == "reinit":
        weights = init_weights(model, stream(cell.seed, cell.arm, cell.level, "init"))
    if cell.arm in ("shuffle", "reinit"):
        (ticket,) = config.needs(cell)
        mask = torch.from_numpy(tickets.read(cell_path(place.run, ticket), params)[0].mask)
        if cell.arm == "shuffle":
            mask = pruning.shuffle(params, mask, stream(cell.seed, cell.arm, cell.level, "mask"))
        return mask, weights
    if needs := config.needs(cell):  # a round of imp
        before, _ = tickets.read(cell_path(place.run, needs[0]), params)
        trained, mask = torch.from_numpy(before.weights), torch.from_numpy(before.mask)
        size = trained[: params.mask_size].abs()
        return pruning.prune(params, size, mask, config.rung_at(cell), "reference"), weights
    return found(config, cell, place, weights, cell.arm == "invert"), weights


def found(config: AtInit, cell: Cell, place: Place, weights: Tensor, inverted: bool) -> Tensor:
    """The mask [M] that a score finds in weights [P] that are not trained, in its rounds."""
    params, name = config.network.params, config.points[cell.level][0]
    full = params.full_mask().to(config.device)
    first, last = {"all": config.ranked} | config.whole, config.rung_at(cell)
    rungs = pruning.schedule(first, last, SCORES[name].rounds)
    ranks = _ranks(config, cell, place, weights, inverted)
    return pruning.in_rounds(params, full, rungs, ranks, _kernels(config)).cpu()


def seconds_of_masks(config: AtInit, data: Resident) -> dict[Cell, float]:
    """Cells whose masks a score finds, and the processor time: one look of the score, times its rounds."""
    place, params, seed = Place(Path(), data, {}), config.network.params, config.seeds[0]
    found, looks = dict[Cell, float](), dict[str, float]()
    for cell in config.cells():
        if not cell.level or cell.arm in ("shuffle", "reinit") or config.score_of(cell) not in SCORES:
            continue  # dense networks, masks of others, and rounds of imp
        name = config.points[cell.level][0]
        if name not in looks:
            weights = init_weights(config.network, stream(seed, "ticket", 0, "init"))
            ranks = _ranks(config, Cell(seed, "ticket", cell.level), place, weights)
            mask, half = params.full_mask().to(config.device), {"all": config.ranked // 2} | config.whole
            for _ in range(2 if SCORES[name].rounds > 1 else 1):  # the first of many takes longer than others
                began = time.process_time()
                pruning.prune(params, ranks(mask), mask, half, _kernels(config))
                looks[name] = time.process_time() - began
        found[cell] = SCORES[name].rounds * looks[name]
    return found


def _kernels(config: AtInit) -> str:
    takes = choose(config.kernels, config.device).magnitude_threshold.takes
    return "triton" if takes == "triton" else "reference"


def _ranks(config: AtInit, cell: Cell, place: Place, weights: Tensor, inverted: bool = False) -> Ranks:
    """What a score says under a mask, from 0 on; batch and draws are the seed's at any sparsity."""
    model, name, device = config.network, config.points[cell.level][0], config.device
    weights = weights.to(device)
    batch = score_batch(model, place, cell.seed, 0)
    generator = stream(cell.seed, "ticket", 0, f"score {name}")
    forward = number(cell.seed, "ticket", 0, f"score {name} forward")

    def ranks(mask: Tensor) -> Tensor:
        with drawing_apart(device), errors_named(model, f"the score {name}"):
            seed_everything(forward, device)
            scores = SCORES[name].of(model, weights, mask, batch, generator, start=lambda: weights)
        return ranked(name, -scores if inverted else scores, mask)

    return ranks


def empty(kept: dict[str, int]) -> list[str]:
    """Layers without a weight."""
    return [_layer(name) for name, n in kept.items() if not n]


def unreached(model: Model, weights: Tensor, mask: Tensor) -> tuple[list[str], int] | None:
    """Layers whose weights lie on no path from input to output, and how many weights lie on one.

    None where that is not known: a module whose layers are not known, and that nothing flows through.
    """
    params = model.params
    sizes = torch.zeros(mask.numel(), dtype=torch.float64, device=mask.device)
    for spec in params.weights:  # so that neither one path nor all of them leave float64
        sizes[spec.span] = mask[spec.span].double() * max(1, spec.fan_in) ** -0.5
    try:
        on = flow(model, weights, sizes) > 0
        if isinstance(model, ModuleModel) and not on.any() and not flow(model, weights, sizes + 1).any():
            return None
    except Exception:  # of a user's code, or tokens
        if isinstance(model, ModuleModel):
            return None
        raise
    some = params.kept(on)
    kept = params.kept(mask)
    return [_layer(name) for name, n in kept.items() if n and not some[name]], sum(some.values())


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


# ---- networks that are trained


def trained(config: AtInit, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
    """Cells of networks: their masks, then all trained together."""
    jobs = [
        job_of(cell, place, config.recipe, start(config, cell, place), 0, None if cell.level else 0)
        for cell in cells
    ]
    where: dict[str, Any] = {"model": config.model, "dataset": config.dataset, "config": config.digest}
    where |= {"cell": "", "rewind_step": 0}  # the cell is each its own

    def finish(model: Model, job: Job, *more: Any) -> Finished:
        done, cell = finished(model, job, *more), job.who
        mask, weights = job.mask.cpu(), init_weights(model, stream(cell.seed, "ticket", 0, "init"))
        paths = unreached(model, weights, mask)
        line = {
            "score": config.score_of(cell),
            "sparsity": config.points[cell.level][1] if cell.level else 0.0,
            "collapsed_layers": empty(done.line["kept"]),
            "unreached_layers": None if paths is None else paths[0],
            "weights_on_paths": None if paths is None else paths[1],
        }
        return replace(done, line=line | done.line)

    return train(config.network, jobs, config.recipe, config.kernels, place, where, finish)


# ---- how far a score can go


def collapsed(config: AtInit, cells: Sequence[Cell], place: Place) -> list[Finished] | None:
    """Cells that find the largest compression that leaves every layer a weight."""
    done = list[Finished]()
    for cell in cells:
        if place.should_stop():
            return done or None
        if (one := _collapsed(config, cell, place)) is None:
            return done or None
        done.append(one)
    return done


def _collapsed(config: AtInit, cell: Cell, place: Place) -> Finished | None:
    began = time.process_time()
    params, name = config.network.params, config.points[cell.level][0]
    weights = init_weights(config.network, stream(cell.seed, "ticket", 0, "init"))
    ranks, full = _ranks(config, cell, place, weights), params.full_mask().to(config.device)
    layers = [spec for spec in params.weights if spec.name not in config.whole]
    rounds = SCORES[name].rounds
    if rounds == 1:
        said = ranks(full)
        keep, first = critical({spec.name: said[spec.span].cpu() for spec in layers})
    else:
        found = _descent(config, full, ranks, rounds, len(layers), place)
        if found is None:
            return None
        keep, first = found
    kept = keep + sum(config.whole.values())
    line: dict[str, Any] = {
        "score": name,
        "largest_compression": params.prunable / kept,
        "most": params.prunable / (len(layers) + sum(config.whole.values())),
        "weights_remaining": kept / params.prunable,
        "weights_kept": kept,
        "collapsed_layers": first,
        "rounds": rounds,
        "final_accuracy": None,
    }
    header = {"schema": "sparselth.collapse/1", "config": config.digest, "cell": cell.key}
    save_arrays(cell_path(place.run, cell), {"kept": np.array([kept])}, header)
    spent = time.process_time() - began
    timings = {"train_seconds": spent, "step_seconds": 0.0, "clock": "processor"}
    return Finished(cell, line, [], timings)


def critical(ranks: dict[str, Tensor]) -> tuple[int, list[str]]:
    """Of one ranking: the fewest weights kept with which every layer has one, and who is empty with one less.

    Pruning keeps the largest, of equal ones those that stand last; so a layer is empty once what is kept
    ends above its last best weight.
    """
    names, parts = [*ranks], [*ranks.values()]
    best = torch.stack([part.max() for part in parts])
    low = best.min()
    above = sum(int((part > low).sum()) for part in parts)
    first = int((best == low).nonzero()[0, 0])  # its last such weight stays, and equal ones behind it
    equal = 1 + sum(int((part == low).sum()) for part in parts[first + 1 :])
    return above + equal, [_layer(names[first])]


def _descent(
    config: AtInit, mask: Tensor, ranks: Ranks, rounds: int, layers: int, place: Place
) -> tuple[int, list[str]] | None:
    """In rounds that aim at one weight a layer: the fewest kept with which all had one, who was empty next.

    None where it was stopped.
    """
    params = config.network.params
    first = {"all": config.ranked} | config.whole
    keep = config.ranked
    for rung in pruning.schedule(first, {"all": layers} | config.whole, rounds):
        if place.should_stop():
            return None
        mask = pruning.prune(params, ranks(mask), mask, rung, _kernels(config))
        if none := empty(params.kept(mask)):
            return keep, none
        keep = rung["all"]
    return keep, []
