"""A signal is answered though the main thread is in a library's call; else nothing is left of the watch."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from sparselth.cli.answer import PATIENCE, answered
from sparselth.signals import CODE

# Python's handlers do not run within this call, some seconds of one function in C.
BUSY = """
import hashlib, sys, time
from sparselth.cli.answer import answered
with answered(lambda: print("what there is", flush=True)):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 40_000_000)
print("not reached")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_call_that_does_not_return(number: int, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", f"import signal\nsignal.signal({int(number)}, lambda *_: None)\n{BUSY}"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        assert rest == "what there is\n"
        assert process.returncode == CODE
        assert PATIENCE < 2


def test_who_was_stopped_leaves_at_once(environment: dict[str, str]) -> None:
    """Without what else is done at the end of a process, which torch.compile makes long."""
    script = """
import atexit, signal
from sparselth.cli.answer import answered, leave
atexit.register(print, "tidied up")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
try:
    with answered(lambda: None):
        if {stopped}:
            signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
print("said")
leave(7)
"""
    for stopped, wanted in ((True, "said\n"), (False, "said\ntidied up\n")):
        code = script.format(stopped=stopped)
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert done.returncode == 7
        assert done.stdout == wanted


def test_who_answers_in_time_is_left_alone() -> None:
    called: list[str] = []
    threads = threading.active_count()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), answered(lambda: called.append("finish")):
        signal.raise_signal(signal.SIGINT)
    with answered(lambda: called.append("finish")):
        pass
    assert not called
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGINT, before)
