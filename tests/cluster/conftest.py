"""Shared by the tests of sweeps."""

from __future__ import annotations

import pytest
from inline import SETTINGS, Inline

from sparselth.cluster.grid import Grid


@pytest.fixture
def inline() -> Inline:
    return Inline()


@pytest.fixture
def rates() -> Grid:
    """imp at two rates, two seeds, one level: eight cells."""
    return Grid("imp", {"rate": [0.2, 0.5]}, SETTINGS)
