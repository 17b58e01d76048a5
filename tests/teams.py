"""A team of workers as forks of this process, over gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from sparselth.engine.team import Seat, Team


def together(work: Callable[[Team], Any], size: int = 2) -> list[Any]:
    """What `work` gives on each worker of a team; what it raises there is given, too."""
    fork, found = multiprocessing.get_context("fork"), list[Any]()
    with tempfile.TemporaryDirectory() as folder:
        names = tuple(f"worker {rank}" for rank in range(size))
        seats = [Seat(f"{folder}/store", "team", names, rank) for rank in range(size)]
        pipes = [fork.Pipe() for _ in seats]
        pairs = zip(seats, pipes, strict=True)
        workers = [fork.Process(target=_live, args=(work, seat, theirs)) for seat, (_, theirs) in pairs]
        for worker in workers:
            worker.start()
        for (ours, _), worker in zip(pipes, workers, strict=True):
            assert ours.poll(60), f"{worker} says nothing"
            found.append(pickle.loads(ours.recv_bytes()))
        for worker in workers:
            worker.join()
    return found


def _live(work: Callable[[Team], Any], seat: Seat, line: Connection) -> None:
    torch.set_num_threads(1)
    found: Any
    try:
        found = work(seat.taken("cpu"))
    except Exception as error:
        found = error
    line.send_bytes(pickle.dumps(found))  # tensors as such, not as files that this process shares
