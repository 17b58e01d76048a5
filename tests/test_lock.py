"""One process at a time: the second is told who the first is, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import pytest

from sparselth import lock
from sparselth.errors import SparselthError
from sparselth.lock import ReadOnly, locked


def in_a_child(folder: Path) -> str:
    """What another process is told that wants the lock; "" where it has it."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        try:
            with locked(folder):
                pass
        except SparselthError as error:
            os.write(theirs, str(error).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as told:
        text = told.read()
    os.wait()
    return text


def test_the_second_is_told_pid_and_host_of_the_first(tmp_path: Path) -> None:
    who = f"process {os.getpid()} on {socket.gethostname()} is running this run"
    with locked(tmp_path):
        assert in_a_child(tmp_path) == f"{tmp_path}: {who}; wait for it or stop it"
        with pytest.raises(SparselthError, match=who), locked(tmp_path):
            pass
        assert who in in_a_child(tmp_path)  # what this process tried did not open its lock
    assert in_a_child(tmp_path) == ""
    assert (tmp_path / ".lock").read_bytes() == b""


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)


@pytest.mark.parametrize(
    ("holder", "refused"),
    [
        ("", ""),
        ("[]", ""),
        ("[" * 500, ""),
        ('{"pid": "1", "host": "HERE"}', ""),
        ('{"pid": 1e9, "host": "HERE"}', ""),
        ('{"pid": 2000000000000000000000, "host": "HERE"}', ""),
        ('{"pid": PID, "host": "HERE", "began": "BEGAN"}', "is running this run; wait for it or stop it"),
        ('{"pid": PID, "host": "HERE", "began": "1"}', ""),  # its number is another process's by now
        (
            '{"pid": PID, "host": "elsewhere"}',
            "on elsewhere is running this run; wait for it or stop it; if",
        ),
    ],
)
def test_without_locks_what_the_file_says_decides(
    holder: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    own = {"PID": os.getpid(), "HERE": socket.gethostname(), "BEGAN": lock._began(os.getpid())}
    for name, value in own.items():
        holder = holder.replace(name, str(value))
    (tmp_path / ".lock").write_text(holder)
    told = in_a_child(tmp_path)
    assert refused in told
    assert bool(refused) == bool(told)


def test_without_locks_a_dead_process_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.wait()
    (tmp_path / ".lock").write_text(json.dumps({"pid": dead, "host": socket.gethostname(), "began": None}))
    with locked(tmp_path):
        assert str(os.getpid()) in in_a_child(tmp_path)
    assert in_a_child(tmp_path) == ""


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_where_nothing_can_be_written_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.os, "open", none)
    with pytest.raises(ReadOnly, match=os.strerror(number)), locked(tmp_path):
        pass
