"""Cells over worker processes, one thread each: small networks lose time to two threads.

On a CPU workers are forked, so that the data set is in memory once; on CUDA one spawned worker owns the
device. Only the parent writes the run's lines; a worker writes the file of its cell, then reports. A
worker whose parent is gone ends itself.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sparselth.batches import Resident
from sparselth.config import ImpConfig, Replica
from sparselth.data import Images
from sparselth.errors import Interrupted, SparselthError
from sparselth.experiments.imp import Finished, needs, train_cell
from sparselth.models import get_model
from sparselth.nn import init_weights
from sparselth.pruning import full_mask, ladder, prune
from sparselth.runs import RunFolder
from sparselth.streams import stream
from sparselth.train import Evaluator, State, evaluation_batch, fit


class Watcher(Protocol):
    """What the parent tells while cells run."""

    def started(self, worker: int, who: Replica) -> None: ...
    def evaluated(
        self, worker: int, who: Replica, step: int, accuracy: float, steps_per_second: float
    ) -> None: ...
    def finished(self, worker: int, done: Finished) -> None: ...
    def tick(self) -> None: ...


@dataclass(frozen=True)
class Price:
    """What one cell costs on this machine, measured on a few steps."""

    step_seconds: tuple[float, ...]  # by level
    validation_seconds: float  # of the dense network, as is test_seconds
    test_seconds: float
    worker_bytes: int

    def cell_seconds(self, config: ImpConfig, who: Replica) -> float:
        recipe = config.recipe
        continued = who.level > 0 and who.arm in ("ticket", "random-mask")
        steps = recipe.steps - (config.rewind if continued else 0)
        evaluations = -(-steps // recipe.eval_every)
        step, dense = self.step_seconds[who.level], self.step_seconds[0]
        images = evaluations * self.validation_seconds + 2 * self.test_seconds
        return steps * step + images * step / dense

    def run_seconds(self, config: ImpConfig, finished: set[Replica], workers: int) -> float:
        """When the last cell ends, by going through the schedule."""
        agenda, clock, busy = Agenda(config, finished), 0.0, list[tuple[float, int, Replica]]()
        while agenda or busy:
            while len(busy) < workers and (who := agenda.next()):
                heapq.heappush(busy, (clock + self.cell_seconds(config, who), id(who), who))
            clock, _, who = heapq.heappop(busy)
            agenda.finished(who)
        return clock


class Agenda:
    """Which cell comes next: tickets first, because everything waits for them, then by level."""

    def __init__(self, config: ImpConfig, finished: set[Replica]) -> None:
        self.config, self.done = config, set(finished)
        self.open = [who for who in config.replicas() if who not in finished]
        self.open.sort(key=lambda who: (who.arm != "ticket", who.level))

    def __len__(self) -> int:
        return len(self.open)

    def next(self) -> Replica | None:
        """Take the next cell that can start, or None."""
        for i, who in enumerate(self.open):
            if (before := needs(self.config, who)) is None or before in self.done:
                return self.open.pop(i)
        return None

    def finished(self, who: Replica) -> None:
        self.done.add(who)


class Pool:
    """The worker processes of one run; use it as a context."""

    def __init__(
        self, config: ImpConfig, images: Images, run: Path, workers: int, break_even: Mapping[str, float]
    ) -> None:
        self.config = config
        context: Any = multiprocessing.get_context("fork" if config.device == "cpu" else "spawn")
        self.stop = context.Value("b", False, lock=False)
        self.connections: list[Connection] = []
        self.processes = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, self.stop, os.getpid(), config, images, run, break_even),
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

    def price(self) -> Price:
        """Measure what a cell costs."""
        self.connections[0].send("price")
        kind, value = self._receive(0)
        if kind == "failed":
            raise value
        assert isinstance(value, Price)
        return value

    def run(self, folder: RunFolder, watcher: Watcher) -> None:
        """Compute every cell that is missing. Raises Interrupted after a signal, or what a cell raised."""
        agenda = Agenda(self.config, folder.finished)
        busy: dict[int, Replica] = {}
        failure: BaseException | None = None
        with _signals(self.stop) as caught:
            while True:
                for worker, connection in enumerate(self.connections):
                    if worker in busy or self.stop.value:
                        continue
                    if (who := agenda.next()) is None:
                        break
                    busy[worker] = who
                    watcher.started(worker, who)
                    with suppress(
                        BrokenPipeError, ConnectionResetError
                    ):  # the next receive tells how the worker ended
                        connection.send(who)
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
                            watcher.evaluated(worker, busy[worker], *value)
                        case "stopped":
                            del busy[worker]
                        case "finished":
                            del busy[worker]
                            folder.add(value.who, value.cell, value.evaluations, value.timings)
                            agenda.finished(value.who)
                            watcher.finished(worker, value)
                        case "failed":
                            del busy[worker]
                            failure, self.stop.value = failure or value, True
        if failure:
            raise failure
        finished, total = len(folder.finished), len(self.config.replicas())
        if finished < total:
            raise Interrupted(
                f"stopped by {caught[0]}; {finished} of {total} cells are finished and those under way are "
                f"saved in {folder.path}; continue with --resume"
            )
        folder.complete()

    def _receive(self, worker: int) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = self.connections[worker].recv()
        except (EOFError, ConnectionError):
            self.processes[worker].join(5)
            code = self.processes[worker].exitcode
            how = f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"
            hint = " (out of memory? try --workers 1)" if code == -signal.SIGKILL else ""
            return "failed", SparselthError(
                f"worker {worker} ended without a result, {how}{hint}; what is finished is kept, "
                "continue with --resume"
            )
        return message


def available_workers(device: str) -> int:
    """One per core this process may use; one for a GPU."""
    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


def _work(
    connection: Connection,
    stop: Any,
    parent: int,
    config: ImpConfig,
    images: Images,
    run: Path,
    break_even: Mapping[str, float],
) -> None:
    """A worker's life: receive a cell, train it, report."""
    # A signal to the whole group must not end a worker before it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)

    def orphaned() -> bool:
        return os.getppid() != parent

    def should_stop() -> bool:
        return bool(stop.value)

    data: Resident | None = None
    while True:
        while not connection.poll(1.0):
            if orphaned():
                os._exit(1)
        try:
            task = connection.recv()
            if task is None:
                return
            if data is None:
                data = Resident(images, config.device, evaluation_batch(get_model(config.model)))
            if task == "price":
                connection.send(("priced", _price(config, data, break_even)))
                continue

            before = (time.perf_counter(), -1)

            def on_evaluation(state: State) -> None:
                nonlocal before
                if orphaned():
                    os._exit(1)
                now = time.perf_counter()
                speed = (state.step - before[1]) / (now - before[0]) if before[1] >= 0 else 0.0
                before = (now, state.step)
                accuracy = state.evaluations[-1]["validation_accuracy"]
                connection.send(("evaluated", (state.step, accuracy, speed)))

            result = train_cell(config, run, data, task, break_even, on_evaluation, should_stop)
            connection.send(("finished", result) if result else ("stopped", None))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            os._exit(1)  # the parent is gone
        except SparselthError as error:
            connection.send(("failed", error))
        except Exception as error:
            report = RuntimeError(f"{task}: {type(error).__name__}: {error}")
            report.add_note(traceback.format_exc())
            connection.send(("failed", report))


def _price(config: ImpConfig, data: Resident, break_even: Mapping[str, float]) -> Price:
    """Time a few steps of the dense network and, where sparse is cheaper, of sparse ones, and an evaluation.

    Nothing of it is kept.
    """
    model = get_model(config.model)
    who = Replica(config.seeds[0], "ticket", 0)
    weights = init_weights(model, stream(who.seed, "price", 0, "init"))
    recipe = replace(config.recipe, steps=10**9, eval_every=10**9, lr_drops=())
    rungs = ladder(model, config.levels, config.rate, config.scope)
    shares = [sum(rung.values()) / model.prunable for rung in rungs]

    def some_steps(level: int, limit: int) -> float:
        """Seconds a step, over `limit` steps or 0.3 s, whichever is first."""
        mask = prune(model, weights[: model.mask_size], full_mask(model), rungs[level])
        start = weights.clone()
        start[: model.mask_size] *= mask
        mask, state = mask[None].to(config.device), State.start(start[None].to(config.device), recipe)
        began, steps = time.perf_counter(), 0

        def enough() -> bool:
            nonlocal steps
            steps += 1
            return steps > limit or time.perf_counter() - began > 0.3

        kernels = config.kernels
        fit(
            model,
            data,
            [who],
            state,
            mask,
            recipe,
            kernels=kernels,
            break_even=break_even,
            should_stop=enough,
        )
        return state.step_seconds / max(state.step, 1)

    some_steps(0, 10)  # warm up
    levels = sorted({0, config.levels // 2, config.levels} if break_even else {0})
    measured = [some_steps(level, 10**9) for level in levels]
    # from sparse to dense, as np.interp wants its points
    step_seconds = np.interp(shares, [shares[level] for level in levels[::-1]], measured[::-1])
    chunks = data.validation(who.seed)[:5]
    evaluator = Evaluator(model, weights[None].to(config.device))
    evaluator.measure(chunks)
    began = time.perf_counter()
    evaluator.measure(chunks)
    image_seconds = (time.perf_counter() - began) / sum(x.shape[2] for x, _ in chunks)
    return Price(
        tuple(step_seconds.tolist()),
        image_seconds * data.n_validation,
        image_seconds * data.n_test,
        _resident_bytes(),
    )


def _resident_bytes() -> int:
    """Memory of this process, its part of shared pages included (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def _signals(stop: Any) -> Iterator[list[str]]:
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
