"""A run of `neurons` as text, JSON and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sparselth.report.diverged import unfinished
from sparselth.report.drawing import STYLE, WIDTH, balanced, band_note, head, heading, look, save, spread
from sparselth.report.page import Group, report, side_by_side, width
from sparselth.report.stats import (
    FEWEST,
    images_counted,
    mean_interval,
    paired,
    signed_pp,
)
from sparselth.report.tables import MISSING, title
from sparselth.runs import RunRecord

SINGLE = "relu-"
LEAST = 1e-5  # of an error that is drawn: some are 0
LABELS = {"weights": "weights kept", "neurons": "neurons kept", "random-features": "random features"}


def values(record: RunRecord, arm: str, level: int, field: str) -> dict[int, float]:
    """Seed → a field of an arm at a width or a number of units."""
    points = record.by_level.get((arm, level), ())
    return {p["seed"]: p[field] for p in sorted(points, key=lambda p: p["seed"]) if p.get(field) is not None}


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal."""
    config = record.config
    tables = [_images(record)] + ([_single(record)] if config.units else [])
    titled = title(record, config.how)
    return report(titled, *tables, legend=_legend(record), sentence=_closing(record))


def _images(record: RunRecord) -> str:
    lead = Group([["width", *(f"{factor:g}" for factor in record.config.width)]])
    groups = [
        Group(
            [["accuracy %", *(_shown(record, arm, i, "final_accuracy", 100, 2) for i in _places(lead))]],
            LABELS[arm],
        )
        for arm in record.config.arms
    ]
    return side_by_side(lead, groups, width())


def _single(record: RunRecord) -> str:
    lead = Group([["units", *(f"{units}" for units in record.config.units)]])
    groups = [
        Group(
            [["error", *(_shown(record, SINGLE + arm, i, "relative_error", 1, 4) for i in _places(lead))]],
            LABELS[arm],
        )
        for arm in record.config.arms
    ]
    return side_by_side(lead, groups, width())


def _places(lead: Group) -> range:
    return range(len(lead.columns[0]) - 1)


def _shown(record: RunRecord, arm: str, level: int, field: str, scale: int, digits: int) -> str:
    found = values(record, arm, level, field).values()
    if not found:
        return MISSING
    centre, half = mean_interval(found)
    interval = "" if half is None or len(found) < FEWEST else f" ± {scale * half:.{digits}f}"
    return f"{scale * centre:.{digits}f}{interval}"


def _legend(record: RunRecord) -> str:
    config, seeds = record.config, len(record.config.seeds)
    kind = ", mean over the seeds ± 95 % interval" if seeds >= FEWEST else ""
    lines = [f"accuracy %: on the test set at the end of training{kind}."]
    if config.units:
        lines.append(
            f"error: of max(0, x) of one of {config.inputs} Gaussian inputs, exactly: E (network - target)^2 "
            "/ E target^2. Whole neurons cannot be below random features, which have the best output weights."
        )
    return "\n".join(filter(None, [*lines, unfinished(record)]))


def _closing(record: RunRecord) -> str:
    config, said = record.config, []
    last = len(config.width) - 1
    for arm in ("random-features", "neurons"):
        left, right = (values(record, name, last, "final_accuracy") for name in ("weights", arm))
        if both := [left[seed] - right[seed] for seed in left if seed in right]:
            gap = paired(both, images_counted(record))
            said.append(f"{signed_pp(gap)} against {LABELS[arm]}")
    text = f"At width {config.width[last]:g} weight subnetworks are at {', '.join(said)}." if said else ""
    last = len(config.units) - 1
    missed = {arm: values(record, SINGLE + arm, last, "relative_error").values() for arm in LABELS}
    if config.units and all(missed.values()):
        share = {arm: f"{100 * max(0.0, mean_interval(found)[0]):.2g} %" for arm, found in missed.items()}
        text += (
            f" With {config.units[-1]} units the single ReLU is missed by {share['neurons']} of its power by "
            f"whole neurons, by {share['random-features']} by random features, by {share['weights']} by a "
            "weight subnetwork."
        )
    return text.strip()


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """A JSON object an arm and place: mean and half-width over the seeds."""
    rows, config = [], record.config
    for arm in config.arms:
        for name, field, where, places in (
            (arm, "final_accuracy", "width", config.width),
            (SINGLE + arm, "relative_error", "units", config.units),
        ):
            for i, place in enumerate(places):
                if found := values(record, name, i, field).values():
                    centre, half = mean_interval(found)
                    row = {"arm": name, where: place, "seeds": len(found), field: centre, "half_width": half}
                    rows.append(row)
    return rows


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Accuracy against width, and error against units."""
    last = folder / "single_relu.svg"
    fresh = (record.path / "cells.jsonl").stat().st_mtime_ns
    if last.exists() and last.stat().st_mtime_ns > fresh:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    config, written = record.config, list[Path]()
    with matplotlib.style.context(STYLE):
        if fig := _lines(record, "", "final_accuracy", config.width, 100):
            axes = fig.axes[0]
            axes.set_xlabel("width of the hidden layers")
            axes.set_ylabel("test accuracy (%)")
            notes = [config.how, *band_note(len(config.seeds))]
            head(fig, axes, heading(record, notes[1:], how=notes[0]))
            written += save(fig, folder, "width")
        if fig := _lines(record, SINGLE, "relative_error", config.units, 1):
            axes = fig.axes[0]
            axes.set_yscale("log")
            axes.set_ylim(top=1.5)
            axes.set_xlabel("hidden units")
            axes.set_ylabel("error, of E target²")
            text = f"max(0, x) of one of {config.inputs} Gaussian inputs, one hidden layer"
            notes = [
                f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}",
                *band_note(len(config.seeds)),
            ]
            lowest = min(float(np.asarray(line.get_ydata(), float).min()) for line in axes.lines)
            notes += ["drawn at 0.00001: that or less"] if lowest <= LEAST else []
            head(fig, axes, "\n".join(map(balanced, (text, "; ".join(notes)))))
            written += save(fig, folder, "single_relu")
    return written


def _lines(record: RunRecord, before: str, field: str, places: Sequence[float], scale: int) -> Figure | None:
    fig = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes, drawn = fig.add_subplot(), 0
    for i, arm in enumerate(LABELS):
        rows = []
        for level, place in enumerate(places):
            if found := values(record, before + arm, level, field):
                rows.append((place, *(max(scale * value, LEAST) for value in spread(found.values()))))
        if rows and arm in record.config.arms:
            x, centre, low, high = np.array(rows).T
            colour, marker = look(i)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, centre, color=colour, marker=marker, label=LABELS[arm])
            drawn += 1
    axes.set_xscale("log")
    axes.set_xticks([*places], [f"{place:g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
    return fig if drawn else None
