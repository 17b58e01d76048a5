"""Statistics by hand: each number of a few points, and every side of each threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import atan, inf, pi, sqrt
from statistics import NormalDist
from typing import Any

import pytest
from points import KEPT, points, record

from sparselth.report import stats
from sparselth.report.stats import Gap
from sparselth.runs import RunRecord

T2, T4 = 4.302652729749464, 2.7764451051977987  # Student's t of 2 and 4 degrees of freedom, 97.5 %


def run(
    dense: Sequence[float], ticket: Sequence[float], reinit: Sequence[float] = (), **changes: Any
) -> RunRecord:
    some = points("ticket", 0, dense) + points("ticket", 1, ticket) + points("reinit", 1, reinit)
    return record(some, len(dense), **changes)


@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 0.25, 1.0, 7.5])
def test_student_s_law_of_few_degrees_is_the_one_in_books(t: float) -> None:
    c3, c4, c5 = (1 + t * t / df for df in (3, 4, 5))
    for df, below in (
        (1, 0.5 + atan(t) / pi),
        (2, 0.5 + t / (2 * sqrt(2 + t * t))),
        (3, 0.5 + (t / (sqrt(3) * c3) + atan(t / sqrt(3))) / pi),
        (4, 0.5 + 3 / 8 * t / sqrt(c4) * (1 - t * t / (12 * c4))),
        (5, 0.5 + (t / (sqrt(5) * c5) * (1 + 2 / (3 * c5)) + atan(t / sqrt(5))) / pi),
    ):
        assert stats.t_below(t, df) == pytest.approx(below, abs=1e-14), df


def test_quantiles_of_student_s_law() -> None:
    assert stats.t_quantile(1, 0.75) == pytest.approx(1, abs=1e-15)
    assert stats.t_quantile(1, 0.6) == pytest.approx(0.3249196962, abs=1e-9)
    assert 0 <= stats.t_quantile(3, 0.5) < 1e-15
    assert (stats.t_quantile(2), stats.t_quantile(4)) == pytest.approx((T2, T4), rel=1e-14)
    for df, quantile in {7: 2.364624251592785, 9: 2.262157162798205, 8: 2.306004135204167}.items():
        assert stats.t_below(quantile, df) == pytest.approx(0.975, abs=1e-12)
    z = NormalDist().inv_cdf(0.975)
    expanded = {df: z + (z**3 + z) / (4 * df) for df in (1000, 1001, 5000)}
    assert stats.t_quantile(1001) == expanded[1001]
    assert stats.t_quantile(5000) == expanded[5000]
    assert 1e-7 < abs(stats.t_quantile(1000) - expanded[1000]) < 1e-5
    assert stats.t_below(stats.t_quantile(1000), 1000) == pytest.approx(0.975, abs=1e-13)


def test_a_gap_has_an_interval_from_three_seeds_on() -> None:
    gap = Gap(0.5, 0.25, 5)
    assert gap.half == pytest.approx(0.25 * T4)
    assert (gap.low, gap.high) == pytest.approx((0.5 - 0.25 * T4, 0.5 + 0.25 * T4))
    none = Gap(0.5, None, 2)
    assert (none.half, none.low, none.high, none.chance(0)) == (None, -inf, inf, 1.0)
    assert gap.chance(0.25) == pytest.approx(1 - stats.t_below(1.0, 4))
    assert gap.chance(0.25) < 0.5 < gap.chance(0.75)
    assert Gap(stats.SLACK, 0.0, 3).chance(0.0) == 1
    certain = Gap(0.1, 0.0, 3)
    assert [certain.chance(least) for least in (0.2, 0.1, 0.1 - 5e-10, 0.1 - 2e-9)] == [1, 1, 1, 0]


def test_intervals_of_means_and_of_differences() -> None:
    assert stats.mean_interval(iter([0.5])) == (0.5, None)
    mean, half = stats.mean_interval([1.0, 2.0, 6.0])
    assert (mean, half) == (3.0, pytest.approx(T2 * sqrt(7 / 3)))
    assert stats.mean_interval([1.0, 2.0])[1] == pytest.approx(stats.t_quantile(1) / 2)
    assert stats.paired([1.0, 3.0]) == stats.paired([1.0, 3.0], 10) == Gap(2.0, None, 2)
    assert stats.paired([1.0, 2.0, 6.0]) == Gap(3.0, pytest.approx(sqrt(7 / 3)), 3)
    assert stats.paired([0.1, 0.1, 0.1]).error == pytest.approx(0, abs=1e-15)
    assert stats.paired([0.1, 0.1, 0.1], 500).half == pytest.approx(1 / 500)  # an image to either side
    assert stats.paired([1.0, 2.0, 6.0], 500).error == pytest.approx(sqrt(7 / 3))


def test_draws_of_a_seed_are_averaged_and_level_0_is_dense() -> None:
    some = points("ticket", 0, [0.5, 0.75]) + points("reinit", 1, [0.25, None, 0.5])
    some += points("reinit", 1, [0.75, None, None], draw=1) + points("ticket", 1, [None, None, 0.125])
    some += [point | {"seed": 9, "final_accuracy": None} for point in points("ticket", 0, [0.1])]
    of = record(some[::-1], 10)
    assert [*stats.per_seed(of, "reinit", 1, "final_accuracy").items()] == [(0, 0.5), (2, 0.5)]
    for arm in ("ticket", "reinit", "random-mask"):
        assert stats.per_seed(of, arm, 0, "final_accuracy") == {0: 0.5, 1: 0.75}
    assert stats.per_seed(of, "reinit", 2, "final_accuracy") == {}
    assert stats.per_seed(of, "reinit", 1, "step_seconds") == {}
    assert stats.difference(of, "final_accuracy", ("ticket", 1), ("reinit", 1)) == [-0.375]
    assert stats.difference(of, "accuracy_at_early_stop", ("reinit", 1), ("reinit", 0)) == [0.0]
    assert stats.compare(of, ("ticket", 1), ("ticket", 0)) is None
    assert stats.weights_remaining(of) == {0: 1.0, 1: pytest.approx(0.8)}
    assert [*stats.weights_remaining(of)] == [0, 1]


def test_differences_of_accuracies_count_images_and_others_do_not() -> None:
    of = run([0.5] * 3, [0.75] * 3)
    assert stats.images_counted(of) == 10_000
    assert stats.compare(of, ("ticket", 1), ("ticket", 0)) == Gap(0.25, pytest.approx(1e-4 / T2), 3)
    assert stats.compare(of, ("ticket", 1), ("ticket", 0), "early_stop_step") == Gap(0.0, 0.0, 3)
    for images, counted in ((0, 10_000), (400, 400), (20_000, 10_000)):
        assert stats.images_counted(record([], eval_images=images)) == counted


def test_what_is_finished_and_what_is_planned() -> None:
    of = run([0.5] * 3, [0.5] * 3, [0.5] * 2)
    assert stats.cells(of) == (8, 9)
    places = [(arm, level) for arm in of.config.arms for level in range(3)]
    done = {place for place in places if stats.finished(of, *place)}
    assert done == {("ticket", 0), ("reinit", 0), ("ticket", 1)}
    assert not stats.finished(of, "random-mask", 1)


def test_the_level_nearest_in_ratio() -> None:
    levels = {0: 0.2, 1: 0.5, 2: 0.1, 3: 0.0}
    assert stats.nearest_level(levels, 0.2) == 2
    assert stats.nearest_level(levels, 0.23) == 1  # 2.17 times, against 2.3
    assert stats.nearest_level({1: 0.9, 2: 0.8}, 0.86) == 1
    assert stats.nearest_level({1: 0.9, 2: 0.8}, 0.84) == 2
    assert stats.nearest_level({0: 1.0, 1: 0.0}, 0.2) is None


def test_layers_that_are_empty_on_some_seed() -> None:
    some = points("ticket", 1, [0.5])
    some += points("ticket", 1, [0.5], kept=KEPT | {"fc2.weight": 0, "weight.x": 0})
    some += points("reinit", 1, [0.5], kept=KEPT | {"fc1.weight": 0})
    of = record(some)
    assert stats.empty_layers(of, 1) == ["fc2", "weight.x"]
    assert stats.empty_layers(of, 1, "reinit") == ["fc1"]
    assert stats.empty_layers(of, 2) == []


def test_the_tolerance_is_what_the_test_images_can_tell() -> None:
    assert stats.tolerance(record([])) == 0.002
    assert stats.tolerance(run([0.98] * 3, [])) == 0.002
    assert stats.tolerance(run([0.5, 0.7], [])) == pytest.approx(sqrt(0.6 * 0.4 / 10_000))
    assert stats.tolerance(run([0.9], [], eval_images=100)) == pytest.approx(0.03)


RULE = """\
Verdict on the ticket: differences of test accuracies at early stop, seed by seed, with the 95 % interval of \
their mean (Student's t).
winning = matching, and above reinit (the mean of its draws): that interval lies above 0; and the ticket \
does not stop clearly later than dense. Without the arm reinit no ticket is winning.
matching = at most 0.95 pp below dense: the interval lies above -0.95 pp (0.2, or the standard error of \
dense's accuracy on 1,000 test images if that is more).
below dense = the interval lies below 0 and reaches below -0.95 pp; and every ticket with an empty layer: it \
computes a constant.
unclear = the interval reaches from below -0.95 pp to above 0; more seeds would tell.
too few seeds = fewer than 3, which is too few to tell.
– = seeds are missing, or dense itself guesses (its accuracy is below twice that of chance)."""


def test_the_rule_has_the_run_s_own_numbers() -> None:
    assert stats.rule(run([0.9] * 3, [], eval_images=1000)) == RULE


def said(of: RunRecord, level: int = 1) -> tuple[str, str]:
    found = stats.verdict(of, level)
    return found.word, found.why


def test_each_verdict_says_its_numbers() -> None:
    dense, low, lower = [0.98] * 3, [0.97] * 3, [0.96] * 3
    assert said(run(dense, dense), 0) == ("dense", "the network that every ticket is compared with")
    assert said(run(dense, dense[:2], dense)) == ("no verdict", "2 of 3 seeds are finished")
    assert said(run(dense[:2] + [None], dense, dense)) == ("no verdict", "2 of 3 seeds are finished")  # type: ignore[list-item]
    assert said(run([0.1999] * 3, dense)) == ("no verdict", "dense itself guesses: 19.99 % accuracy")
    assert said(run([0.2] * 3, dense, dense))[0] == "matching"
    assert said(run([0.2], [0.9], [0.8]))[0] == "too few seeds"
    empty = points("ticket", 0, dense) + points("ticket", 1, dense, kept=dict.fromkeys(KEPT, 0))
    why = "fc1, fc2, fc3: no weight left, the network computes a constant"
    assert said(record(empty)) == ("below dense", why)
    assert said(run(dense[:1], low[:1])) == ("too few seeds", "-1.00 pp against dense, from 1 seed")
    assert said(run(dense[:2], low[:2])) == ("too few seeds", "-1.00 pp against dense, from 2 seeds")
    assert said(run(dense, low)) == ("below dense", "-1.00 ± 0.01 pp against dense")
    wide = [0.97, 0.98, 0.99]
    assert said(run(dense, wide)) == ("unclear", "+0.00 ± 2.48 pp against dense")
    assert said(run(dense, dense, arms=("ticket",))) == (
        "matching",
        "+0.00 ± 0.01 pp against dense; reinit was not run",
    )
    assert said(run(dense, dense, low[:2])) == (
        "no verdict",
        "+0.00 ± 0.01 pp against dense; reinit is not finished",
    )
    assert said(run(dense, dense, low)) == (
        "winning",
        "+0.00 ± 0.01 pp against dense, +1.00 ± 0.01 pp against reinit, early stop +0 ± 0 steps",
    )
    assert said(run(dense, dense, dense))[0] == "matching"
    assert said(run(low, dense, lower))[0] == "winning"


@pytest.mark.parametrize(
    ("gap", "word"),
    [(-0.0019, "winning"), (-0.00191, "below dense")],  # an image more or less is not told apart
)
def test_a_ticket_matches_down_to_the_tolerance(gap: float, word: str) -> None:
    assert said(run([0.98] * 3, [0.98 + gap] * 3, [0.9] * 3))[0] == word


@pytest.mark.parametrize(
    ("stops", "word"), [((500,) * 3, "winning"), ((501,) * 3, "matching"), ((400, 500, 900), "winning")]
)
def test_a_ticket_that_stops_clearly_later_does_not_win(stops: tuple[int, ...], word: str) -> None:
    some = points("ticket", 0, [0.98] * 3) + points("ticket", 1, [0.98] * 3, stops)
    assert said(record(some + points("reinit", 1, [0.97] * 3)))[0] == word


def test_thresholds_belong_to_the_better_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals that end exactly there."""
    of, ends = run([0.98] * 3, [0.98] * 3, [0.97] * 3), dict[str, tuple[float, float]]()

    class Ends(Gap):
        low = property(lambda self: ends[self.kind][0])  # type: ignore[assignment]
        high = property(lambda self: ends[self.kind][1])  # type: ignore[assignment]

    def compare(of: Any, a: Any, b: Any, field: str = "accuracy") -> Gap:
        gap = Ends(0.0, 1.0, 3)
        kind = "later" if field == "early_stop_step" else "dense" if b == ("ticket", 0) else "reinit"
        object.__setattr__(gap, "kind", kind)
        return gap

    monkeypatch.setattr(stats, "compare", compare)
    for dense, reinit, later, word in (
        ((-0.002 - 5e-10, 1), (1, 1), (-1, 1), "winning"),
        ((-stats.TOLERANCE - stats.SLACK, 1), (1, 1), (-1, 1), "winning"),
        ((-0.002 - 2e-9, -1e-12), (1, 1), (-1, 1), "below dense"),
        ((-0.002 - 2e-9, 0.0), (1, 1), (-1, 1), "unclear"),
        ((0, 1), (1e-9, 1), (-1, 1), "matching"),
        ((0, 1), (2e-9, 1), (1e-9, 1), "winning"),
        ((0, 1), (2e-9, 1), (2e-9, 1), "matching"),
    ):
        ends |= {"dense": dense, "reinit": reinit, "later": later}
        assert stats.verdict(of, 1).word == word, ends


def test_levels_read_at_once() -> None:
    assert stats.holm({1: 0.0125, 2: 0.025}) == {1, 2}
    assert stats.holm({1: 0.0126, 2: 0.001}) == {1, 2}
    assert stats.holm({1: 0.0126, 2: 0.02}) == set()
    assert stats.holm({1: 0.3, 2: 0.2}, 0.4) == {1, 2}
    assert stats.holm({2: 0.013, 1: 0.013}) == set()
    assert stats.holm({5: 0.025}) == {5}


def test_winning_at_once_takes_the_worse_of_two_tests_of_each_level() -> None:
    """Student's of two degrees of freedom: level 1 holds alone, and not among four; level 2 among any."""
    dense = [0.98] * 3
    leads = {1: [0.003, 0.004, 0.005], 2: [0.0399, 0.04, 0.0401], 3: [0.04] * 3, 4: [-0.1, 0.1, 0.0]}
    some = points("ticket", 0, dense)
    for level, lead in leads.items():
        lower = 0.05 if level == 3 else 0.0
        some += points("ticket", level, [0.98 - lower] * 3)
        some += points("reinit", level, [0.98 - lower - one for one in lead])
    of = record(some, levels=5)
    words = [stats.verdict(of, level).word for level in range(6)]
    assert words == ["dense", "winning", "winning", "below dense", "matching", "no verdict"]
    # p of level 1: 1 - F2(4 sqrt 3) = 0.0101, above 0.025 / 3; that of level 2 is below 0.025 / 4
    assert stats.compare(of, ("ticket", 1), ("reinit", 1)).chance(0.0) == pytest.approx(0.0101, abs=1e-4)  # type: ignore[union-attr]
    assert stats.winning_at_once(of) == {2}
    fewer = [point for point in some if point["level"] < 3]
    assert stats.winning_at_once(record(fewer, levels=2)) == {1, 2}


def test_a_ticket_that_barely_matches_or_leads_wins_alone_and_not_among_two() -> None:
    """Each p is 0.0193, between 0.025 / 2 and 0.025."""
    dense, near = [0.98] * 3, [0.98 - 0.00065, 0.98 - 0.001, 0.98 - 0.00135]
    lead = [0.98 - 0.0026, 0.98 - 0.004, 0.98 - 0.0054]
    for ticket, reinit in ((near, [0.9] * 3), (dense, lead)):
        some = points("ticket", 0, dense)
        for level in (1, 2):
            some += points("ticket", level, ticket) + points("reinit", level, reinit)
            of = record(some, levels=level)
            assert [stats.verdict(of, at).word for at in range(1, level + 1)] == ["winning"] * level
            assert stats.winning_at_once(of) == ({1} if level == 1 else set())


def test_a_ticket_s_controls_are_dense_and_every_other_arm() -> None:
    of = record([], arms=("reinit", "ticket", "random-mask"))
    assert stats.controls(of, 7) == [
        ("dense", ("ticket", 0)), ("reinit", ("reinit", 7)), ("random-mask", ("random-mask", 7)),
    ]  # fmt: skip


def test_a_summary_has_a_row_an_arm_and_level() -> None:
    of = run([0.97, 0.98, 0.99], [0.98, 0.99, 1.0], [0.96, 0.97, 0.98], levels=2)
    of.points[-1]["kept"] = KEPT | {"fc1.weight": 0}
    more = of.points + points("ticket", 2, [0.5], kept=KEPT | {"fc3.weight": 0})
    rows = stats.summary(replace(of, points=more))
    assert [(row["arm"], row["level"]) for row in rows] == [
        ("ticket", 0), ("ticket", 1), ("ticket", 2), ("reinit", 1),
    ]  # fmt: skip
    half = pytest.approx(T2 * 0.01 / sqrt(3))
    steps = {"mean": 500.0, "half_width": 0.0}

    def interval(mean: float, width: Any = half) -> dict[str, Any]:
        return {"mean": pytest.approx(mean), "half_width": width}

    image = pytest.approx(1e-4)
    assert rows[1] == {
        "arm": "ticket", "level": 1, "seeds": 3, "weights_remaining": pytest.approx(0.8),
        "accuracy_at_early_stop": interval(0.99), "final_accuracy": interval(0.99), "early_stop_step": steps,
        "empty_layers": [], "winning_at_once": True,
        "verdict": {"word": "winning", "why": said(of)[1]},
        "minus": {
            "dense": {"seeds": 3, **interval(0.01, image)}, "reinit": {"seeds": 3, **interval(0.02, image)},
        },
    }  # fmt: skip
    assert {name: rows[2][name] for name in ("seeds", "empty_layers", "winning_at_once", "minus")} == {
        "seeds": 1, "empty_layers": ["fc3"], "winning_at_once": False,
        "minus": {"dense": {"seeds": 1, **interval(-0.47, None)}},
    }  # fmt: skip
    assert rows[2]["early_stop_step"] == {"mean": 500.0, "half_width": None}
    assert "minus" not in rows[0]
    assert rows[0]["verdict"]["word"] == "dense"
    assert rows[0]["winning_at_once"] is False
    assert set(rows[3]) == set(rows[0]) - {"verdict", "winning_at_once"}
    assert rows[3]["final_accuracy"] == interval(0.97)
    assert rows[3]["empty_layers"] == ["fc1"]


def timed(level: int, seconds: Sequence[float | None], size: Sequence[float | None]) -> list[Any]:
    some = points("ticket", level, [0.5] * len(seconds))
    return [p | {"step_seconds": s, "state_bytes": b} for p, s, b in zip(some, seconds, size, strict=True)]


def test_what_a_level_costs_is_a_share_of_its_own_seed_s_dense_network() -> None:
    some = timed(0, [2.0, 4.0, None], [100, 200, 300]) + timed(1, [1.0, 1.0, 7.0], [50, 50, 30])
    found = stats.costs(record(some + timed(2, [None, None, 5.0], [1, 1, 1])))
    assert [*found] == [0, 1]
    assert found[0] == stats.Cost(1.0, 3.0, 200.0, [1.0, 1.0], [1.0, 1.0, 1.0])
    assert found[1] == stats.Cost(
        pytest.approx(0.8), 3.0, pytest.approx(130 / 3), [0.5, 0.25], [0.5, 0.25, 0.1]
    )
    assert stats.costs(record(timed(0, [0.0], [5]))) == {}
    assert stats.costs(record(timed(0, [5.0], [0]))) == {}
    assert stats._of_dense(record([]), 0, "step_seconds") == (0.0, [])
    assert stats._of_dense(record(timed(0, [5.0], [1])), 0, "step_seconds") == (5.0, [1.0])


def test_a_run_is_timed_by_the_processor_where_all_of_it_is() -> None:
    some = [point | {"clock": "processor"} for point in points("ticket", 0, [0.5, 0.5])]
    assert stats.clock(record(some)) == "processor"
    assert stats.clock(record([*some, some[0] | {"clock": "wall"}])) == "wall"
    assert stats.clock(record(points("ticket", 0, [0.5]))) == "wall"


def test_numbers_in_words() -> None:
    assert stats.signed(Gap(0.01234, 0.01 / T4, 5)) == "+1.23 ± 1.00"
    assert stats.signed_pp(Gap(-0.01234, None, 2)) == "-1.23 pp"
    assert stats.signed(Gap(-4e-5, None, 2)) == "+0.00"
    written = {(0, 1, 2): "0-2", (3, 4): "3,4", (7,): "7", (4, 2, 3): "2-4", (0, 1, 3): "0,1,3"}
    assert {seeds: stats.seed_list(seeds) for seeds in written} == written
