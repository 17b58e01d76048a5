"""What a run's masks look like in numbers: layers, degrees, dead units, pixels, and what two masks share.

`show --masks` prints them, as JSON too; `mask_laws` draws them. Masks of two seeds are compared weight by
weight: hidden units of two seeds are not the same units, so that their masks share what chance has, unless
places themselves matter, as pixels do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from math import fsum, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselth import tickets
from sparselth.chance import Overlap
from sparselth.config import Cell
from sparselth.errors import SparselthError
from sparselth.files import file_sum
from sparselth.models import Model
from sparselth.models.module import is_module
from sparselth.params import TensorSpec
from sparselth.patterns import UNSTRUCTURED, Pattern, get_pattern, in_words
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import weights_remaining
from sparselth.report.tables import percent
from sparselth.runs import RunRecord, cell_path

Bits = NDArray[np.bool_]
Masks = Mapping[str, Bits]  # by weight, [N, K]
SHOWN = 4  # levels
MOST_PAIRS = 10  # of seeds at a level
WITHIN = 1.96  # standard deviations that hold 95 % of a normal law


@dataclass(frozen=True)
class Layer:
    """The degrees of a weight's mask: kept weights into each unit, and out of each input of the layer."""

    name: str
    mask: Bits
    fields: int  # weights of a unit that read one input: those of a kernel, or the pixels of a channel

    @cached_property
    def into(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.mask.sum(1)
        return found

    @cached_property
    def out_of(self) -> NDArray[np.int64]:
        inputs = self.mask.shape[1] // self.fields
        found: NDArray[np.int64] = self.mask.reshape(len(self.mask), inputs, self.fields).sum((0, 2))
        return found


class MaskReader:
    """The masks of a run, read and checked once each."""

    def __init__(self, record: RunRecord) -> None:
        self.record, self.model = record, record.config.network
        self._found: dict[Cell, Masks] = {}

    def of(self, cell: Cell) -> Masks:
        if cell not in self._found:
            file = cell_path(self.record.path, cell)
            try:
                right = file_sum(file) == self.record.files.get(cell, file_sum(file))
            except OSError as error:
                raise SparselthError(f"{file}: cannot be read ({error.strerror})") from error
            if not right:
                raise SparselthError(f"{file}: is not what was written; continue the run with `resume`")
            mask = tickets.read(file, self.model.params)[0].mask
            self._found[cell] = {s.name: mask[s.span].reshape(s.matrix) for s in self.model.weights}
        return self._found[cell]


def layers_of(model: Model, masks: Masks) -> list[Layer]:
    """The layers of a network under masks, in order."""
    return [
        Layer(spec.name.removesuffix(".weight"), masks[spec.name], prod(spec.shape[2:]))
        for spec in model.weights
    ]


def dead_units(model: Model, masks: Masks) -> dict[str, int]:
    """Hidden units by layer that nothing goes into or nothing comes out of, as long as any are found.

    What is dead takes along what only it reads, and what reads only it. Where it is not known who reads a
    layer, as in modules and around shortcuts, units without a weight into them alone are counted.
    """
    names, specs = [spec.name for spec in model.weights], list(model.weights)
    alive = {spec.name: masks[spec.name].any(1) for spec in specs}
    if is_module(model.name) or not model.is_chain:
        return {name.removesuffix(".weight"): int((~alive[name]).sum()) for name in names[:-1]}
    now = {name: masks[name].copy() for name in names}
    changed = True
    while changed:
        changed = False
        for one, other in pairwise(names):
            field = now[other].shape[1] // len(now[one])
            reads = now[other].reshape(len(now[other]), len(now[one]), field)
            live = now[one].any(1) & reads.any((0, 2))
            if now[one][~live].any() or reads[:, ~live].any():
                changed = True
                now[one][~live] = False
                reads[:, ~live] = False
            alive[one] = live
    return {name.removesuffix(".weight"): int((~alive[name]).sum()) for name in names[:-1]}


@dataclass(frozen=True)
class Shared:
    """What pairs of masks share, beside chance: masks of as many weights in each layer, shuffled there."""

    between: str  # seeds, levels, or the ticket and an arm
    level: int
    pairs: tuple[tuple[tuple[str, Overlap], ...], ...]  # by layer

    def row(self, layer: str) -> dict[str, Any]:
        """As JSON, of a layer or "all": shares of the smaller mask, means over the pairs."""
        parts = [[o for name, o in pair if layer in (name, "all")] for pair in self.pairs]
        least = [max(1, sum(min(o.a, o.b) for o in part)) for part in parts]
        shares = [sum(o.shared for o in part) / n for part, n in zip(parts, least, strict=True)]
        chances = [fsum(o.expected for o in part) / n for part, n in zip(parts, least, strict=True)]
        low, high = self._interval(parts[0])
        return {
            "between": self.between,
            "level": self.level,
            "layer": layer,
            "pairs": len(parts),
            "shared": fsum(shares) / len(shares),
            "least": min(shares),
            "most": max(shares),
            "by_chance": fsum(chances) / len(chances),
            "chance_interval": [low / least[0], high / least[0]],
        }

    @staticmethod
    def _interval(part: Sequence[Overlap]) -> tuple[float, float]:
        """Between which counts 95 % of a pair of random masks lie: exactly of one layer, nearly of a sum."""
        if len(part) == 1:
            return part[0].interval()
        middle, spread = fsum(o.expected for o in part), sqrt(fsum(o.deviation**2 for o in part))
        return middle - WITHIN * spread, middle + WITHIN * spread


def overlap(
    model: Model, one: Masks, other: Masks, pattern: Pattern | None = None
) -> tuple[tuple[str, Overlap], ...]:
    """By layer; masks that a pattern made are beside random ones in it."""

    def found(spec: TensorSpec) -> Overlap:
        a, b = one[spec.name].ravel(), other[spec.name].ravel()
        if pattern is None or a.all() or b.all():  # as where the pattern does not fit
            return Overlap.of(a, b)
        return pattern.overlap(spec, a, b)

    return tuple((spec.name.removesuffix(".weight"), found(spec)) for spec in model.weights)


class Numbers:
    """Everything that is said of a run's masks, from its files."""

    def __init__(self, record: RunRecord) -> None:
        self.record, self.reader, self.model = record, MaskReader(record), record.config.network
        self.there = {Cell.of(p) for p in record.points}
        levels = sorted({c.level for c in self.there if c.arm == "ticket" and c.level})
        at = np.ceil(np.linspace(0, len(levels), min(SHOWN, len(levels)) + 1)[1:]).astype(int) - 1
        self.levels = [levels[i] for i in at] if levels else []

    def seeds(self, level: int, arm: str = "ticket") -> list[int]:
        return sorted(c.seed for c in self.there if (c.arm, c.level, c.draw) == (arm, level, 0))

    def tickets(self, level: int) -> list[Masks]:
        return [self.reader.of(Cell(seed, "ticket", level)) for seed in self.seeds(level)]

    @cached_property
    def shared(self) -> list[Shared]:
        """Between seeds, between a level and the one before, and between ticket and arms of other masks."""
        found: list[Shared] = []
        for level in self.levels:
            pairs = [*combinations(self.seeds(level), 2)][:MOST_PAIRS]
            found += self._between(
                "seeds", level, [(Cell(a, "ticket", level), Cell(b, "ticket", level)) for a, b in pairs]
            )
            befores = [
                (Cell(s, "ticket", level), Cell(s, "ticket", level - 1))
                for s in self.seeds(level)
                if level > 1
            ]
            found += self._between("levels", level, [p for p in befores if p[1] in self.there])
            for arm in self.record.config.arms:
                own = [(Cell(s, "ticket", level), Cell(s, arm, level)) for s in self.seeds(level, arm)]
                if arm != "ticket":
                    found += self._between(arm, level, [p for p in own if p[0] in self.there])
        return found

    def _between(self, name: str, level: int, pairs: Iterable[tuple[Cell, Cell]]) -> list[Shared]:
        """None where there is no pair, or all are of equal masks, as those of arms that only draw weights."""
        pattern = get_pattern(self.record.config.pattern)
        told = tuple(overlap(self.model, self.reader.of(a), self.reader.of(b), pattern) for a, b in pairs)
        equal = all(o.shared == o.a == o.b for pair in told for _, o in pair)
        return [Shared(name, level, told)] if told and not equal else []

    @cached_property
    def layers(self) -> list[dict[str, Any]]:
        """A row a level, seed and layer: kept weights, degrees, dead units."""
        rows: list[dict[str, Any]] = []
        for level in self.levels:
            for seed, masks in zip(self.seeds(level), self.tickets(level), strict=True):
                dead = dead_units(self.model, masks)
                for layer in layers_of(self.model, masks):
                    rows.append(
                        {"level": level, "seed": seed, "layer": layer.name}
                        | {"kept": int(layer.mask.sum()), "weights": layer.mask.size}
                        | {"units": len(layer.into), "inputs": len(layer.out_of)}
                        | {"without_input": int((layer.into == 0).sum())}
                        | {
                            "unread_inputs": int((layer.out_of == 0).sum()),
                            "dead_units": dead.get(layer.name),
                        }
                        | {"into": _quantiles(layer.into), "out_of": _quantiles(layer.out_of)}
                    )
        return rows

    def pixels(self) -> list[dict[str, Any]]:
        """Units of the first layer that read each pixel, of the first seed, as [C, H, W]; of images alone."""
        spec, shape = self.model.weights[0], self.model.input
        if len(shape) != 3 or spec.shape[1:] != (prod(shape),):
            return []
        rows = []
        for level in self.levels:
            seed = self.seeds(level)[0]
            mask = self.reader.of(Cell(seed, "ticket", level))[spec.name]
            rows.append({"level": level, "seed": seed, "readers": mask.sum(0).reshape(shape).tolist()})
        return rows

    def to_json(self) -> dict[str, Any]:
        names = [*(s.name.removesuffix(".weight") for s in self.model.weights), "all"]
        return {
            "layers": self.layers,
            "overlap": [one.row(name) for one in self.shared for name in names],
            "pixels": self.pixels(),
            "sentence": sentence(self),
        }


def _quantiles(degrees: NDArray[np.int64]) -> dict[str, float]:
    """Least, quartiles and most."""
    values = np.quantile(degrees, (0, 0.25, 0.5, 0.75, 1))
    return dict(zip(("least", "first", "median", "third", "most"), map(float, values), strict=True))


def _mean(rows: Iterable[float]) -> float:
    values = [*rows]
    return fsum(values) / len(values)


def table(numbers: Numbers) -> str:
    """Layers and overlaps as text."""
    record, remaining = numbers.record, weights_remaining(numbers.record)
    if not numbers.levels:
        return f"masks of {record.path}: no ticket above level 0 is finished"
    parts = [fill(f"masks of {record.config.title}")]
    level = numbers.levels[-1]
    own = [row for row in numbers.layers if row["level"] == level]
    names = [*dict.fromkeys(row["layer"] for row in own)]

    def column(field: str, head: str, quantile: str = "", digits: int = 0) -> list[str]:
        values = [
            [(r[field][quantile] if quantile else r[field]) for r in own if r["layer"] == n] for n in names
        ]
        return [head, *("" if None in v else f"{_mean(v):,.{digits}f}" for v in values)]

    kept = [
        "left %",
        *(percent(_mean(r["kept"] / r["weights"] for r in own if r["layer"] == n)) for n in names),
    ]
    lead = Group([["layer", *(name.ljust(max(map(len, names))) for name in names)]])
    groups = [
        Group([kept, column("units", "units"), column("dead_units", "dead", digits=1)]),
        Group(
            [
                column("into", "least", "least"),
                column("into", "median", "median"),
                column("into", "most", "most"),
            ],
            "into a unit",
        ),
        Group(
            [
                column("inputs", "inputs"),
                column("unread_inputs", "unread", digits=1),
                column("out_of", "median", "median"),
                column("out_of", "most", "most"),
            ],
            "out of an input",
        ),
    ]
    where = (
        f"level {level}, {percent(remaining[level])} % left, means over the seeds; degrees are kept weights"
    )
    parts += [fill(where) + "\n" + side_by_side(lead, groups, width())]
    if numbers.shared:
        rows = [one.row("all") for one in numbers.shared]
        lead = Group([["between", *(_between(row).ljust(22) for row in rows)]])
        columns = [
            ["left %", *(percent(remaining[row["level"]]) for row in rows)],
            ["shared %", *(f"{100 * row['shared']:.1f}" for row in rows)],
            ["by chance %", *(f"{100 * row['by_chance']:.1f}" for row in rows)],
            ["95 % of chance", *(_span(row["chance_interval"]) for row in rows)],
        ]
        parts.append(side_by_side(lead, [Group(columns)], width()))
    parts.append(
        fill(
            "dead: hidden units that nothing goes into or nothing comes out of, with what only they read and "
            "what reads only them; a bias may leave a constant.\n"
            "shared: of the weights of the smaller mask, those that the other has, too, mean over pairs. By "
            f"chance: of masks with {_drawn(numbers)} in each layer, at random (hypergeometric); its "
            "interval is of one pair. A level's mask lies within that of the level before, by the way it is "
            "found."
        )
    )
    return "\n\n".join([*parts, fill(sentence(numbers), indent="")])


def _drawn(numbers: Numbers) -> str:
    """What chance draws in each layer."""
    name = numbers.record.config.pattern
    if name == "2:4":
        return "2 of every 4 weights"
    return f"as many {'weights' if name == UNSTRUCTURED else in_words(name)}"


def _between(row: Mapping[str, Any]) -> str:
    named = {"seeds": "tickets of two seeds", "levels": "and the level before"}
    return named.get(row["between"], f"ticket and {row['between']}")


def _span(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def sentence(numbers: Numbers) -> str:
    """What the last level says of masks beside chance, with the interval of chance."""
    found = [one for one in numbers.shared if one.between == "seeds"]
    if not found:
        return "One seed has no other to be compared with; whether masks are alike is open."
    last = found[-1]
    row = last.row("all")
    left = percent(weights_remaining(numbers.record)[last.level])
    low, high = row["chance_interval"]
    word = "more than" if row["shared"] > high else "less than" if row["shared"] < low else "no more than"
    text = (
        f"At {left} % left tickets of two seeds share {100 * row['shared']:.1f} % of their weights, {word} "
        f"chance, {100 * row['by_chance']:.1f} % ({_span([low, high])} for 95 % of random pairs)"
    )
    names = [s.name.removesuffix(".weight") for s in numbers.model.weights]
    by_layer = [last.row(name) for name in names]
    above = [r["layer"] for r in by_layer if r["shared"] > r["chance_interval"][1]]
    if above and len(names) > 1:
        some = ", ".join(above[:6]) + (" and others" if len(above) > 6 else "")
        text += f"; by layer above chance: {some}"
    return text + "."
