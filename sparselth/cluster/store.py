"""The folder of a sweep: what is done lies in its run folders, whoever computed them.

    sweep.json         experiment, axes and settings; each run with its point, its configuration and the
                       break-even densities it is computed with, sealed
    NAME/              a run folder of each point; where its seeds are in groups, one a group
    failed/NAME.json   how a run ended that has an error: it is computed again by `resume`
    figures/

One process at a time writes sweep.json and failed/; each run folder has its own lock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparselth import runs
from sparselth.begun import recalled
from sparselth.cluster.executor import Ended
from sparselth.cluster.grid import held
from sparselth.config import config_from_json
from sparselth.errors import SparselthError, UsageError, one_line
from sparselth.files import dump, holds, read_json, sealed, unsealed, write_atomically
from sparselth.registry import plugins
from sparselth.runs import RunRecord

SWEEP, FAILED = "sweep.json", "failed"
SCHEMA = "sparselth.sweep-folder/1"


@dataclass(frozen=True)
class Run:
    """A run of a sweep: its folder's name, its point, and what it is computed with."""

    name: str
    point: str
    values: dict[str, Any]  # by axis
    config: Any
    break_even: dict[str, float]


@dataclass(frozen=True)
class Layout:
    """What sweep.json says."""

    experiment: str
    axes: dict[str, list[Any]]
    settings: dict[str, Any]
    recipe: str
    runs: list[Run]
    plugins: list[str] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)  # of `How` what bits may depend on

    def write(self, path: Path) -> None:
        listed = [vars(run) | {"config": run.config.to_json()} for run in self.runs]
        data = {"schema": SCHEMA} | vars(self) | {"runs": listed}
        if not holds(path / SWEEP, text := dump(sealed(data))):
            write_atomically(path / SWEEP, text)

    @staticmethod
    def read(path: Path) -> Layout:
        """SparselthError where the folder holds no sweep, or one that was altered."""
        file = path / SWEEP
        try:
            data = unsealed(read_json(file))
            if data.pop("schema") != SCHEMA:
                raise ValueError("it is of another version")
            rows = data.pop("runs")
            needed = [name for name in data.get("plugins", []) if Path(name) not in plugins()]
            data["axes"] = {name: [*map(held, values)] for name, values in data["axes"].items()}
            data["settings"] = {name: held(value) for name, value in data["settings"].items()}
            for row in rows:
                row["values"] = {name: held(value) for name, value in row["values"].items()}
                row["config"] = config_from_json(row["config"])
                if needed:  # which may have a name in it
                    row["config"].check()
            return Layout(**data, runs=[Run(**row) for row in rows])
        except FileNotFoundError:
            raise SparselthError(f"{path}: not the folder of a sweep (no {SWEEP})") from None
        except UsageError as error:
            named = " ".join(f"`plugin` {name}" for name in needed)
            raise SparselthError(
                f"{path}: was begun with {named}; give it again ({error})" if named else f"{file}: {error}"
            ) from error
        except SparselthError:
            raise
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise SparselthError(f"{file}: cannot be read ({error}); choose another `out`") from error


def is_sweep(path: Path) -> bool:
    return (path / SWEEP).is_file()


def seal(path: Path) -> str:
    """The checksum in sweep.json."""
    return str(read_json(path / SWEEP)["sha256"])


def fail(path: Path, ended: Ended) -> None:
    """Write down how a run ended."""
    (path / FAILED).mkdir(exist_ok=True)
    data = {"error": ended.error, "where": ended.where} | ({"trace": ended.trace} if ended.trace else {})
    write_atomically(path / FAILED / f"{ended.name}.json", dump(data))


def failed(path: Path, name: str) -> bool:
    """Whether a run ended with an error when it was computed last, be it in its figures."""
    return (path / FAILED / f"{name}.json").exists()


def forget(path: Path, name: str) -> None:
    """A run has no error any more."""
    (path / FAILED / f"{name}.json").unlink(missing_ok=True)


def record_of(path: Path, run: Run) -> RunRecord | None:
    """What there is of a run; None before it has begun, or where it cannot be read."""
    if not (path / run.name / "config.json").is_file():
        return None
    with suppress(SparselthError):
        return runs.read(path / run.name)
    return None


def complete(path: Path, run: Run) -> bool:
    """Whether all cells that a run has now are finished, or have no result."""
    record = record_of(path, run)
    return record is not None and record.complete and record.config.cells() == run.config.cells()


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as it was when read."""

    path: Path
    layout: Layout
    records: dict[str, RunRecord]  # of the runs that have begun, by name
    failed: dict[str, str]  # errors of the runs that ended with one

    @cached_property
    def points(self) -> dict[str, list[Run]]:
        """The runs of every point, by its name."""
        found: dict[str, list[Run]] = {}
        for run in self.layout.runs:
            found.setdefault(run.point, []).append(run)
        return found

    def of(self, point: str) -> list[RunRecord]:
        """What there is of a point's runs."""
        return [self.records[run.name] for run in self.points[point] if run.name in self.records]

    def cells(self, point: str) -> list[dict[str, Any]]:
        """The finished cells of a point, whichever run has them."""
        return [one for record in self.of(point) for one in record.config.told(record)]

    @property
    def diverged(self) -> list[tuple[str, RunRecord]]:
        """Runs with networks that diverged, by name."""
        return [(name, record) for name, record in self.records.items() if record.diverged]

    @cached_property
    def finished(self) -> list[str]:
        """The names of the runs whose cells are all finished, or have no result."""
        wanted = {run.name: run.config.cells() for run in self.layout.runs}
        return [
            name
            for name, record in self.records.items()
            if record.complete and record.config.cells() == wanted[name]
        ]

    @property
    def complete(self) -> bool:
        return len(self.finished) == len(self.layout.runs)


def read(path: Path) -> SweepRecord:
    """The sweep in `path`, finished or not; SparselthError when there is none."""
    layout = Layout.read(path)
    found = {run.name: record for run in layout.runs if (record := record_of(path, run)) is not None}
    failed = dict[str, str]()
    for run in layout.runs:
        with suppress(OSError, ValueError, LookupError, TypeError):
            failed[run.name] = one_line(str(read_json(path / FAILED / f"{run.name}.json")["error"]))
    return SweepRecord(path, layout, found, failed)


@contextmanager
def recalled_all(path: Path) -> Iterator[None]:
    """Within, the networks of a sweep's runs are what these say of them: no file of a user's is imported."""
    runs_of = dict[Any, Path]()  # one of each network
    for file in sorted(path.glob("*/config.json")):
        with suppress(OSError, ValueError, LookupError, TypeError):
            runs_of.setdefault(read_json(file)["model"], file.parent)
    with ExitStack() as stack:
        for run in runs_of.values():
            stack.enter_context(recalled(run))
        yield
