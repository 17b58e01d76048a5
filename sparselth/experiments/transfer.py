"""Tickets on another data set, network or recipe than their own (Morcos et al. 2019, arXiv:1906.02773).

At every level, of the source's seeds,

    own          the target's own ticket, found by pruning on the target as the source was pruned
    ticket       the source's mask and its weights of the rewind step
    mask         the source's mask on the target's own weights, which are those of `own`
    random-mask  the source's mask shuffled within each layer, by its groups if any, on the same weights

Level 0 is the target's dense network, an `own`. Every arm goes on from the rewind step. Between networks
masks are carried as `sparselth.elastic` says; weights only where widths are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from sparselth.config import Cell, Recipe, at_least, like, option
from sparselth.errors import UsageError
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.imp import MOST_LEVELS, ImpConfig, check_rungs
from sparselth.experiments.source import FromRun
from sparselth.experiments.training import Training
from sparselth.models import MODELS, get_model
from sparselth.patterns import UNSTRUCTURED, get_pattern
from sparselth.registry import Registry
from sparselth.user_files import short

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images
    from sparselth.elastic import Pair

ARMS: Registry[str] = Registry("arm")  # of this experiment, and what they are
ARMS.add("own", "the target's own ticket")
ARMS.add("ticket", "the source's mask and weights")
ARMS.add("mask", "the source's mask on the target's own weights")
ARMS.add("random-mask", "the source's mask shuffled within each layer, on the same weights")


def _arms(arms: tuple[str, ...]) -> str | None:
    if "own" not in arms:
        return "'own' is missing, and every other arm is compared with it"
    return None if len(set(arms)) == len(arms) else "an arm is named twice"


class _Own(ImpConfig):
    """How the target's own tickets are found: as the source's were."""

    ticket = "own"


@register
@dataclass(frozen=True, kw_only=True)
class TransferConfig(FromRun, Training):
    """Train tickets of a run on another data set, network or recipe, beside the target's own.

    --from is a finished run of imp, --to the data set its tickets are trained on. Masks, alone and with their
    weights, are compared with tickets found on the target in this run and with random masks of the same
    layer-wise counts. What is not said of the target is as it was in the source. Ends with a table, a figure
    and a folder that `sparselth show` reads.
    """

    name: ClassVar[str] = "transfer"
    words: ClassVar[str] = "sparselth.report.transfer"
    figures: ClassVar[str] = "sparselth.report.transfer"
    recipe_names: ClassVar[tuple[str, ...]] = ("source", "short", "paper")
    recipe_help: ClassVar[str] = "How networks are trained: as the source's, within minutes, or as in papers."
    has_usual: ClassVar[bool] = False

    source: str = option("", "Folder of the run of `imp` whose tickets are taken.", also="from")
    model: str = option(
        "",
        "The network they are put into; see `sparselth ls models`.  [default: the source's]",
        also="to-model",
        choices=MODELS,
    )
    dataset: str = option(
        "",
        "The data set they are trained on; see `sparselth ls datasets`.  [default: the source's]",
        also="to",
        choices=Training.__dataclass_fields__["dataset"].metadata["choices"],
    )
    seeds: tuple[int, ...] = like(
        Training, "seeds", None, "Of the source's seeds, 3, 0-4 or 0,2,5.  [default: all]"
    )
    arms: tuple[str, ...] = option(
        None,
        "own, and what it is compared with: ticket, mask, random-mask.  "
        "[default: all; without ticket where widths differ]",
        _arms,
        ARMS,
        ordered=False,
        extends=True,
    )
    levels: int = option(
        None,
        "Tickets up to this level.  [default: the source's levels]",
        at_least(1, most=MOST_LEVELS),
        extends=True,
    )
    rewind: int = option(
        None, "Step that tickets go back to on the target: 500, or 2ep.  [default: the source's]", epochs=True
    )

    # the pattern that they are shuffled in: the source's, in runs before this field single weights
    random_masks: str = option(None, added=True, before=UNSTRUCTURED)

    # ---- what is not said is the source's

    def take(self, imp: ImpConfig) -> None:
        found: dict[str, Any] = {"seeds": imp.seeds, "levels": imp.levels, "rewind": imp.rewind}
        found["random_masks"] = imp.pattern
        if not self.model:
            object.__setattr__(self, "model", imp.model)
        if not self.dataset and get_model(self.model).input == get_model(imp.model).input:
            object.__setattr__(self, "dataset", imp.dataset)
        for name, value in found.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.arms is None:
            from sparselth.elastic import differing

            without = ("ticket",) if differing(self.pairs) else ()
            object.__setattr__(self, "arms", tuple(arm for arm in ARMS if arm not in without))

    @classmethod
    def recipes(cls, values: Mapping[str, Any]) -> Mapping[str, Recipe]:
        """The source's where the network is its own at any width, else the network's first; and its own."""
        imp = _source(values)
        model = values["model"] or (imp.model if imp else Training.model)
        own = get_model(model).recipes
        first = imp.recipe if imp and _base(imp.model) == _base(model) else next(iter(own.values()))
        return {"source": first} | dict(own)

    def check(self) -> None:
        if not self.source:
            FromRun.check(self)
        super().check()
        steps = self.recipe.steps
        if not 0 <= self.rewind < steps:
            raise self.wrong("rewind", f"expected a step from 0 to {steps - 1}; training ends at {steps}")
        self._check_shapes()
        self._own.check_pattern()
        check_rungs(self._own)

    def _check_shapes(self) -> None:
        from sparselth.elastic import differing

        if "ticket" in self.arms and (odd := differing(self.pairs)):
            raise self.wrong(
                "arms",
                f"ticket: {odd.target.name} is {list(odd.target.shape)} here and {list(odd.source.shape)} in "
                "the source; weights are carried where widths are equal, masks alone where they differ",
            )

    @cached_property
    def pairs(self) -> list[Pair]:
        """Which layer of the source each layer takes after; UsageError where networks are too different."""
        from sparselth.elastic import align

        return align(self.imp.network.params, self.network.params)

    @cached_property
    def _own(self) -> ImpConfig:
        """The experiment that finds the target's own tickets."""
        imp = self.imp
        values = {f.name: getattr(imp, f.name) for f in fields(imp)}
        mine = ("model", "dataset", "seeds", "levels", "rewind", "recipe", "device", "kernels", "eval_images")
        values |= {name: getattr(self, name) for name in (*mine, "code")}
        values |= {"arms": ("ticket",), "reinits": 1}
        if self.model != imp.model:
            values["exclude"] = None  # what the papers leave out of this network
        return _Own(**values)

    # ---- cells

    def cells(self) -> list[Cell]:
        """Level 0 exists once a seed, as an `own`."""
        return [
            Cell(seed, arm, level)
            for seed in self.seeds
            for arm in self.arms
            for level in range(0 if arm == "own" else 1, self.levels + 1)
        ]

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        if cell.arm == "own":
            return (self._own.pruned(replace(cell, arm="ticket")),) if cell.level else ()
        return (Cell(cell.seed, "own", 0),) if self.rewind and cell.arm != "ticket" else ()

    def source_cells(self) -> list[Cell]:
        return [Cell(seed, "ticket", level) for seed in self.seeds for level in range(1, self.levels + 1)]

    def urgency(self, cell: Cell) -> tuple[bool, int]:
        return cell.arm != "own", cell.level

    def start_step(self, cell: Cell) -> int:
        return self.rewind if cell.level else 0

    def keep_step(self, cell: Cell) -> int | None:
        return None if cell.level else self.rewind

    @property
    def autograd(self) -> bool:
        return super().autograd or (bool(self.source_config) and self._own.autograd)

    def rungs(self) -> list[dict[str, int]]:
        return self._own.rungs()

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        import torch

        from sparselth import pruning
        from sparselth.elastic import carry_mask, carry_weights
        from sparselth.experiments.imp import find_mask
        from sparselth.streams import stream

        params, ticket = self.network.params, Cell(cell.seed, "ticket", cell.level)
        if cell.arm == "own":
            return find_mask(self._own, place, ticket), self._weights(cell, place)
        found = self.ticket(ticket)
        mask = torch.from_numpy(carry_mask(self.pairs, params, found.mask))
        if cell.arm == "random-mask":
            draw, pattern = stream(cell.seed, cell.arm, cell.level, "mask"), get_pattern(self.random_masks)
            shuffled = pattern.shuffled if pattern else pruning.shuffle
            mask = shuffled(params, mask, draw)
        weights = self._weights(cell, place)
        if cell.arm == "ticket":
            assert found.rewound is not None
            own = weights.numpy()
            theirs = carry_weights(self.pairs, self.imp.network.params, params, found.rewound, own)
            weights = torch.from_numpy(theirs)
        return mask, weights

    def _weights(self, cell: Cell, place: Place) -> Tensor:
        """The target's own weights [P] of a seed: drawn, or those of the rewind step."""
        from sparselth.engine.dense import init_weights
        from sparselth.experiments.imp import rewound_weights
        from sparselth.streams import stream

        if cell.level and self.rewind and cell.arm != "ticket":
            return rewound_weights(self._own, place, cell)
        return init_weights(self.network, stream(cell.seed, "own", 0, "init"))

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        done = super().compute(cells, place)
        where = {"source": self.origin, "target": self.aim}
        return done and [
            replace(one, line=where | one.line) if isinstance(one, Finished) else one for one in done
        ]

    # ---- what is said of it

    @property
    def origin(self) -> str:
        return f"{self.imp.model} on {self.imp.dataset}"

    @property
    def aim(self) -> str:
        return f"{self.model} on {self.dataset}"

    @property
    def folder(self) -> str:
        return f"{self.name}-{short(self.imp.dataset)}-{super().folder.removeprefix(f'{self.name}-')}"

    @property
    def title(self) -> str:
        from sparselth.report.stats import seed_list

        return (
            f"tickets of {self.origin} put to {self.aim}, {self.levels} levels, seeds "
            f"{seed_list(self.seeds)}, {self.recipe.steps:,} steps"
        )

    @property
    def method(self) -> str:
        """How tickets were found, in a line."""
        return self.imp.method

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        odd = [pair for pair in self.pairs if not pair.same_shape]
        carried = ""
        if odd or len(self.pairs) != len(self.imp.network.weights):
            carried = f"; carried to {len(self.pairs)} layers from {len(self.imp.network.weights)}"
            carried += f", {len(odd)} of other widths" if odd else ""
        return {"source": f"{self.origin}, {self.source}: {self.method}{carried}{self._own.uneven}"} | rows


def _base(model: str) -> str:
    """The name of a model without its width."""
    return model.partition("@")[0]


def _source(values: Mapping[str, Any]) -> ImpConfig | None:
    """The source's configuration as far as `values` of the fields tell it."""
    import json

    from sparselth.config import config_from_json
    from sparselth.experiments.source import _read

    if given := values.get("source_config"):
        found = config_from_json(json.loads(given))
    elif values.get("source"):
        found = _read(values["source"]).config
    else:
        return None
    if not isinstance(found, ImpConfig):
        raise UsageError(f"{values['source']}: expected a run of imp")
    return found
