"""What a sweep goes over: values of settings, their points, and the names of these.

A point is named by its values as the configuration holds them, in the order of the names: lr=0.01,rate=0.2.
The name is the same however a number was spelled and in whatever order axes and values were given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from math import prod
from typing import Any

from sparselth.errors import UsageError, unknown
from sparselth.experiments.base import Experiment, get_experiment
from sparselth.experiments.training import Training, configured, settings_of
from sparselth.files import checksum

MOST_POINTS = 1000
REPLICAS, DEVICE = "seeds", "device"  # settings that are no axis


@dataclass(frozen=True)
class Point:
    """One choice of a value on every axis."""

    name: str
    values: dict[str, Any]
    config: Experiment  # with all seeds


@dataclass(frozen=True)
class Grid:
    """An experiment by name, values by axis, and what else is chosen of its settings; see `settings_of`.

    `recipe` is one of the names of the experiment's recipes, the first unless given.
    """

    experiment: str
    axes: Mapping[str, Sequence[Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""

    def __post_init__(self) -> None:
        axes = {name: [*map(held, values)] for name, values in self.axes.items()}
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "settings", {name: held(value) for name, value in self.settings.items()})

    def points(self) -> list[Point]:
        """Every point, checked by its configuration; UsageError where one makes no experiment."""
        experiment = get_experiment(self.experiment)
        if not self.axes:
            raise UsageError("`grid`: expected an axis at least, such as rate=0.1,0.2")
        axes = {axis(experiment, name): [*values] for name, values in sorted(self.axes.items())}
        settings = {setting(experiment, name): value for name, value in self.settings.items()}
        if twice := next((name for name in axes if name in settings), None):
            raise UsageError(f"`grid` {twice}: is given as `{twice}`, too; expected one of them")
        for name, values in axes.items():
            if not values:
                raise UsageError(f"`grid` {name}: expected a value at least")
        if (number := prod(map(len, axes.values()))) > MOST_POINTS:
            raise UsageError(f"`grid`: has {number:,} points; expected at most {MOST_POINTS:,}")
        found = dict[str, Point]()
        for choice in product(*axes.values()):
            chosen = dict(zip(axes, choice, strict=True))
            config = configured(experiment, {**settings, **chosen}, self.recipe)
            config.check()
            held = {name: value_of(config, name) for name in sorted(axes)}
            name = ",".join(f"{axis}={spelled(value)}" for axis, value in held.items())
            if name in found:
                raise UsageError(f"`grid`: has the point {name} twice")
            found[name] = Point(name, held, config)
        return [*found.values()]


def setting(experiment: type[Experiment], name: str) -> str:
    """The setting of that name, or of its flag's; an unknown one raises UsageError with the nearest."""
    known = settings_of(experiment)
    words = {one: one for one in known}
    words |= {str(f.metadata["also"]): one for one, f in known.items() if f.metadata["also"]}
    for word in (name, name.replace("-", "_")):
        if word in words:
            return words[word]
    raise unknown(f"setting of {experiment.name}", name, words)


def axis(experiment: type[Experiment], name: str) -> str:
    """The setting of an axis."""
    if (found := setting(experiment, name)) == REPLICAS:
        raise UsageError("`grid` seeds: seeds are the replicas of every point; give them as `seeds`")
    if found == DEVICE:
        raise UsageError("`grid` device: all points are computed on one kind of device; give it as `device`")
    return found


def held(value: Any) -> Any:
    """A setting as configurations hold it: a list, which JSON makes of a tuple, or a range is the tuple."""
    return tuple(value) if isinstance(value, (list, range)) else value


def value_of(config: Any, name: str) -> Any:
    """What a configuration holds for a setting: itself, or its recipe."""
    return getattr(config if hasattr(config, name) else config.recipe, name)


def spelled(value: Any) -> str:
    """A value as names have it."""
    if isinstance(value, tuple):
        return "+".join(map(spelled, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def folder_of(name: str) -> str:
    """What the folder of a point is called: its name where that can be, else the same with a checksum."""
    if re.fullmatch(r"\w[\w.,=+-]{0,119}", name, re.ASCII):
        return name
    return f"{re.sub(r'[^a-zA-Z0-9_.,=+-]+', '_', name)[:100]}-{checksum(name.encode())[:8]}"


def groups(point: Point, number: int) -> list[Point]:
    """The point once for each of up to `number` groups of its seeds, a run each; itself where it is one."""
    config = point.config
    if number < 2 or not isinstance(config, Training) or len(config.seeds) < 2:
        return [point]
    number = min(number, len(config.seeds))
    ends = [len(config.seeds) * i // number for i in range(number + 1)]
    return [of_seeds(point, config.seeds[low:high]) for low, high in pairwise(ends)]


def of_seeds(point: Point, seeds: tuple[int, ...]) -> Point:
    """The point with these seeds alone."""
    return replace(point, config=replace(point.config, seeds=seeds))  # type: ignore[call-arg]
