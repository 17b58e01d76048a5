"""Schedules of pruning to one share of the weights: what is reached, and how many training steps it takes.

    one-shot   the trained dense network pruned once; what is left goes back and trains
    rounds     a share of what is left goes each round, as in `imp`; the last round prunes less, to be exact
    cubic      within one training, more at first, from a tenth of it to three quarters (Zhu & Gupta 2018,
               arXiv:1710.01878); nothing goes back
    erk        a random mask from the start, layers as Erdős and Rényi have them (Evci et al. 2020)

All keep equally many weights in the end. By layer, a layer keeps what rounds of 20 % leave of it beside
others (the output layer goes at half the rate); over all layers, what is largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from sparselth.config import SCOPES, Cell, Recipe, like, option
from sparselth.errors import UsageError
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.training import Training
from sparselth.models import get_model
from sparselth.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images

SCHEDULES: Registry[str] = Registry("schedule")  # and what they are
SCHEDULES.add("one-shot", "the dense network pruned once")
SCHEDULES.add("rounds", "a share of what is left each round")
SCHEDULES.add("cubic", "within one training, more at first")
SCHEDULES.add("erk", "a random mask from the start")
SHORT = 2000  # steps of the short recipe at most: there are hundreds of networks
MOST_ROUNDS = 500


def _different(names: tuple[str, ...]) -> str | None:
    return None if names and len(set(names)) == len(names) else "expected different names"


def _rates(rates: tuple[float, ...]) -> str | None:
    right = rates and all(0 < rate < 1 for rate in rates) and len(set(rates)) == len(rates)
    return None if right else "expected different shares between 0 and 1"


def _share(keep: float) -> str | None:
    return None if 0 < keep < 1 else "expected a share between 0 and 1"


@dataclass(frozen=True)
class Plan:
    """A schedule with its rate, if it has one, and its scope."""

    schedule: str
    rate: float | None
    scope: str

    @property
    def arm(self) -> str:
        """The arm of its cells."""
        rate = f"-{self.rate:g}" if self.schedule == "rounds" else ""
        return f"{self.schedule}{rate}-{self.scope}" if self.schedule != "erk" else "erk"

    def __str__(self) -> str:
        words = {"one-shot": "one shot", "cubic": "cubic while training", "erk": "random, ERK"}
        if self.schedule == "erk":
            return words["erk"]
        scope = "by layer" if self.scope == "layer" else "over all layers"
        return f"{words.get(self.schedule, f'{100 * (self.rate or 0):g} % a round')}, {scope}"


@register
@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Training):
    """Compare schedules of pruning by the accuracy they reach and the training steps they take.

    One shot, rounds of 10 to 50 %, cubic within one training, and a random mask from the start, ranked by
    layer and over all layers, all to the same share of the weights. Ends with a table, a figure with the
    schedules that no other beats on both counts, and a recommendation.
    """

    name: ClassVar[str] = "schedule"
    words: ClassVar[str] = "sparselth.report.schedule"
    figures: ClassVar[str] = "sparselth.report.schedule"
    has_usual: ClassVar[bool] = False

    model: str = like(Training, "model", "lenet-300-100")
    schedules: tuple[str, ...] = option(
        ("one-shot", "rounds", "cubic", "erk"),
        "What is compared: one-shot, rounds, cubic, erk.",
        _different,
        SCHEDULES,
        ordered=False,
        extends=True,
    )
    rates: tuple[float, ...] = option(
        (0.1, 0.2, 0.3, 0.5), "Shares that a round of rounds prunes.", _rates, ordered=False, extends=True
    )
    scopes: tuple[str, ...] = option(
        SCOPES,
        "Rank weights within each layer, or over all of them.",
        _different,
        SCOPES,
        ordered=False,
        extends=True,
    )
    keep: float = option(0.1, "Share of the weights that is kept in the end.", _share)
    rewind: int = option(0, "Step whose weights one-shot and rounds go back to: 500, or 2ep.", epochs=True)

    @classmethod
    def recipes(cls, values: Mapping[str, Any]) -> Mapping[str, Recipe]:
        """Those of the model, the short one cut short."""
        own = dict(get_model(values["model"]).recipes)
        name, recipe = next(iter(own.items()))
        steps = min(recipe.steps, SHORT)
        drops = tuple(drop for drop in recipe.lr_drops if drop < steps)
        return own | {name: replace(recipe, steps=steps, lr_drops=drops, warmup=min(recipe.warmup, steps))}

    def check(self) -> None:
        super().check()
        steps = self.recipe.steps
        if not 0 <= self.rewind < steps:
            raise self.wrong("rewind", f"expected a step from 0 to {steps - 1}; training ends at {steps}")
        if "cubic" in self.schedules and not self.prune_steps:
            raise self.recipe.wrong(
                "eval_every",
                f"expected at most a quarter of the {steps} `steps`: cubic prunes as it evaluates",
            )
        for scope in self.scopes:
            if not all(self.final(scope).values()):
                raise self.wrong("keep", "a layer would keep no weight; keep more")
        if sum(self.final("global").values()) == self.network.params.prunable:
            raise self.wrong("keep", "all weights would be kept; keep fewer")
        self.cells()

    # ---- counts

    @property
    def exclude(self) -> tuple[str, ...]:
        """What papers leave out under scope global, and so here under both: all keep equally many."""
        return get_model(self.model).exempt

    def final(self, scope: str) -> dict[str, int]:
        """What is kept in the end, by layer or {"all": n} with what is left out."""
        from sparselth.pruning import excluded

        params = self.network.params
        whole = {s.name: s.numel for s in params.weights if s.name in excluded(params, self.exclude)}
        total = round(self.keep * (params.prunable - sum(whole.values())))
        if scope == "global":
            return {"all": total} | whole
        return by_layer(params, total, whole)

    def ladder(self, plan: Plan) -> list[dict[str, int]]:
        """What is kept after every round, from the dense network's on."""
        from sparselth.pruning import rounded

        params, final = self.network.params, self.final(plan.scope)
        scales = {spec.name: spec.rate_scale for spec in params.weights} | {"all": 1.0}
        whole = {spec.name: spec.numel for spec in params.weights}
        now = {
            name: whole.get(name, params.prunable - sum(n for k, n in final.items() if k != "all"))
            for name in final
        }
        found = [now]
        if plan.schedule != "rounds":
            return [now, final]
        rate = plan.rate or 0.0
        ranked = max((name for name in final if final[name] < now[name]), key=lambda name: now[name])
        while found[-1] != final:
            before = found[-1]
            left = {n: before[n] - rounded(rate * scales[n] * before[n]) for n in before}
            last = left[ranked] <= final[ranked] or left == before or len(found) >= MOST_ROUNDS
            found.append(final if last else {n: max(final[n], left[n]) for n in before})
        return found

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """What is compared, by arm."""
        found = [
            Plan(schedule, rate, scope)
            for schedule in self.schedules
            for scope in (self.scopes if schedule != "erk" else ("global",))
            for rate in (self.rates if schedule == "rounds" else (None,))
        ]
        return {plan.arm: plan for plan in found}

    @cached_property
    def ladders(self) -> dict[str, list[dict[str, int]]]:
        return {arm: self.ladder(plan) for arm, plan in self.plans.items()}

    @property
    def prune_steps(self) -> list[int]:
        """The steps at which cubic prunes: of its evaluations those from a tenth to three quarters."""
        steps, every = self.recipe.steps, self.recipe.eval_every
        return [step for step in range(every, steps, every) if steps / 10 <= step <= 3 * steps / 4]

    def cubic(self, step: int, scope: str) -> dict[str, int]:
        """What cubic keeps from a step on."""
        start, end = self.prune_steps[0], self.prune_steps[-1]
        going = (1 - (step - start) / (end - start)) ** 3 if step < end else 0.0
        first, last = self.ladder(Plan("cubic", None, scope))
        return {name: last[name] + round((first[name] - last[name]) * going) for name in last}

    # ---- cells

    def cells(self) -> list[Cell]:
        """The dense network of a seed, then every round of every plan."""
        arms = [(arm, level) for arm, ladder in self.ladders.items() for level in range(1, len(ladder))]
        if len(self.seeds) * len(arms) > 100_000:
            raise UsageError(f"`rates`: {len(self.seeds) * len(arms):,} networks; expected at most 100,000")
        return [Cell(seed, arm, level) for seed in self.seeds for arm, level in [("dense", 0), *arms]]

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        if cell.arm == "dense" or self.plans[cell.arm].schedule in ("cubic", "erk"):
            return ()
        return (Cell(cell.seed, *(("dense", 0) if cell.level == 1 else (cell.arm, cell.level - 1))),)

    def urgency(self, cell: Cell) -> tuple[bool, float]:
        """Dense networks first, then the longest chains."""
        rounds = len(self.ladders[cell.arm]) if cell.arm != "dense" else 0
        return cell.arm != "dense", cell.level - rounds

    def is_last(self, cell: Cell) -> bool:
        return cell.arm == "dense" or cell.level == len(self.ladders[cell.arm]) - 1

    def spent(self, cell: Cell) -> int:
        """Training steps that it takes to get there, those of what it needs among them."""
        before = sum(self.spent(need) for need in self.needs(cell))
        return before + self.recipe.steps - self.start_step(cell)

    def start_step(self, cell: Cell) -> int:
        goes_back = cell.arm != "dense" and self.plans[cell.arm].schedule in ("one-shot", "rounds")
        return self.rewind if goes_back else 0

    def keep_step(self, cell: Cell) -> int | None:
        return self.rewind if cell.arm == "dense" else None

    def rungs(self) -> list[dict[str, int]]:
        """Eight levels from dense to what is kept in the end."""
        first, last = self.ladder(Plan("cubic", None, "layer"))
        return [
            {name: round(first[name] * (last[name] / first[name]) ** (part / 7)) for name in first}
            for part in range(8)
        ]

    def rung(self, cell: Cell) -> int:
        if cell.arm == "dense":
            return 0
        if self.plans[cell.arm].schedule == "cubic":
            return 4
        share = self.share(cell)
        return min(range(8), key=lambda part: abs(share - self.keep ** (part / 7)))

    def share(self, cell: Cell) -> float:
        """The share of all weights that a cell keeps."""
        if cell.arm == "dense":
            return 1.0
        return sum(self.ladders[cell.arm][cell.level].values()) / self.network.params.prunable

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        from sparselth.experiments.schedule_jobs import start

        return start(self, cell, place)

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        from sparselth.experiments.schedule_jobs import gradual

        usual = [c for c in cells if c.arm == "dense" or self.plans[c.arm].schedule != "cubic"]
        found: list[Finished | Diverged] = []
        if usual:
            done = super().compute(usual, place)
            if done is None:
                return None
            found += done
        for cell in (one for one in cells if one not in usual):
            if (more := gradual(self, cell, place)) is None:
                return [self._told(one) for one in found] or None
            found += more
        return [self._told(one) for one in found]

    def _told(self, done: Finished | Diverged) -> Finished | Diverged:
        """With what the report asks for."""
        if isinstance(done, Diverged):
            return done
        plan = self.plans.get(done.cell.arm, Plan("dense", None, "layer"))
        line: dict[str, Any] = {"schedule": plan.schedule, "rate": plan.rate, "scope": plan.scope}
        line |= {"training_steps": self.spent(done.cell), "last": self.is_last(done.cell)}
        return replace(done, line=line | done.line)

    # ---- what is said of it

    @property
    def method(self) -> str:
        """To what they prune, in a line."""
        back = f", rewound to step {self.rewind:,}" if self.rewind else ""
        return f"schedules to {100 * self.keep:g} % of the weights by magnitude{back}"

    @property
    def title(self) -> str:
        return f"{super().title.replace('schedule of ', 'schedules for ', 1)}, to {100 * self.keep:g} %"

    def about(self, cell: Cell) -> str:
        return f"{100 * self.share(cell):.1f} %"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        plans = "; ".join(f"{p} ({len(self.ladders[arm]) - 1})" for arm, p in self.plans.items())
        return {"model": rows.pop("model"), "plans": f"to {100 * self.keep:g} %, networks: {plans}"} | rows


def by_layer(params: Any, total: int, whole: Mapping[str, int]) -> dict[str, int]:
    """Counts by layer that sum to `total` beside `whole` ones, as rounds of 20 % leave them.

    The share of a layer pruned at half the rate is a power of that of others.
    """
    from math import log

    ranked = [spec for spec in params.weights if spec.name not in whole]
    powers = {spec.name: log(1 - 0.2 * spec.rate_scale) / log(0.8) for spec in ranked}

    def counts(share: float) -> dict[str, int]:
        return {spec.name: round(spec.numel * share ** powers[spec.name]) for spec in ranked}

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle).values()) <= total else (low, middle)
    found = counts(low)
    largest = max(ranked, key=lambda spec: spec.numel).name
    found[largest] += total - sum(found.values())  # what rounding left
    return {spec.name: whole.get(spec.name, found.get(spec.name, 0)) for spec in params.weights}
