"""Figures of `connectivity`: the error along the lines, and how far it rises by rewind step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from sparselth.report.connectivity import STABLE, points, values
from sparselth.report.drawing import DASHED, WIDTH, band_note, heading, look, save_each, short, spread
from sparselth.runs import RunRecord

MOST_PANELS, MOST_CURVES = 4, 8


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Draw what is not there yet, or is older than the lines."""
    last = folder / "instability.svg"
    fresh = (record.path / "cells.jsonl").stat().st_mtime_ns
    if last.exists() and last.stat().st_mtime_ns > fresh:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return save_each({"lines": _lines, "instability": _instability}, record, folder)


def _lines(record: RunRecord) -> Figure | None:
    """The error along the line between two copies, a panel a level, a curve a rewind step."""
    config, left = record.config, record.config.remaining()
    levels = [level for level in config.levels if any(points(record, k, level) for k in config.rewind)]
    levels, steps = levels[:MOST_PANELS], config.rewind[:MOST_CURVES]
    if not levels:
        return None
    fig = Figure(figsize=(WIDTH, 1.2 + 1.45 * len(levels)), layout="constrained")
    panels = fig.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, level in zip(panels, levels, strict=True):
        for i, k in enumerate(steps):
            for field, style in (("error", "-"), ("train_error", DASHED)):
                if curves := values(record, k, level, field):
                    rows = [spread(column) for column in 100 * np.array(curves).T]
                    centre, low, high = np.array(rows).T
                    x, (colour, _) = np.linspace(0, 1, len(centre)), look(i)
                    axes.plot(x, centre, color=colour, linestyle=style)
                    if field == "error":
                        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_ylim(bottom=0)
        name = "dense" if level == 0 else "tickets"
        axes.set_title(f"{name}, {short(left[level])} % left", fontsize=7, loc="left")
    fig.supylabel("error (%)", fontsize=8)
    panels[-1].set_xlabel("place on the line between two copies")
    handles = [Line2D([], [], color=look(i)[0], label=f"from step {k:,}") for i, k in enumerate(steps)]
    _finish(fig, record, handles, _kinds())
    return fig


def _instability(record: RunRecord) -> Figure | None:
    """Instability against the rewind step, a curve a level."""
    config, left, drawn = record.config, record.config.remaining(), list[Line2D]()
    fig = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = fig.add_subplot()
    for i, level in enumerate(config.levels[:MOST_CURVES]):
        colour, marker = look(i)
        label = f"{'dense' if level == 0 else 'tickets'}, {short(left[level])} %"
        for field, style in (("instability", "-"), ("train_instability", DASHED)):
            found = {k: some for k in config.rewind if (some := values(record, k, level, field))}
            if not found:
                continue
            centre, low, high = np.array([spread([100 * v for v in some]) for some in found.values()]).T
            axes.plot([*found], centre, color=colour, linestyle=style, marker=marker if style == "-" else "")
            if style == "-":
                axes.fill_between([*found], low, high, color=colour, alpha=0.18, linewidth=0)
                drawn.append(Line2D([], [], color=colour, marker=marker, label=label))
    if not drawn:
        return None
    _steps(axes, config.rewind)
    axes.axhline(100 * STABLE, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("rewind step")
    axes.set_ylabel("instability (% error)")
    bound = Line2D(
        [], [], color="0.4", linewidth=0.8, linestyle=":", label=f"{100 * STABLE:g} %, stable below"
    )
    _finish(fig, record, drawn, [*_kinds(), bound])
    return fig


def _kinds() -> list[Line2D]:
    return [
        Line2D([], [], color="0.3", label="test"),
        Line2D([], [], color="0.3", linestyle=DASHED, label="training"),
    ]


def _steps(axes: Axes, steps: tuple[int, ...]) -> None:
    """A scale for steps: even where there is one alone, else logarithmic with room for 0."""
    if positive := [k for k in steps if k]:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    axes.set_xticks([*steps], [f"{k:,}" for k in steps])
    axes.xaxis.set_minor_locator(NullLocator())


def _finish(fig: Figure, record: RunRecord, curves: list[Line2D], rest: list[Line2D]) -> None:
    """Heading and legend, in which what is no curve has a column of its own."""
    notes = band_note(len(record.config.seeds))
    how = record.config.method if max(record.config.levels) else ""
    fig.suptitle(heading(record, notes, how=how), fontsize=7)
    rows, gap = max(len(rest), -(-len(curves) // 2)), Line2D([], [], linestyle="", label=" ")
    handles = [*curves, *[gap] * (-len(curves) % rows), *rest]  # a legend fills one column after another
    handles += [gap] * (-len(handles) % rows)
    columns = len(handles) // rows
    fig.legend(
        handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.8
    )
