"""Files that a kill cannot spoil: whole ones are written beside and renamed, lines are appended and flushed.

Also arrays with a JSON header as safetensors, and the user's cache folder, which may be missing, read-only or
full of something else: then it is as if it were not there. Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sparselth.errors import SparselthError

Arrays = dict[str, NDArray[Any]]


def write_atomically(file: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: the file is either the old one or the new one."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with errors_named(file):
        try:
            with beside.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(beside, file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def errors_named(file: Path) -> Iterator[None]:
    """What the system says about writing, as a SparselthError that names the file."""
    try:
        yield
    except OSError as error:
        raise SparselthError(
            f"cannot write {error.filename or file}: {error.strerror}; "
            "what is finished is kept, mend this and continue with `resume`, or choose another `out`"
        ) from error


LINES_BYTES, ARRAYS_BYTES = 1 << 32, 1 << 33  # that files of lines and of arrays have at most


def check_file(file: Path, most: int) -> None:
    """Raise OSError where it is no regular file, as a pipe that would wait or a device, or larger."""
    if not file.is_file():
        kind = errno.EINVAL if file.exists() else errno.ENOENT
        raise OSError(kind, "expected a file" if kind == errno.EINVAL else os.strerror(kind), str(file))
    if file.stat().st_size > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(file))


def content(file: Path, most: int) -> bytes:
    """The bytes of a file; OSError as of `check_file`."""
    check_file(file, most)
    return file.read_bytes()


def holds(file: Path, text: bytes) -> bool:
    """Whether a file has this content, or is none where that is empty; one of another size is not read."""
    if not file.is_file():
        return not text
    return file.stat().st_size == len(text) and file.read_bytes() == text


def read_json(file: Path, most: int = 1 << 24) -> Any:
    """What a file of JSON says; OSError as of `content`, ValueError where it is no JSON."""
    try:
        return json.loads(content(file, most))
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


# ---- checksums


def checksum(*parts: bytes | memoryview) -> str:
    """The first 16 hex digits of SHA-256, as `sha256sum` begins."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data without its checksum."""
    return {name: value for name, value in data.items() if name != "sha256"}


def file_sum(file: Path) -> str:
    """The checksum of a file, which is not read into memory; OSError as of `check_file`."""
    check_file(file, ARRAYS_BYTES)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with the checksum of its own content as `sha256`."""
    return plain(data) | {"sha256": checksum(json.dumps(plain(data)).encode())}


def unsealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data without its `sha256`; ValueError where that is another content's. Older data has none."""
    if "sha256" in data and data != sealed(data):
        raise ValueError("its checksum is that of other content")
    return plain(data)


# ---- lines of JSON

SUM = b', "sha256": '  # before the checksum that ends a line


@dataclass(frozen=True)
class Line:
    """A line of a file: its bytes without the newline, whether a checksum ends it, whether that is right."""

    number: int
    raw: bytes
    sealed: bool
    right: bool

    @cached_property
    def data(self) -> dict[str, Any]:
        """The JSON object it is; {} where it is none."""
        try:
            found = json.loads(self.raw.decode())
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def append_lines(file: Path, lines: Sequence[bytes]) -> None:
    """All of the lines, or none of them."""
    if not lines:
        return
    with errors_named(file), file.open("ab") as out:
        end = out.tell()
        try:
            out.write(joined(lines))
            out.flush()
            os.fsync(out.fileno())
        except OSError:
            _cut(out, end)
            raise


def read_lines(file: Path) -> tuple[list[Line], list[str]]:
    """The whole lines of a file that may be missing or end in a torn line, and in words what is wrong."""
    try:
        text = content(file, LINES_BYTES) if file.is_file() else b""
    except OSError as error:
        return [], [f"{file.name} cannot be read ({error.strerror})"]
    wrong = [] if file.is_file() or not file.exists() else [f"{file.name} is no file"]
    *whole, torn = text.split(b"\n")
    found = []
    for number, raw in enumerate(whole, 1):
        body, comma, end = raw.rpartition(SUM)
        right = not comma or end == b'"%b"}' % checksum(body).encode()
        found.append(Line(number, raw, bool(comma), right))
    return found, wrong + [f"{file.name} ends in half a line"] * bool(torn)


def line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode()


def sealed_line(data: Mapping[str, Any]) -> bytes:
    """A line that ends with the checksum of what is before it."""
    body = line(data)[:-1]
    return body + SUM + b'"%b"}' % checksum(body).encode()


def joined(lines: Iterable[bytes]) -> bytes:
    """The content of a file of lines."""
    return b"".join(text + b"\n" for text in lines)


def dump(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _cut(out: IO[bytes], end: int) -> None:
    os.ftruncate(out.fileno(), end)


# ---- arrays


def save_arrays(file: Path, arrays: Arrays, header: Mapping[str, Any]) -> None:
    """Write arrays and a JSON header as safetensors, atomically; equal content gives equal bytes."""
    write_atomically(file, array_bytes(arrays, header))


def array_bytes(arrays: Arrays, header: Mapping[str, Any]) -> bytes:
    """The content of such a file; its header bears a checksum of arrays and header."""
    head = json.loads(json.dumps(header))
    arrays = {
        name: np.asarray(array, order="C") for name, array in arrays.items()
    }  # safetensors wants them so
    return save(arrays, metadata={"sparselth": json.dumps(head | {"sha256": _arrays_sum(arrays, head)})})


def load_arrays(
    file: Path, only: str | None = None, most: int = ARRAYS_BYTES
) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and header of a file that `save_arrays` wrote; `only`: that array, if the file has it.

    SparselthError where it cannot be read, is larger than `most` bytes or not what was written; older files
    have no checksum.
    """
    try:
        check_file(file, most)
        with safe_open(file, framework="numpy") as opened:
            header = _header(opened)
            whole = "sha256" in header
            names = [name for name in opened.keys() if whole or only in (None, name)]  # noqa: SIM118
            arrays = {name: opened.get_tensor(name) for name in names}
        if whole and header.pop("sha256") != _arrays_sum(arrays, header):
            raise ValueError("its checksum is that of other content")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(file, error) from error
    return {name: array for name, array in arrays.items() if only in (None, name)}, header


def load_header(file: Path) -> dict[str, Any]:
    """The header of such a file alone, held against nothing."""
    try:
        check_file(file, ARRAYS_BYTES)
        with safe_open(file, framework="numpy") as opened:
            return _header(opened)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(file, error) from error


def _header(opened: Any) -> dict[str, Any]:
    header = json.loads((opened.metadata() or {})["sparselth"])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def _unreadable(file: Path, error: Exception) -> SparselthError:
    return SparselthError(
        f"{file}: cannot be read ({error}); continue the run with `resume`, which computes it again"
    )


def _arrays_sum(arrays: Arrays, header: Mapping[str, Any]) -> str:
    parts: list[bytes | memoryview] = [json.dumps(header, sort_keys=True).encode()]
    for name, array in sorted(arrays.items()):
        parts.append(f"{name} {array.dtype.str} {array.shape}".encode())
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return checksum(*parts)


# ---- the user's cache


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/sparselth or ~/.cache/sparselth; RuntimeError where there is no home."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen if os.path.isabs(chosen) else "~/.cache").expanduser() / "sparselth"


def read_cache(name: str) -> dict[str, Any]:
    """What `write_cache` kept under this name; {} where nothing can be read."""
    with suppress(OSError, ValueError, RuntimeError):  # the last without a home
        found = read_json(cache_folder() / f"{name}.json")
        if isinstance(found, dict):
            return found
    return {}


def write_cache(name: str, data: Mapping[str, Any]) -> None:
    """Keep JSON for later, where that can be; without a cache it is measured again."""
    with suppress(OSError, RuntimeError, SparselthError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, indent=1, sort_keys=True) + "\n"
        write_atomically(cache_folder() / f"{name}.json", text.encode())
