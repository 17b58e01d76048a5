"""Batches of cells over worker processes, one thread each: small networks lose time to two threads.

On a CPU workers are forked, so that the data set is in memory once; on CUDA one spawned worker owns the
device. A spawned worker knows plugins, and nothing else that its parent has registered. Only the parent
writes the run's lines; a worker writes the files of its cells, then reports. A batch for which memory is
short is halved. A worker whose parent is gone ends itself.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from sparselth.config import Cell
from sparselth.data import Images
from sparselth.data.batches import Resident
from sparselth.engine.memory import free_memory, is_out_of_memory
from sparselth.engine.state import Job
from sparselth.errors import Interrupted, SparselthError
from sparselth.experiments.agenda import Agenda
from sparselth.experiments.base import Experiment, Place
from sparselth.experiments.flag import Flag
from sparselth.experiments.plan import Watcher
from sparselth.experiments.price import Price, measured
from sparselth.experiments.training import Training
from sparselth.machine import cores
from sparselth.models import get_model
from sparselth.registry import load_plugin, plugins
from sparselth.runs import RunFolder


@dataclass(frozen=True)
class Work:
    """What a worker is given. A spawned one loads the plugins first, which may have made the rest; images
    leave behind what read them, which may be any function.
    """

    config: Experiment
    images: Images | None
    run: Path
    break_even: Mapping[str, float]

    def __reduce__(self) -> tuple[Callable[..., Work], tuple[tuple[Path, ...], bytes]]:
        images = self.images
        images = images and replace(images, spec=replace(images.spec, read=None))
        content = self.config, images, self.run, self.break_even
        return _unpacked, (plugins(), pickle.dumps(content))


def _unpacked(files: tuple[Path, ...], content: bytes) -> Work:
    for file in files:
        load_plugin(file)
    return Work(*pickle.loads(content))


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


class Pool:
    """The worker processes of one run; use it as a context."""

    def __init__(
        self,
        config: Experiment,
        images: Images | None,
        run: Path,
        workers: int,
        break_even: Mapping[str, float],
    ) -> None:
        self.config = config
        context: Any = multiprocessing.get_context("fork" if _forks(config) else "spawn")
        self.stop = Flag()
        self.connections: list[Connection] = []
        self.processes = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, self.stop, os.getpid(), Work(config, images, run, break_even)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.value = True
        for connection in self.connections:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for connection in self.connections:
            connection.close()

    def price(self, limit: int) -> tuple[Price, int]:
        """Measure what a batch of up to `limit` networks costs, and how many fit into memory."""
        self.connections[0].send(limit)
        kind, value = self._receive(0)
        if kind == "failed":
            raise value
        price, fits = value
        assert isinstance(price, Price)
        return price, fits

    def run(self, folder: RunFolder, watcher: Watcher, limit: int = 1) -> None:
        """Compute every cell that is missing, up to `limit` in a batch.

        Raises Interrupted after a signal, or what a cell raised.
        """
        agenda = Agenda(self.config, folder.finished)
        busy: dict[int, list[Cell]] = {}
        failure: BaseException | None = None
        with _signals(self.stop) as caught:
            while True:
                for worker, connection in enumerate(self.connections):
                    if worker in busy or self.stop.value:
                        continue
                    if not (cells := agenda.next(limit)):
                        break
                    busy[worker] = cells
                    watcher.started(worker, cells)
                    with suppress(
                        BrokenPipeError, ConnectionResetError
                    ):  # the next receive tells how the worker ended
                        connection.send(cells)
                if not busy:
                    break
                ready = wait(
                    [self.connections[w] for w in busy] + [p.sentinel for p in self.processes], timeout=0.25
                )
                watcher.tick()
                for worker in [
                    w for w in busy if self.connections[w] in ready or not self.processes[w].is_alive()
                ]:
                    kind, value = self._receive(worker)
                    match kind:
                        case "evaluated":
                            watcher.evaluated(worker, *value)
                        case "stopped":
                            del busy[worker]
                        case "memory":
                            cells = busy.pop(worker)
                            limit = max(1, min(limit, len(cells) // 2))
                            agenda.back(cells)
                            watcher.halved(len(cells), limit)
                        case "finished":
                            again = folder.add(value)
                            agenda.finished(busy.pop(worker), again)
                            for done in value:
                                watcher.finished(worker, done)
                            if again:
                                watcher.again(again)
                        case "failed":
                            del busy[worker]
                            failure, self.stop.value = failure or value, True
        if failure:
            raise failure
        finished, total = len(folder.finished), len(self.config.cells())
        if finished < total:
            who = caught[0] if caught else "its caller"
            raise Interrupted(
                f"stopped by {who}; {finished} of {total} cells are finished and those under way are saved "
                f"in {folder.path}; continue with `resume`"
            )
        folder.complete()

    def _receive(self, worker: int) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = self.connections[worker].recv()
        except (EOFError, ConnectionError):
            self.processes[worker].join(5)
            code = self.processes[worker].exitcode
            how = f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"
            hint = " (out of memory? try `workers` 1)" if code == -signal.SIGKILL else ""
            return "failed", SparselthError(
                f"worker {worker} ended without a result, {how}{hint}; what is finished is kept, "
                "continue with `resume`"
            )
        return message


def available_workers(device: str) -> int:
    """One per core this process may use; one for a GPU."""
    return cores() if device == "cpu" else 1


def _work(connection: Connection, stop: Flag, parent: int, work: Work) -> None:
    """A worker's life: receive cells, compute them, report."""
    # A signal to the whole group must not end a worker before it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)

    def orphaned() -> bool:
        return os.getppid() != parent

    def should_stop() -> bool:
        return bool(stop.value)

    config = work.config
    data: Resident | None = None
    while True:
        while not connection.poll(1.0):
            if orphaned():
                os._exit(1)
        try:
            task: list[Cell] | int | None = connection.recv()
            if task is None:
                return
            if data is None and isinstance(config, Training):
                assert work.images is not None
                chunk = get_model(config.model).evaluation_batch
                data = Resident(work.images, config.device, chunk, config.eval_images or 0)
            if isinstance(task, int):
                assert data is not None
                assert isinstance(config, Training)
                connection.send(("priced", measured(config, data, work.break_even, task)))
                continue

            before: tuple[float, int, tuple[Cell, ...]] = (0.0, 0, ())

            def on_evaluation(jobs: Sequence[Job]) -> None:
                nonlocal before
                if orphaned():
                    os._exit(1)
                step, cells = jobs[0].state.step, tuple(job.who for job in jobs)
                now = (time.perf_counter(), step, cells)
                speed = 0.0
                if before[2] == cells:
                    speed = len(jobs) * (step - before[1]) / (now[0] - before[0])
                before = now
                accuracy = sum(job.state.evaluations[-1]["validation_accuracy"] for job in jobs) / len(jobs)
                connection.send(("evaluated", (cells, step, accuracy, speed)))

            short, result = False, None
            try:
                place = Place(work.run, data, work.break_even, on_evaluation, should_stop)
                result = config.compute(task, place)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(task) == 1:
                    raise SparselthError(
                        f"{task[0]}: out of memory with one network on {config.device}; use a smaller "
                        "`batch_size`"
                    ) from error
                short = True
            if short:  # out here, where the error no longer holds what it could not finish
                free_memory()
                connection.send(("memory", None))
            else:
                connection.send(("finished", result) if result else ("stopped", None))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            os._exit(1)  # the parent is gone
        except SparselthError as error:
            connection.send(("failed", error))
        except Exception as error:
            report = RuntimeError(f"{task}: {type(error).__name__}: {error}")
            report.add_note(traceback.format_exc())
            connection.send(("failed", report))


@contextmanager
def _signals(stop: Flag) -> Iterator[list[str]]:
    """Within, SIGINT and SIGTERM set `stop`; their names are collected."""
    caught: list[str] = []

    def handler(number: int, _: object) -> None:
        caught.append(signal.Signals(number).name)
        stop.value = True

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
