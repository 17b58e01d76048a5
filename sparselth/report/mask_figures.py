"""The figures of a run's masks: what is left of each layer, and of the first one where."""

from __future__ import annotations

from math import isqrt, prod

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from sparselth.report.drawing import DPI, MARKERS, WIDTH, band_note, heading, log_axis, short, spread
from sparselth.report.stats import weights_remaining
from sparselth.runs import RunRecord

UNITS = 30  # units of the first layer that are drawn
NAMES = 30  # layers whose names fit the column
LEVELS = 5  # lines of the figure of layers
MASK_COLOURS = LinearSegmentedColormap.from_list("mask", ["#E4E4E4", "#00507F"])


def layers(record: RunRecord) -> Figure | None:
    """The share of its weights that each layer keeps, a line for each of some levels, on one log scale."""
    weights, remaining = record.config.network.weights, weights_remaining(record)
    names = [spec.name.removesuffix(".weight") for spec in weights]
    pruned = [level for level in remaining if level and record.by_level.get(("ticket", level))]
    if not pruned:
        return None
    picked = [pruned[i] for i in _evenly(len(pruned), LEVELS)]
    upright = len(names) <= 5 and sum(map(len, names)) <= 40
    tall = 0 if upright else 0.055 * max(map(len, names))
    fig = Figure(figsize=(WIDTH, 2.8 + tall), layout="constrained")
    axes = fig.add_subplot()
    shares, places, emptied = [], np.arange(len(names)), False
    for i, level in enumerate(picked):
        points = record.by_level["ticket", level]
        kept = np.array(
            [spread(100 * p["kept"][spec.name] / spec.numel for p in points) for spec in weights]
        ).T
        mean, low, high = np.where(kept > 0, kept, np.nan)
        colour = matplotlib.colormaps["viridis"](0.85 * (1 - i / max(1, len(picked) - 1)))
        label = f"{short(remaining[level])} %"
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(places, mean, color=colour, marker=MARKERS[i], label=label)
        shares += [*mean[~np.isnan(mean)]]
        empty = places[np.isnan(mean)]
        if len(empty):
            emptied = True
            axes.plot(
                empty, np.zeros(len(empty)), "x", color=colour, clip_on=False, zorder=4, label="_",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    log_axis(axes, min(shares) / 1.4, 125)
    every = -(-len(names) // NAMES)
    axes.set_xticks(places[::every], names[::every], rotation=0 if upright else 90)
    axes.set_xlim(-0.3, len(names) - 0.7)
    axes.set_ylabel("weights of a layer left (%)")
    notes = ["the ticket's masks", *["x: no weight left"] * emptied, *band_note(len(record.config.seeds))]
    fig.suptitle(heading(record, notes), fontsize=7)
    fig.legend(
        handles=[line for line in axes.lines if not str(line.get_label()).startswith("_")],
        loc="outside lower center", ncols=5, columnspacing=1.0, handlelength=1.4, title="of all weights left",
        title_fontsize=7,
    )  # fmt: skip
    return fig


def first_layer(record: RunRecord) -> Figure | None:
    """The mask of each unit (or filter) as an image, for those with most weights at the last level."""
    if not _is_drawn(record):
        return None
    seed, levels = _mask_levels(record)
    masks = [_first(record, seed, level).mean(1) for level in levels]
    left = masks[-1].reshape(len(masks[-1]), -1).sum(1)
    units = np.sort(np.argsort(-left, kind="stable")[:UNITS])
    grids = [_grid(mask[units]) for mask in masks]
    count = f"all {len(left)}" if len(units) == len(left) else f"{len(units)} of {len(left)}"
    channels = record.config.network.input[0]
    title = f"surviving weights (blue) of {{layer}}, {count} {{units}}"
    title += f"; paler where not all {channels} channels are left" * (channels > 1)
    fig, panels = _panels(record, seed, levels, grids[0].shape, title)
    for axes, grid in zip(panels, grids, strict=True):
        axes.imshow(grid, cmap=MASK_COLOURS, vmin=0, vmax=1, interpolation="none")
    return fig


def pixels(record: RunRecord) -> Figure | None:
    """Share of the first layer's units that still read each input pixel (of its filters, each position).

    All panels have one scale, of square roots, on which a hundredth is still a tenth.
    """
    if not _is_drawn(record):
        return None
    seed, levels = _mask_levels(record)
    maps = [100 * _first(record, seed, level).mean((0, 1)) for level in levels]
    top = max(float(shares.max()) for shares in maps) or 1.0
    title = "{units} of {layer} that keep each {place} (%)"
    fig, panels = _panels(record, seed, levels, maps[0].shape, title, below=64)
    for axes, shares in zip(panels, maps, strict=True):
        image = axes.imshow(shares, norm=PowerNorm(0.5, 0, top), interpolation="none")
    left, right = panels[0].get_position().x0, panels[min(1, len(panels) - 1)].get_position().x1
    tall = fig.get_figheight() * DPI
    inset = 14 / (WIDTH * DPI)  # room for a number at the end
    bar = fig.add_axes((left + inset, 40 / tall, right - left - 2 * inset, 14 / tall))
    ticks = [tick for tick in (0, 1, 5, 10, 20, 30, 50, 70, 100) if tick <= top]
    fig.colorbar(image, cax=bar, orientation="horizontal", ticks=ticks)
    bar.tick_params(length=2, pad=1.5)
    bar.grid(False)
    return fig


def _evenly(count: int, most: int) -> list[int]:
    """Up to `most` of 0 ... count - 1, evenly spread down to the last."""
    wanted = min(most, count)
    return [int(at) for at in np.ceil(np.linspace(0, count, wanted + 1)[1:]) - 1]


def _mask_levels(record: RunRecord) -> tuple[int, list[int]]:
    """The first seed with a point, and up to four of its ticket's levels, evenly spread down to the last."""
    own = [p for p in record.points if p["arm"] == "ticket"]
    present = {p["seed"] for p in own}
    seed = next(seed for seed in record.config.seeds if seed in present)
    levels = sorted(p["level"] for p in own if p["seed"] == seed)
    pruned = [level for level in levels if level] or [0]
    return seed, [pruned[i] for i in _evenly(len(pruned), 4)]


def _is_drawn(record: RunRecord) -> bool:
    """Whether the first weights are filters, or read the pixels of an image; a module's may be anything."""
    model = record.config.network
    shape = model.weights[0].shape
    return len(shape) == 4 or (len(model.input) == 3 and shape[1:] == (prod(model.input),))


def _first(record: RunRecord, seed: int, level: int) -> np.ndarray:
    """Mask of the first layer as [N, C, h, w]: input pixels of a unit, or a filter's positions."""
    model = record.config.network
    spec = model.weights[0]
    shape = spec.shape if len(spec.shape) == 4 else (spec.shape[0], *model.input)
    return record.mask(seed, level, spec.name).reshape(shape)


def _grid(images: np.ndarray) -> np.ndarray:
    """[n, h, w] → one image with a gap of one (NaN) around each."""
    n, h, w = images.shape
    columns = isqrt(n)
    grid = np.full((-(-n // columns) * (h + 1) + 1, columns * (w + 1) + 1), np.nan)
    for i, image in enumerate(images):
        y, x = 1 + i // columns * (h + 1), 1 + i % columns * (w + 1)
        grid[y : y + h, x : x + w] = image
    return grid


def _panels(
    record: RunRecord, seed: int, levels: list[int], shape: tuple[int, ...], title: str, below: int = 0
) -> tuple[Figure, list[Axes]]:
    """Up to 2 × 2 axes for images of `shape`, on whole pixels so that every cell is equally large.

    `below` keeps that many pixels free under all of them. `title` may name {layer}, {units} and {place}.
    """
    spec = record.config.network.weights[0]
    units, place = ("filters", "position") if len(spec.shape) == 4 else ("units", "input pixel")
    text = title.format(layer=spec.name.removesuffix(".weight"), units=units, place=place)
    text = heading(record, [text], [seed])
    columns = min(2, len(levels))
    rows = -(-len(levels) // columns)
    total = round(WIDTH * DPI)
    room = total // columns
    cell = max(1, min((room - 20) // shape[1], max(12, 200 // max(shape))))
    width, height, head, over = cell * shape[1], cell * shape[0], 14 + 24 * len(text.splitlines()), 34
    tall = head + rows * (height + over) + 10 + below
    fig = Figure(figsize=(WIDTH, tall / DPI))
    panels = []
    remaining = weights_remaining(record)
    for i, level in enumerate(levels):
        x = i % columns * room + (room - width) // 2
        y = tall - head - (i // columns + 1) * (height + over)
        axes = fig.add_axes((x / total, y / tall, width / total, height / tall))
        axes.set_axis_off()
        axes.set_title(f"{short(remaining[level])} % remaining", pad=3)
        panels.append(axes)
    fig.suptitle(text, fontsize=7, y=1 - 6 / tall)
    return fig, panels
