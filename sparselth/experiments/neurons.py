"""Neuron subnetworks beside weight subnetworks (Malach et al. 2020, sections 3 and 4).

Of one draw of frozen weights, at every width of the network,

    weights            single weights are kept by trained scores: a strong ticket
    neurons            whole hidden neurons are kept by trained scores
    random-features    all neurons are kept, and the output layer is fitted; a choice of neurons is a
                       choice of output weights, so that no neuron subnetwork can be nearer

and for one hidden layer and a single ReLU of Gaussian inputs the same three, whose errors are exact: those of
random features bound those of neurons from below (`single_relu`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sparselth.config import Cell, Recipe, at_least, like, option
from sparselth.errors import UsageError
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.training import Training
from sparselth.experiments.widths import Widths, different_widths
from sparselth.frozen import LAWS, METHODS, Frozen
from sparselth.models import Linear, Model, ReLU, get_model
from sparselth.registry import Registry
from sparselth.user_files import short

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images
    from sparselth.engine.state import Job

ARMS: Registry[str] = Registry("arm")  # of this experiment, and what they are
ARMS.add("weights", "single weights kept by trained scores")
ARMS.add("neurons", "whole neurons kept by trained scores")
ARMS.add("random-features", "all neurons, the output layer fitted")
SINGLE = "relu-"  # before the arm of a cell about a single ReLU
MOST_UNITS = 2048


def _arms(arms: tuple[str, ...]) -> str | None:
    return None if arms and len(set(arms)) == len(arms) else "expected different arms"


def _units(units: tuple[int, ...]) -> str | None:
    right = all(1 <= n <= MOST_UNITS for n in units) and len(set(units)) == len(units)
    return None if right else f"expected different numbers from 1 to {MOST_UNITS:,}"


def _share(keep: float) -> str | None:
    return None if 0 < keep <= 1 else "expected a share above 0 and at most 1"


@register
@dataclass(frozen=True, kw_only=True)
class NeuronsConfig(Widths):
    """Compare neuron subnetworks of frozen weights with weight subnetworks and with random features.

    On images, at every width, and on a single ReLU of Gaussian inputs, where errors are exact: weight
    subnetworks reach it, and no choice of whole neurons can be nearer than random features are (Malach et al.
    2020). Ends with a table, figures and a folder that `sparselth show` reads.
    """

    name: ClassVar[str] = "neurons"
    words: ClassVar[str] = "sparselth.report.neurons"
    figures: ClassVar[str] = "sparselth.report.neurons"
    has_usual: ClassVar[bool] = False
    recipe_help: ClassVar[str] = "How long scores are trained: for minutes, or for 100 epochs as in papers."
    method: ClassVar[str] = "edge-popup"

    model: str = like(Training, "model", "lenet-300-100")
    seeds: tuple[int, ...] = like(Training, "seeds", (0, 1, 2), "One draw of weights each: 3, 0-4 or 0,2,5.")
    arms: tuple[str, ...] = option(
        ("weights", "neurons", "random-features"),
        "What is kept or fitted: weights, neurons, random-features.",
        _arms,
        ARMS,
        ordered=False,
        extends=True,
    )
    width: tuple[float, ...] = option(
        (0.25, 0.5, 1.0),
        "Widths of the hidden layers as shares of the model's.",
        different_widths,
        ordered=False,
    )
    keep: float = option(0.5, "Share of the weights, or of the neurons, that is kept.", _share)
    law: str = option("normal", "What weights are drawn from; Kaiming's laws.", choices=LAWS)
    units: tuple[int, ...] = option(
        (8, 16, 32, 64, 128, 256), "Hidden units of the networks for a single ReLU.", _units, ordered=False
    )
    inputs: int = option(24, "Inputs of the single ReLU.", at_least(2, most=1000))

    @classmethod
    def recipes(cls, values: Mapping[str, Any]) -> Mapping[str, Recipe]:
        from sparselth.data.sets import get_dataset, n_validation

        model = get_model(values["model"])
        short = METHODS[cls.method].recipe(model)
        images = get_dataset(values["dataset"] or model.dataset).n_train
        epoch = (images - n_validation(images)) / short.batch_size
        return {"short": short, "paper": replace(short, steps=max(1, int(100 * epoch)))}

    def check(self) -> None:
        super().check()
        self.refuse_autograd()
        model = get_model(self.model)
        if not model.is_chain or not all(isinstance(node.op, Linear | ReLU) for node in model.nodes):
            raise UsageError(f"`model` {self.model}: expected one of fully connected layers alone")
        if len(model.weights) < 2:
            raise UsageError(f"`model` {self.model}: has no hidden neurons to keep or to drop")
        try:
            assert all(one.weights for one in self.models)
        except UsageError as error:  # a width that leaves no unit
            raise self.wrong("width", str(error)) from error

    # ---- cells

    def cells(self) -> list[Cell]:
        """A cell an arm and width on images, and an arm and number of units on the single ReLU."""
        return [
            Cell(seed, arm, level)
            for seed in self.seeds
            for name in self.arms
            for arm, number in ((name, len(self.width)), (SINGLE + name, len(self.units)))
            for level in range(number)
        ]

    def point(self, cell: Cell) -> tuple[float, float]:
        """Width, and share kept, of a cell on images."""
        return self.width[cell.level], self.keep

    def urgency(self, cell: Cell) -> tuple[bool, int]:
        """Networks before closed forms, wide ones first."""
        return cell.arm.startswith(SINGLE), -cell.level

    def start_step(self, cell: Cell) -> int:
        return 0 if cell.arm in ("weights", "neurons") else self.recipe.steps

    def rungs(self) -> list[dict[str, int]]:
        return [{spec.name: spec.numel for spec in model.weights} for model in self.models[::-1]]

    def rung(self, cell: Cell) -> int:
        return 0 if cell.arm.startswith(SINGLE) else len(self.width) - 1 - cell.level

    def timed_rungs(self, sparse: bool) -> list[int]:
        return [*range(len(self.width))]

    def sample(self, rung: int, draw: int, device: str) -> tuple[Model, Job, Recipe]:
        from sparselth.engine.state import Job, State

        cell = Cell(self.seeds[0], "weights", len(self.width) - 1 - rung, draw)
        model, state = self.models[cell.level], State.start(self._first(cell)[None].to(device), self.recipe)
        return (
            model,
            Job(cell, state, model.params.full_mask().to(device), frozen=self.frozen(cell)),
            self.recipe,
        )

    # ---- what a cell computes

    def frozen(self, cell: Cell) -> Frozen:
        """How a seed's weights are drawn, the same for every arm."""
        return METHODS[self.method].frozen(cell.seed, keep=self.keep, law=self.law)

    def _first(self, cell: Cell) -> Tensor:
        from sparselth.streams import stream

        generator = stream(cell.seed, "weights", 0, "scores")
        return METHODS[self.method].start(self.frozen(cell), self.models[cell.level].params, generator)

    def method_of(self, cell: Cell) -> str:
        return self.method

    def where(self, model: Model) -> dict[str, Any]:
        """What a file says of where it is from, beside its cell."""
        where = {"model": model.name, "dataset": self.dataset, "config": self.digest}
        return where | {"cell": "", "rewind_step": 0}

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        from sparselth.experiments.neurons_jobs import compute

        found = list[Finished | Diverged]()
        for cell in cells:
            done = compute(self, cell, place, None if cell.arm.startswith(SINGLE) else self._first(cell))
            if done is None:
                return found or None
            found += done
        return found

    # ---- what is said of it

    @property
    def folder(self) -> str:
        return f"{self.name}-{short(self.model)}-{short(self.dataset)}-{self.digest}"

    @property
    def how(self) -> str:
        """What is drawn and kept, in a line."""
        return f"{self.law} weights, {100 * self.keep:g} % of them or of the neurons kept"

    def about(self, cell: Cell) -> str:
        if cell.arm.startswith(SINGLE):
            return f"{self.units[cell.level]} units"
        return f"width {self.width[cell.level]:g}"

    def said(self, line: dict[str, Any]) -> str:
        if "units" in line:
            return f"{line['units']} units: error {line['relative_error']:.4f}"
        return f"width {line['width']:g}: test {100 * line['final_accuracy']:.2f} %"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        widths, units = (", ".join(f"{one:g}" for one in each) for each in (self.width, self.units))
        more = {"widths": f"{widths}; {self.how}", "relu": f"{units} units, {self.inputs} inputs"}
        return {"model": rows.pop("model")} | more | {"arms": ", ".join(self.arms)} | rows
