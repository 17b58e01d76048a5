"""Shared by the tests of sweeps, and of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
from inline import SETTINGS, Inline
from ranks import Rank

from forks import small
from sparselth.cluster.grid import Grid
from sparselth.cluster.torchrun import Listener


@pytest.fixture
def inline() -> Inline:
    return Inline()


@pytest.fixture
def rates() -> Grid:
    """imp at two rates, two seeds, one level: eight cells."""
    return Grid("imp", {"rate": [0.2, 0.5]}, SETTINGS)


@pytest.fixture
def port() -> int:
    listener = Listener("127.0.0.1", 1)
    with listener.socket:
        return listener.port


@pytest.fixture
def start(port: int) -> Callable[..., list[Rank]]:
    """`start(words, {1: prepare})`: ranks 0 and 1."""

    def call(
        words: list[str], prepare: Mapping[int, Callable[[], object]] | None = None, every: int = 10
    ) -> list[Rank]:
        def both(number: int) -> None:
            small(every)
            (prepare or {}).get(number, lambda: None)()

        return [Rank(number, port, words, partial(both, number)) for number in (1, 0)][::-1]

    return call
