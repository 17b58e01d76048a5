"""The worker processes of this machine.

On a CPU they are forked, so that the data set is in memory once; on CUDA one spawned worker owns the device.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from sparselth import signals
from sparselth.cluster.torchrun import Dial
from sparselth.errors import SparselthError
from sparselth.experiments.base import Experiment
from sparselth.experiments.flag import Flag
from sparselth.experiments.worker import Work, live

PATIENCE = 5.0  # seconds that idle workers have to end


def _forks(config: Experiment) -> bool:
    return config.device == "cpu" and (not config.autograd or _outlives_a_fork())


def _outlives_a_fork() -> bool:
    """Whether autograd works in a child of this process: not once it has threads."""
    child = os.fork()
    if child == 0:
        try:
            torch.ones((), dtype=torch.float32, device="cpu", requires_grad=True).square().backward()  # type: ignore[no-untyped-call]
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@dataclass(frozen=True)
class Hand:
    """A worker as its run sees it; of another rank there is no process to see."""

    name: str
    connection: Connection
    process: Any = None

    @property
    def awaited(self) -> list[Any]:
        """What `wait` is given: it reports, or it ends."""
        return [self.connection] + ([self.process.sentinel] if self.process else [])

    @property
    def ended(self) -> bool:
        return self.process is not None and not self.process.is_alive()

    def kill(self) -> None:
        """End it at once; one of another rank is killed there when the run leaves."""
        if self.process:
            self.process.kill()
        else:
            self.connection.close()

    def how(self) -> str:
        """How it ended, to be said behind its name."""
        if not self.process:
            return ""
        self.process.join(5)
        code = self.process.exitcode
        how = f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"
        hint = " (out of memory? try fewer `workers`)" if code == -signal.SIGKILL else ""
        return f", {how}{hint}"


class Processes:
    """Workers on pipes, or on lines of their own to rank 0 where `dial` says where it listens; a context."""

    def __init__(self, work: Work, number: int, dial: Dial | None = None) -> None:
        self.work, self.number, self.dial = work, number, dial
        self.stop = Flag()
        self.connections: list[Connection] = []  # without `dial`
        self.processes: list[Any] = []

    @cached_property
    def context(self) -> Any:
        return multiprocessing.get_context("fork" if _forks(self.work.config) else "spawn")

    def __enter__(self) -> Self:
        try:
            with signals.held_back():
                for _ in range(self.number):
                    self._start()
        except BaseException:
            self.end(0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the workers, but not where something else ended the run: nothing of theirs is awaited."""
        self.end(PATIENCE if kind is None or issubclass(kind, SparselthError) else 0.0)

    def _start(self) -> None:
        number = len(self.processes)
        line: Any
        if self.dial:
            line = replace(self.dial, who=(self.dial.who[0], number))
        else:
            ours, line = self.context.Pipe()
        images = self.work.images  # who reads them from files has processes of its own, as no daemon may
        process = self.context.Process(
            target=live,
            args=(line, self.stop, os.getpid(), self.work),
            daemon=images is None or images.root is None,
        )
        try:
            process.start()
        except OSError as error:
            raise SparselthError(
                f"cannot start worker {number}: {error.strerror}; use fewer `workers`"
            ) from error
        finally:
            if not self.dial:
                line.close()
        self.processes.append(process)
        if not self.dial:
            self.connections.append(ours)

    def end(self, patience: float) -> None:
        self.stop.value = True
        for connection in self.connections:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.send(None)
        until = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []
