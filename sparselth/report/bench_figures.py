"""The figures of `bench`, each as PNG and SVG: speed-up against sparsity, roofline, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from sparselth.report.bench_tables import buffer
from sparselth.report.bench_words import Row, crossing, in_cells, percent, sparse_best, swept
from sparselth.report.drawing import DASHED, STYLE, WIDTH, balanced, look, save

FEW = 8  # layers and batch sizes up to which every implementation is a point of the roofline
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
FAR = 3, 6, 10  # points of type between a point and its name


def draw(rows: Sequence[Row], device: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the rows are enough for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [row for row in rows if row["median_s"]]
    makers: dict[str, Callable[[], Figure | None]] = {
        "speedup": lambda: _speedup(good, device),
        "roofline": lambda: _roofline(good, device),
        "memory": lambda: _memory(good, device),
    }
    written = []
    with matplotlib.style.context(STYLE):
        for name, make in makers.items():
            if (fig := make()) is not None:
                written += save(fig, folder, name)
    return written


def _speedup(rows: Sequence[Row], device: Mapping[str, Any]) -> Figure | None:
    """The best sparse kernel over dense at its best, a line for each batch; a cross marks the break-even."""
    found = swept(rows)
    if not found:
        return None
    (shape, dtype, mask), by_batch = max(found.items(), key=lambda item: sum(map(len, item[1].values())))
    fig = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = fig.add_subplot()
    crosses, noisy = False, False
    for i, (batch, points) in enumerate(by_batch.items()):
        colour, marker = look(i)
        x, y = 100 * np.array([p.sparsity for p in points]), np.array([p.speedup for p in points])
        axes.plot(x, y, color=colour, marker=marker, label=f"batch {batch:,}")
        hollow = np.array([p.noisy for p in points])
        if hollow.any():
            noisy = True
            axes.plot(
                x[hollow], y[hollow], color=colour, marker=marker, linestyle="none", markerfacecolor="white",
                label="_",
            )  # fmt: skip
        loses = any(point.speedup < 1 for point in points if not point.noisy)
        if loses and (at := crossing(points)) is not None:
            crosses = True
            axes.plot([100 * at], [1], "x", markersize=5, color=colour, label="_", zorder=4)
    axes.axhline(1, color="black", linestyle=DASHED, linewidth=0.7, label="dense at its best", zorder=1)
    _log(axes.yaxis, axes.get_ylim(), "x")
    axes.set_xlabel("sparsity (%)")
    axes.set_ylabel("speed-up")
    axes.xaxis.set_major_locator(
        FixedLocator(sorted({100 * p.sparsity for b in by_batch.values() for p in b}))
    )
    notes = ["cross: break-even"] * crosses + ["hollow: noise decides"] * noisy
    _head(fig, device, f"{shape}, {dtype}, {mask} mask", notes)
    fig.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.6)
    return fig


def _roofline(rows: Sequence[Row], device: Mapping[str, Any]) -> Figure | None:
    """FLOPs a second of what is kept, against FLOPs a byte, under the measured roofs; layers have names.

    Of many layers and batch sizes the fastest dense and the fastest sparse ones.
    """
    dtype = rows[0]["dtype"] if rows else ""
    cells = [
        [row for row in cell if row["bytes"] and row["flops"] and row["kind"] != "auto"]
        for cell in in_cells([row for row in rows if row["dtype"] == dtype]).values()
    ]
    cells = [cell for cell in cells if cell]
    best = [row for cell in cells if (row := sparse_best(cell) or _fastest(cell))]
    own = [row for cell in cells for row in cell]
    if len(own) < 2:
        return None
    if len(cells) > FEW:
        own = [row for cell in cells for row in (_fastest(cell), sparse_best(cell)) if row]
    fig = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = fig.add_subplot()
    kinds = {row["implementation"]: row["kind"] for row in own}
    names = sorted(kinds, key=lambda name: ("dense", "torch", "ours").index(kinds[name]))
    dense = sum(kind == "dense" for kind in kinds.values())
    for i, name in enumerate(names):
        mine = [row for row in own if row["implementation"] == name]
        colour, marker = look(i if i < dense else i - dense)
        axes.plot(
            [_intensity(row) for row in mine], [_rate(row) for row in mine], marker, label=name,
            color="0.6" if i < dense else colour, linestyle="none", markersize=3.6, alpha=0.9,
            markeredgewidth=0,
        )  # fmt: skip
    rate, bandwidth = device["flops_per_s"][dtype] / 1e9, device["bytes_per_s"]
    x = np.geomspace(axes.dataLim.x0, axes.dataLim.x1, 200)
    sizes = sorted(bandwidth, key=int)
    ends = {sizes[0]: (0, (1, 1)), sizes[-1]: "solid"}  # the largest buffer lies in memory
    for place, style in ends.items():
        axes.plot(
            x, np.minimum(rate, x * bandwidth[place] / 1e9), color="black", linewidth=0.8, linestyle=style,
            label=f"roof, {buffer(int(place))} buffers",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.08)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("FLOPs a byte, each number moved once")
    axes.set_ylabel("GFLOP/s on kept weights")
    plain = FuncFormatter(lambda v, _: f"{v:,g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    chains: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(best, key=_intensity):
        chains.setdefault((row["shape"], row["sparsity"]), []).append(row)
    for chain in chains.values():
        at = np.array([(_intensity(row), _rate(row)) for row in chain])
        axes.plot(*at.T, color="0.75", linewidth=0.6, label="_", zorder=1)
    fig.legend(loc="outside lower center", ncols=2, columnspacing=1.0, handlelength=1.6)
    linked = any(len(chain) > 1 for chain in chains.values())
    _head(fig, device, f"roofline, {dtype}", ["thin line: a layer's fastest, by batch size"] * linked)
    _name(fig, axes, chains)
    return fig


def _name(fig: Figure, axes: Axes, chains: Mapping[tuple[str, float], Sequence[Row]]) -> None:
    """Names beside the points of layers, where they touch neither points, nor roofs, nor each other."""
    fig.draw_without_rendering()  # places the axes
    lines = [np.asarray(line.get_xydata()) for line in axes.lines if line.get_label() != "_"]
    taken = [
        Bbox.from_bounds(x - 2, y - 2, 4, 4) for line in lines for x, y in axes.transData.transform(line)
    ]
    inside, several = axes.get_window_extent(), len({sparsity for _, sparsity in chains}) > 1
    for (shape, sparsity), chain in chains.items():
        text = shape + f", {percent(sparsity)}" * several
        for far, row, (dx, dy) in itertools.product(FAR, reversed(chain), SIDES):
            label = axes.annotate(
                text, (_intensity(row), _rate(row)), (far * dx, far * dy), textcoords="offset points",
                ha=("right" if dx < 0 else "left" if dx else "center"), fontsize=5.5,
                va=("top" if dy < 0 else "bottom" if dy else "center"), in_layout=False, zorder=5,
            )  # fmt: skip
            box = label.get_window_extent()
            within = inside.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and inside.y0 <= box.y0 <= inside.y1 - 6
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _fastest(cell: Sequence[Row]) -> Row | None:
    """The fastest dense one."""
    return min((r for r in cell if r["kind"] == "dense"), key=lambda r: float(r["median_s"]), default=None)


def _intensity(row: Row) -> float:
    return float(row["flops"] / row["bytes"])


def _rate(row: Row) -> float:
    return float(row["flops"] / row["median_s"] / 1e9)


def _memory(rows: Sequence[Row], device: Mapping[str, Any]) -> Figure | None:
    """Bytes of weights with every index, as shares of dense, by format; below, the peak of a call."""
    linear = [row for row in rows if "@" not in row["shape"] and row["kind"] != "auto"]
    if not linear:
        return None
    shape, dtype, mask = max(
        {(row["shape"], row["dtype"], row["mask"]) for row in linear},
        key=lambda key: (len({r["sparsity"] for r in linear if _key(r) == key}), _area(key[0]), key),
    )
    own = [row for row in linear if _key(row) == (shape, dtype, mask)]
    names = list(dict.fromkeys(row["implementation"] for row in own if row["kind"] != "dense"))
    sparsities = sorted({row["sparsity"] for row in own})
    fig = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    top, bottom = fig.subplots(2, 1)
    for i, name in enumerate(names):
        mine = {row["sparsity"]: row for row in own if row["implementation"] == name}
        share = [mine[s]["weight_bytes"] / mine[s]["dense_weight_bytes"] for s in sorted(mine)]
        colour, marker = look(i)
        top.plot(
            [100 * s for s in sorted(mine)],
            share,
            color=colour,
            marker=marker,
            label=name,
            **_width(i, names),
        )
    low, high = 100 * sparsities[0], 100 * sparsities[-1]
    room = 0.05 * (high - low) or 5
    ends = [max(0, low - room), min(100, high + room)]  # so that lines are there of a single sparsity, too
    top.plot(ends, [1 - s / 100 for s in ends], color="0.6", linestyle=(0, (1, 1)), label="values alone")
    top.axhline(1, color="black", linestyle=DASHED, linewidth=0.7, label="dense")
    top.set_ylim(0, 1.08 * max(1.0, float(top.dataLim.y1)))
    top.set_xlim(*ends)
    top.set_xlabel("sparsity (%)")
    top.set_ylabel("weights, of dense")
    top.xaxis.set_major_locator(FixedLocator([100 * s for s in sparsities]))

    at = max(sparsities, key=lambda s: (len({row["batch"] for row in own if row["sparsity"] == s}), s))
    for i, name in enumerate([*names, "dense eager"]):
        peaks = {
            row["batch"]: row["peak_bytes"] / 1e6
            for row in own
            if row["implementation"] == name and row["sparsity"] == at and row["peak_bytes"]
        }
        batches, (colour, marker) = sorted(peaks), look(i)
        values = [peaks[batch] for batch in batches]
        if name in names:
            bottom.plot(batches, values, color=colour, marker=marker, **_width(i, names))
        elif len(values) > 1:
            bottom.plot(batches, values, color="black", linestyle=DASHED, linewidth=0.9)
        elif values:
            bottom.axhline(values[0], color="black", linestyle=DASHED, linewidth=0.9)
    bottom.set_xscale("log")
    ticks = sorted({row["batch"] for row in own if row["sparsity"] == at})
    bottom.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    bottom.xaxis.set_minor_locator(NullLocator())
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("batch")
    bottom.set_ylabel(f"peak of a call at {percent(at)} (MB)")
    _head(fig, device, f"{shape}, {dtype}, {mask} mask", [])
    handles, labels = top.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.6)
    return fig


def _head(fig: Figure, device: Mapping[str, Any], title: str, notes: Sequence[str]) -> None:
    """What is shown, where it was measured, and what is special about it."""
    lines = [title, _where(device), "; ".join(notes)]
    fig.suptitle("\n".join(balanced(line) for line in lines if line), fontsize=7)


def _width(i: int, names: Sequence[str]) -> dict[str, Any]:
    """Of a line and its markers: the later ones are thinner, so that what lies under them is seen."""
    left = 1 - min(1.0, i / max(1, len(names)))
    return {"linewidth": 0.9 + 0.9 * left, "markersize": 2.6 + 2 * left}


def _key(row: Row) -> tuple[str, str, str]:
    return row["shape"], row["dtype"], row["mask"]


def _area(shape: str) -> int:
    n, k = shape.split("x")[:2]
    return int(n) * int(k)


def _where(device: Mapping[str, Any]) -> str:
    threads = (
        f", {device['threads']} thread{'s' * (device['threads'] > 1)}" if device["type"] == "cpu" else ""
    )
    return f"{device['name']}{threads}, torch {device['torch'].partition('+')[0]}"


def _log(axis: Any, limits: tuple[float, float], unit: str) -> None:
    """A log axis with plain numbers."""
    axis.axes.set_yscale("log")
    low, high = limits
    ticks = [
        t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 2 <= t <= 2 * high
    ]
    if high > 200:
        ticks = [t for t in (0.01, 0.1, 1, 10, 100, 1000, 10000) if low / 2 <= t <= 2 * high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{unit}"))
