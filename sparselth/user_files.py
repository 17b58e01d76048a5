"""Functions in files of a user's own, by names such as "my_net.py:make".

The file is imported once a process, under a name of its own, and again where a new configuration finds that
its text has changed; the text is known by 16 hex digits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from sparselth.errors import SparselthError, UsageError

_modules: dict[Path, tuple[str, ModuleType]] = {}  # the text that was imported, and what came of it
_imported = count()


def is_file(name: str) -> bool:
    """Whether a name says a file and a function in it."""
    file, colon, _ = name.rpartition(":")
    return bool(colon) and file.endswith(".py")


def short(name: str) -> str:
    """What a name is called in the names of folders and in tables: the file's own."""
    return Path(name.rpartition(":")[0]).stem if is_file(name) else name.rpartition(":")[2]


def code(kind: str, name: str) -> str:
    """16 hex digits that name the text of the file."""
    return _digest(_text(kind, name))


def refresh(kind: str, name: str) -> None:
    """Let go of a file that has changed since it was imported: it is imported again when it is asked for.

    For those who begin something; whoever is amidst it goes on with what there was.
    """
    path = _path(name).resolve()
    if path in _modules and _modules[path][0] != code(kind, name):
        del _modules[path]


def function(kind: str, name: str) -> Callable[..., Any]:
    """The function of that name; `kind` is the field that holds the name, for errors.

    What it prints goes to stderr: stdout is for results. UsageError where there is no such file or no such
    function in it; SparselthError where the file fails.
    """
    found = getattr(module(kind, name), name.rpartition(":")[2], None)
    if not callable(found):
        file, _, wanted = name.rpartition(":")
        known = [one for one, what in vars(module(kind, name)).items() if _is_own(what, module(kind, name))]
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UsageError(f"`{kind}` {name}: {file} has no function {wanted!r}; {has}")

    @wraps(found)
    def heard(*values: Any, **named: Any) -> Any:
        with redirect_stdout(sys.stderr):
            return found(*values, **named)

    return heard


def module(kind: str, name: str) -> ModuleType:
    """The file of a name as a module, for what else it says."""
    path = _path(name).resolve()
    if path in _modules:
        return _modules[path][1]
    text, called = _text(kind, name), f"sparselth_user_{path.stem}_{next(_imported)}"
    spec = importlib.util.spec_from_file_location(called, path)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[called] = found
    try:
        with redirect_stdout(sys.stderr):
            exec(compile(text, path, "exec"), found.__dict__)
    except Exception as error:
        del sys.modules[called]
        raise SparselthError(f"`{kind}` {name}: {said(error)}") from error
    _modules[path] = _digest(text), found
    return found


def said(error: Exception) -> str:
    """What a user's code raised, in one line."""
    if isinstance(error, SparselthError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _path(name: str) -> Path:
    return Path(name.rpartition(":")[0]).expanduser()


def _text(kind: str, name: str) -> bytes:
    file = _path(name)
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"`{kind}` {name}: {file} cannot be read ({error.strerror}); expected FILE.py:FUNCTION"
        ) from None


def _is_own(what: Any, module: ModuleType) -> bool:
    """Whether it is a function that the file defines."""
    return callable(what) and getattr(what, "__module__", None) == module.__name__
