"""The executor `ray`: actors of Ray Core, on this machine or a cluster (`pip install 'sparselth[ray]'`).

Each actor has a core, or a GPU of its own that Ray chooses, and keeps its kernels, libraries and device from
run to run. All machines must see the sweep's folder under one path, and have sparselth installed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sparselth.cluster.executor import Ended, Task
from sparselth.errors import SparselthError, check_number


@dataclass(frozen=True)
class Ray:
    """So many actors, one a core or a GPU of the cluster unless given.

    `address` is auto, the cluster that this machine is part of, or HOST:PORT of one. Without it that of
    $RAY_ADDRESS is taken, or Ray is started on this machine until the process ends.
    """

    number: int | None = None
    address: str = ""
    name = "ray"

    def device(self, wanted: str) -> str:
        if wanted == "auto":
            return "cuda" if _resources(self.address).get("GPU") else "cpu"
        return wanted

    def workers(self, device: str) -> int:
        kind = "GPU" if device == "cuda" else "CPU"
        there = int(_resources(self.address).get(kind, 0))
        if not there:
            raise SparselthError(
                f"the Ray cluster has no {kind}; start a node that has, or choose another `device`"
            )
        check_number("workers", self.number, 1, there, f"the {kind}s of the Ray cluster")
        return self.number or there

    @contextmanager
    def crew(self, device: str) -> Iterator[Actors]:
        ray = _connected(self.address)
        crew = Actors(ray, device == "cuda")
        try:
            yield crew
        finally:
            crew.close()


def _connected(address: str) -> Any:
    """The module ray, connected; SparselthError in a line where that cannot be."""
    try:
        import ray
    except ImportError as error:
        raise SparselthError("`executor` ray: Ray is not installed; pip install 'sparselth[ray]'") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        known: dict[str, Any] = {"address": address} if address else {}
        if not known and "RAY_ADDRESS" not in os.environ:
            known = {"address": "local", "include_dashboard": False}  # not one that ended
        try:
            ray.init(**known, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            where = f"`address` {address}" if address else "`executor` ray"
            raise SparselthError(f"{where}: Ray cannot be reached or started ({error})") from error
    return ray


def _resources(address: str) -> dict[str, float]:
    found: dict[str, float] = _connected(address).cluster_resources()
    return found


class Member:
    """What an actor is: a worker that is asked to stop while it computes."""

    def __init__(self) -> None:
        from sparselth.cluster.worker import Worker

        self.worker = Worker()

    def compute(self, task: Task) -> Ended:
        return self.worker.compute(task)

    def stop(self) -> None:
        self.worker.stop()


class Actors:
    """A crew of actors; each is started when there is a task for it."""

    def __init__(self, ray: Any, gpu: bool) -> None:
        two_threads = 2  # one computes, one hears that it shall stop
        self.ray = ray
        self.kind = ray.remote(Member).options(
            num_cpus=0 if gpu else 1, num_gpus=int(gpu), max_concurrency=two_threads
        )
        self.free = list[Any]()
        self.busy = dict[Any, tuple[Any, Task, float]]()  # by what will be the result

    def start(self, task: Task) -> None:
        since = time.perf_counter()
        actor = self.free.pop() if self.free else self.kind.remote()
        self.busy[actor.compute.remote(task)] = actor, task, since

    def wait(self, seconds: float) -> list[Ended]:
        if not self.busy:
            return []
        ready, _ = self.ray.wait([*self.busy], num_returns=len(self.busy), timeout=seconds)
        return [self._ended(one) for one in ready]

    def _ended(self, one: Any) -> Ended:
        actor, task, since = self.busy.pop(one)
        all_of_it = time.perf_counter() - since
        try:
            found: Ended = self.ray.get(one)
        except self.ray.exceptions.RayActorError as error:
            said = str(error).strip().splitlines()
            why = next((line for line in reversed(said) if line.strip()), type(error).__name__).strip()
            return Ended(task.name, error=f"its worker ended without a result ({why})", died=True)
        except self.ray.exceptions.RayError as error:
            self.free.append(actor)
            return Ended(task.name, error=f"{type(error).__name__}: {error}")
        self.free.append(actor)
        return replace(found, around=max(0.0, all_of_it - found.seconds))

    def stop(self) -> None:
        for actor, _, _ in self.busy.values():
            actor.stop.remote()

    def close(self) -> None:
        for actor in [*self.free, *(actor for actor, _, _ in self.busy.values())]:
            self.ray.kill(actor)
