"""The errors a user can mend: one line that names what is off and says what to do.

A message names fields and arguments in backticks, "`batch_size` 0: expected 1 or more"; the command line
prints them as its flags, "--batch-size 0: ...".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1000  # characters of a message


def one_line(text: str) -> str:
    """The text on one line of LONGEST characters at most, control characters escaped."""
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class SparselthError(Exception):
    """Something failed that the user can mend; the message names it and says what to do (exit 1).

    Whatever names and words of files it quotes, it is one line without control characters.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(SparselthError):
    """A field, an argument or a flag is off (exit 2)."""


class Interrupted(SparselthError):
    """Stopped by a signal after everything computed so far was saved (exit 130)."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name outside its list, with the nearest name when there is one."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
    return UsageError(f"unknown {kind} {name!r}: {hint}")


def check_number(name: str, value: int | None, low: int, most: int, why: str = "") -> None:
    """Raise UsageError where an argument that was given is no whole number from `low` to `most`."""
    if value is None:
        return
    if type(value) is not int or value < low:
        raise UsageError(f"`{name}` {value!s:.40}: expected {low} or more")
    if value > most:
        raise UsageError(f"`{name}` {value!s:.40}: expected at most {most:,}" + (f" ({why})" if why else ""))
