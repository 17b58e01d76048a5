"""The theorems on strong lottery tickets, as subset sums that are solved and networks that are pruned.

A case needs nothing of another, but what is pruned needs its target, a network that a cell trains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from sparselth.config import Cell, at_least, option
from sparselth.experiments.base import Diverged, Experiment, Finished, Place, register
from sparselth.experiments.training import _datasets, _different, counted
from sparselth.models import MODELS, Linear, ReLU, get_model
from sparselth.theory import laws

if TYPE_CHECKING:
    from sparselth.data import Images

CASES = {  # and what they show
    "fixed-size": "the least n of which k hit a target, half of the time",
    "covering": "how near subset sums of n numbers come to every target",
    "quantised": "the least n that hold every number of b bits, half of the time",
    "redraws": "n numbers, drawn R times",
    "density": "candidates and kept weights for a weight of a trained network",
    "twice": "a random network of twice the depth, any number of n kept for a weight",
    "redrawn": "the same of few candidates, drawn again where they miss",
    "sparse": "the same, exactly k of more candidates kept",
    "exact": "the same on a grid, without any error",
    "one-more": "a random network of one layer more",
}
CONSTRUCTIONS = ("twice", "redrawn", "sparse", "exact", "one-more")
FIELDS = {"twice": "n", "redrawn": "few", "sparse": "wide", "exact": "wide", "one-more": "copies"}
SIZES = tuple(range(1, 11))  # of fixed-size
NUMBERS = tuple(range(4, 17))  # of covering
BITS = tuple(range(1, 11))  # of quantised
REDRAWS = tuple((k, 2**i) for k in (1, 2, 3) for i in range(6))
KEPT = (1, 2, 3, 4, 6, 8, None)  # of density; None is any number
TARGET = "target"  # the arm of cells that train: level 0 is `model`, level 1 `narrow`
NARROW = ("exact", "one-more")  # constructions whose target is the narrow one


def _epsilon(epsilon: float) -> str | None:
    right = 0 < epsilon <= 0.05
    return None if right else "expected a number above 0, at most 0.05: ten times as much is tried, too"


@register
@dataclass(frozen=True, kw_only=True)
class SubsetSum(Experiment):
    """Build strong lottery tickets by their theorems, and hold what they take against the theory.

    Of n random numbers, how many must there be for k of them to add up to a weight? From one of n (Malach et
    al. 2020) over k of n (Natale et al. 2024) to any number (Pensia et al. 2020). Then a network is trained,
    and random ones of twice the depth, and of one layer more (Burkholz 2022), are pruned until they compute
    what it does. Sums are searched by halves, exactly.
    """

    name: ClassVar[str] = "subset-sum"
    words: ClassVar[str] = "sparselth.report.theory_tables"
    figures: ClassVar[str] = "sparselth.report.theory_figures"

    cases: tuple[str, ...] = option(
        tuple(CASES), "What is shown; see docs/theorems.md.", choices=CASES, ordered=False, extends=True
    )
    model: str = option(
        "fc-500", "The target: fully connected layers; see `sparselth ls models`.", choices=MODELS
    )
    narrow: str = option(
        "fc-100", "The target of exact and one-more, which take longer for a weight.", choices=MODELS
    )
    dataset: str = option("", "What targets are trained on.  [default: the model's]", choices=_datasets)
    seeds: tuple[int, ...] = option(
        (0,), "Draws and targets of their own each: 3, 0-4 or 0,2,5.", _different, ordered=False, extends=True
    )
    epsilon: float = option(
        0.01, "How near a sum must come; ten times and a tenth of it are tried, too.", _epsilon
    )
    draws: int = option(1000, "Random pools of a case.", at_least(10, most=100_000))
    n: int = option(20, "Candidates for a weight, of each sign of its input.", at_least(2, most=400))
    few: int = option(12, "Candidates in redrawn.", at_least(2, most=400))
    rounds: int = option(30, "How often they are drawn again, at most.", at_least(1, most=255))
    wide: int = option(26, "Candidates in sparse and exact.", at_least(2, most=400))
    size: int = option(4, "How many of them sparse keeps.", at_least(1, most=400))
    bits: int = option(4, "Weights in exact are multiples of 2^-bits.", at_least(1, most=10))
    copies: int = option(16, "Candidates in one-more, and copies of a hidden neuron.", at_least(2, most=400))

    def check(self) -> None:
        super().check()
        if not self.cases:
            raise self.wrong("cases", "expected one at least")
        if self.size > self.wide:
            raise self.wrong("size", f"expected at most the {self.wide} candidates of `wide`")
        for name in ("model", "narrow"):
            kinds = [type(node.op) for node in get_model(getattr(self, name)).nodes]
            if set(kinds[::2]) != {Linear} or not {*kinds[1::2]} <= {ReLU} or kinds[-1] != Linear:
                raise self.wrong(name, "expected fully connected layers, ReLU between them, as in fc-500")
        if get_model(self.model).input != get_model(self.narrow).input:
            raise self.wrong("narrow", f"expected a network for the images of `model` {self.model}")
        from sparselth.data.sets import get_dataset
        from sparselth.machine import memory_bytes

        model, images = get_model(self.model), get_dataset(self.dataset or get_model(self.model).dataset)
        if images.shape != model.input or (images.classes or model.classes + 1) > model.classes:
            raise self.wrong("dataset", f"expected images that `model` {self.model} takes")
        there = memory_bytes()
        for name, needed in self._bytes().items():
            if needed > there / 2:
                raise self.wrong(
                    name,
                    f"takes about {needed / 1e9:,.0f} GB in a worker, and half of the {there / 1e9:.0f} GB "
                    "there are is the most",
                )

    def _bytes(self) -> dict[str, float]:
        """What a worker holds at most, by the field that it grows with."""
        found = {}
        if {"fixed-size", "redraws"} & {*self.cases}:
            found["epsilon"] = 600.0 * self.draws * laws.first_moment(1, 1.0, self.epsilons[-1])
        for case in (case for case in CONSTRUCTIONS if case in self.cases):
            name = FIELDS[case]
            source = 12.0 * sum(rows * columns for rows, columns in self.source(case))
            held = source + laws.half_sums(self.candidates(case), self.kept(case))
            found[name] = max(held, found.get(name, 0.0))
        return found

    @property
    def epsilons(self) -> tuple[float, float, float]:
        """Those of fixed-size."""
        return 10 * self.epsilon, self.epsilon, self.epsilon / 10

    @property
    def fixed(self) -> list[tuple[int, float, float]]:
        """k, z and epsilon of every level of fixed-size."""
        return [(k, z, e) for e in self.epsilons for k in SIZES for z in (0.0, sqrt(k))]

    # ---- constructions

    def candidates(self, case: str) -> int:
        """Candidates for a weight."""
        found = getattr(self, FIELDS[case])
        assert isinstance(found, int)
        return found

    def kept(self, case: str) -> int | None:
        """How many of them are kept, None where it is any number."""
        return self.size if case == "sparse" else None

    def target(self, case: str) -> str:
        """The model that is built."""
        return self.narrow if case in NARROW else self.model

    def source(self, case: str) -> list[tuple[int, int]]:
        """[N, K + 1] of every layer of the random network."""
        found: list[tuple[int, int]] = []
        shapes, n = [spec.matrix for spec in get_model(self.target(case)).weights], self.candidates(case)
        for i, (rows, columns) in enumerate(shapes):
            if case != "one-more" or i == 0:
                found.append((2 * n * (columns + 1), columns + 1))
            copied = case == "one-more" and i + 1 < len(shapes)
            found.append((n * (rows + 1) if copied else rows, found[-1][0] + 1))
        return found

    def sums(self, case: str) -> int:
        """Subset sums that are solved."""
        shapes = [spec.matrix for spec in get_model(self.target(case)).weights]
        signed = [rows * ((1 + (i == 0)) * columns + 1) for i, (rows, columns) in enumerate(shapes)]
        return sum(signed) if case != "one-more" else self.copies * sum(signed[:-1]) + signed[-1]

    # ---- cells

    def cells(self) -> list[Cell]:
        levels = {
            "fixed-size": range(len(self.fixed)),
            "covering": NUMBERS,
            "quantised": BITS,
            "redraws": range(len(REDRAWS)),
            "density": range(len(KEPT)),
        }
        found = []
        for seed in self.seeds:
            cells = [Cell(seed, case, level) for case in self.cases for level in levels.get(case, (0,))]
            trained = {need: None for cell in cells for need in self.needs(cell)}
            found += [*trained, *cells]
        return found

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        """The trained target."""
        if cell.arm not in (*CONSTRUCTIONS, "density"):
            return ()
        return (Cell(cell.seed, TARGET, int(cell.arm in NARROW)),)

    def trained(self, cell: Cell) -> str:
        """The model of a cell that trains."""
        return (self.model, self.narrow)[cell.level]

    def urgency(self, cell: Cell) -> tuple[bool, float]:
        """Targets first, then what takes longest, for all workers to end together."""
        return cell.arm != TARGET, -self.work(cell)

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        found = [
            self._train(cell, place) if cell.arm == TARGET else self._find(cell, place) for cell in cells
        ]
        return None if None in found else [one for one in found if one is not None]

    def _find(self, cell: Cell, place: Place) -> Finished | None:
        """Compute a cell and write its file; None where it was stopped."""
        import torch

        from sparselth import tickets
        from sparselth.files import save_arrays
        from sparselth.runs import cell_path
        from sparselth.streams import stream
        from sparselth.theory import cases

        began, level = time.perf_counter(), cell.level

        def draw(purpose: str) -> torch.Generator:
            return stream(cell.seed, f"subset-sum/{cell.arm}", level, purpose)

        found: cases.Line | None
        if cell.arm == "fixed-size":
            found = cases.fixed_size(*self.fixed[level], self.draws, draw("pools"))
        elif cell.arm == "covering":
            found = cases.covered(level, self.epsilon, self.draws, draw("pools"))
        elif cell.arm == "quantised":
            found = cases.quantised(level, self.draws, draw("pools"))
        elif cell.arm == "redraws":
            found = cases.redrawn(*REDRAWS[level], self.epsilon, self.draws, draw("pools"))
        else:
            (need,) = self.needs(cell)
            model = get_model(self.trained(need))
            flat = torch.from_numpy(tickets.read(cell_path(place.run, need), model.params)[0].weights)
            if cell.arm == "density":
                found = cases.density(model, flat, KEPT[level], self.epsilon, draw)
            else:
                assert place.data is not None
                numbers = self.candidates(cell.arm), self.kept(cell.arm), self.bits, self.rounds, self.epsilon
                ask = place.should_stop
                found = cases.construction(cell.arm, model, flat, *numbers, draw, place.data.test(), ask)
        if found is None:
            return None
        header = {"schema": "sparselth.subset-sum-cell/1", "cell": cell.key, "config": self.digest}
        save_arrays(cell_path(place.run, cell), found[1], header)
        return Finished(cell, found[0], [], {"seconds": time.perf_counter() - began})

    def _train(self, cell: Cell, place: Place) -> Finished | Diverged | None:
        """Train a target; None where it was stopped, after a checkpoint."""
        from sparselth.engine.dense import init_weights
        from sparselth.experiments.jobs import job, train
        from sparselth.streams import stream
        from sparselth.theory.cases import point

        model = get_model(self.trained(cell))
        recipe = next(iter(model.recipes.values()))
        start = model.params.full_mask(), init_weights(model, stream(cell.seed, "ticket", 0, "init"))
        where = {"model": model.name, "dataset": self.dataset, "config": self.digest, "rewind_step": 0}
        found = train(model, [job(cell, place, recipe, start, 0, None)], recipe, "auto", place, where)
        if found is None or isinstance(found[0], Diverged):
            return None if found is None else found[0]
        used = sum(spec.numel for spec in (*model.weights, *model.biases))
        line = point("target", None, None, None, None, used, None, model=model.name)
        line["target_accuracy"] = found[0].line["final_accuracy"]
        return replace(found[0], line=line, timings={"seconds": found[0].timings["train_seconds"]})

    # ---- the price

    def work(self, cell: Cell) -> float:
        """About what a cell takes, in sums of halves."""
        case, level = cell.arm, cell.level
        if case == TARGET:
            model = get_model(self.trained(cell))
            recipe = next(iter(model.recipes.values()))
            return recipe.steps * recipe.batch_size * model.params.size / 20
        if case == "covering":
            return self.draws / 4 * (5000.0 + 10 * (1 << level))
        if case == "quantised":
            return self.draws * 5000.0
        if case in ("fixed-size", "redraws", "density"):
            if case == "fixed-size":
                (k, z, epsilon), pools = self.fixed[level], self.draws
                n = laws.first_moment(k, z, epsilon) + 2
            elif case == "redraws":
                (k, rounds), pools = REDRAWS[level], self.draws
                n, pools = laws.first_moment(k, 0.0, self.epsilon) // rounds + k, self.draws * rounds
            else:
                k, pools = KEPT[level] or 0, 2000
                n = laws.first_moment(k, 0.0, self.epsilon) + 8 if k else 16
            return 8.0 * pools * (laws.half_sums(n, k or None) / 8 + 100)
        source = sum(rows * columns for rows, columns in self.source(case))
        one = laws.half_sums(self.candidates(case), self.kept(case)) / 8 + 200
        return self.sums(case) * one + 200 * source

    def seconds(self, cell: Cell) -> float:
        from sparselth.theory.cases import seconds_of_a_sum

        return self.work(cell) * seconds_of_a_sum()

    # ---- images

    @property
    def reads(self) -> str:
        return get_model(self.model).dataset if {*CONSTRUCTIONS, "density"} & {*self.cases} else ""

    # ---- what is said of it

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.digest}"

    @property
    def title(self) -> str:
        return f"{self.name} to {self.epsilon:g}, {', '.join(self.cases)}"

    def about(self, cell: Cell) -> str:
        if cell.arm == TARGET:
            return self.trained(cell)
        if cell.arm == "fixed-size":
            k, z, epsilon = self.fixed[cell.level]
            return f"k {k}, z {z:.2f}, epsilon {epsilon:g}"
        if cell.arm == "redraws":
            return "k {}, R {}".format(*REDRAWS[cell.level])
        if cell.arm == "density":
            return f"k {KEPT[cell.level] or 'any'}"
        if cell.arm in CONSTRUCTIONS:
            return f"n {self.candidates(cell.arm)}"
        return f"{'n' if cell.arm == 'covering' else 'bits'} {cell.level}"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = {"cases": f"{', '.join(self.cases)}; {counted(len(self.cells()), finished)}"}
        if images is not None:
            names = sorted({self.target(case) for case in self.cases if case in CONSTRUCTIONS})
            rows["targets"] = (
                f"{', '.join(names or [self.model])} on {images.spec.title} from {images.source}"
            )
        solved = sum(self.sums(case) for case in self.cases if case in CONSTRUCTIONS) * len(self.seeds)
        rows["sums"] = f"{self.draws} pools a case; {solved:,} weights of random networks"
        return rows

    def said(self, line: dict[str, Any]) -> str:
        from sparselth.report.theory_tables import said

        return said(line)
