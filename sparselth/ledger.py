"""What a run folder holds that can be believed: its lines and files, held against their checksums.

The line of a finished cell in cells.jsonl carries a `proof`: `config`, the digest of what its experiment
computes; `file`, the checksum of its file; `evaluations`, that of its lines in evaluations.jsonl; `needs`,
the checksums of the files it was computed from. The line itself, and that of timings.jsonl, end with a
`sha256` of their own. So a cell is finished when its line, its evaluations and its file are those that were
written, and the files it was computed from are those that are there. A run of an older version has no
proofs: then headers of files tell what they are, and its lines are believed. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparselth import tickets
from sparselth.config import Cell, Config
from sparselth.errors import SparselthError
from sparselth.files import (
    Line,
    checksum,
    file_sum,
    joined,
    line,
    load_arrays,
    plain,
    read_lines,
    sealed_line,
)

LINES = ("evaluations.jsonl", "timings.jsonl", "cells.jsonl")  # in the order they are appended


class Computed(Protocol):
    """A cell that was computed, as its experiment hands it over."""

    @property
    def cell(self) -> Cell: ...
    @property
    def line(self) -> dict[str, Any]: ...
    @property
    def evaluations(self) -> list[dict[str, Any]]: ...
    @property
    def timings(self) -> dict[str, Any]: ...


def point(cell: Cell, **values: Any) -> dict[str, Any]:
    """A line about a cell."""
    return {"seed": cell.seed, "arm": cell.arm, "level": cell.level, "draw": cell.draw, **values}


def cell_path(run: Path, cell: Cell) -> Path:
    return run / "cells" / f"{cell.key}.safetensors"


def checkpoint_path(run: Path, cell: Cell) -> Path:
    return run / "checkpoints" / f"{cell.key}.safetensors"


@dataclass(frozen=True)
class Entry:
    """A finished cell: what its line says of it, its lines in the other files, the proof."""

    point: dict[str, Any]
    evaluations: list[Line]
    timing: Line | None  # a time that is lost stays unknown: the cell is what it was
    proof: dict[str, Any] | None  # None in a run of an older version

    @property
    def line(self) -> bytes:
        """Its line in cells.jsonl."""
        return line(self.point) if self.proof is None else sealed_line(self.point | {"proof": self.proof})


@dataclass
class Ledger:
    """The finished cells of a run, and in words what else lies there and is not believed."""

    entries: dict[Cell, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    rotten: set[str] = field(default_factory=set)  # checkpoints that nothing goes on from

    def content(self, cells: Iterable[Cell]) -> dict[str, bytes]:
        """What the files of lines hold of the cells that are finished, in the order given."""
        found = [self.entries[cell] for cell in cells if cell in self.entries]
        return {
            "evaluations.jsonl": joined(one.raw for entry in found for one in entry.evaluations),
            "timings.jsonl": joined(entry.timing.raw for entry in found if entry.timing),
            "cells.jsonl": joined(entry.line for entry in found),
        }

    def summary(self) -> str:
        """The problems in a line."""
        shown, rest = self.problems[:3], len(self.problems) - 3
        return "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")


def examine(path: Path, config: Config, proven: bool, files: bool, before: str = "") -> Ledger:
    """Hold the lines of a run against their checksums and, where `files`, the files of its cells too.

    `proven`: the run is of a version that proves its lines, so that one without a proof is none of it; files
    of an older one name the configuration by the digest `before`.
    SparselthError where config.json is not what its cells were computed from.
    """
    ledger, digest = Ledger(), config.digest
    planned = set(config.cells())
    # the lines of cells first: while a run is under way, what they speak of has been written
    lines = {name: read_lines(path / name) for name in reversed(LINES)}
    for name in LINES:
        ledger.problems += lines[name][1]
    known: dict[bytes, Cell | None] = {}
    evaluations = _by_cell("evaluations.jsonl", lines, planned, known, ledger, proven)
    timings = _by_cell("timings.jsonl", lines, planned, known, ledger, proven)
    for one in lines["cells.jsonl"][0]:
        where, data = f"cells.jsonl, line {one.number},", plain(one.data)
        cell, proof = _whom(one, known), data.pop("proof", None)
        if cell is None or not one.right or not _is_proof(proof) or (proven and not (one.sealed and proof)):
            ledger.problems.append(f"{where} is not what was written")
        elif cell not in planned or (proof and proof["config"] != digest):
            ledger.problems.append(f"{where} is of another run ({cell})")
        elif cell in ledger.entries:
            ledger.problems.append(f"{where} is a second one of {cell}")
        elif (own := _evaluations(evaluations.get(cell, {}).values(), proof)) is None:
            ledger.problems.append(f"evaluations.jsonl lacks lines of {cell}, or has others")
        else:
            timing = next(iter(timings.get(cell, {}).values()), None)
            ledger.entries[cell] = Entry(data, own, timing, proof)
    if untimed := [cell for cell, entry in ledger.entries.items() if entry.timing is None]:
        whose = f"{untimed[0]}" if len(untimed) == 1 else f"{len(untimed)} cells"
        ledger.problems.append(f"timings.jsonl lacks {whose}, whose times stay unknown")
    if files:
        _examine_files(path, config, before, ledger)
        _examine_checkpoints(path, config, ledger)
    for cell in [*ledger.entries]:
        if need := _other_need(config, cell, ledger):
            ledger.problems.append(f"{cell} was computed from another file of {need}")
            del ledger.entries[cell]
    return ledger


def prove(
    path: Path, digest: str, cell: Cell, needs: Mapping[str, str], evaluations: Iterable[bytes]
) -> dict[str, Any]:
    """The proof of a cell whose file is written; `needs`: the checksums of the files it was computed from."""
    return {
        "config": digest,
        "needs": dict(needs),
        "evaluations": checksum(*evaluations),
        "file": file_sum(cell_path(path, cell)),
    }


def _cell(data: Mapping[str, Any]) -> Cell | None:
    """Whom a line is about, None where it does not say."""
    seed, arm, level, draw = (data.get(name) for name in ("seed", "arm", "level", "draw"))
    right = isinstance(arm, str) and all(type(number) is int for number in (seed, level, draw))
    return Cell.of(dict(data)) if right else None


def _is_proof(proof: Any) -> bool:
    if proof is None:
        return True
    words = ("config", "file", "evaluations")
    return (
        isinstance(proof, dict)
        and all(isinstance(proof.get(name), str) for name in words)
        and isinstance(proof.get("needs"), dict)
    )


def _whom(one: Line, known: dict[bytes, Cell | None]) -> Cell | None:
    """Whom a line is about, by how it begins, since all lines of a cell begin alike; `known` so far."""
    at = one.raw.find(b'"draw": ')
    head = one.raw[: one.raw.find(b",", at)] if at >= 0 else b""
    if head not in known:
        try:
            data = json.loads(head.decode() + "}")
        except (ValueError, RecursionError):
            data = one.data
        if data.keys() != {"seed", "arm", "level", "draw"}:  # in another order, or of an older version's
            return _cell(one.data)
        known[head] = _cell(data)
    return known[head]


def _by_cell(
    name: str,
    lines: Mapping[str, tuple[list[Line], list[str]]],
    planned: set[Cell],
    known: dict[bytes, Cell | None],
    ledger: Ledger,
    proven: bool,
) -> dict[Cell, dict[bytes, Line]]:
    """The lines of a file by whom they are about, without second ones; also of cells that never finished.

    Evaluations that a proof is going to tell right or wrong are not read for it.
    """
    found: dict[Cell, dict[bytes, Line]] = {}
    times = name == "timings.jsonl"
    for one in lines[name][0]:
        cell = _whom(one, known)
        if times:
            right = one.sealed >= proven and _finite(one.data)
        else:
            right = proven or type(one.data.get("step")) is int
        if cell is None or not one.right or not right:
            ledger.problems.append(f"{name}, line {one.number}, is not what was written")
        elif cell not in planned:
            ledger.problems.append(f"{name}, line {one.number}, is of another run ({cell})")
        elif cell in found and (times or one.raw in found[cell]):
            ledger.problems.append(f"{name}, line {one.number}, is a second one of {cell}")
        else:
            found.setdefault(cell, {})[one.raw] = one
    return found


def _finite(data: Mapping[str, Any]) -> bool:
    """Whether the numbers of a line are finite; times have words beside them, such as by which clock."""
    who = ("seed", "arm", "level", "draw")
    return all(
        isinstance(value, str) or (isinstance(value, int | float) and abs(value) < 1e300)
        for name, value in data.items()
        if name not in who
    )


def _evaluations(lines: Iterable[Line], proof: dict[str, Any] | None) -> list[Line] | None:
    """The evaluations of a cell by step; None where they are not those of its proof."""
    found = [*lines]
    if proof and proof["evaluations"] == checksum(*(one.raw for one in found)):
        return found
    steps = [(one.data.get("step"), one) for one in found]
    if not all(type(step) is int for step, _ in steps):
        return None
    found = [one for _, one in sorted(steps, key=lambda pair: pair[0] or 0)]
    return found if not proof or proof["evaluations"] == checksum(*(one.raw for one in found)) else None


def _examine_files(path: Path, config: Config, before: str, ledger: Ledger) -> None:
    digests, other = (config.digest, before), 0
    for cell, entry in [*ledger.entries.items()]:
        file, wrong = cell_path(path, cell), ""
        try:
            if entry.proof and file_sum(file) == entry.proof["file"]:
                continue
            head = load_arrays(file)[1]
        except OSError:
            wrong = "is missing" if not file.exists() else "cannot be read"
        except SparselthError:
            wrong = "is missing" if not file.exists() else "is damaged"
        else:
            if head.get("cell", cell.key) != cell.key:
                wrong = f"is the file of {head['cell']}"
            elif entry.proof:
                wrong = "is not what was written"
            elif head.get("config", config.digest) not in digests:
                wrong, other = "is of another configuration", other + 1
        if wrong:
            ledger.problems.append(f"cells/{file.name} {wrong}")
            del ledger.entries[cell]
    if other and not ledger.entries:  # of an older version, whose config.json has no checksum
        raise SparselthError(
            f"{path / 'config.json'}: its cells are of another configuration, so it was altered; "
            "restore it, or choose another `out`"
        )


def _examine_checkpoints(path: Path, config: Config, ledger: Ledger) -> None:
    """Whether checkpoints of cells that are not finished are what their names say; older ones do not tell."""
    finished = {cell.key for cell in ledger.entries}
    for file in sorted((path / "checkpoints").glob("*.safetensors")):
        if file.stem in finished:
            continue
        try:
            header = load_arrays(file)[1]
        except SparselthError:
            header = {"schema": tickets.SCHEMA}
        mine = {"cell": file.stem, "config": config.digest}
        right = all(header.get(name, value) == value for name, value in mine.items())
        if header.get("schema") == tickets.SCHEMA or not right:
            ledger.problems.append(f"checkpoints/{file.name} is not what was written")
            ledger.rotten.add(file.name)


def _other_need(config: Config, cell: Cell, ledger: Ledger) -> Cell | None:
    """A finished cell whose file is another than the one that this cell was computed from."""
    if (proof := ledger.entries[cell].proof) is None:
        return None
    for need in config.needs(cell):
        there = ledger.entries.get(need)
        if there and there.proof and there.proof["file"] != proof["needs"].get(need.key):
            return need
    return None
