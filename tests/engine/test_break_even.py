"""Break-even densities are measured once for a machine, and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparselth.engine import break_even
from sparselth.kernels import _native
from sparselth.models import get_model

LENET = get_model("lenet-300-100")


@pytest.mark.skipif(not _native.LIB, reason=_native.WHY)
def test_break_even_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(break_even, "SPREAD", float("inf"))  # whatever else the machine does
    found = break_even.break_even(LENET, 60, "native")
    assert set(found) == {spec.name for spec in LENET.weights}
    assert all(0 <= share <= 1 or share == break_even.ALWAYS for share in found.values())
    monkeypatch.setattr(break_even, "_measure", lambda *_: pytest.fail("measured again"))
    assert break_even.break_even(LENET, 60, "native") == found
    file = tmp_path / "sparselth" / "break_even.json"
    assert len(json.loads(file.read_text())) == 3
    monkeypatch.setattr(break_even, "_measure", lambda *_: break_even.Measured(0.25, 1.0))
    file.write_text("{ torn")
    assert set(break_even.break_even(LENET, 60, "native").values()) == {0.25}
