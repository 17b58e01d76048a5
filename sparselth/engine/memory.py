"""What training holds in memory, by kind, and how running out of it is known."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Held:
    """What an engine keeps between two steps, as objects whose tensors a measurement counts.

    Whatever else can be reached from an engine are its masks, indices and activations.
    """

    weights: object
    gradients: object
    moments: object
    layout: object  # where survivors lie
    images: object  # the data set, and the batch as it comes
    kept: object  # for the files of a run, not for a step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, a library under it, Triton or Python ran out of memory; they say it in many ways.

    Out of memory within the capture of a graph comes as an error of the capture, with its cause behind it.
    """
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed")
    chain, seen = [error], list[BaseException]()
    while chain:
        link = chain.pop()
        said = str(link).lower()
        if isinstance(link, torch.OutOfMemoryError | MemoryError) or any(word in said for word in words):
            return True
        seen.append(link)
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and e not in seen]
    return False


def free_memory() -> None:
    """Give back what nobody holds any longer, that of torch's allocator too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resident_bytes() -> int:
    """Memory of this process, its part of shared pages included (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
