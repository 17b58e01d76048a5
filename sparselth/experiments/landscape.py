"""The loss around what a run of `imp` found: slices, lines between solutions, and how sharp minima are.

A cell is a trained network of the source. Around it lies a plane of two random directions, normalised by
filter (Li et al. 2018) and masked, so that pruned weights stay 0; of the Hessian within the live subspace
Lanczos finds the largest eigenvalue; a straight line leads to the ticket of the level, from the ticket to the
dense network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparselth.config import Cell, at_least, option, positive
from sparselth.experiments.arms import ARMS
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.source import FromRun
from sparselth.experiments.training import MOST_SEEDS, counted
from sparselth.models.module import ModuleModel

if TYPE_CHECKING:
    from sparselth.data import Images
    from sparselth.experiments.imp import ImpConfig
    from sparselth.models import Model

SHARE = 0.2  # of the weights that are left at the level that is looked at unless others are named
GRID, COARSE = 51, 25  # points along a side, of networks whose products are few, and others
FEW_PRODUCTS, MANY_PRODUCTS = 1e12, 3e12  # of a fine grid at 500 images; of a grid
LINE = 30  # points of a line
SPECTRUM = 400  # forwards that an image of the Hessian is worth: about 60 products of five and more
RATE = 1.5e10  # products a second of a busy core, by which cells are priced
ANEW = ", decoded anew by each network: fewer images would be decoded once, and held"
LOTS = 4  # of so many images that a cell looks at: slice, test, statistics, Hessian
FLOATS = 4e8  # numbers of activations a second of a busy core, which bind narrow networks of large images
DECODED = 300.0  # images a second, of files as large as ImageNet's (docs/imagenet.md)


def _different(numbers: tuple[int, ...]) -> str | None:
    right = numbers and len(set(numbers)) == len(numbers) <= MOST_SEEDS and min(numbers) >= 0
    return None if right else "expected different numbers from 0 on"


def _arms(arms: tuple[str, ...]) -> str | None:
    return None if arms and len(set(arms)) == len(arms) else "expected different arms"


def _grid(points: int) -> str | None:
    right = 3 <= points <= 501 and points % 2
    return None if right else "expected an odd number from 3 to 501, so that the centre is on the grid"


@register
@dataclass(frozen=True, kw_only=True)
class LandscapeConfig(FromRun):
    """Look at the loss around the tickets of a finished run of imp, and around their controls.

    Draws slices of the loss along two random directions, normalised by filter and within what the mask keeps
    (Li et al. 2018), measures how sharp each minimum is, by the largest eigenvalue of the Hessian within the
    live weights, and the loss along straight lines between solutions. Ends with a table, figures and the
    difference between tickets and random masks, with its interval.
    """

    name: ClassVar[str] = "landscape"
    words: ClassVar[str] = "sparselth.report.landscape"
    figures: ClassVar[str] = "sparselth.report.landscape_figures"

    arms: tuple[str, ...] = option(
        None,
        "Whose networks are looked at.  [default: ticket and random-mask, where the run has them]",
        _arms,
        ARMS,
        ordered=False,
        extends=True,
    )
    level: tuple[int, ...] = option(
        None,
        "Levels of the run; 0 is the dense network.  [default: the one nearest to a fifth of the weights]",
        _different,
        ordered=False,
        extends=True,
    )
    seeds: tuple[int, ...] = option(
        None, "Seeds of the run.  [default: all of its]", _different, ordered=False, extends=True
    )
    dataset: str = option("")  # the source's
    grid: int = option(None, "Points along a side of a slice.  [default: 51; 25 of large networks]", _grid)
    radius: float = option(1.0, "How far a slice goes, in lengths of each filter.", positive)
    images: int = option(
        None,
        "Training images that losses are means over.  [default: 1,000, fewer of large networks]",
        at_least(1),
    )
    device: Literal["cpu", "cuda"] = option("cpu", "Where to compute.", choices=("cpu", "cuda"))

    def take(self, imp: ImpConfig) -> None:
        defaults: dict[str, Any] = {"dataset": imp.dataset}
        if self.arms is None:
            wanted = [arm for arm in ("ticket", "random-mask") if arm in imp.arms]
            defaults["arms"] = tuple(wanted if len(wanted) > 1 else imp.arms[:2])
        if self.level is None:
            shares = imp.remaining()
            near = range(1, len(shares))
            defaults["level"] = (min(near, key=lambda i: abs(log(max(shares[i], 1e-9) / SHARE))),)
        if self.seeds is None:
            defaults["seeds"] = imp.seeds
        work = products(imp.network)
        if self.grid is None:
            defaults["grid"] = GRID if work * GRID**2 * 500 <= FEW_PRODUCTS else COARSE
        if self.images is None:
            side = defaults.get("grid", self.grid)
            defaults["images"] = max(100, min(1000, int(MANY_PRODUCTS / (work * (side**2 + SPECTRUM)))))
        for name, value in defaults.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        super().check()
        from sparselth import machine

        machine.choose_device(self.device)
        if "ticket" not in self.arms and not max(self.level):
            raise self.wrong("arms", "level 0 is the dense network, which is the ticket's; add ticket")

    # ---- cells

    def cells(self) -> list[Cell]:
        """Level 0 exists once a seed, as a ticket."""
        return [
            Cell(seed, arm, level)
            for seed in self.seeds
            for arm in self.arms
            for level in self.level
            if level or arm == "ticket"
        ]

    def source_cells(self) -> Sequence[Cell]:
        cells = self.cells()
        return list(dict.fromkeys(one for cell in cells for one in (cell, self.end(cell)) if one is not None))

    def end(self, cell: Cell) -> Cell | None:
        """The network that a line leads to; the dense one's leads nowhere."""
        if not cell.level:
            return None
        return Cell(cell.seed, "ticket", cell.level if cell.arm != "ticket" else 0)

    @property
    def network(self) -> Model:
        return self.imp.network

    @property
    def autograd(self) -> bool:
        return True

    @property
    def kernels(self) -> str:
        """How networks are evaluated: as the source was trained where that was by autograd."""
        return "autograd" if self.imp.kernels == "autograd" else "auto"

    @property
    def reads(self) -> str:
        return self.dataset

    @property
    def shown_as(self) -> str:
        return self.imp.shown_as

    @property
    def evaluation(self) -> tuple[int, int]:
        return self.network.evaluation_batch, 0

    @property
    def batches(self) -> int:
        """Evaluation batches that running statistics are computed anew from."""
        return max(1, self.images // self.network.evaluation_batch)

    def seconds(self, cell: Cell) -> float | None:
        from sparselth.engine.planes import behind_first

        known = not isinstance(self.network, ModuleModel) and self.kernels != "autograd"
        slice_ = self.grid**2 * (0.25 if known and behind_first(self.network) else 1.0)
        networks = slice_ + 2 * LINE * (cell.level > 0) + 2
        looks = networks * (2 if self.network.params.statistics else 1)
        held, each = self.held, products(self.network) / RATE
        if held is not None and not isinstance(self.network, ModuleModel):
            each = max(each, sum(map(prod, self.network.shapes)) / FLOATS)
        decoded = 0.0 if held is None else LOTS if held else looks + SPECTRUM / 2
        return ((looks + SPECTRUM / 2) * each + decoded / DECODED) * self.images

    @property
    def held(self) -> bool | None:
        """Whether images of files are decoded once a cell, not by each network; None where none are files."""
        from sparselth.data import get_dataset

        if not (spec := get_dataset(self.dataset)).pictures:
            return None
        from sparselth.data.streamed import most_held

        return self.images <= most_held(spec.shape)

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        from sparselth.experiments.landscape_jobs import compute

        found = list[Finished | Diverged]()
        for cell in cells:
            done = compute(self, cell, place)
            if done is None:
                return found or None
            found.append(done)
        return found

    # ---- what is said of it

    @property
    def folder(self) -> str:
        from sparselth.user_files import short

        return f"{self.name}-{short(self.imp.model)}-{short(self.dataset)}-{self.digest}"

    @property
    def title(self) -> str:
        return f"landscape of {self.imp.title}"

    @property
    def how(self) -> str:
        """What is looked at, in a line."""
        return (
            f"{self.grid} x {self.grid} networks within {self.radius:g} of each filter's length, "
            f"{self.images:,} training images"
        )

    def about(self, cell: Cell) -> str:
        return f"{100 * self.imp.remaining()[cell.level]:.1f} %"

    def said(self, line: dict[str, Any]) -> str:
        return f"largest eigenvalue {line['largest_eigenvalue']:.4g}"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        levels = [f"{level} ({100 * self.imp.remaining()[level]:.1f} %)" for level in self.level]
        return {
            "source": f"{self.source}: {self.imp.title}",
            "networks": f"{', '.join(self.arms)} at level {', '.join(levels)}",
            "slices": self.how + {None: "", True: ", decoded once a cell"}.get(self.held, ANEW),
            "cells": f"seeds {', '.join(map(str, self.seeds))}; {counted(len(self.cells()), finished)}",
        }


def products(model: Model) -> float:
    """Products that an image takes; of a module, of which nothing is known, two for each weight."""
    if isinstance(model, ModuleModel):
        return 2.0 * model.params.prunable
    return float(sum(spec.numel * prod(after[1:]) for spec, _, _, after in model.producers))
