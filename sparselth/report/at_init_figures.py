"""The figures of `at-init`: accuracy of every score beside its checks, or how far each score can go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sparselth.report.at_init import compression, scores, values
from sparselth.report.drawing import (
    DASHED,
    WIDTH,
    all_of_it,
    band_note,
    head,
    heading,
    level_axis,
    look,
    save_each,
    spread,
)
from sparselth.report.stats import mean_interval
from sparselth.report.tables import percent
from sparselth.runs import RunRecord

END = "test accuracy (%)"
NEAR = 15.0


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Draw what the finished cells support; returns the files written."""
    name = "collapse" if record.config.collapse else "accuracy"
    last = folder / f"{name}.svg"
    if last.exists() and last.stat().st_mtime_ns > (record.path / "cells.jsonl").stat().st_mtime_ns:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[RunRecord], Figure | None]] = {
        name: _collapse if record.config.collapse else _accuracy
    }
    return save_each(makers, record, folder)


def _accuracy(record: RunRecord) -> Figure | None:
    config = record.config
    if not any(values(record, "ticket", level) for level in config.points):
        return None
    return _curves(record) if len(config.sparsity) > 1 else _points(record)


def _points(record: RunRecord) -> Figure:
    """One sparsity: scores side by side, a mark an arm."""
    config = record.config
    fig = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = fig.add_subplot()
    _dense(record, axes)
    at = {score: level for level, (score, _) in config.points.items()}
    step = 0.8 / len(config.arms)
    for i, arm in enumerate(config.arms):
        rows = [
            (
                place + step * (own.index(arm) - (len(own) - 1) / 2),
                *(100 * v for v in spread(found.values())),
            )
            for place, score in enumerate(config.score)
            if arm in (own := config.arms_of(score)) and (found := values(record, arm, at[score]))
        ]
        if rows:
            x, centre, low, high = np.array(rows).T
            colour, marker = look(i)
            axes.errorbar(x, centre, (centre - low, high - centre), fmt="none", ecolor=colour, elinewidth=0.8)
            axes.plot(x, centre, color=colour, marker=marker, linestyle="none", label=arm)
    long = sum(map(len, config.score)) > 30
    axes.set_xticks(
        range(len(config.score)),
        config.score,
        rotation=30 if long else 0,
        ha="right" if long else "center",
        rotation_mode="anchor",
    )
    axes.set_xlim(-0.6, len(config.score) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(END)
    _scaled(record, [axes])
    notes = [f"{percent(1 - config.sparsity[0])} % of the weights left"]
    notes += [note.replace("band", "bars") for note in band_note(len(config.seeds))]
    head(fig, axes, heading(record, notes))
    return fig


def _curves(record: RunRecord) -> Figure:
    """Several sparsities: a panel an arm, a line a score."""
    config = record.config
    arms = config.arms
    columns = min(2, len(arms))
    rows = -(-len(arms) // columns)
    fig = Figure(figsize=(WIDTH * (1 if columns == 1 else 1.6), 0.8 + 2.1 * rows), layout="constrained")
    panels = fig.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel in panels[len(arms) :]:
        panel.set_visible(False)
    shares = sorted((1 - sparsity for sparsity in config.sparsity), reverse=True)
    for axes, arm in zip(panels, arms, strict=False):
        _dense(record, axes)
        for i, score in enumerate(config.score):
            found = [
                (100 * (1 - sparsity), *(100 * v for v in spread(one.values())))
                for level, (name, sparsity) in config.points.items()
                if name == score and (one := values(record, arm, level))
            ]
            if found:
                x, centre, low, high = np.array(sorted(found)).T
                colour, marker = look(i)
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
                axes.plot(x, centre, color=colour, marker=marker, label=score)
        level_axis(axes, [100 * share for share in shares])
        axes.set_title(arm)
    for axes in panels[::columns]:
        axes.set_ylabel(END)
    _scaled(record, [*panels[: len(arms)]])
    head(fig, panels[0], heading(record, band_note(len(config.seeds))))
    return fig


def _scaled(record: RunRecord, panels: list[Axes]) -> None:
    """At full scale what is within NEAR pp of the best; what lies below, pressed together."""
    config = record.config
    means = [
        100 * mean_interval(found.values())[0]
        for level in (0, *config.points)
        for arm in (config.arms if level else ("ticket",))
        if (found := values(record, arm, level))
    ]
    top = max(means)
    near = min(one for one in means if one > top - NEAR)
    all_of_it(panels, near - max(0.5, 0.1 * (top - near)), 0.5, 100)


def _dense(record: RunRecord, axes: Axes) -> None:
    if found := values(record, "ticket", 0):
        centre, low, high = (100 * value for value in spread(found.values()))
        axes.axhspan(low, high, color="0.7", alpha=0.3, linewidth=0)
        axes.axhline(centre, color="0.4", linestyle=DASHED, label="dense")


def _collapse(record: RunRecord) -> Figure | None:
    """The largest compression of every score, and that of one weight a layer."""
    if not (some := scores(record)):
        return None
    fig = Figure(figsize=(WIDTH, 0.9 + 0.28 * len(some)), layout="constrained")
    axes = fig.add_subplot()
    most = record.by_level["collapse", some[0][1]][0]["most"]
    axes.axvline(most, color="0.4", linestyle=DASHED, label="one weight a layer")
    rows = [(one, place) for place, (_, level) in enumerate(some) for one in compression(record, level)]
    x, y = zip(*rows, strict=True)
    axes.plot(x, y, color=look(0)[0], marker="o", linestyle="none", label="a seed")
    axes.set_yticks(range(len(some)), [score for score, _ in some])
    axes.set_ylim(len(some) - 0.5, -0.5)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("largest compression with a weight in every layer")
    head(fig, axes, heading(record, ["nothing is trained"]))
    return fig
