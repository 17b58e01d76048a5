"""The run folder: everything one run of any experiment computed, in files that a kill cannot spoil.

    config.json        the experiment and what is run; another configuration is refused
    environment.json   versions, processor, git commit, data checksum
    cells.jsonl        one line per finished cell: what its experiment says of it
    evaluations.jsonl  one line per evaluation on the validation set
    timings.jsonl      seconds per cell; the only measurements that differ from run to run
    cells/KEY.safetensors        mask bits, the surviving trained weights, biases and batch norms; level 0
                                 adds all of the rewind step, so that every ticket can be rebuilt
    checkpoints/KEY.safetensors  a cell that is under way
    figures/

Whole files are written beside and renamed. Lines are appended, the one of cells.jsonl last: a cell
without it has not happened, and what else it left is dropped when the folder is opened again. When
the run is complete the lines are sorted, so that the files do not tell in which order cells ended.
Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselth.config import Cell, Config, config_from_json
from sparselth.errors import SparselthError, UsageError
from sparselth.files import (
    append_lines,
    dump,
    dump_lines,
    errors_named,
    read_lines,
    write_atomically,
)
from sparselth.models import get_model
from sparselth.registry import plugins
from sparselth.tickets import read_mask

LINES = ("evaluations.jsonl", "timings.jsonl", "cells.jsonl")  # in the order they are appended


def point(cell: Cell, **values: Any) -> dict[str, Any]:
    """A line about a cell."""
    return {"seed": cell.seed, "arm": cell.arm, "level": cell.level, "draw": cell.draw, **values}


@dataclass(frozen=True)
class RunRecord:
    """A run folder as it was when read."""

    path: Path
    config: Any  # of the class of its experiment, whose report reads more of it than `Config` has
    points: list[dict[str, Any]]  # finished cells with their timings, in the order of config.cells()
    evaluations: list[dict[str, Any]]  # of those cells, by step within a cell

    @cached_property
    def by_level(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """(arm, level) → its finished cells."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for line in self.points:
            found.setdefault((line["arm"], line["level"]), []).append(line)
        return found

    @cached_property
    def planned(self) -> Counter[tuple[str, int]]:
        """(arm, level) → how many cells of it the run has."""
        return Counter((cell.arm, cell.level) for cell in self.config.cells())

    @property
    def complete(self) -> bool:
        return len(self.points) == len(self.config.cells())

    def mask(self, seed: int, level: int, name: str) -> NDArray[np.bool_]:
        """The ticket's mask of the weight tensor `name`, bool [N, K]."""
        spec = next(s for s in get_model(self.config.model).weights if s.name == name)
        return read_mask(cell_path(self.path, Cell(seed, "ticket", level)), spec)


def read(path: Path) -> RunRecord:
    """The run in `path`, finished or not; SparselthError when there is none or it cannot be read."""
    config = read_config(path)
    lines = {name: read_lines(path / name) for name in LINES}
    done = {Cell.of(line) for line in lines["cells.jsonl"]}
    timings = {Cell.of(line): line for line in lines["timings.jsonl"]}
    untimed = dict.fromkeys(("train_seconds", "step_seconds"))
    points = [line | timings.get(Cell.of(line), untimed) for line in lines["cells.jsonl"]]
    order = {who: i for i, who in enumerate(config.cells())}
    return RunRecord(
        path,
        config,
        sorted(points, key=lambda line: order[Cell.of(line)]),
        sorted(
            (line for line in lines["evaluations.jsonl"] if Cell.of(line) in done),
            key=lambda line: (order[Cell.of(line)], line["step"]),
        ),
    )


def read_config(path: Path) -> Any:
    """The configuration of the run in `path`, of the class of its experiment.

    Where a name in it is not known and a plugin that the run was begun with is not loaded, the error says so.
    """
    file = path / "config.json"
    if not file.is_file():
        raise SparselthError(f"{path}: not a run folder (no config.json); `sparselth ls runs` lists runs")
    try:
        config = config_from_json(json.loads(file.read_text()))
        if without := _plugins_not_loaded(path):
            config.check()
    except UsageError as error:
        if without := _plugins_not_loaded(path):
            needed = " ".join(f"`plugin` {name}" for name in without)
            raise SparselthError(f"{path}: was begun with {needed}; give it again ({error})") from error
        raise SparselthError(f"{file}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SparselthError(f"{file}: cannot be read as a configuration ({error})") from error
    return config


def _plugins_not_loaded(path: Path) -> list[str]:
    """The plugins that a run was begun with and that are not there now."""
    try:
        theirs = json.loads((path / "environment.json").read_text()).get("plugins", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [name for name in theirs if Path(name) not in plugins()]


class RunFolder:
    """A run folder that one process writes to; `open_run` gives it."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.finished = self._recover()

    def begun_elsewhere(self, environment: dict[str, Any]) -> str | None:
        """What differs from the machine that began the run and may change bits, or None."""
        try:
            theirs = json.loads((self.path / "environment.json").read_text())
            pairs = {
                "torch": (theirs["packages"]["torch"], environment["packages"]["torch"]),
                "processor": (theirs["cpu"], environment["cpu"]),
            }
        except (OSError, ValueError, KeyError, TypeError):
            return "environment.json cannot be read"
        return "; ".join(f"{k} {a} there, {b} here" for k, (a, b) in pairs.items() if a != b) or None

    def has_data(self, environment: dict[str, Any]) -> bool:
        """Whether it was begun on the same images; a run that says nothing of them is believed."""
        try:
            theirs = json.loads((self.path / "environment.json").read_text())["data_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return True
        return bool(theirs == environment.get("data_sha256", theirs))

    @property
    def break_even(self) -> dict[str, float]:
        """Below which density which layer is compressed: what the machine that began the run measured."""
        try:
            environment = json.loads((self.path / "environment.json").read_text())
            return {str(name): float(share) for name, share in environment["break_even"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SparselthError(
                f"{self.path / 'environment.json'}: cannot be read ({error}); begin the run in another `out`"
            ) from error

    def add(
        self,
        cell: Cell,
        line: dict[str, Any],
        evaluations: list[dict[str, Any]],
        timings: dict[str, Any],
    ) -> None:
        """Record a finished cell whose file is already written."""
        for name, lines in zip(
            LINES, (evaluations, [point(cell, **timings)], [point(cell, **line)]), strict=True
        ):
            append_lines(self.path / name, lines)
        self.finished.add(cell)
        checkpoint_path(self.path, cell).unlink(missing_ok=True)

    def complete(self) -> None:
        """Sort the lines into the order of `config.cells()`."""
        order = {who: i for i, who in enumerate(self.config.cells())}
        for name in LINES:
            lines = read_lines(self.path / name)
            lines.sort(key=lambda line: (order[Cell.of(line)], line.get("step", 0)))
            write_atomically(self.path / name, dump_lines(lines))

    def _recover(self) -> set[Cell]:
        """The finished cells; lines of others, torn ones and left-over files go."""
        planned = set(self.config.cells())
        lines = {name: read_lines(self.path / name) for name in LINES}
        done = {Cell.of(line) for line in lines["cells.jsonl"]} & planned
        done = {who for who in done if cell_path(self.path, who).is_file()}
        timed = {Cell.of(line) for line in lines["timings.jsonl"]}
        done &= timed
        for name in LINES:
            text = dump_lines([line for line in lines[name] if Cell.of(line) in done])
            file = self.path / name
            if file.is_file() and file.read_bytes() != text:
                write_atomically(file, text)
        for folder in ("cells", "checkpoints"):
            (self.path / folder).mkdir(exist_ok=True)
            for rest in (self.path / folder).glob("*.tmp"):
                rest.unlink(missing_ok=True)
        return done


@contextmanager
def open_run(path: Path, config: Config, environment: dict[str, Any], resume: bool) -> Iterator[RunFolder]:
    """Create the folder, or open one that this configuration began; locked until left.

    Raises SparselthError, before anything is written, when the folder holds something else, a run of
    another configuration, an unfinished run without `resume`, or a run that is under way.
    """
    fresh = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not fresh:
        if not path.is_dir():
            raise SparselthError(f"{path}: expected a folder for the run, found a file; choose another `out`")
        theirs = read_config(path)
        if differs := next(config.difference(theirs), None):
            name, ours, other = differs
            raise SparselthError(
                f"{path}: holds a run with another {name} ({other} there, {ours} here); choose another `out`"
            )
    with errors_named(path):
        path.mkdir(parents=True, exist_ok=True)
        # closed only by the end of the process, because closing drops the lock
        with (path / ".lock").open("w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SparselthError(
                    f"{path}: another process is running this run; wait for it or stop it"
                ) from None
            if fresh:
                write_atomically(path / "environment.json", dump(environment))
                write_atomically(path / "config.json", dump(config.to_json()))
            folder = RunFolder(path, config)
            missing = len(config.cells()) - len(folder.finished)
            if not fresh and missing and not folder.has_data(environment):
                raise SparselthError(
                    f"{path}: was begun on other images of that name ({environment['dataset']}); "
                    "choose another `out`"
                )
            if not fresh and missing and not resume:
                raise SparselthError(
                    f"{path}: unfinished, {missing} of {len(config.cells())} cells are missing; "
                    "add `resume` to go on, or choose another `out`"
                )
            yield folder


def cell_path(run: Path, cell: Cell) -> Path:
    return run / "cells" / f"{cell.key}.safetensors"


def checkpoint_path(run: Path, cell: Cell) -> Path:
    return run / "checkpoints" / f"{cell.key}.safetensors"
