"""The figures of `show --masks`: degrees of units and inputs, and what masks share, beside chance."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sparselth.chance import Overlap
from sparselth.files import write_atomically
from sparselth.params import TensorSpec
from sparselth.patterns import Pattern, TwoFour, get_pattern, in_words
from sparselth.report.drawing import (
    DASHED,
    STYLE,
    WIDTH,
    heading,
    level_axis,
    look,
    save,
    short,
)
from sparselth.report.masks import Layer, Numbers, layers_of
from sparselth.report.stats import weights_remaining

LAYERS = 3  # whose degrees are drawn: the first, one in the middle, the last


def draw(numbers: Numbers, folder: Path) -> list[Path]:
    """Both figures, and masks.json with all that they show."""
    if not numbers.levels:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers.to_json() | {"degrees": degrees(numbers)}, indent=1)
    write_atomically(folder / "masks.json", text.encode())
    written = [folder / "masks.json"]
    with matplotlib.style.context(STYLE):
        for name, make in (("mask_degrees", draw_degrees), ("mask_overlap", draw_overlap)):
            if (fig := make(numbers)) is not None:
                written += save(fig, folder, name)
    return written


def degrees(numbers: Numbers) -> list[dict[str, Any]]:
    """How many units, and inputs, of a layer have each degree, over all seeds: as counts from degree 0 on."""
    rows = []
    for level in numbers.levels:
        by_seed = [layers_of(numbers.model, masks) for masks in numbers.tickets(level)]
        for same in zip(*by_seed, strict=True):
            for kind in ("into", "out_of"):
                counts = np.bincount(np.concatenate([getattr(layer, kind) for layer in same]))
                where = {"level": level, "layer": same[0].name, "kind": kind}
                rows.append(where | {"counts": counts.tolist()})
    return rows


def draw_degrees(numbers: Numbers) -> Figure:
    """The share of units, and of inputs, with at least so many kept weights; dashed of a random mask."""
    every = layers_of(numbers.model, numbers.tickets(numbers.levels[-1])[0])
    picked = [every[i].name for i in sorted({0, len(every) // 2, len(every) - 1})][:LAYERS]
    fig = Figure(figsize=(WIDTH, 0.9 + 1.25 * len(picked)), layout="constrained")
    panels = fig.subplots(len(picked), 2, squeeze=False, sharey=True)
    rows = {(row["level"], row["layer"], row["kind"]): np.array(row["counts"]) for row in degrees(numbers)}
    remaining, last = weights_remaining(numbers.record), numbers.levels[-1]
    specs = {one.name: spec for one, spec in zip(every, numbers.model.weights, strict=True)}
    pattern = get_pattern(numbers.record.config.pattern)
    for y, name in enumerate(picked):
        layer = next(one for one in every if one.name == name)
        for axes, kind in zip(panels[y], ("into", "out_of"), strict=True):
            for i, level in enumerate(numbers.levels):
                colour = matplotlib.colormaps["viridis"](0.85 * (1 - i / max(1, len(numbers.levels) - 1)))
                label = f"{short(remaining[level])} %"
                _survival(axes, rows[level, name, kind], color=colour, label=label)
            chance = _random(layer, kind, specs[name], pattern)
            _survival(axes, chance, color="black", linestyle=DASHED, linewidth=0.7, label="_")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            what = "into a unit" if kind == "into" else "out of an input"
            axes.set_title(f"{name}: {what}", loc="left", fontsize=7)
        panels[y][0].set_ylim(0, 1.03)
    for axes in panels[-1]:
        axes.set_xlabel("kept weights")
    fig.supylabel("share with at least so many", fontsize=8)
    note = f"dashed: a random mask at {short(remaining[last])} %"
    note += f", in {in_words(numbers.record.config.pattern)}" if pattern else ""
    return _with_legend(fig, panels[0][0], numbers, note)


def _survival(axes: Axes, counts: NDArray[Any], **how: Any) -> None:
    """The share of values of at least 0, 1, ..., from how often each occurs."""
    at_least = np.cumsum(counts[::-1])[::-1] / counts.sum()
    at_least = at_least[: 1 + int(np.flatnonzero(at_least > 1e-4)[-1])]
    axes.plot(np.arange(len(at_least) + 1), [*at_least, 0.0], drawstyle="steps-pre", **how)


def _random(layer: Layer, kind: str, spec: TensorSpec, pattern: Pattern | None) -> NDArray[np.float64]:
    """The law of a layer's degrees under random masks that keep as much of it, in the run's pattern."""
    n, kept = layer.mask.size, int(layer.mask.sum())
    if kept == n:  # as where the pattern does not fit
        pattern = None
    groups = pattern.groups(spec).numpy() if pattern else np.arange(n)
    size = n // (int(groups.max()) + 1)
    places = groups.reshape(len(layer.mask), -1, layer.fields)
    places = places if kind == "into" else places.swapaxes(0, 1)
    law = np.zeros(1 + places[0].size)
    if not pattern:
        places = places[:1]  # all units are alike, all inputs, too
    # what each has of every group that it has a part in
    parts = Counter(tuple(np.unique(one, return_counts=True)[1].tolist()) for one in places)
    for counts, number in parts.items():
        if isinstance(pattern, TwoFour):
            found = _of_fours(counts)
        else:  # all parts are of one size
            stay = Overlap(0, kept // size, len(counts), n // size)
            found = np.zeros(len(law))
            found[:: counts[0]] = [stay.chance(k) for k in range(len(counts) + 1)]
        law[: len(found)] += number / len(places) * found
    return law


def _of_fours(counts: tuple[int, ...]) -> NDArray[np.float64]:
    """The law of how many weights stay of so many of each of several fours, of which 2 stay."""
    law = np.ones(1)
    for count in counts:
        two = Overlap(0, 2, count, 4)
        law = np.convolve(law, [two.chance(k) for k in range(min(2, count) + 1)])
    return law


def draw_overlap(numbers: Numbers) -> Figure | None:
    """What masks share beyond chance, against the weights left; a marker a kind of pairs."""
    shared = [one for one in numbers.shared if one.between != "levels"]
    if not shared:
        return None
    fig = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes, remaining = fig.add_subplot(), weights_remaining(numbers.record)
    kinds = [*dict.fromkeys(one.between for one in shared)]
    for i, kind in enumerate(kinds):
        rows = [one.row("all") for one in shared if one.between == kind]
        x = np.array([100 * remaining[row["level"]] for row in rows]) * 1.02 ** (i - (len(kinds) - 1) / 2)
        chance = np.array([row["by_chance"] for row in rows])
        mean, least, most = (
            100 * (np.array([row[name] for row in rows]) - chance) for name in ("shared", "least", "most")
        )
        colour, marker = look(i)
        label = "two seeds" if kind == "seeds" else f"ticket and {kind}"
        axes.errorbar(
            x, mean, yerr=np.stack([mean - least, most - mean]), fmt=marker, color=colour, label=label,
            elinewidth=0.7, markersize=3.2,
        )  # fmt: skip
    rows = [one.row("all") for one in shared if one.between == kinds[0]]
    x = np.array([100 * remaining[row["level"]] for row in rows])
    chance = np.array([row["by_chance"] for row in rows])
    low, high = 100 * (np.array([row["chance_interval"] for row in rows]).T - chance)
    axes.fill_between(x, low, high, color="0.85", linewidth=0)
    axes.axhline(0, color="black", linestyle=DASHED, linewidth=0.7, label="chance")
    level_axis(axes, [*x])
    axes.set_ylabel("shared beyond chance (pp)")
    return _with_legend(fig, axes, numbers, "bar: range of the pairs; grey: 95 % of random pairs", title=None)


def _with_legend(
    fig: Figure, axes: Axes, numbers: Numbers, note: str, title: str | None = "weights left"
) -> Figure:
    fig.suptitle(heading(numbers.record, [note]), fontsize=7)
    handles, labels = axes.get_legend_handles_labels()
    fig.legend(
        handles, labels, loc="outside lower center", ncols=4 if title else 2, columnspacing=1.0,
        handlelength=1.4, title=title, title_fontsize=7,
    )  # fmt: skip
    return fig
