"""Iterative magnitude pruning with rewinding, and the control arms (Frankle & Carbin 2019; 2020).

    level 0   train the dense network; keep its weights of the rewind step
    level k   prune the trained weights of the ticket at level k - 1, go back to the kept weights,
              train what is left

A control arm at level k needs nothing but the ticket at level k - 1, so it trains beside the ticket of
level k. `ticket` and `random-mask` go on from the rewind step, with the learning rate of that step, a
fresh optimizer and a data order of their own; arms with fresh weights train the full budget from step 0.
One-shot pruning takes every level's mask from the dense network.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparselth.config import INPUTS, SCOPES, Cell, Recipe, at_least, option
from sparselth.errors import UsageError
from sparselth.experiments.arms import ARMS, RandomMask
from sparselth.experiments.base import Place, register
from sparselth.experiments.training import Training
from sparselth.models import Model, get_model
from sparselth.patterns import UNSTRUCTURED, Groups, get_pattern, in_words, known
from sparselth.user_files import short

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images
    from sparselth.runs import RunRecord


MOST_LEVELS, MOST_CELLS = 10_000, 1_000_000
PER_CLASS = 10  # training images that a score sees of every class, in the mean


def _scores() -> Collection[str]:
    from sparselth.scores import SCORES

    return SCORES


def _share(rate: float) -> str | None:
    expected = "expected a number between 0 and 1, the share of the remaining weights that one level prunes"
    return None if 0 < rate < 1 else expected


def _arms(arms: tuple[str, ...]) -> str | None:
    if "ticket" not in arms:
        return "'ticket' is missing, and every other arm controls for it"
    return None if len(set(arms)) == len(arms) else "an arm is named twice"


@register
@dataclass(frozen=True, kw_only=True)
class ImpConfig(Training):
    """Find winning tickets by iterative magnitude pruning, beside their controls.

    Trains the dense network, prunes its smallest weights, rewinds the rest and repeats (Frankle & Carbin
    2019). Each level's ticket is compared with the same mask on fresh weights (reinit) and the same
    weights under a shuffled mask (random-mask). Ends with a table, figures and a folder that `sparselth
    show` reads; a run that was stopped goes on with `resume`.
    """

    name: ClassVar[str] = "imp"
    words: ClassVar[str] = "sparselth.report.tables"
    figures: ClassVar[str] = "sparselth.report.figures"
    ticket: ClassVar[str] = "ticket"  # the arm whose cells are pruned

    arms: tuple[str, ...] = option(
        ("ticket", "reinit", "random-mask"),
        "What is trained under a level's mask; see `sparselth ls arms`.",
        _arms,
        ARMS,
        ordered=False,
        extends=True,
    )
    levels: int = option(
        8,
        "Turns of train and prune after the dense network.",
        at_least(1, "level 0 is the dense network and always runs", MOST_LEVELS),
        extends=True,
    )
    rate: float = option(0.2, "Share of the remaining weights that one level prunes.", _share)
    scope: Literal["layer", "global"] = option(
        "layer", "Rank weights within each layer, at the paper's rates; or all together.", choices=SCOPES
    )
    exclude: tuple[str, ...] = option(
        None,
        "Weights that are not pruned, by name, layer or glob: fc1,conv1*.  [default: under scope global "
        "what the papers leave out, shortcuts and the output layer of vgg and resnet; else none]",
        ordered=False,
        added=True,
        before=(),
    )
    score: str = option(
        "magnitude", "What ranks the weights; see `sparselth ls scores`.", choices=_scores, added=True
    )
    pattern: str = option(
        UNSTRUCTURED,
        "How weights are pruned: unstructured, one by one; 2:4, the best 2 of every 4 in a row, once; "
        "block:16, blocks of 16 x 16; unit, whole neurons or filters.",
        known,
        added=True,
    )
    one_shot: bool = option(False, "Prune the dense network straight to every level.")
    rewind: int = option(0, "Step whose weights a ticket goes back to: 500, or in epochs, 2ep.", epochs=True)
    reinits: int = option(
        1, "Fresh draws per ticket in arms with fresh weights.", at_least(1, most=1000), extends=True
    )

    def __post_init__(self) -> None:
        leave_out(self)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        steps = self.recipe.steps
        if not 0 <= self.rewind < steps:
            raise self.wrong(
                "rewind",
                f"expected a step from 0 to {steps - 1}, because training ends at step {steps}",
            )
        if self.reinits > 1 and not any(ARMS[arm].fresh for arm in self.arms):
            raise self.wrong("reinits", "has no effect without an arm of fresh weights; add reinit to `arms`")
        for arm in self.arms:
            ARMS[arm].recipe(self.recipe)
        self.check_pattern()
        self.cells()
        check_rungs(self)

    def check_pattern(self) -> None:
        if (pattern := get_pattern(self.pattern)) is None:
            return
        if self.pattern == "2:4" and self.levels > 1:
            raise self.wrong("levels", "2:4 keeps half of the weights, once; expected 1")
        from sparselth.pruning import excluded

        params = self.network.params
        whole = pattern.whole(params, self.exclude)
        if len(whole) + len(excluded(params, self.exclude)) == len(params.weights):
            said = "; ".join(f"{name}: {why}" for name, why in whole.items())
            raise self.wrong("pattern", f"fits no layer of {self.model} ({said})")

    def cells(self) -> list[Cell]:
        """Level 0 exists once a seed, as a ticket; UsageError where there are too many to be listed."""
        draws = sum(self.reinits if ARMS[arm].fresh else 1 for arm in self.arms)
        if (number := len(self.seeds) * self.levels * draws) > MOST_CELLS:
            raise UsageError(
                f"`levels` {self.levels}: with these `seeds`, `arms` and `reinits` there are {number:,} "
                f"networks to train; expected at most {MOST_CELLS:,}"
            )
        return [
            Cell(seed, arm, level, draw)
            for seed in self.seeds
            for arm in self.arms
            for level in range(0 if arm == "ticket" else 1, self.levels + 1)
            for draw in range(self.reinits if ARMS[arm].fresh else 1)
        ]

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        """The network that is pruned."""
        return (self.pruned(cell),) if cell.level else ()

    def pruned(self, cell: Cell) -> Cell:
        """The network whose trained weights tell the mask of a cell above level 0: a ticket, or its own."""
        level = 0 if self.one_shot else cell.level - 1
        return Cell(cell.seed, cell.arm if level and ARMS[cell.arm].alone else self.ticket, level)

    def urgency(self, cell: Cell) -> tuple[bool, int]:
        """Tickets first, because everything waits for them; then by level."""
        return cell.arm != "ticket", cell.level

    def start_step(self, cell: Cell) -> int:
        return ARMS[cell.arm].start_step(self.rewind) if cell.level else 0

    def recipe_of(self, cell: Cell) -> Recipe:
        return ARMS[cell.arm].recipe(self.recipe) if cell.level else self.recipe

    def keep_step(self, cell: Cell) -> int | None:
        return None if cell.level else self.rewind

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        return find_mask(self, place, cell), start_weights(self, place, cell)

    @property
    def autograd(self) -> bool:
        from sparselth.scores import SCORES

        return super().autograd or SCORES[self.score].autograd

    def rungs(self) -> list[dict[str, int]]:
        from sparselth.pruning import ladder

        if pattern := get_pattern(self.pattern):
            return pattern.ladder(self.network.params, self.levels, self.rate, self.scope, self.exclude)
        return ladder(self.network.params, self.levels, self.rate, self.scope, self.exclude)

    # ---- what is said of it

    @property
    def folder(self) -> str:
        return f"{short(self.model)}-{short(self.dataset)}-{self.digest}"

    @property
    def title(self) -> str:
        from sparselth.report.stats import seeds_named

        seeds = seeds_named(self.seeds)
        return (
            f"{self.model} on {self.dataset}, {self.levels} level{'s' * (self.levels > 1)}, {seeds}, "
            f"{self.recipe.steps:,} steps, {self.method}"
        )

    @property
    def method(self) -> str:
        """How the networks are pruned, in a line."""
        how, scope = "one-shot" if self.one_shot else "iterative", "by layer"
        if self.scope == "global":
            scope = "over all layers"
        if self.pattern != UNSTRUCTURED:
            scope = f"{scope} in {in_words(self.pattern)}"
        draws = f", {self.reinits} fresh draws" if self.reinits > 1 else ""
        rewind = f"rewound to step {self.rewind:,}"
        if self.recipe.inputs != "standard":
            draws += f", {INPUTS[self.recipe.inputs]}"
        if self.pattern == "2:4":
            return f"pruning by {self.score}, the best 2 of every 4 in a row, {rewind}{draws}"
        return f"{how} pruning by {self.score}, {100 * self.rate:g} % a level {scope}, {rewind}{draws}"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        cells, training = rows.pop("cells"), rows.pop("training")
        seeds, _, number = cells.rpartition("; ")
        return rows | {
            "pruning": self.method + self._slower(),
            "levels": self._levels(),
            "arms": f"{', '.join(self.arms)}; {seeds}; {number}",
            "training": training,
        }

    def _slower(self) -> str:
        """Which layers are pruned at another rate, or not at all."""
        whole = f"; {', '.join(self.exclude)} not at all" if self.exclude else ""
        weights, odd = self.network.params.weights, dict[str, str]()
        if pattern := get_pattern(self.pattern):
            odd = pattern.whole(self.network.params, self.exclude)
            whole += f"; whole: {', '.join(f'{n} ({why})' for n, why in odd.items())}" if odd else ""
            if self.pattern == "2:4":
                return whole
        if self.scope == "global":
            return whole
        scales = sorted({s.rate_scale for s in weights if not s.output} - {1.0})
        slower = ["the output layer at half the rate"] * (
            not any(s.output and s.name in odd for s in weights)
        )
        of = "it" if slower else "the rate"
        slower += [f"convolutions at {scale:g} of {of}" for scale in scales]
        return (f"; {', '.join(slower)}" if slower else "") + whole

    def _levels(self) -> str:
        rungs = self.remaining()
        shown = rungs if len(rungs) <= 12 else [*rungs[:4], *rungs[-2:]]
        steps = [f"{100 * rung:.1f}" for rung in shown]
        if len(shown) < len(rungs):
            steps.insert(4, "...")
        return f"{self.levels} and dense: {' '.join(steps)} % left{self.uneven}"

    @property
    def uneven(self) -> str:
        """From which level on one may prune nothing, because the next unit may be too large; in words."""
        most = max(_sizes(self)) if self.scope == "global" else 1
        for level, (before, after) in enumerate(pairwise(self.rungs()), 1):
            if (going := sum(before.values()) - sum(after.values())) < most:
                return (
                    f"; from level {level} on a level may prune nothing: it has {going:,} weights to prune, "
                    f"and a unit has up to {most:,}"
                )
        return ""

    def draw(self, record: RunRecord, folder: Path) -> None:
        last, lines = folder / "pixels.svg", record.path / "cells.jsonl"  # pixels are drawn last
        if not last.exists() or last.stat().st_mtime_ns <= lines.stat().st_mtime_ns:
            super().draw(record, folder)


def leave_out(config: Any) -> None:
    """Set `exclude` of an experiment with `model` and `scope`, where it was not given."""
    if config.exclude is None:
        exempt = get_model(config.model).exempt if config.scope == "global" else ()
        object.__setattr__(config, "exclude", exempt)


def check_rungs(config: Any) -> None:
    """UsageError where a level of an experiment with `levels`, `rate` and `rungs` would prune nothing."""
    least = min(_sizes(config))
    for level, (before, after) in enumerate(pairwise(config.rungs()), 1):
        left = sum(before.values())
        going = left - sum(after.values())
        if going < least:
            what = f"no weight of the {left:,} that are left"
            if going:
                what = f"{going:,} weights, and the smallest unit has {least:,}"
            raise config.wrong(
                "levels",
                f"level {level} would prune nothing: at `rate` {config.rate:g} it rounds to {what}",
            )


def _sizes(config: Any) -> list[int]:
    """Weights that go at once, in each layer."""
    pattern = get_pattern(getattr(config, "pattern", UNSTRUCTURED))
    found = pattern.sizes(config.network.params, config.exclude) if isinstance(pattern, Groups) else []
    return found or [1]


def find_mask(config: ImpConfig, place: Place, cell: Cell) -> Tensor:
    """The mask [M] of a cell: its level's ticket, found in the trained ticket it needs, as its arm has it.

    Batch and draws of the score are the ticket's, so that all arms of a level have the same.
    """
    import torch

    from sparselth import pruning, scores, tickets
    from sparselth.engine.paths import choose
    from sparselth.runs import cell_path
    from sparselth.streams import drawing_apart, number, seed_everything, stream

    model, seed, level = config.network, cell.seed, cell.level
    if not level:
        return model.params.full_mask()
    before, _ = tickets.read(cell_path(place.run, config.pruned(cell)), model.params)
    weights, mask = (torch.from_numpy(array).to(config.device) for array in (before.weights, before.mask))
    scored, generator = scores.SCORES[config.score], stream(seed, "ticket", level, "score")
    batch = score_batch(model, place, seed, level) if scored.looks else scores.NOTHING
    with drawing_apart(config.device):  # a forward may draw, as dropout does
        seed_everything(number(seed, "ticket", level, "score forward"), config.device)
        found = scored.of(
            *(model, weights, mask, batch, generator),
            start=lambda: rewound_weights(config, place, cell).to(config.device),
        )
    arm, draw = ARMS[cell.arm], stream(seed, cell.arm, level, "mask", cell.draw)
    ranks, rung = scores.ranked(config.score, found, mask), config.rungs()[level]
    if pattern := get_pattern(config.pattern):
        mask = pattern.prune(model.params, found, mask, rung)
        shuffles = isinstance(arm, RandomMask)
        return pattern.shuffled(model.params, mask, draw) if shuffles else arm.mask(model.params, mask, draw)
    takes = choose(config.kernels, config.device).magnitude_threshold.takes
    kernels = "triton" if takes == "triton" else "reference"
    mask = pruning.prune(model.params, ranks, mask, rung, kernels).cpu()
    return arm.mask(model.params, mask, draw)


def score_batch(model: Model, place: Place, seed: int, level: int) -> tuple[Tensor, Tensor]:
    """Training images of a seed for the score of a level, x [B, C, H, W] and labels [B]."""
    import torch

    from sparselth.streams import stream

    data = place.data
    assert data is not None
    images, count = data.split(seed)[0], min(PER_CLASS * (model.classes or 10), data.n_train)
    order = torch.randperm(len(images), generator=stream(seed, "ticket", level, "score images"), device="cpu")
    x, y = data.shown(images[order[:count]])
    return x.reshape(count, *model.input), y


def start_weights(config: ImpConfig, place: Place, cell: Cell) -> Tensor:
    """The weights [P] a cell starts from, before its mask."""
    from sparselth.engine.dense import init_weights
    from sparselth.streams import stream

    model, generator = config.network, stream(cell.seed, cell.arm, cell.level, "init", cell.draw)
    if not cell.level:
        return init_weights(model, generator)
    arm = ARMS[cell.arm]
    before = trained_weights if arm.goes_on else rewound_weights
    return arm.weights(model, lambda: before(config, place, cell), generator)


def trained_weights(config: ImpConfig, place: Place, cell: Cell) -> Tensor:
    """The trained weights [P] that the mask of a cell above level 0 is found in."""
    import torch

    from sparselth import tickets
    from sparselth.runs import cell_path

    before, _ = tickets.read(cell_path(place.run, config.pruned(cell)), config.network.params)
    return torch.from_numpy(before.weights)


def rewound_weights(config: ImpConfig, place: Place, cell: Cell) -> Tensor:
    """The weights [P] of its seed's dense network at the rewind step."""
    import torch

    from sparselth import tickets
    from sparselth.runs import cell_path

    first, _ = tickets.read(cell_path(place.run, Cell(cell.seed, config.ticket, 0)), config.network.params)
    assert first.rewound is not None
    return torch.from_numpy(first.rewound)
