"""Output that may be poor: plain characters where the terminal has no others (LANG=C, latin-1,
PYTHONIOENCODING=ascii), standard streams that are closed, full or gone.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

PLAIN = {"±": "+-", "–": "-", "─": "-", "×": "x", "→": "->", "≤": "<=", "≥": ">="}


def speak_plainly() -> None:
    """Let stdout and stderr write what their encoding lacks as `PLAIN` says, the rest escaped."""
    codecs.register_error("sparselth.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, nor where it is closed
            stream.reconfigure(errors="sparselth.plain")


class Closed(io.TextIOBase):
    """Stands for a closed stdout: what is printed is lost, and that is an error."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class Forgiving(io.FileIO):
    """A stderr that may be full, or whose terminal may be gone: what cannot be said does not stop a run."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def open_streams() -> None:
    """Let nothing take the numbers of standard streams that are closed, and forgive stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = Closed()
    if sys.stderr is None or (sys.stderr is sys.__stderr__ and type(sys.stderr) is io.TextIOWrapper):
        said = sys.stderr or sys.__stdout__
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(Forgiving(2, "w", closefd=False)),
            encoding=said.encoding if said else "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )


def stdout_fails() -> bool:
    """Whether stdout takes nothing; it is the null device then, so that the end of Python is silent."""
    try:
        print(end="", flush=True)
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return isinstance(sys.stdout, Closed)


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text, end = error.object, error.start + 1  # a character at a time
    plain = PLAIN.get(text[error.start], text[error.start].encode("ascii", "backslashreplace").decode())
    if len(plain) == 2 and text[end : end + 1] == " ":  # so that columns stay columns
        end += 1
    return plain, end
