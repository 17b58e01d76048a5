"""A sweep as text, JSON and a figure: accuracy at each level by point, and which point is best.

Points are compared where all of them are: at the sparsest share of weights that every point reaches, each at
its level nearest to that; where one has dense networks alone, dense ones. Every pair is compared seed by seed
(Student's t, as in `stats`), and all pairs are read at once by Holm's correction: so the best may be chosen
by looking, and still stands or does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from sparselth.cluster.grid import spelled
from sparselth.cluster.store import SweepRecord
from sparselth.config import Cell
from sparselth.report.diverged import said
from sparselth.report.drawing import STYLE, all_of_it, balanced, band_note, level_axis, save
from sparselth.report.lines import MISSING, axes_of, by_seed, gap, gap_json, line, mean_cell
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import (
    FEWEST,
    Gap,
    holm,
    mean_interval,
    seed_list,
    signed,
    signed_pp,
)
from sparselth.report.tables import percent
from sparselth.runs import RunRecord

FIELDS = {"accuracy_at_early_stop": "at early stop", "final_accuracy": "at the end of training"}
MOST_LINES = 12  # of the figure


@dataclass(frozen=True)
class Level:
    """A level of a point: the share of weights left, and accuracies by seed."""

    remaining: float | None
    accuracies: Mapping[int, float]

    @property
    def mean(self) -> float:
        return mean_interval(self.accuracies.values())[0]


@dataclass(frozen=True)
class Numbers:
    """What table, JSON and figure show."""

    sweep: SweepRecord

    @cached_property
    def cells(self) -> dict[str, list[dict[str, Any]]]:
        """The finished cells of every point that has some."""
        found = {point: self.sweep.cells(point) for point in self.sweep.points}
        return {point: cells for point, cells in found.items() if cells}

    @cached_property
    def labels(self) -> dict[str, str]:
        """What points are called beside each other: by the axes on which they differ, if any."""
        differ = [name for name, values in self.sweep.layout.axes.items() if len(values) > 1]
        return {
            point: ",".join(f"{name}={spelled(runs[0].values[name])}" for name in differ) or point
            for point, runs in self.sweep.points.items()
        }

    @cached_property
    def arm(self) -> str:
        """The arm that is shown: the ticket, or the first there is; dense where there is no other."""
        arms = dict.fromkeys(one["arm"] for cells in self.cells.values() for one in cells)
        return next((arm for arm in ("ticket", *arms) if arm in arms and arm != "dense"), "dense")

    @cached_property
    def field(self) -> str | None:
        """The accuracy that cells have; None of an experiment whose cells have none."""
        there = {name for cells in self.cells.values() for one in cells for name in one}
        return next((name for name in FIELDS if name in there), None)

    @cached_property
    def levels(self) -> dict[str, dict[int, Level]]:
        """Every level of every point that has an accuracy."""
        found = dict[str, dict[int, Level]]()
        for point, cells in self.cells.items() if self.field else ():
            mine = [one for one in cells if one["arm"] == self.arm]
            if self.arm == "ticket":  # of at-init's score imp other draws are rounds before it
                mine = [one for one in mine if not one["draw"]]
            for level in sorted({one["level"] for one in mine}):
                here = by_seed(mine, str(self.field), level=level)
                left = by_seed(mine, "weights_remaining", level=level)
                if here:
                    mean = mean_interval(left.values())[0] if left else None
                    found.setdefault(point, {})[level] = Level(mean, here)
        return found

    @cached_property
    def common(self) -> float | None:
        """The sparsest share of weights that every point reaches; None where levels say no share."""
        shares = [
            [one.remaining for one in levels.values() if one.remaining] for levels in self.levels.values()
        ]
        return max(map(min, shares)) if shares and all(shares) else None

    @cached_property
    def compared(self) -> dict[str, int]:
        """The level at which a point is compared: nearest to the common share, or its last."""
        found = dict[str, int]()
        for point, levels in self.levels.items():
            if (common := self.common) is None:
                found[point] = max(levels)
                continue
            shares = {level: one.remaining for level, one in levels.items() if one.remaining}
            sparse = {level: share for level, share in shares.items() if share < 1 or common == 1}
            found[point] = min(sparse, key=lambda level: abs(log(sparse[level] / common)))
        return found

    def at(self, point: str) -> Level:
        """A point where it is compared."""
        return self.levels[point][self.compared[point]]

    @cached_property
    def ranked(self) -> list[str]:
        """The points from the best mean on."""
        return sorted(self.levels, key=lambda point: (-self.at(point).mean, point))

    def minus(self, a: str, b: str) -> Gap | None:
        """One point minus another, paired by seed."""
        record: RunRecord = self.sweep.of(a)[0]
        return gap(record, self.at(a).accuracies, self.at(b).accuracies)

    @cached_property
    def clear(self) -> set[str]:
        """The points that the best is clearly above when all pairs are read at once."""
        pairs = [*combinations(self.ranked, 2)]
        gaps = [self.minus(a, b) for a, b in pairs]
        chances = {i: one.chance(0.0) for i, one in enumerate(gaps) if one is not None}
        return {pairs[i][1] for i in holm(chances) if pairs[i][0] == self.ranked[0]}


def table(sweep: SweepRecord) -> str:
    """The whole report as text."""
    numbers, layout = Numbers(sweep), sweep.layout
    done, number = len(sweep.finished), len(layout.runs)
    axes = "; ".join(f"{name} {', '.join(map(spelled, values))}" for name, values in layout.axes.items())
    state = f"{len(sweep.points)} points, {done} of {number} runs finished"
    parts = [fill(f"{layout.experiment} over {axes}: {state}")]
    if numbers.levels:
        parts.append(_by_level(numbers))
        parts.append(
            fill(
                f"accuracy %: of {numbers.arm} on the test set {FIELDS[str(numbers.field)]}, mean over the "
                "seeds ± 95 % interval; left %: weights that are kept."
            )
        )
        if len(numbers.levels) > 1:
            parts += [_ranking(numbers), fill(sentence(numbers), indent="")]
    elif numbers.cells:
        parts += ["\n".join(f"{point}: {len(cells)} points" for point, cells in numbers.cells.items())]
        parts += [fill(f"`sparselth show {sweep.path}/NAME` has the table of a run.")]
    parts += ["\n".join(troubles(sweep))] * bool(troubles(sweep))
    return "\n\n".join(parts)


def troubles(sweep: SweepRecord) -> list[str]:
    """A line for each run that has an error, and for networks that diverged."""
    lines = [fill(f"failed: {name}: {why}") for name, why in sweep.failed.items()]
    return lines + [fill(f"{name}: {'; '.join(said(record))}") for name, record in sweep.diverged]


def _by_level(numbers: Numbers) -> str:
    rows = sorted({level for levels in numbers.levels.values() for level in levels})
    groups = []
    for point, levels in numbers.levels.items():
        cells = [levels.get(level) for level in rows]
        left = [MISSING if one is None or one.remaining is None else percent(one.remaining) for one in cells]
        found = [MISSING if one is None else mean_cell(one.accuracies) for one in cells]
        groups.append(Group([["left %", *left], ["accuracy %", *found]], numbers.labels[point]))
    return side_by_side(Group([["level", *map(str, rows)]]), groups, width())


def _ranking(numbers: Numbers) -> str:
    points, best = numbers.ranked, numbers.ranked[0]
    names = ["point", *(numbers.labels[point] for point in points)]
    lead = Group([[name.ljust(max(map(len, names))) for name in names]])
    at = [numbers.at(point) for point in points]
    against = [None if point == best else numbers.minus(point, best) for point in points]
    columns = [
        ["level", *(str(numbers.compared[point]) for point in points)],
        ["left %", *(MISSING if one.remaining is None else percent(one.remaining) for one in at)],
        ["accuracy %", *(mean_cell(one.accuracies) for one in at)],
        ["vs best", "best", *(MISSING if one is None else signed(one) for one in against[1:])],
        ["clearly", "", *("below" if point in numbers.clear else "" for point in points[1:])],
    ]
    return side_by_side(lead, [Group(columns)], width())


def sentence(numbers: Numbers) -> str:
    """Which point is best, by which test; or that it is open."""
    best, *others = numbers.ranked
    where = "at the last level"
    if numbers.common is not None:
        where = f"at about {percent(numbers.common)} % of the weights, the sparsest that all points reach"
    gaps = {point: numbers.minus(best, point) for point in others}
    seeds = min(gap.seeds if gap else 0 for gap in gaps.values())  # that two points have in common
    if seeds < FEWEST:
        return (
            f"Which point is best {where} is open: {seeds} seed{'s' * (seeds != 1)} of some give no "
            "interval; five tell more."
        )
    count = len(numbers.ranked) * len(others) // 2
    rule = "Student's t seed by seed, 5 %" + f" over all {count} pairs by Holm's correction" * (count > 1)
    told = f"Best {where}: {numbers.labels[best]}, {mean_cell(numbers.at(best).accuracies)} %"
    if not (near := [point for point in others if point not in numbers.clear]):
        return f"{told}, clearly above every other ({rule})."
    second = gaps[near[0]]
    assert second is not None
    listed = ", ".join(numbers.labels[point] for point in near[:3]) + (
        f" and {len(near) - 3} more" if len(near) > 3 else ""
    )
    return (
        f"{told}; not clearly above {listed} ({signed_pp(second)} against {numbers.labels[near[0]]}; {rule})."
    )


def to_json(sweep: SweepRecord) -> dict[str, Any]:
    """The document of --json: a point a cell, with its values on the axes."""
    numbers, layout = Numbers(sweep), sweep.layout
    values = {point: runs[0].values for point, runs in sweep.points.items()}
    return {
        "schema": "sparselth.sweep/1",
        "sweep": str(sweep.path),
        "experiment": layout.experiment,
        "axes": layout.axes,
        "settings": layout.settings,
        "complete": sweep.complete,
        "runs": [
            {"run": run.name, "point": run.point, "grid": run.values, "finished": run.name in sweep.finished}
            | {"error": sweep.failed.get(run.name)}
            for run in layout.runs
        ],
        "points": [
            {"point": point, "grid": values[point]} | one
            for point, cells in numbers.cells.items()
            for one in cells
        ],
        "diverged": [
            {"run": name, "cell": str(Cell.of(one)), "why": one["why"]}
            for name, record in sweep.diverged
            for one in record.diverged
        ],
        "summary": [_summary(numbers, point, values[point]) for point in numbers.levels],
        "best": _best(numbers) if len(numbers.levels) > 1 else None,
    }


def _summary(numbers: Numbers, point: str, values: dict[str, Any]) -> dict[str, Any]:
    levels = []
    for level, one in numbers.levels[point].items():
        mean, half = mean_interval(one.accuracies.values())
        levels.append(
            {"level": level, "weights_remaining": one.remaining, "seeds": len(one.accuracies)}
            | {str(numbers.field): {"mean": mean, "half_width": half}}
        )
    return {"point": point, "grid": values, "arm": numbers.arm, "levels": levels}


def _best(numbers: Numbers) -> dict[str, Any]:
    best, *others = numbers.ranked
    return {
        "point": best,
        "weights_remaining": numbers.common,
        "level": numbers.compared[best],
        "minus": [
            {"point": point, "level": numbers.compared[point], "clearly": point in numbers.clear}
            | {"difference": gap_json(numbers.minus(best, point))}
            for point in others
        ],
        "sentence": sentence(numbers),
    }


# ---- the figure


def draw(sweep: SweepRecord) -> list[Path]:
    """Draw the figure into the sweep's folder, if there is anything to show."""
    folder = sweep.path / "figures"
    with matplotlib.style.context(STYLE):
        if (fig := figure(Numbers(sweep))) is None:
            return []
        folder.mkdir(exist_ok=True)
        return save(fig, folder, "sweep")


def figure(numbers: Numbers) -> Figure | None:
    """Accuracy against the share of weights left, a line a point; of many points the best."""
    lines = {
        point: [one for one in levels.values() if one.remaining]
        for point, levels in numbers.levels.items()
        if sum(one.remaining is not None for one in levels.values()) > 1
    }
    if not lines:
        return None
    kept = [point for point in numbers.ranked if point in lines][:MOST_LINES]
    fig, axes = axes_of(3.0)
    for which, point in enumerate(point for point in lines if point in kept):
        x = [100 * one.remaining for one in lines[point] if one.remaining]
        scaled = [[100 * value for value in one.accuracies.values()] for one in lines[point]]
        line(axes, x, scaled, numbers.labels[point], which)
    level_axis(axes, sorted({100 * one.remaining for point in kept for one in lines[point] if one.remaining}))
    axes.set_ylabel("test accuracy (%)")
    means = sorted(100 * one.mean for point in kept for one in lines[point])
    all_of_it([axes], means[len(means) // 4] - 1, 0.5, 100)
    layout, config = numbers.sweep.layout, numbers.sweep.layout.runs[0].config
    seeds = sorted({seed for point in kept for one in lines[point] for seed in one.accuracies})
    of = " ".join(
        f"{word} {getattr(config, name)}"
        for word, name in (("of", "model"), ("on", "dataset"))
        if hasattr(config, name)
    )
    notes = band_note(len(seeds)) + [f"the best {len(kept)} of {len(lines)} points"] * (
        len(kept) < len(lines)
    )
    title = [f"{layout.experiment} {of}, {numbers.arm}, seeds {seed_list(tuple(seeds))}", "; ".join(notes)]
    fig.suptitle("\n".join(balanced(text) for text in title if text), fontsize=7)
    columns = max(1, min(len(kept), 3, 56 // (8 + max(len(numbers.labels[point]) for point in kept))))
    fig.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.8)
    return fig
