"""One process at a time in a folder: a lock that a killed process leaves open, and who holds it, in words.

The file `.lock` says who works in the folder: its process id, its host. Where the file system has no locks
(some network mounts), what the file says decides: a process of this host that is gone does not count, one of
another host does until the file is deleted. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparselth.errors import SparselthError

# by this process: locks of POSIX do not hold within one, and are dropped when it closes the file anywhere
_held: set[tuple[int, Path]] = set()


class ReadOnly(SparselthError):
    """Nothing can be written in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that exists; SparselthError with pid and host where another process has it,
    ReadOnly where it cannot be written.
    """
    file = folder.resolve() / ".lock"
    me = {"pid": os.getpid(), "host": socket.gethostname(), "began": _began(os.getpid())}
    if (os.getpid(), file) in _held:
        raise _busy(folder, me)
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ReadOnly(f"cannot write {file}: {error.strerror}; choose another `out`") from error
        raise
    try:
        holder = _read(handle)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _busy(folder, holder) from None
            if holder and _may_live(holder, me):  # no locks here
                hint = "" if holder["host"] == me["host"] else f"; if it is gone, delete {file}"
                raise _busy(folder, holder, hint) from None
        with suppress(OSError):  # a full disk has room for a lock
            _write(handle, json.dumps(me).encode())
        _held.add((os.getpid(), file))
        try:
            yield
        finally:
            _held.discard((os.getpid(), file))
            with suppress(OSError):
                _write(handle, b"")
    finally:
        os.close(handle)  # and so the lock is open


@contextmanager
def awaited(folder: Path) -> Iterator[None]:
    """Hold a folder once nobody else does, without leaving anything in it; at once where it has no locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _busy(folder: Path, holder: dict[str, Any], hint: str = "") -> SparselthError:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return SparselthError(f"{folder}: {who} is running this run; wait for it or stop it{hint}")


def _read(handle: int) -> dict[str, Any]:
    """Who the file says holds the lock; {} where it says nothing."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(os.pread(handle, 1000, 0))
        if isinstance(found, dict) and type(found.get("pid")) is int and type(found.get("host")) is str:
            return found
    return {}


def _write(handle: int, content: bytes) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, content, 0)


def _may_live(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether a holder still runs, as far as can be told: on another host it cannot."""
    if holder["host"] != me["host"]:
        return True
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return _began(holder["pid"]) == holder.get("began")


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the machine did: another process of that number began later."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None
