"""The whole experiment on a training function of one's own: `sparselth.imp(make, train)`.

    def make(seed):                                  # a network; its random numbers are seeded before
        return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))

    def train(model, masks, cell):                   # from cell.start_step on; gives a number, or several
        optimizer = sparselth.MaskedAdamW(model.parameters(), lr=1e-3, masks=masks)
        for images, labels in batches:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        return {"accuracy": accuracy(model)}

    results = sparselth.imp(make, train, levels=5, seeds=range(3), out="runs/mine")
    print(results)

Level 0 trains the dense network; each level prunes what the one before has trained, rewinds, and trains the
ticket beside its controls (Frankle & Carbin 2019), the arms of `sparselth ls arms`. `out` keeps each finished
cell and each ticket: the same call goes on where it was stopped, and with more levels, seeds or arms.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sparselth import pruning
from sparselth.calls import (
    Exclude,
    Scope,
    Score,
    by_name,
    check_score,
    flat,
    laid_out,
    prunable,
    prune_by,
    rewind,
    snapshot,
    zero,
)
from sparselth.config import Cell
from sparselth.errors import SparselthError, UsageError, check_number, unknown
from sparselth.experiments.arms import ARMS, Arm, Reinit
from sparselth.files import checksum, read_json, sealed, unsealed, write_atomically
from sparselth.lock import locked
from sparselth.masks import Masks, by_parameter, unwrapped
from sparselth.module_tickets import bits, first_names
from sparselth.own_results import OF_CELL, Point, Results
from sparselth.streams import stream
from sparselth.tickets import load_ticket, save_ticket

if TYPE_CHECKING:
    from sparselth.params import Params

Make = Callable[[int], nn.Module]
Metric = float | Tensor
Train = Callable[[nn.Module, Masks, "Turn"], Metric | Mapping[str, Metric]]
SCHEMA = "sparselth.own/1"


@dataclass(frozen=True)
class Turn(Cell):
    """Whom `train` is called for: seed, arm, level (0 is the dense network), and the step it starts at.

    Random numbers of torch are seeded by these names before the call; those of others are train's own.
    """

    start_step: int = 0


def imp(
    make: Make,
    train: Train,
    *,
    levels: int = 8,
    rate: float = 0.2,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    arms: Sequence[str] = ("ticket", "reinit", "random-mask"),
    scope: Scope = "global",
    score: Score = "magnitude",
    exclude: Exclude = (),
    rewind: int = 0,
    out: str | Path | None = None,
) -> Results:
    """Find winning tickets by iterative magnitude pruning, beside their controls, in one's own loop.

    make: seed -> a module, the same for the same seed. train: (model, masks, cell) -> a number or a dict of
    numbers; it trains the module in place under the masks, which at level 0 keep all, from `cell.start_step`
    on, by an optimizer that it makes, as `MaskedAdamW(model.parameters(), masks=masks)`.
    levels, rate: turns of train and prune, and the share of the remaining weights that one prunes, exactly
    round(rate * survivors). scope, score, exclude: as in `sparselth.prune`. seeds, arms: what is trained.
    rewind: the step of the dense training whose weights tickets go back to, counted in calls of its
    optimizer's step; 0 is the start. out: a folder that keeps what is finished.

    UsageError for what cannot be, settings other than the folder's among it; SparselthError where train
    leaves a pruned weight other than 0.
    """
    levels, rewind = _whole("levels", levels), _whole("rewind", rewind)
    check_number("levels", levels, 1, 1000)
    check_number("rewind", rewind, 0, 10**9)
    if not isinstance(rate, Real) or not 0 < rate < 1:
        raise UsageError(f"`rate` {rate!s:.40}: expected a share between 0 and 1, such as 0.2")
    rate = float(rate)
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        raise UsageError(f"`seeds` {seeds!s:.60}: expected different whole numbers, such as (0, 1, 2)")
    seeds = [_whole("seeds", seed) for seed in seeds]
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"`seeds` {seeds!s:.60}: expected different whole numbers")
    check_score(score)
    for name in arms:
        if name not in ARMS:
            raise unknown("arm", name, [one for one, arm in ARMS.items() if not _unfit(arm)])
        if why := _unfit(ARMS[name]):
            raise UsageError(f"arm {name!r}: {why}; leave it out")
    named = {name: ARMS[name] for name in ("ticket", *arms)}
    run = _Run(make, train, rate, scope, score, exclude, rewind)
    folder = None if out is None else Path(out)
    if folder is not None:
        try:
            (folder / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"`out` {folder}: no folder can be made there ({error.strerror}); choose another"
            ) from None
    with nullcontext() if folder is None else locked(folder):
        run.enter(folder)
        for seed in seeds:
            for level in range(levels + 1):
                for name in named if level else ("ticket",):
                    run.cell(named[name], Turn(seed, name, level))
    return Results(run.points, run.tickets, run.snapshots)


def _unfit(arm: Arm) -> str:
    """Why an arm cannot be trained by a function of the user's; "" where it can."""
    if arm.goes_on or type(arm).recipe is not Arm.recipe:
        return "goes on from trained weights, or sets the learning rate, which `train` does here"
    if type(arm).weights not in (Arm.weights, Reinit.weights):
        return "makes weights of built-in networks, which these are not"
    return ""


@dataclass(eq=False)
class _Run:
    make: Make
    train: Train
    rate: float
    scope: Scope
    score: Score
    exclude: Exclude
    rewind: int

    def __post_init__(self) -> None:
        self.points: list[Point] = []
        self.tickets: dict[tuple[int, int], Masks] = {}
        self.snapshots: dict[int, dict[str, Any]] = {}
        self.folder: Path | None = None

    def enter(self, folder: Path | None) -> None:
        """Go on in a folder that has these settings, or none."""
        self.folder = folder
        if folder is None:
            return
        excluded = [self.exclude] if isinstance(self.exclude, str | type) else [*self.exclude]
        mine = {
            "schema": SCHEMA,
            "rate": self.rate,
            "scope": self.scope,
            "score": self.score if isinstance(self.score, str) else _called(self.score),
            "exclude": [entry if isinstance(entry, str) else entry.__name__ for entry in excluded],
            "rewind": self.rewind,
        }
        file = folder / "config.json"
        if not file.exists():
            write_atomically(file, _json(mine))
            return
        try:
            there = unsealed(read_json(file))
        except (OSError, ValueError) as error:
            raise SparselthError(f"{file}: {error}; choose another `out`") from error
        for name, value in mine.items():
            if there.get(name) != value:
                raise UsageError(
                    f"`{name}` {value}: the run in {folder} has {there.get(name)}; choose another `out`"
                )

    def cell(self, arm: Arm, turn: Turn) -> None:
        """Compute a cell, or read what it came to."""
        seed, level, first = turn.seed, turn.level, turn.arm == "ticket"
        point = self._read(turn)
        if point is not None and first:
            following = self._load(seed, level + 1)
            start = self._load(seed, 0) if level == 0 else None
            if following is None or (level == 0 and start is None):
                point = None  # its ticket is damaged or gone
        if point is None:
            point = self._compute(arm, turn)
            if self.folder is not None:
                write_atomically(self._file(turn), _json(point))
            value = next(v for name, v in point.items() if name not in OF_CELL)
            left = f"{100 * point['weights_remaining']:.1f} % of the weights"
            print(f"{turn}: {value:.4g}, {left}, {point['seconds']:.1f} s", file=sys.stderr)
        self.points.append(point)

    def _compute(self, arm: Arm, turn: Turn) -> Point:
        seed, level = turn.seed, turn.level
        model = self._build(arm, turn)
        turn = Turn(seed, turn.arm, level, start_step=arm.start_step(self.rewind) if level else 0)
        weights = prunable(unwrapped(model), self.exclude)
        if self.folder is not None and turn.arm == "ticket" and not level:
            _check_savable(unwrapped(model))
        if level:
            masks = self._masks(arm, turn, laid_out(weights), model)
            if arm.fresh:
                zero(by_parameter(model, masks))
            else:
                rewind(model, masks, self.snapshots[seed])
        else:
            masks = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}, model)
        began = time.perf_counter()
        start = snapshot(model) if not level and not self.rewind else None
        with (
            _seeded(stream(seed, turn.arm, level, "train")),
            _watched(model, 0 if level else self.rewind) as seen,
        ):
            metrics = _metrics(self.train(model, masks, turn))
        seconds = time.perf_counter() - began
        self._check(model, masks, turn)
        if not level:
            if start is None and not seen:
                raise UsageError(
                    f"`rewind` {self.rewind}: train took fewer steps by an optimizer of torch; choose less"
                )
            self.snapshots[seed] = start if start is not None else seen[0]
            self._keep(seed, 0, model, masks)
        if turn.arm == "ticket":
            self._keep(seed, level + 1, model, self._prune(model, masks, level + 1))
        return {
            "seed": seed,
            "arm": turn.arm,
            "level": level,
            "draw": 0,
            "weights_remaining": masks.kept / masks.size,
            **metrics,
            "seconds": seconds,
        }

    def _build(self, arm: Arm, turn: Turn) -> nn.Module:
        """The module, its weights those of its seed or, of a fresh arm, of a seed of the cell's own."""
        own = turn.level > 0 and arm.fresh
        number = stream(turn.seed, turn.arm, turn.level, "init").initial_seed() % 2**31 if own else turn.seed
        model = _made(self.make, number)
        if own and turn.level == 1:
            same, other = (prunable(unwrapped(m), self.exclude) for m in (model, _made(self.make, turn.seed)))
            if all(torch.equal(w, other[name]) for name, w in same.items()):
                raise UsageError(
                    f"arm {turn.arm!r}: make gives the same weights for each seed; draw them or leave it out"
                )
        return model

    def _masks(self, arm: Arm, turn: Turn, params: Params, model: nn.Module) -> Masks:
        found = flat(params, self.tickets[turn.seed, turn.level])
        mask = arm.mask(params, found, stream(turn.seed, turn.arm, turn.level, "mask"))
        return Masks(by_name(params, mask), model)

    def _prune(self, model: nn.Module, masks: Masks, level: int) -> Masks:
        def rule(name: str, n: int, alive: int) -> int:
            return alive - pruning.rounded(self.rate * alive)

        with _seeded(stream(0, "ticket", level, "score")):
            found = prune_by(model, rule, self.scope, self.score, self.exclude, masks)
        if found.kept == masks.kept:
            raise UsageError(
                f"level {level} would prune nothing of {found.kept} weights; choose fewer `levels`"
            )
        return found

    def _check(self, model: nn.Module, masks: Masks, turn: Turn) -> None:
        for name, mask in masks.items():
            awake = int(unwrapped(model).get_parameter(name)[~mask].count_nonzero())
            if awake:
                raise SparselthError(
                    f"{turn}: train left {awake} pruned weights of {name} other than 0; give its optimizer "
                    "the masks, as MaskedAdamW(model.parameters(), masks=masks)"
                )

    def _keep(self, seed: int, level: int, model: nn.Module, masks: Masks) -> None:
        self.tickets[seed, level] = Masks(dict(masks))
        if self.folder is not None:
            notes = {"seed": seed, "level": level, "rewind_step": self.rewind}
            save_ticket(self._ticket_file(seed, level), model, masks, self.snapshots[seed], notes)

    def _load(self, seed: int, level: int) -> Masks | None:
        """A ticket that the folder has."""
        file = self._ticket_file(seed, level)
        try:
            ticket = load_ticket(file)
        except SparselthError:
            return None
        if not level:
            self.snapshots[seed] = ticket.snapshot
        self.tickets[seed, level] = Masks(dict(ticket.masks))
        return self.tickets[seed, level]

    def _read(self, turn: Turn) -> Point | None:
        if self.folder is None or not self._file(turn).exists():
            return None
        try:
            point: Point = unsealed(read_json(self._file(turn)))
            return point if Cell.of(point).key == turn.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # damaged: computed again

    def _file(self, turn: Turn) -> Path:
        assert self.folder is not None
        return self.folder / "cells" / f"{turn.key}.json"

    def _ticket_file(self, seed: int, level: int) -> Path:
        assert self.folder is not None
        return self.folder / "cells" / f"seed{seed}-ticket-{level:02d}.safetensors"


def _whole(name: str, value: Any) -> int:
    """A whole number of Python's, from one of numpy's or torch's, too."""
    try:
        return index(value)
    except TypeError:
        raise UsageError(f"`{name}` {value!s:.40}: expected whole numbers") from None


def _check_savable(model: nn.Module) -> None:
    """UsageError, before anything is trained, where a ticket's file could not hold the module."""
    try:
        first_names(model)
        for name, tensor in model.state_dict().items():
            bits(name, tensor)
    except UsageError as error:
        raise UsageError(f"`out`: {error}; leave out `out`, or change the module") from None


def _made(make: Make, number: int) -> nn.Module:
    with _seeded(torch.Generator().manual_seed(number)):
        model = make(number)
    if not isinstance(model, nn.Module):
        raise UsageError(f"`make`: expected a torch.nn.Module, got a {type(model).__name__}")
    return model


@contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Torch's own generators as this one, and as they were behind it."""
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        yield


@contextmanager
def _watched(model: nn.Module, step: int) -> Iterator[list[dict[str, Any]]]:
    """A snapshot of the model after so many steps of an optimizer of its own; none for step 0."""
    found: list[dict[str, Any]] = []
    if not step:
        yield found
        return
    mine = {*map(id, model.parameters())}
    taken: dict[int, int] = {}  # the first optimizer that has a parameter of the model counts

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        owns = any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
        if owns and not found and (not taken or id(optimizer) in taken):
            taken[id(optimizer)] = taken.get(id(optimizer), 0) + 1
            if taken[id(optimizer)] == step:
                found.append(snapshot(model))

    handle = register_optimizer_step_post_hook(after)
    try:
        yield found
    finally:
        handle.remove()


def _called(score: Any) -> str:
    """The name of a function; behind that of a lambda, which all have, 8 hex digits of what it computes."""
    name, code = getattr(score, "__qualname__", "function"), getattr(score, "__code__", None)
    if code is None or not name.endswith("<lambda>"):
        return str(name)
    plain = [
        one for one in code.co_consts if isinstance(one, int | float | str)
    ]  # repr of a set has any order
    said = repr((code.co_code.hex(), code.co_names, plain))
    return f"{name} {checksum(said.encode())[:8]}"


def _metrics(found: Any) -> dict[str, float]:
    named = found if isinstance(found, Mapping) else {"metric": found}
    metrics = {}
    for name, value in named.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real) or not isinstance(name, str) or name in OF_CELL:
            raise UsageError(
                f"`train`: expected a number, or a dict of numbers, none of them called {', '.join(OF_CELL)}"
                f"; got {name}: {type(value).__name__}"
            )
        metrics[name] = float(value)
    if not metrics:
        raise UsageError("`train`: expected a number or a dict of numbers, got an empty dict")
    return metrics


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(sealed(data), indent=1) + "\n").encode()
