"""Being asked to stop: by SIGINT (Ctrl-C), SIGTERM and SIGUSR1, which schedulers send before they kill.

The first one is passed on; a second one ends the process at once, whatever it does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO = 0.1  # seconds: `timeout` and others send one signal to the process and again to its group
CODE = 130
_came: list[float] = []  # when signals came, within the outermost `asked_to_stop`
_depth = 0


@contextmanager
def asked_to_stop(ask: Callable[[str], None]) -> Iterator[None]:
    """Within, the first signal calls `ask` with its name, and a second one ends the process with code 130.

    Python has handlers in the main thread only: in another thread nothing changes.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _: object) -> None:
        now = time.monotonic()
        if _came and now - _came[0] < ECHO:
            return
        _came.append(now)
        if len(_came) > 1:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
            os._exit(CODE)
        ask(signal.Signals(number).name)

    if not _depth:
        _came.clear()
    old = {number: signal.signal(number, handler) for number in STOPS}
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        for number, previous in old.items():
            signal.signal(number, previous)


def interrupt(name: str) -> None:
    """Raise KeyboardInterrupt in the name of a signal, for `asked_to_stop`."""
    raise KeyboardInterrupt(name)


def name_of(stop: BaseException) -> str:
    """The signal behind a KeyboardInterrupt."""
    return str(stop) or signal.SIGINT.name


@contextmanager
def held_back() -> Iterator[None]:
    """Within, these signals wait; processes started within have them wait until `ignored`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignored() -> None:
    """For a worker: a signal to the whole group must not end it before it has saved."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
