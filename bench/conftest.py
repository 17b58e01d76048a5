"""Interleaved timing for all benchmarks: every rival in every round, medians and spread, one table each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparselth import machine
from sparselth.clock import Race, Timing, wall

TABLES: list[str] = []


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def interleaved(benchmark: Any) -> Callable[..., dict[str, Timing]]:
    """`interleaved({name: (function, calls)}, rounds)`: all functions in turn, `calls` times a round each.

    pytest-benchmark times the whole round; the table and `extra_info` hold the rivals.
    """

    def measure(rivals: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, Timing]:
        race = Race({name: wall(function, calls) for name, (function, calls) in rivals.items()}, share=None)
        benchmark.pedantic(race.round, rounds=rounds, warmup_rounds=1)
        found = race.timings(skip=1)
        for name, t in found.items():
            benchmark.extra_info[name] = {"median_s": t.median, "q1_s": t.low, "q3_s": t.high}
        return found

    return measure


@pytest.fixture
def show() -> Callable[[str], None]:
    """Print a table behind the session's results."""
    return TABLES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TABLES:
        facts = machine.environment()
        packages = facts["packages"]
        terminalreporter.write_sep("=", "comparisons")
        terminalreporter.write_line(
            f"{facts['cpu']}, {facts['cores']} cores, torch {packages['torch']}, one thread, "
            f"commit {(facts['commit'] or 'unknown')[:12]}"
        )
        for table in TABLES:
            terminalreporter.write_line("\n" + table)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["sparselth"] = machine.environment()
    machine_info.pop("node", None)  # the results are published
