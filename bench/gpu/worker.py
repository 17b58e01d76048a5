"""One process of bench/gpu_check.py: run the cases of an op one by one and say of each how it went.

What it says are lines of JSON in a file, each flushed at once, so that what was measured survives whatever
comes after. It imports everything and says what it will do (`plan`), then waits for a line on stdin, the
anchors measured so far, before it touches the device. A case that breaks the CUDA context ends the process;
the next one starts behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu.common import Case, Here
from oracle import Skip, Wrong

BROKEN = 70  # exit code: the CUDA context is lost, nothing works in this process any more


def work(op: str, kind: str, some: tuple[int, int | None], size: str, first: int, events: str) -> None:
    """The cases of a kind of an op that the slice `some` holds, of these from number `first` on."""
    torch.manual_seed(0)
    if size == "tiny":
        torch.set_num_threads(1)
    here = Here("cpu" if size == "tiny" else "cuda", size)
    say, kernels = teller(Path(events)), count_kernels()
    module = importlib.import_module(f"gpu.{op}")
    cases = planned(module, kind, here)[slice(*some)]
    say(plan=[[case.name, case.part, case.seconds] for case in cases])
    anchors = sys.stdin.readline()
    if not anchors:
        return
    here.anchors.update(json.loads(anchors))
    for i, case in enumerate(cases[first:], first):
        say(begin=i)
        say(end=i, **attempt(case, here.device), kernels=taken(kernels))
        if here.device == "cuda":
            if broken():
                os._exit(BROKEN)
            torch.cuda.empty_cache()  # other processes need room too


def planned(module: Any, kind: str, here: Here) -> list[Case]:
    """The cases of a kind, of which an op may have none."""
    return list(getattr(module, kind)(here)) if hasattr(module, kind) else []


def attempt(case: Case, on: str) -> dict[str, Any]:
    """How a case went: ok and what it found, or why not."""
    began = time.perf_counter()
    result: dict[str, Any] = {"case": case.name, "part": case.part, "ok": False}
    try:
        result["found"] = case.run() or {}
        if on == "cuda":
            torch.cuda.synchronize()
        result["ok"] = True
    except Skip as why:
        result |= {"ok": True, "skipped": str(why)}
    except Wrong as wrong:
        result["message"] = str(wrong)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        result["message"] = f"{type(error).__name__}: {lines[0]}"
        result["trace"] = traceback.format_exc(limit=-6)
    return result | {"seconds": round(time.perf_counter() - began, 3)}


def teller(file: Path) -> Callable[..., None]:
    """`say(key=value, ...)`: one event, on the disk at once."""
    out = file.open("a")

    def say(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    return say


def broken() -> bool:
    """Whether the CUDA context is lost."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def count_kernels() -> dict[str, int]:
    """How many kernels Triton has found in its cache (`loaded`) and how many it has compiled, from now on."""
    counts = {"loaded": 0, "compiled": 0}
    try:
        from triton import knobs
    except ImportError:
        return counts

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts["loaded" if cache_hit else "compiled"] += 1

    knobs.compilation.listener = listener
    return counts


def taken(counts: dict[str, int]) -> dict[str, int]:
    """What has been counted, which then starts again at 0."""
    found = dict(counts)
    counts.update(dict.fromkeys(counts, 0))
    return found
