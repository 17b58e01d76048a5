"""The short form of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated import Simulated
from soak import soak

from sparselth.config import EXPERIMENTS


@pytest.mark.host
def test_a_long_run_loses_nothing_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"simulated": Simulated})
    assert not soak(tmp_path, 1_000)
