"""An answer to a signal within two seconds, whatever library the main thread is in."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from sparselth.signals import CODE, STOPS

PATIENCE = 1.2  # seconds
_stopped = threading.Event()


def leave(code: int) -> NoReturn:
    """End the process; where `answered` was stopped without tidying up, which takes torch.compile seconds."""
    if _stopped.is_set():
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def answered(finish: Callable[[], None]) -> Iterator[None]:
    """Within, a signal to stop does what it does; where that takes longer than PATIENCE, `finish` is called.

    A handler of Python's waits until the main thread returns from a library's call, which may take minutes.
    The interpreter itself notes a signal at once, in a pipe that another thread reads: that thread then calls
    `finish` and ends the process with code 130.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    left, turn = threading.Event(), threading.Lock()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] in STOPS and not left.wait(PATIENCE):
                with turn:
                    if not left.is_set():
                        try:
                            finish()
                        finally:
                            os._exit(CODE)

    thread = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        _stopped.set()
        raise
    finally:
        with turn:
            left.set()
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)
