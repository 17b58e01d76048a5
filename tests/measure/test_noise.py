"""What noise decides, and that races go on while it does."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparselth import clock
from sparselth.clock import Timing
from sparselth.measure import case, noise


def timing(median: float, spread: float, samples: int = 9) -> Timing:
    return Timing(median, median - spread / 2, median + spread / 2, samples)


@pytest.mark.parametrize(
    ("one", "bar", "decides"),
    [
        (timing(1.0, 0.1), timing(2.0, 0.1), False),  # 2x
        (timing(2.0, 0.1), timing(1.0, 0.1), False),  # half
        (timing(1.0, 0.01), timing(1.01, 0.01), False),  # even, and that is sure
        (timing(1.0, 0.3), timing(1.1, 0.3), True),  # a win that may be a loss
        (timing(1.1, 0.3), timing(1.0, 0.3), True),
        (timing(1.0, 0.3), timing(1.0, 0.3), True),  # even, or anything
        (timing(1.0, 0.3, 200), timing(1.1, 0.3, 200), False),  # the same with many samples
        (timing(1.8, 12.4), timing(26.0, 1.0), True),  # 14.5x that the machine's other work makes
        (timing(1.0, 0.1), timing(14.5, 10.0), True),
    ],
)
def test_what_noise_decides(one: Timing, bar: Timing, decides: bool) -> None:
    assert noise.decides(one, bar) is decides


def test_a_time_over_itself_is_noisy_where_it_spreads() -> None:
    calm, wild = timing(1.0, 0.4, 5), timing(1.0, 0.6, 500)
    assert not noise.decides(calm, calm)
    assert noise.decides(wild, wild)


def test_samples_that_agree_since_all_waited_for_a_processor_are_noise() -> None:
    calm, met = timing(1.0, 0.1), Timing(28.0, 27.0, 29.0, 9, disturbed=0.6)
    assert noise.decides(calm, met)
    assert noise.decides(met, calm)
    assert not noise.decides(calm, Timing(28.0, 27.0, 29.0, 9, disturbed=0.3))


def test_a_race_notes_who_waited_for_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    at = iter([0.0, 5.0, 5.0, 5.0, 5.0, 9.0, 9.0, 9.0])  # before and behind each sample
    monkeypatch.setattr(clock, "waited", lambda: next(at))
    race = clock.Race({"a": lambda: 1.0}, watch=True)
    for _ in range(4):
        race.round()
    assert race.timings()["a"].disturbed == 0.5
    assert race.only(["a"]).timings()["a"].disturbed == 0.5


def test_waiting_before_the_timed_part_is_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock, "waited", lambda: now[0])

    def sample(rest: float, timed: float) -> clock.Sample:
        def run() -> float:
            now[0] += rest
            clock.mark()
            now[0] += timed
            return 1.0

        return run

    race = clock.Race({"rested": sample(9.0, 0.0), "met": sample(0.0, 9.0)}, watch=True)
    for _ in range(4):
        race.round()
    assert [race.timings()[name].disturbed for name in ("rested", "met")] == [0.0, 1.0]


def test_waiting_for_a_processor_is_counted() -> None:
    """Two threads that both want the one processor they may use wait for half of the time."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not count it")
    work, before = ("sha256", b"", b"", 300_000), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        began, other = clock.waited(), threading.Thread(target=hashlib.pbkdf2_hmac, args=work)
        other.start()
        hashlib.pbkdf2_hmac(*work)
        other.join()
        assert clock.waited() - began > 0.01
    finally:
        os.sched_setaffinity(0, before)


def test_the_doubt_is_two_standard_errors() -> None:
    """Of medians of a normal law: 1.253 / sqrt(n) of its deviation, which is 1 / 1.349 of the quartiles'."""
    one, bar = timing(1.0, 0.1349, 100), timing(3.0, 0.0, 100)
    assert noise.doubt(one, bar) == pytest.approx(2 * 3.0 * 1.2533 * 0.1 / 10, rel=0.01)


def test_a_race_of_networks_goes_on_while_noise_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it does not, or AGAIN times."""
    monkeypatch.setattr(case, "rounds", lambda race: [race.round() for _ in range(6)])

    def run(values: Iterator[float]) -> dict[str, Timing]:
        monkeypatch.setattr(case, "_rested", lambda call: call)
        return case.race({"dense": lambda: next(values), "sparselth": lambda: 1.0}, "cpu")

    assert run(iter([2.0] * 100))["dense"].samples == 6
    wild = iter([1.0, 9.0] * 100)
    assert run(wild)["dense"].samples == 6 * (1 + noise.AGAIN)
    settles = iter([1.0, 9.0] + [2.0] * 30)
    found = run(settles)["dense"]
    assert found.samples == 12
    assert found.median == 2.0


def test_rows_of_networks_say_that_noise_decides() -> None:
    times = {"dense": timing(1.0, 0.9), "sparselth": timing(0.1, 0.01)}
    row = case.row_of("lenet-300-100", 0.5, "sparselth", 4, times, "dense")
    assert row["noisy"]
    assert row["samples"] == 9
    calm = times | {"dense": timing(1.0, 0.1)}
    assert not case.row_of("lenet-300-100", 0.5, "sparselth", 4, calm, "dense")["noisy"]


def test_slow_rivals_get_more_time_in_every_turn() -> None:
    race = clock.Race({"a": lambda: 1.0}).only(["a"], clock.SHARE)
    assert race.share == pytest.approx(2 * clock.SHARE)
