"""The lines of bench/bars.py: what is wrong meets no bar, and what is of another commit says so."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from sparselth import machine

FILE = Path(__file__).resolve().parents[2] / "bench" / "bars.py"


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it adds to
    spec = importlib.util.spec_from_file_location("bars", FILE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bars", found)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("gain", "wrong", "says"),
    [
        (3.5, (), "  met"),
        (3.0, (), "  met"),
        (2.9, (), "  MISSED"),
        (3.5, ("sparselth",), "  MISSED, CHECK FAILED: sparselth"),
        (3.5, ("dense compiled",), "  met, CHECK FAILED: dense compiled"),
    ],
)
def test_a_line_says_whether_the_bar_is_met(
    bars: Any, gain: float, wrong: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "commit", lambda: "0123456789")
    times = {"dense": 3e-3, "dense compiled": 5e-3, "sparselth": 3e-3 / gain}
    rows: list[dict[str, Any]] = [
        {"implementation": name, "median_s": s, "check": "failed" if name in wrong else "passed"}
        for name, s in times.items()
    ]
    found = {
        "rows": rows, "gain": gain, "best": "dense", "kind": "inference", "others": 0.1,
        "machine": {"cores": 2, "commit": "0123456789"},
    }  # fmt: skip
    bar = bars.Bar("a network", 3.0, 1)
    assert bars.line(bar, 2, found).endswith(says)
    found["machine"]["commit"] = "abcdef0123"  # type: ignore[index]
    assert bars.line(bar, 2, found).endswith(f"{says}, of abcdef0")
    found["others"] = 0.3
    assert bars.line(bar, 2, found).endswith(f"{says}, of abcdef0, busy machine")
    found["load"] = found.pop("others")  # as rows had it that were kept earlier
    assert bars.line(bar, 2, found).endswith(f"{says}, of abcdef0, busy machine")


def test_a_line_beside_our_engine_says_what_the_loop_takes_alone(bars: Any) -> None:
    times = {"engine": 1e-3, "sparselth": 1.2e-3, "dense": 5e-3, "floor": 0.4e-3}
    rows = [{"implementation": n, "median_s": s, "check": "passed"} for n, s in times.items()]
    found = {
        "rows": rows, "gain": 1.2, "best": "engine", "kind": "engine", "others": 0.1, "machine": {"cores": 2},
    }  # fmt: skip
    line = bars.line(bars.Bar("a network", 1.3, 60, kind="engine"), 1, found)
    assert line.endswith("1.00 ms engine                  1.20 ms   1.20x  <= 1.3  met, the loop alone 0.40x")
    assert bars.line(bars.Bar("a network", 1.3, 60, kind="engine"), 1, found | {"gain": 1.4}).count("MISSED")


def test_every_line_has_a_file_of_its_own(bars: Any) -> None:
    every = [bars._file(Path("build"), bar, threads) for bar in bars.BARS for threads in bar.threads]
    assert len({*every}) == len(every)
