"""A run of `connectivity` as text and JSON: how high the error rises between two copies, by rewind step."""

from __future__ import annotations

from typing import Any

from sparselth.report.diverged import unfinished
from sparselth.report.page import Group, report, side_by_side, width
from sparselth.report.stats import FEWEST, Gap, mean_interval, paired
from sparselth.report.tables import MISSING, levels_and_steps, percent, title
from sparselth.runs import RunRecord

STABLE = 0.02  # instability below which a network is stable (Frankle et al. 2020, section 3)
RISES = {"instability": "test", "train_instability": "train"}
TO_DENSE = {"dense_barrier": "test", "train_dense_barrier": "train"}


def points(record: RunRecord, k: int, level: int) -> list[dict[str, Any]]:
    """The lines of a rewind step and level, by seed."""
    return sorted(record.by_level.get((f"path-{k}", level), ()), key=lambda p: int(p["seed"]))


def values(record: RunRecord, k: int, level: int, field: str) -> list[float]:
    """A field of these lines where they have one."""
    return [p[field] for p in points(record, k, level) if p.get(field) is not None]


def rise(record: RunRecord, k: int, level: int, field: str = "instability") -> Gap | None:
    """How high the error rises, with its interval, never narrower than one image to either side."""
    found = points(record, k, level)
    counted = "train_images" if field.startswith("train") else "test_images"
    some = values(record, k, level, field)
    return paired(some, min(p[counted] for p in found)) if some else None


def word(gap: Gap | None) -> str:
    """Whether a network is stable: "stable", "unstable", or "open"."""
    if gap is None or gap.error is None:
        return "open"
    return "stable" if gap.high < STABLE else "unstable" if gap.low > STABLE else "open"


def shown(gap: Gap | None) -> str:
    """In percent, with its interval where there is one."""
    if gap is None:
        return MISSING
    return f"{100 * gap.mean:.2f}" + ("" if gap.half is None else f" ± {100 * gap.half:.2f}")


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal."""
    titled = title(record, record.config.how)
    return report(titled, _rows(record), legend=_legend(record), sentence=sentence(record))


def _rows(record: RunRecord) -> str:
    config = record.config
    places, lead = levels_and_steps(record)
    own = [["accuracy %", *(_accuracy(record, k, level) for level, k in places)]]
    words = [["", *(word(rise(record, k, level)) for level, k in places)]]
    groups = [
        Group(own),
        Group(_columns(record, places, RISES) + words, "instability %"),
    ]
    if max(config.levels):
        groups.append(Group(_columns(record, places, TO_DENSE), "dense to ticket %"))
    return side_by_side(lead, groups, width())


def _columns(record: RunRecord, places: list[tuple[int, int]], fields: dict[str, str]) -> list[list[str]]:
    return [
        [name, *(shown(rise(record, k, level, field)) for level, k in places)]
        for field, name in fields.items()
    ]


def _accuracy(record: RunRecord, k: int, level: int) -> str:
    found = values(record, k, level, "final_accuracy")
    return f"{100 * mean_interval(found)[0]:.2f}" if found else MISSING


def _legend(record: RunRecord) -> str:
    config = record.config
    kind = "; means over the seeds ± 95 % interval (Student's t)" if len(config.seeds) >= FEWEST else ""
    seen = [p for k in config.rewind for level in config.levels for p in points(record, k, level)][:1]
    images = ""
    if seen:
        images = f", of {seen[0]['test_images']:,} test and {seen[0]['train_images']:,} training images"
    lines = [
        f"instability: the largest error at {config.points} even points of the line between two copies that "
        f"went on from the rewind step with different data orders, minus the mean error of its ends{images}"
        f"{kind}.",
        f"stable: the interval of the test's lies below {100 * STABLE:g} %; unstable: above; else open "
        f"(Frankle et al. 2020; fewer than {FEWEST} seeds have no interval).",
    ]
    if max(config.levels):
        lines.append("dense to ticket: the same between a dense copy and a ticket of the same rewind step.")
    if record.config.network.params.statistics:
        lines.append("Running statistics of batch norms are computed anew at every point of a line.")
    return "\n".join(filter(None, [*lines, unfinished(record)]))


def sentence(record: RunRecord) -> str:
    """From which step on networks are stable, with the interval that says so, or that it is open."""
    config, left = record.config, record.config.remaining()
    said = []
    for level in config.levels:
        who = "Dense networks" if level == 0 else f"Tickets at {percent(left[level])} %"
        said.append(_from(record, level, who))
    last = max(config.levels)
    highest = {k: gap for k in config.rewind if last and (gap := rise(record, k, last, "dense_barrier"))}
    if highest:
        parts = [f"{shown(gap)} % at step {k:,}" for k, gap in highest.items()]
        said.append(
            f"Between dense and ticket at {percent(left[last])} % the test error rises by {', '.join(parts)}."
        )
    return " ".join(said)


def _from(record: RunRecord, level: int, who: str) -> str:
    """The sentence about the networks of a level."""
    gaps = {k: gap for k in record.config.rewind if (gap := rise(record, k, level)) is not None}
    if not gaps:
        return f"{who} are not measured yet."
    steps, words = [*gaps], [word(gap) for gap in gaps.values()]
    at = {k: f"{shown(gap)} % at step {k:,}" for k, gap in gaps.items()}
    place = next((i for i in range(len(steps)) if set(words[i:]) == {"stable"}), len(steps))
    if place == len(steps):
        if words[-1] == "unstable":
            return f"{who} are not stable by step {steps[-1]:,}: instability {at[steps[-1]]}."
        seeds = min(gap.seeds for gap in gaps.values())
        why = "" if seeds >= FEWEST else f", with {seeds} seed{'s' * (seeds > 1)}"
        rises = f"instability {', '.join(at.values())}"
        return f"Whether {who[0].lower()}{who[1:]} are stable is open{why}: {rises}."
    first = steps[place]
    if place == 0:
        where = "from the first step on" if first == 0 else f"at step {first:,}, the first looked at, and on"
        return f"{who} are stable {where}: instability {at[first]}."
    before = at[steps[place - 1]]
    more = f"still {before}" if words[place - 1] == "unstable" else f"before it is open, {before}"
    return f"{who} are stable from step {first:,} on: instability {at[first]}, {more}."


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """A JSON object a level and rewind step: means and half-widths over the seeds, and what follows."""
    rows, left = [], record.config.remaining()
    for level in record.config.levels:
        for k in record.config.rewind:
            if not (found := points(record, k, level)):
                continue
            row: dict[str, Any] = {"level": level, "weights_remaining": left[level], "rewind_step": k}
            row["seeds"] = len(found)
            for field in (*RISES, *TO_DENSE):
                if gap := rise(record, k, level, field):
                    row[field] = {"mean": gap.mean, "half_width": gap.half}
            row["word"] = word(rise(record, k, level))
            rows.append(row)
    return rows
