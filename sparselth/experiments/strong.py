"""Strong tickets: masks over weights that are never trained, beside a random mask and trained networks.

A level is the number of a point, a width of the network and a share of its weights that is kept:

    ticket       scores are trained; what they keep of the frozen weights is the network
    random-mask  as many of the same frozen weights, layer by layer, at random; nothing is trained
    dense        the weights are trained, all of them; once a width
    imp          as many weights as the strong ticket has in each layer, those of largest magnitude in the
                 trained network, rewound and trained, by rounds that keep half or more (Frankle & Carbin)
    NAME         a ticket by another method, on the same weights and for as many steps

Trained arms take the model's own recipe for as many steps as the scores are trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparselth.config import SCOPES, Cell, Recipe, at_least, like, option
from sparselth.errors import UsageError
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.training import Training
from sparselth.experiments.widths import WidthsAndShares
from sparselth.frozen import LAWS, METHODS, Frozen
from sparselth.models import MODELS, Model, get_model
from sparselth.models.module import ModuleModel, is_module
from sparselth.registry import Registry
from sparselth.spread import SPREADS
from sparselth.user_files import short

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images
    from sparselth.engine.state import Job

ARMS: Registry[str] = Registry("arm")  # of this experiment, and what they are
ARMS.add("ticket", "what the trained scores keep of frozen weights")
ARMS.add("random-mask", "as many of the same frozen weights at random")
ARMS.add("dense", "all weights, trained")
ARMS.add("imp", "as many weights as the ticket, found by magnitude, rewound and trained")
for _name in METHODS:
    ARMS.add(_name, "a ticket by that method")
TRAINED = ("dense", "imp")
MOST_CELLS = 100_000


def _arms(arms: tuple[str, ...]) -> str | None:
    if "ticket" not in arms:
        return "'ticket' is missing, and every other arm is compared with it"
    if "imp" in arms and "dense" not in arms:
        return "'dense' is missing, whose trained weights imp prunes"
    return None if len(set(arms)) == len(arms) else "an arm is named twice"


def _every(steps: int | None) -> str | None:
    return None if steps is None else at_least(0, "0 is never")(steps)


def _chance(share: float | None) -> str | None:
    return None if share is None or 0 <= share <= 1 else "expected a share from 0 to 1"


@register
@dataclass(frozen=True, kw_only=True)
class StrongConfig(WidthsAndShares):
    """Find strong tickets: subnetworks of a network whose weights are never trained.

    METHOD is how the mask is found: edge-popup, iterand, recycle, biprop, supermask or signed. Weights are
    drawn from a seed and stay; a score for each is trained, and the mask that the scores make is the network:
    a seed and one bit a weight. Goes over shares of weights kept and over widths, beside a random mask
    and beside trained networks. Ends with a table, figures and a folder that `sparselth show` reads; a run
    that was stopped goes on with `resume`.
    """

    name: ClassVar[str] = "strong"
    words: ClassVar[str] = "sparselth.report.strong"
    figures: ClassVar[str] = "sparselth.report.strong_figures"
    recipe_help: ClassVar[str] = "How long scores are trained: for minutes, or for 100 epochs as in papers."
    has_usual: ClassVar[bool] = False
    side_by_side: ClassVar[bool] = False

    method: str = option(
        "edge-popup", "How the mask is found; see `sparselth ls methods`.", choices=METHODS, argument=True
    )
    model: str = like(Training, "model", "lenet-300-100")
    seeds: tuple[int, ...] = like(Training, "seeds", (0, 1, 2))
    arms: tuple[str, ...] = option(
        ("ticket", "random-mask", "dense", "imp"),
        "ticket, and what it is compared with: random-mask, dense, imp (a trained ticket), other methods.",
        _arms,
        ARMS,
        ordered=False,
        extends=True,
    )
    law: str | None = option(
        None, "What weights are drawn from; Kaiming's laws.  [default: the method's]", choices=LAWS
    )
    scope: Literal["layer", "global"] = option(
        "layer", "Rank scores within each layer, or all together.", choices=SCOPES
    )
    spread: Literal["even", "root"] | None = option(
        None,
        "Keep the same share of every layer, or, root, larger shares of small ones.  [default: the method's]",
        choices=SPREADS,
        added=True,
        before="even",
    )
    every: int | None = option(
        None, "Steps between redraws (iterand) or recyclings.  [default: the method's]", _every
    )
    redraw: float | None = option(
        None,
        "Chance that a dropped weight is redrawn (iterand), or share that is recycled.  "
        "[default: the method's]",
        _chance,
    )

    def __post_init__(self) -> None:
        if self.method in METHODS:
            method = METHODS[self.method]
            own = {"keep": (method.keep,), "law": method.law, "every": method.every, "redraw": method.share}
            if self.spread is None and self.model in MODELS:
                own["spread"] = method.spread_over(self.network, self.scope)
            for name, value in own.items():
                if getattr(self, name) in (None, ()):
                    object.__setattr__(self, name, value)
        super().__post_init__()

    @classmethod
    def recipes(cls, values: Mapping[str, Any]) -> Mapping[str, Recipe]:
        """How scores are trained; "paper" is 100 epochs (Ramanujan et al. 2020, Chijiwa et al. 2021)."""
        from sparselth.data.sets import get_dataset, n_validation

        method, model = METHODS[values["method"]], get_model(values["model"])
        dataset = get_dataset(values["dataset"] or model.dataset)
        short, images = method.recipe(model.on(dataset)), dataset.n_train
        epoch = (images - n_validation(images)) / short.batch_size
        return {"short": short, "paper": replace(short, steps=max(1, int(100 * epoch)))}

    def check(self) -> None:
        super().check()
        if not is_module(self.model):
            self.refuse_autograd()
        method = METHODS[self.method]
        for name in ("every", "redraw"):
            if getattr(self, name) and not method.has_generations:
                others = " or ".join(other.name for other in METHODS.values() if other.has_generations)
                raise self.wrong(name, f"has no effect with {self.method}; use {others}")
        if self.spread == "root" and method.draws:
            raise self.wrong("spread", f"has no effect with {self.method}, which keeps by chance")
        if self.method in self.arms:
            raise self.wrong("arms", f"{self.method} is what the ticket is found by")
        try:
            assert all(model.weights for model in self.models)
        except UsageError as error:  # a width that leaves no unit
            raise self.wrong("width", str(error)) from error
        for keep in self.keep:
            self._frozen(self.method, self.seeds[0], keep)
        self.cells()

    # ---- cells

    def rounds(self, cell: Cell) -> int:
        """Rounds of pruning to a trained ticket, each of which keeps half or more; none that keeps all."""
        keep = self.points[cell.level][1]
        return math.ceil(math.log2(1 / keep) - 1e-9)

    def cells(self) -> list[Cell]:
        """A cell an arm, a width and a share; dense once a width; of imp each round, the last as draw 0."""
        points, found = len(self.width) * len(self.keep), list[Cell]()
        if (number := len(self.seeds) * len(self.arms) * points) > MOST_CELLS:
            raise UsageError(
                f"`seeds`: with these `keep`, `width` and `arms` there are {number:,} networks; "
                f"expected at most {MOST_CELLS:,}"
            )
        for seed in self.seeds:
            for arm in self.arms:
                for place in range(0, points, len(self.keep) if arm == "dense" else 1):
                    level = self.level_at(place, arm)
                    draws = range(self.rounds(Cell(seed, arm, level))) if arm == "imp" else (0,)
                    found += [Cell(seed, arm, level, draw) for draw in draws]
        return found

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        ticket = replace(cell, arm="ticket", draw=0)
        if cell.arm == "random-mask":
            return (ticket,)
        return (ticket, self._before(cell)) if cell.arm == "imp" else ()

    def _before(self, cell: Cell) -> Cell:
        """The trained network that a round prunes."""
        if (number := self._round(cell)) == 1:
            return Cell(cell.seed, "dense", self.first_level(self.points[cell.level][0]))
        return replace(cell, draw=number - 1)

    def _round(self, cell: Cell) -> int:
        return cell.draw or self.rounds(cell)

    def urgency(self, cell: Cell) -> tuple[bool, int]:
        """What others wait for first, wide networks before narrow ones."""
        return cell.arm in ("random-mask", "imp"), -self.place_of_width(cell)

    def start_step(self, cell: Cell) -> int:
        return self.recipe.steps if cell.arm == "random-mask" else 0

    # ---- what steps cost: of the widest network first, of scores before weights

    def rungs(self) -> list[dict[str, int]]:
        whole = [{spec.name: spec.numel for spec in model.weights} for model in self.models[::-1]]
        return whole * (2 if any(arm in TRAINED for arm in self.arms) else 1)

    def rung(self, cell: Cell) -> int:
        narrow = len(self.width) - 1 - self.place_of_width(cell)
        return narrow + (len(self.width) if cell.arm in TRAINED else 0)

    def timed_rungs(self, sparse: bool) -> list[int]:
        return [*range(len(self.rungs()))]

    def sample(self, rung: int, draw: int, device: str) -> tuple[Model, Job, Recipe]:
        from sparselth.engine.state import Job, State

        trained, narrow = divmod(rung, len(self.width))
        level = self.first_level(self.width[-1 - narrow])
        cell = Cell(self.seeds[0], "dense" if trained else "ticket", level, draw)
        model = self.model_of(cell)
        weights, mask = self._first(cell), model.params.full_mask().to(device)
        recipe = self.trained if trained else self.recipe
        frozen = None if trained else self.frozen(cell)
        state = State.start(weights[None].to(device), recipe)
        if frozen and METHODS[frozen.method].has_generations:
            import torch

            changes = torch.zeros(1, len(mask), dtype=torch.int32, device=device)
            state.generations, state.best_generations = changes, changes.clone()
        return model, Job(cell, state, mask, frozen=frozen), recipe

    # ---- what a cell computes

    @property
    def trained(self) -> Recipe:
        """How weights are trained: as the model's are, for as many steps and images as scores."""
        own, scores = next(iter(get_model(self.model).recipes.values())), self.recipe
        return replace(own, steps=scores.steps, batch_size=scores.batch_size, eval_every=scores.eval_every)

    def method_of(self, cell: Cell) -> str:
        """What a ticket is found by."""
        return cell.arm if cell.arm in METHODS else self.method

    def recipe_of(self, cell: Cell) -> Recipe:
        """How a cell is trained: every arm for as many steps, of as many images."""
        if cell.arm in TRAINED:
            return self.trained
        if cell.arm not in METHODS:
            return self.recipe
        own, scores = METHODS[cell.arm].recipe(self.network), self.recipe
        return replace(own, steps=scores.steps, batch_size=scores.batch_size, eval_every=scores.eval_every)

    def frozen(self, cell: Cell) -> Frozen:
        """How a cell's frozen weights are drawn and masked."""
        return self._frozen(self.method_of(cell), cell.seed, self.points[cell.level][1])

    def _frozen(self, method: str, seed: int, keep: float) -> Frozen:
        own = method == self.method  # another method redraws as it does by itself
        every, share = (self.every, self.redraw) if own else (None, None)
        spread = self.spread if own else METHODS[method].spread_over(self.network, self.scope)
        assert spread is not None
        return METHODS[method].frozen(
            seed, keep=keep, law=self.law, scope=self.scope, every=every, share=share, spread=spread
        )

    def _first(self, cell: Cell) -> Tensor:
        """What training starts from, [P]: scores, or weights of a network that is trained."""
        from sparselth.engine.dense import init_weights
        from sparselth.experiments.strong_jobs import unweighted
        from sparselth.streams import stream

        model = self.model_of(cell)
        if cell.arm in TRAINED:  # imp goes back to what dense began with
            return init_weights(model, stream(cell.seed, "dense", 0, "init"))
        generator = stream(cell.seed, "ticket", 0, "scores")
        found = METHODS[self.method_of(cell)].start(self.frozen(cell), model.params, generator)
        if isinstance(model, ModuleModel):
            unweighted(model, cell.seed, found)
        return found

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        mask = self._pruned(cell, place) if cell.arm == "imp" else self.model_of(cell).params.full_mask()
        return mask, self._first(cell)

    def _pruned(self, cell: Cell, place: Place) -> Tensor:
        """The mask of a round of imp: in every layer its share of the way to what the strong ticket keeps."""
        import torch

        from sparselth import pruning, strong_tickets, tickets
        from sparselth.runs import cell_path

        params, number, rounds = self.model_of(cell).params, self._round(cell), self.rounds(cell)
        ticket, before = self.needs(cell)
        kept = strong_tickets.read(cell_path(place.run, ticket), params)[0].kept(params)
        trained, _ = tickets.read(cell_path(place.run, before), params)
        weights, mask = torch.from_numpy(trained.weights), torch.from_numpy(trained.mask)
        there, rung = params.kept(mask), dict[str, int]()
        for spec in params.weights:
            way = spec.numel * (kept[spec.name] / spec.numel) ** (number / rounds)
            rung[spec.name] = min(there[spec.name], max(kept[spec.name], round(way)))
        return pruning.prune(params, weights[: params.mask_size], mask, rung, "reference")

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        found = list[Finished | Diverged]()
        kinds = dict[tuple[str, str], list[Cell]]()
        for cell in cells:
            kind = "trained" if cell.arm in TRAINED else cell.arm
            kinds.setdefault((self.model_of(cell).name, kind), []).append(cell)
        for (_, kind), some in kinds.items():
            done = self._compute(self.model_of(some[0]), kind, some, place)
            if done is None:
                return found or None
            found += done
        return found

    def _compute(
        self, model: Model, kind: str, cells: list[Cell], place: Place
    ) -> Sequence[Finished | Diverged] | None:
        """Cells of one network that train alike."""
        from sparselth.experiments.jobs import job, train
        from sparselth.experiments.strong_jobs import measured, strong, weak

        if kind == "random-mask":
            return measured(self, model, cells, place)
        recipe, scored = self.recipe_of(cells[0]), kind != "trained"
        jobs = [
            job(
                *(cell, place, recipe, self.start(cell, place), 0, None),
                self.frozen(cell) if scored else None,
            )
            for cell in cells
        ]
        finish = strong(self) if scored else weak(self)
        return train(model, jobs, recipe, self.kernels, place, self.where(model), finish)

    def where(self, model: Model) -> dict[str, Any]:
        """What a file says of where it is from, beside its cell."""
        return {
            "model": model.name,
            "dataset": self.dataset,
            "config": self.digest,
            "cell": "",  # each its own
            "rewind_step": 0,
        }

    # ---- what is said of it

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.method}-{short(self.model)}-{short(self.dataset)}-{self.digest}"

    @property
    def title(self) -> str:
        from sparselth.report.stats import seeds_named

        seeds = seeds_named(self.seeds)
        return f"{self.method} of {self.model} on {self.dataset}, {seeds}, {self.recipe.steps:,} steps"

    @property
    def how(self) -> str:
        """How weights are drawn and masked, in a line."""
        redraws = ""
        if METHODS[self.method].has_generations and self.every:
            done = "recycled" if self.method == "recycle" else "redrawn"
            redraws = f", {100 * (self.redraw or 0):g} % {done} every {self.every:,} steps"
        ranked = "by layer" if self.scope == "layer" else "over all layers"
        ranked += ", more of small ones" if self.spread == "root" else ""
        return f"{self.method}, {self.law} weights, ranked {ranked}{redraws}"

    def about(self, cell: Cell) -> str:
        width, keep = self.point(cell)
        turn = f", round {cell.draw} of {self.rounds(cell)}" if cell.draw else ""
        return (f"width {width:g}, " if len(self.width) > 1 else "") + f"{100 * keep:g} %{turn}"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        shares, widths = (", ".join(f"{one:g}" for one in each) for each in (self.keep, self.width))
        own = f"{self.trained.optimizer}, lr {self.trained.lr:g}"
        rows["training"] = f"scores: {rows['training']}" + (
            f"; weights: with {own}" if any(arm in TRAINED for arm in self.arms) else ""
        )
        found = {
            "method": self.how,
            "points": f"keep {shares}; width {widths}",
            "arms": ", ".join(self.arms),
        }
        return {"model": rows.pop("model")} | found | rows
