"""One process of bench/gpu_check.py: run the cases of an op one by one and say of each how it went.

What it says are lines of JSON in a file, each flushed at once, so that what was measured survives whatever
comes after. A case that breaks the CUDA context ends the process; the next one starts behind it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gpu import device
from gpu.common import Case, Here
from oracle import (
    Skip,
    Wrong,
)


def work(
    op: str,
    wanted: list[tuple[str, str]],
    first: int,
    size: str,
    anchors: dict[str, Any],
    events: Path,
) -> None:
    """The `wanted` (kind, part)s of an op's cases, or "device"; from case number `first` on."""
    torch.manual_seed(0)
    if size == "tiny":
        torch.set_num_threads(1)
    here = Here("cpu" if size == "tiny" else "cuda", size, anchors)
    with events.open("a") as file:

        def say(**event: Any) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        if op == "device":
            why = device.missing(size == "tiny")
            if why is None:
                say(device=device.describe(here))
                say(anchors=device.anchors(here))
            say(missing=why)
            return
        module = importlib.import_module(f"gpu.{op}")
        cases = [case for kind, part in wanted for case in planned(module, kind, part, here)]
        say(plan=[[case.name, case.part] for case in cases])
        for i, case in enumerate(cases[first:], first):
            say(begin=i)
            say(end=i, **attempt(case, here.device))
            if here.device == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError:  # sticky: nothing works in this process any more
                    os._exit(70)


def planned(module: Any, kind: str, part: str, here: Here) -> Iterable[Case]:
    """The cases of one part, of ops that take a part and of those that yield all."""
    cases = getattr(module, kind, None)
    if cases is None:
        return []
    if "part" in inspect.signature(cases).parameters:
        return list(cases(part, here))
    return [case for case in cases(here) if case.part == part]


def attempt(case: Case, on: str) -> dict[str, Any]:
    """How a case went: ok and what it found, or why not."""
    began = time.perf_counter()
    result: dict[str, Any] = {"case": case.name, "part": case.part, "ok": False}
    try:
        result["found"] = case.run() or {}
        if on == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
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
