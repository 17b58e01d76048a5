"""Races in Triton's interpreter: who reads and writes what, with the programs of a launch in a drawn order.

On a device programs run in any order and at once. So within a launch no address may be

    written by two programs, or twice by one
    read by a program and written by another; read by the program that wrote it before
    an atomic's, and read or written plainly

and what a load without `other` finds where its mask is off may be anything: here it is NaN, or a large
number. Grids are held to a device's limits. A finding is a Race, raised at the end of the launch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from triton.runtime import interpreter

GRID = (2**31 - 1, 65535, 65535)  # of a CUDA device
GARBAGE = 0x7F  # every byte of an integer that a mask holds back; floating-point numbers are NaN
Addresses = npt.NDArray[np.uint64]


class Race(AssertionError):
    """What could come out otherwise on a device."""


class _Log:
    """The accesses of one launch."""

    def __init__(self) -> None:
        self.programs: list[dict[str, list[tuple[Addresses, int, int]]]] = []
        self.accesses = 0

    def begin(self) -> None:
        self.programs.append({"read": [], "written": [], "atomic": []})

    def note(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)
        kept = np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        self.accesses += 1
        self.programs[-1][kind].append((addresses[kept].astype(np.uint64), size, self.accesses))

    def table(self, kind: str, grain: int) -> tuple[Addresses, Any, Any]:
        """Address of every `grain` bytes, program, and when."""
        rows = [
            (addresses, size, program, when)
            for program, kinds in enumerate(self.programs)
            for addresses, size, when in kinds[kind]
            if len(addresses)
        ]
        if not rows:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
        wide = [(a[:, None] + np.arange(0, size, grain, np.uint64)).ravel() for a, size, *_ in rows]
        lengths = [len(w) for w in wide]
        whose, when = (np.repeat([row[i] for row in rows], lengths) for i in (2, 3))
        return np.concatenate(wide), whose, when

    def findings(self) -> Iterator[tuple[str, int]]:
        """What is wrong, and an address of it."""
        sizes = [size for kinds in self.programs for rows in kinds.values() for _, size, _ in rows]
        if not sizes:
            return
        (read, reader, read_when), (written, writer, write_when), (atomic, _, _) = (
            self.table(kind, min(sizes)) for kind in ("read", "written", "atomic")
        )
        order = np.lexsort((write_when, writer, written))
        written, writer, write_when = written[order], writer[order], write_when[order]
        same = written[1:] == written[:-1]
        for wrong, words in (
            (same & (writer[1:] != writer[:-1]), "written by two programs"),
            (same & (writer[1:] == writer[:-1]), "written twice by one program"),
        ):
            if wrong.any():
                yield words, int(written[1:][wrong][0])
        if len(written):
            # of addresses with one writer: above, others are said
            place = np.searchsorted(written, read).clip(max=len(written) - 1)
            met = written[place] == read
            for wrong, words in (
                (met & (writer[place] != reader), "read by one program and written by another"),
                (
                    met & (writer[place] == reader) & (read_when > write_when[place]),
                    "read by the program that wrote it before",
                ),
            ):
                if wrong.any():
                    yield words, int(read[wrong][0])
        for plain, words in ((read, "read"), (written, "written")):
            both = np.intersect1d(atomic, plain)
            if len(both):
                yield f"an atomic's, and {words} plainly", int(both[0])


def _whose(address: int, arguments: dict[str, Any]) -> str:
    """The argument that an address lies in."""
    for name, t in arguments.items():
        if isinstance(t, torch.Tensor):
            begin = t.untyped_storage().data_ptr()
            if begin <= address < begin + t.untyped_storage().nbytes():
                return f"{name}, number {(address - t.data_ptr()) // t.itemsize} of {list(t.shape)}"
    return hex(address)


@contextmanager
def watched(seed: int = 0) -> Iterator[None]:
    """Raise a Race at the end of a launch that has one; `seed` is of the order of programs."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    draw = random.Random(seed)
    log: list[_Log] = []  # of the launch that runs
    order: list[tuple[int, int, int]] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        log[:] = [_Log()]
        plain["call"](self, *args, **kwargs)
        names = dict(zip(self.arg_names, args, strict=False)) | kwargs
        found = [f"{_whose(at, names)}: {words}" for words, at in log[0].findings()]
        if found:
            raise Race(f"{self.fn.__name__}: {'; '.join(found)}")

    def set_grid_dim(self: Any, x: int, y: int, z: int) -> None:
        for axis, size, most in zip("xyz", (x, y, z), GRID, strict=True):
            if not 1 <= size <= most:
                raise Race(f"grid {(x, y, z)}: {axis} is not from 1 to {most:,}")
        order[:] = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        draw.shuffle(order)
        plain["set_grid_dim"](self, x, y, z)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, down, across = self.grid_dim
        plain["set_grid_idx"](self, *order[(x * down + y) * across + z])
        log[0].begin()

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        log[0].note("read", pointers, mask)
        # not of one number alone: `other=0` of such a load comes here as None, by Triton's `other if other`
        if other is None and np.size(pointers.data) > 1 and not np.asarray(mask.data).all():
            dtype = pointers.get_element_ty()
            garbage = np.empty(np.shape(pointers.data), interpreter._get_np_dtype(dtype))
            garbage.view(np.uint8).fill(0xFF if dtype.is_floating() else GARBAGE)
            other = interpreter.TensorHandle(garbage, dtype)
        return plain["create_masked_load"](self, pointers, mask, other, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        log[0].note("written", pointers, mask)
        return plain["create_masked_store"](self, pointers, value, mask, *rest)

    def rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        log[0].note("atomic", pointers, mask)
        return plain["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def cas(self: Any, pointers: Any, *rest: Any) -> Any:
        everywhere = interpreter.TensorHandle(np.ones(np.shape(pointers.data), bool), None)
        log[0].note("atomic", pointers, everywhere)
        return plain["create_atomic_cas"](self, pointers, *rest)

    plain = {"call": executor.__call__}
    patches = {"set_grid_dim": set_grid_dim, "set_grid_idx": set_grid_idx, "create_masked_load": load}
    patches |= {"create_masked_store": store, "create_atomic_rmw": rmw, "create_atomic_cas": cas}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(executor, "__call__", call))
        for name, patch in patches.items():
            plain[name] = getattr(builder, name)
            stack.enter_context(mock.patch.object(builder, name, patch))
        yield
