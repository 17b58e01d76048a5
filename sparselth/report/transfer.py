"""The report of `transfer`: what carried masks and tickets are worth, level by level, and in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparselth.report.diverged import unfinished
from sparselth.report.drawing import all_of_it, band_note, head, heading, level_axis, save_each
from sparselth.report.lines import (
    averaged,
    axes_of,
    by_seed,
    gap,
    gap_json,
    level_of_dense,
    line,
    mean_cell,
)
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import SLACK, Gap, mean_interval, signed, signed_pp, tolerance_of
from sparselth.report.tables import percent
from sparselth.runs import RunRecord

OTHERS = ("ticket", "mask", "random-mask")


def accuracies(record: RunRecord, arm: str, level: int) -> dict[int, float]:
    """Seed → final test accuracy of an arm."""
    return by_seed(record.points, "final_accuracy", arm="own" if level == 0 else arm, level=level)


def remaining(record: RunRecord, arm: str, level: int) -> float | None:
    found = by_seed(record.points, "weights_remaining", arm=arm, level=level)
    return mean_interval(found.values())[0] if found else None


def levels(record: RunRecord) -> list[int]:
    """Levels with a point."""
    return sorted({point["level"] for point in record.points})


def overall(record: RunRecord, a: str, b: str) -> Gap | None:
    """Arm a minus arm b, of a seed the mean over all levels above 0."""
    wanted = range(1, record.config.levels + 1)
    left, right = (averaged([accuracies(record, arm, level) for level in wanted]) for arm in (a, b))
    return gap(record, left, right)


def table(record: RunRecord) -> str:
    """The whole report as text."""
    config, shown = record.config, levels(record)
    left = [remaining(record, "own", level) for level in shown]
    lead = Group([["level", *map(str, shown)], ["left %", *("–" if x is None else percent(x) for x in left)]])
    groups = [
        Group(
            [["accuracy %", *(_cell(record, arm, level) for level in shown)]],
            "target's own" * (arm == "own") or arm,
        )
        for arm in config.arms
    ]
    for arm in config.arms:
        if arm != "own":
            gaps = [gap(record, accuracies(record, arm, n), accuracies(record, "own", n)) for n in shown]
            column = ["" if not n else signed(g) if g else "–" for n, g in zip(shown, gaps, strict=True)]
            groups.append(Group([["vs own", *column]], arm))
    title = (
        f"tickets of {config.origin}, put to {config.aim}, {config.recipe.steps:,} steps of "
        f"{config.recipe.optimizer} (lr {config.recipe.lr:g}, batch {config.recipe.batch_size})\n"
        f"found by {config.method}"
    )
    legend = (
        "accuracy %: on the target's test set after training, mean over the seeds ± 95 % interval. own: "
        "found on the target in this run; ticket: mask and weights of the source; mask: the source's mask on "
        "own's weights; random-mask: that mask shuffled within each layer. vs own: minus own in pp, seed by "
        "seed."
    )
    parts = [fill(title), side_by_side(lead, groups, width()), fill(legend)]
    if odd := _other_counts(record):
        parts.append(fill(odd))
    parts += [fill(unfinished(record)), fill(sentence(record), indent="")]
    return "\n\n".join(filter(None, parts))


def _cell(record: RunRecord, arm: str, level: int) -> str:
    return "" if level == 0 and arm != "own" else mean_cell(accuracies(record, arm, level))


def _other_counts(record: RunRecord) -> str:
    """Where carried masks keep another share than own ones, as other widths and depths have it."""
    last = record.config.levels
    ours, theirs = (remaining(record, arm, last) for arm in ("own", record.config.arms[-1]))
    if ours is None or theirs is None or abs(ours - theirs) < 0.005 * ours:
        return ""
    return (
        f"At level {last} carried masks keep {percent(theirs)} % of the weights, own ones {percent(ours)} %."
    )


def sentence(record: RunRecord) -> str:
    """What follows, with its interval; or that it is open."""
    config = record.config
    arm = next((arm for arm in ("mask", "ticket") if arm in config.arms), None)
    if arm is None:
        return "No arm carries anything from the source; nothing is said of transfer."
    own = overall(record, arm, "own")
    chance = overall(record, arm, "random-mask") if "random-mask" in config.arms else None
    origin, aim = _short_names(record)
    what = f"{arm}s of {origin}"
    if own is None:
        return "No seed has all levels yet; whether tickets transfer is open."
    if own.half is None:
        seeds = f"{own.seeds} seeds give" if own.seeds > 1 else "1 seed gives"
        return f"Whether {what} serve {aim} is open: {seeds} no interval; five tell more."
    span = f"over the {config.levels} levels" if config.levels > 1 else "at level 1"
    text = f"On average {span}, {what} reach {signed_pp(own)} against {aim}'s own tickets"
    text += f" and {signed_pp(chance)} against random masks" if chance else ""
    text += f": {_verdict(record, own, chance)}."
    if arm == "mask" and (more := overall(record, "ticket", "mask") if "ticket" in config.arms else None):
        clear = "" if more.low > SLACK or more.high < -SLACK else ", which is no clear difference"
        text += f" Taking the source's weights along changes this by {signed_pp(more)}{clear}."
    return text


def _short_names(record: RunRecord) -> tuple[str, str]:
    """Source and target by what tells them apart: data sets, or networks, or both."""
    config, imp = record.config, record.config.imp
    if config.model == imp.model:
        return imp.dataset, config.dataset if config.dataset != imp.dataset else "the target"
    if config.dataset == imp.dataset:
        return imp.model, config.model
    return config.origin, config.aim


def _verdict(record: RunRecord, own: Gap, chance: Gap | None) -> str:
    """How far tickets transfer, in words."""
    least = tolerance_of(accuracies(record, "own", 0).values(), record)
    if own.low > -least:
        as_good = "they serve it as well as its own"
        if chance is not None and chance.low <= SLACK:
            return f"{as_good}, but not clearly better than random ones do"
        return as_good
    if chance is not None and chance.low > SLACK:
        return "they transfer in part" if own.high < 0 else "they transfer; as well as its own or not is open"
    if chance is not None and chance.high < SLACK:
        return "they are worse than random ones"
    if own.high < 0:
        return "they are worse than its own" + (", and not clearly better than random ones" if chance else "")
    return "whether they transfer is open"


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """One JSON object a level and arm: what table and figure show."""
    rows: list[dict[str, Any]] = []
    for level in levels(record):
        for arm in record.config.arms if level else ("own",):
            values = accuracies(record, arm, level)
            if not values:
                continue
            mean, half = mean_interval(values.values())
            row = {
                "arm": arm,
                "level": level,
                "seeds": len(values),
                "weights_remaining": remaining(record, arm, level),
            }
            row["final_accuracy"] = {"mean": mean, "half_width": half}
            if arm != "own":
                row["minus_own"] = gap_json(gap(record, values, accuracies(record, "own", level)))
            rows.append(row)
    return [*rows, {"sentence": sentence(record)}]


def draw(record: RunRecord, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return save_each({"transfer": figure}, record, folder)


def figure(record: RunRecord) -> Figure | None:
    """Accuracy on the target against weights remaining, an arm a line."""
    config, pruned = record.config, [level for level in levels(record) if level]
    if not accuracies(record, "own", 0) or not pruned:
        return None
    fig, axes = axes_of(2.9)
    names = {"own": "target's own ticket", "ticket": "source's ticket", "mask": "source's mask"}
    shares: list[float] = []
    for which, arm in enumerate(config.arms):
        there = [level for level in pruned if accuracies(record, arm, level)]
        x = [100 * (remaining(record, arm, level) or 0.0) for level in there]
        values = [[100 * v for v in accuracies(record, arm, level).values()] for level in there]
        if there:
            line(axes, x, values, names.get(arm, arm.replace("-", " ")), which)
            shares += x
    dense = accuracies(record, "own", 0)
    level_of_dense(axes, dense)
    level_axis(axes, [100.0, *shares])
    axes.set_ylabel("test accuracy (%)")
    all_of_it([axes], 100 * mean_interval(dense.values())[0] - 8, 0.5, 100)
    notes = [f"from {config.origin}", *band_note(len(config.seeds))]
    head(fig, axes, heading(record, notes))
    return fig
