"""The flags that mean the same in every command, those of fields, messages with flags."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import click

F = TypeVar("F", bound=Callable[..., Any])


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """`3`, `0-4` or `0,2,5-7`, as a tuple of ints."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in str(value).split(","):
            low, dash, high = part.strip().partition("-")
            if not low.isdecimal() or (dash and not high.isdecimal()) or len(part) > 32:
                self.fail(f"{value!r:.60}: expected numbers such as 3, 0-4 or 0,2,5", param, ctx)
            if dash and int(high) < int(low):
                self.fail(
                    f"{value!r}: {part.strip()} counts down; expected the smaller number first", param, ctx
                )
            if dash and int(high) - int(low) >= 1000:
                self.fail(f"{value!r}: more than 1,000 numbers", param, ctx)
            found += range(int(low), int(high or low) + 1)
        return tuple(found)


class Steps(Numbers):
    """`500`, or `2ep`, the steps of two epochs, which stays a word until the data set is known."""

    name = "steps"

    def __init__(self, many: bool) -> None:
        self.many = many

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found: list[int | str] = []
        for part in value.split(","):
            if re.fullmatch(r"\d+(\.\d+)?ep", part.strip()):
                found.append(part.strip())
            elif not self.many and re.fullmatch(r"-?\d{1,15}", part.strip()):
                found.append(int(part))  # one below 0 is the configuration's to refuse
            elif self.many:
                found += super().convert(part, param, ctx)
            else:
                self.fail(f"{value!r:.60}: expected a step, 500, or epochs, 2ep", param, ctx)
        if not self.many and len(found) > 1:
            self.fail(f"{value!r:.60}: expected one step, 500, or epochs, 2ep", param, ctx)
        return tuple(found) if self.many else found[0]


class Floats(click.ParamType):  # type: ignore[type-arg]
    """`0.1,0.3,0.5` as a tuple of floats."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(",") if part)
        except ValueError:
            self.fail(f"{value!r:.60}: expected numbers such as 0.5 or 0.1,0.3,0.5", param, ctx)


class Names(click.ParamType):  # type: ignore[type-arg]
    """`a,b,c` as a tuple of names."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


PATH = click.Path(path_type=Path)


plugin = click.option(
    "--plugin",
    metavar="FILE",
    multiple=True,
    expose_value=False,
    help="A Python file that registers models, data sets, scores, arms, experiments or forms.",
)


def output(command: F) -> F:
    """--json, --quiet, --debug, --plugin."""
    command = plugin(command)
    command = click.option("--debug", is_flag=True, help="Show tracebacks.")(command)
    command = click.option("-q", "--quiet", is_flag=True, help="No plan and no progress.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


data_dir = click.option(
    "--data-dir",
    type=PATH,
    help="Folder of the data sets, laid out as torchvision does.  [default: $SPARSELTH_DATA or the cache]",
)


def as_flags(text: str) -> str:
    """A message of the library with its fields as flags: "`batch_size` 0" is "--batch-size 0"."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda match: "--" + match[1].replace("_", "-"), text)


def flag(of: Field[Any], kind: Any, recipes: bool = False) -> click.Option:
    """The flag of a field of type `kind`; with `recipes` its default is the recipe's."""
    choices, default, text = of.metadata["choices"], of.default, as_flags(of.metadata["help"])
    if isinstance(kind, UnionType):  # of a type and None
        kind, _ = get_args(kind)
    if recipes:
        known = "" if default in (MISSING, ()) else f", {default}"
        text, default = f"{text}  [default: the recipe's{known}]", None
    words: dict[str, Any] = {"default": default, "help": text, "show_default": default not in ("", None, ())}
    if of.metadata["epochs"]:
        words["type"] = Steps(many=get_origin(kind) is tuple)
        words["default"] = shown(default) if isinstance(default, tuple) else default
    elif kind is bool:
        words |= {"is_flag": True, "show_default": False}
    elif get_origin(kind) is tuple:
        words["type"] = {int: Numbers(), float: Floats()}.get(get_args(kind)[0], Names())
        words["default"] = shown(default) if isinstance(default, tuple) else None
    elif isinstance(choices, tuple):
        words["type"] = click.Choice(choices)
    else:
        words["type"] = kind
    name = of.name.replace("_", "-")
    switch = f"--{name}/--no-{name}" if kind is bool and recipes else f"--{name}"  # which may have it on
    also = [f"--{of.metadata['also']}"] if of.metadata["also"] else []
    return click.Option([*also, switch, of.name], **words)


def argument(of: Field[Any]) -> click.Argument:
    """The word of a field that stands without a flag, and may be left out."""
    return click.Argument([of.name], required=False, default=of.default, metavar=metavar(of))


def metavar(of: Field[Any]) -> str:
    """What an argument is called in help."""
    return str(of.metadata["also"] or of.name).upper()


def shown(values: tuple[Any, ...]) -> str:
    """Values as their flag takes them: numbers in a row as 0-4."""
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(values))):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
