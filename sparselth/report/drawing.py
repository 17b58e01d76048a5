"""What the figures have in common: a column's width (3.3 in), looks, scales, the heading, and files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from sparselth.files import write_atomically
from sparselth.report.diverged import state
from sparselth.report.stats import FEWEST, mean_interval, seed_list
from sparselth.report.tables import percent
from sparselth.runs import RunRecord

WIDTH = 3.3  # inches, one column of a paper
DPI = 200
LINE = 66  # characters of a heading's line
NEAR = 1.8  # how much more an axis may span than what is interesting, without a break
BELOW = 0.24  # of the height of a broken axis: what lies below the break, pressed together
# Okabe and Ito's colours differ for colour-blind readers; the markers differ in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "black")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*")
ARMS = "ticket", "reinit", "random-mask", "random-reinit"  # their looks; those of a plugin take what is left
DASHED = (0, (4, 3))
STYLE: list[Any] = [
    "default",  # whatever the user's matplotlibrc says
    {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.linewidth": 0.4,
        "grid.color": "0.88",
        "axes.grid": True,
        "axes.axisbelow": True,
        "lines.linewidth": 1.2,
        "lines.markersize": 3.2,
        "legend.frameon": False,
        "axes.formatter.useoffset": False,
        "svg.hashsalt": "sparselth",
    },
]


def save(fig: Figure, folder: Path, name: str) -> list[Path]:
    """As PNG and SVG, each replaced in one step."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = BytesIO()
        fig.savefig(content, format=kind, dpi=DPI, metadata=metadata)
        fig.set_layout_engine("none")  # it stays as it was laid out
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    return paths


def save_each(
    makers: Mapping[str, Callable[[RunRecord], Figure | None]], record: RunRecord, folder: Path
) -> list[Path]:
    """Each by its name, in the style of all; what has nothing to show makes None."""
    written = []
    with matplotlib.style.context(STYLE):
        for name, make in makers.items():
            if (fig := make(record)) is not None:
                written += save(fig, folder, name)
    return written


def look(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th thing; no two of the first 64 have both in common."""
    return COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def look_of(record: RunRecord, arm: str) -> tuple[str, str]:
    """Colour and marker of an arm, the same in every figure."""
    others = [name for name in record.config.arms if name not in ARMS]
    return look(ARMS.index(arm) if arm in ARMS else len(ARMS) + others.index(arm))


def heading(
    record: RunRecord, notes: Collection[str] = (), seeds: Sequence[int] = (), how: str | None = None
) -> str:
    """Model, data set and seeds; how it was pruned; what is special about the figure or the run."""
    config, seeds = record.config, seeds or record.config.seeds
    listed = seed_list(tuple(seeds))
    named = f"seed{'s' * (len(seeds) > 1)} {listed}" if len(listed) <= 9 else f"{len(seeds)} seeds"
    lines = [f"{config.model} on {config.dataset}, {named}", config.method if how is None else how]
    lines.append("; ".join([*notes, *([state(record)] if state(record) else [])]))
    return "\n".join(balanced(line) for line in lines if line)


def balanced(text: str) -> str:
    """In as few lines as there must be, of about equal length; a number stays with its %."""
    text = text.replace(" %", "\u00a0%")
    lines = len(textwrap.wrap(text, LINE))
    widths = range(len(text) // max(1, lines), LINE + 1)
    return next(
        (wrapped for width in widths if (wrapped := textwrap.fill(text, width)).count("\n") < lines), text
    )


def head(fig: Figure, axes: Axes, title: str) -> None:
    """Title above, legend below the axes, where it covers nothing."""
    fig.suptitle(title, fontsize=7)
    lines = sorted(axes.lines, key=lambda line: line.get_label() == "dense")
    columns = len(lines) if len(lines) <= 4 else 3
    if columns == 4 and sum(len(str(line.get_label())) for line in lines) > 40:
        columns = 2
    fig.legend(handles=lines, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.8)


def short(share: float) -> str:
    """As percent; all of it without a decimal."""
    return percent(share).removesuffix(".0") if share == 1 else percent(share)


# ---- bands over the seeds


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval; of fewer seeds than an interval takes, lowest and highest."""
    values = list(values)
    mean, half = mean_interval(values)
    if half is None or len(values) < FEWEST:
        return mean, min(values), max(values)
    return mean, mean - half, mean + half


def band_note(seeds: int) -> list[str]:
    """What a band is."""
    if seeds < 2:
        return []
    return ["band: range of the seeds" if seeds < FEWEST else "band: 95 % interval of the mean"]


def extremes(axes: Axes) -> np.ndarray:
    """All y values drawn, lines and bands."""
    lines = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    bands = [np.asarray(path.vertices)[:, 1] for band in axes.collections for path in band.get_paths()]
    return np.concatenate([*lines, *bands])


# ---- scales


def level_axis(axes: Axes, shares: Sequence[float]) -> None:
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
    axes.set_xticks(ticks, [short(tick / 100) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("weights remaining (%)")


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A log scale for y with as many ticks as have room."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [digit * 10.0**power for power in range(-6, 3) for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def all_of_it(panels: Sequence[Axes], knee: float, least: float, most: float = np.inf) -> None:
    """One scale for all panels that cuts nothing off: linear from `knee` on, what is below pressed together.

    `least`: what the linear part spans at least; `most`: where values end, whatever a band says.
    """
    drawn = np.concatenate([extremes(axes) for axes in panels])
    low, top = float(drawn.min()), min(float(drawn.max()), most)
    knee = max(low, min(knee, top))
    if top - low < NEAR * (top - knee):
        knee = low
    pad = 0.05 * max(top - knee, least) + max(0.0, least - (top - knee)) / 2
    knee, top = knee - pad, top + pad
    for axes in panels:
        if low >= knee:
            axes.set_ylim(knee, top)
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        else:
            _broken(axes, low - 0.2 * (knee - low), knee, top)


def _broken(axes: Axes, low: float, knee: float, top: float) -> None:
    """Linear from `knee` to `top`; grey, and another scale, from `low` to `knee`."""
    places, heights = (low, knee, top), (0, BELOW, 1)
    axes.set_yscale(
        "function",
        functions=(lambda y: np.interp(y, places, heights), lambda h: np.interp(h, heights, places)),
    )
    axes.set_ylim(low, top)
    above = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(knee, top)
    below = MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(low, knee)
    ticks = [tick for tick in above if knee + 0.06 * (top - knee) <= tick <= top]
    for tick in below:
        last = ticks[-1] if ticks and ticks[-1] < knee else low - (knee - low)
        if low <= tick <= knee - 0.3 * (knee - low) and tick - last >= 0.4 * (knee - low):
            ticks.append(tick)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.axhspan(low, knee, color="0.93", linewidth=0, zorder=0)
    mark = {"facecolor": "white", "linewidth": 0, "pad": 0.4}
    at = axes.get_yaxis_transform()
    axes.text(0, knee, "≈", transform=at, ha="center", va="center", fontsize=7, bbox=mark, zorder=5)
