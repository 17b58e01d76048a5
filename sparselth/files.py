"""Files that a kill cannot spoil: whole ones are written beside and renamed, lines are appended and flushed.

Also arrays with a JSON header as safetensors, and the user's cache folder, which may be missing, read-only or
full of something else: then it is as if it were not there. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

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


def content(file: Path, most: int) -> bytes:
    """The bytes of a regular file; OSError where it is none, as pipes and devices, or larger."""
    if not file.is_file():
        kind = errno.EINVAL if file.exists() else errno.ENOENT
        raise OSError(kind, "expected a file" if kind == errno.EINVAL else os.strerror(kind), str(file))
    if file.stat().st_size > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(file))
    return file.read_bytes()


def read_json(file: Path, most: int = 1 << 24) -> Any:
    """What a file of JSON says; OSError as of `content`, ValueError where it is no JSON."""
    try:
        return json.loads(content(file, most))
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


# ---- lines of JSON


def append_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    """All of the lines, or none of them."""
    with errors_named(file), file.open("ab") as out:
        end = out.tell()
        try:
            out.write(dump_lines(lines))
            out.flush()
            os.fsync(out.fileno())
        except OSError:
            _cut(out, end)
            raise


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be missing or end in a torn line."""
    try:
        content = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise SparselthError(f"cannot read {file}: {error.strerror}") from error
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise SparselthError(f"{file}: line {number} is not JSON ({error})") from error
    return found


def dump(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def dump_lines(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _cut(out: IO[bytes], end: int) -> None:
    os.ftruncate(out.fileno(), end)


# ---- arrays


def save_arrays(file: Path, arrays: Arrays, header: Mapping[str, Any]) -> None:
    """Write arrays and a JSON header as safetensors, atomically; equal content gives equal bytes."""
    write_atomically(file, array_bytes(arrays, header))


def array_bytes(arrays: Arrays, header: Mapping[str, Any]) -> bytes:
    """The content of such a file."""
    return save(arrays, metadata={"sparselth": json.dumps(header)})


def load_arrays(file: Path, only: str | None = None) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and header of a file that `save_arrays` wrote; `only`: that array, if the file has it."""
    try:
        with safe_open(file, framework="numpy") as opened:
            header = json.loads((opened.metadata() or {})["sparselth"])
            names = [name for name in opened.keys() if only in (None, name)]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}, header
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SparselthError(
            f"{file}: cannot be read ({error}); delete it and continue the run with `resume`"
        ) from error


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
