"""A run of `landscape` as text and JSON: how sharp minima are, and whether a ticket's is flatter."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, log
from typing import Any

from sparselth.report.diverged import unfinished
from sparselth.report.page import Group, report, side_by_side, width
from sparselth.report.stats import FEWEST, Gap, apart, mean_interval, paired, seeds_named
from sparselth.report.tables import MISSING, percent
from sparselth.runs import RunRecord

EIGENVALUE = "largest_eigenvalue"


def rows(record: RunRecord) -> list[tuple[int, str]]:
    """The levels and arms that are looked at, in the order of tables."""
    found = dict.fromkeys((cell.level, cell.arm) for cell in record.config.cells())
    return sorted(found, key=lambda row: (row[0], record.config.arms.index(row[1])))


def values(record: RunRecord, level: int, arm: str, field: str) -> dict[int, float]:
    """Seed → a field of an arm's network where it has one."""
    points = record.by_level.get((arm, level), ())
    return {p["seed"]: p[field] for p in sorted(points, key=lambda p: p["seed"]) if p.get(field) is not None}


def ratio(record: RunRecord, level: int, arm: str, field: str = EIGENVALUE) -> Gap | None:
    """The logarithm of a field of the ticket over another arm's, seed by seed; of positive ones."""
    left, right = (values(record, level, name, field) for name in ("ticket", arm))
    logs = [log(left[seed] / right[seed]) for seed in left if left[seed] > 0 and (right.get(seed) or 0.0) > 0]
    return paired(logs) if logs else None


def times(gap: Gap) -> str:
    """A ratio with its interval, from the gap of its logarithm."""
    if gap.half is None:
        return f"{exp(gap.mean):.2f} times"
    return f"{exp(gap.mean):.2f} (95 % interval {exp(gap.low):.2f} to {exp(gap.high):.2f}) times"


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal."""
    config = record.config
    seeds = seeds_named(config.seeds)
    title = f"{config.imp.model} on {config.dataset}, {seeds}, of {config.source}\n{config.how}"
    return report(title, _rows(record), legend=_legend(record), sentence=sentence(record))


def _rows(record: RunRecord) -> str:
    left, places = record.config.imp.remaining(), rows(record)

    def column(name: str, field: str, scale: float = 1.0, form: str = ".2f") -> list[str]:
        found = (values(record, level, arm, field).values() for level, arm in places)
        return [name, *(_shown(some, scale, form) for some in found)]

    lead = Group(
        [
            ["left %", *(percent(left[level]) for level, _ in places)],
            ["arm", *("dense" if level == 0 else arm for level, arm in places)],
        ]
    )
    groups = [
        Group([column("loss", "loss", 1, ".3g"), column("test %", "test_accuracy", 100)]),
        Group(
            [column("largest", EIGENVALUE, 1, ".3g"), column("least", "smallest_eigenvalue", 1, ".2g")],
            "eigenvalue",
        ),
        Group([column("rise", "rise", 1, ".3g"), column("barrier %", "barrier", 100)]),
    ]
    return side_by_side(lead, groups, width())


def _shown(some: Iterable[float], scale: float, form: str) -> str:
    found = [scale * value for value in some]
    if not found:
        return MISSING
    centre, half = mean_interval(found)
    return format(centre, form) + (f" ± {half:{form}}" if half is not None and len(found) >= FEWEST else "")


def _legend(record: RunRecord) -> str:
    config = record.config
    kind = "; means over the seeds ± 95 % interval (Student's t)" if len(config.seeds) >= FEWEST else ""
    lines = [
        f"loss: of {config.images:,} training images; test %: accuracy on as many test images at most{kind}.",
        "eigenvalue: of that loss's Hessian within the live weights, largest and least that Lanczos found; a "
        "network that fits its images better has a smaller Hessian, so compare losses, too.",
        f"rise: mean loss within half a slice's radius, {config.radius / 2:g}, less that of the centre. "
        "Directions are random, normalised by filter, 0 where the mask prunes (Li et al. 2018); all arms of "
        "a seed have the same draws.",
    ]
    if len(rows(record)) > 2:
        lines.append("flatter, sharper: of all levels and arms read at once (Holm 1979); else it is open.")
    if max(config.level):
        lines.append(
            "barrier: how far the test error along the straight line rises above the mean of its ends; from "
            "the ticket to the dense network, from other arms to the ticket."
        )
    if config.network.params.statistics:
        lines.append(
            f"Running statistics of batch norms are computed anew for every network, from {config.batches} "
            f"batch{'es' * (config.batches > 1)} of training images."
        )
    if loose := [p for p in record.points if p["bound"] > 0.01 * abs(p[EIGENVALUE])]:
        lines.append(f"Of {len(loose)} networks the largest eigenvalue is not within 1 %.")
    return "\n".join(filter(None, [*lines, unfinished(record)]))


def sentence(record: RunRecord) -> str:
    """Whether tickets lie in flatter minima than other arms, all levels and arms read at once, or that it is
    open.
    """
    left, said = record.config.imp.remaining(), []
    places = [(level, arm) for level, arm in rows(record) if arm != "ticket"]
    gaps = {place: gap for place in places if (gap := ratio(record, *place)) is not None}
    clear = apart(gaps)
    for (level, arm), gap in gaps.items():
        number = f"the largest eigenvalue is {times(gap)} that of {arm}, seed by seed"
        where = f"At {percent(left[level])} %"
        if gap.error is None:
            seeds = f"{gap.seeds} seed{'s' * (gap.seeds > 1)}"
            said.append(f"{where} it is open with {seeds} whether the ticket's minimum is flatter: {number}.")
        elif (level, arm) not in clear:
            said.append(f"{where} it is open whether the ticket's minimum is flatter: {number}.")
        else:
            word = "flatter" if gap.mean < 0 else "sharper"
            said.append(f"{where} the ticket's minimum is {word}: {number}.")
    if said:
        return " ".join(said)
    known = [EIGENVALUE in p for p in record.points]
    return "No other arm was looked at, so nothing is said of flatter or sharper." if known else ""


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """A JSON object an arm and level: means and half-widths over the seeds; ratios of eigenvalues."""
    found = []
    for level, arm in rows(record):
        if not record.by_level.get((arm, level)):
            continue
        row: dict[str, Any] = {"arm": arm, "level": level}
        for field in ("loss", "test_accuracy", EIGENVALUE, "smallest_eigenvalue", "rise", "barrier"):
            if some := values(record, level, arm, field).values():
                centre, half = mean_interval(some)
                row |= {"seeds": len(some), field: {"mean": centre, "half_width": half}}
        if arm != "ticket" and (gap := ratio(record, level, arm)):
            ends = None if gap.half is None else [exp(gap.low), exp(gap.high)]
            row["ticket_eigenvalue_ratio"] = {"mean": exp(gap.mean), "interval": ends, "seeds": gap.seeds}
        found.append(row)
    return found
