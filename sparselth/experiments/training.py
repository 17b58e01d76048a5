"""Experiments that train networks: one network a cell, from a mask and weights of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparselth import user_files
from sparselth.config import INPUTS, KERNELS, Cell, Recipe, option
from sparselth.errors import unknown
from sparselth.experiments.base import Diverged, Experiment, Finished, Place
from sparselth.models import MODELS, Model, get_model
from sparselth.models.module import is_module
from sparselth.models.remembered import Remembered

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import DatasetSpec, Images
    from sparselth.data.batches import Resident
    from sparselth.engine.state import Job


MOST_SEEDS = 10_000


def _datasets() -> Collection[str]:
    from sparselth.data import DATASETS

    return DATASETS


def _different(seeds: tuple[int, ...]) -> str | None:
    right = seeds and len(set(seeds)) == len(seeds) and min(seeds) >= 0
    if not right:
        return "expected different numbers from 0 on"
    return None if len(seeds) <= MOST_SEEDS else f"expected at most {MOST_SEEDS:,} of them"


def _at_most(images: int | None) -> str | None:
    return None if images is None or images >= 0 else "expected 0 (all) or more"


LEAST = 1000  # images that an evaluation looks at, unless it is asked to or there are no more


def evaluated_images(recipe: Recipe, dataset: DatasetSpec) -> int:
    """Images of an evaluation, at most, with which evaluations take no longer than training; 0 is all.

    By products: an image that is trained on costs three times one that is looked at. The test images are seen
    twice, at early stop and at the end.
    """
    rounds = -(-recipe.steps // recipe.eval_every) + 2
    most = max(LEAST, 3 * recipe.steps * recipe.batch_size // rounds)
    return 0 if most >= max(dataset.n_validation, dataset.n_test) else most


@dataclass(frozen=True, kw_only=True)
class Training(Experiment):
    """A network, a data set, seeds and a recipe; a subclass has `cells`, `start` and `table` at least."""

    model: str = option(
        "lenet5",
        "The network; see `sparselth ls models`. Or one of yours, my_net.py:make; or torchvision:NAME.",
        choices=MODELS,
    )
    dataset: str = option(
        "",
        "The data set; see `sparselth ls datasets`; or a function of yours, my_data.py:load.  "
        "[default: the model's]",
        choices=_datasets,
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4), "One network each: 3, 0-4 or 0,2,5.", _different, ordered=False, extends=True
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where to train.", choices=("auto", "cpu", "cuda")
    )
    kernels: str = option(
        "auto",
        "What the steps run on: the fastest here, our Triton kernels, or dense torch as the reference.",
        choices=KERNELS,
    )
    eval_images: int | None = option(
        None,
        "Validation images, and test images, that an evaluation looks at, at most; 0 is all.  "
        "[default: all, fewer where evaluations would take longer than training]",
        _at_most,
        added=True,
        before=0,
    )  # a number once the data set is known
    code: tuple[str, ...] = option((), added=True)  # of a user's files, by name: found unless given
    recipe: Recipe = field(default=None)  # type: ignore[assignment]  # the model's first unless given
    recipe_help: ClassVar[str] = "How each network is trained: within minutes, or as in the 2019 paper."
    recipe_names: ClassVar[tuple[str, ...]] = ("short", "paper")  # of `recipes`; the first is the default
    has_usual: ClassVar[bool] = True  # a loop that users write is what a run is compared with
    side_by_side: ClassVar[bool] = True  # whether several modules of it may train as one batch
    rewind = 0  # the step that tickets go back to; an option where there is a choice

    def __post_init__(self) -> None:
        named = {name: str(getattr(self, name)) for name in ("model", "dataset")}  # not yet checked
        files = [(kind, name) for kind, name in named.items() if not self.code and user_files.is_file(name)]
        for kind, name in files:
            user_files.refresh(kind, name)
        if self.recipe is None:
            object.__setattr__(self, "recipe", next(iter(self.recipes(vars(self)).values())))
        if (
            files
            and not self.dataset
            and type(self).reads is Training.reads
            and user_files.is_file(self.reads)
        ):
            user_files.refresh("dataset", self.reads)  # that the network's file names
            files.append(("dataset", self.reads))
        if files:
            code = tuple(f"{name} {user_files.code(kind, name)}" for kind, name in files)
            object.__setattr__(self, "code", code)
        for f in fields(self):
            if f.metadata.get("epochs"):
                object.__setattr__(self, f.name, self._steps_of(getattr(self, f.name)))
        super().__post_init__()

    def _steps_of(self, value: Any) -> Any:
        """Steps, or the name of so many epochs, "2ep", as steps of the data set and batch size.

        The data set then is one that was named: no other may take its place, whose epochs are others.
        """
        if isinstance(value, tuple):
            return tuple(map(self._steps_of, value))
        if not isinstance(value, str) or not re.fullmatch(r"\d+(\.\d+)?ep", value):
            return value
        from sparselth.data.sets import get_dataset, n_validation
        from sparselth.pruning import rounded

        self.recipe.check()  # it is divided by
        if not self.dataset:
            object.__setattr__(self, "dataset", get_model(self.model).dataset)
        images = get_dataset(self.dataset).n_train
        batches = (images - n_validation(images)) // self.recipe.batch_size
        return rounded(float(value.removesuffix("ep")) * batches)

    @classmethod
    def recipes(cls, values: Mapping[str, Any]) -> Mapping[str, Recipe]:
        """How networks may be trained, by name, with these values of the fields; the first is the default."""
        return get_model(values["model"]).recipes

    def check(self) -> None:
        """Beside ranges: what would have no effect. A recipe of the model may be cut short as it stands."""
        super().check()
        from sparselth.data import augment
        from sparselth.data.sets import check_batch, get_dataset

        recipe, known = self.recipe, self.recipes(vars(self)).values()
        dataset = get_dataset(self.dataset or get_model(self.model).dataset)
        check_batch(recipe.batch_size, dataset.n_train)
        augment.check(recipe.augment, dataset.shape, dataset.name)
        if recipe.warmup > recipe.steps and recipe.warmup not in {one.warmup for one in known}:
            raise recipe.wrong("warmup", f"expected at most the {recipe.steps} `steps` of training")
        beyond = any(drop >= recipe.steps for drop in recipe.lr_drops)
        if beyond and recipe.lr_drops not in {one.lr_drops for one in known}:
            raise recipe.wrong("lr_drops", f"expected steps below {recipe.steps}, where training ends")
        if recipe.optimizer != "sgd" and recipe.momentum not in {0.9, *(one.momentum for one in known)}:
            raise recipe.wrong("momentum", f"has no effect with {recipe.optimizer}; use `optimizer` sgd")

    @property
    def network(self) -> Model:
        """The network of the run, for the samples and classes of its data set."""
        model = get_model(self.model)
        if not is_module(self.model) or isinstance(model, Remembered):  # nor is a user's data set read for it
            return model
        from sparselth.data.sets import get_dataset

        return model.on(get_dataset(self.dataset or model.dataset))

    @property
    def widest(self) -> Model:
        """The largest network of the run."""
        return self.network

    @property
    def autograd(self) -> bool:
        known = self.kernels == "autograd" or is_module(self.model)
        return known or get_model(self.model).needs_autograd

    @property
    def reads(self) -> str:
        return get_model(self.model).dataset

    @property
    def shown_as(self) -> str:
        return self.recipe.inputs

    @property
    def evaluation(self) -> tuple[int, int]:
        return self.network.evaluation_batch, self.eval_images or 0

    def refuse_autograd(self) -> None:
        """Raise UsageError where scores over frozen weights cannot be trained: through autograd."""
        get_model(self.model).check_engines()
        if self.kernels == "autograd":
            raise self.wrong("kernels", "expected auto; autograd trains no scores over frozen weights")

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        """The mask [M] of a cell, and the weights [P] it starts from, before the mask."""
        raise NotImplementedError

    def start_step(self, cell: Cell) -> int:
        """The step that a cell starts at, with the learning rate of that step."""
        return 0

    def recipe_of(self, cell: Cell) -> Recipe:
        """How a cell is trained."""
        return self.recipe

    def keep_step(self, cell: Cell) -> int | None:
        """The step whose weights a cell's file keeps."""
        return None

    def rungs(self) -> list[dict[str, int]]:
        """Weights that are left at every level, as `pruning.ladder` gives them; foretells what steps cost."""
        from sparselth.pruning import ladder

        levels = max(cell.level for cell in self.cells())
        return ladder(self.network.params, levels, 0.0, "layer")

    def rung(self, cell: Cell) -> int:
        """Which of the `rungs` foretells what the steps of a cell cost."""
        return cell.level

    def beforehand(self, data: Resident) -> Mapping[Cell, float]:
        """Processor seconds that cells take before they train, or instead, where that is more than a file."""
        return {}

    def timed_rungs(self, sparse: bool) -> list[int]:
        """The rungs whose steps are timed, 0 among them; `sparse`: where fewer weights take less time."""
        last = len(self.rungs()) - 1
        return sorted({last * part // 4 for part in range(5)} if sparse else {0})

    def sample(self, rung: int, draw: int, device: str) -> tuple[Model, Job, Recipe]:
        """A network of a rung, of several a `draw`, whose steps by a recipe are timed; nobody keeps it."""
        from sparselth.engine.dense import init_weights
        from sparselth.engine.state import Job, State
        from sparselth.pruning import prune
        from sparselth.streams import stream

        model, seed = self.network, self.seeds[0]
        weights = init_weights(model, stream(seed, "price", 0, "init"))
        front = weights[: model.params.mask_size]
        mask = prune(model.params, front, model.params.full_mask(), self.rungs()[rung])
        front *= mask
        state = State.start(weights[None].to(device), self.recipe)
        return model, Job(Cell(seed, "price", 0, draw), state, mask.to(device)), self.recipe

    def remaining(self) -> list[float]:
        """The share of the weights that is left at every level."""
        prunable = self.network.params.prunable
        return [sum(rung.values()) / prunable for rung in self.rungs()]

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        from sparselth.experiments.jobs import job, train

        where = {
            "model": self.model,
            "dataset": self.dataset,
            "config": self.digest,
            "cell": "",  # each its own
            "rewind_step": self.rewind,
        }
        found: list[Finished | Diverged] = []
        recipes = {cell: self.recipe_of(cell) for cell in cells}
        for recipe in dict.fromkeys(recipes.values()):  # a batch has one
            jobs = [
                job(
                    *(cell, place, recipe, self.start(cell, place)),
                    *(self.start_step(cell), self.keep_step(cell)),
                )
                for cell in cells
                if recipes[cell] == recipe
            ]
            if (done := train(self.network, jobs, recipe, self.kernels, place, where)) is None:
                return found or None  # stopped: what is finished counts
            found += done
        return found

    @property
    def folder(self) -> str:
        return f"{self.name}-{user_files.short(self.model)}-{user_files.short(self.dataset)}-{self.digest}"

    @property
    def title(self) -> str:
        seeds = ",".join(map(str, self.seeds))
        return f"{self.name} of {self.model} on {self.dataset}, seeds {seeds}, {self.recipe.steps:,} steps"

    def about(self, cell: Cell) -> str:
        return f"{100 * self.remaining()[cell.level]:.1f} %"

    def said(self, line: dict[str, Any]) -> str:
        left, accuracy = line["weights_remaining"], line["accuracy_at_early_stop"]
        return f"{100 * left:.1f} %: test {100 * accuracy:.2f} %"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        from sparselth.data.sets import get_dataset

        model, recipe = self.network, self.recipe
        spec = images.spec if images else get_dataset(self.dataset or model.dataset)
        rate = f"lr {recipe.lr:g}" + (f", warm-up {recipe.warmup:,}" if recipe.warmup else "")
        rate += ", along a cosine" if recipe.cosine else ""
        rate += f", a tenth from {', '.join(f'{s:,}' for s in recipe.lr_drops)}" if recipe.lr_drops else ""
        moved = "random parts of images, flipped" if spec.pictures else "images shifted and flipped"
        rate += "" if recipe.augment == "none" else f"; {moved}"
        inputs = "" if recipe.inputs == "standard" else f"; {INPUTS[recipe.inputs]}"
        return {
            "model": f"{model.name}, {model.params.prunable:,} prunable weights",
            "data": spec.title + (f" from {images.source}" if images else "") + inputs,
            "cells": f"seeds {', '.join(map(str, self.seeds))}; {counted(len(self.cells()), finished)}",
            "training": f"{recipe.steps:,} steps of {recipe.batch_size} with {recipe.optimizer}, {rate}",
        }


def settings_of(experiment: type[Experiment]) -> dict[str, Field[Any]]:
    """What may be chosen of an experiment, by name: its own fields, then what it leaves to the recipe."""
    own = {f.name: f for f in fields(experiment)}
    found = {name: f for name, f in own.items() if f.metadata.get("help")}
    if issubclass(experiment, Training):
        found |= {f.name: f for f in fields(Recipe) if f.metadata["help"] and f.name not in own}
    return found


def configured(experiment: type[Experiment], settings: Mapping[str, Any], recipe: str = "") -> Experiment:
    """The experiment with these `settings_of` it; what is not among them is its own, or the recipe's.

    `recipe` names one of those that its network may be trained by, the first unless given; of the recipe's
    None is what that has.
    """
    own = {f.name: f.default for f in fields(experiment)}
    values = {name: settings.get(name, own[name]) for name in settings_of(experiment) if name in own}
    values = {name: value for name, value in values.items() if value is not MISSING}
    if issubclass(experiment, Training):
        recipes = experiment.recipes(values)
        if (name := recipe or experiment.recipe_names[0]) not in recipes:
            raise unknown("recipe", name, recipes)
        theirs = [one for one in settings_of(experiment) if one not in own]
        chosen = {one: settings[one] for one in theirs if settings.get(one) is not None}
        values["recipe"] = replace(recipes[name], **chosen)
    return experiment(**values)


def counted(cells: int, finished: int) -> str:
    """A number of cells, and of those that are finished if there are any."""
    return f"{cells} cells" + (f", {finished} of them finished" if finished else "")
