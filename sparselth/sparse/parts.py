"""A batch in parts, each through all layers by one thread: what a layer leaves, the next one finds near by.

Layer by layer a batch of images leaves more than a core's second-level cache holds, and each layer waits for
all threads of the one before. Part by part neither is so.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.sparse.network import BATCHES, Held, InColumns


class InParts:
    """What `make(batch)` binds, on `part` of a batch at a time; `together` makes one of the results.

    A batch of less than one for each thread goes through as a whole, as `InColumns` has it.
    """

    def __init__(
        self, make: Callable[[int], Held], part: int, together: Callable[[list[Any]], Any] = torch.cat
    ) -> None:
        self.make, self.part, self.together, self.lock = make, part, together, threading.Lock()
        self.whole = InColumns(make)
        self.held: dict[tuple[int, int], Held] = {}  # by images and thread
        self.pool: ThreadPoolExecutor | None = None
        self.made_by = 0, 0  # the process whose threads these are, and how many

    def __call__(self, x: Tensor, *more: Tensor) -> Any:
        starts = range(0, len(x), self.part)
        parts = [[t[i : i + self.part] for t in (x, *more)] for i in starts]
        threads = torch.get_num_threads()
        if len(parts) < max(2, threads):
            return self.whole(x, *more)
        found: list[Any] = [None] * len(parts)

        def work(thread: int) -> None:
            with torch.no_grad():  # a thread begins without
                for i in range(thread, len(parts), threads):
                    held = self.held[len(parts[i][0]), thread]
                    held.fill(*parts[i])
                    held.run()
                    found[i] = held.result()

        with self.lock:
            for i, part in enumerate(parts):
                key = len(part[0]), i % threads
                if key not in self.held:
                    rests = [one for one in self.held if one[0] != self.part]
                    if len(rests) == BATCHES:  # what is left over of the last few batches
                        del self.held[rests[0]]
                    with torch.inference_mode(False), _native.on_threads(1):
                        self.held[key] = self.make(len(part[0]))
            others = [self._pool(threads).submit(work, thread) for thread in range(1, threads)]
            try:
                work(0)
            finally:
                wait(others)  # nobody works on what is the next call's
            for one in others:
                one.result()
        return self.together(found)

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        """Threads of this process: a fork has none of its parent's."""
        if self.pool is None or self.made_by != (os.getpid(), threads):
            self.pool = ThreadPoolExecutor(threads - 1, "sparselth-parts")
            self.made_by = os.getpid(), threads
        return self.pool
