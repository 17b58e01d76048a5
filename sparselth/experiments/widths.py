"""Experiments over the width of a network and the share of its weights that is kept.

A level is the number of a point. A run that goes on with more shares or widths keeps the numbers that its
points have, since cells and their random streams are named by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from sparselth.config import Cell, Config, option
from sparselth.errors import UsageError
from sparselth.experiments.training import Training
from sparselth.models import Model, get_model
from sparselth.models.module import is_module

Point = tuple[float, float]  # width, share
MOST_POINTS = 1000


@dataclass(frozen=True)
class Span:
    """All shares at all widths."""

    keep: tuple[float, ...]
    width: tuple[float, ...]

    @property
    def points(self) -> list[Point]:
        """Width by width."""
        return [(width, keep) for width in self.width for keep in self.keep]

    def __str__(self) -> str:
        keep, width = (",".join(f"{one!r}" for one in each) for each in (self.keep, self.width))
        return f"keep {keep} width {width}"

    @staticmethod
    def of(text: str) -> Span:
        """Inverse of str; ValueError where the text is none."""
        if not (found := re.fullmatch(r"keep (\S+) width (\S+)", text)):
            raise ValueError("expected 'keep 0.5 width 1.0'")
        return Span(*(tuple(map(float, numbers.split(","))) for numbers in found.groups()))


def numbers(spans: Iterable[Span]) -> dict[Point, int]:
    """The number of every point: those of the first span in its order, then what each later one adds."""
    found = dict[Point, int]()
    for span in spans:
        for point in span.points:
            found.setdefault(point, len(found))
    return found


def _shares(keep: tuple[float, ...]) -> str | None:
    right = all(0 < share <= 1 for share in keep) and len(set(keep)) == len(keep) <= MOST_POINTS
    return None if right else "expected different shares of the weights, above 0 and at most 1"


def different_widths(width: tuple[float, ...]) -> str | None:
    right = width and all(0 < factor < math.inf for factor in width) and len(set(width)) == len(width)
    return None if right and len(width) <= MOST_POINTS else "expected different positive numbers"


class Widths(Training):
    """A network at several widths; a subclass has the field `width`."""

    if TYPE_CHECKING:
        width: tuple[float, ...]

    @property
    def models(self) -> list[Model]:
        """The network at every width."""
        if is_module(self.model):
            if self.width != (1.0,):
                raise UsageError(f"expected 1; {self.model} is a module of torch's and has one width")
            return [self.network]
        return [get_model(f"{self.model}@{factor:g}") for factor in self.width]

    @property
    def widest(self) -> Model:
        return self.models[-1]


@dataclass(frozen=True, kw_only=True)
class WidthsAndShares(Widths):
    """A network at several widths, of which several shares are kept."""

    keep: tuple[float, ...] = option(
        (),
        "Shares of the weights that are kept, one or several: 0.1,0.3,0.5.  [default: the method's]",
        _shares,
        ordered=False,
        extends=True,
    )
    width: tuple[float, ...] = option(
        (1.0,),
        "Widths of the hidden layers as shares of the model's: 0.25,0.5,1.",
        different_widths,
        ordered=False,
        extends=True,
    )
    # spans that the run had before it went on; config.json has called them so from the first
    sweeps: tuple[str, ...] = option((), added=True, extends=True)

    @cached_property
    def _spans(self) -> list[Span]:
        """The spans of the run, one after the other, each with more points than the one before."""
        try:
            found = [*map(Span.of, self.sweeps), Span(self.keep, self.width)]
        except ValueError as error:
            raise self.wrong("sweeps", str(error)) from error
        if not all(set(one.points) <= set(more.points) for one, more in pairwise(found)):
            raise self.wrong("sweeps", "expected points of the run as it is now")
        return found

    @cached_property
    def levels(self) -> dict[Point, int]:
        """The level of every point."""
        return numbers(self._spans)

    @cached_property
    def points(self) -> dict[int, Point]:
        return {level: point for point, level in self.levels.items()}

    def level_at(self, place: int, arm: str = "ticket") -> int:
        """The level of a point by its place, width by width; of dense, its width's."""
        width, keep = divmod(place, len(self.keep))
        if arm == "dense":
            return self.first_level(self.width[width])
        return self.levels[self.width[width], self.keep[keep]]

    def first_level(self, width: float) -> int:
        """The level of a width that its dense network has."""
        return min(self.levels[width, keep] for keep in self.keep)

    def going_on(self, theirs: Config) -> Self:
        """With the levels that a run has whose points these are, or are among these."""
        if not isinstance(theirs, WidthsAndShares):
            return self
        ours, before = self._spans[-1], theirs._spans[-1]
        if set(before.points) <= set(ours.points):
            more = (str(before),) if ours != before else ()
            return replace(self, sweeps=(*theirs.sweeps, *more))
        return self

    def keeps(self, theirs: Config, name: str) -> bool:
        if name in ("keep", "width", "sweeps"):
            return set(getattr(theirs, name)) <= set(getattr(self, name))
        return super().keeps(theirs, name)

    def _named(self, but: Collection[str]) -> dict[str, Any]:
        """A run is named by the points that it began with."""
        first = self._spans[0]
        return super()._named(but) | {"keep": list(first.keep), "width": list(first.width)}

    def point(self, cell: Cell) -> tuple[float, float]:
        """Width, and share of the weights kept, of a cell."""
        width, keep = self.points[cell.level]
        return width, 1.0 if cell.arm == "dense" else keep

    def model_of(self, cell: Cell) -> Model:
        return self.models[self.place_of_width(cell)]

    def place_of_width(self, cell: Cell) -> int:
        """The place of its width."""
        return self.width.index(self.points[cell.level][0])
