"""The run folder: everything one run of any experiment computed, in files that a kill cannot spoil.

    config.json        the experiment and what is run; another configuration is refused, unless it asks for
                       more of the same: then the run is extended
    environment.json   versions, processor, git commit, data checksum
    cells.jsonl        one line per finished cell: what its experiment says of it, and the proof
    evaluations.jsonl  one line per evaluation on the validation set
    timings.jsonl      seconds per cell; the only measurements that differ from run to run
    diverged/KEY.json  why a cell has no result: its network diverged; what needs it is not computed
    cells/KEY.safetensors        mask bits, the surviving trained weights, biases and batch norms; level 0
                                 adds all of the rewind step, so that every ticket can be rebuilt
    checkpoints/KEY.safetensors  a cell that is under way
    figures/

Whole files are written beside and renamed. Lines are appended, the one of cells.jsonl last: a cell
without it has not happened, and what else it left is dropped when the folder is opened again. When
the run is complete the lines are sorted, so that the files do not tell in which order cells ended.
What is damaged is named and computed again (`ledger`); a cell that was computed from a file that came
out otherwise is computed again too. What cannot be computed again, config.json, is refused when it is
not what was written. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselth import diverged, tickets
from sparselth.begun import read_config, read_environment, read_written
from sparselth.config import Cell, Config
from sparselth.errors import SparselthError
from sparselth.files import (
    Line,
    append_lines,
    dump,
    errors_named,
    file_sum,
    holds,
    line,
    load_arrays,
    plain,
    save_arrays,
    sealed,
    sealed_line,
    write_atomically,
)
from sparselth.ledger import (
    LINES,
    Computed,
    Ledger,
    cell_path,
    checkpoint_path,
    examine,
    point,
    prove,
)
from sparselth.lock import ReadOnly, locked
from sparselth.registry import plugins

__all__ = [
    "LINES",
    "ReadOnly",
    "RunFolder",
    "RunRecord",
    "cell_path",
    "checkpoint_path",
    "open_run",
    "point",
    "read",
    "read_config",
    "reporting",
]

FILES = ("cells", "checkpoints")
# what a beginning writes before config.json and after it
BEGINNING = {".lock", "environment.json", "config.json", "cells", "checkpoints"}


@dataclass(frozen=True)
class RunRecord:
    """A run folder as it was when read."""

    path: Path
    config: Any  # of the class of its experiment, whose report reads more of it than `Config` has
    points: list[dict[str, Any]]  # finished cells with their timings, in the order of config.cells()
    lines: list[Line]  # evaluations of those cells, by step within a cell
    damage: str = ""  # what lies there and is not believed, in a line
    proven: bool = True  # or of an older version, whose lines have no checksums
    files: dict[Cell, str] = field(default_factory=dict)  # checksums of the files of cells
    diverged: list[dict[str, Any]] = field(default_factory=list)  # cells without a result, and why

    @cached_property
    def by_level(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """(arm, level) → its finished cells."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for one in self.points:
            found.setdefault((one["arm"], one["level"]), []).append(one)
        return found

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """A line each."""
        return [plain(one.data) for one in self.lines]

    @cached_property
    def planned(self) -> Counter[tuple[str, int]]:
        """(arm, level) → how many cells of it the run has."""
        return Counter((cell.arm, cell.level) for cell in self.config.cells())

    @property
    def complete(self) -> bool:
        """Whether every cell is finished, has diverged or needs one that has."""
        return len(self.points) + len(self.diverged) + len(self.not_computed) == len(self.config.cells())

    @property
    def not_computed(self) -> list[Cell]:
        """The cells that need one that diverged."""
        lost = {Cell.of(one) for one in self.diverged}
        return diverged.in_need(self.config, {Cell.of(one) for one in self.points}, lost) if lost else []

    def mask(self, seed: int, level: int, name: str) -> NDArray[np.bool_]:
        """The ticket's mask of the weight tensor `name`, bool [N, K]."""
        spec = next(s for s in self.config.network.weights if s.name == name)
        cell = Cell(seed, "ticket", level)
        file = cell_path(self.path, cell)
        try:
            right = cell not in self.files or file_sum(file) == self.files[cell]
        except OSError as error:
            raise SparselthError(f"{file}: cannot be read ({error.strerror})") from error
        if not right:
            raise SparselthError(
                f"{file}: is not what was written; continue the run with `resume`, which computes it again"
            )
        return tickets.read_mask(file, spec)


def read(path: Path) -> RunRecord:
    """The run in `path`, finished or not; SparselthError when there is none or it cannot be read.

    Lines are held against their checksums, the files of cells are when they are used.
    """
    config, written = read_written(path)
    proven = "sha256" in written
    ledger = examine(path, config, proven, files=False)
    order = [cell for cell in config.cells() if cell in ledger.entries]
    entries = [ledger.entries[cell] for cell in order]
    untimed = dict.fromkeys(("train_seconds", "step_seconds"))
    timings = [plain(entry.timing.data) if entry.timing else untimed for entry in entries]
    files = {cell: e.proof["file"] for cell, e in zip(order, entries, strict=True) if e.proof}
    return RunRecord(
        path,
        config,
        [entry.point | timing for entry, timing in zip(entries, timings, strict=True)],
        [one for entry in entries for one in entry.evaluations],
        ledger.summary(),
        proven,
        files,
        diverged.read(path, config, dict.fromkeys(order, "") | files),
    )


@contextmanager
def reporting(record: RunRecord) -> Iterator[None]:
    """What a report cannot be made of, as an error of the lines: anybody can write them, checksums too."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        whose = "" if record.proven else "written by an older version without checksums, and "
        raise SparselthError(
            f"{record.path}: {whose}its lines cannot be reported ({type(error).__name__}: {error})"
        ) from error


class RunFolder:
    """A run folder that one process writes to; `open_run` gives it."""

    def __init__(self, path: Path, config: Config, ledger: Ledger, read_only: bool = False) -> None:
        self.path, self.config, self.digest = path, config, config.digest
        self.damage, self.read_only = ledger.summary(), read_only
        self._take(ledger)

    def _take(self, ledger: Ledger) -> None:
        proofs = {cell: entry.proof or {} for cell, entry in ledger.entries.items()}
        self.finished = set(proofs)
        self.files: dict[Cell, str] = {cell: proof.get("file", "") for cell, proof in proofs.items()}
        self.diverged = {Cell.of(one) for one in diverged.read(self.path, self.config, self.files)}
        # finished cells that were computed from a file that is not there any more, by whom they wait for
        self.waiting: dict[Cell, list[tuple[Cell, str]]] = {}
        for cell, proof in proofs.items():
            for need in self.config.needs(cell):
                if need not in self.finished:
                    self.waiting.setdefault(need, []).append((cell, proof.get("needs", {}).get(need.key, "")))

    def begun_elsewhere(self, environment: dict[str, Any]) -> str | None:
        """What differs from the machine that began the run and may change bits, or None."""
        try:
            theirs = read_environment(self.path)
            pairs = {
                "torch": (theirs["packages"]["torch"], environment["packages"]["torch"]),
                "processor": (theirs["cpu"], environment["cpu"]),
            }
        except (SparselthError, KeyError, TypeError):
            return "environment.json cannot be read"
        return "; ".join(f"{k} {a} there, {b} here" for k, (a, b) in pairs.items() if a != b) or None

    @property
    def break_even(self) -> dict[str, float]:
        """Below which density which layer is compressed: what the machine that began the run measured."""
        environment = read_environment(self.path)
        try:
            found = {str(name): float(share) for name, share in environment["break_even"].items()}
            if not all(map(math.isfinite, found.values())):
                raise ValueError("a break-even is no number")
            return found
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise SparselthError(
                f"{self.path / 'environment.json'}: cannot be read ({error}); begin the run in another `out`"
            ) from error

    def add(self, done: Sequence[Computed]) -> list[Cell]:
        """Record cells whose files are written.

        Gives the finished cells that were computed from another file of one of them: they are open again.
        """
        lines: dict[str, list[bytes]] = {name: [] for name in LINES}
        for one in done:
            needs = {need.key: self.files[need] for need in self.config.needs(one.cell)}
            evaluations = [line(evaluation) for evaluation in one.evaluations]
            proof = prove(self.path, self.digest, one.cell, needs, evaluations)
            lines["evaluations.jsonl"] += evaluations
            lines["timings.jsonl"].append(sealed_line(point(one.cell, **one.timings)))
            lines["cells.jsonl"].append(sealed_line(point(one.cell, **one.line) | {"proof": proof}))
            self.files[one.cell] = proof["file"]
        for name in LINES:
            append_lines(self.path / name, lines[name])
        again = []
        for one in done:
            self.finished.add(one.cell)
            checkpoint_path(self.path, one.cell).unlink(missing_ok=True)
            again += [c for c, sum_ in self.waiting.pop(one.cell, ()) if sum_ != self.files[one.cell]]
        if again:
            before = self.finished
            ledger = examine(self.path, self.config, proven=True, files=False)
            self._write(ledger)
            self._take(ledger)
            again = [cell for cell in before if cell not in self.finished]
        return again

    def diverge(self, cell: Cell, why: str) -> None:
        """Record that a cell has no result."""
        diverged.write(self.path, self.config, cell, why, self.files)
        self.diverged.add(cell)
        checkpoint_path(self.path, cell).unlink(missing_ok=True)

    @property
    def lost(self) -> list[Cell]:
        """The cells that have diverged, and those that need one of them."""
        return [*self.diverged, *diverged.in_need(self.config, self.finished, self.diverged)]

    @property
    def missing(self) -> int:
        """Cells that are still to be computed."""
        return len(self.config.cells()) - len(self.finished) - len(self.lost)

    def complete(self) -> None:
        """Sort the lines into the order of `config.cells()`."""
        ledger = examine(self.path, self.config, proven=True, files=False)
        if len(ledger.entries) + len(self.lost) < len(self.config.cells()):
            raise SparselthError(f"{self.path}: {ledger.summary()}; continue with `resume`")
        self._write(ledger)

    def _write(self, ledger: Ledger) -> None:
        """Only the lines of finished cells, in the order of `config.cells()`."""
        for name, text in ledger.content(self.config.cells()).items():
            _put(self.path / name, text)

    def mend(self, ledger: Ledger) -> None:
        """Drop what is not believed, prove what an older version wrote, say what is run now."""
        for folder in ("", "cells", "checkpoints"):
            (self.path / folder).mkdir(exist_ok=True)
            for rest in (self.path / folder).glob("*.tmp"):
                rest.unlink(missing_ok=True)
        missing = {cell.key for cell in self.config.cells() if cell not in self.finished}
        for file in (self.path / "checkpoints").iterdir():
            if file.stem not in missing or file.name in ledger.rotten:
                file.unlink(missing_ok=True)
        self._prove(ledger)
        self._write(ledger)
        self._take(ledger)
        _put(self.path / "config.json", dump(sealed(self.config.to_json())))

    def _prove(self, ledger: Ledger) -> None:
        """Give proofs to cells that an older version wrote, and their files this version's headers: what is
        computed again has these, too, and came out otherwise only where its arrays did.
        """
        old = {cell: entry for cell, entry in ledger.entries.items() if entry.proof is None}
        for file in (cell_path(self.path, cell) for cell in old):
            arrays, header = load_arrays(file)
            save_arrays(file, arrays, header | {"config": self.digest} if "config" in header else header)
        files = {cell: file_sum(cell_path(self.path, cell)) for cell in old}
        files = self.files | files
        for cell, entry in old.items():
            needs = {need.key: files.get(need, "") for need in self.config.needs(cell)}
            timing = entry.timing and replace(entry.timing, raw=sealed_line(plain(entry.timing.data)))
            proof = prove(self.path, self.digest, cell, needs, [e.raw for e in entry.evaluations])
            ledger.entries[cell] = replace(entry, timing=timing, proof=proof)


def _put(file: Path, text: bytes) -> None:
    """Write what does not stand there already."""
    if not holds(file, text):
        write_atomically(file, text)


@contextmanager
def open_run(path: Path, config: Config, environment: dict[str, Any], resume: bool) -> Iterator[RunFolder]:
    """Create the folder, or open one that this configuration began or extends; locked until left.

    Raises SparselthError, before anything is written, when the folder holds something else, a run of
    another configuration, an unfinished run without `resume`, or a run that is under way. A finished run
    that cannot be written is opened to be read.
    """
    if _begun(path):
        _extends(path, config, resume)
    with errors_named(path), ExitStack() as stack:
        path.mkdir(parents=True, exist_ok=True)
        read_only = None
        try:
            stack.enter_context(locked(path))
        except ReadOnly as error:
            read_only = error
        if _begun(path):  # asked again, since now nobody else writes
            yield _gone_on(path, config, environment, resume, read_only)
        elif read_only:
            raise read_only
        else:
            for name in LINES:
                (path / name).unlink(missing_ok=True)
            folder = RunFolder(path, config, Ledger())
            stands = _stands(folder, environment)
            # its checksum before that of config.json, with which it is asked for
            _put(path / "environment.json", dump(sealed(read_environment(path) if stands else environment)))
            if not stands:
                write_atomically(path / "config.json", dump(sealed(config.to_json())))
            folder.mend(Ledger())
            yield folder


def _stands(folder: RunFolder, environment: dict[str, Any]) -> bool:
    """Whether a beginning that ended here was of this configuration, machine and data: its times hold."""
    try:
        same = read_config(folder.path) == folder.config and not folder.begun_elsewhere(environment)
        data = environment.get("data_sha256")
        return same and read_environment(folder.path).get("data_sha256") == data
    except SparselthError:
        return False


def _begun(path: Path) -> bool:
    """Whether the folder holds a run of which something is computed; what is no run raises SparselthError.

    What a beginning leaves that died, wherever it died, is as good as nothing.
    """
    if not path.exists():
        return False
    if not path.is_dir():
        raise SparselthError(f"{path}: expected a folder for the run, found a file; choose another `out`")
    computed = any((path / name).is_file() and (path / name).stat().st_size for name in LINES) or any(
        file.suffix != ".tmp" for name in (*FILES, diverged.FOLDER) for file in (path / name).glob("*")
    )
    names = {file.name for file in path.iterdir() if file.suffix != ".tmp"}
    if computed or "config.json" in names or names - BEGINNING:
        read_config(path)
    return computed


def _extends(path: Path, config: Config, resume: bool) -> Any:
    """The configuration there, of which this one is the same or more; another one raises SparselthError."""
    theirs = read_config(path)
    differs = [*config.difference(theirs)]
    for name, ours, other in differs:
        if name not in config.extends() or type(config) is not type(theirs):
            raise SparselthError(
                f"{path}: holds a run with another {name} ({other} there, {ours} here); choose another `out`"
            )
    for name, ours, other in differs:
        if not config.keeps(theirs, name):
            raise SparselthError(
                f"{path}: holds a run with other {name}, and keeps its cells ({other} there, {ours} here); "
                "ask for those and more, or choose another `out`"
            )
    if differs and not resume:
        name, ours, other = differs[0]
        raise SparselthError(
            f"{path}: holds a run with fewer {name} ({other} there, {ours} here); add `resume` to extend it, "
            "or choose another `out`"
        )
    return theirs


def _gone_on(
    path: Path, config: Config, environment: dict[str, Any], resume: bool, read_only: ReadOnly | None
) -> RunFolder:
    """Open a run of which something is computed."""
    theirs, cells = _extends(path, config, resume), config.cells()
    written = read_written(path)[1]
    proven = "sha256" in written
    ledger = examine(path, theirs, proven, files=True, before=theirs.digest_before(written))
    missing = RunFolder(path, config, ledger).missing
    try:
        there = read_environment(path, proven)
    except SparselthError:
        if missing:
            raise
        ledger.problems.append("environment.json is not what was written")
        there = {}
    data = [where["data_sha256"] for where in (there, environment) if "data_sha256" in where]
    if missing and data and data[0] != data[-1]:  # a run that says nothing of its images is believed
        raise SparselthError(
            f"{path}: was begun on other images of that name ({environment['dataset']}); choose another `out`"
        )
    if missing and not resume:
        why = f" ({ledger.summary()})" if ledger.problems else ""
        raise SparselthError(
            f"{path}: unfinished, {missing} of {len(cells)} cells are missing{why}; "
            "add `resume` to go on, or choose another `out`"
        )
    if missing and read_only:
        raise read_only
    folder = RunFolder(path, config, ledger, read_only is not None)
    in_order = [*ledger.entries] == [cell for cell in cells if cell in ledger.entries]
    left = not missing and any((path / "checkpoints").glob("*"))  # it was killed as it removed the last one
    if not read_only and (missing or ledger.problems or config != theirs or left or not in_order):
        loaded = [str(file) for file in plugins()]
        if needed := [*dict.fromkeys([*there.get("plugins", []), *loaded])]:
            there["plugins"] = needed
        if there:
            _put(path / "environment.json", dump(sealed(there)))
        folder.mend(ledger)
    return folder
