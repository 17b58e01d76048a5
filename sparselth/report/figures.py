"""The figures of a run, each as PNG and SVG: a column wide, the same bytes for the same record.

Nothing is cut off: what falls far below dense lies on a grey part of the axis that is pressed together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from sparselth.report.drawing import (
    DASHED,
    WIDTH,
    all_of_it,
    band_note,
    extremes,
    head,
    heading,
    level_axis,
    log_axis,
    look,
    look_of,
    save_each,
    short,
    spread,
)
from sparselth.report.mask_figures import first_layer, layers, pixels
from sparselth.report.stats import (
    FEWEST,
    compare,
    controls,
    costs,
    empty_layers,
    mean_interval,
    nearest_level,
    per_seed,
    tolerance,
    verdict,
    weights_remaining,
)
from sparselth.runs import RunRecord

POINTS = (-100, -50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100)  # of percent
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
        "differences": _differences,
        "early_stop": _early_stop,
        "curves": _curves,
        "layers": layers,
        "first_layer": first_layer,
        "cost": _cost,
        "pixels": pixels,
    }
    return save_each(makers, record, folder)


def _accuracy(record: RunRecord) -> Figure:
    winning = [level for level in weights_remaining(record) if verdict(record, level).word == "winning"]
    fig, axes = _against_weights(
        record, "accuracy_at_early_stop", 100.0, ["ring: winning ticket"] if winning else []
    )
    axes.set_ylabel("test accuracy at early stop (%)")
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), float) for line in axes.lines}
    dense, ticket = float(lines["dense"][0]), lines["ticket"]
    # Room below dense for six times the ticket's gain (or unrest) and for three quarters of its levels.
    unrest = float(np.median(np.abs(np.diff(ticket, prepend=ticket[0]))))
    gain = max(0.5, float(ticket.max()) - dense, unrest)
    all_of_it([axes], min(dense - 6 * gain, float(np.quantile(ticket, 0.25))), 0.5, 100)
    for level in winning:
        mean, _ = mean_interval(per_seed(record, "ticket", level, "accuracy_at_early_stop").values())
        share, colour = weights_remaining(record)[level], look_of(record, "ticket")[0]
        axes.scatter([100 * share], [100 * mean], s=36, facecolors="none", edgecolors=colour, linewidths=0.9)
    return fig


def _differences(record: RunRecord) -> Figure | None:
    """The ticket minus dense and minus each control, paired by seed: what the verdict reads."""
    fig, axes, seeds = *_axes(), len(record.config.seeds)
    remaining = weights_remaining(record)
    lines: list[Line2D] = []
    for i, (name, _) in enumerate(controls(record, 0)):
        rows = []
        for level in (level for level in remaining if level):
            gap = compare(record, ("ticket", level), controls(record, level)[i][1])
            if gap is not None:
                half = gap.half or 0.0
                rows.append([100 * value for value in (remaining[level], gap.mean, half)])
        if not rows:
            continue
        x, mean, half_ = np.array(rows).T
        colour, marker = ("black", "P") if name == "dense" else look_of(record, name)
        beside = x * 1.012 ** (1 - i)  # so that bars do not lie on each other
        if seeds >= FEWEST:
            axes.errorbar(
                beside, mean, half_, fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.2, capthick=0.8
            )
        lines += axes.plot(beside, mean, color=colour, marker=marker, label=f"minus {name}", linewidth=0.9)
    if not lines:
        return None
    drawn = extremes(axes)
    axes.axhline(0, color="black", linewidth=0.7, zorder=1)
    least = -100 * tolerance(record)
    axes.axhline(least, color="black", linewidth=0.7, linestyle=(0, (1, 1)), zorder=1)
    level_axis(axes, [100 * share for level, share in remaining.items() if level])
    axes.set_yscale("symlog", linthresh=1, linscale=1)
    axes.set_ylim(1.1 * min(float(drawn.min()), -0.5), 1.1 * max(float(drawn.max()), 0.5))
    low, high = axes.get_ylim()
    axes.set_yticks(
        [pp for pp in POINTS if low <= pp <= high], [f"{pp:g}" for pp in POINTS if low <= pp <= high]
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("ticket minus ... (pp)")
    notes = [
        "test accuracy at early stop, seed by seed",
        *["bars: 95 % interval of the mean"] * (seeds >= FEWEST),
        f"dotted: {least:.2g} pp, to match dense",
    ]
    fig.suptitle(heading(record, notes), fontsize=7)
    fig.legend(handles=lines, loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.5)
    return fig


def _early_stop(record: RunRecord) -> Figure:
    fig, axes = _against_weights(record, "early_stop_step", 1.0)
    axes.set_ylabel("early-stop step")
    axes.set_ylim(0, 1.06 * max(float(extremes(axes).max()), 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    if not all(all(p["kept"].values()) for p in record.points):
        _remark(axes, "with an empty layer: not drawn")
    return fig


def _cost(record: RunRecord) -> Figure | None:
    """Seconds a step and bytes of state of each level's ticket, as shares of the same seed's dense."""
    found = costs(record)
    if len(found) < 2:
        return None
    fig, axes = _axes()
    x = np.array([100 * cost.remaining for cost in found.values()])
    for i, (label, field) in enumerate(
        {"time of a step": "seconds_of_dense", "bytes of state": "bytes_of_dense"}.items()
    ):
        mean, low, high = np.array([spread(getattr(cost, field)) for cost in found.values()]).T
        colour, marker = look(i)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, marker=marker, label=label)
    axes.plot(x, x / 100, color="black", linestyle=DASHED, linewidth=0.7, label="weights", zorder=1)
    drawn = extremes(axes)
    log_axis(axes, float(drawn.min()) * 0.8, max(1.0, float(drawn.max())) * 1.25)
    axes.set_ylabel("share of dense")
    level_axis(axes, [*x])
    head(fig, axes, heading(record, band_note(len(record.config.seeds))))
    return fig


def _axes() -> tuple[Figure, Axes]:
    fig = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    return fig, fig.add_subplot()


def _against_weights(
    record: RunRecord, field: str, scale: float, notes: list[str] | None = None
) -> tuple[Figure, Axes]:
    """A line and a band over the seeds per arm, from the dense point on."""
    fig, axes = _axes()
    remaining = weights_remaining(record)
    for arm in record.config.arms:
        rows = []
        for level, share in remaining.items():
            if field == "early_stop_step" and empty_layers(record, level, arm):
                continue  # a constant learns nothing, so its early stop is not early
            if values := per_seed(record, arm, level, field):
                rows.append((100 * share, *(scale * v for v in spread(values.values()))))
        if len(rows) < 2 and arm != "ticket":
            continue  # only the dense point, which the ticket's line has too
        x, mean, low, high = np.array(rows).T
        colour, marker = look_of(record, arm)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, marker=marker, label=arm, zorder=3 if arm == "ticket" else 2)
    dense = scale * mean_interval(per_seed(record, "ticket", 0, field).values())[0]
    axes.axhline(dense, color="black", linestyle=DASHED, linewidth=0.7, label="dense", zorder=1)
    level_axis(axes, [100 * share for share in remaining.values()])
    head(fig, axes, heading(record, [*(notes or []), *band_note(len(record.config.seeds))]))
    return fig, axes


def _remark(axes: Axes, text: str) -> None:
    """Small print in the lower left corner, where lines that begin at dense seldom are."""
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
    axes.text(0.02, 0.03, text, transform=axes.transAxes, fontsize=7, color="0.35", bbox=box, zorder=4)


def _curves(record: RunRecord) -> Figure | None:
    """Validation accuracy against step, one panel per level on one scale, dense in each."""
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

    fig = Figure(figsize=(WIDTH, 1.1 + 1.45 * len(levels)), layout="constrained")
    panels = fig.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    floors = []
    for axes, level in zip(panels, levels, strict=True):
        # The first tenth of the steps climbs from chance; what is interesting is above it.
        floor = _curve(axes, found["ticket", 0], "dense", ("black", "P"), _stop(record, "ticket", 0))
        for arm in record.config.arms if level else ():
            if (arm, level) in found:
                own, stop = look_of(record, arm), _stop(record, arm, level)
                late = _curve(axes, found[arm, level], arm, own, stop)
                floor = min(floor, late) if arm == "ticket" else floor
        floors.append(floor)
        axes.set_title(f"{short(remaining[level])} % remaining" if level else "dense", loc="left")
    all_of_it([*panels], float(np.median(floors)), 0.5, 100)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    panels[-1].set_xlim(left=0)
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    fig.supylabel("validation accuracy (%)", fontsize=8)
    widest = max(panels, key=lambda axes: len(axes.lines))
    head(fig, widest, heading(record, ["marker: early stop", *band_note(len(record.config.seeds))]))
    return fig


def _stop(record: RunRecord, arm: str, level: int) -> float:
    return mean_interval(per_seed(record, arm, level, "early_stop_step").values())[0]


def _curve(axes: Axes, seeds: Curves, label: str, own: tuple[str, str], stop: float) -> float:
    """Draw one arm with a marker at step `stop`; returns its lowest mean after a tenth of the steps."""
    steps = sorted(set.intersection(*(set(by_step) for by_step in seeds.values())))
    values = np.array([[np.mean(by_step[step]) for step in steps] for by_step in seeds.values()])
    mean, low, high = np.array([spread(column) for column in values.T.tolist()]).T
    colour, marker = own
    if len(values) > 1:
        axes.fill_between(
            steps, np.maximum(low, 0), np.minimum(high, 100), color=colour, alpha=0.18, linewidth=0
        )
    (line,) = axes.plot(steps, mean, color=colour, label=label, marker=marker, linewidth=1.0)
    line.set_markevery([min(range(len(steps)), key=lambda i: abs(steps[i] - stop))])
    line.set_zorder(3 if label == "ticket" else 2)
    if label == "dense":
        line.set_linestyle(DASHED)
    return float(mean[np.array(steps) >= 0.1 * steps[-1]].min())
