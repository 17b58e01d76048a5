"""What the points of a run support: means with intervals over seeds, and the verdict on each ticket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import fsum, log, sqrt
from typing import Any

from sparselth.models import get_model
from sparselth.runs import RunRecord

TOLERANCE = 0.002  # accuracy; the 0.2 pp of Frankle et al. 2020, arXiv:1912.05671
NO_VERDICT = "no verdict"
RULE = (
    "Verdict on the ticket: test accuracies at early stop, compared seed by seed.\n"
    "winning = matching, and the mean early-stop step is no later than dense's, and the ticket is above "
    "reinit (the mean of its draws) on every seed, or in the mean by more than the 95 % interval of that "
    "difference. Without the arm reinit no ticket is winning.\n"
    f"matching = at most {100 * TOLERANCE:g} pp below dense in the mean.\n"
    "below dense = the rest, and every ticket with an empty layer: it computes a constant.\n"
    "– = seeds are missing, or dense itself guesses (its accuracy is below twice that of chance)."
)

# 97.5 % quantile of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Verdict:
    """`word` is dense, winning, matching, below dense or no verdict; `why` gives the numbers behind it."""

    word: str
    why: str


def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t; beyond the table by its expansion in 1/df, right to 1e-5."""
    if df <= len(_T):
        return _T[df - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3


def mean_interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % t interval, in the unit of `values`, one value per seed.

    The half-width of a single value is None; the order of the values changes no bit.
    """
    values = list(values)
    n = len(values)
    mean = fsum(values) / n
    if n == 1:
        return mean, None
    variance = fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, t_quantile(n - 1) * sqrt(variance / n)


def per_seed(record: RunRecord, arm: str, level: int, field: str) -> dict[int, float]:
    """Seed → value of a point's field, draws averaged; level 0 is dense, whichever the arm."""
    if level == 0:
        arm = "ticket"
    found: dict[int, list[float]] = {}
    for p in record.points:
        if (p["arm"], p["level"]) == (arm, level):
            found.setdefault(p["seed"], []).append(p[field])
    return {seed: fsum(found[seed]) / len(found[seed]) for seed in sorted(found)}


def difference(record: RunRecord, field: str, a: tuple[str, int], b: tuple[str, int]) -> list[float]:
    """Field of (arm, level) `a` minus that of `b`, for each seed that has both."""
    left, right = per_seed(record, *a, field), per_seed(record, *b, field)
    return [left[seed] - right[seed] for seed in left if seed in right]


def cells(record: RunRecord) -> tuple[int, int]:
    """Number of finished cells, and of all cells of the run."""
    return len(record.points), len(record.config.cells())


def finished(record: RunRecord, arm: str, level: int) -> bool:
    """Whether the run has this arm, and every seed and draw of it is there."""
    if level == 0:
        arm = "ticket"
    planned = sum((who.arm, who.level) == (arm, level) for who in record.config.cells())
    return 0 < planned == sum((p["arm"], p["level"]) == (arm, level) for p in record.points)


def weights_remaining(record: RunRecord) -> dict[int, float]:
    """Level → share of the prunable weights that is kept, in [0, 1], for levels with a point."""
    found: dict[int, list[float]] = {}
    for p in record.points:
        found.setdefault(p["level"], []).append(p["weights_remaining"])
    return {level: mean_interval(found[level])[0] for level in sorted(found)}


def nearest_level(levels: dict[int, float], remaining: float) -> int | None:
    """The level ≥ 1 whose weights remaining are nearest in ratio, given level → weights remaining."""
    pruned = [level for level in levels if level and levels[level] > 0]
    return min(pruned, key=lambda level: abs(log(levels[level] / remaining)), default=None)


def empty_layers(record: RunRecord, level: int, arm: str = "ticket") -> list[str]:
    """Layers without a weight on some seed: such a network computes a constant."""
    points = [p for p in record.points if (p["arm"], p["level"]) == (arm, level)]
    names = {name: None for p in points for name, kept in p["kept"].items() if kept == 0}
    return [name.removesuffix(".weight") for name in names]


def verdict(record: RunRecord, level: int) -> Verdict:
    """The verdict of `RULE` on the tickets of a level."""
    if level == 0:
        return Verdict("dense", "the network that every ticket is compared with")
    config, ticket, dense = record.config, ("ticket", level), ("ticket", 0)
    if not (finished(record, *dense) and finished(record, *ticket)):
        both = difference(record, "early_stop_step", ticket, dense)
        return Verdict(NO_VERDICT, f"{len(both)} of {len(config.seeds)} seeds are finished")
    accuracy, _ = mean_interval(per_seed(record, *dense, "accuracy_at_early_stop").values())
    if accuracy < 2 / get_model(config.model).classes:
        return Verdict(NO_VERDICT, f"dense itself guesses: {100 * accuracy:.2f} % accuracy")
    if empty := empty_layers(record, level):
        return Verdict("below dense", f"{', '.join(empty)}: no weight left, the network computes a constant")
    gap = mean_interval(difference(record, "accuracy_at_early_stop", ticket, dense))
    why = f"{signed_pp(*gap)} against dense"
    if gap[0] < -TOLERANCE - 1e-9:  # the slack is for round-off: a drop of exactly 0.2 pp is matching
        return Verdict("below dense", why)
    stop, stop_dense = (
        mean_interval(per_seed(record, *cell, "early_stop_step").values())[0] for cell in (ticket, dense)
    )
    why += f", early stop at step {stop:,.0f} against {stop_dense:,.0f}"
    if stop > stop_dense:
        return Verdict("matching", why)
    if "reinit" not in config.arms:
        return Verdict("matching", why + "; reinit was not run")
    if not finished(record, "reinit", level):
        return Verdict(NO_VERDICT, why + "; reinit is not finished")
    ahead = difference(record, "accuracy_at_early_stop", ticket, ("reinit", level))
    lead, half = mean_interval(ahead)
    above = sum(d > 1e-9 for d in ahead)
    why += f", {signed_pp(lead, half)} against reinit, above it on {above} of {len(ahead)} seeds"
    wins = above == len(ahead) or (half is not None and lead > half + 1e-9)
    return Verdict("winning" if wins else "matching", why)


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """One JSON object per arm and level with a point; means and 95 % half-widths over the seeds."""
    rows = []
    for arm in record.config.arms:
        for level, remaining in weights_remaining(record).items():
            seeds = {p["seed"] for p in record.points if (p["arm"], p["level"]) == (arm, level)}
            if not seeds:
                continue
            row: dict[str, Any] = {"arm": arm, "level": level, "seeds": len(seeds)}
            row["weights_remaining"] = remaining
            for field in ("accuracy_at_early_stop", "final_accuracy", "early_stop_step"):
                mean, half = mean_interval(per_seed(record, arm, level, field).values())
                row[field] = {"mean": mean, "half_width": half}
            row["empty_layers"] = empty_layers(record, level, arm)
            if arm == "ticket":
                row["verdict"] = asdict(verdict(record, level))
            rows.append(row)
    return rows


def signed_pp(mean: float, half: float | None) -> str:
    """A difference of accuracies in percentage points, such as "+0.52 ± 0.20 pp"."""
    return f"{100 * mean:+.2f}" + ("" if half is None else f" ± {100 * half:.2f}") + " pp"


def seed_list(seeds: tuple[int, ...]) -> str:
    """Seeds in a row as `0-4`, others as `0,2,5`."""
    if len(seeds) > 2 and sorted(seeds) == list(range(min(seeds), max(seeds) + 1)):
        return f"{min(seeds)}-{max(seeds)}"
    return ",".join(map(str, seeds))
