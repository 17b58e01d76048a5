"""Mutations that know what they mutate: JSON, lines of it, safetensors, bytes, and entries of folders."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

ELSEWHERE = "elsewhere"  # the folder beside that of a case, which nothing may touch
NAMES = (
    f"../{ELSEWHERE}/x", f"../../{ELSEWHERE}/seed0", f"../{ELSEWHERE}/seed0-ticket-00.safetensors", "",
    ".", "..", "/", "/etc/passwd", "a" * 100_000, "\x1b[2J\nsparselth: all is well", "x\x00y", "\ud800",
    "ünïcödé", "__class__", "{0.__class__}", "%s%n", "seed0-ticket-00", "null", "-1", "--help", "nan",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 7, 255, 2**31, -(2**31), 2**53, 2**63, -(2**63), 2**64, 10**18, 10**400, 0.5, -0.0,
    1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch ../{ELSEWHERE}/bomb",)


BOMB = pickle.dumps(Bomb())


def content(draw: Random) -> bytes:
    """Something else altogether."""
    return draw.choice(
        (
            b"", b"null", b"[]", b"{}", b"0", b'"x"', b"NaN", b"\n\n\n", b"\xff\xfe\x00", b"{",
            b"[" * 100_000, b'{"a":' * 50_000, b"9" * 6000, b"PK\x03\x04", BOMB,
            b"\x1f\x8b\x08\x00" + bytes(20),
            struct.pack("<Q", 2**63 - 1) + b"{}", struct.pack("<Q", 2**40), struct.pack("<Q", 2) + b"{}",
            bytes(draw.randrange(256) for _ in range(draw.randrange(1, 200))),
        )
    )  # fmt: skip


def flipped(draw: Random, data: bytes) -> bytes:
    """Bits flipped, a piece cut off, cut out, doubled, zeroed or made random."""
    if not data:
        return content(draw)
    a, b = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
    b = min(b, a + draw.choice((1, 8, 64, len(data))))
    match draw.randrange(7):
        case 0 | 1:
            changed = bytearray(data)
            for _ in range(draw.choice((1, 1, 2, 8))):
                changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case 2:
            return data[:a]
        case 3:
            return data[:a] + data[b:]
        case 4:
            return data[:b] + data[a:]
        case 5:
            return data[:a] + bytes(b - a) + data[b:]
    return data[:a] + bytes(draw.randrange(256) for _ in range(min(b - a, 500))) + data[b:]


def value(draw: Random, old: Any = None) -> Any:
    """Another value, often of another type."""
    match draw.randrange(8):
        case 0 | 1:
            return draw.choice(NUMBERS)
        case 2 | 3:
            return draw.choice(NAMES)
        case 4:
            return draw.choice((None, True, False, [], {}, [[]], [None], {"": None}))
        case 5:
            return [old] * draw.choice((1, 2, 1000))
        case 6:
            return str(old)[:100] if isinstance(old, (int, float)) else {"old": old}
    if isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 1e300:
        return draw.choice((old + 1, -old, old * 1000, float(old), old / 2))
    return old


def mutated(draw: Random, data: Any, times: int = 0) -> Any:
    """JSON data with nodes of it gone, renamed, doubled or replaced."""
    data = copy.deepcopy(data)
    for _ in range(times or draw.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        _places(data, places)
        if not places:
            return value(draw, data)
        parent, key = draw.choice(places)
        match draw.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw.choice(NAMES)] = parent.pop(key)
            case 1:
                parent.insert(draw.randrange(len(parent) + 1), parent[key])
            case 2:
                other, at = draw.choice(places)
                if at in other if isinstance(other, dict) else at < len(other):
                    parent[key] = copy.deepcopy(other[at])
            case _:
                parent[key] = value(draw, parent[key])
    return data


def _places(data: Any, found: list[tuple[Any, Any]]) -> None:
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in list(keys)[:200]:
        found.append((data, key))
        _places(data[key], found)


def text(draw: Random, data: Any) -> bytes:
    """The same as the bytes of a file."""
    if draw.random() < 0.2:
        return flipped(draw, json.dumps(data).encode())
    if draw.random() < 0.1:
        return content(draw)
    return json.dumps(mutated(draw, data)).encode()


def entry(draw: Random, file: Path, others: list[Path]) -> None:
    """Something else where a file was: nothing, a folder, a link, a pipe, a device, another file."""
    file.unlink()
    match draw.randrange(9):
        case 0:
            pass
        case 1:
            file.mkdir()
        case 2:
            file.mkdir()
            (file / "x").write_bytes(b"x")
        case 3:
            file.symlink_to(file.name)
        case 4:
            file.symlink_to("/dev/zero")
        case 5:
            os.mkfifo(file)
        case 6:
            with file.open("wb") as out:
                out.truncate(2**40)  # takes no room
        case 7:
            file.symlink_to("nowhere")
        case _:
            file.write_bytes(draw.choice(others).read_bytes() if others else content(draw))


def arrays(draw: Random, found: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a file of safetensors with other names, types, shapes or values."""
    found = dict(found)
    for _ in range(draw.choice((1, 1, 2))):
        if not found:
            return {"x": np.zeros(3)}
        name = draw.choice(sorted(found))
        array = found[name]
        match draw.randrange(8):
            case 0:
                del found[name]
            case 1:
                found[draw.choice(NAMES[:8]) + draw.choice(("", "x"))] = found.pop(name)
            case 2:
                found[name] = array.astype(draw.choice(("f2", "f8", "i1", "i8", "u1", "u4", "bool")))
            case 3:
                found[name] = array.reshape(-1)[: draw.randrange(array.size + 1)].copy()
            case 4:
                found[name] = np.zeros(
                    draw.choice(((), (0,), (0, 2**40), (1, 1, 1, 1), (3,), (2, 0))), array.dtype
                )
            case 5:
                flat = array.reshape(-1).copy()
                if flat.size:
                    numbers = (
                        (float("nan"), float("inf"), 1e30, -1.0) if flat.dtype.kind == "f" else (0, 1, 127)
                    )
                    flat[draw.randrange(flat.size)] = draw.choice(numbers)
                found[name] = flat.reshape(array.shape)
            case 6:
                found[name] = found[draw.choice(sorted(found))]
            case _:
                found[name] = array[None] if array.ndim < 4 else array
    return found


def safetensors(draw: Random, data: bytes) -> bytes:
    """A file whose own header lies: names, dtypes, shapes, offsets, lengths."""
    (size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + size])
    lies = json.dumps(mutated(draw, head)).encode()
    length = draw.choice((len(lies), len(lies), len(lies), 0, 2**62, len(lies) - 1, len(data)))
    return struct.pack("<Q", max(0, length)) + lies + data[8 + size :]
