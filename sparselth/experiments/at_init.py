"""Pruning before training, and whether it finds more than how many weights a layer keeps.

A level is the number of a point, a score and a sparsity; level 0 is the dense network. Under every score

    ticket    the weights that the score keeps, trained from where they were drawn
    shuffle   as many in every layer, at random places: the same weights under the ticket's mask, permuted
    reinit    the ticket's mask on weights that are drawn anew
    invert    the weights that the score would prune first are kept

(Frankle et al. 2021). The score `imp` is what they are held against: magnitude after training, in rounds of
train and prune, rewound to step 0; its earlier rounds are the draws of its ticket. With `collapse` nothing is
trained: how far can each score prune until some layer has no weight left?
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sparselth.config import Cell, Config, Recipe, like, option
from sparselth.errors import UsageError
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.training import Training
from sparselth.registry import Registry
from sparselth.user_files import short

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images
    from sparselth.data.batches import Resident

ARMS: Registry[str] = Registry("arm")  # of this experiment, and what they are
ARMS.add("ticket", "what the score keeps")
ARMS.add("shuffle", "the ticket's mask shuffled within each layer")
ARMS.add("reinit", "the ticket's mask on weights drawn anew")
ARMS.add("invert", "what the score would prune first")
IMP = "imp"
COLLAPSE = "collapse"  # the arm of a cell that trains nothing
SAME = {  # of scores that draw a layer's places: arms that would be draws from the ticket's law again
    "random": ("shuffle", "reinit", "invert"),
    "erk": ("shuffle", "reinit"),
}
MOST_CELLS, MOST_POINTS = 100_000, 100


def _scores() -> Collection[str]:
    from sparselth.scores import SCORES

    return (*SCORES, IMP)


def _arms(arms: tuple[str, ...]) -> str | None:
    if "ticket" not in arms:
        return "'ticket' is missing, and every other arm checks it"
    return None if len(set(arms)) == len(arms) else "an arm is named twice"


def _different(names: tuple[str, ...]) -> str | None:
    right = 0 < len(set(names)) == len(names) <= MOST_POINTS
    return None if right else "expected different scores"


def _sparsities(sparsity: tuple[float, ...]) -> str | None:
    right = all(0 < share < 1 for share in sparsity) and 0 < len(set(sparsity)) == len(sparsity)
    return None if right and len(sparsity) <= MOST_POINTS else "expected different numbers between 0 and 1"


@register
@dataclass(frozen=True, kw_only=True)
class AtInitConfig(Training):
    """Prune before training, by any score, and check what the masks are worth.

    Weights are ranked over all layers as they were drawn, and what is left is trained. Every mask is checked
    as Frankle et al. (2021) do: shuffled within its layers, on new weights, and with the score inverted. The
    score imp, magnitude after training, is what to hold them against. Layers that lose all weights, or all
    paths, are named; `collapse` says without training how far each score can go. Ends with a table, a figure
    and a folder that `sparselth show` reads.
    """

    name: ClassVar[str] = "at-init"
    words: ClassVar[str] = "sparselth.report.at_init"
    figures: ClassVar[str] = "sparselth.report.at_init_figures"
    has_usual: ClassVar[bool] = False

    model: str = like(Training, "model", "lenet-300-100")
    seeds: tuple[int, ...] = like(Training, "seeds", (0, 1, 2))
    score: tuple[str, ...] = option(
        ("snip", "grasp", "synflow", "magnitude", "random"),
        "What ranks the weights, one or several; see `sparselth ls scores`; imp is magnitude after training.",
        _different,
        _scores,
        extends=True,
    )
    sparsity: tuple[float, ...] = option(
        (0.9,), "Share of the weights that is pruned, one or several: 0.9,0.98.", _sparsities, extends=True
    )
    arms: tuple[str, ...] = option(
        ("ticket", "shuffle", "reinit"),
        "ticket, and its checks: shuffle, reinit, invert.",
        _arms,
        ARMS,
        ordered=False,
        extends=True,
    )
    exclude: tuple[str, ...] = like(
        ImpConfig, "exclude", (), "Weights that are not pruned, by name, layer or glob: fc1,conv1*."
    )
    rate: float = like(
        ImpConfig, "rate", help="Share of the remaining weights that a round of imp prunes, at most."
    )
    drawn: tuple[str, ...] = option(tuple(SAME), added=True, before=("random",))  # whose arms are left out
    collapse: bool = option(
        False, "Train nothing: find the largest compression that leaves every layer a weight."
    )

    @classmethod
    def recipes(cls, values: Mapping[str, Any]) -> Mapping[str, Recipe]:
        """The model's; within minutes, its networks are looked at once, where training ends."""
        found = dict(super().recipes(values))
        return {
            name: replace(one, eval_every=one.steps) if name == "short" else one
            for name, one in found.items()
        }

    def check(self) -> None:
        super().check()
        from sparselth.scores import SCORES

        for name in self.score:
            if name != IMP and SCORES[name].start:
                raise UsageError(
                    f"`score` {name}: compares with the weights that training began with, and here nothing "
                    "is trained yet; use magnitude"
                )
        if self.collapse and set(self.score) == {IMP}:
            raise self.wrong("score", "trains, and with `collapse` nothing is trained; use another")
        for sparsity in self.sparsity:
            if not 0 < self.rung_of(sparsity)["all"] < self.ranked:
                raise UsageError(
                    f"`sparsity` {sparsity:g}: keeps {self.rung_of(sparsity)['all']:,} of {self.ranked:,} "
                    "weights; expected some to stay and some to go"
                )
        self.cells()

    # ---- points: their numbers stay when a run goes on with more scores and sparsities

    def level(self, score: int, sparsity: int) -> int:
        """The number of a point by the places of its score and sparsity: along diagonals, from 1 on."""
        diagonal = score + sparsity
        return 1 + diagonal * (diagonal + 1) // 2 + sparsity

    @cached_property
    def points(self) -> dict[int, tuple[str, float]]:
        """Level → score and sparsity."""
        return {
            self.level(i, j): (score, sparsity)
            for i, score in enumerate(self.score)
            for j, sparsity in enumerate(self.sparsity)
        }

    def going_on(self, theirs: Config) -> Self:
        """With scores and sparsities in the order of a run that has them, and what is new behind."""
        if not isinstance(theirs, AtInitConfig):
            return self
        found: dict[str, Any] = {"drawn": theirs.drawn}
        for name in ("score", "sparsity"):
            ours, before = getattr(self, name), getattr(theirs, name)
            if set(before) <= set(ours):
                found[name] = before + tuple(one for one in ours if one not in before)
        return replace(self, **found)

    def keeps(self, theirs: Config, name: str) -> bool:
        if name in ("score", "sparsity"):
            before, ours = getattr(theirs, name), getattr(self, name)
            return bool(before == ours[: len(before)])
        return super().keeps(theirs, name)

    # ---- cells

    def score_of(self, cell: Cell) -> str | None:
        """What a cell is pruned by; None is the dense network."""
        return self.points[cell.level][0] if cell.level else None

    def cells(self) -> list[Cell]:
        """Dense, then by score and sparsity every arm; of imp each round, the last as draw 0."""
        scores = range(len(self.score))
        if self.collapse:
            some = [self.level(i, 0) for i in scores if self.score[i] != IMP]
            return [Cell(seed, COLLAPSE, level) for seed in self.seeds for level in some]
        rounds = sum(self.rounds(level) for level, (score, _) in self.points.items() if score == IMP)
        number = len(self.seeds) * (len(self.points) * len(self.arms) + rounds)
        if number > MOST_CELLS:
            raise UsageError(
                f"`seeds`: with these `score`, `sparsity`, `arms` and `rate` there are {number:,} networks; "
                f"expected at most {MOST_CELLS:,}"
            )
        found = list[Cell]()
        for seed in self.seeds:
            found.append(Cell(seed, "ticket", 0))
            for i, score in enumerate(self.score):
                for j in range(len(self.sparsity)):
                    level = self.level(i, j)
                    for arm in self.arms_of(score):
                        draws = range(self.rounds(level) if (score, arm) == (IMP, "ticket") else 1)
                        found += [Cell(seed, arm, level, draw) for draw in draws]
        return found

    def arms_of(self, score: str) -> tuple[str, ...]:
        """The arms that are something else under a score; imp is not inverted: its rounds would be others."""
        same = SAME[score] if score in self.drawn else ()
        return tuple(arm for arm in self.arms if arm not in same and (score, arm) != (IMP, "invert"))

    @property
    def left_out(self) -> str:
        """Which arms would be their ticket's again, in a sentence; "" where there are none."""
        found: dict[tuple[str, ...], list[str]] = {}
        for score in (one for one in self.score if one in self.drawn):
            if same := tuple(arm for arm in self.arms if arm in SAME[score]):
                found.setdefault(same, []).append(score)
        said = [f"{', '.join(same)} of {', '.join(scores)}" for same, scores in found.items()]
        return f"{'; '.join(said)}: left out, draws from the ticket's own law" if said else ""

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        if not cell.level or cell.arm == COLLAPSE:
            return ()
        if cell.arm in ("shuffle", "reinit"):
            return (Cell(cell.seed, "ticket", cell.level),)
        if self.score_of(cell) != IMP:
            return ()
        number = self.round(cell)
        return (replace(cell, draw=number - 1) if number > 1 else Cell(cell.seed, "ticket", 0),)

    def urgency(self, cell: Cell) -> tuple[int, int]:
        """What others wait for first: dense networks and imp's rounds, then tickets, then their checks."""
        imp = cell.arm == "ticket" and self.score_of(cell) in (None, IMP)
        return 0 if imp else 1 if cell.arm == "ticket" else 2, cell.level

    def start_step(self, cell: Cell) -> int:
        return self.recipe.steps if cell.arm == COLLAPSE else 0

    def keep_step(self, cell: Cell) -> int | None:
        return None if cell.level else 0

    # ---- how many weights stay

    @cached_property
    def whole(self) -> dict[str, int]:
        """The weights that are not pruned, by name."""
        from sparselth.pruning import excluded

        params = self.network.params
        names = excluded(params, self.exclude)
        return {spec.name: spec.numel for spec in params.weights if spec.name in names}

    @property
    def ranked(self) -> int:
        """How many weights a score ranks."""
        return self.network.params.prunable - sum(self.whole.values())

    def rung_of(self, sparsity: float) -> dict[str, int]:
        """What is left at a sparsity of the weights that are ranked."""
        from sparselth.pruning import rounded

        return {"all": self.ranked - rounded(sparsity * self.ranked)} | self.whole

    def rounds(self, level: int) -> int:
        """Rounds of imp to a level, each of which prunes `rate` or less."""
        keep = self.rung_of(self.points[level][1])["all"] / self.ranked
        rounds = min(math.log(keep) / math.log1p(-self.rate), 1e9)  # of the least rates it is infinite
        return max(1, math.ceil(rounds - 1e-9))

    def round(self, cell: Cell) -> int:
        return cell.draw or self.rounds(cell.level)

    def rung_at(self, cell: Cell) -> dict[str, int]:
        """What is left in a cell."""
        first = {"all": self.ranked} | self.whole
        if not cell.level or cell.arm == COLLAPSE:
            return first
        last = self.rung_of(self.points[cell.level][1])
        if not cell.draw:
            return last
        from sparselth.pruning import schedule

        return schedule(first, last, self.rounds(cell.level))[cell.draw - 1]

    @cached_property
    def _rungs(self) -> list[dict[str, int]]:
        """All that cells have left, the dense network first."""
        some = {self.rung_at(cell)["all"] for cell in self.cells()} | {self.ranked}
        return [{"all": n} | self.whole for n in sorted(some, reverse=True)]

    def rungs(self) -> list[dict[str, int]]:
        return self._rungs

    def rung(self, cell: Cell) -> int:
        return self._rungs.index(self.rung_at(cell))

    # ---- what a cell computes

    @property
    def autograd(self) -> bool:
        from sparselth.scores import SCORES

        return super().autograd or any(name != IMP and SCORES[name].autograd for name in self.score)

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        from sparselth.experiments.at_init_jobs import start

        return start(self, cell, place)

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        from sparselth.experiments.at_init_jobs import collapsed, trained

        return collapsed(self, cells, place) if self.collapse else trained(self, cells, place)

    def beforehand(self, data: Resident) -> dict[Cell, float]:
        from sparselth.experiments.at_init_jobs import seconds_of_masks

        return seconds_of_masks(self, data)

    # ---- what is said of it

    @property
    def folder(self) -> str:
        own = "at-init-collapse" if self.collapse else self.name
        return f"{own}-{short(self.model)}-{short(self.dataset)}-{self.digest}"

    @property
    def title(self) -> str:
        from sparselth.report.stats import seeds_named

        seeds = seeds_named(self.seeds)
        what = "collapse" if self.collapse else f"{self.recipe.steps:,} steps"
        return f"{', '.join(self.score)} at initialisation of {self.model} on {self.dataset}, {seeds}, {what}"

    @property
    def method(self) -> str:
        """How the networks are pruned, in a line."""
        whole = f"; {', '.join(self.exclude)} not at all" if self.exclude else ""
        return f"pruned before training, ranked over all layers{whole}"

    def about(self, cell: Cell) -> str:
        if not cell.level:
            return "dense"
        turn = f", round {cell.draw} of {self.rounds(cell.level)}" if cell.draw else ""
        share = "" if cell.arm == COLLAPSE else f", {100 * self.remaining()[self.rung(cell)]:.1f} %"
        return f"{self.points[cell.level][0]}{share}{turn}"

    def said(self, line: dict[str, Any]) -> str:
        if "largest_compression" in line:
            return f"{line['score']}: {line['largest_compression']:,.1f} times"
        name = f"{line['score']} " if line["score"] else ""
        return f"{name}{100 * line['weights_remaining']:.1f} %: test {100 * line['final_accuracy']:.2f} %"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        found = {"model": rows.pop("model"), "pruning": f"by {', '.join(self.score)}; {self.method}"}
        if self.collapse:
            del rows["training"]
            return found | rows
        shares = ", ".join(f"{100 * self.rung_of(one)['all'] / self.ranked:.3g}" for one in self.sparsity)
        found["left"] = f"{shares} %" + (
            f"; imp in rounds of {100 * self.rate:g} %" if IMP in self.score else ""
        )
        found["arms"] = "; ".join(filter(None, [", ".join(self.arms), self.left_out]))
        return found | rows
