"""The compile gate: every kernel, in every configuration it ships with, for sm_80 and sm_90; no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = sorted(
    file.stem for file in (HERE.parents[1] / "kernels").glob("*.py") if "\nAOT = " in file.read_text()
)


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_wide_accesses_few_registers(
    name: str, machine_code: Callable[[str], list[dict[str, Any]]]
) -> None:
    found = machine_code(name)
    assert found
    for facts in found:
        which = f"{facts['kernel']} {facts['constants']} sm_{facts['capability']}: {facts}"
        assert facts["spilled_bytes"] == 0, which
        assert facts["registers"] <= facts["max_registers"], which
        assert facts["narrow"] <= facts["allowed_narrow"], which
