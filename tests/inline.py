"""An executor in this process, and what a sweep of seconds is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sparselth.cluster.executor import Ended, Task
from sparselth.cluster.worker import Worker

SETTINGS: dict[str, Any] = {
    "model": "lenet-300-100",
    "dataset": "mnist5k",
    "seeds": (0, 1),
    "levels": 1,
    "arms": ("ticket",),
    "steps": 60,
    "eval_images": 250,
}


@dataclass
class Inline:
    """Computes a task when it is given; of the runs in `dying` the first tries are lost."""

    number: int = 2
    dying: dict[str, int] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    name = "inline"

    def device(self, wanted: str) -> str:
        return "cpu"

    def workers(self, device: str) -> int:
        return self.number

    @contextmanager
    def crew(self, device: str) -> Iterator[Inline]:
        yield self

    def start(self, task: Task) -> None:
        self.taken.append(task.name)
        if self.dying.get(task.name, 0):
            self.dying[task.name] -= 1
            self.ended.append(Ended(task.name, error="its worker ended without a result", died=True))
        else:
            self.ended.append(Worker().compute(task))

    def wait(self, seconds: float) -> list[Ended]:
        found, self.ended = self.ended, []
        return found

    def stop(self) -> None:
        raise AssertionError("nothing runs beside the caller")
