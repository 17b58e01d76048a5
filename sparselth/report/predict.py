"""The report of `predict`: AUCs by predictor, layer and level, when masks settle, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparselth.report.diverged import unfinished
from sparselth.report.drawing import (
    DASHED,
    MARKERS,
    WIDTH,
    band_note,
    heading,
    look,
    save_each,
    short,
    spread,
)
from sparselth.report.lines import axes_of, mean_cell
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import FEWEST, mean_interval, paired
from sparselth.report.tables import percent
from sparselth.runs import RunRecord

SETTLED, WINDOW = 0.1, 5  # of You et al. 2020: the largest of five distances
SHOWN = 4  # levels in a table or figure
EARLY = ("magnitude", "sign", "gradient", "snip")


def found(
    record: RunRecord, predictor: str, level: int, layer: str = "all", field: str = "auc"
) -> dict[int, float]:
    """Seed → AUC, or what masks shuffled within layers have, its `chance`."""
    return {
        p["seed"]: one.get(field, 0.5)
        for p in record.points
        for one in p["foretold"]
        if (one["predictor"], one["level"], one["layer"]) == (predictor, level, layer)
        and one["auc"] is not None
    }


def predictors(record: RunRecord) -> list[str]:
    """By name, those of the start first, then weights by step."""
    return [*EARLY, *(f"weights@{step}" for step in record.config.at)]


def remaining(record: RunRecord, level: int) -> float:
    """The share of its weights that a mask of a level keeps."""
    imp = record.config.imp
    return float(sum(imp.rungs()[level].values()) / imp.network.params.prunable)


def layers(record: RunRecord) -> list[str]:
    return [spec.name.removesuffix(".weight") for spec in record.config.imp.network.weights]


def shown_levels(record: RunRecord) -> list[int]:
    """Up to SHOWN levels, evenly spread down to the last."""
    levels = record.config.levels
    return sorted({int(at) for at in np.ceil(np.linspace(0, levels, min(SHOWN, levels) + 1)[1:])})


def masks(record: RunRecord, level: int) -> dict[int, list[Mapping[str, Any]]]:
    """Seed → what was found of the dense network's masks, step by step."""
    return {p["seed"]: [one for one in p["masks"] if one["level"] == level] for p in record.points}


def settled(steps: Sequence[Mapping[str, Any]]) -> int | None:
    """The first step at which each of the last five masks moved by less than a tenth; None where none is."""
    moved = [one["moved"] for one in steps]
    for i in range(WINDOW, len(steps)):
        if all(m is not None and m < SETTLED for m in moved[i - WINDOW + 1 : i + 1]):
            return int(steps[i]["step"])
    return None


def settling(record: RunRecord, level: int) -> list[tuple[int | None, float, float]]:
    """Of every seed: the step at which the mask settled, what it shared with the ticket's then (or at the
    end), and what chance would."""
    rows = []
    for steps in masks(record, level).values():
        step = settled(steps)
        at = next((one for one in steps if one["step"] == step), steps[-1])
        rows.append((step, at["shared"], at["by_chance"]))
    return rows


# ---- words


def table(record: RunRecord) -> str:
    """The whole report as text."""
    config, levels = record.config, shown_levels(record)
    title = f"{config.imp.title}\nwhat foretells its masks, seeds {', '.join(map(str, config.seeds))}"
    parts = [fill(title)]
    if not record.points:
        return "\n\n".join([*parts, "no seed is finished yet"])
    names = _picked(record)
    lead = Group([["predictor", *(name.ljust(14) for name in names)]])
    columns = [
        [f"{percent(remaining(record, n))} %", *(mean_cell(found(record, p, n), 1.0, 3) for p in names)]
        for n in levels
    ]
    parts.append("all weights, AUC by level (its share of weights left)\n" + _joined(lead, columns))
    last = levels[-1]
    by_layer = [
        [name, *(mean_cell(found(record, p, last, name), 1.0, 3) for p in names)] for name in layers(record)
    ]
    if len(by_layer) > 1:
        parts.append(f"by layer, AUC at level {last}\n" + _joined(lead, by_layer))
    rows = [settling(record, level) for level in levels]
    lead = Group([["left %", *(percent(remaining(record, level)) for level in levels)]])
    settle = Group(
        [
            ["settled at step", *(_settled_cell(row) for row in rows)],
            ["shared with ticket %", *(f"{100 * _mean([one[1] for one in row]):.1f}" for row in rows)],
            ["by chance %", *(f"{100 * _mean([one[2] for one in row]):.1f}" for row in rows)],
        ]
    )
    parts.append("the dense network's own masks by magnitude\n" + side_by_side(lead, [settle], width()))
    parts.append(
        fill(
            "AUC: the chance that a kept weight has the larger number than a pruned one; 0.5 is chance; mean "
            "over the seeds ± 95 % interval; below 0.5 kept weights have the smaller numbers.\n"
            "weights@t: |w| at step t of training. All weights, of layers that are pruned, are ranked over "
            "all of these at once, so that a layer which keeps more than others counts, too: chance is what "
            "masks shuffled within layers have.\n"
            f"settled: from the first step on at which of {WINDOW} masks in a row each moved by less than "
            f"{SETTLED:g} of what it keeps, as early-bird tickets are drawn; shared: then, or at the end."
        )
    )
    parts += [fill(unfinished(record, "seeds")), fill(sentence(record), indent="")]
    return "\n\n".join(filter(None, parts))


def _joined(lead: Group, columns: list[list[str]]) -> str:
    return side_by_side(lead, [Group([column]) for column in columns], width())


def _picked(record: RunRecord) -> list[str]:
    """All that is known at the start, and up to six of the steps."""
    at = record.config.at
    picks = sorted({int(i) for i in np.linspace(0, len(at) - 1, min(6, len(at))).round()})
    return [*EARLY, *(f"weights@{at[i]}" for i in picks)]


def _settled_cell(rows: list[tuple[int | None, float, float]]) -> str:
    steps = [step for step, _, _ in rows if step is not None]
    if not steps:
        return "never"
    text = f"{median(steps):,.0f}"
    return text if len(steps) == len(rows) else f"{text} ({len(steps)} of {len(rows)})"


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def sentence(record: RunRecord) -> str:
    """What follows, with its interval; or that it is open."""
    level = record.config.levels
    left = f"At {percent(remaining(record, level))} % of the weights left"
    if not record.points:
        return "No seed is finished yet; what foretells the masks is open."
    size = found(record, "magnitude", level)
    if len(size) < FEWEST:
        seeds = f"{len(size)} seed{'s' * (len(size) != 1)}"
        return f"{left} what foretells the mask is open: {seeds} give no interval; five tell more."
    said = []
    for name in EARLY:
        values = found(record, name, level)
        if len(values) >= FEWEST:
            mean, half = mean_interval(values.values())
            chance = found(record, name, level, field="chance")
            gap = paired([values[seed] - chance[seed] for seed in values])
            clear = "" if not gap.low <= 0 <= gap.high else ", no better than chance"
            by_chance = f"{_mean([*chance.values()]):.3f}"
            said.append(f"{_word(name)} {mean:.3f} ± {half or 0:.3f} (chance: {by_chance}{clear})")
    text = f"{left} the mask is foretold with an AUC of {'; '.join(said)}."
    first = next((s for s in record.config.at if _low(found(record, f"weights@{s}", level)) > 0.9), None)
    if first is not None and _low(size) <= 0.9:
        share = first / record.config.imp.recipe.steps
        text += f" From step {first:,} ({100 * share:.3g} % of training) on the weights' sizes foretell it "
        text += "with more than 0.9."
    rows = settling(record, level)
    steps = [step for step, _, _ in rows if step is not None]
    if len(steps) == len(rows):
        mean, half = mean_interval(steps)
        text += f" The dense network's mask has settled by step {mean:,.0f} ± {half or 0:,.0f}"
    else:
        text += f" The dense network's mask has settled on {len(steps)} of {len(rows)} seeds"
    shared, shared_half = mean_interval([one[1] for one in rows])
    text += f" and shares {100 * shared:.1f} ± {100 * (shared_half or 0):.1f} % with the ticket's"
    return f"{text}, where chance has {100 * _mean([one[2] for one in rows]):.1f} %."


def _word(name: str) -> str:
    return {"snip": "SNIP", "magnitude": "initial magnitude"}.get(name, name)


def _low(values: Mapping[int, float]) -> float:
    """The lower end of the interval of a mean, 0 where there is none."""
    if len(values) < FEWEST:
        return 0.0
    mean, half = mean_interval(values.values())
    return mean - (half or 0.0)


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """What table and figures show: AUCs over the seeds, masks by step, the sentence."""
    rows: list[dict[str, Any]] = []
    for level in range(1, record.config.levels + 1):
        for layer in (*layers(record), "all"):
            for name in predictors(record):
                values = found(record, name, level, layer)
                if values:
                    mean, half = mean_interval(values.values())
                    where = {"predictor": name, "layer": layer, "level": level, "seeds": len(values)}
                    chance = _mean([*found(record, name, level, layer, "chance").values()])
                    rows.append(where | {"auc": {"mean": mean, "half_width": half}, "chance": chance})
    for p in record.points:
        for level in range(1, record.config.levels + 1):
            steps = [one for one in p["masks"] if one["level"] == level]
            rows.append({"seed": p["seed"], "level": level, "settled": settled(steps), "masks": steps})
    return [*rows, {"sentence": sentence(record)}]


# ---- figures


def draw(record: RunRecord, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"foretold": foretold, "foretold_layers": by_layer, "settled": settles}
    return save_each(makers, record, folder)


def foretold(record: RunRecord) -> Figure | None:
    """AUC of weights at every step, a line a level; what is known at the start stands left of it."""
    fig, axes = axes_of(3.0)
    levels, at = shown_levels(record), record.config.at
    places = [*range(len(EARLY)), *(len(EARLY) + np.arange(len(at)))]
    for i, level in enumerate(levels):
        colour = _shade(i, len(levels))
        early = [spread(found(record, name, level).values()) for name in EARLY]
        axes.errorbar(
            np.arange(len(EARLY)) + 0.12 * (i - (len(levels) - 1) / 2), [e[0] for e in early],
            yerr=np.array([[e[0] - e[1], e[2] - e[0]] for e in early]).T,
            fmt=MARKERS[i], color=colour, markersize=3.2, elinewidth=0.7,
        )  # fmt: skip
        later = np.array([spread(found(record, f"weights@{step}", level).values()) for step in at]).T
        axes.fill_between(places[len(EARLY) :], later[1], later[2], color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            places[len(EARLY) :], later[0], color=colour, marker=MARKERS[i],
            label=f"{short(remaining(record, level))} %",
        )  # fmt: skip
    axes.axhline(0.5, color="black", linestyle=DASHED, linewidth=0.7)
    axes.axvline(len(EARLY) - 0.5, color="0.7", linewidth=0.7)
    picks = sorted({int(i) for i in np.linspace(0, len(at) - 1, min(6, len(at))).round()})
    ticks = [*range(len(EARLY)), *(len(EARLY) + i for i in picks)]
    axes.set_xticks(ticks, [*EARLY, *(f"|w| at {at[i]:,}" for i in picks)], rotation=90)
    axes.set_ylabel("AUC for the ticket's mask")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return _finished(fig, axes, record, ["dashed: chance"])


def by_layer(record: RunRecord) -> Figure | None:
    """AUC at the last level by layer: what is known at the start, and weights at three steps."""
    names, level, at = layers(record), record.config.levels, record.config.at
    wanted = [*EARLY, *dict.fromkeys(f"weights@{at[i]}" for i in (0, len(at) // 4, len(at) - 1))]
    fig = Figure(figsize=(WIDTH, 1.5 + 0.16 * max(8, len(names))), layout="constrained")
    axes = fig.add_subplot()
    for i, name in enumerate(wanted):
        rows = [
            (y, spread(v.values()))
            for y, layer in enumerate(names)
            if (v := found(record, name, level, layer))
        ]
        colour, marker = look(i)
        y = np.array([row[0] for row in rows]) + 0.09 * (i - (len(wanted) - 1) / 2)
        means = np.array([row[1] for row in rows])
        axes.errorbar(
            means[:, 0], y, xerr=np.stack([means[:, 0] - means[:, 1], means[:, 2] - means[:, 0]]),
            fmt=marker, color=colour, markersize=3.2, elinewidth=0.7,
            label=_word(name).replace("weights@", "|w| at "),
        )  # fmt: skip
    axes.axvline(0.5, color="black", linestyle=DASHED, linewidth=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"AUC for the mask of level {level}, {short(remaining(record, level))} % left")
    return _finished(fig, axes, record, ["dashed: chance"], title=None)


def settles(record: RunRecord) -> Figure | None:
    """How far the dense network's mask moves from look to look, and what it shares with the ticket's."""
    levels = shown_levels(record)
    fig = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    above, below = fig.subplots(2, 1, sharex=True)
    for i, level in enumerate(levels):
        by_seed = [*masks(record, level).values()]
        steps, colour = [one["step"] for one in by_seed[0]], _shade(i, len(levels))
        for axes, field in ((above, "moved"), (below, "shared")):
            values = [[row[at][field] for row in by_seed] for at in range(len(steps))]
            there = [at for at, column in enumerate(values) if None not in column]
            rows = np.array([spread(values[at]) for at in there]).T
            x = [steps[at] for at in there]
            if not there:
                continue
            axes.fill_between(x, rows[1], rows[2], color=colour, alpha=0.18, linewidth=0)
            label = f"{short(remaining(record, level))} %" if field == "shared" else "_"
            axes.plot(x, rows[0], color=colour, marker=MARKERS[i], label=label)
        chance = _mean([row[-1]["by_chance"] for row in by_seed])
        below.axhline(chance, color=colour, linestyle=DASHED, linewidth=0.7)
    above.axhline(SETTLED, color="black", linestyle=DASHED, linewidth=0.7)
    above.set_ylim(bottom=0)
    below.set_ylim(0, 1)
    above.set_ylabel("moved since the last")
    below.set_ylabel("shared with the ticket")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return _finished(fig, below, record, ["dashed: a tenth; chance"])


def _shade(i: int, of: int) -> Any:
    return matplotlib.colormaps["viridis"](0.85 * (1 - i / max(1, of - 1)))


def _finished(
    fig: Figure, axes: Any, record: RunRecord, notes: list[str], title: str | None = "weights left"
) -> Figure:
    """Heading above, legend below."""
    fig.suptitle(heading(record, [*notes, *band_note(len(record.config.seeds))]), fontsize=7)
    handles, labels = axes.get_legend_handles_labels()
    fig.legend(
        handles, labels, loc="outside lower center", ncols=4 if title else 3, columnspacing=1.0,
        handlelength=1.4, title=title, title_fontsize=7,
    )  # fmt: skip
    return fig
