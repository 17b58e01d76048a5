"""A short form of `make fuzz`: nothing that is read raises, crashes, hangs, fills memory or runs code."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_files_lose_nothing(kind: str, tmp_path: Path) -> None:
    tried = fuzz.campaign(kind, range(fuzz.FEW[kind]), seed=1, place=tmp_path)
    assert tried.lost == []
    assert tried.cases == fuzz.FEW[kind]
    assert kind in fuzz.NEVER or tried.refused > 0
    assert tried.refused < tried.cases


def test_what_would_be_lost_is_noticed(tmp_path: Path) -> None:
    """The guards: an exception, a crash, a hang, memory, code that runs, a path that leaves the folder."""
    for name in fuzz.PLANTED:
        tried = fuzz.campaign(name, range(1), seed=1, place=tmp_path / name, seconds=0.5)
        assert len(tried.lost) == 1, name
        assert fuzz.PLANTED[name] in tried.lost[0]
