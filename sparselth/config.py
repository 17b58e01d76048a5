"""What is run, as frozen dataclasses; flags, the run folder's config.json and Python build the same object.

A field made by `option` carries its default, the help of its flag and what it may hold. From these come the
checks, config.json and back, the digest, and on the command line the flags. Imports neither torch nor numpy:
what a user can get wrong is told before anything slow starts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from sparselth.errors import UsageError, unknown
from sparselth.registry import Registry

OPTIMIZERS = ("adam", "sgd")
AUGMENTS = ("none", "crop-flip")
INPUTS = {  # what images are given as, in words
    "standard": "standardised inputs",
    "unit": "inputs in [0, 1]",
    "norm": "inputs of norm 1",
}
SCOPES = ("layer", "global")
KERNELS = ("auto", "native", "torch", "triton", "reference", "autograd")
FIRST = "imp"  # the experiment of a config.json that names none
MOST = 10**9  # that a number may be where its field says nothing else

Check = Callable[[Any], str | None]  # what was expected, or None where a value is that


def option(
    default: Any = MISSING,
    help: str = "",
    check: Check | None = None,
    choices: Collection[str] | Callable[[], Collection[str]] | None = None,
    added: bool = False,
    ordered: bool = True,
    before: Any = MISSING,
    extends: bool = False,
    argument: bool = False,
    also: str = "",
    epochs: bool = False,
) -> Any:
    """A field of a configuration; without `help` it has no flag, and an `argument` stands without one.

    `choices` are the names it may hold, or a function that imports them. `added` fields came after runs had
    been written, with `before`, their default unless given: with it they leave a configuration's digest as it
    was, and a config.json without them has it. Values that are not `ordered` are sorted, so that equal plans
    are equal: numbers by size, names as `choices` has them. A field that `extends` says which cells there
    are, and nothing of what one computes: a run goes on with more. `also` is another name of the flag, told
    first, or what the argument is called. One of `epochs` holds steps, and takes "2ep", those of two epochs.
    """
    metadata = {"help": help, "check": check, "choices": choices, "added": added, "ordered": ordered}
    metadata |= {"before": default if before is MISSING else before, "extends": extends}
    metadata |= {"argument": argument, "also": also, "epochs": epochs}
    return field(default=default, metadata=metadata)


def like(other: type[Options], name: str, default: Any = MISSING, help: str = "") -> Any:
    """The field `name` of another class, with another default or help. It is there from the first."""
    (theirs,) = (f for f in fields(other) if f.name == name)
    default = theirs.default if default is MISSING else default
    changed = {"help": help or theirs.metadata["help"], "added": False, "before": default}
    return field(default=default, metadata={**theirs.metadata, **changed})


def at_least(low: int, why: str = "", most: int = MOST) -> Check:
    """Numbers from `low` to `most`."""
    expected = f"expected {low} or more" + (f" ({why})" if why else "")

    def check(value: int) -> str | None:
        return expected if value < low else None if value <= most else f"expected at most {most:,}"

    return check


def below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else "expected a number from 0 to below 1"


def positive(value: float) -> str | None:
    return None if 0 < value <= MOST else f"expected a positive number, at most {MOST:g}"


def not_negative(value: float) -> str | None:
    return None if 0 <= value <= MOST else f"expected 0 or a positive number, at most {MOST:g}"


def choices_of(of: Field[Any]) -> Collection[str] | None:
    """The names that a field may hold."""
    choices = of.metadata.get("choices")
    return choices if choices is None or isinstance(choices, Collection) else choices()


_known_kinds: dict[Any, dict[str, Any]] = {}


def _kinds(options: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by name; found once."""
    if options not in _known_kinds:
        _known_kinds[options] = get_type_hints(options)
    return _known_kinds[options]


def _not_a(kind: Any, value: Any) -> str | None:
    """What was expected of a field of that type, or None where the value is of it."""
    if isinstance(kind, UnionType):  # of a type and None
        return None if value is None else _not_a(get_args(kind)[0], value)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return "expected a list"
        return next((said for item in value if (said := _not_a(get_args(kind)[0], item))), None)
    if kind is bool:
        return None if isinstance(value, bool) else "expected true or false"
    if kind is int:
        return None if type(value) is int else "expected a whole number"
    if kind is float:
        return None if type(value) in (int, float) else "expected a number"
    if kind is str or get_origin(kind) is Literal:
        return None if isinstance(value, str) else "expected a name"
    if isinstance(kind, type) and issubclass(kind, Options):
        return None if isinstance(value, kind) else "expected settings by name"
    return None  # a plugin's own


def _too_large(value: Any) -> str | None:
    """What was expected where a number is none that can be computed with, or larger than JSON can say."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return "expected a finite number"
        if isinstance(number, int) and abs(number) >= 2**53:
            return f"expected numbers below {2**53:,}"
    return None


@dataclass(frozen=True, kw_only=True)
class Options:
    """A frozen dataclass of `option` fields: checked, written to JSON and read from it."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, kind = getattr(self, f.name), _kinds(type(self))[f.name]
            if kind is float and type(value) is int and not _too_large(value):
                object.__setattr__(self, f.name, float(value))
            if kind == tuple[float, ...] and not _not_a(kind, value) and not _too_large(value):
                value = tuple(map(float, value))
                object.__setattr__(self, f.name, value)
            if not f.metadata.get("ordered", True) and not _not_a(kind, value):
                place = {name: i for i, name in enumerate(choices_of(f) or sorted(value))}
                value = tuple(sorted(value, key=lambda one: place.get(one, len(place))))
                object.__setattr__(self, f.name, value)

    def check(self) -> None:
        """Raise UsageError, naming the field, for values that make no experiment."""
        self._check(names=True)

    def _check(self, names: bool) -> None:
        """Types, names where these are wanted, and what each field says of its values."""
        for f in fields(self):
            value, check = getattr(self, f.name), f.metadata.get("check")
            if expected := _not_a(_kinds(type(self))[f.name], value):
                raise self.wrong(f.name, expected)
            if isinstance(value, Options):
                value.check() if names else value._check(names)
            if names and value != f.default and (choices := choices_of(f)) is not None:
                for name in value if isinstance(value, tuple) else (value,):
                    if name not in choices:
                        kind = choices.kind if isinstance(choices, Registry) else f.name
                        raise unknown(kind, name, choices)
            if expected := (check and check(value)) or _too_large(value):
                raise self.wrong(f.name, expected)

    def wrong(self, name: str, expected: str) -> UsageError:
        """The error of a field that holds something else than what was expected."""
        value = getattr(self, name)
        if isinstance(value, tuple):
            value = ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value)
        elif isinstance(value, float):
            value = f"{value:g}"
        return UsageError(f"`{name}` {value!s:.100}: {expected}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal object."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_json`: `added` fields that `data` lacks are what they were before.

        A field that is unknown, one that has been there from the first and is missing, and one of another
        type or out of its range raise UsageError. Names may be unknown here, as those of a plugin.
        """
        if not isinstance(data, dict):
            raise UsageError(f"expected a JSON object, found {json.dumps(data)[:40]}")
        known = {f.name: f for f in fields(cls)}
        missing = [name for name, f in known.items() if name not in data and not f.metadata.get("added")]
        for what, names in (("unknown", [name for name in data if name not in known]), ("missing", missing)):
            if names:
                raise UsageError(f"{what} {', '.join(names)}; it was written by another version")
        data = {name: f.metadata["before"] for name, f in known.items() if f.metadata.get("added")} | data
        kinds = _kinds(cls)
        found = cls(**{name: _from_json(kinds[name], value) for name, value in data.items()})
        found._check(names=False)
        return found

    def identity(self) -> dict[str, Any]:
        """What tells this object from another: its JSON without what was added and is as before."""
        data = self.to_json()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("added") and value == f.metadata["before"]:
                del data[f.name]
            elif isinstance(value, Options):
                data[f.name] = value.identity()
        return data


def _from_json(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list) else value
    return kind.from_json(value) if isinstance(kind, type) and issubclass(kind, Options) else value


def _drops(steps: tuple[int, ...]) -> str | None:
    right = all(0 <= step <= MOST for step in steps) and len(steps) <= 100
    return None if right else f"expected up to 100 steps from 0 to {MOST:,}"


@dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """How one network is trained. Steps count batches; the learning rate is a function of the step."""

    steps: int = option(help="Training steps of every network.", check=at_least(1))
    lr: float = option(help="Learning rate.", check=positive)
    batch_size: int = option(60, "Images per step.", at_least(1))
    optimizer: Literal["adam", "sgd"] = option("adam", "What takes the steps.", choices=OPTIMIZERS)
    momentum: float = option(0.9, "Of sgd.", below_one)
    weight_decay: float = option(0.0, "L2 penalty in the gradient.", not_negative)
    warmup: int = option(0, "Steps over which the learning rate rises to `lr`.", at_least(0))
    lr_drops: tuple[int, ...] = option(
        (), "Steps at which the learning rate is divided by ten, e.g. 20000,25000.", _drops, ordered=False
    )
    eval_every: int = option(100, "Steps between evaluations.", at_least(1))
    cosine: bool = option(
        False, "Let the learning rate fall to 0 along half a cosine, behind the warm-up.", added=True
    )
    augment: Literal["none", "crop-flip"] = option(
        "none",
        "What is done to training images: crop-flip shifts them by up to 4 pixels, or of JPEGs takes random "
        "parts, and mirrors every second.",
        choices=AUGMENTS,
        added=True,
    )
    inputs: Literal["standard", "unit", "norm"] = option(
        "standard",
        "What images are given as: standardised by mean and deviation of each channel, in [0, 1], or each "
        "divided by its Euclidean norm.",
        choices=tuple(INPUTS),
        added=True,
    )

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that takes `step` to `step + 1`."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        rate = self.lr * warm * 0.1 ** sum(step >= drop for drop in self.lr_drops)
        if not self.cosine or step < self.warmup:
            return rate
        return rate * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2


@dataclass(frozen=True)
class Cell:
    """The smallest thing an experiment computes once: the names that its random streams are derived from.

    `arm` says what is done, `level` how far (0 is the dense network), `draw` which of several.
    """

    seed: int
    arm: str
    level: int
    draw: int = 0

    def __str__(self) -> str:
        draw = f" draw {self.draw}" if self.draw else ""
        return f"seed {self.seed} {self.arm}{draw} level {self.level}"

    @property
    def key(self) -> str:
        """A name for files, e.g. seed0-reinit-03-draw1."""
        return f"seed{self.seed}-{self.arm}-{self.level:02d}" + (f"-draw{self.draw}" if self.draw else "")

    @staticmethod
    def of(line: dict[str, Any]) -> Cell:
        """Whom a line of a run folder is about."""
        return Cell(line["seed"], line["arm"], line["level"], line["draw"])


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What one run computes: fields, and the cells they ask for."""

    name: ClassVar[str]  # of the experiment: its command, and in config.json

    def cells(self) -> list[Cell]:
        """Every cell of the run, in the order of its lines."""
        raise NotImplementedError

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells that must be finished before this one can start."""
        return ()

    def to_json(self) -> dict[str, Any]:
        return {"experiment": self.name} | super().to_json()

    @property
    def digest(self) -> str:
        """Eight hex digits that name what a cell computes, whichever cells there are."""
        return _digest(self._named(but=self.extends()))

    def digest_before(self, written: Mapping[str, Any] | None = None) -> str:
        """Eight hex digits that named a configuration with its cells, before runs could be extended.

        `written`: the JSON object it was read from, whose lists may not be sorted.
        """
        data = self._named(but=())
        return _digest(
            data | {name: value for name, value in (written or {}).items() if name in self.extends()}
        )

    def extends(self) -> list[str]:
        """The fields that say which cells there are."""
        return [f.name for f in fields(self) if f.metadata.get("extends")]

    def _named(self, but: Collection[str]) -> dict[str, Any]:
        first = ["experiment"] * (self.name == FIRST)
        return {name: value for name, value in self.identity().items() if name not in (*but, *first)}

    def going_on(self, theirs: Config) -> Self:
        """This configuration as it goes on with a run of `theirs`, whose cells stay what they are."""
        return self

    def keeps(self, theirs: Config, name: str) -> bool:
        """Whether a run of `theirs` would keep its cells with the field `name` as it is here."""
        alone = replace(theirs, **{name: getattr(self, name)})
        return set(theirs.cells()) <= set(alone.cells())

    def difference(self, other: Config) -> Iterator[tuple[str, Any, Any]]:
        """Every setting that differs: its name, its value here, its value there."""
        ours, theirs = self.to_json(), other.to_json()
        for data in (ours, theirs):
            data |= data.pop("recipe", {}) | data  # an experiment's own field before the recipe's
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                yield name, ours.get(name), theirs.get(name)


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


EXPERIMENTS: Registry[type[Config]] = Registry(
    "experiment",
    "sparselth.experiments",
    but=(
        *(
            "agenda",
            "arms",
            "at_init_jobs",
            "base",
            "connectivity_jobs",
            "cost",
            "flag",
            "landscape_jobs",
            "jobs",
            "memory",
            "neuron_scores",
            "neurons_jobs",
            "plan",
            "pool",
        ),
        *(
            "predict_jobs",
            "price",
            "processes",
            "ranks",
            "rewound",
            "run",
            "schedule_jobs",
            "single_relu",
            "source",
            "strong_jobs",
            "training",
            "widths",
            "worker",
        ),
    ),
)


def config_from_json(data: dict[str, Any]) -> Config:
    """The configuration of a config.json, of whichever experiment; one of other fields raises UsageError."""
    if not isinstance(data, dict):
        raise UsageError(f"expected a JSON object, found {json.dumps(data)[:40]}")
    data = {name: value for name, value in data.items() if name != "sha256"}
    name = data.pop("experiment", FIRST)
    if not isinstance(name, str):
        raise UsageError(f"`experiment` {json.dumps(name)[:40]}: expected a name")
    return EXPERIMENTS[name].from_json(data)
