"""The errors a user can mend: one line that names what is off and says what to do.

A message names fields and arguments in backticks, "`batch_size` 0: expected 1 or more"; the command line
prints them as its flags, "--batch-size 0: ...".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparselthError(Exception):
    """Something failed that the user can mend; the message names it and says what to do (exit 1)."""


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
