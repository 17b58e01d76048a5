"""Experiments about a finished run of `imp`: which tickets they read, and that these stay what they were.

A subclass says which cells it reads (`source_cells`) and takes what it needs of the source's configuration
(`take`). Its own config.json keeps that configuration and the checksums of the files read: a run goes on with
these alone, wherever the source's folder lies by now, and is shown without it. Imports no torch by itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselth.config import Cell, Config, config_from_json, option
from sparselth.errors import SparselthError, UsageError
from sparselth.experiments.base import Experiment

if TYPE_CHECKING:
    from sparselth.experiments.imp import ImpConfig
    from sparselth.tickets import Content

OWN = ("source", "source_config", "source_files")  # fields of this class


@dataclass(frozen=True, kw_only=True)
class FromRun(Experiment):
    """Reads tickets of a finished run of `imp`."""

    source: str = option("", "Folder of a run of `imp`.", argument=True, also="run")
    source_config: str = option("")  # its configuration as JSON: read unless given
    source_files: tuple[str, ...] = option(())  # of the tickets read, "KEY CHECKSUM" each: read unless given

    def __post_init__(self) -> None:
        read = self.source and not self.source_config
        if read:
            object.__setattr__(self, "source_config", json.dumps(_read(self.source).config.to_json()))
        if self.source_config:
            self.take(self.imp)
        super().__post_init__()
        if read and not self.source_files:
            self._check(names=True)  # as many cells as there are levels and seeds are looked for
            object.__setattr__(self, "source_files", tuple(self._sums()))

    def check(self) -> None:
        if not self.source:
            raise UsageError(
                f"{self.name}: expected the folder of a run of imp to read tickets of; `sparselth ls runs` "
                "lists runs"
            )
        super().check()

    def take(self, imp: ImpConfig) -> None:
        """Set fields that were not given to what the source has, by `object.__setattr__`."""

    def source_cells(self) -> Sequence[Cell]:
        """The cells of the source that are read; level 0 of their seeds is read with them."""
        raise NotImplementedError

    @cached_property
    def imp(self) -> ImpConfig:
        """The configuration of the source, as it was when this run began."""
        from sparselth.experiments.imp import ImpConfig

        try:
            found = config_from_json(json.loads(self.source_config))
        except ValueError as error:
            raise self.wrong("source_config", f"expected a configuration ({error})") from error
        if not isinstance(found, ImpConfig):
            raise self.wrong("source_config", f"expected one of imp, found {found.name}")
        return found

    def ticket(self, cell: Cell) -> Content:
        """Mask [M], trained weights [P] and weights of the rewind step [P], unmasked, of a source's cell.

        SparselthError where a file is not the one that this run was begun with.
        """
        from sparselth import tickets
        from sparselth.files import file_sum
        from sparselth.runs import cell_path

        found, known = [], dict(entry.split(" ") for entry in self.source_files)
        for one in (cell, _dense(cell)):
            file = cell_path(Path(self.source), one)
            try:
                right = file_sum(file) == known[one.key]
            except OSError as error:
                raise SparselthError(f"{file}: cannot be read ({error.strerror})") from error
            if not right:
                raise SparselthError(
                    f"{file}: is not the ticket that this run was begun with; restore it, or begin another"
                )
            found.append(tickets.read(file, self.imp.network.params)[0])
        return replace(found[0], rewound=found[1].rewound)

    @property
    def source_break_even(self) -> dict[str, float]:
        """Below which density which layer was compressed there: with other kernels bits differ."""
        from sparselth.begun import read_environment

        found = read_environment(Path(self.source)).get("break_even")
        return found if isinstance(found, dict) else {}

    def _sums(self) -> Iterator[str]:
        """Every ticket that is read with its checksum; SparselthError where it is not there or damaged."""
        from sparselth.files import file_sum
        from sparselth.runs import cell_path

        record, wanted = _read(self.source), dict.fromkeys(self.source_cells())
        there = {Cell.of(one) for one in record.points}
        for cell in dict.fromkeys((*map(_dense, wanted), *wanted)):
            file = cell_path(record.path, cell)
            if cell not in there:
                raise UsageError(f"{self.source}: has no finished {cell}; {_has(there)}")
            try:
                found = file_sum(file)
            except OSError as error:
                raise SparselthError(f"{file}: cannot be read ({error.strerror})") from error
            if found != record.files.get(cell, found):
                raise SparselthError(
                    f"{file}: is not what was written; continue its run with `resume`, which computes it "
                    "again"
                )
            yield f"{cell.key} {found}"

    def _named(self, but: Collection[str]) -> dict[str, Any]:
        """By what the source computed, wherever it lies and however many cells it has."""
        named = super()._named((*but, *OWN))
        return named | {"source": self.imp.digest if self.source_config else ""}

    def difference(self, other: Config) -> Iterator[tuple[str, Any, Any]]:
        """Beside other settings: whether the source is another, or its tickets came out otherwise."""
        for name, ours, theirs in super().difference(other):
            if name not in OWN:
                yield name, ours, theirs
        if not isinstance(other, FromRun):
            return
        if self.imp.digest != other.imp.digest:
            yield "source", f"{self.source}, {self.imp.digest}", f"{other.source}, {other.imp.digest}"
        ours, theirs = (dict(entry.split(" ") for entry in one.source_files) for one in (self, other))
        for key in ours:
            if key in theirs and ours[key] != theirs[key]:
                yield f"ticket {key} of its source", ours[key], theirs[key]


def _dense(cell: Cell) -> Cell:
    """The dense network of its seed, whose file holds the weights of the rewind step."""
    return Cell(cell.seed, "ticket", 0)


def _read(source: str) -> Any:
    """The record of a run; UsageError where it is none of `imp`."""
    from sparselth.runs import read

    record = read(Path(source))
    if record.config.name != "imp":
        raise UsageError(
            f"{source}: is a run of {record.config.name}; expected one of imp, whose tickets are read"
        )
    return record


def _has(there: Collection[Cell]) -> str:
    """Which tickets a run has, in words."""
    tickets = [cell for cell in there if cell.arm == "ticket"]
    if not tickets:
        return "it has no ticket yet"
    seeds, levels = (sorted({getattr(cell, name) for cell in tickets}) for name in ("seed", "level"))
    return f"it has tickets of seeds {','.join(map(str, seeds))} up to level {levels[-1]}"
