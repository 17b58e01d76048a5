"""Memory that a network takes, measured: what is held, what a call adds at its peak, what a file takes.

Held bytes are those of the storages that objects keep alive, each counted once: weights, biases, the
indices of sparse formats, and the buffers that our kernels work on, since those are tensors too.

The peak is that of torch's allocator: on CUDA its own statistics, on a CPU every block it gave and took
back, as torch's profiler reports them, scratch of torch's operators included. Not counted: what MKL and
oneDNN allocate past torch (packed copies, scratchpads), the stack our kernels put their small tiles on,
code, and the images that a call is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import FunctionType, ModuleType

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from sparselth.files import Arrays, array_bytes

SPAN = "sparselth peak"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Memory:
    """Bytes of one network at work; None where there is no such thing."""

    weights: int  # and biases
    indices: int  # and masks
    activations: int  # buffers that are kept, and what a call adds at its peak
    gradients: int | None = None
    optimizer: int | None = None
    file: int | None = None

    @property
    def peak(self) -> int:
        """All of it but the file."""
        return self.weights + self.indices + self.activations + (self.gradients or 0) + (self.optimizer or 0)


def running(
    network: object, call: Callable[[], object], device: str = "cpu", file: int | None = None
) -> Memory:
    """Memory of a network at inference; `call` runs it, and is the first call of buffers that are kept."""
    weights, indices = held(network)
    return Memory(weights, indices, scratch(network) + peak(call, device), file=file)


def scratch(*objects: object) -> int:
    """Bytes that kernels keep to work on."""
    return sum(t.untyped_storage().nbytes() for t in tensors(*objects) if _is_scratch(t))


def held(*objects: object, but: tuple[object, ...] = ()) -> tuple[int, int]:
    """Bytes of the storages that `objects` keep alive and `but` does not: of numbers, and of indices.

    What kernels keep to work on is neither.
    """
    known = {_place(t) for t in tensors(*but)}
    numbers = indices = 0
    for t in tensors(*objects):
        if _place(t) not in known and not _is_scratch(t):
            known.add(_place(t))
            size = t.untyped_storage().nbytes()
            if t.dtype.is_floating_point:
                numbers += size
            else:
                indices += size
    return numbers, indices


def tensors(*objects: object) -> Iterator[Tensor]:
    """All dense tensors that can be reached from objects, through closures and arguments of foreign calls."""
    seen: dict[int, object] = {}  # holds them, so that no number is given twice
    stack = [*objects]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | str | bytes | int | float):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            if hasattr(thing, "__tensor_flatten__"):  # holds others, as torch's semi-structured ones
                stack += [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
            elif thing.layout == torch.sparse_csr:
                stack += [thing.crow_indices(), thing.col_indices(), thing.values()]
            else:
                yield thing
        elif isinstance(thing, FunctionType):  # not its globals
            stack += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        elif type(thing) is type(_REFERENCE):
            stack.append(thing._obj)  # type: ignore[attr-defined]
        else:
            stack += gc.get_referents(thing)


def peak(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes of torch's allocator that `call` adds at its highest, and may keep."""
    return peaks({"": call}, device)[""]


def peaks(calls: Mapping[str, Callable[[], object]], device: str = "cpu") -> dict[str, int]:
    """`peak` of several calls; on a CPU the profiler starts once for all of them."""
    if device == "cuda":
        return {name: _cuda_peak(call) for name, call in calls.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for i, call in enumerate(calls.values()):
                with record_function(f"{SPAN} {i}"):
                    call()
        with _silent():
            profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if "dur" in e}
    found = {}
    for i, name in enumerate(calls):
        began, ended = spans[f"{SPAN} {i}"]
        own = (change for at, change in sorted(changes, key=_at) if began <= at <= ended)
        found[name] = max(accumulate(own, initial=0))
    return found


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _at(change: tuple[float, int]) -> float:
    return change[0]


def keep_freed() -> bool:
    """Let this process keep what it frees, as one that serves for long does; False: without glibc.

    glibc gives large blocks back to the system now and then, and then a call pays for thousands of page
    faults that the next one does not have. Blocks above 32 MB are always given back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, 32 << 20))


def file_bytes(arrays: Arrays, header: Mapping[str, object]) -> int:
    """What arrays take in a file of the run's format."""
    return len(array_bytes(arrays, header))


_REFERENCE = ctypes.byref(ctypes.c_int())


def _is_scratch(t: Tensor) -> bool:
    return getattr(t, "is_scratch", False)


def _place(t: Tensor) -> tuple[torch.device, int]:
    return t.device, t.untyped_storage().data_ptr()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No messages of the profiler's library on stderr; they are for its own developers."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
