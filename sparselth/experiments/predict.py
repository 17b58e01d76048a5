"""How well the masks of a run's tickets are foretold, and when the mask of the dense network has settled.

A cell is a seed: its dense network trains again, with the same images in the same order, and at some steps
its weights are looked at. What foretells is a number a weight,

    magnitude   |w| at the step that tickets go back to; `sign`: the sign of w there
    gradient    |dL/dw| there; `snip`: |w dL/dw| (Lee et al. 2019)
    weights@t   |w| at step t of training

and how well it does so for the ticket's mask of a level is the AUC, by layer: the chance that a kept weight
has the larger number. The mask that magnitude would draw at step t is compared with the one before, the
early-bird criterion (You et al. 2020, arXiv:1909.11957), and with the ticket's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparselth.config import MOST, Cell, at_least, option
from sparselth.experiments.base import Finished, Place, register
from sparselth.experiments.imp import MOST_LEVELS
from sparselth.experiments.source import FromRun
from sparselth.experiments.training import Training, counted
from sparselth.user_files import short

if TYPE_CHECKING:
    from sparselth.data import Images
    from sparselth.experiments.imp import ImpConfig
    from sparselth.runs import RunRecord

PARTS = 20  # evenly spaced steps at which weights are looked at, unless others are given


def _steps(at: tuple[int, ...]) -> str | None:
    right = at and len(set(at)) == len(at) <= 1000 and 1 <= min(at) <= max(at) <= MOST
    return None if right else "expected up to 1,000 different steps from 1 on"


@register
@dataclass(frozen=True, kw_only=True)
class PredictConfig(FromRun):
    """Say how well a run's final masks are foretold by what is known at or soon after the start.

    RUN is a finished run of imp. Its dense networks are trained again; magnitude, sign, gradient and SNIP at
    the start and weights at some steps are compared with the masks of its tickets, by layer and level, as an
    AUC: 0.5 is chance. Says when the dense network's own mask has settled, too (early-bird tickets). Ends
    with a table, figures and a folder that `sparselth show` reads.
    """

    name: ClassVar[str] = "predict"
    words: ClassVar[str] = "sparselth.report.predict"
    figures: ClassVar[str] = "sparselth.report.predict"

    seeds: tuple[int, ...] = option(
        None,
        "Of the run's seeds, 3, 0-4 or 0,2,5.  [default: all]",
        Training.__dataclass_fields__["seeds"].metadata["check"],
        ordered=False,
        extends=True,
    )
    levels: int = option(
        None, "Masks up to this level.  [default: the run's levels]", at_least(1, most=MOST_LEVELS)
    )
    at: tuple[int, ...] = option(
        None,
        "Steps of training at which weights are looked at, e.g. 10,100,1000.  "
        "[default: each twentieth of training, and two before]",
        _steps,
        ordered=False,
    )
    dataset: str = option("")  # the source's

    def take(self, imp: ImpConfig) -> None:
        steps = imp.recipe.steps
        evenly = {max(1, round(steps * part / PARTS)) for part in range(1, PARTS + 1)}
        early = {max(1, steps // 100), max(1, steps // 50)}
        found: dict[str, Any] = {
            "seeds": imp.seeds,
            "levels": imp.levels,
            "at": tuple(sorted(evenly | early)),
        }
        for name, value in found.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "dataset", imp.dataset)

    def check(self) -> None:
        super().check()
        if max(self.at) > (steps := self.imp.recipe.steps):
            raise self.wrong("at", f"expected steps up to {steps:,}, where training ends")

    # ---- cells

    def cells(self) -> list[Cell]:
        return [Cell(seed, "dense", 0) for seed in self.seeds]

    def source_cells(self) -> list[Cell]:
        return [Cell(seed, "ticket", level) for seed in self.seeds for level in range(1, self.levels + 1)]

    @property
    def autograd(self) -> bool:
        return True

    @property
    def reads(self) -> str:
        return self.imp.dataset if self.source_config else ""

    @property
    def shown_as(self) -> str:
        return self.imp.recipe.inputs if self.source_config else "standard"

    @cached_property
    def _trained(self) -> dict[int, float]:
        """Seed → seconds that its dense network took in the source, where that is there and says so."""
        from contextlib import suppress

        from sparselth.errors import SparselthError
        from sparselth.runs import read

        with suppress(SparselthError):
            dense = [p for p in read(Path(self.source)).points if p["level"] == 0]
            return {p["seed"]: p["train_seconds"] for p in dense if p.get("train_seconds")}
        return {}

    def seconds(self, cell: Cell) -> float | None:
        whole = self._trained.get(cell.seed)
        return whole and whole * max(self.at) / self.imp.recipe.steps

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished] | None:
        from sparselth.experiments.predict_jobs import compute

        found: list[Finished] = []
        for cell in cells:
            if (done := compute(self, cell, place)) is None:
                return found or None
            found.append(done)
        return found

    # ---- what is said of it

    @property
    def model(self) -> str:
        return self.imp.model

    @property
    def method(self) -> str:
        """How the masks were found, in a line."""
        return self.imp.method

    @property
    def folder(self) -> str:
        return f"{self.name}-{short(self.imp.model)}-{short(self.imp.dataset)}-{self.digest}"

    @property
    def title(self) -> str:
        from sparselth.report.stats import seed_list

        return f"what foretells the masks of {self.imp.title}; here seeds {seed_list(self.seeds)}"

    def about(self, cell: Cell) -> str:
        return f"{max(self.at):,} steps of training"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        return {
            "source": f"{self.source}: {self.imp.title}",
            "cells": f"seeds {', '.join(map(str, self.seeds))}; {counted(len(self.cells()), finished)}",
            "looks": f"at the start and at {len(self.at)} steps from {min(self.at):,} to {max(self.at):,}",
        }

    def said(self, line: dict[str, Any]) -> str:
        last = [one for one in line["foretold"] if one["layer"] == "all" and one["level"] == self.levels]
        first = next((one for one in last if one["predictor"] == "magnitude"), None)
        if first is None or first["auc"] is None:
            return ""
        return f"initial magnitude foretells the last mask with AUC {first['auc']:.3f}"

    def told(self, record: RunRecord) -> list[dict[str, Any]]:
        """A point a seed, predictor, level and layer."""
        return [{"seed": p["seed"]} | one for p in record.points for one in p["foretold"]]
