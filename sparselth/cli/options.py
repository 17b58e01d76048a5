"""The flags that mean the same in every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
            if not low.isdecimal() or (dash and not high.isdecimal()):
                self.fail(f"{value!r}: expected numbers such as 3, 0-4 or 0,2,5", param, ctx)
            if dash and int(high) < int(low):
                self.fail(
                    f"{value!r}: {part.strip()} counts down; expected the smaller number first", param, ctx
                )
            if dash and int(high) - int(low) >= 1000:
                self.fail(f"{value!r}: more than 1,000 numbers", param, ctx)
            found += range(int(low), int(high or low) + 1)
        return tuple(found)


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


def output(command: F) -> F:
    """--json, --quiet, --debug."""
    command = click.option("--debug", is_flag=True, help="Show tracebacks.")(command)
    command = click.option("-q", "--quiet", is_flag=True, help="No plan and no progress.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


data_dir = click.option(
    "--data-dir",
    type=PATH,
    help="Folder of the data sets, laid out as torchvision does.  [default: $SPARSELTH_DATA or the cache]",
)
