"""What an experiment is: a configuration whose methods say what its cells need, compute and report.

A file of this folder, or a plugin, registers one; it is then a command with a flag for every `option`, and
`ls`, the agenda, workers, resume, `show` and --json know it. Imports no torch, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sparselth.config import EXPERIMENTS, Cell, Config

if TYPE_CHECKING:
    from sparselth.data import Images
    from sparselth.data.batches import Resident
    from sparselth.engine.state import Job
    from sparselth.engine.team import Team
    from sparselth.runs import RunRecord

E = TypeVar("E", bound=type["Experiment"])


@dataclass(frozen=True)
class Finished:
    """A computed cell: its line, its evaluations, what it took."""

    cell: Cell
    line: dict[str, Any]
    evaluations: list[dict[str, Any]]
    timings: dict[
        str, Any
    ]  # train_seconds of wall time; step_seconds, the median by `clock`; of a batch its share


@dataclass(frozen=True)
class Diverged:
    """A cell without a result, because its network diverged: the step, what was found, what to do."""

    cell: Cell
    why: str


@dataclass(frozen=True)
class Place:
    """Where cells are computed: the run folder, the data on its device, whom to ask and tell meanwhile."""

    run: Path
    data: Resident | None  # of experiments that read one
    break_even: Mapping[str, float]
    evaluated: Callable[[Sequence[Job]], None] = lambda jobs: None
    should_stop: Callable[[], bool] = lambda: False  # of a team all are told the same
    team: Team | None = None  # the workers that compute each of the cells together

    @property
    def leads(self) -> bool:
        """Whether files are written here, and cells reported."""
        return self.team is None or self.team.leads


@dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """A configuration that can be run. Its docstring is the help of its command."""

    words: ClassVar[str] = ""  # the module whose `table` and `summary` report a run
    figures: ClassVar[str] = ""  # the one whose `draw` does, of experiments that have figures
    device = "cpu"  # an option where there is a choice

    @property
    def autograd(self) -> bool:
        """Whether cells may take gradients by torch's autograd; engines have their own."""
        return False

    @property
    def reads(self) -> str:
        """The data set that cells read unless the field `dataset` names another; none unless there is one."""
        return ""

    @property
    def evaluation(self) -> tuple[int, int]:
        """Images of an evaluation batch, and of an evaluation at most; 0 is all."""
        return 500, 0

    @property
    def shown_as(self) -> str:
        """What images are given as: `Recipe.inputs`."""
        return "standard"

    def urgency(self, cell: Cell) -> Any:
        """What cells that can start are sorted by: the least goes first."""
        return cell.level

    def seconds(self, cell: Cell) -> float | None:
        """About what a cell takes on a core, of experiments that are not priced by their training steps."""
        return None

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        """Compute cells together and write their files; None when stopped, after checkpoints were written.

        Reads only files of finished cells and its own checkpoints, so it can run in any process. Where
        `place.should_stop` is not asked within a second of a signal, what is under way is lost.
        """
        raise NotImplementedError

    @property
    def folder(self) -> str:
        """What a run's folder is called unless it is named."""
        return f"{self.name}-{self.digest}"

    @property
    def title(self) -> str:
        """The run in a line, for `ls runs`."""
        return self.name

    def about(self, cell: Cell) -> str:
        """What is known of a cell before it is computed, beside its name."""
        return ""

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        """What will be done, a line each by its heading; so many of its cells are finished."""
        return {}

    def said(self, line: dict[str, Any]) -> str:
        """What a finished cell found, for the line that tells of it."""
        return ""

    def table(self, record: RunRecord) -> str:
        """The report of a run, finished or not, as text."""
        found: str = import_module(self.words).table(record)
        return found

    def told(self, record: RunRecord) -> list[dict[str, Any]]:
        """The points that --json prints: those of all finished cells, unless some answer no question."""
        return record.points

    def summary(self, record: RunRecord) -> list[dict[str, Any]]:
        """The same as JSON objects."""
        found: list[dict[str, Any]] = import_module(self.words).summary(record) if self.words else []
        return found

    def draw(self, record: RunRecord, folder: Path) -> None:
        """Draw figures into a folder, if there are any and they are not there yet."""
        if self.figures and self.told(record):
            import_module(self.figures).draw(record, folder)


def register(experiment: E) -> E:
    """Make an experiment known by its name, as a decorator."""
    EXPERIMENTS.add(experiment.name, experiment)
    return experiment


def get_experiment(name: str) -> type[Experiment]:
    """The experiment of that name; an unknown name raises UsageError with the nearest one."""
    found = EXPERIMENTS[name]
    assert issubclass(found, Experiment)
    return found
