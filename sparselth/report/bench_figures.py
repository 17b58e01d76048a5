"""The figures of `bench`, each as PNG and SVG: speed-up against sparsity, roofline, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from sparselth.report.bench_tables import Row, buffer, crossing, percent, swept
from sparselth.report.figures import STYLE, WIDTH, _save

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "black")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


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
                written += _save(fig, folder, name)
    return written


def _speedup(rows: Sequence[Row], device: Mapping[str, Any]) -> Figure | None:
    """The best sparse kernel over dense at its best, a line for each batch; a ring marks the break-even."""
    found = swept(rows)
    if not found:
        return None
    (shape, dtype, mask), by_batch = max(found.items(), key=lambda item: sum(map(len, item[1].values())))
    fig = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = fig.add_subplot()
    for i, (batch, points) in enumerate(by_batch.items()):
        x, y = 100 * np.array(points).T[0], np.array(points).T[1]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], label=f"batch {batch:,}")
        if (at := crossing(points)) is not None and at > points[0][0]:
            axes.plot([100 * at], [1], "o", markersize=6.5, markerfacecolor="none", color=colour)
    axes.axhline(1, color="black", linestyle=(0, (4, 3)), linewidth=0.7, label="dense at its best")
    _log(axes.yaxis, axes.get_ylim(), "x")
    axes.set_xlabel("sparsity (%)")
    axes.set_ylabel("speed-up")
    axes.xaxis.set_major_locator(FixedLocator(sorted({100 * s for p in by_batch.values() for s, _ in p})))
    fig.suptitle(f"{shape}, {dtype}, {mask} mask\n{_where(device)}", fontsize=8)
    fig.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.6)
    return fig


def _roofline(rows: Sequence[Row], device: Mapping[str, Any]) -> Figure | None:
    """FLOPs a second of what is kept, against FLOPs a byte, under the measured roofs."""
    dtype = rows[0]["dtype"] if rows else ""
    own = [row for row in rows if row["dtype"] == dtype and row["bytes"] and row["flops"]]
    if len(own) < 2:
        return None
    fig = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = fig.add_subplot()
    kinds = {"dense": "dense", "torch": "torch's sparse formats", "ours": "our kernels"}
    for i, (kind, label) in enumerate(kinds.items()):
        mine = [row for row in own if row["kind"] == kind]
        axes.plot(
            [row["flops"] / row["bytes"] for row in mine],
            [row["flops"] / row["median_s"] / 1e9 for row in mine],
            MARKERS[i], color=("0.55", COLOURS[1], COLOURS[0])[i], label=label, linestyle="none",
            markersize=2.6, alpha=0.75, markeredgewidth=0,
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
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("FLOPs a byte, each number moved once")
    axes.set_ylabel("GFLOP/s on kept weights")
    plain = FuncFormatter(lambda v, _: f"{v:,g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    fig.suptitle(f"roofline, {dtype}\n{_where(device)}", fontsize=8)
    fig.legend(loc="outside lower center", ncols=2, columnspacing=1.0, handlelength=1.6)
    return fig


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
    fig = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    top, bottom = fig.subplots(2, 1)
    for i, name in enumerate(names):
        mine = {row["sparsity"]: row for row in own if row["implementation"] == name}
        share = [mine[s]["weight_bytes"] / mine[s]["dense_weight_bytes"] for s in sorted(mine)]
        top.plot([100 * s for s in sorted(mine)], share, color=COLOURS[i], marker=MARKERS[i], label=name)
    top.plot(
        [100 * s for s in sparsities], [1 - s for s in sparsities], color="0.6", linestyle=(0, (1, 1)),
        label="values alone",
    )  # fmt: skip
    top.axhline(1, color="black", linestyle=(0, (4, 3)), linewidth=0.7, label="dense")
    top.set_ylim(0, 1.08 * max(1.0, float(top.dataLim.y1)))
    top.set_xlabel("sparsity (%)")
    top.set_ylabel("weights, of dense")
    top.xaxis.set_major_locator(FixedLocator([100 * s for s in sparsities]))

    at = max(sparsities, key=lambda s: (len({row["batch"] for row in own if row["sparsity"] == s}), s))
    dense = {"dense eager": ("black", "")}
    looks = dense | {name: (COLOURS[i], MARKERS[i]) for i, name in enumerate(names)}
    for name, (colour, marker) in looks.items():
        peaks = {
            row["batch"]: row["peak_bytes"] / 1e6
            for row in own
            if row["implementation"] == name and row["sparsity"] == at and row["peak_bytes"]
        }
        style = (0, (4, 3)) if name in dense else "solid"
        batches = sorted(peaks)
        bottom.plot(batches, [peaks[b] for b in batches], color=colour, marker=marker, linestyle=style)
    bottom.set_xscale("log")
    ticks = sorted({row["batch"] for row in own if row["sparsity"] == at})
    bottom.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    bottom.xaxis.set_minor_locator(NullLocator())
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("batch")
    bottom.set_ylabel(f"peak of a call at {percent(at)} (MB)")
    fig.suptitle(f"{shape}, {dtype}, {mask} mask\n{_where(device)}", fontsize=8)
    handles, labels = top.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.6)
    return fig


def _key(row: Row) -> tuple[str, str, str]:
    return row["shape"], row["dtype"], row["mask"]


def _area(shape: str) -> int:
    n, k = shape.split("x")[:2]
    return int(n) * int(k)


def _where(device: Mapping[str, Any]) -> str:
    threads = (
        f", {device['threads']} thread{'s' * (device['threads'] > 1)}" if device["type"] == "cpu" else ""
    )
    return f"{device['name']}{threads}, torch {device['torch']}"


def _log(axis: Any, limits: tuple[float, float], unit: str) -> None:
    """A log axis with plain numbers."""
    axis.axes.set_yscale("log")
    low, high = limits
    ticks = [
        t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 2 <= t <= 2 * high
    ]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{unit}"))
