"""Which point of a sweep is best: where points are compared, and what stands over all pairs."""

from __future__ import annotations

from typing import Any

import pytest

from sparselth.report import sweep as report
from sparselth.report.lines import gap_json
from sparselth.report.stats import paired
from sparselth.report.sweep import Level, Numbers, sentence


def numbers(
    monkeypatch: pytest.MonkeyPatch, points: dict[str, dict[int, tuple[float, list[float]]]]
) -> Numbers:
    """Of accuracies by point, level and seed."""
    made = Numbers(None)  # type: ignore[arg-type]
    levels = {
        point: {level: Level(left, dict(enumerate(found))) for level, (left, found) in of.items()}
        for point, of in points.items()
    }
    vars(made).update(levels=levels, labels={point: point for point in points}, field="final_accuracy")

    def minus(self: Numbers, a: str, b: str) -> Any:
        left, right = self.at(a).accuracies, self.at(b).accuracies
        both = [left[seed] - right[seed] for seed in left if seed in right]
        return paired(both, 1000) if both else None

    monkeypatch.setattr(report.Numbers, "minus", minus)
    return made


def test_points_are_compared_at_the_sparsest_share_that_all_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point that prunes further is not held to what only it has."""
    found = numbers(
        monkeypatch,
        {
            "slow": {0: (1.0, [0.9] * 3), 1: (0.9, [0.91] * 3), 2: (0.81, [0.92] * 3)},
            "fast": {0: (1.0, [0.9] * 3), 1: (0.6, [0.93] * 3), 2: (0.36, [0.1] * 3)},
        },
    )
    assert found.common == pytest.approx(0.81)
    assert found.compared == {"slow": 2, "fast": 1}
    assert found.ranked == ["fast", "slow"]


def test_without_shares_it_is_the_last_level(monkeypatch: pytest.MonkeyPatch) -> None:
    made = numbers(monkeypatch, {"a": {0: (None, [0.5]), 3: (None, [0.6])}, "b": {0: (None, [0.7])}})  # type: ignore[dict-item]
    assert made.common is None
    assert made.compared == {"a": 3, "b": 0}


def test_a_point_of_dense_networks_alone_is_compared_with_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a sweep is under way; a sparse level 0, as of strong tickets, is as others."""
    dense = {"a": {0: (1.0, [0.9] * 3)}, "b": {0: (1.0, [0.9] * 3), 1: (0.5, [0.1] * 3)}}
    assert numbers(monkeypatch, dense).compared == {"a": 0, "b": 0}
    strong = {"a": {0: (0.1, [0.9] * 3)}, "b": {0: (0.1, [0.9] * 3), 1: (0.5, [0.1] * 3)}}
    assert numbers(monkeypatch, strong).compared == {"a": 0, "b": 0}


def test_points_without_a_seed_in_common_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    found = numbers(monkeypatch, {"a": {1: (0.5, [0.9] * 3)}, "b": {1: (0.5, [0.1] * 3)}})
    found.levels["b"][1] = Level(0.5, {3: 0.1, 4: 0.1, 5: 0.1})
    assert "is open: 0 seeds of some give no interval" in sentence(found)


def line(arm: str, level: int, draw: int, left: float, accuracy: float) -> dict[str, Any]:
    where = {"seed": 0, "arm": arm, "level": level, "draw": draw}
    return where | {"weights_remaining": left, "final_accuracy": accuracy}


def test_rounds_before_a_ticket_are_no_draws_of_it() -> None:
    """at-init's score imp keeps its rounds as draws of the ticket's arm, the last as draw 0."""
    made = Numbers(None)  # type: ignore[arg-type]
    rows = [line("ticket", 1, 0, 0.1, 0.7), line("ticket", 1, 1, 0.5, 0.9)]
    vars(made)["cells"] = {"score=imp": rows}
    assert made.levels == {"score=imp": {1: Level(0.1, {0: 0.7})}}


def test_dense_is_shown_where_there_is_no_other_arm() -> None:
    """rewinding and schedule have it first."""
    made, alone = Numbers(None), Numbers(None)  # type: ignore[arg-type]
    rows = [line("dense", 0, 0, 1.0, 0.9), line("ticket-0", 1, 0, 0.8, 0.9)]
    vars(made)["cells"], vars(alone)["cells"] = {"a": rows}, {"a": rows[:1]}
    assert (made.arm, alone.arm) == ("ticket-0", "dense")


def test_clear_differences_stand_and_one_pair_in_many_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same difference is clear between two points, and not when 45 pairs are read at once."""
    two = {"a": {1: (0.5, [0.90, 0.93, 0.92, 0.94])}, "b": {1: (0.5, [0.895, 0.92, 0.915, 0.925])}}
    pair = numbers(monkeypatch, two)
    gap = pair.minus("a", "b")
    assert gap is not None
    assert gap.low > 0, gap_json(gap)
    assert pair.clear == {"b"}
    assert sentence(pair).endswith("clearly above every other (Student's t seed by seed, 5 %).")
    more = {f"c{i}": {1: (0.5, [0.8, 0.99 - 0.01 * i, 0.7, 0.9])} for i in range(8)}
    many = numbers(monkeypatch, two | more)
    assert many.ranked[0] == "a"
    assert "b" not in many.clear
    assert "5 % over all 45 pairs by Holm's correction" in sentence(many)
    assert "not clearly above b" in sentence(many)


def test_two_seeds_leave_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    found = numbers(monkeypatch, {"a": {1: (0.5, [0.9, 0.9])}, "b": {1: (0.5, [0.1, 0.1])}})
    assert found.clear == set()
    assert "is open: 2 seeds of some give no interval" in sentence(found)
