"""The figures of `strong`: accuracy against the share kept, width and bytes, and as it is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sparselth.frozen import METHODS
from sparselth.report.drawing import (
    DASHED,
    WIDTH,
    all_of_it,
    band_note,
    head,
    heading,
    look,
    save_each,
    spread,
)
from sparselth.report.strong import mean, others, places, values
from sparselth.runs import RunRecord

LOOKS = {arm: look(i) for i, arm in enumerate(("ticket", "imp", "random-mask", *METHODS))}
LABELS = {"ticket": "strong ticket", "imp": "trained ticket", "random-mask": "random mask", "dense": "dense"}
END = "test accuracy (%)"
NEAR = 12.0  # how far below the best a strong ticket is drawn at full scale, in pp


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Draw every figure that the finished cells support; returns the files written."""
    last = folder / "learning.svg"  # is drawn last
    if last.exists() and last.stat().st_mtime_ns > (record.path / "cells.jsonl").stat().st_mtime_ns:
        return []
    if not any(values(record, "ticket", place) for place in places(record)):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[RunRecord], Figure | None]] = {
        "kept": _kept,
        "width": _width,
        "bytes": _bytes,
        "learning": _learning,
    }
    return save_each(makers, record, folder)


def _axes() -> tuple[Figure, Axes]:
    fig = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    return fig, fig.add_subplot()


def _kept(record: RunRecord) -> Figure | None:
    """Accuracy against the share that is kept, at the largest width: the hump."""
    config, number = record.config, len(record.config.keep)
    if number < 2:
        return None
    fig, axes = _axes()
    points = [place for place in places(record) if place >= len(places(record)) - number]
    arms = ("ticket", *others(record), "imp", "random-mask")
    _lines(record, axes, points, lambda place: 100 * config.keep[place % number], arms)
    _dense(record, axes, points[-1])
    axes.set_xlim(0, 100)
    axes.set_xlabel("weights kept (%)")
    wide = [f"width {config.width[-1]:g}"] if len(config.width) > 1 else []
    return _ended(record, fig, axes, wide)


def _width(record: RunRecord) -> Figure | None:
    """Accuracy against width, at each width the share that is best for the strong ticket."""
    config, number = record.config, len(record.config.keep)
    if len(config.width) < 2:
        return None
    fig, axes = _axes()
    middle = range(len(places(record)))
    best = []
    for i in range(len(config.width)):
        here = [at for at in middle[i * number : (i + 1) * number] if values(record, "ticket", at)]
        best += [max(here, key=lambda at: mean(record, "ticket", at) or 0.0)] if here else []
    _lines(
        record,
        axes,
        best,
        lambda place: config.width[place // number],
        ("ticket", *others(record), "imp", "random-mask", "dense"),
    )
    axes.set_xscale("log")
    shown = list(config.width)
    axes.set_xticks(shown, [f"{factor:g}" for factor in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("width of the hidden layers")
    kept = ["the best share kept at each width"] if number > 1 else [f"{100 * config.keep[0]:g} % kept"]
    return _ended(record, fig, axes, kept)


def _bytes(record: RunRecord) -> Figure | None:
    """Accuracy against what a file must hold."""
    fig, axes = _axes()
    drawn = 0
    for arm in ("ticket", *others(record), "imp", "dense"):
        rows = []
        for place in (
            places(record) if arm != "dense" else range(0, len(places(record)), len(record.config.keep))
        ):
            size, found = mean(record, arm, place, "coded_bytes"), values(record, arm, place)
            if size is not None and found:
                rows.append((size / 1e3, *(100 * value for value in spread(found.values()))))
        if rows and arm in record.config.arms:
            x, centre, low, high = np.array(sorted(rows)).T
            colour, marker = LOOKS.get(arm, ("black", "P"))
            axes.errorbar(x, centre, (centre - low, high - centre), fmt="none", ecolor=colour, elinewidth=0.7)
            axes.plot(x, centre, color=colour, marker=marker, linestyle="none", label=_label(record, arm))
            drawn += 1
    if drawn < 2:
        return None
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.set_xlabel("what a file must hold (KB)")
    bars = [note.replace("band", "bars") for note in band_note(len(record.config.seeds))]
    return _ended(record, fig, axes, ["masks by entropy, weights fp32", *bars], bands=False)


def _learning(record: RunRecord) -> Figure | None:
    """Validation accuracy against step, of the best point."""
    found = [place for place in places(record) if values(record, "ticket", place)]
    best, config = max(found, key=lambda at: mean(record, "ticket", at) or 0.0), record.config
    fig, axes = _axes()
    for arm in ("ticket", *others(record), "imp", "dense"):
        level = config.level_at(best, arm)
        steps = dict[int, list[float]]()
        for one in record.evaluations:
            if (one["arm"], one["level"], one["draw"]) == (arm, level, 0):
                steps.setdefault(one["step"], []).append(100 * one["validation_accuracy"])
        if steps and arm in record.config.arms:
            x = sorted(steps)
            centre, low, high = np.array([spread(steps[step]) for step in x]).T
            colour, marker = LOOKS.get(arm, ("black", "P"))
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            every = max(1, len(x) // 12)
            axes.plot(x, centre, color=colour, marker=marker, markevery=every, label=_label(record, arm))
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("validation accuracy (%)")
    ends = [float(np.asarray(line.get_ydata(), float)[-1]) for line in axes.lines]
    all_of_it([axes], min(ends) - max(3.0, max(ends) - min(ends)), 0.5, 100)
    head(fig, axes, _heading(record, [_point(record, best)]))
    return fig


# ---- what they share


def _label(record: RunRecord, arm: str) -> str:
    """An arm in a legend; beside other methods the ticket goes by the name of its own."""
    return str(record.config.method) if arm == "ticket" and others(record) else LABELS.get(arm, arm)


def _lines(
    record: RunRecord,
    axes: Axes,
    points: Sequence[int],
    x_of: Callable[[int], float],
    arms: Sequence[str],
) -> None:
    """A line and a band over the seeds of each arm."""
    for arm in arms:
        rows = []
        for place in points:
            if found := values(record, arm, place):
                rows.append((x_of(place), *(100 * value for value in spread(found.values()))))
        if rows and arm in record.config.arms:
            x, centre, low, high = np.array(rows).T
            colour, marker = LOOKS.get(arm, ("black", "P"))
            style = DASHED if arm == "dense" else "-"
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, centre, color=colour, marker=marker, label=_label(record, arm), linestyle=style)


def _dense(record: RunRecord, axes: Axes, place: int) -> None:
    found = mean(record, "dense", place)
    if found is not None:
        axes.axhline(100 * found, color="black", linestyle=DASHED, linewidth=0.7, label="dense", zorder=1)


def _ended(record: RunRecord, fig: Figure, axes: Axes, notes: Sequence[str], bands: bool = True) -> Figure:
    """The scale of y, which shows what lies near dense at full size, the heading and the legend."""
    axes.set_ylabel(END)
    scored = {_label(record, arm) for arm in ("ticket", *others(record))}
    lines = [np.asarray(line.get_ydata(), float) for line in axes.lines if line.get_label() in scored]
    shown = np.concatenate(lines)
    top = max(float(np.asarray(line.get_ydata(), float).max()) for line in axes.lines)
    near = float(shown[shown > min(top - NEAR, float(shown.max()) - 1e-9)].min())
    all_of_it([axes], near - max(0.5, 0.1 * (top - near)), 0.5, 100)
    head(fig, axes, _heading(record, notes, bands))
    return fig


def _point(record: RunRecord, place: int) -> str:
    config, number = record.config, len(record.config.keep)
    wide = f"width {config.width[place // number]:g}, " if len(config.width) > 1 else ""
    return f"{wide}{100 * config.keep[place % number]:g} % kept"


def _heading(record: RunRecord, notes: Sequence[str], bands: bool = True) -> str:
    drawn = band_note(len(record.config.seeds)) if bands else []
    return heading(record, [*notes, *drawn], how=record.config.how)
