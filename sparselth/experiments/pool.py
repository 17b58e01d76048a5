"""Batches of cells over worker processes, one thread each: small networks lose time to two threads.

On a CPU workers are forked, so that the data set is in memory once; on CUDA one spawned worker owns the
device. Only the parent writes the run's lines; a worker writes the files of its cells, then reports. A
batch for which memory is short is halved. A worker whose parent is gone ends itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sparselth.config import ImpConfig, Replica
from sparselth.data import Images
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.paths import choose
from sparselth.errors import Interrupted, SparselthError
from sparselth.experiments.imp import Finished, train_cells
from sparselth.experiments.price import Agenda, Price, replica_bytes, widest
from sparselth.models import get_model
from sparselth.pruning import ladder, prune
from sparselth.runs import RunFolder
from sparselth.streams import stream
from sparselth.train import Job, State, prepare

STRETCH = 5  # least steps between looks at the clock
CONTEXT = 5 * 10**8  # device memory that CUDA and its libraries take


class Watcher(Protocol):
    """What the parent tells while cells run."""

    def started(self, worker: int, cells: Sequence[Replica]) -> None: ...
    def evaluated(
        self, worker: int, cells: Sequence[Replica], step: int, accuracy: float, steps_per_second: float
    ) -> None: ...
    def finished(self, worker: int, done: Finished) -> None: ...
    def halved(self, cells: int, limit: int) -> None: ...
    def tick(self) -> None: ...


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

    def price(self, limit: int) -> tuple[Price, int]:
        """Measure what a batch of up to `limit` cells costs, and how many fit into memory."""
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
        busy: dict[int, list[Replica]] = {}
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
                            agenda.finished(busy.pop(worker))
                            for done in value:
                                folder.add(done.who, done.cell, done.evaluations, done.timings)
                                watcher.finished(worker, done)
                        case "failed":
                            del busy[worker]
                            failure, self.stop.value = failure or value, True
        if failure:
            raise failure
        finished, total = len(folder.finished), len(self.config.replicas())
        if finished < total:
            who = caught[0] if caught else "its caller"
            raise Interrupted(
                f"stopped by {who}; {finished} of {total} cells are finished and those under way are saved "
                f"in {folder.path}; continue with --resume"
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
            task: list[Replica] | int | None = connection.recv()
            if task is None:
                return
            if data is None:
                data = Resident(images, config.device, get_model(config.model).evaluation_batch)
            if isinstance(task, int):
                connection.send(("priced", _price(config, data, break_even, task)))
                continue

            before: tuple[float, int, tuple[Replica, ...]] = (0.0, 0, ())

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
                result = train_cells(config, run, data, task, break_even, on_evaluation, should_stop)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(task) == 1:
                    raise SparselthError(
                        f"{task[0]}: out of memory with one network on {config.device}; use a smaller "
                        "--batch-size"
                    ) from error
                short = True
            if short:  # out here, where the error no longer holds what it could not finish
                _free_memory()
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


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, a library under it, Triton or Python ran out of memory; they say it in many ways.

    Out of memory within the capture of a graph comes as an error of the capture, with its cause behind it.
    """
    words = ("out of memory", "can't allocate memory", "alloc_failed")
    chain, seen = [error], list[BaseException]()
    while chain:
        link = chain.pop()
        said = str(link).lower()
        if isinstance(link, torch.OutOfMemoryError | MemoryError) or any(word in said for word in words):
            return True
        seen.append(link)
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and e not in seen]
    return False


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _price(
    config: ImpConfig, data: Resident, break_even: Mapping[str, float], limit: int
) -> tuple[Price, int]:
    """Time a few steps of one dense network and of as many as train at once, and, where sparse is cheaper,
    of sparse ones; and evaluations. Nothing of it is kept. Also how many replicas fit into memory.
    """
    model = get_model(config.model)
    each = replica_bytes(model, config.recipe)
    limit = min(limit, widest(config))
    if config.device == "cuda":
        limit = max(1, min(limit, int(0.9 * torch.cuda.mem_get_info()[0] / each)))
    seed = config.seeds[0]
    weights = init_weights(model, stream(seed, "price", 0, "init"))
    recipe = replace(config.recipe, steps=20_000, eval_every=20_000, lr_drops=(), warmup=0)
    rungs = ladder(model.params, config.levels, config.rate, config.scope)
    shares = [sum(rung.values()) / model.params.prunable for rung in rungs]
    overhead = 0.0

    def measured(level: int, replicas: int) -> tuple[float, float]:
        """Seconds of a step of all, over 0.3 s, and of an evaluation."""
        nonlocal overhead
        mask = prune(model.params, weights[: model.params.mask_size], model.params.full_mask(), rungs[level])
        start = weights.clone()
        start[: model.params.mask_size] *= mask
        jobs = [
            Job(
                Replica(seed, "ticket", 0, draw),
                State.start(start[None].to(config.device), recipe),
                mask.to(config.device),
            )
            for draw in range(replicas)
        ]
        began = time.perf_counter()
        steps = prepare(model, data, jobs, recipe, config.kernels, break_even)
        steps.advance(0, 1, lambda: False)
        steps.measure()
        overhead = time.perf_counter() - began
        stretch = max(STRETCH, steps.many)
        began, taken = time.perf_counter(), 1
        while taken + stretch < recipe.steps and time.perf_counter() - began < 0.3:
            taken += steps.advance(taken, stretch if taken > 1 else 1, lambda: False)
            synchronize()
        spent, began = time.perf_counter() - began, time.perf_counter()
        steps.measure()
        return spent / (taken - 1), time.perf_counter() - began

    def synchronize() -> None:
        if config.device == "cuda":
            torch.cuda.synchronize()

    batches, validation = dict[int, float](), dict[int, float]()
    batches[1], validation[1] = measured(0, 1)
    alone = choose(config.kernels, config.device).masked_update.takes == "native"
    while limit > 1 and not alone:  # alone, a batch takes what its replicas take one after another
        try:
            batches[limit], validation[limit] = measured(0, limit)
            break
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        _free_memory()
        limit //= 2
    dense_overhead = overhead if config.device == "cuda" else 0.0
    levels = sorted({0, config.levels // 2, config.levels} if break_even else {0})
    share_of_dense = [1.0, *(measured(level, 1)[0] / batches[1] for level in levels[1:])]
    # from sparse to dense, as np.interp wants its points
    by_level = np.interp(shares, [shares[level] for level in levels[::-1]], share_of_dense[::-1])
    fixed = data.images.numel() + CONTEXT if config.device == "cuda" else _resident_bytes()
    test_share = data.n_test / data.n_validation
    price = Price(batches, tuple(by_level.tolist()), validation, test_share, fixed, each, dense_overhead)
    return price, limit


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
