"""The compile gate: every kernel that ships, without a GPU.

The device's Triton compiles every configuration for sm_90; the pinned one, for sm_80 and sm_90, those in
which every parameter of a kernel is met (in `make gpu-dry` every one). Another one's allocation of registers
is its own affair: what a compiler of another month does differently is a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triton_of_the_device import DEVICE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = sorted(
    file.stem for file in (ROOT / "kernels").glob("[!_]*.py") if "@triton.jit" in file.read_text()
)
GATED = {DEVICE} | {
    version
    for file in (ROOT / "constraints").glob("*.txt")
    for version in re.findall(r"^triton==(.*)$", file.read_text(), re.MULTILINE)
}

pytestmark = pytest.mark.host


def complaints(facts: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel's machine code."""
    found = []
    if facts["spilled_bytes"]:
        found.append(f"{facts['spilled_bytes']} bytes of spills")
    for what in ("registers", "narrow", "waiting"):
        most = facts["max_registers" if what == "registers" else f"allowed_{what}"]
        have = len(facts[what]) if what == "waiting" else facts[what]
        if have > most:
            found.append(f"{have} {what}, at most {most} are meant")
    found += [f"ptxas warns: {number}" for number in facts["warnings"]]
    return found


@pytest.mark.parametrize("compiler", ["installed", "device"])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, compiler: str, request: pytest.FixtureRequest) -> None:
    """No spills, wide accesses, few registers; no wgmma that waits at each product, no load for a load."""
    machine_code: Callable[[str], list[dict[str, Any]]] = request.getfixturevalue(
        "machine_code" if compiler == "installed" else "machine_code_of_the_device"
    )
    found = machine_code(name)
    assert found
    wrong = []
    for facts in found:
        constants = " ".join(f"{key}={value}" for key, value in facts["constants"].items())
        which = f"{facts['kernel']} sm_{facts['capability']} {facts['signature']} {constants}"
        wrong += [f"{which}: {complaint}" for complaint in complaints(facts)]
    version = found[0]["triton"]
    if version in GATED:
        assert not wrong, f"triton {version}:\n" + "\n".join(wrong)
    elif wrong:
        warnings.warn(f"triton {version}, which is not pinned:\n" + "\n".join(wrong), stacklevel=1)
