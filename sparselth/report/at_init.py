"""A run of `at-init` as text and JSON: what scores keep, what checks change of it, layers that end."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

from sparselth.report.diverged import unfinished
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import (
    FEWEST,
    Gap,
    apart,
    images_counted,
    mean_interval,
    paired,
    seeds_named,
    signed,
    signed_pp,
)
from sparselth.report.tables import MISSING, percent, title
from sparselth.runs import RunRecord

FINAL = "final_accuracy"
CHECKS = {"shuffle": "Shuffling within layers", "reinit": "Drawing the weights anew", "invert": "Inverting"}


def values(record: RunRecord, arm: str, level: int, field: str = FINAL) -> dict[int, float]:
    """Seed → a field of an arm at a point; level 0 is dense."""
    points = record.by_level.get((arm if level else "ticket", level), ())
    found = {p["seed"]: p[field] for p in points if not p["draw"] and p.get(field) is not None}
    return {seed: found[seed] for seed in sorted(found)}


def gap(record: RunRecord, a: tuple[str, int], b: tuple[str, int]) -> Gap | None:
    """Accuracy of (arm, level) `a` minus that of `b`, seed by seed."""
    left, right = values(record, *a), values(record, *b)
    both = [left[seed] - right[seed] for seed in left if seed in right]
    return paired(both, images_counted(record)) if both else None


def levels(record: RunRecord) -> list[int]:
    """The points, the densest sparsity first, scores in their order."""
    points, scores = record.config.points, record.config.score
    return sorted(points, key=lambda level: (points[level][1], scores.index(points[level][0])))


def layers(record: RunRecord, level: int, field: str, arm: str = "ticket") -> list[str]:
    """The layers that a field names on some seed, in the network's order."""
    found = {
        name for p in record.by_level.get((arm, level), ()) if not p["draw"] for name in p.get(field) or ()
    }
    order = [spec.name.removesuffix(".weight") for spec in record.config.network.params.weights]
    return [name for name in order if name in found]


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal."""
    config = record.config
    if config.collapse:
        seeds = seeds_named(config.seeds)
        parts = [fill(f"{config.model} on {config.dataset}, {seeds}, nothing is trained\n{config.method}")]
        parts += [
            _compressions(record),
            fill(unfinished(record, mark=MISSING)),
            fill(_furthest(record), indent=""),
        ]
        return "\n\n".join(part for part in parts if part)
    parts = [
        fill(title(record, config.method)),
        _rows(record),
        fill(_legend(record)),
        fill("\n".join(_ended(record))),
    ]
    parts += [fill(" ".join(sentences(record)), indent="")]
    return "\n\n".join(part for part in parts if part)


# ---- accuracies


def _rows(record: RunRecord) -> str:
    config, at = record.config, [0, *levels(record)]
    names = ["dense", *(config.points[level][0] for level in at[1:])]
    left = [next(iter(values(record, "ticket", level, "weights_remaining").values()), None) for level in at]
    lead = [["score", *names], ["left %", *(MISSING if one is None else percent(one) for one in left)]]
    groups = []
    for arm in config.arms:
        column = [_accuracy(values(record, arm, 0).values()) if arm == "ticket" else ""]
        for level in at[1:]:
            own = arm in config.arms_of(config.points[level][0])
            column.append(_accuracy(values(record, arm, level).values()) if own else "")
        columns = [["accuracy %", *column]]
        if arm != "ticket":
            gaps = [gap(record, (arm, level), ("ticket", level)) if level else None for level in at]
            shown = (signed(one) if one else cell and MISSING for one, cell in zip(gaps, column, strict=True))
            columns.append(["- ticket", *shown])
        groups.append(Group(columns, arm))
    return side_by_side(_left(lead), groups, width())


def _left(columns: list[list[str]]) -> Group:
    """Columns with their first one, names, aligned to the left."""
    wide = max(map(len, columns[0]))
    return Group([[name.ljust(wide) for name in columns[0]], *columns[1:]])


def _accuracy(found: Iterable[float]) -> str:
    if not (found := list(found)):
        return MISSING
    centre, half = mean_interval(found)
    return f"{100 * centre:.2f}" + ("" if half is None or len(found) < FEWEST else f" ± {100 * half:.2f}")


def _legend(record: RunRecord) -> str:
    seeds = len(record.config.seeds)
    if seeds >= FEWEST:
        said = (
            "mean over the seeds ± 95 % interval; - ticket: minus the ticket's in pp, seed by seed, ± 95 % "
            "interval. An arm costs or gains where that lies beside 0, all scores of the arm at one sparsity "
            "read at once (Holm 1979); else it is open."
        )
    else:
        said = (
            f"- ticket: minus the ticket's in pp. {seeds} seed{'s' * (seeds > 1)}: no interval, luck is not "
            "excluded."
        )
    lines = [f"accuracy %: on the test set at the end of training; {said}"]
    lines += [f"{left_out}."] if (left_out := record.config.left_out) else []
    return "\n".join(filter(None, [*lines, unfinished(record, mark=MISSING)]))


def _ended(record: RunRecord) -> list[str]:
    """Layers without weights or paths, a line each point."""
    config, lines = record.config, []
    for level in levels(record):
        score, sparsity = config.points[level]
        for arm in ("ticket", "shuffle", "invert"):
            gone = layers(record, level, "collapsed_layers", arm)
            cut = [one for one in layers(record, level, "unreached_layers", arm) if one not in gone]
            said = [f"no weight is left in {', '.join(gone)}"] if gone else []
            said += [f"no path goes through {', '.join(cut)}"] if cut else []
            if said:
                name = score if arm == "ticket" else f"{score}, {arm}"
                lines.append(f"{name} at {percent(1 - sparsity)} %: {'; '.join(said)}.")
    return lines


def sentences(record: RunRecord) -> list[str]:
    """What the run says, from finished points alone."""
    config, found = record.config, list[str]()
    if not (sparsity := _sparsest(record)):
        some = any(values(record, "ticket", level) for level in config.points)
        return ["All tickets guess: longer training, or a lower sparsity, tells more."] if some else []
    at = {score: level for level, (score, one) in config.points.items() if one == sparsity}
    where = f"{percent(1 - sparsity)} % of the weights"
    for arm in config.arms[1:]:
        gaps = against_ticket(record, arm, sparsity)
        words = verdicts(gaps)
        said = [f"{score} {signed_pp(one)} ({words[score]})" for score, one in gaps.items()]
        if said:
            found.append(f"{CHECKS[arm]} at {where}: {', '.join(said)}.")
    return found + _against(record, at)


def _sparsest(record: RunRecord) -> float:
    """The highest sparsity at which some ticket is right twice as often as chance; 0 where there is none."""
    least = 2 / (record.config.network.classes or inf)
    good = [
        sparsity
        for level, (_, sparsity) in record.config.points.items()
        if (found := values(record, "ticket", level).values()) and mean_interval(found)[0] >= least
    ]
    return max(good, default=0.0)


def against_ticket(record: RunRecord, arm: str, sparsity: float) -> dict[str, Gap]:
    """Score → an arm minus the ticket at a sparsity, of scores that have both."""
    at = {score: level for level, (score, one) in record.config.points.items() if one == sparsity}
    gaps = {score: gap(record, (arm, level), ("ticket", level)) for score, level in at.items()}
    return {score: one for score, one in gaps.items() if one and arm in record.config.arms_of(score)}


def verdicts(gaps: dict[str, Gap]) -> dict[str, str]:
    """What an arm does to the ticket's accuracy under each score, all of them read at once (Holm 1979)."""
    stand = apart(gaps)
    sides = {score: "gains" if one.mean > 0 else "costs" for score, one in gaps.items()}
    return {
        score: "too few seeds" if one.error is None else sides[score] if score in stand else "open"
        for score, one in gaps.items()
    }


def _against(record: RunRecord, at: dict[str, int]) -> list[str]:
    """The best score that needs no training, beside a random mask, imp and dense."""
    means = {
        score: mean_interval(found.values())[0]
        for score, level in at.items()
        if score not in ("imp", "random") and (found := values(record, "ticket", level))
    }
    if not means:
        return []
    best = max(means, key=lambda score: means[score])
    others = {"a random mask": ("ticket", at.get("random", -1)), "imp": ("ticket", at.get("imp", -1))}
    others["the dense network"] = ("ticket", 0)
    said = [
        f"{signed_pp(one)} against {name}"
        for name, other in others.items()
        if (one := gap(record, ("ticket", at[best]), other))
    ]
    which = f"Of the scores at initialisation {best} keeps most," if len(means) > 1 else f"{best} reaches"
    return [f"{which} {100 * means[best]:.2f} %: {', '.join(said)}."] if said else []


# ---- compressions


def compression(record: RunRecord, level: int) -> list[float]:
    """The largest compression that a score's point has, one a seed."""
    return [p["largest_compression"] for p in record.by_level.get(("collapse", level), ())]


def scores(record: RunRecord) -> list[tuple[str, int]]:
    """Scores and their levels, of those that have a compression."""
    config = record.config
    every = [(score, config.level(i, 0)) for i, score in enumerate(config.score)]
    return [(score, level) for score, level in every if compression(record, level)]


def _compressions(record: RunRecord) -> str:
    columns = [["score"], ["compression"], ["least"], ["left %"], ["weights"], ["next without a weight"]]
    for score, level in scores(record):
        points = record.by_level["collapse", level]
        found = compression(record, level)
        kept = [p["weights_kept"] for p in points]
        named = layers(record, level, "collapsed_layers", "collapse")
        row = [score, f"{sum(found) / len(found):,.1f}", f"{min(found):,.1f}"]
        row += [percent(max(p["weights_remaining"] for p in points)), f"{max(kept):,}"]
        row.append(", ".join(named[:3]) + ", ..." * (len(named) > 3) or "none")
        for column, cell in zip(columns, row, strict=True):
            column.append(cell)
    wide = max(map(len, columns[-1]))
    columns[-1] = [cell.ljust(wide) for cell in columns[-1]]
    return side_by_side(_left(columns[:1]), [Group(columns[1:])], width())


def _furthest(record: RunRecord) -> str:
    """Which score goes how far, in a sentence."""
    if not (some := scores(record)):
        return ""
    config = record.config
    most = record.by_level["collapse", some[0][1]][0]["most"]
    least = {score: min(compression(record, level)) for score, level in some}
    order = sorted(least, key=lambda score: -least[score])
    first = order[0]
    text = (
        f"{first} leaves every layer of {config.model} a weight up to {least[first]:,.0f} times fewer weights"
    )
    if len(order) > 1:
        text += f", {order[1]} up to {least[order[1]]:,.0f}"
    return (
        f"{text} (the least of {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}); one weight a layer "
        f"would be {most:,.0f} times fewer."
    )


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """A JSON object a score, sparsity and arm, beside the ticket; or a score and its compression."""
    rows: list[dict[str, Any]] = []
    config = record.config
    if config.collapse:
        for score, level in scores(record):
            found = compression(record, level)
            centre, half = mean_interval(found)
            row = {"score": score, "seeds": len(found), "largest_compression": centre, "half_width": half}
            rows.append(row | {"least": min(found)})
        return rows
    if found := [*values(record, "ticket", 0).values()]:
        centre, half = mean_interval(found)
        rows.append({"score": None, "arm": "ticket", "sparsity": 0.0, "seeds": len(found)})
        rows[-1] |= {FINAL: centre, "half_width": half, "minus_ticket": None}
    for level in levels(record):
        score, sparsity = config.points[level]
        for arm in config.arms_of(score):
            if found := [*values(record, arm, level).values()]:
                centre, half = mean_interval(found)
                one = gap(record, (arm, level), ("ticket", level)) if arm != "ticket" else None
                row = {"score": score, "arm": arm, "sparsity": sparsity, "seeds": len(found)}
                row |= {FINAL: centre, "half_width": half}
                row["minus_ticket"] = one and {"mean": one.mean, "half_width": one.half}
                row["word"] = verdicts(against_ticket(record, arm, sparsity)).get(score)
                row["collapsed_layers"] = layers(record, level, "collapsed_layers", arm)
                rows.append(row)
    return rows
