"""From which step on do rewound tickets beat the same masks on fresh weights (Frankle et al. 2020)?

    dense       trained once a seed: the network whose trained weights tell the first mask of every step
    start-k     its first k steps once more, to the same bits on a CPU: the weights that tickets go back to
    ticket-k    level by level the mask found in what ticket-k trained before, on the weights of step k
    reinit-k    the mask of ticket-k on fresh weights, the whole budget from step 0 on

Tickets go on from step k with its learning rate and a fresh optimizer, as those of `imp` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sparselth.config import INPUTS, Cell, Recipe, like, option
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.rewound import START, Rewound, levels_from
from sparselth.experiments.training import counted

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images
    from sparselth.engine.state import Job
    from sparselth.models import Model
    from sparselth.runs import RunRecord

DENSE, TICKET, REINIT = "dense", "ticket", "reinit"  # before the rewind step in an arm


@dataclass(frozen=True, kw_only=True)
class _Imp(ImpConfig):
    """The tickets of one rewind step, as `imp` finds their masks."""

    step: int = 0

    def pruned(self, cell: Cell) -> Cell:
        level = 0 if self.one_shot else cell.level - 1
        return Cell(cell.seed, f"{TICKET}-{self.step}" if level else DENSE, level)


@register
@dataclass(frozen=True, kw_only=True)
class RewindingConfig(Rewound):
    """From which step on do tickets that are rewound to it beat the same masks on fresh weights?

    Trains the dense network once, and from each of several of its steps a chain of tickets, pruned and
    rewound to that step level by level, beside their masks on fresh weights (Frankle et al. 2020). Ends with
    a table, a figure, and the step from which on tickets win; `sparselth show` reads the folder, and a run
    that was stopped goes on with `resume`.
    """

    name: ClassVar[str] = "rewinding"
    words: ClassVar[str] = "sparselth.report.rewinding"
    figures: ClassVar[str] = "sparselth.report.rewinding"

    levels: tuple[int, ...] = option(
        (3, 7),
        "Levels of pruning that are compared; tickets in between are trained alone.",
        levels_from(1),
        ordered=False,
        extends=True,
    )
    score: str = like(ImpConfig, "score")
    one_shot: bool = like(ImpConfig, "one_shot")
    reinits: int = like(ImpConfig, "reinits", help="Fresh draws per ticket.")

    def check(self) -> None:
        super().check()
        from sparselth.scores import SCORES

        if SCORES[self.score].start:
            raise self.wrong(
                "score", "compares with the weights of one rewind step, and here are several; use magnitude"
            )
        self.imp(0).check()

    def imp(self, step: int) -> _Imp:
        """How the masks of a rewind step's tickets are found."""
        names = "model dataset seeds rate scope exclude score one_shot recipe device kernels eval_images code"
        same = {name: getattr(self, name) for name in names.split()}
        return _Imp(**same, step=step, levels=max(self.levels), arms=("ticket", "reinit"))

    # ---- cells

    def cells(self) -> list[Cell]:
        """Dense and starts, tickets of every level there must be, fresh weights of those compared."""
        found = list[Cell]()
        tickets = self.levels if self.one_shot else range(1, max(self.levels) + 1)
        for seed in self.seeds:
            found.append(Cell(seed, DENSE, 0))
            for k in self.rewind:
                found += [Cell(seed, f"{START}-{k}", 0)] * (k > 0)
                found += [Cell(seed, f"{TICKET}-{k}", level) for level in tickets]
                found += [
                    Cell(seed, f"{REINIT}-{k}", level, draw)
                    for level in self.levels
                    for draw in range(self.reinits)
                ]
        return found

    def start_of(self, cell: Cell) -> Cell:
        """Who keeps the weights that a ticket goes back to."""
        return Cell(cell.seed, f"{START}-{self.step_of(cell)}", 0)

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        if not cell.level:
            return ()
        k = self.step_of(cell)
        begun = (self.start_of(cell),) if k and self.kind(cell) == TICKET else ()
        return (*begun, self.imp(k).pruned(cell))

    def urgency(self, cell: Cell) -> tuple[bool, int]:
        """Fresh weights last: nobody waits for them."""
        return self.kind(cell) == REINIT, cell.level

    def start_step(self, cell: Cell) -> int:
        """Where training starts, as the price counts it: its steps are those until the end."""
        steps, k = self.recipe.steps, self.step_of(cell)
        return {START: steps - k, TICKET: k}.get(self.kind(cell), 0)

    def recipe_of(self, cell: Cell) -> Recipe:
        from sparselth.experiments.connectivity_jobs import Begun

        if self.kind(cell) != START:
            return self.recipe
        return Begun(**vars(self.recipe) | {"steps": self.step_of(cell), "whole": self.recipe})

    @property
    def autograd(self) -> bool:
        from sparselth.scores import SCORES

        return super().autograd or SCORES[self.score].autograd

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        import torch

        from sparselth import tickets
        from sparselth.engine.dense import init_weights
        from sparselth.experiments.imp import find_mask
        from sparselth.runs import cell_path
        from sparselth.streams import stream

        model, kind, k = self.network, self.kind(cell), self.step_of(cell)
        mask = find_mask(self.imp(k), place, Cell(cell.seed, "ticket", cell.level))
        if kind == REINIT:
            draw = stream(cell.seed, cell.arm, cell.level, "init", cell.draw)
            return mask, init_weights(model, draw)
        if kind == TICKET and k:
            begun, _ = tickets.read(cell_path(place.run, self.start_of(cell)), model.params)
            return mask, torch.from_numpy(begun.weights)
        return mask, init_weights(model, stream(cell.seed, "ticket", 0, "init"))

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        """Train cells of one recipe together; what is finished when stopped counts."""
        from sparselth.experiments.jobs import finished, job, train

        where = {"model": self.model, "dataset": self.dataset, "config": self.digest, "cell": ""}

        def finish(
            model: Model, one: Job, place: Place, where: dict[str, Any], at_early_stop: float, final: float
        ) -> Finished:
            about = {"rewind_step": self.step_of(one.who)}
            done = finished(model, one, place, where | about, at_early_stop, final)
            return replace(done, line=about | done.line)

        found: list[Finished | Diverged] = []
        recipes = {cell: self.recipe_of(cell) for cell in cells}
        for recipe in dict.fromkeys(recipes.values()):
            jobs = []
            for cell in (cell for cell in cells if recipes[cell] == recipe):
                begun = self.step_of(cell) if self.kind(cell) == TICKET else None  # its file keeps that, too
                one = job(cell, place, recipe, self.start(cell, place), begun or 0, begun)
                if not cell.level:  # on the path of `imp`'s dense network
                    one.draws = Cell(cell.seed, "ticket", 0)
                jobs.append(one)
            done = train(self.network, jobs, recipe, self.kernels, place, where, finish)
            if done is None:
                return found or None
            found += done
        return found

    # ---- what is said of it

    @property
    def method(self) -> str:
        """How the tickets are pruned, in a line."""
        how = "one-shot" if self.one_shot else "iterative"
        scope = "over all layers" if self.scope == "global" else "by layer"
        inputs = "" if self.recipe.inputs == "standard" else f", {INPUTS[self.recipe.inputs]}"
        return f"{how} pruning by {self.score}, {100 * self.rate:g} % a level {scope}{inputs}"

    @property
    def title(self) -> str:
        from sparselth.report.stats import seed_list

        steps = ", ".join(f"{k:,}" for k in self.rewind)
        return (
            f"{self.model} on {self.dataset}, rewound to {steps} of {self.recipe.steps:,} steps, seeds "
            f"{seed_list(self.seeds)}"
        )

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        seeds = f"seeds {', '.join(map(str, self.seeds))}"
        rows["cells"] = f"{seeds}; {counted(len(self.cells()), finished)}"
        left = ", ".join(f"{100 * self.remaining()[level]:.1f}" for level in self.levels)
        steps = ", ".join(f"{k:,}" for k in self.rewind)
        more = {"pruning": f"{self.method}; compared at {left} % left", "rewind": f"step {steps}"}
        return {"model": rows.pop("model")} | more | rows

    def told(self, record: RunRecord) -> list[dict[str, Any]]:
        """Dense, and what is compared at the levels that are."""
        kinds = {cell: self.kind(cell) for cell in map(Cell.of, record.points)}
        return [
            point
            for point in record.points
            if kinds[Cell.of(point)] == DENSE
            or (kinds[Cell.of(point)] in (TICKET, REINIT) and point["level"] in self.levels)
        ]
