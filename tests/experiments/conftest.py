"""Shared by the tests of experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sparselth.config import Recipe
from sparselth.experiments.imp import ImpConfig


@pytest.fixture
def config() -> Callable[..., ImpConfig]:
    """`config(levels=1)`: three levels of lenet-300-100, two seeds, three arms, but for what is changed."""

    def call(**changes: Any) -> ImpConfig:
        values: dict[str, Any] = {
            "model": "lenet-300-100",
            "dataset": "mnist5k",
            "seeds": (0, 1),
            "levels": 3,
            "device": "cpu",
            "recipe": Recipe(steps=1000, lr=1e-3),
        }
        return ImpConfig(**values | changes)

    return call
