"""Batches of cells over worker processes, one thread each: small networks lose time to two threads.

On a CPU workers are forked, so that the data set is in memory once; on CUDA one spawned worker owns the
device. A spawned worker knows plugins, and nothing else that its parent has registered. Only the parent
writes the run's lines; a worker writes the files of its cells, then reports. A batch for which memory is
short is halved. A worker ends with its parent. A signal asks workers to save; one that cannot within GRACE,
because a step is long, is killed: its cells go on from their last checkpoint.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from sparselth import signals
from sparselth.config import Cell
from sparselth.data import Images, own
from sparselth.data.batches import Resident
from sparselth.diverged import in_need
from sparselth.engine.memory import free_memory, is_out_of_memory
from sparselth.engine.state import Job
from sparselth.errors import Interrupted, SparselthError
from sparselth.experiments.agenda import Agenda
from sparselth.experiments.base import Diverged, Experiment, Place
from sparselth.experiments.flag import Flag
from sparselth.experiments.plan import Watcher
from sparselth.experiments.price import Price, measured
from sparselth.experiments.training import Training
from sparselth.machine import cores
from sparselth.registry import load_plugin, plugins
from sparselth.runs import RunFolder, checkpoint_path

GRACE = 1.2  # seconds from a signal until a worker must have come to an end of a step or of a chunk of images
PATIENCE = 5.0  # seconds that idle workers have to end
PR_SET_PDEATHSIG = 1


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
    work = Work(*pickle.loads(content))
    if work.images is not None:
        own.remember(work.images)
    return work


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
        self.config, self.workers = config, workers
        self.work = Work(config, images, run, break_even)
        self.stop = Flag()
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    @cached_property
    def context(self) -> Any:
        return multiprocessing.get_context("fork" if _forks(self.config) else "spawn")

    def __enter__(self) -> Pool:
        try:
            with signals.held_back():
                for _ in range(self.workers):
                    self._start()
        except BaseException:
            self._end(0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the workers, but not where something else ended the run: nothing of theirs is awaited."""
        self._end(PATIENCE if kind is None or issubclass(kind, SparselthError) else 0.0)

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_work, args=(theirs, self.stop, os.getpid(), self.work), daemon=True
        )
        try:
            process.start()
        except OSError as error:
            raise SparselthError(
                f"cannot start worker {len(self.processes)}: {error.strerror}; use fewer `workers`"
            ) from error
        finally:
            theirs.close()
        self.connections.append(ours)
        self.processes.append(process)

    def _end(self, patience: float) -> None:
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
        """Compute every cell that is missing, up to `limit` in a batch; cells that diverge are recorded.

        Raises Interrupted after a signal, or what a cell raised.
        """
        agenda = Agenda(self.config, folder.finished, folder.diverged)
        busy: dict[int, list[Cell]] = {}
        saving: set[int] = set()  # workers that have come to an end of a step and write checkpoints
        saved, cut, lost, told = 0, 0, 0, False
        failure: BaseException | None = None
        caught: list[tuple[str, float]] = []

        def ask(name: str) -> None:
            caught.append((name, time.monotonic()))
            self.stop.value = True

        with signals.asked_to_stop(ask):
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
                    [self.connections[w] for w in busy] + [self.processes[w].sentinel for w in busy],
                    timeout=0.25,
                )
                watcher.tick()
                if watcher.stopped_by and not caught:
                    ask(watcher.stopped_by)
                if caught and time.monotonic() - caught[0][1] > GRACE:
                    for worker in busy.keys() - saving:
                        self.processes[worker].kill()
                        cut += len(busy.pop(worker))
                    if busy and not told:
                        watcher.stopping()
                        told = True
                for worker in [
                    w for w in busy if self.connections[w] in ready or not self.processes[w].is_alive()
                ]:
                    kind, value = self._receive(worker)
                    match kind:
                        case "evaluated":
                            watcher.evaluated(worker, *value)
                        case "stopping":
                            saving.add(worker)
                        case "stopped":
                            cells = busy.pop(worker)
                            kept = sum(checkpoint_path(folder.path, cell).exists() for cell in cells)
                            saved, lost = saved + kept, lost + len(cells) - kept
                        case "memory":
                            cells = busy.pop(worker)
                            limit = max(1, min(limit, len(cells) // 2))
                            agenda.back(cells)
                            watcher.halved(len(cells), limit)
                        case "finished":
                            del busy[worker]
                            found = [done for done in value if not isinstance(done, Diverged)]
                            again = folder.add(found)
                            agenda.finished([done.cell for done in found], again)
                            for done in found:
                                watcher.finished(worker, done)
                            if again:
                                watcher.again(again)
                            for done in value:
                                if isinstance(done, Diverged):
                                    folder.diverge(done.cell, done.why)
                                    without = in_need(self.config, folder.finished, {done.cell})
                                    watcher.diverged(worker, done, without)
                        case "failed":
                            del busy[worker]
                            failure, self.stop.value = failure or value, True
        if failure:
            raise failure
        if folder.missing:
            raise stopped(folder, caught[0][0] if caught else "its caller", saved, cut, lost)
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


def stopped(folder: RunFolder, who: str, saved: int = 0, cut: int = 0, lost: int = 0) -> Interrupted:
    """How a run stands that a signal has ended: cells that are finished, `saved`, `cut` within a step, and
    `lost`, which have no checkpoints."""
    total = len(folder.config.cells())
    if not folder.missing:
        return Interrupted(
            f"stopped by {who}; all cells are finished in {folder.path}, figures may be missing; the same "
            "command draws them"
        )
    said = f"{len(folder.finished)} of {total} cells are finished"
    said += f", {saved} under way are saved" if saved else ""
    said += f", {lost} under way will begin again" if lost else ""
    said += f", {cut} under way were cut and go on from their last checkpoint if any" if cut else ""
    return Interrupted(f"stopped by {who}; {said} in {folder.path}; continue with `resume`")


def available_workers(device: str) -> int:
    """One per core this process may use; one for a GPU."""
    return cores() if device == "cpu" else 1


def _work(connection: Connection, stop: Flag, parent: int, work: Work) -> None:
    """A worker's life: receive cells, compute them, report."""
    signals.ignored()
    sys.stdout = sys.stderr  # what a user's network prints is no result
    end_with_the_parent()

    def leave_if_orphaned() -> None:
        if os.getppid() != parent:
            os._exit(1)

    try:
        serve(connection, stop, leave_if_orphaned, work)
    except (BrokenPipeError, EOFError, ConnectionResetError):
        os._exit(1)  # the parent is gone


def serve(connection: Connection, stop: Flag, leave_if_orphaned: Callable[[], None], work: Work) -> None:
    """Compute cells until there are no more; on one thread."""
    torch.set_num_threads(1)
    asked = False

    def should_stop() -> bool:
        """Asked wherever a cell can be left, at every step: so the parent knows that it will be."""
        nonlocal asked
        leave_if_orphaned()
        if stop.value and not asked:
            asked = True
            connection.send(("stopping", None))
        return asked

    config = work.config
    data: Resident | None = None
    while True:
        while not connection.poll(1.0):
            leave_if_orphaned()
        try:
            task: list[Cell] | int | None = connection.recv()
            if task is None:
                return
            if data is None and work.images is not None:
                data = Resident(work.images, config.device, *config.evaluation, inputs=config.shown_as)
            if isinstance(task, int):
                assert data is not None
                assert isinstance(config, Training)
                connection.send(("priced", measured(config, data, work.break_even, task)))
                continue

            before: tuple[float, int, tuple[Cell, ...]] = (0.0, 0, ())

            def on_evaluation(jobs: Sequence[Job]) -> None:
                nonlocal before
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
                        "`batch_size`, or fewer `workers`; what is finished is kept, continue with `resume`"
                    ) from error
                short = True
            if short:  # out here, where the error no longer holds what it could not finish
                free_memory()
                connection.send(("memory", None))
            else:
                connection.send(("stopped", None) if result is None else ("finished", result))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except SparselthError as error:
            connection.send(("failed", error))
        except Exception as error:
            report: Exception = RuntimeError(f"{task}: {type(error).__name__}: {error}")
            report.add_note(traceback.format_exc())
            if is_out_of_memory(error):
                report = SparselthError(
                    "a worker is out of memory; use fewer `workers`; what is finished is kept, continue with "
                    "`resume`"
                )
            connection.send(("failed", report))


def end_with_the_parent() -> None:
    """Have the system kill this process when its parent ends; where it cannot, the next step notices."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
