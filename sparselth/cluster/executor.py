"""Who computes the runs of a sweep: what an executor must do, and what goes to its workers and comes back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class How:
    """What all runs of a sweep have in common beside their configurations, as `experiments.run` takes it."""

    data_dir: str | None = None
    replicas: int | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class Task:
    """A run of a sweep, as plain data that any process can take."""

    name: str  # of its folder
    sweep: str  # the folder of the sweep, from the root
    seal: str  # the checksum of that folder's sweep.json: who reads it there sees the same folder
    config: dict[str, Any]
    break_even: dict[str, float]  # one for all machines: bits depend on it
    how: How
    plugins: tuple[str, ...]
    folder: str  # the working directory, that names of files are seen from


@dataclass(frozen=True)
class Ended:
    """How a task came out: finished, stopped, or with an error in a line."""

    name: str
    seconds: float = 0.0  # that the run took
    around: float = 0.0  # seconds more until the sweep knew of it: starting the worker, handing out
    where: str = ""
    error: str = ""
    trace: str = ""  # behind an error that is a fault of ours
    stopped: bool = False
    died: bool = False  # the worker; nothing is known of the run


class Crew(Protocol):
    """Workers that compute a task each."""

    def start(self, task: Task) -> None:
        """Give a task to a worker that has none."""

    def wait(self, seconds: float) -> list[Ended]:
        """The tasks that have ended since the last call; after `seconds` none."""

    def stop(self) -> None:
        """Ask all that are under way to save and to end."""


class Executor(Protocol):
    """Where crews come from."""

    name: str

    def device(self, wanted: str) -> str:
        """cpu or cuda, for auto, cpu or cuda."""

    def workers(self, device: str) -> int:
        """How many tasks are computed at once."""

    def crew(self, device: str) -> AbstractContextManager[Crew]:
        """Workers of that device; within the context."""
