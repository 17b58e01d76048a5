"""A worker's life: cells in, files of cells and reports out; one thread, as small networks lose time to two.

A spawned worker knows plugins, and nothing else that its parent has registered. It writes the files of its
cells, then reports; the run's lines are the parent's. It ends with its parent.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from sparselth import signals
from sparselth.cluster.torchrun import Dial
from sparselth.config import Cell
from sparselth.data import Images, own
from sparselth.data.batches import Resident
from sparselth.data.streamed import opened
from sparselth.engine.memory import free_memory, is_out_of_memory
from sparselth.engine.state import Job
from sparselth.engine.team import Seat, Team
from sparselth.errors import SparselthError
from sparselth.experiments.base import Experiment, Place
from sparselth.experiments.flag import Flag
from sparselth.experiments.price import measured
from sparselth.experiments.training import Training
from sparselth.registry import load_plugin, plugins

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


def live(line: Connection | Dial, stop: Flag, parent: int, work: Work) -> None:
    """A worker's life: receive cells, compute them, report."""
    signals.ignored()
    sys.stdout = sys.stderr  # what a user's network prints is no result
    end_with_the_parent()
    connection = line if isinstance(line, Connection) else line.connect()

    def leave_if_orphaned() -> None:
        if os.getppid() != parent:
            os._exit(1)

    try:
        serve(connection, stop, leave_if_orphaned, work)
    except (BrokenPipeError, EOFError, ConnectionResetError):
        os._exit(1)  # the parent is gone


def serve(connection: Connection, stop: Flag, leave_if_orphaned: Callable[[], None], work: Work) -> None:
    """Compute cells until there are no more; on one thread.

    Of a team who leads reports, stops included; from the others errors alone are heard.
    """
    torch.set_num_threads(1)
    # where gradients end, moments fade through subnormal numbers, and an Intel CPU takes 100 cycles and more
    # for each: LeNet-300-100 by the paper's recipe learned at half the pace
    torch.set_flush_denormal(True)
    asked = False
    team: Team | None = None

    def should_stop() -> bool:
        """Asked wherever a cell can be left, at every step: so the parent knows that it will be."""
        nonlocal asked
        leave_if_orphaned()
        if stop.value and not asked and (team is None or team.leads):
            asked = True
            connection.send(("stopping", None))
        return asked if team is None else team.agree(asked)

    config = work.config
    data: Resident | None = None
    while True:
        while not connection.poll(1.0):
            leave_if_orphaned()
        try:
            task: list[Cell] | Seat | tuple[int, int] | None = connection.recv()
            if task is None:
                if team:
                    team.end()
                return
            if isinstance(task, Seat):
                team = task.taken(config.device)
                continue
            if data is None and work.images is not None:
                data = opened(work.images, config.device, *config.evaluation, inputs=config.shown_as)
            if isinstance(task, tuple):
                assert data is not None
                assert isinstance(config, Training)
                connection.send(("priced", measured(config, data, work.break_even, *task)))
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

            short, result, leads = False, None, team is None or team.leads
            try:
                told = on_evaluation if leads else _to_nobody
                place = Place(work.run, data, work.break_even, told, should_stop, team)
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
            elif leads:
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
        if isinstance(task, Seat):
            return  # without its team it computes nothing


def _to_nobody(jobs: Sequence[Job]) -> None:
    """Of a team one tells."""


def end_with_the_parent() -> None:
    """Have the system kill this process when its parent ends; where it cannot, the next step notices."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
