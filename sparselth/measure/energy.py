"""Joules of a call: from the driver of an NVIDIA GPU (NVML), or from the counters of an x86 package (RAPL).

Both count the whole chip, whoever uses it, so that a figure is only worth as much as the machine is quiet.
Nothing is guessed: without a counter there is no figure, and one line says why.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
SECONDS = 1.0  # the counters of GPUs move every 20 to 100 ms


@dataclass(frozen=True)
class Meter:
    """`joules` reads a counter that only rises; None where there is none, and `why` says which or why."""

    joules: Callable[[], float] | None
    why: str


def meter(device: str = "cpu") -> Meter:
    """The counter of a device, "cpu" or "cuda"."""
    return _nvml() if device == "cuda" else _rapl(POWERCAP)


def per_call(
    found: Meter, call: Callable[[], object], wait: Callable[[], None] = lambda: None
) -> float | None:
    """Joules of one call, over calls that take SECONDS in all; `wait` lets the device finish."""
    if found.joules is None:
        return None
    call()
    wait()
    began, before, calls = time.perf_counter(), found.joules(), 0
    while time.perf_counter() - began < SECONDS:
        call()
        calls += 1
        wait()
    return (found.joules() - before) / calls


def _nvml() -> Meter:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Meter(None, "energy: not measured, there is no NVML (libnvidia-ml.so.1)")
    if library.nvmlInit_v2():
        return Meter(None, "energy: not measured, NVML cannot talk to the driver")
    # by UUID, since CUDA_VISIBLE_DEVICES renumbers what torch sees and not what NVML sees
    handle, uuid = ctypes.c_void_p(), f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return Meter(None, f"energy: not measured, NVML does not know the device {uuid}")
    millijoules = ctypes.c_ulonglong()

    def read() -> int:
        return int(library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)))

    if read():
        return Meter(None, "energy: not measured, this GPU has no counter that NVML can read")

    def joules() -> float:
        read()
        return millijoules.value / 1e3

    return Meter(joules, "energy: of the whole GPU, by NVML")


def _rapl(folder: Path) -> Meter:
    """Packages are intel-rapl:N, on AMD too; their parts, intel-rapl:N:M, are within them."""
    packages = [p for p in sorted(folder.glob("intel-rapl:*")) if p.name.count(":") == 1]
    if not packages:
        return Meter(None, "energy: not measured, this machine has no counter (RAPL) that it shows")
    try:
        sizes = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        last = [int((package / "energy_uj").read_text()) for package in packages]
    except (OSError, ValueError):
        return Meter(None, f"energy: not measured, {packages[0]}/energy_uj can be read by root only")
    total = 0

    def joules() -> float:
        nonlocal total
        for i, package in enumerate(packages):
            now = int((package / "energy_uj").read_text())
            total += (now - last[i]) % (sizes[i] + 1)  # the counter starts again at its end
            last[i] = now
        return total / 1e6

    return Meter(joules, "energy: of the whole processor and all that runs on it, by RAPL")
