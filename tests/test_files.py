"""Files: whole or not there, checksums that anybody can compute, and what is none named in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from sparselth import files
from sparselth.errors import SparselthError


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, happened = tmp_path / "f.json", list[Any]()
    fsync, move = os.fsync, os.replace

    def flush(handle: int) -> None:
        happened.append(os.fstat(handle).st_size)
        fsync(handle)

    def rename(a: Path, b: Path) -> None:
        happened.append((a.name, b.name))
        move(a, b)

    monkeypatch.setattr(files.os, "fsync", flush)
    monkeypatch.setattr(files.os, "replace", rename)
    files.write_atomically(file, b"first")
    assert happened == [5, (f"f.json.{os.getpid()}.tmp", "f.json")]
    assert file.read_bytes() == b"first"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_what_cannot_be_written_leaves_the_old_file_alone(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, lines = tmp_path / "f", tmp_path / "lines"
    files.write_atomically(file, b"first")
    files.append_lines(lines, [b"1", b"2"])

    def full(handle: int) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", full)
    kind = SparselthError if isinstance(error, OSError) else KeyboardInterrupt
    write = {
        file: lambda: files.write_atomically(file, b"2"),
        lines: lambda: files.append_lines(lines, [b"3"]),
    }
    for what, call in write.items():
        with pytest.raises(kind) as raised:
            call()
        if kind is SparselthError:
            assert str(raised.value) == (
                f"cannot write {what}: disk full; what is finished is kept, mend this and continue with "
                "`resume`, or choose another `out`"
            )
    assert file.read_bytes() == b"first"
    if kind is SparselthError:
        assert lines.read_bytes() == b"1\n2\n"
    assert sorted(tmp_path.iterdir()) == [file, lines]


def test_an_error_names_the_file_that_the_system_names(tmp_path: Path) -> None:
    with (
        pytest.raises(SparselthError, match=rf"^cannot write {tmp_path}/other: No such"),
        files.errors_named(tmp_path),
    ):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path / "other"))


def test_only_files_that_are_small_enough_are_read(tmp_path: Path) -> None:
    file = tmp_path / "f"
    with pytest.raises(OSError, match=f"No such file or directory: '{file}'") as missing:
        files.content(file, 9)
    assert missing.value.errno == errno.ENOENT
    file.write_bytes(b"12345")
    assert files.content(file, 5) == b"12345"
    os.truncate(file, 1235)
    with pytest.raises(OSError, match=f"larger than 1,234 bytes: '{file}'") as large:
        files.content(file, 1234)
    assert large.value.errno == errno.EFBIG
    os.mkfifo(tmp_path / "pipe")
    for what in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match=f"expected a file: '{what}'") as other:
            files.content(what, 10**9)
        assert other.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="expected a file"):
            files.file_sum(what)


def test_a_file_holds_a_text_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    assert files.holds(file, b"")
    assert not files.holds(file, b"x")
    file.write_bytes(b"text")
    assert files.holds(file, b"text")
    assert not files.holds(file, b"TEXT")
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    assert not files.holds(file, b"other")
    assert not files.holds(file, b"")


def test_json_is_at_most_16_mb_and_not_too_deep(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"[1]".ljust(1 << 24))
    assert files.read_json(file) == [1]
    with pytest.raises(OSError, match="larger than 16,777,215 bytes"):
        files.read_json(file, (1 << 24) - 1)
    with file.open("ab") as out:
        out.write(b" ")
    with pytest.raises(OSError, match="larger than 16,777,216 bytes"):
        files.read_json(file)
    file.write_bytes(b"[" * 10**5)
    with pytest.raises(ValueError, match="JSON that is nested too deep"):
        files.read_json(file)


def test_checksums_are_what_sha256sum_begins_with(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abcd")
    assert files.checksum(b"ab", b"cd") == files.file_sum(file) == sha(b"abcd")
    assert len(sha()) == 16
    data = {"a": 1, "b": [2.5]}
    whole = data | {"sha256": sha(json.dumps(data).encode())}
    assert files.sealed(data) == whole
    assert files.sealed(whole | {"sha256": "old"}) == whole
    assert files.plain(whole) == data
    assert files.unsealed(whole) == files.unsealed(data) == data
    for wrong in (whole | {"a": 2}, whole | {"sha256": "0" * 16}, data | {"sha256": None}):
        with pytest.raises(ValueError, match="its checksum is that of other content"):
            files.unsealed(wrong)


def test_lines_end_in_their_checksums(tmp_path: Path) -> None:
    file, data = tmp_path / "f.jsonl", {"a": 1, "b": "ä"}
    raw = b'{"a": 1, "b": "\\u00e4"}'
    assert files.line(data) == raw
    whole = raw[:-1] + b', "sha256": "' + sha(raw[:-1]).encode() + b'"}'
    assert files.sealed_line(data) == whole
    assert json.loads(whole) == data | {"sha256": sha(raw[:-1])}
    assert files.dump(data) == b'{\n  "a": 1,\n  "b": "\\u00e4"\n}\n'
    assert files.joined([b"a", b"b"]) == b"a\nb\n"

    files.append_lines(file, [])
    assert not file.exists()
    assert files.read_lines(file) == ([], [])
    other = whole.replace(b"1", b"2", 1)
    files.append_lines(file, [whole])
    files.append_lines(file, [raw, other, b"[]", b"\xff", b"[" * 10**5])
    found, wrong = files.read_lines(file)
    assert wrong == []
    assert [(one.number, one.raw, one.sealed, one.right) for one in found[:5]] == [
        (1, whole, True, True),
        (2, raw, False, True),
        (3, other, True, False),
        (4, b"[]", False, True),
        (5, b"\xff", False, True),
    ]
    assert [one.data for one in found] == [json.loads(whole), data, json.loads(other), {}, {}, {}]
    file.write_bytes(whole + b"\n" + raw)
    found, wrong = files.read_lines(file)
    assert ([one.raw for one in found], wrong) == ([whole], ["f.jsonl ends in half a line"])


def test_lines_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder, large = tmp_path / "d.jsonl", tmp_path / "l.jsonl"
    folder.mkdir()
    assert files.read_lines(folder) == ([], ["d.jsonl is no file"])
    large.touch()
    os.truncate(large, (1 << 32) + 1)  # a hole, which takes no room
    said = ["l.jsonl cannot be read (larger than 4,294,967,296 bytes)"]
    assert files.read_lines(large) == ([], said)


ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "a": np.array([[1], [2]], np.uint8),
    "scalar": np.array(7, np.int64),
}
HEADER = {"z": 1, "cell": "c", "shapes": {"b": (3, 2)}}


def of_arrays(header: dict[str, Any]) -> str:
    """The checksum of ARRAYS under a header, by hand."""
    parts = [json.dumps(header, sort_keys=True).encode()]
    for name, about in (("a", b"a |u1 (2, 1)"), ("b", b"b <f4 (3, 2)"), ("scalar", b"scalar <i8 ()")):
        parts += [about, ARRAYS[name].tobytes()]
    return sha(*parts)


def test_arrays_come_back_and_their_checksum_is_of_all_of_them(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    files.save_arrays(file, ARRAYS, HEADER)
    assert file.read_bytes() == files.array_bytes(ARRAYS, HEADER)
    plain = json.loads(json.dumps(HEADER))
    found, header = files.load_arrays(file)
    assert header == plain
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert files.load_header(file) == plain | {"sha256": of_arrays(plain)}
    for only, names in (("b", {"b"}), ("c", set())):
        found, header = files.load_arrays(file, only)
        assert (set(found), header) == (names, plain)


@pytest.mark.parametrize("name", ["a", "b", "header", "sum"])
def test_arrays_that_are_not_what_was_written_are_named(name: str, tmp_path: Path) -> None:
    file, plain = tmp_path / "f.safetensors", json.loads(json.dumps(HEADER))
    arrays = {key: np.ascontiguousarray(array) + (key == name) for key, array in ARRAYS.items()}
    head = plain | {"sha256": of_arrays(plain)} | {"z": 1 + (name == "header")}
    head |= {"sha256": "0" * 16} if name == "sum" else {}
    file.write_bytes(save(arrays, metadata={"sparselth": json.dumps(head)}))
    for only in (None, "b"):  # it is of all of them
        with pytest.raises(SparselthError) as raised:
            files.load_arrays(file, only)
        assert str(raised.value) == (
            f"{file}: cannot be read (its checksum is that of other content); "
            "continue the run with `resume`, which computes it again"
        )
    assert files.load_header(file) == head


def test_arrays_of_an_older_version_have_no_checksum(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    arrays = {key: np.ascontiguousarray(array) for key, array in ARRAYS.items()}
    file.write_bytes(save(arrays, metadata={"sparselth": '{"cell": "c"}'}))
    found, header = files.load_arrays(file)
    assert (set(found), header) == (set(arrays), {"cell": "c"})
    found, header = files.load_arrays(file, "b")
    assert (set(found), header) == ({"b"}, {"cell": "c"})


@pytest.mark.parametrize("text", [None, "", "[]", "{", "[" * 10**5])
def test_a_file_of_arrays_without_our_header_is_none(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    metadata = None if text is None else {"sparselth": text} if text else {"other": "{}"}
    file.write_bytes(save({"a": ARRAYS["a"]}, metadata=metadata))
    for read in (files.load_arrays, files.load_header):
        with pytest.raises(SparselthError, match=rf"^{file}: cannot be read \(.*") as raised:
            read(file)
        assert text != "[]" or "its header is no JSON object" in str(raised.value)


def test_files_of_arrays_are_as_large_as_their_reader_allows(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    files.save_arrays(file, ARRAYS, HEADER)
    size = file.stat().st_size
    assert files.load_arrays(file, most=size)[1]
    with pytest.raises(SparselthError, match=f"larger than {size - 1} bytes"):
        files.load_arrays(file, most=size - 1)
    os.truncate(file, (1 << 33) + 1)
    for read in (files.load_arrays, files.load_header):
        with pytest.raises(SparselthError, match="larger than 8,589,934,592 bytes"):
            read(file)
    with pytest.raises(SparselthError, match=f"{tmp_path}: cannot be read .*expected a file"):
        files.load_header(tmp_path)


def test_the_cache_lies_where_the_standard_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for chosen, folder in ((str(tmp_path / "x"), tmp_path / "x"), ("x", None), ("", None), (None, None)):
        if chosen is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", chosen)
        assert files.cache_folder() == (folder or tmp_path / ".cache") / "sparselth"


def test_a_cache_is_json_in_order_and_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    assert files.read_cache("times") == {}
    for data in ({"b": 1, "a": [2]}, {"a": 3}):
        files.write_cache("times", data)
        assert files.read_cache("times") == data
    file = tmp_path / "not" / "yet" / "sparselth" / "times.json"
    files.write_cache("times", {"b": 1, "a": 2})
    assert file.read_text() == '{\n "a": 2,\n "b": 1\n}\n'
    file.write_text("[]")
    assert files.read_cache("times") == {}


def test_a_cache_that_cannot_be_read_or_kept_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    def full(file: Path, content: bytes) -> None:
        raise SparselthError("disk full")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files.write_cache("times", {"a": 1})
    file = tmp_path / "sparselth" / "times.json"
    file.write_text("{")
    assert files.read_cache("times") == {}
    file.unlink()
    file.mkdir()
    assert files.read_cache("times") == {}
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        files.write_cache("other", {"a": 1})
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "sparselth" / "a file"))
        (tmp_path / "sparselth" / "a file").touch()
        files.write_cache("other", {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "expanduser", homeless)
        files.write_cache("other", {"a": 1})
        assert files.read_cache("other") == {}
    assert files.read_cache("other") == {}


def test_a_checksum_is_what_ends_a_line(tmp_path: Path) -> None:
    data = {"proof": {"a": 1, "sha256": "0"}, "b": 2}
    files.append_lines(tmp_path / "f", [files.sealed_line(data)])
    ((one,), wrong) = files.read_lines(tmp_path / "f")
    assert (one.sealed, one.right, wrong) == (True, True, [])
    assert files.plain(one.data) == data


def test_where_nothing_can_be_written_the_system_s_word_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(path: Path, mode: str) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", none)
    with pytest.raises(SparselthError, match=rf"^cannot write {tmp_path}/f: Read-only file system; what is"):
        files.write_atomically(tmp_path / "f", b"")
