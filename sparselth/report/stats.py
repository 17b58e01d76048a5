"""What the points of a run support: differences seed by seed with intervals, and one verdict a level.

What a seed decides (the split of the images, the first weights, the mask) moves a ticket and its controls
alike, so they are compared seed by seed (Bouthillier et al. 2021, arXiv:2103.03098). The interval is that of
Student (1908) over these differences: with so few seeds its errors stay near the 5 % that it promises, where
a bootstrap's do not (Colas et al. 2019, arXiv:1904.06979), and an exact test that flips signs cannot go below
2 / 2^n, 6 % with five seeds. Table, figures, sentences and JSON all read `compare` and `verdict`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import atan, fsum, inf, log, pi, sqrt
from statistics import NormalDist
from typing import Any, TypeVar

from sparselth.begun import read_environment
from sparselth.data.sets import DATASETS
from sparselth.runs import RunRecord
from sparselth.user_files import is_file

TOLERANCE = 0.002  # at least; the 0.2 pp of Frankle et al. 2020, arXiv:1912.05671
FEWEST = 3  # seeds of an interval: that of two is 12.7 standard errors wide
SLACK = 1e-9  # for round-off: a drop of exactly 0.2 pp is no larger
NO_VERDICT, TOO_FEW, UNCLEAR = "no verdict", "too few seeds", "unclear"


@dataclass(frozen=True)
class Verdict:
    """`word` is dense, winning, matching, below dense, unclear, too few seeds or no verdict; `why` has the
    numbers behind it."""

    word: str
    why: str


@dataclass(frozen=True)
class Gap:
    """A difference paired by seed: its mean, and the standard error of that, None with fewer than FEWEST."""

    mean: float
    error: float | None
    seeds: int

    @property
    def half(self) -> float | None:
        """Half-width of the 95 % interval, None where there is none."""
        return None if self.error is None else self.error * t_quantile(self.seeds - 1)

    @property
    def low(self) -> float:
        return -inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        return inf if self.half is None else self.mean + self.half

    def chance(self, least: float) -> float:
        """One-sided p of a mean as high as this where the true one is `least`: 0.025 if that is `low`."""
        if self.error is None:
            return 1.0
        if self.error == 0:
            return float(self.mean <= least + SLACK)
        return 1 - t_below((self.mean - least) / self.error, self.seeds - 1)


def t_below(t: float, df: int) -> float:
    """P(T <= t) of Student's t, exact for whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    odd, angle, cos2 = df % 2, atan(t / sqrt(df)), df / (df + t * t)
    total, term = 0.0, 1.0
    for j in range(1, df // 2 + 1):
        total += term
        term *= cos2 * (2 * j if odd else 2 * j - 1) / (2 * j + 1 if odd else 2 * j)
    sine = t / sqrt(df + t * t)
    inside = 2 / pi * (angle + sine * sqrt(cos2) * total) if odd else sine * total
    return (1 + inside) / 2


@cache
def t_quantile(df: int, below: float = 0.975) -> float:
    """The t that has `below` (at least a half) of Student's law below it; from 1,001 on expanded in 1/df."""
    if df > 1000:
        z = NormalDist().inv_cdf(below)
        return z + (z**3 + z) / (4 * df)
    low, high = 0.0, 1.0
    while t_below(high, df) < below:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, df) < below else (low, middle)
    return high


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
    """Seed → a point's field where it has one, draws averaged; level 0 is dense, whichever the arm."""
    if level == 0:
        arm = "ticket"
    found: dict[int, list[float]] = {}
    for p in record.by_level.get((arm, level), ()):
        if p.get(field) is not None:
            found.setdefault(p["seed"], []).append(p[field])
    return {seed: fsum(found[seed]) / len(found[seed]) for seed in sorted(found)}


def difference(record: RunRecord, field: str, a: tuple[str, int], b: tuple[str, int]) -> list[float]:
    """Field of (arm, level) `a` minus that of `b`, for each seed that has both."""
    left, right = per_seed(record, *a, field), per_seed(record, *b, field)
    return [left[seed] - right[seed] for seed in left if seed in right]


def compare(
    record: RunRecord, a: tuple[str, int], b: tuple[str, int], field: str = "accuracy_at_early_stop"
) -> Gap | None:
    """Field of (arm, level) `a` minus that of `b`, paired by seed; None before a seed has both.

    Accuracies count images, so the interval of their difference is never narrower than one test image to
    either side: seeds that happen to agree are not certain.
    """
    values = difference(record, field, a, b)
    counted = images_counted(record) if field.startswith("accuracy") else None
    return paired(values, counted) if values else None


def paired(differences: Sequence[float], images: int | None = None) -> Gap:
    """Mean and standard error of differences, one a seed; of accuracies on so many `images`."""
    n, mean = len(differences), fsum(differences) / len(differences)
    if n < FEWEST:
        return Gap(mean, None, n)
    error = sqrt(fsum((value - mean) ** 2 for value in differences) / (n - 1) / n)
    return Gap(mean, error if images is None else max(error, 1 / (images * t_quantile(n - 1))), n)


def images_counted(record: RunRecord) -> int:
    """How many test images an accuracy of the run counts."""
    if is_file(record.config.dataset):  # which may be gone
        there: int = read_environment(record.path)["test_images"]
    else:
        there = DATASETS[record.config.dataset].n_test
    return min(record.config.eval_images or there, there)


def cells(record: RunRecord) -> tuple[int, int]:
    """Number of finished cells, and of all cells of the run."""
    return len(record.points), len(record.config.cells())


def finished(record: RunRecord, arm: str, level: int) -> bool:
    """Whether the run has this arm, and every seed and draw of it is there."""
    if level == 0:
        arm = "ticket"
    return 0 < record.planned[arm, level] == len(record.by_level.get((arm, level), ()))


def weights_remaining(record: RunRecord) -> dict[int, float]:
    """Level → share of the prunable weights that is kept, in [0, 1], for levels with a point."""
    found: dict[int, list[float]] = {}
    for (_, level), points in record.by_level.items():
        found.setdefault(level, []).extend(p["weights_remaining"] for p in points)
    return {level: mean_interval(found[level])[0] for level in sorted(found)}


def nearest_level(levels: dict[int, float], remaining: float) -> int | None:
    """The level ≥ 1 whose weights remaining are nearest in ratio, given level → weights remaining."""
    pruned = [level for level in levels if level and levels[level] > 0]
    return min(pruned, key=lambda level: abs(log(levels[level] / remaining)), default=None)


def empty_layers(record: RunRecord, level: int, arm: str = "ticket") -> list[str]:
    """Layers without a weight on some seed: such a network computes a constant."""
    points = record.by_level.get((arm, level), ())
    names = {name: None for p in points for name, kept in p["kept"].items() if kept == 0}
    return [name.removesuffix(".weight") for name in names]


def tolerance(record: RunRecord) -> float:
    """How far below dense a ticket may be that matches it, as an accuracy.

    Where test images are few it is what they can tell of any network: the standard error of dense's accuracy.
    """
    return tolerance_of(per_seed(record, "ticket", 0, "accuracy_at_early_stop").values(), record)


def tolerance_of(dense: Collection[float], record: RunRecord) -> float:
    """The same, from accuracies of dense networks."""
    if not dense:
        return TOLERANCE
    accuracy, _ = mean_interval(dense)
    return max(TOLERANCE, sqrt(accuracy * (1 - accuracy) / images_counted(record)))


def rule(record: RunRecord) -> str:
    """The rule of `verdict`, in words."""
    pp, images = f"{100 * tolerance(record):.2f}", f"{images_counted(record):,}"
    return (
        "Verdict on the ticket: differences of test accuracies at early stop, seed by seed, with the 95 % "
        "interval of their mean (Student's t).\n"
        "winning = matching, and above reinit (the mean of its draws): that interval lies above 0; and the "
        "ticket does not stop clearly later than dense. Without the arm reinit no ticket is winning.\n"
        f"matching = at most {pp} pp below dense: the interval lies above -{pp} pp ({100 * TOLERANCE:g}, or "
        f"the standard error of dense's accuracy on {images} test images if that is more).\n"
        f"below dense = the interval lies below 0 and reaches below -{pp} pp; and every ticket with an empty "
        "layer: it computes a constant.\n"
        f"unclear = the interval reaches from below -{pp} pp to above 0; more seeds would tell.\n"
        f"too few seeds = fewer than {FEWEST}, which is too few to tell.\n"
        "– = seeds are missing, or dense itself guesses (its accuracy is below twice that of chance)."
    )


def verdict(record: RunRecord, level: int) -> Verdict:
    """The verdict of `rule` on the tickets of a level."""
    if level == 0:
        return Verdict("dense", "the network that every ticket is compared with")
    config, ticket, dense, reinit = record.config, ("ticket", level), ("ticket", 0), ("reinit", level)
    if not (finished(record, *dense) and finished(record, *ticket)):
        both = difference(record, "early_stop_step", ticket, dense)
        return Verdict(NO_VERDICT, f"{len(both)} of {len(config.seeds)} seeds are finished")
    accuracy, _ = mean_interval(per_seed(record, *dense, "accuracy_at_early_stop").values())
    if accuracy < 2 / (config.network.classes or inf):
        return Verdict(NO_VERDICT, f"dense itself guesses: {100 * accuracy:.2f} % accuracy")
    if empty := empty_layers(record, level):
        return Verdict("below dense", f"{', '.join(empty)}: no weight left, the network computes a constant")
    gap = compare(record, ticket, dense)
    later = compare(record, ticket, dense, "early_stop_step")
    assert gap is not None
    assert later is not None
    why = f"{signed_pp(gap)} against dense"
    if gap.error is None:
        return Verdict(TOO_FEW, f"{why}, from {gap.seeds} seed{'s' * (gap.seeds > 1)}")
    if gap.low < -tolerance(record) - SLACK:
        return Verdict("below dense" if gap.high < 0 else UNCLEAR, why)
    if "reinit" not in config.arms:
        return Verdict("matching", why + "; reinit was not run")
    if not finished(record, *reinit):
        return Verdict(NO_VERDICT, why + "; reinit is not finished")
    lead = compare(record, ticket, reinit)
    assert lead is not None
    why += f", {signed_pp(lead)} against reinit, early stop {later.mean:+,.0f} ± {later.half:,.0f} steps"
    return Verdict("winning" if lead.low > SLACK and later.low <= SLACK else "matching", why)


K = TypeVar("K", int, str, tuple[int, str])


def holm(chances: dict[K, float], share: float = 0.025) -> set[K]:
    """Which of several one-sided p stand when all are read at once (Holm 1979), each by its level or name."""
    stand = set[K]()
    for i, one in enumerate(sorted(chances, key=lambda one: (chances[one], one))):
        if chances[one] > share / (len(chances) - i):
            break
        stand.add(one)
    return stand


def apart(gaps: Mapping[K, Gap]) -> set[K]:
    """Which of several differences are none of 0, to either side, when all are read at once (Holm 1979)."""
    return holm(
        {
            one: min(gap.chance(0.0), replace(gap, mean=-gap.mean).chance(0.0))
            for one, gap in gaps.items()
            if gap.error is not None
        }
    )


def winning_at_once(record: RunRecord) -> set[int]:
    """Levels whose ticket is still winning when the levels of the run are read at once, by Holm's correction.

    A ticket that wins passes two tests, so its p is the larger one (Berger 1982).
    """
    levels = [
        level for level in range(1, record.config.levels + 1) if verdict(record, level).word != NO_VERDICT
    ]
    chances = dict.fromkeys(levels, 1.0)
    for level in levels:
        if verdict(record, level).word == "winning":
            gap = compare(record, ("ticket", level), ("ticket", 0))
            lead = compare(record, ("ticket", level), ("reinit", level))
            assert gap is not None
            assert lead is not None
            chances[level] = max(gap.chance(-tolerance(record)), lead.chance(0.0))
    return holm(chances)


def controls(record: RunRecord, level: int) -> list[tuple[str, tuple[str, int]]]:
    """What a ticket is compared with: dense, then every other arm at its level; a name and (arm, level)."""
    arms = [arm for arm in record.config.arms if arm != "ticket"]
    return [("dense", ("ticket", 0)), *((arm, (arm, level)) for arm in arms)]


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """One JSON object per arm and level with a point; means and 95 % half-widths over the seeds.

    A ticket's has its differences from dense and from each control, and its verdict.
    """
    rows, at_once = [], winning_at_once(record)
    for arm in record.config.arms:
        for level, remaining in weights_remaining(record).items():
            seeds = {p["seed"] for p in record.by_level.get((arm, level), ())}
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
                row["winning_at_once"] = level in at_once
            if arm == "ticket" and level:
                row["minus"] = {
                    name: {"mean": gap.mean, "half_width": gap.half, "seeds": gap.seeds}
                    for name, other in controls(record, level)
                    if (gap := compare(record, (arm, level), other))
                }
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Cost:
    """What training the ticket of a level costs, means over the seeds; shares are of a seed's own level 0."""

    remaining: float
    step_seconds: float
    state_bytes: float
    seconds_of_dense: list[float]  # by seed
    bytes_of_dense: list[float]


def costs(record: RunRecord) -> dict[int, Cost]:
    """Level → its cost, for levels that were timed on a seed whose dense network was; dense is 1 exactly."""
    found = {}
    for level, remaining in weights_remaining(record).items():
        seconds, seconds_of_dense = _of_dense(record, level, "step_seconds")
        size, size_of_dense = _of_dense(record, level, "state_bytes")
        if seconds_of_dense and size_of_dense:
            found[level] = Cost(remaining, seconds, size, seconds_of_dense, size_of_dense)
    return found


def _of_dense(record: RunRecord, level: int, field: str) -> tuple[float, list[float]]:
    """A field's mean over the seeds, and by seed as a share of what it is at level 0."""
    own, dense = (per_seed(record, "ticket", at, field) for at in (level, 0))
    return fsum(own.values()) / max(len(own), 1), [own[seed] / dense[seed] for seed in own if dense.get(seed)]


def clock(record: RunRecord) -> str:
    """By which clock steps were timed: processor, or wall as on a GPU and in earlier versions."""
    return "processor" if all(p.get("clock") == "processor" for p in record.points) else "wall"


def signed_pp(gap: Gap) -> str:
    """A difference of accuracies in percentage points, such as "+0.52 ± 0.20 pp"."""
    return f"{signed(gap)} pp"


def signed(gap: Gap) -> str:
    """The same without its unit."""
    mean = round(100 * gap.mean, 2) + 0.0  # and no -0.00
    return f"{mean:+.2f}" + ("" if gap.half is None else f" ± {100 * gap.half:.2f}")


def seeds_named(seeds: tuple[int, ...]) -> str:
    """As a heading says it: `seeds 0-4`, `seed 3`."""
    return f"seed{'s' * (len(seeds) > 1)} {seed_list(seeds)}"


def seed_list(seeds: tuple[int, ...]) -> str:
    """Seeds in a row as `0-4`, others as `0,2,5`."""
    if len(seeds) > 2 and sorted(seeds) == list(range(min(seeds), max(seeds) + 1)):
        return f"{min(seeds)}-{max(seeds)}"
    return ",".join(map(str, seeds))
