"""The figures of a run, each as PNG and SVG: a column wide (3.3 in), the same bytes for the same record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from sparselth.models import get_model
from sparselth.report.drawing import DPI, STYLE, WIDTH, save
from sparselth.report.stats import (
    cells,
    empty_layers,
    mean_interval,
    nearest_level,
    per_seed,
    seed_list,
    weights_remaining,
)
from sparselth.report.tables import percent
from sparselth.runs import RunRecord

BAND = "band: range of the seeds"
UNITS = 30  # units of the first layer that are drawn
# Okabe and Ito's colours differ for colour-blind readers; the markers differ in grey.
LOOK = {
    "ticket": ("#0072B2", "o"),
    "reinit": ("#D55E00", "s"),
    "random-mask": ("#009E73", "^"),
    "random-reinit": ("#CC79A7", "D"),
}
SPARE = (("#56B4E9", "v"), ("#E69F00", "X"), ("#7F7F7F", "*"))  # of arms that a plugin brings
MASK_COLOURS = LinearSegmentedColormap.from_list("mask", ["#E4E4E4", "#00507F"])
Curves = dict[int, dict[int, list[float]]]  # seed → step → one accuracy in percent per draw


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Draw every figure for which a cell is finished into `folder`; returns the files written.

    Files of the same name are replaced in one step, so a reader never sees half a picture.
    """
    if not per_seed(record, "ticket", 0, "final_accuracy"):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[RunRecord], Figure | None]] = {
        "accuracy": _accuracy,
        "early_stop": _early_stop,
        "curves": _curves,
        "first_layer": _first_layer,
        "cost": _cost,
        "pixels": _pixels,
    }
    written = []
    with matplotlib.style.context(STYLE):
        for name, make in makers.items():
            if (fig := make(record)) is not None:
                written += save(fig, folder, name)
    return written


def _look(record: RunRecord, arm: str) -> tuple[str, str]:
    """Colour and marker of an arm."""
    others = [name for name in record.config.arms if name not in LOOK]
    return LOOK[arm] if arm in LOOK else SPARE[others.index(arm) % len(SPARE)]


def _heading(record: RunRecord, note: str) -> str:
    """Model, data set and seeds; below it what is special about the figure or the run."""
    config = record.config
    done, total = cells(record)
    seeds = seed_list(config.seeds)
    named = (
        f"seed{'s' * (len(config.seeds) > 1)} {seeds}" if len(seeds) <= 9 else f"{len(config.seeds)} seeds"
    )
    notes = [note] * bool(note) + [BAND] * (len(config.seeds) > 1) + ["unfinished"] * (done < total)
    return f"{config.model} on {config.dataset}, {named}\n{'; '.join(notes)}".strip()


def _accuracy(record: RunRecord) -> Figure:
    fig, axes = _against_weights(record, "accuracy_at_early_stop", 100.0)
    axes.set_ylabel("test accuracy at early stop (%)")
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), float) for line in axes.lines}
    dense, ticket = float(lines["dense"][0]), lines["ticket"]
    # Room below dense for six times the ticket's gain (or unrest) and for three quarters of its levels.
    unrest = float(np.median(np.abs(np.diff(ticket, prepend=ticket[0]))))
    gain = max(0.5, float(ticket.max()) - dense, unrest)
    floor = min(dense - 6 * gain, float(np.quantile(ticket, 0.25)))
    bottom = _limits(axes, floor)
    ends = {name: y.min() for name, y in lines.items() if y.min() < bottom}
    _remark(axes, "\n".join(f"{name} falls to {low:.1f} %" for name, low in ends.items()))
    return fig


def _early_stop(record: RunRecord) -> Figure:
    fig, axes = _against_weights(record, "early_stop_step", 1.0)
    axes.set_ylabel("early-stop step")
    axes.set_ylim(0, 1.06 * max(float(_extremes(axes).max()), 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    if not all(all(p["kept"].values()) for p in record.points):
        _remark(axes, "with an empty layer: not drawn")
    return fig


def _cost(record: RunRecord) -> Figure | None:
    """Seconds a step and bytes of state of each level's ticket, as shares of dense."""
    fig = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = fig.add_subplot()
    remaining = weights_remaining(record)
    lines = {
        "seconds a step": ("step_seconds", "step_seconds"),
        "bytes of state": ("state_bytes", "state_bytes"),
    }
    drawn = []
    for (label, (field, dense)), (colour, marker) in zip(lines.items(), LOOK.values(), strict=False):
        whole = per_seed(record, "ticket", 0, dense)
        rows = []
        for level, share in remaining.items():
            values = per_seed(record, "ticket", level, field)
            ratios = [value / whole[seed] for seed, value in values.items() if seed in whole]
            if ratios:
                rows.append((100 * share, mean_interval(ratios)[0], min(ratios), max(ratios)))
        if len(rows) < 2:
            return None
        x, mean, low, high = np.array(rows).T
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, marker=marker, label=label)
        drawn += [*low, *high]
    x = [100 * share for share in remaining.values()]
    axes.plot(
        x, np.array(x) / 100, color="black", linestyle=(0, (4, 3)), linewidth=0.7, label="weights", zorder=1
    )
    axes.set_yscale("log")
    axes.set_ylim(min([*drawn, 0.1]) * 0.8, max([*drawn, 1.0]) * 1.25)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if tick >= axes.get_ylim()[0]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("share of dense")
    _level_axis(axes, x)
    axes.set_xlabel("weights remaining (%)")
    _head(fig, record, axes)
    return fig


def _against_weights(record: RunRecord, field: str, scale: float) -> tuple[Figure, Axes]:
    """A line and a band (minimum to maximum over the seeds) per arm, from the dense point on."""
    fig = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = fig.add_subplot()
    remaining = weights_remaining(record)
    for arm in record.config.arms:
        rows = []
        for level, share in remaining.items():
            if field == "early_stop_step" and empty_layers(record, level, arm):
                continue  # a constant learns nothing, so its early stop is not early
            if values := per_seed(record, arm, level, field):
                v = [scale * value for value in values.values()]
                rows.append((100 * share, mean_interval(v)[0], min(v), max(v)))
        if len(rows) < 2 and arm != "ticket":
            continue  # only the dense point, which the ticket's line has too
        x, mean, low, high = np.array(rows).T
        colour, marker = _look(record, arm)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, marker=marker, label=arm, zorder=3 if arm == "ticket" else 2)
    dense = scale * mean_interval(per_seed(record, "ticket", 0, field).values())[0]
    axes.axhline(dense, color="black", linestyle=(0, (4, 3)), linewidth=0.7, label="dense", zorder=1)
    _level_axis(axes, [100 * share for share in remaining.values()])
    axes.set_xlabel("weights remaining (%)")
    _head(fig, record, axes)
    return fig, axes


def _remark(axes: Axes, text: str) -> None:
    """Small print in the lower left corner, where lines that begin at dense seldom are."""
    if text:
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axes.text(0.02, 0.03, text, transform=axes.transAxes, fontsize=7, color="0.35", bbox=box, zorder=4)


def _level_axis(axes: Axes, shares: Sequence[float]) -> None:
    """A log axis from dense on the left to the sparsest level, ticks at levels that leave room for labels."""
    shares = [share for share in shares if share > 0]
    first, last = max(shares), min(shares)
    axes.set_xscale("log")
    pad = (first / last) ** 0.03 if last < first else 1.2
    axes.set_xlim(first * pad, last / pad)
    room = (first / last) ** (1 / 6.5)  # as a ratio: 7 labels fit the column
    ticks: list[float] = []
    for share in sorted(shares, reverse=True):
        if not ticks or ticks[-1] / share >= room * 0.999:
            ticks.append(share)
    if ticks[-1] != last:
        ticks[-1:] = [last] if len(ticks) > 1 and ticks[-1] / last < room * 0.999 else [ticks[-1], last]
    axes.set_xticks(ticks, [_short(tick / 100) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _head(fig: Figure, record: RunRecord, axes: Axes, note: str = "") -> None:
    """Title above, legend below the axes, where it covers nothing."""
    fig.suptitle(_heading(record, note), fontsize=8)
    lines = sorted(axes.lines, key=lambda line: line.get_label() == "dense")
    columns = len(lines) if len(lines) <= 4 else 3
    fig.legend(handles=lines, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.8)


def _extremes(axes: Axes) -> np.ndarray:
    """All y values drawn, lines and bands."""
    lines = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    bands = [np.asarray(path.vertices)[:, 1] for band in axes.collections for path in band.get_paths()]
    return np.concatenate([*lines, *bands])


def _limits(axes: Axes, floor: float) -> float:
    """Show all that lies above `floor` percent, and never less than half a point; returns the lower end."""
    drawn = _extremes(axes)
    top, low = float(drawn.max()), max(floor, float(drawn.min()))
    spare = max(0.0, 0.5 - (top - low)) / 2
    pad = spare + 0.05 * max(top - low, 0.5)
    axes.set_ylim(low - pad, top + pad)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return low - pad


def _short(share: float) -> str:
    return percent(share).removesuffix(".0") if share == 1 else percent(share)


def _curves(record: RunRecord) -> Figure | None:
    """Validation accuracy against step, one panel per level, dense in each."""
    done = {(p["arm"], p["seed"], p["level"], p["draw"]) for p in record.points}
    found: dict[tuple[str, int], Curves] = {}
    for e in record.evaluations:
        if (e["arm"], e["seed"], e["level"], e["draw"]) in done:
            by_step = found.setdefault((e["arm"], e["level"]), {}).setdefault(e["seed"], {})
            by_step.setdefault(e["step"], []).append(100 * e["validation_accuracy"])
    if ("ticket", 0) not in found:
        return None
    remaining = weights_remaining(record)
    pruned = {level: remaining[level] for arm, level in found if arm == "ticket" and level}
    picked = {nearest_level(pruned, 0.5), nearest_level(pruned, 0.2), max(pruned, default=None)} - {None}
    levels = sorted(level for level in picked if level) or [0]

    fig = Figure(figsize=(WIDTH, 0.9 + 1.35 * len(levels)), layout="constrained")
    panels = fig.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, level in zip(panels, levels, strict=True):
        # The first tenth of the steps climbs from chance; what is interesting is above it.
        floor = _curve(axes, found["ticket", 0], "dense", ("black", "P"), _stop(record, "ticket", 0))
        for arm in record.config.arms if level else ():
            if (arm, level) in found:
                look, stop = _look(record, arm), _stop(record, arm, level)
                late = _curve(axes, found[arm, level], arm, look, stop)
                floor = min(floor, late) if arm == "ticket" else floor
        bottom = _limits(axes, floor)
        under = [str(line.get_label()) for line in axes.lines if np.max(line.get_ydata()) < bottom]
        title = f"{_short(remaining[level])} % remaining" if level else "dense"
        below = f" ({under[0] if len(under) == 1 else f'{len(under)} arms'} below)" if under else ""
        axes.set_title(title + below, loc="left")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    panels[-1].set_xlim(left=0)
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    fig.supylabel("validation accuracy (%)", fontsize=8)
    widest = max(panels, key=lambda axes: len(axes.lines))
    _head(fig, record, widest, "marker: early stop")
    return fig


def _stop(record: RunRecord, arm: str, level: int) -> float:
    return mean_interval(per_seed(record, arm, level, "early_stop_step").values())[0]


def _curve(axes: Axes, seeds: Curves, label: str, look: tuple[str, str], stop: float) -> float:
    """Draw one arm with a marker at step `stop`; returns its lowest mean after a tenth of the steps."""
    steps = sorted(set.intersection(*(set(by_step) for by_step in seeds.values())))
    values = np.array([[np.mean(by_step[step]) for step in steps] for by_step in seeds.values()])
    mean, (colour, marker) = values.mean(0), look
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    (line,) = axes.plot(steps, mean, color=colour, label=label, marker=marker, linewidth=1.0)
    line.set_markevery([min(range(len(steps)), key=lambda i: abs(steps[i] - stop))])
    line.set_zorder(3 if label == "ticket" else 2)
    if label == "dense":
        line.set_linestyle((0, (4, 3)))
    return float(mean[np.array(steps) >= 0.1 * steps[-1]].min())


def _mask_levels(record: RunRecord) -> tuple[int, list[int]]:
    """The first seed with a point, and up to four of its ticket's levels, evenly spread down to the last."""
    own = [p for p in record.points if p["arm"] == "ticket"]
    present = {p["seed"] for p in own}
    seed = next(seed for seed in record.config.seeds if seed in present)
    levels = sorted(p["level"] for p in own if p["seed"] == seed)
    pruned = [level for level in levels if level] or [0]
    picked = np.ceil(np.linspace(0, len(pruned), min(4, len(pruned)) + 1)[1:]).astype(int) - 1
    return seed, [pruned[i] for i in picked]


def _first(record: RunRecord, seed: int, level: int) -> np.ndarray:
    """Mask of the first layer as [N, C, h, w]: input pixels of a unit, or a filter's positions."""
    model = get_model(record.config.model)
    spec = model.weights[0]
    shape = spec.shape if len(spec.shape) == 4 else (spec.shape[0], *model.input)
    return record.mask(seed, level, spec.name).reshape(shape)


def _first_layer(record: RunRecord) -> Figure:
    """The mask of each unit (or filter) as an image, for those with most weights at the last level."""
    seed, levels = _mask_levels(record)
    masks = [_first(record, seed, level).mean(1) for level in levels]
    left = masks[-1].reshape(len(masks[-1]), -1).sum(1)
    units = np.sort(np.argsort(-left, kind="stable")[:UNITS])
    grids = [_grid(mask[units]) for mask in masks]
    count = f"all {len(left)}" if len(units) == len(left) else f"{len(units)} of {len(left)}"
    title = f"surviving weights (blue) of {{layer}}, {count} {{units}}"
    fig, panels = _panels(record, seed, levels, grids[0].shape, title)
    for axes, grid in zip(panels, grids, strict=True):
        axes.imshow(grid, cmap=MASK_COLOURS, vmin=0, vmax=1, interpolation="none")
    return fig


def _grid(images: np.ndarray) -> np.ndarray:
    """[n, h, w] → one image with a gap of one (NaN) around each."""
    n, h, w = images.shape
    columns = isqrt(n)
    grid = np.full((-(-n // columns) * (h + 1) + 1, columns * (w + 1) + 1), np.nan)
    for i, image in enumerate(images):
        y, x = 1 + i // columns * (h + 1), 1 + i % columns * (w + 1)
        grid[y : y + h, x : x + w] = image
    return grid


def _pixels(record: RunRecord) -> Figure:
    """Share of the first layer's units that still read each input pixel (of its filters, each position)."""
    seed, levels = _mask_levels(record)
    maps = [100 * _first(record, seed, level).mean((0, 1)) for level in levels]
    title = "{units} of {layer} that keep each {place} (%)"
    fig, panels = _panels(record, seed, levels, maps[0].shape, title, right=58)
    for axes, shares in zip(panels, maps, strict=True):
        image = axes.imshow(shares, vmin=0, vmax=float(shares.max()) or 1.0, interpolation="none")
        box = axes.get_position()
        width = WIDTH * DPI
        bar = fig.add_axes((box.x1 + 8 / width, box.y0, 10 / width, box.height))
        fig.colorbar(image, cax=bar, ticks=MaxNLocator(4, integer=True))
        bar.tick_params(length=2, pad=1.5)
        bar.grid(False)
    return fig


def _panels(
    record: RunRecord, seed: int, levels: list[int], shape: tuple[int, ...], title: str, right: int = 0
) -> tuple[Figure, list[Axes]]:
    """Up to 2 × 2 axes for images of `shape`, on whole pixels so that every cell is equally large.

    `right` keeps that many pixels free beside each. `title` may name {layer}, {units} and {place}.
    """
    columns = min(2, len(levels))
    rows = -(-len(levels) // columns)
    total = round(WIDTH * DPI)
    room = total // columns
    cell = max(1, min((room - 20 - right) // shape[1], max(12, 200 // max(shape))))
    width, height, head, over = cell * shape[1], cell * shape[0], 64, 34
    tall = head + rows * (height + over) + 10
    fig = Figure(figsize=(WIDTH, tall / DPI))
    panels = []
    remaining = weights_remaining(record)
    for i, level in enumerate(levels):
        x = i % columns * room + (room - width - right) // 2
        y = tall - head - (i // columns + 1) * (height + over)
        axes = fig.add_axes((x / total, y / tall, width / total, height / tall))
        axes.set_axis_off()
        axes.set_title(f"{_short(remaining[level])} % remaining", pad=3)
        panels.append(axes)
    spec = get_model(record.config.model).weights[0]
    units, place = ("filters", "position") if len(spec.shape) == 4 else ("units", "input pixel")
    text = title.format(layer=spec.name.removesuffix(".weight"), units=units, place=place)
    heading = f"{record.config.model} on {record.config.dataset}, seed {seed}"
    fig.suptitle(f"{heading}\n{text}", fontsize=8, y=1 - 6 / tall)
    return fig, panels
