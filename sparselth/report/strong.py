"""A run of `strong` as text and JSON: accuracies by point, differences seed by seed, honest bytes.

Accuracies are those at the end of training, of the network that the file holds.
"""

from __future__ import annotations

from typing import Any

from sparselth.frozen import METHODS
from sparselth.report.diverged import unfinished
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import (
    FEWEST,
    Gap,
    images_counted,
    mean_interval,
    paired,
    signed,
    signed_pp,
)
from sparselth.report.tables import MISSING, percent, title
from sparselth.runs import RunRecord

FINAL = "final_accuracy"
TOO_NEAR = 0.0005  # accuracies that differ by less are called equal in sentences


def values(record: RunRecord, arm: str, place: int, field: str = FINAL) -> dict[int, float]:
    """Seed → a field of an arm at a point, by its place; of dense, of its width."""
    points = record.by_level.get((arm, record.config.level_at(place, arm)), ())
    found = {p["seed"]: p[field] for p in points if not p["draw"] and p.get(field) is not None}
    return {seed: found[seed] for seed in sorted(found)}


def mean(record: RunRecord, arm: str, place: int, field: str = FINAL) -> float | None:
    """Its mean over the seeds, None before there is one."""
    found = values(record, arm, place, field)
    return mean_interval(found.values())[0] if found else None


def gap(record: RunRecord, place: int, arm: str, other: tuple[str, int] | None = None) -> Gap | None:
    """The strong ticket minus an arm at the same point, seed by seed."""
    left = values(record, "ticket", place)
    right = values(record, arm, place) if other is None else values(record, *other)
    both = [left[seed] - right[seed] for seed in left if seed in right]
    return paired(both, images_counted(record)) if both else None


def others(record: RunRecord) -> list[str]:
    """The arms that are other methods."""
    return [arm for arm in record.config.arms if arm in METHODS]


def places(record: RunRecord) -> range:
    """The points of the run."""
    return range(len(record.config.width) * len(record.config.keep))


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal."""
    parts = [fill(title(record, record.config.how)), _rows(record), fill(_legend(record))]
    if said := _closing(record):
        parts.append(fill(said, indent=""))
    return "\n\n".join(parts)


def _rows(record: RunRecord) -> str:
    config, points = record.config, places(record)
    lead = [["width", *(f"{config.width[place // len(config.keep)]:g}" for place in points)]]
    lead.append(["keep %", *(percent(config.keep[place % len(config.keep)]) for place in points)])
    left = (mean(record, "ticket", place, "weights_remaining") for place in points)
    lead.append(["left %", *(MISSING if share is None else percent(share) for share in left)])
    groups = []
    for arm in config.arms:
        columns = [["accuracy %", *(_accuracy(record, arm, place) for place in points)]]
        if arm not in ("random-mask", "dense"):
            sizes = (mean(record, arm, place, "coded_bytes") for place in points)
            columns.append(["KB", *(MISSING if size is None else f"{size / 1e3:,.1f}" for size in sizes)])
        groups.append(Group(columns, arm if arm != "ticket" or not others(record) else config.method))
    for arm in (arm for arm in config.arms if arm != "ticket"):
        gaps = (gap(record, place, arm) for place in points)
        groups.append(Group([[f"vs {arm}", *(signed(one) if one else MISSING for one in gaps)]]))
    return side_by_side(Group(lead), groups, width())


def _accuracy(record: RunRecord, arm: str, place: int) -> str:
    found = values(record, arm, place).values()
    if not found:
        return MISSING
    centre, half = mean_interval(found)
    return f"{100 * centre:.2f}" + ("" if half is None or len(found) < FEWEST else f" ± {100 * half:.2f}")


def _legend(record: RunRecord) -> str:
    seeds = len(record.config.seeds)
    lines = [
        "keep %: weights that scores are to keep; left %: what they keep. ticket: weights that were never "
        "trained. KB: what a file must hold, of the ticket its seed, mask and redraws by entropy, of imp its "
        "weights and biases in fp32 and its mask by entropy."
    ]
    if seeds >= FEWEST:
        lines.append(
            "accuracy %: on the test set at the end of training, mean over the seeds ± 95 % interval. vs: "
            "the ticket minus it in pp, seed by seed, ± 95 % interval of the mean."
        )
    else:
        lines.append(
            "accuracy %: on the test set at the end of training. vs: the ticket minus it in pp. "
            f"{seeds} seed{'s' * (seeds > 1)}: no interval, and luck is not excluded; five tell more."
        )
    return "\n".join(filter(None, [*lines, unfinished(record, mark=MISSING)]))


def _closing(record: RunRecord) -> str:
    """Sentences from finished points alone."""
    found = {place: one for place in places(record) if (one := mean(record, "ticket", place)) is not None}
    if not found:
        return ""
    best = max(found, key=lambda place: found[place])
    said = [_best(record, best, found[best]), _hump(record, found), *_widths(record), _honest(record, best)]
    return " ".join(one for one in said if one)


def _best(record: RunRecord, place: int, accuracy: float) -> str:
    which = (
        "The strong ticket"
        if len(places(record)) == 1
        else f"The best strong ticket, {_where(record, place)},"
    )
    text = f"{which} is right on {100 * accuracy:.2f} % of the test images without a trained weight"
    against = []
    for arm in ("dense", "random-mask", "imp", *others(record)):
        if one := gap(record, place, arm) if arm in record.config.arms else None:
            names = {
                "dense": "the trained network",
                "random-mask": "a random mask",
                "imp": "the trained ticket",
            }
            against.append(f"{signed_pp(one)} against {names.get(arm, arm)}")
    return f"{text}{': ' if against else ''}{', '.join(against)}."


def _where(record: RunRecord, place: int) -> str:
    config, number = record.config, len(record.config.keep)
    parts = [f"width {config.width[place // number]:g}"] if len(config.width) > 1 else []
    parts += [f"{percent(config.keep[place % number])} % kept"] if number > 1 else []
    return " and ".join(parts)


def _hump(record: RunRecord, found: dict[int, float]) -> str:
    """Whether accuracy over the share kept has its top inside, at the largest width."""
    keep, last = record.config.keep, len(places(record)) - len(record.config.keep)
    here = {share: found[last + i] for i, share in enumerate(keep) if last + i in found}
    if len(here) < 3:
        return ""
    top = max(here, key=lambda share: here[share])
    if top in (min(here), max(here)):
        return f"Accuracy is highest at the end of the shares, {percent(top)} %: its top may lie beyond."
    ends = " and ".join(f"{100 * here[end]:.2f} % at {percent(end)}" for end in (min(here), max(here)))
    return f"Over the share kept it rises and falls: {100 * here[top]:.2f} % at {percent(top)}, {ends}."


def _widths(record: RunRecord) -> list[str]:
    """How the distance to dense and to other methods goes with width, each at the ticket's best share."""
    config, number, said = record.config, len(record.config.keep), list[str]()
    for arm in ("dense", *others(record)):
        shown = []
        for i, factor in enumerate(config.width):
            here = [at for at in range(i * number, i * number + number) if values(record, "ticket", at)]
            if here and (one := gap(record, max(here, key=lambda at: mean(record, "ticket", at) or 0), arm)):
                shown.append(f"{signed_pp(one)} at {factor:g}")
        name = "the trained network" if arm == "dense" else arm
        said += [f"Against {name} of the same width: {', '.join(shown)}."] if len(shown) > 1 else []
    return said


def _honest(record: RunRecord, place: int) -> str:
    """Bytes of the best strong ticket beside those of the smallest trained ticket that is as accurate."""
    size, accuracy = mean(record, "ticket", place, "coded_bytes"), mean(record, "ticket", place)
    trained = {
        at: (mean(record, "imp", at), mean(record, "imp", at, "coded_bytes"))
        for at in places(record)
        if values(record, "imp", at)
    }
    if size is None or accuracy is None or not trained:
        return ""
    parts = "Seed, mask and redraws" if METHODS[record.config.method].has_generations else "Seed and mask"
    text = f"{parts} take {size / 1e3:,.1f} KB"
    equal = {
        at: b
        for at, (a, b) in trained.items()
        if a is not None and b is not None and a >= accuracy - TOO_NEAR
    }
    if not equal:
        return f"{text}; no trained ticket of this run is as accurate."
    at = min(equal, key=lambda one: equal[one])
    found = f"{100 * (trained[at][0] or 0):.2f} %"
    if len(trained) == 1:
        which = f"trained ticket of as many weights ({found})"
    else:
        kept = percent(mean(record, "imp", at, "weights_remaining") or 0)
        which = f"smallest trained ticket of this run that is as accurate ({found}, {kept} % of the weights)"
    return f"{text}; the {which} takes {equal[at] / 1e3:,.1f} KB, {equal[at] / size:.2g} times as much."


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """A JSON object a point: each arm's mean and half-width, the ticket minus each arm."""
    rows, config = [], record.config
    for place in places(record):
        row: dict[str, Any] = {
            "level": config.level_at(place),
            "width": config.width[place // len(config.keep)],
            "keep": config.keep[place % len(config.keep)],
            "weights_remaining": mean(record, "ticket", place, "weights_remaining"),
            "arms": {},
        }
        for arm in config.arms:
            if found := values(record, arm, place).values():
                centre, half = mean_interval(found)
                one = gap(record, place, arm) if arm != "ticket" else None
                row["arms"][arm] = {
                    "seeds": len(found),
                    "accuracy": centre,
                    "half_width": half,
                    "file_bytes": mean(record, arm, place, "file_bytes"),
                    "coded_bytes": mean(record, arm, place, "coded_bytes"),
                    "ticket_minus": one and {"mean": one.mean, "half_width": one.half},
                }
        rows.append(row)
    return rows
