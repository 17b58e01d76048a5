"""Figures of `landscape`: slices on one scale, eigenvalues seed by seed, lines between solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from sparselth.report.drawing import (
    DASHED,
    WIDTH,
    balanced,
    band_note,
    extremes,
    level_axis,
    log_axis,
    look_of,
    save_each,
    short,
    spread,
)
from sparselth.report.landscape import EIGENVALUE, rows, values
from sparselth.report.stats import seeds_named
from sparselth.runs import RunRecord

MOST_COLUMNS, MOST_ROWS = 3, 4
LEAST = 1e-3  # of the losses' span on a scale of logarithms, from the largest down
LEVELS = 13  # of contours


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Draw what is not there yet, or is older than the cells; an older version drew no levels."""
    wanted = ["slices", *["levels"] * (len(_sharp_levels(record)) > 1)]
    fresh = (record.path / "cells.jsonl").stat().st_mtime_ns
    files = [folder / f"{name}.svg" for name in wanted]
    if all(file.exists() and file.stat().st_mtime_ns > fresh for file in files):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"eigenvalues": _eigenvalues, "levels": _levels, "lines": _lines, "slices": _slices}
    return save_each(makers, record, folder)


def _name(record: RunRecord, level: int, arm: str) -> str:
    left = short(record.config.imp.remaining()[level])
    return f"{'dense' if level == 0 else arm}, {left} %"


def _title(record: RunRecord, note: str = "") -> str:
    config = record.config
    seeds = seeds_named(config.seeds)
    lines = (f"{config.imp.model} on {config.dataset}, {seeds}", config.imp.method, note)
    return "\n".join(balanced(line) for line in lines if line)


def _slices(record: RunRecord) -> Figure | None:
    """The loss around each network of the first seed that has all, a row a level, a column an arm."""
    places = [place for place in rows(record) if record.by_level.get((place[1], place[0]))]
    if not places:
        return None
    seeds = [seed for seed in record.config.seeds if all(_grid(record, *place, seed) for place in places)]
    if not seeds:
        return None
    by_level: dict[int, list[str]] = {}
    for level, arm in places:
        by_level.setdefault(level, []).append(arm)
    levels = [*by_level][:MOST_ROWS]
    columns = min(MOST_COLUMNS, max(len(by_level[level]) for level in levels))
    side = (WIDTH * (1.0 if columns < 3 else 1.5) - 0.5) / columns
    fig = Figure(figsize=(side * columns + 0.5, 1.2 + (side + 0.15) * len(levels)), layout="constrained")
    panels = fig.subplots(len(levels), columns, squeeze=False, sharex=True, sharey=True)
    grids = {
        (level, arm): np.array(_grid(record, level, arm, seeds[0]), float)
        for level in levels
        for arm in by_level[level][:columns]
    }
    known = np.concatenate([grid[np.isfinite(grid) & (grid > 0)] for grid in grids.values()])
    if not known.size:  # a loss of the user's own, below 0
        return None
    high = float(known.max())
    low = max(float(known.min()), LEAST * high)
    high = max(high, 1.01 * low)
    steps = np.geomspace(low, high, LEVELS)
    radius, drawn = record.config.radius, None
    for row, level in zip(panels, levels, strict=True):
        for axes in row[len(by_level[level]) :]:
            axes.set_axis_off()
        for axes, arm in zip(row, by_level[level], strict=False):
            grid = np.clip(grids[level, arm], low, high)
            x = np.linspace(-radius, radius, len(grid))
            # a goes by rows of the grid, along x
            drawn = axes.contourf(x, x, grid.T, steps, norm=LogNorm(low, high), cmap="viridis")
            axes.contour(x, x, grid.T, steps, colors="white", linewidths=0.3, alpha=0.7)
            axes.plot(0, 0, "+", color="white", markersize=5, markeredgewidth=0.8)
            axes.set_title(_name(record, level, arm), fontsize=7)
            axes.set_aspect("equal")
            axes.grid(visible=False)
            axes.set_xticks([-radius, 0, radius])
            axes.set_yticks([-radius, 0, radius])
    assert drawn is not None
    bar = fig.colorbar(drawn, ax=panels, location="bottom", shrink=0.9, aspect=30, pad=0.02)
    bar.set_label("loss on training images (log scale, one for all)", fontsize=7)
    bar.ax.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0), numticks=9))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(labelsize=6)
    note = f"seed {seeds[0]}; two random directions normalised by filter, within the mask"
    fig.suptitle(_title(record, note), fontsize=7)
    return fig


def _grid(record: RunRecord, level: int, arm: str, seed: int) -> list[list[Any]] | None:
    for point in record.by_level.get((arm, level), ()):
        if point["seed"] == seed:
            grid: list[list[Any]] = point["grid"]
            return grid
    return None


def _eigenvalues(record: RunRecord) -> Figure | None:
    """The largest eigenvalue of each network, a line a seed."""
    found = {place: some for place in rows(record) if (some := _positive(record, *place))}
    if not found:
        return None
    fig = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = fig.add_subplot()
    for level in dict.fromkeys(level for level, _ in found):
        own = [(i, some) for i, (place, some) in enumerate(found.items()) if place[0] == level]
        for seed in record.config.seeds:
            line = [(i, some[seed]) for i, some in own if seed in some]
            if len(line) > 1:
                axes.plot(*zip(*line, strict=True), color="0.75", linewidth=0.8, zorder=1)
    for i, ((level, arm), some) in enumerate(found.items()):
        colour, marker = ("0.3", "o") if level == 0 else look_of(record, arm)
        axes.plot([i] * len(some), [*some.values()], color=colour, marker=marker, linestyle="", zorder=2)
        mean = float(np.exp(np.mean(np.log([*some.values()]))))
        axes.plot([i - 0.2, i + 0.2], [mean, mean], color=colour, linewidth=1.6, zorder=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    names = [_name(record, level, arm).replace(", ", "\n") for level, arm in found]
    axes.set_xticks(range(len(found)), names)
    axes.set_xlim(-0.6, len(found) - 0.4)
    axes.set_ylabel("largest eigenvalue of the Hessian")
    fig.suptitle(_title(record, "grey: networks of one seed; bars: geometric means"), fontsize=7)
    return fig


def _positive(record: RunRecord, level: int, arm: str) -> dict[int, float]:
    return {seed: v for seed, v in values(record, level, arm, EIGENVALUE).items() if v > 0}


def _sharp_levels(record: RunRecord) -> set[int]:
    """The levels whose tickets have a largest eigenvalue."""
    return {level for level, _ in rows(record) if values(record, level, "ticket", EIGENVALUE)}


def _levels(record: RunRecord) -> Figure | None:
    """Sharpness, and the rise along the line to the ticket or dense, from level to level; a line an arm."""
    left, places = record.config.imp.remaining(), rows(record)
    if len(_sharp_levels(record)) < 2:
        return None
    fig = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    sharp, rise = fig.subplots(2, 1, sharex=True)
    for arm in record.config.arms:
        colour, marker = look_of(record, arm)
        for axes, field in ((sharp, EIGENVALUE), (rise, "barrier")):
            drawn = []
            for level in (level for level, name in places if name == arm):
                some = np.array([*values(record, level, arm, field).values()])
                some = np.log(some[some > 0]) if axes is sharp else 100 * some
                if some.size:
                    drawn.append((100 * left[level], *spread(some)))
            if not drawn:
                continue
            x, centre, low, high = np.array(drawn).T
            if axes is sharp:
                centre, low, high = np.exp(centre), np.exp(low), np.exp(high)
            if len(x) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            else:
                axes.vlines(x, low, high, color=colour, linewidth=0.8)
            axes.plot(x, centre, color=colour, marker=marker, label=arm)
    drawn_to = extremes(sharp)
    log_axis(sharp, float(drawn_to.min()), float(drawn_to.max()))
    sharp.set_ylabel("largest eigenvalue")
    rise.set_ylabel("barrier (% of test)")
    level_axis(rise, [100 * left[level] for level, _ in places])
    handles = [one for one in sharp.lines if not str(one.get_label()).startswith("_")]
    note = "; ".join(["barrier: ticket to dense, others to the ticket", *band_note(len(record.config.seeds))])
    fig.suptitle(_title(record, note), fontsize=7)
    fig.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.8)
    return fig


def _lines(record: RunRecord) -> Figure | None:
    """The error along the straight lines, a panel a level."""
    found: dict[int, list[str]] = {}
    for level, arm in rows(record):
        if any("error" in p for p in record.by_level.get((arm, level), ())):
            found.setdefault(level, []).append(arm)
    if not found:
        return None
    levels = [*found][:MOST_ROWS]
    fig = Figure(figsize=(WIDTH, 1.3 + 1.5 * len(levels)), layout="constrained")
    panels = fig.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    handles: dict[str, Line2D] = {}
    for axes, level in zip(panels, levels, strict=True):
        for arm in found[level]:
            points = [p for p in record.by_level[arm, level] if "error" in p]
            colour, _ = look_of(record, arm)
            for field, style in (("error", "-"), ("train_error", DASHED)):
                bands = [spread(column) for column in 100 * np.array([p[field] for p in points]).T]
                centre, low, high = np.array(bands).T
                x = np.linspace(0, 1, len(centre))
                axes.plot(x, centre, color=colour, linestyle=style)
                if field == "error":
                    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            name = f"{arm} to {points[0]['to']}"
            handles[name] = Line2D([], [], color=colour, label=name)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{short(record.config.imp.remaining()[level])} % left", fontsize=7, loc="left")
    fig.supylabel("error (%)", fontsize=8)
    panels[-1].set_xlabel("place on the line")
    kinds = [
        Line2D([], [], color="0.3", label="test"),
        Line2D([], [], color="0.3", linestyle=DASHED, label="training"),
    ]
    fig.suptitle(_title(record, "; ".join(band_note(len(record.config.seeds)))), fontsize=7)
    fig.legend(handles=[*handles.values(), *kinds], loc="outside lower center", ncols=2, handlelength=1.8)
    return fig
