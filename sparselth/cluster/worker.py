"""A worker of a sweep: it computes run after run in its own process, and so keeps what it has loaded."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sparselth.cluster.executor import Ended, Task
from sparselth.cluster.store import seal
from sparselth.config import Cell, config_from_json
from sparselth.errors import Interrupted, SparselthError
from sparselth.experiments.base import Diverged, Experiment
from sparselth.experiments.plan import Watcher
from sparselth.experiments.pool import Pool
from sparselth.experiments.run import go, plan
from sparselth.experiments.worker import serve
from sparselth.registry import load_plugin


class Worker(Watcher):
    """Computes tasks, in any thread; it is told by another one to stop."""

    def note(self, text: str) -> None:
        pass

    def diverged(self, worker: int, done: Diverged, without: Sequence[Cell]) -> None:
        pass  # `show` tells

    def stop(self) -> None:
        self.stopped_by = "the sweep"

    def compute(self, task: Task) -> Ended:
        """How it came out; nothing is raised."""
        began, error, trace, stopped = time.perf_counter(), "", "", False
        try:
            self._compute(task)
        except Interrupted:
            stopped = True
        except SparselthError as said:
            error = str(said)
        except (Exception, SystemExit) as fault:
            error, trace = f"{type(fault).__name__}: {fault}", traceback.format_exc()
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        where = socket.gethostname() + (f", GPU {gpu}" if gpu and task.config.get("device") == "cuda" else "")
        return Ended(task.name, time.perf_counter() - began, 0.0, where, error, trace, stopped)

    def _compute(self, task: Task) -> None:
        check_seen(task)
        with suppress(OSError):  # names from the root need none
            os.chdir(task.folder)
        for file in task.plugins:
            load_plugin(Path(file))
        config = config_from_json(task.config)
        assert isinstance(config, Experiment)
        how = task.how
        planned = plan(
            config,
            out=Path(task.sweep) / task.name,
            data_dir=how.data_dir,
            workers=1,
            replicas=how.replicas,
            deterministic=how.deterministic,
            note=self.note,
        )
        planned = replace(planned, environment=planned.environment | {"break_even": task.break_even})
        if self.stopped_by:
            raise Interrupted(f"stopped by {self.stopped_by}")
        go(planned, True, self, Here)


def check_seen(task: Task) -> None:
    """Raise SparselthError where this machine does not see the sweep's folder."""
    try:
        seen = seal(Path(task.sweep)) == task.seal
    except (OSError, ValueError, LookupError, TypeError):
        seen = False
    if not seen:
        raise SparselthError(
            f"{socket.gethostname()} does not see {task.sweep}: a sweep over several machines needs a folder "
            "that all of them share; choose another `out`"
        )


class Here(Pool):
    """The one worker of a run as a thread of this process."""

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        thread = _Thread(target=serve, args=(theirs, self.stop, lambda: None, self.work), daemon=True)
        thread.start()
        self.connections.append(ours)
        self.processes.append(thread)


class _Thread(threading.Thread):
    """What a pool needs of a process. It cannot be killed: it is left, and ends with its step."""

    exitcode: int | None = None

    def __init__(self, *, args: tuple[Connection, *tuple[Any, ...]], **more: Any) -> None:
        super().__init__(args=args, **more)
        self.theirs, self.left = args[0], False
        self.sentinel, self._ends = os.pipe()

    def run(self) -> None:
        try:
            with suppress(BrokenPipeError, EOFError, ConnectionResetError):  # it was left
                super().run()
        except SystemExit:  # a user's network may end a process
            self.exitcode = 1
        finally:  # so that nobody waits for a word of it
            self.theirs.close()
            os.close(self._ends)

    def kill(self) -> None:
        self.left = True

    def join(self, timeout: float | None = None) -> None:
        if not self.left:
            super().join(timeout)

    def close(self) -> None:
        os.close(self.sentinel)
