"""A flag that processes share, in memory that needs neither /dev/shm nor a temporary folder."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any


class Flag:
    """One byte that a process sets and its children see, forked or spawned."""

    def __init__(self, memory: int | None = None) -> None:
        self.memory = os.memfd_create("sparselth flag") if memory is None else memory
        os.ftruncate(self.memory, 1)
        self._page = mmap.mmap(self.memory, 1)

    @property
    def value(self) -> bool:
        return self._page[0] != 0

    @value.setter
    def value(self, value: bool) -> None:
        self._page[0] = int(value)

    def __del__(self) -> None:
        os.close(self.memory)

    def __reduce__(self) -> tuple[Callable[..., Flag], tuple[Any]]:
        return _received, (DupFd(self.memory),)


def _received(memory: Any) -> Flag:
    return Flag(memory.detach())
