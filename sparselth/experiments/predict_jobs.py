"""What a cell of `predict` computes: the dense network's training again, and what is read off on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparselth import pruning
from sparselth.chance import Overlap, auc, ranks, shuffled_auc
from sparselth.config import Cell
from sparselth.engine.choose import prepare
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.errors import SparselthError
from sparselth.experiments.base import Finished, Place
from sparselth.experiments.imp import ImpConfig, score_batch
from sparselth.files import save_arrays
from sparselth.models import Model
from sparselth.params import Params, TensorSpec
from sparselth.patterns import get_pattern
from sparselth.runs import cell_path
from sparselth.scores.gradients import built, chunks, joined, mean_loss, slopes
from sparselth.streams import drawing_apart, number, seed_everything, stream
from sparselth.tickets import Content

Bits = NDArray[np.bool_]
SCHEMA = "sparselth.foretold/1"


class Predict(Protocol):
    """Of `predict.PredictConfig`, what is needed here."""

    @property
    def imp(self) -> ImpConfig: ...
    @property
    def levels(self) -> int: ...
    @property
    def at(self) -> tuple[int, ...]: ...
    @property
    def digest(self) -> str: ...
    @property
    def source_break_even(self) -> dict[str, float]: ...
    def ticket(self, cell: Cell) -> Content: ...


def compute(config: Predict, cell: Cell, place: Place) -> Finished | None:
    """A seed: all that foretells, the masks on the way, and the file; None when stopped."""
    imp, began = config.imp, time.perf_counter()
    model, params = imp.network, imp.network.params
    levels = range(1, config.levels + 1)
    found = [config.ticket(Cell(cell.seed, "ticket", level)) for level in levels]
    tickets, start = {level: one.mask for level, one in zip(levels, found, strict=True)}, found[0].rewound
    assert start is not None
    foretold: list[dict[str, Any]] = []
    ranked = [spec for spec in params.weights if spec.name not in pruning.excluded(params, imp.exclude)]
    for name, numbers in _at_the_start(model, torch.from_numpy(start), place, cell.seed).items():
        foretold += _foretold(ranked, name, imp.rewind, numbers, tickets)
    masks: list[dict[str, Any]] = []
    before: dict[int, Bits] = {}
    rungs = imp.rungs()
    for step, weights in _training(config, cell.seed, place):
        if step < 0:
            return None
        if not weights.isfinite().all():
            raise SparselthError(
                f"{cell}: its dense network diverged at step {step} when it was trained again"
            )
        sizes = weights[: params.mask_size].abs().cpu()
        foretold += _foretold(ranked, f"weights@{step}", step, sizes.numpy(), tickets)
        for level in levels:
            mask = _drawn(imp, sizes, rungs[level])
            masks.append(_compared(level, step, mask, before.get(level), tickets[level], params))
            before[level] = mask
    last = {f"mask/{level}": np.packbits(mask, bitorder="little") for level, mask in before.items()}
    header = {"schema": SCHEMA, "cell": cell.key, "config": config.digest}
    save_arrays(cell_path(place.run, cell), last, header)
    seconds = {"train_seconds": time.perf_counter() - began}
    return Finished(cell, {"foretold": foretold, "masks": masks}, [], seconds)


def _at_the_start(model: Model, weights: Tensor, place: Place, seed: int) -> dict[str, NDArray[np.float32]]:
    """Numbers [M] that are known at the step that tickets go back to, by name; larger ones are to stay.

    Gradients are those of the images that scores see.
    """
    front, mask = weights[: model.params.mask_size], model.params.full_mask()
    with drawing_apart("cpu"):  # a forward may draw, as dropout does
        seed_everything(number(seed, "ticket", 1, "score forward"), "cpu")
        net, ranked = built(model, weights, mask)
        slope = torch.zeros(model.params.mask_size, dtype=torch.float32, device="cpu")
        for x, y, share in chunks(score_batch(model, place, seed, 1)):
            slope += share * joined(model, slopes("gradient", mean_loss(model, net(x), y), ranked), mask)
    found = {"magnitude": front.abs(), "sign": front.sign(), "gradient": slope.abs()}
    found["snip"] = (slope * front).abs()
    return {name: values.numpy() for name, values in found.items()}


def _foretold(
    specs: Sequence[TensorSpec],
    predictor: str,
    step: int,
    numbers: NDArray[np.float32],
    tickets: dict[int, Bits],
) -> Iterator[dict[str, Any]]:
    """The AUC of a predictor for the mask of every level, by layer that is pruned and over all of these."""
    layers = [np.arange(spec.span.start, spec.span.stop) for spec in specs]
    ends = np.cumsum([0, *map(len, layers)])
    each = {spec.name.removesuffix(".weight"): part for spec, part in zip(specs, layers, strict=True)}
    for layer, part in (each | {"all": np.concatenate(layers)}).items():
        ranked = ranks(numbers[part])
        within = [slice(*pair) for pair in pairwise(ends)] if layer == "all" else [slice(None)]
        for level, mask in tickets.items():
            where = {"predictor": predictor, "layer": layer, "level": level, "step": step}
            chance = shuffled_auc(ranked, mask[part], within)
            yield where | {"auc": auc(ranked, mask[part]), "chance": chance}


def _drawn(imp: ImpConfig, sizes: Tensor, rung: dict[str, int]) -> Bits:
    """The mask [M] of a level that magnitudes [M] draw as the run prunes, one by one or in groups."""
    full = imp.network.params.full_mask()
    if pattern := get_pattern(imp.pattern):
        return pattern.prune(imp.network.params, sizes, full, rung).numpy()
    return pruning.prune(imp.network.params, sizes, full, rung, "reference").numpy()


def _compared(
    level: int, step: int, mask: Bits, before: Bits | None, ticket: Bits, params: Params
) -> dict[str, Any]:
    """The mask that a step's magnitudes draw: how far it moved, and what it shares with the ticket's.

    `moved` is the share of kept weights that changed since the step before. Chance is that of masks which
    are shuffled within each layer.
    """
    shared = Overlap.of(mask, ticket)
    layers = [Overlap.of(mask[spec.span], ticket[spec.span]) for spec in params.weights]
    moved = None if before is None else float((mask ^ before).sum() / max(1, mask.sum() + before.sum()))
    least = max(1, min(shared.a, shared.b))
    by_chance = sum(one.expected for one in layers) / least
    return {"level": level, "step": step, "moved": moved, "shared": shared.share, "by_chance": by_chance}


def _training(config: Predict, seed: int, place: Place) -> Iterator[tuple[int, Tensor]]:
    """The weights [P] of a seed's dense network at the steps `at`; a step of -1 when stopped."""
    imp, data = config.imp, place.data
    model, recipe = imp.network, imp.recipe
    assert data is not None
    who = Cell(seed, "ticket", 0)
    weights = init_weights(model, stream(seed, "ticket", 0, "init"))[None].to(data.device)
    state = State.start(weights, recipe)
    kernels = imp.kernels if imp.device == data.device else "auto"
    job = Job(who, state, model.params.full_mask().to(data.device))
    engine = prepare(model, data, [job], recipe, kernels, config.source_break_even)
    step = 0
    for goal in config.at:
        step += engine.advance(step, goal - step, place.should_stop)
        if step < goal:
            yield -1, state.weights[0]
            return
        yield step, state.expanded().weights[0]
