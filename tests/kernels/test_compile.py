"""The compile gate: every kernel, in every configuration it ships with, for sm_80 and sm_90; no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = sorted(
    file.stem for file in (HERE.parents[1] / "kernels").glob("*.py") if "\nAOT = " in file.read_text()
)


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_wide_accesses_few_registers(name: str, environment: dict[str, str]) -> None:
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "aot.py"), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found
    for facts in found:
        which = f"{facts['kernel']} {facts['constants']} sm_{facts['capability']}: {facts}"
        assert facts["spilled_bytes"] == 0, which
        assert facts["registers"] <= facts["max_registers"], which
        assert facts["narrow"] <= facts["allowed_narrow"], which
