"""One process at a time: the second is told who the first is, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
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
        except BaseException as error:
            os.write(theirs, (str(error) or repr(error)).encode())
        finally:
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


def open_files() -> list[str]:
    return os.listdir("/proc/self/fd")


def me() -> dict[str, object]:
    began = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": began}


def test_the_file_says_who_holds_the_lock_and_is_closed_again(tmp_path: Path) -> None:
    before, mask = open_files(), os.umask(0)
    try:
        for _ in range(2):
            with locked(tmp_path):
                assert json.loads((tmp_path / ".lock").read_text()) == me()
                assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o644
                (tmp_path / "link").symlink_to(tmp_path)
                with pytest.raises(SparselthError) as raised, locked(tmp_path / "link"):
                    pass
                (tmp_path / "link").unlink()
            who = f"process {os.getpid()} on {socket.gethostname()}"
            says = f"{tmp_path}/link: {who} is running this run; wait for it or stop it"
            assert str(raised.value) == says
            assert (tmp_path / ".lock").read_bytes() == b""
            assert len(open_files()) == len(before)
        (tmp_path / ".lock").write_text("x" * 5000)
        with suppress(KeyError), locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text()) == me()
            raise KeyError
        with locked(tmp_path):
            pass
    finally:
        os.umask(mask)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_is_held_is_refused_and_nothing_is_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def held(handle: int, how: int) -> None:
        asked.append(how)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", held)
    before = open_files()
    for text, who in (
        ("", "another process"),
        ("{", "another process"),
        ("[" * 1000, "another process"),
        ('{"pid": true, "host": "there"}', "another process"),
        ('{"pid": 7, "host": 8}', "another process"),
        ('{"pid": 7, "host": "there"}', "process 7 on there"),
        ('{"pid": 7, "host": "there"}'.ljust(1000), "process 7 on there"),
        ('{"pid": 7, "host": "there"}'.ljust(1000) + "x", "process 7 on there"),
        ('{"pid": 7, "host": "there"}'.ljust(999) + "x", "another process"),
    ):
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(SparselthError) as raised, locked(tmp_path):
            pass
        assert str(raised.value) == f"{tmp_path}: {who} is running this run; wait for it or stop it"
        assert (tmp_path / ".lock").read_text() == text
    assert set(asked) == {fcntl.LOCK_EX | fcntl.LOCK_NB}
    assert len(open_files()) == len(before)


def test_without_locks_another_host_s_process_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    file = tmp_path / ".lock"
    file.write_text('{"pid": 7, "host": "elsewhere"}')
    with pytest.raises(SparselthError) as raised, locked(tmp_path):
        pass
    hint = f"wait for it or stop it; if it is gone, delete {file}"
    assert str(raised.value) == f"{tmp_path}: process 7 on elsewhere is running this run; {hint}"
    for error, lives in ((ProcessLookupError(), False), (OverflowError(), False), (PermissionError(), True)):

        def kill(pid: int, signal: int, error: Exception = error) -> None:
            assert (pid, signal) == (7, 0)
            raise error

        monkeypatch.setattr(lock.os, "kill", kill)
        assert lock._may_live({"pid": 7, "host": "a", "began": None}, {"host": "a"}) is lives
    monkeypatch.setattr(lock.os, "kill", lambda pid, signal: None)
    for began, lives in (("5", True), ("6", False), (None, False)):
        monkeypatch.setattr(lock, "_began", lambda pid: "5" if pid == 7 else None)
        assert lock._may_live({"pid": 7, "host": "a", "began": began}, {"host": "a"}) is lives
    assert lock._may_live({"pid": 7, "host": "b"}, {"host": "a"})


def test_a_process_that_is_not_there_began_at_no_time() -> None:
    assert lock._began(os.getpid()) == me()["began"]
    assert lock._began(1 << 30) is None


def test_a_full_disk_has_room_for_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.os, "pwrite", full)
    with locked(tmp_path):
        assert "another process" in in_a_child(tmp_path)
    assert in_a_child(tmp_path) == ""
    monkeypatch.setattr(lock.os, "pread", full)
    with locked(tmp_path):
        pass
    monkeypatch.setattr(lock.os, "open", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_names_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(lock.os, "open", none)
    with pytest.raises(ReadOnly) as raised, locked(tmp_path):
        pass
    assert str(raised.value) == f"cannot write {tmp_path}/.lock: Read-only file system; choose another `out`"
