"""What reports of experiments beside `imp` have in common: values by seed, gaps, lines of a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparselth.report.drawing import DASHED, WIDTH, look, spread
from sparselth.report.stats import FEWEST, SLACK, Gap, images_counted, mean_interval, paired, signed_pp
from sparselth.runs import RunRecord

MISSING = "–"
Values = Mapping[int, float]  # by seed


def by_seed(points: Iterable[Mapping[str, Any]], field: str, **where: Any) -> dict[int, float]:
    """Seed → the mean of a field over its points with these values."""
    found: dict[int, list[float]] = {}
    for point in points:
        if point.get(field) is not None and all(point.get(name) == value for name, value in where.items()):
            found.setdefault(point["seed"], []).append(point[field])
    return {seed: fsum(found[seed]) / len(found[seed]) for seed in sorted(found)}


def averaged(some: Sequence[Values]) -> dict[int, float]:
    """Seed → the mean of several values, of seeds that have all of them."""
    seeds = sorted(set.intersection(*(set(one) for one in some))) if some else []
    return {seed: fsum(one[seed] for one in some) / len(some) for seed in seeds}


def gap(record: RunRecord, a: Values, b: Values, accuracies: bool = True) -> Gap | None:
    """`a` minus `b`, paired by seed; None where no seed has both."""
    both = [a[seed] - b[seed] for seed in a if seed in b]
    return paired(both, images_counted(record) if accuracies else None) if both else None


def mean_cell(values: Values, scale: float = 100.0, digits: int = 2) -> str:
    """A mean with its interval, as a cell of a table."""
    if not values:
        return MISSING
    mean, half = mean_interval(values.values())
    interval = "" if half is None or len(values) < FEWEST else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f}{interval}"


def said(found: Gap | None) -> str:
    """A gap of accuracies in words: "0.52 ± 0.20 pp above"; "not clearly different from"."""
    if found is None or found.half is None:
        return ""
    if found.low <= SLACK and found.high >= -SLACK:
        return f"not clearly different from ({signed_pp(found)})"
    side = "above" if found.mean > 0 else "below"
    return f"{100 * abs(found.mean):.2f} ± {100 * found.half:.2f} pp {side}"


def gap_json(found: Gap | None) -> dict[str, Any] | None:
    return None if found is None else {"mean": found.mean, "half_width": found.half, "seeds": found.seeds}


def axes_of(height: float = 2.5) -> tuple[Figure, Axes]:
    """A figure one column wide."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    return fig, fig.add_subplot()


def line(
    axes: Axes, x: Sequence[float], values: Sequence[Iterable[float]], label: str, which: int, **how: Any
) -> None:
    """Means over the seeds at places x, with a band of their spread; in the which-th colour and marker."""
    colour, marker = look(which)
    rows = np.array([spread(one) for one in values]).T
    if len(x) and max(len([*one]) for one in values) > 1:
        axes.fill_between(x, rows[1], rows[2], color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, rows[0], label=label, **{"color": colour, "marker": marker} | how)


def level_of_dense(axes: Axes, values: Values, scale: float = 100.0) -> None:
    """The dense network's mean as a dashed line."""
    mean, _ = mean_interval(values.values())
    axes.axhline(scale * mean, color="black", linestyle=DASHED, linewidth=0.7, label="dense", zorder=1)
