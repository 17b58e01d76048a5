"""Plain characters where the terminal has no others: LANG=C, latin-1, PYTHONIOENCODING=ascii."""

from __future__ import annotations

import codecs
import io
import sys

PLAIN = {"±": "+-", "–": "-", "─": "-", "×": "x", "→": "->", "≤": "<=", "≥": ">="}


def speak_plainly() -> None:
    """Let stdout and stderr write what their encoding lacks as `PLAIN` says, the rest escaped."""
    codecs.register_error("sparselth.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, nor where it is closed
            stream.reconfigure(errors="sparselth.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text, end = error.object, error.start + 1  # a character at a time
    plain = PLAIN.get(text[error.start], text[error.start].encode("ascii", "backslashreplace").decode())
    if len(plain) == 2 and text[end : end + 1] == " ":  # so that columns stay columns
        end += 1
    return plain, end
