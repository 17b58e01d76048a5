"""The report of `schedule`: accuracy beside training steps, what no other beats, a recommendation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparselth.report.diverged import unfinished
from sparselth.report.drawing import WIDTH, all_of_it, heading, look, save_each, spread
from sparselth.report.lines import by_seed, gap, gap_json, level_of_dense, mean_cell
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import FEWEST, SLACK, Gap, mean_interval, signed, signed_pp, tolerance_of
from sparselth.report.tables import percent
from sparselth.runs import RunRecord


@dataclass(frozen=True)
class Row:
    """A schedule as far as it is finished."""

    record: RunRecord
    arm: str

    @cached_property
    def plan(self) -> Any:
        return self.record.config.plans[self.arm]

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Seed → final test accuracy of what is kept in the end."""
        return by_seed(self.record.points, "final_accuracy", arm=self.arm, last=True)

    @cached_property
    def mean(self) -> float:
        return mean_interval(self.accuracies.values())[0]

    @cached_property
    def steps(self) -> float:
        """Training steps that it takes, those of the dense network among them."""
        found = by_seed(self.record.points, "training_steps", arm=self.arm, last=True)
        return mean_interval(found.values())[0]

    @cached_property
    def remaining(self) -> float:
        found = by_seed(self.record.points, "weights_remaining", arm=self.arm, last=True)
        return mean_interval(found.values())[0]

    def minus(self, other: Row) -> Gap | None:
        return gap(self.record, self.accuracies, other.accuracies)


def rows(record: RunRecord) -> list[Row]:
    """Every schedule that a seed has finished, by the steps that it takes."""
    found = [Row(record, arm) for arm in record.config.plans]
    return sorted((row for row in found if row.accuracies), key=lambda row: (row.steps, -row.mean))


def dense(record: RunRecord) -> dict[int, float]:
    return by_seed(record.points, "final_accuracy", arm="dense")


def front(found: list[Row]) -> list[Row]:
    """Those that no other beats on both counts: fewer steps or more accuracy, in the mean."""
    kept: list[Row] = []
    for row in found:  # by steps
        if not kept or row.mean > kept[-1].mean:
            if kept and row.steps == kept[-1].steps:
                kept.pop()
            kept.append(row)
    return kept


def enough(record: RunRecord, found: list[Row]) -> Row | None:
    """The cheapest that is not clearly worth less than the best: its interval lies above the tolerance."""
    best, least = _best(found), tolerance_of(dense(record).values(), record)
    for row in found:
        difference = row.minus(best)
        if row is best or (difference and difference.half is not None and difference.low >= -least - SLACK):
            return row
    return None


def _best(found: list[Row]) -> Row:
    return max(found, key=lambda row: (row.mean, -row.steps))


def table(record: RunRecord) -> str:
    """The whole report as text."""
    config, found = record.config, rows(record)
    title = (
        f"{config.model} on {config.dataset}, {config.method}, {config.recipe.steps:,} steps a training of "
        f"{config.recipe.optimizer} (lr {config.recipe.lr:g}, batch {config.recipe.batch_size})"
    )
    if not found:
        return "\n\n".join([fill(title), sentence(record)])
    best, on_front, whole = _best(found), front(found), dense(record)
    lead = Group(
        [["schedule".ljust(max(len(str(r.plan)) for r in found)), *(_left(found, r) for r in found)]]
    )
    columns = [
        ["steps", *(f"{row.steps:,.0f}" for row in found)],
        ["left %", *(percent(row.remaining) for row in found)],
        ["accuracy %", *(mean_cell(row.accuracies) for row in found)],
        ["vs dense", *(_signed(gap(record, row.accuracies, whole)) for row in found)],
        ["vs best", *("best" if row is best else _signed(row.minus(best)) for row in found)],
    ]
    columns.insert(3, ["front", *("*" if row in on_front else "" for row in found)])
    legend = (
        f"steps: training steps of one network until its mask and weights are there, the dense one's "
        f"{config.recipe.steps:,} among them. accuracy %: on the test set after training, mean over the "
        "seeds ± 95 % interval; vs: minus that in pp, seed by seed. front: no other reaches more with as few "
        "steps."
    )
    parts = [fill(title), side_by_side(lead, [Group(columns[:4]), Group(columns[4:])], width()), fill(legend)]
    parts += [fill(unfinished(record, "networks")), fill(sentence(record), indent="")]
    return "\n\n".join(filter(None, parts))


def _left(found: list[Row], row: Row) -> str:
    return str(row.plan).ljust(max(len(str(one.plan)) for one in found))


def _signed(difference: Gap | None) -> str:
    return "–" if difference is None else signed(difference)


def sentence(record: RunRecord) -> str:
    """The recommendation, with its interval; or that it is open."""
    found, keep = rows(record), f"{100 * record.config.keep:g} %"
    if not found:
        return "No schedule is finished yet; which one to take is open."
    seeds = min(len(row.accuracies) for row in found)
    if seeds < FEWEST:
        return (
            f"Which schedule to take to {keep} is open: {seeds} seed{'s' * (seeds > 1)} of some give no "
            "interval; five tell more."
        )
    best, take = _best(found), enough(record, found)
    assert take is not None
    least = tolerance_of(dense(record).values(), record)
    said = f"To {keep} of the weights take {take.plan}: {mean_cell(take.accuracies)} % "
    said += f"for {take.steps:,.0f} steps"
    if take is best:
        said += ", the most of all"
        near = [row for row in found if row.steps < take.steps]
        if near:
            said += f"; of the cheaper ones none is surely within {100 * least:.2f} pp of it"
            if (second := max(near, key=lambda row: row.mean)).minus(best) is not None:
                difference = second.minus(best)
                assert difference is not None
                said += f" ({second.plan}, {second.steps:,.0f} steps: {signed_pp(difference)})"
    else:
        difference = take.minus(best)
        assert difference is not None
        said += (
            f", {signed_pp(difference)} against the best, {best.plan}, which takes "
            f"{best.steps / take.steps:.3g} times as many; the cheapest that is surely within "
            f"{100 * least:.2f} pp of it"
        )
    against = gap(record, take.accuracies, dense(record))
    return f"{said}. Against dense it is {signed_pp(against)}." if against else f"{said}."


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """What table and figure show, an object a schedule, and the recommendation."""
    found = rows(record)
    on_front, best = front(found), _best(found) if found else None
    told: list[dict[str, Any]] = []
    for row in found:
        mean, half = mean_interval(row.accuracies.values())
        told.append(
            {"schedule": row.plan.schedule, "rate": row.plan.rate, "scope": row.plan.scope}
            | {"seeds": len(row.accuracies), "training_steps": row.steps, "weights_remaining": row.remaining}
            | {"final_accuracy": {"mean": mean, "half_width": half}, "on_front": row in on_front}
            | {"minus_best": gap_json(row.minus(best)) if best else None}
            | {"minus_dense": gap_json(gap(record, row.accuracies, dense(record)))}
        )
    return [*told, {"sentence": sentence(record)}]


# ---- the figure


def draw(record: RunRecord, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return save_each({"schedule": figure}, record, folder)


def figure(record: RunRecord) -> Figure | None:
    """Accuracy against training steps; a line through what no other beats."""
    found, whole = rows(record), dense(record)
    if not found or not whole:
        return None
    fig = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = fig.add_subplot()
    labels = [*dict.fromkeys((row.plan.schedule, row.plan.scope) for row in found)]
    for row in found:
        which = labels.index((row.plan.schedule, row.plan.scope))
        colour, marker = look(which)
        mean, low, high = spread(100 * value for value in row.accuracies.values())
        label = (
            str(row.plan) if row.plan.schedule != "rounds" else f"rounds, {str(row.plan).partition(', ')[2]}"
        )
        first = all(line.get_label() != label for line in axes.lines)
        beside = row.steps * 1.03 ** (which - (len(labels) - 1) / 2)
        axes.plot([beside, beside], [low, high], color=colour, linewidth=0.8, label="_")
        axes.plot([beside], [mean], color=colour, marker=marker, linestyle="", label=label if first else "_")
    best = front(found)
    x, y = ([row.steps for row in best], [100 * row.mean for row in best])
    axes.step(x, y, where="post", color="0.5", linewidth=0.8, zorder=1, label="no other beats")
    level_of_dense(axes, whole)
    axes.set_xscale("log")
    steps = sorted({row.steps for row in found})
    ticks = [s for i, s in enumerate(steps) if not i or s / steps[i - 1] > 1.15]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    unit = record.config.recipe.steps
    rates = {row.steps: f"\n{100 * row.plan.rate:g} %" for row in found if row.plan.schedule == "rounds"}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / unit:.3g}{rates.get(x, '')}"))
    pruned = "; % a round" if rates else ""
    axes.set_xlabel(f"training steps, in trainings of {unit:,}{pruned}")
    axes.set_ylabel("test accuracy (%)")
    means = np.array([100 * row.mean for row in found])
    all_of_it([axes], float(np.quantile(means, 0.25)) - 1, 0.5, 100)
    fig.suptitle(
        heading(record, ["bar: 95 % interval of the mean"] if len(whole) >= FEWEST else []), fontsize=7
    )
    handles = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=1.4)
    return fig
