"""The executor `local`: processes of this machine, one a core or one a GPU.

A worker is started by `python -m`, not forked: it imports torch once, sees its own GPU alone and ends with
its parent. It is left out of the signals of a terminal, which its parent passes on as a request to save.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from sparselth import machine
from sparselth.cluster.executor import Ended, Task
from sparselth.errors import check_number

PATIENCE = 10.0  # seconds that a worker has to end


@dataclass(frozen=True)
class Local:
    """So many processes; one a core or a GPU unless given."""

    number: int | None = None
    name = "local"

    def device(self, wanted: str) -> str:
        return machine.choose_device(wanted)[0]

    def workers(self, device: str) -> int:
        there = len(_gpus()) if device == "cuda" else machine.cores()
        most = there if device == "cuda" else max(16, 4 * there)
        check_number("workers", self.number, 1, most, "one a GPU" if device == "cuda" else "four a core")
        return self.number or there

    @contextmanager
    def crew(self, device: str) -> Iterator[Processes]:
        number = self.workers(device)
        crew = Processes(_gpus()[:number] if device == "cuda" else [None for _ in range(number)])
        try:
            yield crew
        finally:
            crew.close()


def _gpus() -> list[str | None]:
    """The names by which processes see one GPU each."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [*filter(None, visible.split(","))]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


@dataclass
class _Process:
    """A worker, and what it is busy with."""

    process: subprocess.Popen[bytes]
    connection: Connection
    place: str | None
    task: Task | None = None
    since: float = 0.0


class Processes:
    """A crew of processes; each is started when there is a task for it."""

    def __init__(self, places: list[str | None]) -> None:
        self.free, self.all = [*places], list[_Process]()

    def start(self, task: Task) -> None:
        since = time.perf_counter()
        worker = next((one for one in self.all if one.task is None), None) or self._started()
        worker.task, worker.since = task, since
        with suppress(BrokenPipeError, ConnectionResetError):  # the next `wait` tells how it ended
            worker.connection.send(task)

    def _started(self) -> _Process:
        place = self.free.pop(0)
        ours, theirs = Pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.all.append(_Process(process, ours, place))
        return self.all[-1]

    def wait(self, seconds: float) -> list[Ended]:
        busy = {one.connection: one for one in self.all if one.task}
        return [self._ended(busy[one]) for one in wait([*busy], seconds) if isinstance(one, Connection)]

    def _ended(self, worker: _Process) -> Ended:
        assert worker.task is not None
        name, worker.task = worker.task.name, None
        all_of_it = time.perf_counter() - worker.since
        try:
            found = worker.connection.recv()
        except (EOFError, OSError):  # also in the middle of a message
            self.all.remove(worker)
            self.free.append(worker.place)
            code = self._end(worker)
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            hint = " (out of memory? try fewer `workers`)" if code == -signal.SIGKILL else ""
            return Ended(name, error=f"its worker ended without a result, {how}{hint}", died=True)
        assert isinstance(found, Ended)
        return Ended(**vars(found) | {"around": max(0.0, all_of_it - found.seconds)})

    def stop(self) -> None:
        for worker in self.all:
            with suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send("stop")

    def close(self) -> None:
        for worker in self.all:
            worker.connection.close()
        for worker in self.all:
            self._end(worker)

    def _end(self, worker: _Process) -> int:
        worker.connection.close()
        try:
            return worker.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            return worker.process.wait()


def main(number: int, parent: int) -> None:
    """The life of a worker: take tasks, compute one at a time, and leave when there will be no more."""
    from sparselth import signals
    from sparselth.experiments.worker import end_with_the_parent

    signals.ignored()
    end_with_the_parent()
    if os.getppid() != parent:
        return
    sys.stdout = sys.stderr  # what a user's network prints is no result
    from sparselth.cluster.worker import Worker

    connection, worker = Connection(number), Worker()

    def compute(task: Task) -> None:
        ended = worker.compute(task)
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(ended)

    while True:
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            os._exit(0)  # without waiting for a step that was left
        if message == "stop":
            worker.stop()
        else:
            threading.Thread(target=compute, args=(message,), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
