"""The figures of subset-sum, each as PNG and SVG: what was measured beside what theory says."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sparselth.report.drawing import COLOURS, DASHED, MARKERS, WIDTH, balanced, save_each
from sparselth.report.theory_tables import grouped, mean, of
from sparselth.runs import RunRecord
from sparselth.theory import laws

HEIGHT = 2.75
DOTTED = (0, (1, 1.5))
NAMES = {
    "twice": "twice the depth",
    "redrawn": "drawn again",
    "sparse": "k of n kept",
    "exact": "on a grid",
    "one-more": "one layer more",
}


def draw(record: RunRecord, folder: Path) -> None:
    """Draw every figure for which a case is finished, unless those there are newer than the run."""
    last = folder / "errors.svg"  # is drawn last
    lines = record.path / "cells.jsonl"
    if not record.points or (last.exists() and last.stat().st_mtime_ns > lines.stat().st_mtime_ns):
        return
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[RunRecord], Figure | None]] = {
        "from_one_to_half": _line,
        "fixed_size": _fixed_size,
        "covering": _covering,
        "redraws": _redraws,
        "density": _density,
        "errors": _errors,
    }
    save_each(makers, record, folder)


def _panels(number: int, title: str, **words: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH * (1 if number == 1 else 2), HEIGHT), layout="constrained")
    axes = figure.subplots(1, number, squeeze=False, **words)[0]
    figure.suptitle("\n".join(balanced(line) for line in title.split("\n")), fontsize=7)
    return figure, list(axes)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(
        handles=[line for line in axes.lines if not str(line.get_label()).startswith("_")],
        loc="outside lower center",
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.8,
    )


def _plain(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _ticks(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _line(record: RunRecord) -> Figure | None:
    """The least n against k / n, from Malach over Natale to Pensia."""
    found = grouped([p for p in of(record, "fixed-size") if p["z"] == 0], "epsilon", "k")
    if not found:
        return None
    figure, (axes,) = _panels(
        1,
        "least n of U[-1, 1] of which k sum to 0 within ε, in half of the pools\n"
        "lines: C(n,k) 2ε f(0) = 1; dotted: n H(k/n) = log(k/ε)",
    )
    for i, epsilon in enumerate(sorted({key[0] for key in found}, reverse=True)):
        points = [
            (k, mean(p, "n"), p[0]["first_moment"], p[0]["entropy"])
            for (e, k), p in sorted(found.items())
            if e == epsilon
        ]
        k, n, law, entropy = np.array([p for p in points if p[0] <= 0.5 * p[1] or p[0] == 1]).T
        axes.plot(k / law, law, color=COLOURS[i], linewidth=0.9)
        axes.plot(k / n, n, color=COLOURS[i], marker=MARKERS[i], linestyle="none", label=f"ε = {epsilon:g}")
        inside = entropy > 2 * k  # where the bound says something
        if inside.sum() > 1:
            k, entropy = k[inside], entropy[inside]
            axes.plot(k / entropy, entropy, color=COLOURS[i], linewidth=0.9, linestyle=DOTTED)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(right=0.62)
    _ticks(axes.yaxis)
    _ticks(axes.xaxis)
    axes.set_xlabel("share of the numbers that is kept, k / n")
    axes.set_ylabel("least n")
    low, high = axes.get_ylim()
    axes.set_ylim(low * 0.6, high * 1.3)
    for text, x, side in (("← Malach: one of n", 0.02, "left"), ("Pensia: half of n →", 0.98, "right")):
        axes.text(x, 0.03, text, transform=axes.transAxes, ha=side, fontsize=6.5)
    _legend(figure, axes, 3)
    return figure


def _fixed_size(record: RunRecord) -> Figure | None:
    """The least n against k, in the middle of what sums reach and at its edge, on the law."""
    found = grouped(of(record, "fixed-size"), "epsilon", "k", "z")
    if not found:
        return None
    figure, panels = _panels(
        2,
        "least n with k numbers within ε of z in half of the pools; lines: the first-moment law "
        "C(n,k) 2ε f(z) = 1",
        sharey=True,
    )
    for axes, top in zip(panels, (False, True), strict=True):
        for i, epsilon in enumerate(sorted({key[0] for key in found}, reverse=True)):
            points = sorted(
                (key[1], mean(p, "n"), p[0]["first_moment"])
                for key, p in found.items()
                if key[0] == epsilon and (key[2] > 0) == top
            )
            if not points:
                continue
            k, n, law = np.array(points).T
            axes.plot(k, law, color=COLOURS[i], linewidth=0.9)
            axes.plot(k, n, color=COLOURS[i], marker=MARKERS[i], linestyle="none", label=f"ε = {epsilon:g}")
        axes.set_yscale("log")
        axes.set_xticks(range(1, 11))
        axes.set_xlabel(f"numbers in the sum, k;  z = {'√k' if top else '0'}")
    panels[0].set_ylabel("least n")
    panels[0].set_yticks([5, 10, 20, 50, 100, 200, 500, 1000])
    _ticks(panels[0].yaxis)
    _legend(figure, panels[0], 3)
    return figure


def _covering(record: RunRecord) -> Figure | None:
    """Probability of covering every target against n, and the law of log2(1 / epsilon)."""
    found = grouped(of(record, "covering"), "n")
    if len(found) < 2:
        return None
    figure, (left, right) = _panels(
        2,
        "subset sums of n numbers of U[-1, 1] within ε of every z in [-1/2, 1/2]",
    )
    numbers = np.array(sorted(key[0] for key in found))
    for i, power in enumerate((2, 4, 6, 8, 10)):
        shares = [100 * sum(p["shares"][f"2^-{power}"] for p in found[n,]) / len(found[n,]) for n in numbers]
        left.plot(numbers, shares, color=COLOURS[i], marker=MARKERS[i], label=f"ε = 2$^{{-{power}}}$")
    left.set_xlabel("n")
    left.set_ylabel("pools that cover all of it (%)")
    figure.set_figheight(HEIGHT + 0.5)
    bits = np.array([-log2(mean(found[n,], "median_error")) for n in numbers])
    slope, start = np.polyfit(bits[len(bits) // 2 :], numbers[len(bits) // 2 :], 1)
    right.plot(
        bits, numbers, color="black", marker="o", linestyle="none", label="covers, median of the pools"
    )
    right.plot(
        bits,
        slope * bits + start,
        color="black",
        linewidth=0.9,
        label=f"{slope:.2f} log₂(1/ε) + {start:.1f}, fitted to the right half",
    )
    edge = np.array([0, bits.max()])
    right.plot(edge, edge - 1, color=COLOURS[6], linestyle=DASHED, label="2$^n$ intervals of 2ε at best")
    grid = grouped(of(record, "quantised"), "bits")
    if grid:
        places = np.array(sorted(key[0] for key in grid))
        right.plot(
            places,
            [mean(grid[b,], "n") for b in places],
            color=COLOURS[1],
            marker="s",
            linestyle="none",
            label="ε = 2$^{-b}$: holds the grid of b bits, no error",
        )
    right.set_xlabel("log₂(1/ε)")
    right.set_ylabel("n")
    right.set_ylim(0, max(float(numbers.max()), 16) + 1)
    for axes, columns in ((left, 3), (right, 1)):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, fontsize=6.5)
    return figure


def _redraws(record: RunRecord) -> Figure | None:
    """The least n against the rounds in which it is drawn again."""
    found = grouped(of(record, "redraws"), "k", "redraws")
    if not found:
        return None
    figure, (axes,) = _panels(
        1,
        f"least n of which k sum to 0 within {record.config.epsilon:g} in one of R rounds, "
        "in half of the pools\ndashed: one pool of R n instead of R of n",
    )
    for i, k in enumerate(sorted({key[0] for key in found})):
        rounds = np.array(sorted(key[1] for key in found if key[0] == k))
        n = np.array([mean(found[k, r], "n") for r in rounds])
        axes.plot(rounds, n, color=COLOURS[i], marker=MARKERS[i], label=f"k = {k}")
        if rounds[0] == 1:
            axes.plot(rounds, n[0] / rounds, color=COLOURS[i], linewidth=0.9, linestyle=DASHED)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(rounds)
    axes.set_ylim(1, None)
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100])
    _ticks(axes.xaxis)
    _ticks(axes.yaxis)
    axes.set_xlabel("rounds, R")
    axes.set_ylabel("least n")
    _legend(figure, axes, 3)
    return figure


def _density(record: RunRecord) -> Figure | None:
    """What is kept against what is there, for a weight of a trained network."""
    points = sorted(
        (mean(p, "n"), mean(p, "density"), p[0]["k"] or 0, p[0])
        for p in grouped(of(record, "density"), "k").values()
    )
    if len(points) < 2:
        return None
    one, epsilon = points[0][3], record.config.epsilon
    figure, (axes,) = _panels(
        1,
        f"weights of {one['model']} to {epsilon:g}, each from n candidates: least n for 99 % of "
        f"{one['sample']:,} of them",
    )
    n, density, kept = (np.array(column) for column in list(zip(*points, strict=True))[:3])
    shares = np.geomspace(min(0.5 / n.max(), 0.004), 0.5, 100)
    constant = float(
        np.median([a * laws.entropy(d) / log2(a * d / epsilon) for a, d in zip(n, density, strict=True)])
    )
    for c, style in ((1.0, DOTTED), (constant, "-")):
        law = [_entropy_law(share, epsilon, c) for share in shares]
        axes.plot(
            law,
            100 * shares,
            color="0.5",
            linestyle=style,
            linewidth=0.9,
            label=f"n H(k/n) = {c:.3g} log(k/ε)" + " (fitted)" * (c == constant),
        )
    axes.plot(
        np.array([2.0, 2 * n.max()]),
        100 / np.array([2.0, 2 * n.max()]),
        color="0.5",
        linestyle=DASHED,
        linewidth=0.9,
        label="one kept of n",
    )
    theorems = (("Malach: k = 1", 1, 1), ("Natale: k of n", 2, 10**9), ("Pensia: any number", 0, 0))
    for i, (name, low, high) in enumerate(theorems):
        here = (kept >= low) & (kept <= high)
        axes.plot(
            n[here], 100 * density[here], color=COLOURS[i], marker=MARKERS[i], linestyle="none", label=name
        )
        for x, y, k in zip(n[here], density[here], kept[here], strict=True):
            axes.annotate(
                f"{k:.0f}" if k else "", (x, 100 * y), (4, 2), textcoords="offset points", fontsize=6
            )
    config = record.config
    built = grouped([p for p in record.points if "accuracy" in p and p["model"] == one["model"]], "arm")
    whole = [
        (config.candidates(case), mean(p, "weights_used"), config.sums(case)) for (case,), p in built.items()
    ]
    if whole:
        x, used, sums = np.array(whole).T
        axes.plot(
            x,
            100 * used / (x * sums),
            color="black",
            marker="o",
            markersize=5.5,
            markerfacecolor="none",
            linestyle="none",
            label="whole networks",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(6, 2.2 * n.max())
    axes.set_ylim(0.3, 90)
    axes.set_xticks([tick for tick in (10, 20, 50, 100, 200, 500, 1000) if tick < 2.2 * n.max()])
    _ticks(axes.xaxis)
    _ticks(axes.yaxis)
    axes.set_xlabel("over-parameterisation: candidates for a weight, n")
    axes.set_ylabel("density: kept of them (%)")
    _legend(figure, axes, 2)
    return figure


def _entropy_law(share: float, epsilon: float, constant: float) -> float:
    """n with n H2(share) = constant log2(share n / epsilon)."""
    n = 10.0
    for _ in range(200):
        n = constant * log2(max(share * n, 1.0) / epsilon) / laws.entropy(share)
    return n


def _errors(record: RunRecord) -> Figure | None:
    """How far the weights of a random network are from those it is pruned to."""
    built = grouped([one for one in record.points if "histogram" in one], "arm")
    if not built:
        return None
    figure, (axes,) = _panels(
        1, "random networks pruned to a trained one: errors of its weights,\nand test accuracies of both"
    )
    figure.set_figheight(HEIGHT + 0.4)
    edges = np.linspace(-9, 0, len(next(iter(built.values()))[0]["histogram"]) + 1)
    for i, ((case,), points) in enumerate(built.items()):
        counts = np.sum([one["histogram"] for one in points], axis=0)
        share = 100 * np.cumsum(counts[::-1])[::-1] / counts.sum()
        shown = share > 0
        ours, theirs = 100 * mean(points, "accuracy"), 100 * mean(points, "target_accuracy")
        name = f"{NAMES[case]}, n = {points[0]['n']}: {ours:.2f} of {theirs:.2f} %"
        name += ", no error at all" * (points[0]["max_error"] == 0)
        axes.plot(
            10.0 ** edges[:-1][shown], share[shown], color=COLOURS[i], label=name, drawstyle="steps-post"
        )
    axes.axvline(record.config.epsilon, color="black", linestyle=DOTTED, linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1e-9, 0.5)
    axes.set_xlabel("error of a weight;  dotted: ε")
    axes.set_ylabel("weights further off (%)")
    axes.set_yticks([1e-4, 1e-2, 1, 100])
    _ticks(axes.yaxis)
    _legend(figure, axes, 1)
    return figure
