"""The report says of a made-up run what was put into it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from sparselth.data import load
from sparselth.experiments.imp import ImpConfig
from sparselth.files import Line
from sparselth.models import get_model
from sparselth.report import drawing, figures, mask_figures, stats, tables
from sparselth.runs import RunRecord


class FakeRecord(RunRecord):
    """A run record whose masks are made up, so that there is no folder to read."""

    def mask(self, seed: int, level: int, name: str) -> np.ndarray:
        spec = next(spec for spec in get_model(self.config.model).weights if spec.name == name)
        n, k = spec.matrix
        if level == 0:
            return np.ones((n, k), bool)
        # Survivors crowd the middle of the image, as they do in a trained network.
        at = np.indices((28, 28)) if k == 784 else np.indices((1, k))
        middle = np.exp(-(((at[0] - at[0].mean()) ** 2 + (at[1] - at[1].mean()) ** 2) / 80)).ravel()
        chance = np.random.default_rng(seed).random((n, k)) / (0.05 + middle)
        share = next(p["weights_remaining"] for p in self.points if p["level"] == level)
        return chance <= np.quantile(chance, share)


def fake(
    model="lenet-300-100",
    seeds=(0, 1, 2),
    arms=("ticket", "reinit", "random-mask"),
    levels=15,
    reinits=1,
    noise=0.0006,
) -> FakeRecord:
    """A finished run shaped like the paper's figures: a gain at 20 %, controls that fall behind it."""
    net = get_model(model)
    config = ImpConfig(
        model=model, dataset="mnist", seeds=seeds, arms=arms, levels=levels, rate=0.2, scope="layer",
        one_shot=False, rewind=0, reinits=reinits, device="cpu", kernels="auto", recipe=net.recipes["short"],
    )  # fmt: skip
    rng = np.random.default_rng(7)
    points, evaluations = [], []
    steps = config.recipe.steps
    for seed in seeds:
        for arm in arms:
            for level in range(0 if arm == "ticket" else 1, levels + 1):
                kept = {w.name: round(w.numel * (0.9 if w.output else 0.8) ** level) for w in net.weights}
                share = sum(kept.values()) / net.params.prunable
                depth = -np.log(share)  # 0 dense, 1.6 at 20 %, 3.3 at 3.6 %
                for draw in range(reinits if "reinit" in arm and level else 1):
                    gain, speed = {
                        "ticket": (0.0035 * np.exp(-((depth - 1.8) ** 2)) - 0.0035 * np.exp(-3.24), 0.42),
                        "reinit": (-0.004 * max(0, depth - 1.2) ** 1.7, -0.35),
                        "random-mask": (-0.02 * max(0, depth - 1.3) ** 2.5, -0.45),
                        "random-reinit": (-0.02 * max(0, depth - 1.2) ** 2.5, -0.5),
                    }[arm]
                    final = 0.98 + gain - 0.01 * max(0, depth - 3.4) + rng.normal(0, noise)
                    turn = 1 - speed * min(depth, 1.6) / 1.6 + 0.3 * max(0, depth - 1.6) * (speed > 0)
                    stop = int(
                        np.clip(round(steps / 100 * 0.5 * turn + rng.normal(0, 1.5)) * 100, 100, steps)
                    )
                    cell = {"arm": arm, "seed": seed, "level": level, "draw": draw}
                    points.append(cell | {
                        "weights_remaining": share, "kept": kept, "early_stop_step": stop,
                        "accuracy_at_early_stop": final, "final_accuracy": final - 0.0005,
                        "train_seconds": 3.0, "step_seconds": 0.001 * max(0.1, share),
                        "state_bytes": int(4e6 * share), "dense_state_bytes": int(4e6),
                    })  # fmt: skip
                    for step in range(0, steps + 1, 100):
                        grown = (
                            final - 0.88 * np.exp(-step / (0.05 * stop)) - 0.03 * np.exp(-step / (0.3 * stop))
                        )
                        evaluations.append(cell | {
                            "step": step, "validation_accuracy": min(1.0, grown + rng.normal(0, noise / 2)),
                            "validation_loss": 0.07 + abs(step - stop) / steps * 0.02,
                        })  # fmt: skip
    points.sort(key=lambda p: (p["seed"], p["arm"], p["level"], p["draw"]))
    lines = [Line(i, json.dumps(one).encode(), False, True) for i, one in enumerate(evaluations)]
    return FakeRecord(Path("run"), config, points, lines)


def edit(record: FakeRecord, change, **where) -> FakeRecord:
    """The record with `change` merged into each point that has all of `where`."""
    chosen = lambda p: all(p[key] == value for key, value in where.items())  # noqa: E731
    return replace(record, points=[p | change if chosen(p) else p for p in record.points])


def small(**arguments) -> FakeRecord:
    """One level at which the ticket has 98.1 %, dense 98.0 %, reinit 97.5 %; it stops no later."""
    record = edit(fake(levels=1, **arguments), {"accuracy_at_early_stop": 0.98, "early_stop_step": 900})
    record = edit(record, {"accuracy_at_early_stop": 0.981}, arm="ticket", level=1)
    return edit(record, {"accuracy_at_early_stop": 0.975}, arm="reinit")


@pytest.mark.parametrize(
    ("below", "quantiles"),
    [  # degrees of freedom 1, 2, 4, 9, 30, 60, 120, of Student's law as it stands in tables
        (0.9, (3.0777, 1.8856, 1.5332, 1.3830, 1.3104, 1.2958, 1.2886)),
        (0.95, (6.3138, 2.9200, 2.1318, 1.8331, 1.6973, 1.6706, 1.6577)),
        (0.975, (12.7062, 4.3027, 2.7764, 2.2622, 2.0423, 2.0003, 1.9799)),
        (0.995, (63.6567, 9.9248, 4.6041, 3.2498, 2.7500, 2.6603, 2.6174)),
        (0.9995, (636.619, 31.599, 8.610, 4.781, 3.646, 3.460, 3.373)),
    ],
)
def test_t_quantiles_are_the_tabled_ones(below, quantiles):
    for df, quantile in zip((1, 2, 4, 9, 30, 60, 120), quantiles, strict=True):
        digits = 4 if below < 0.999 else 3
        assert round(stats.t_quantile(df, below), digits) == quantile
        assert stats.t_below(stats.t_quantile(df, below), df) == pytest.approx(below, abs=1e-12)


def test_t_quantiles_fall_to_that_of_the_normal_law():
    quantiles = [stats.t_quantile(df) for df in (*range(1, 200), 999, 1000, 1001, 1002)]
    assert all(a > b for a, b in pairwise(quantiles))
    assert stats.t_quantile(10**9) == pytest.approx(1.959964)


def test_interval_of_known_values():
    mean, half = stats.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5)
    assert stats.mean_interval([0.5]) == (0.5, None)


def test_draws_of_one_seed_count_once():
    record = fake(seeds=(0, 1), reinits=3, levels=1)
    for seed, values in ((0, (0.1, 0.2, 0.3)), (1, (0.4, 0.4, 0.4))):
        for draw, value in enumerate(values):
            record = edit(record, {"final_accuracy": value}, arm="reinit", seed=seed, draw=draw)
    (row,) = (row for row in stats.summary(record) if row["arm"] == "reinit")
    assert row["seeds"] == 2
    assert row["final_accuracy"]["mean"] == pytest.approx(0.3)
    assert row["final_accuracy"]["half_width"] == pytest.approx(12.7062 * 0.1)


TICKET = {"arm": "ticket", "level": 1}


@pytest.mark.parametrize(
    ("change", "where", "word", "why"),
    [
        ({}, {}, "winning", "+0.60 ± 0.01 pp against reinit, early stop +0 ± 0 steps"),
        ({"accuracy_at_early_stop": 0.9782}, TICKET, "winning", "-0.18 ± 0.01"),
        (
            {"accuracy_at_early_stop": 0.978},
            TICKET,
            "below dense",
            "-0.20 ± 0.01",
        ),  # by an image, and another
        ({"accuracy_at_early_stop": 0.9779}, TICKET | {"seed": 0}, "unclear", "+0.00 ± "),
        ({"early_stop_step": 1000}, TICKET, "matching", "early stop +100 ± 0 steps"),
        ({"early_stop_step": 1000}, TICKET | {"seed": 0}, "winning", "early stop +33 ± 143 steps"),
        ({"accuracy_at_early_stop": 0.981}, {"arm": "reinit"}, "matching", "+0.00 ± 0.01 pp against reinit"),
        ({"accuracy_at_early_stop": 0.9809}, {"arm": "reinit"}, "matching", "+0.01 ± 0.01 pp against reinit"),
        ({"accuracy_at_early_stop": 0.985}, {"arm": "reinit", "seed": 2}, "matching", "against reinit"),
        ({"kept": {"fc1.weight": 9, "fc2.weight": 0}}, {"arm": "ticket", "seed": 1}, "below dense", "fc2"),
        ({"accuracy_at_early_stop": 0.113}, {}, "no verdict", "guesses"),
    ],
)
def test_verdict(change, where, word, why):
    found = stats.verdict(edit(small(), change, **where), 1)
    assert (found.word, why in found.why) == (word, True), found.why


def spread(gaps: dict[str, list[float]], **arguments) -> FakeRecord:
    """`small`, with so many pp of the ticket above dense and above reinit, seed by seed."""
    seeds = tuple(range(len(gaps["dense"])))
    record = edit(small(seeds=seeds, **arguments), {"accuracy_at_early_stop": 0.98}, **TICKET)
    for seed in seeds:
        for arm, level in (("dense", 0), ("reinit", 1)):
            where = {"arm": "ticket" if level == 0 else arm, "level": level, "seed": seed}
            record = edit(record, {"accuracy_at_early_stop": 0.98 - gaps[arm][seed] / 100}, **where)
    return record


def test_a_verdict_follows_its_intervals():
    """By hand: of five values the half-width is 2.7764 standard deviations over the root of five."""
    near, wide = (
        [0.1, 0.3, 0.2, 0.0, 0.4],
        [0.6, -0.4, 0.2, 0.9, -0.3],
    )  # mean 0.2, deviations 0.158 and 0.561
    gap = stats.compare(spread({"dense": near, "reinit": wide}), ("ticket", 1), ("reinit", 1))
    assert (100 * gap.mean, 100 * gap.half) == pytest.approx((0.2, 2.7764 * 0.5612486 / 5**0.5), rel=1e-4)
    assert gap.low < 0 < gap.high
    assert stats.verdict(spread({"dense": near, "reinit": wide}), 1).word == "matching"
    assert stats.verdict(spread({"dense": near, "reinit": near}), 1).word == "winning"
    assert stats.verdict(spread({"dense": wide, "reinit": near}), 1).word == "unclear"
    lower = [value - 1 for value in wide]
    assert stats.verdict(spread({"dense": lower, "reinit": near}), 1).word == "below dense"


def test_few_test_images_widen_what_matches():
    """0.2 pp on 10,000 images; on 1,000 the standard error of an accuracy of 98 %, 0.44 pp."""
    gaps = {"dense": [-0.4, -0.2, -0.3, -0.3, -0.3], "reinit": [1.0] * 5}  # -0.3, give or take 0.09
    many = spread(gaps)
    assert stats.tolerance(many) == stats.TOLERANCE == 0.002
    assert stats.verdict(many, 1).word == "below dense"
    few = replace(many, config=replace(many.config, dataset="mnist5k"))
    assert stats.tolerance(few) == pytest.approx((0.983 * 0.017 / 1000) ** 0.5, rel=0.01)
    assert stats.verdict(few, 1).word == "winning"
    assert "at most 0.41 pp below dense" in stats.rule(few)
    cut = replace(many, config=replace(many.config, eval_images=1000))
    assert stats.tolerance(cut) == stats.tolerance(few)


@pytest.mark.parametrize("seeds", [1, 2])
def test_two_seeds_are_too_few_to_tell(seeds):
    record = small(seeds=tuple(range(seeds)))
    assert stats.verdict(record, 1).word == "too few seeds"
    assert stats.winning_at_once(record) == set()
    (row,) = (row for row in stats.summary(record) if "minus" in row)
    assert row["minus"]["reinit"]["half_width"] is None
    text = " ".join(tables.table(record).split())
    assert re.search(rf"{seeds} seeds? (is|are) too few to tell", text)
    assert "winning," not in text
    assert "clearly different" not in text
    constant = edit(record, {"kept": {"fc1.weight": 0}}, **TICKET)  # no chance about that
    assert stats.verdict(constant, 1).word == "below dense"


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Five seeds, 1,000 test images: whole images, seeds that nearly agree, skew and heavy tails."""
    rng, repeats = np.random.default_rng(0), 4000
    laws = {
        "four images": lambda shape: rng.normal(3, 4, shape),
        "half an image": lambda shape: rng.normal(0.3, 0.4, shape),
        "heavy tails": lambda shape: 4 * rng.standard_t(3, shape),
        "skewed": lambda shape: rng.gamma(2, 2, shape),
    }
    for name, law in laws.items():
        truth = np.round(law(10**6)).mean() / 1000
        gaps = [stats.paired(list(row), 1000) for row in np.round(law((repeats, 5))) / 1000]
        held = sum(gap.low <= truth <= gap.high for gap in gaps) / repeats
        assert held > (0.9 if name == "skewed" else 0.94), name


def test_holm_reads_levels_at_once():
    # 0.025 / 4, / 3, / 2, / 1: the third fails, so the last, which alone would stand, falls with it
    assert stats.holm({1: 0.006, 2: 0.02, 3: 0.008, 4: 0.021}) == {1, 3}
    assert stats.holm({1: 0.02}) == {1}
    assert stats.holm({1: 0.03, 2: 0.01}) == {2}
    assert stats.holm({}) == set()


def test_chances_fit_the_interval():
    gap = stats.paired([0.004, 0.002, 0.003, 0.001, 0.005], 1000)
    assert gap.chance(gap.low) == pytest.approx(0.025, rel=1e-6)
    assert gap.chance(gap.high) == pytest.approx(0.975, rel=1e-6)
    assert stats.Gap(0.1, None, 2).chance(0.0) == 1


def test_table_sentences_and_json_have_one_verdict(records):
    """What is counted in words is what stands in the rows, and no sentence denies it."""
    for name in ("full", "draws", "noisy", "same"):
        record = records[name]
        words = [stats.verdict(record, level).word for level in range(record.config.levels + 1)]
        text = tables.table(record)
        for level, word in enumerate(words):
            assert any(
                row.split()[0] == str(level) and word in row for row in text.splitlines() if row.strip()
            ), (name, level)
        said = " ".join(text.split())
        counted = re.findall(r"(\d+) of \d+ tickets (?:is|are) winning", said)
        assert [int(n) for n in counted] == [words.count("winning")] * bool(words.count("winning"))
        rows = {row["level"]: row for row in stats.summary(record) if "verdict" in row}
        assert [rows[level]["verdict"]["word"] for level in rows] == words
        assert {level for level in rows if rows[level]["winning_at_once"]} <= {
            level for level, word in enumerate(words) if word == "winning"
        }
        near = stats.nearest_level(stats.weights_remaining(record), 0.2)
        if words[near] == "winning":
            assert "not clearly different from reinit" not in said


def test_without_reinit_a_ticket_is_matching_at_best():
    found = stats.verdict(small(arms=("ticket", "random-mask")), 1)
    assert found.word == "matching"
    assert "reinit was not run" in found.why


@pytest.mark.parametrize("arm", ["ticket", "reinit"])
def test_no_verdict_before_every_seed_is_there(arm):
    record = small()
    gone = next(p for p in record.points if (p["arm"], p["level"]) == (arm, 1))
    record = replace(record, points=[p for p in record.points if p is not gone])
    assert stats.verdict(record, 1).word == "no verdict"


def test_a_ticket_below_dense_needs_no_reinit_for_its_verdict():
    record = edit(small(), {"accuracy_at_early_stop": 0.9}, arm="ticket", level=1)
    record = replace(record, points=[p for p in record.points if p["arm"] != "reinit"])
    assert stats.verdict(record, 1).word == "below dense"


@given(st.permutations(range(5)))
def test_relabelling_the_seeds_changes_no_bit(order):
    record = FIVE
    points = [p | {"seed": order[p["seed"]]} for p in record.points]
    relabelled = replace(record, points=sorted(points, key=lambda p: p["seed"]))
    assert stats.summary(relabelled) == stats.summary(record)


FIVE = fake(seeds=(0, 1, 2, 3, 4), levels=3, reinits=2)


def test_summary_is_json_with_one_row_per_arm_and_level():
    record = fake(levels=4)
    rows = json.loads(json.dumps(stats.summary(record), allow_nan=False))
    assert len(rows) == 5 + 4 + 4
    assert [row["arm"] for row in rows if "verdict" in row] == ["ticket"] * 5
    assert rows[2]["weights_remaining"] == pytest.approx(0.64, abs=0.01)


def test_layers_are_named_when_they_are_empty():
    record = edit(small(), {"kept": {"fc1.weight": 0, "fc2.weight": 5}}, arm="random-mask", seed=1)
    assert stats.empty_layers(record, 1) == []
    assert stats.empty_layers(record, 1, "random-mask") == ["fc1"]


def test_nearest_level_is_that_of_the_paper():
    assert stats.nearest_level(stats.weights_remaining(fake()), 0.2) == 7
    assert stats.nearest_level({0: 1.0}, 0.2) is None


@pytest.mark.parametrize(
    ("seeds", "text"),
    [((0, 1, 2), "0-2"), ((5,), "5"), ((3, 4), "3,4"), ((2, 0, 1), "0-2"), ((0, 2, 4), "0,2,4")],
)
def test_seed_list(seeds, text):
    assert stats.seed_list(seeds) == text


def tables_of(text: str) -> list[list[str]]:
    """The rows of the tables of levels, those with costs left out."""
    parts = [part.splitlines() for part in text.split("\n\n")]
    found = [lines for lines in parts if any(line.startswith("level") for line in lines[:2])]
    return [lines for lines in found if not any("of dense" in line for line in lines)]


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("name", ["full", "one", "unfinished", "none", "draws", "noisy"])
def test_table_has_every_level_and_column_at_any_width(name, columns, records, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    record = records[name]
    (wide,) = tables_of(tables.table(record))
    monkeypatch.setenv("COLUMNS", str(columns))
    text = tables.table(record)
    assert max(map(len, text.splitlines())) <= columns
    found = tables_of(text)
    header = wide[next(i for i, line in enumerate(wide) if line.startswith("level"))]
    words = re.split(r"\s{2,}", header)
    shown = []
    for rows in found:
        start = next(i for i, line in enumerate(rows) if line.startswith("level"))
        assert [int(row.split()[0]) for row in rows[start + 1 :]] == list(range(record.config.levels + 1))
        shown += re.split(r"\s{2,}", rows[start])[2:]
    assert shown == words[2:]
    assert len(found) == 1 or columns < 160


def test_table_says_what_a_finished_run_shows(records):
    text = " ".join(tables.table(records["full"]).split())
    assert "lenet-300-100 on mnist, seeds 0-2, 5,000 steps of Adam" in text
    assert "iterative pruning by magnitude, 20 % a level by layer, rewound to step 0" in text
    assert " ".join(stats.rule(records["full"]).split()) in text
    assert re.search(r"\d+ of 15 tickets are winning, the smallest with [\d.]+ % of the weights", text)
    assert re.search(
        r"At 21.1 % remaining the ticket is 0.\d\d ± 0.\d\d pp above reinit and stops \d.\d\dx sooner", text
    )
    assert re.search(r"The ticket is [\d.]+ ± [\d.]+ pp above random-mask", text)
    assert "Unfinished" not in text
    for rows in tables_of(tables.table(records["full"])):
        assert tables.MISSING not in "".join(rows)


def test_table_leaves_out_what_was_not_run(records):
    text = tables.table(records["one"])
    assert "random-mask" not in text
    assert "above reinit and" not in text
    assert "1 seed: no interval" in " ".join(text.split())
    for rows in tables_of(text):
        assert "±" not in "".join(rows)


def test_table_of_an_unfinished_run_counts_its_cells(records):
    record = records["unfinished"]
    text = tables.table(record)
    assert f"Unfinished: {len(record.points)} of 138 cells are there" in text
    assert tables.MISSING in "".join(tables_of(text)[-1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"one_shot": True}, "one-shot pruning by magnitude, 20 % a level by layer, rewound to step 0"),
        ({"scope": "global", "rate": 0.35}, "iterative pruning by magnitude, 35 % a level over all layers"),
        (
            {"score": "random", "rewind": 1500},
            "pruning by random, 20 % a level by layer, rewound to step 1,500",
        ),
        ({"reinits": 3}, "rewound to step 0, 3 fresh draws"),
    ],
)
def test_how_a_run_was_pruned_stands_in_table_plan_and_list(change, says, records):
    config = replace(records["one"].config, **change)
    assert says in " ".join(tables.table(replace(records["one"], config=config)).split())
    assert says in config.title
    assert says in config.plan(load("mnist5k", Path()), 0)["pruning"]


def test_dense_costs_one_and_the_rest_a_share_of_its_own_seed(records):
    record = records["full"]
    for seed, seconds, size in ((0, 0.002, 10**6), (1, 0.004, 10**6), (2, 0.001, 2 * 10**6)):
        busy = {"step_seconds": seconds, "state_bytes": size}
        record = edit(record, busy, arm="ticket", level=0, seed=seed)
        record = edit(
            record, {"step_seconds": seconds / 4, "state_bytes": size // 10}, arm="ticket", level=9, seed=seed
        )
    found = stats.costs(record)
    assert found[0].seconds_of_dense == found[0].bytes_of_dense == [1.0, 1.0, 1.0]
    assert found[9].seconds_of_dense == pytest.approx([0.25] * 3)
    assert found[9].bytes_of_dense == pytest.approx([0.1] * 3)
    assert "wall time of a step" in " ".join(tables.table(record).split())
    timed = edit(record, {"clock": "processor"})
    assert "processor time of a step" in " ".join(tables.table(timed).split())
    (row,) = (row for row in tables.table(timed).splitlines() if re.match(r" +0 +100.0 +[\d.]+ +1", row))
    assert row.split()[3:] == ["1.000", "1,333", "1.000"]
    untimed = edit(record, {"step_seconds": None}, level=0)
    assert stats.costs(untimed) == {}
    assert "What a level costs" not in tables.table(untimed)


def test_table_warns_when_dense_was_still_improving():
    record = edit(small(), {"early_stop_step": 5000}, level=0, seed=1)
    assert "On 1 of 3 seeds dense was still improving" in tables.table(record)


@pytest.fixture(scope="module")
def records():
    full = fake()
    part = [
        p
        for p in full.points
        if p["seed"] == 0 or (p["seed"] == 1 and p["level"] < 5 and p["arm"] == "ticket")
    ]
    same = edit(fake(seeds=(3, 5, 7), levels=4), {"accuracy_at_early_stop": 0.98, "early_stop_step": 100})
    return {
        "full": full,
        "one": fake(seeds=(0,), arms=("ticket",), levels=2),
        "unfinished": replace(full, points=part),
        "none": replace(full, points=[], lines=[]),
        "dense": replace(full, points=[p for p in full.points if p["level"] == 0]),
        "draws": fake(
            "lenet5", arms=("ticket", "reinit", "random-mask", "random-reinit"), reinits=3, levels=4
        ),
        "same": same,
        "noisy": fake("lenet5", seeds=(0, 1, 2, 3, 4), levels=8, noise=0.002),
    }


@pytest.mark.parametrize("name", ["full", "one", "unfinished", "dense", "draws", "same"])
def test_figures_are_drawn(name, records, tmp_path):
    paths = figures.draw(records[name], tmp_path / "figures")
    pruned = name != "dense"  # one level is no comparison
    names = [
        "accuracy", *["differences"] * pruned, "early_stop", "curves", *["layers"] * pruned, "first_layer",
        *["cost"] * pruned, "pixels",
    ]  # fmt: skip
    assert [p.name for p in paths] == [f"{n}.{kind}" for n in names for kind in ("png", "svg")]
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir())
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            height, width, _ = image.imread(path).shape
            assert width == 660
            assert height > 300
        else:
            assert b"</svg>" in path.read_bytes()


def test_figures_drawn_again_are_the_same_bytes(records, tmp_path):
    first = figures.draw(records["one"], tmp_path / "a")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):  # as a user's matplotlibrc may
        again = figures.draw(records["one"], tmp_path / "b")
    for a, b in zip(first, again, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_nothing_is_drawn_of_nothing(records, tmp_path):
    assert figures.draw(records["none"], tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_level_axis_runs_down_from_dense_with_labels_apart():
    axes = Figure().add_subplot()
    shares = [100 * 0.8**level for level in range(21)]
    drawing.level_axis(axes, shares)
    left, right = axes.get_xlim()
    assert left > 100 > shares[-1] > right
    ticks = sorted(axes.get_xticks(), reverse=True)
    assert (ticks[0], ticks[-1]) == (100, shares[-1])
    assert 5 <= len(ticks) <= 8
    assert min(a / b for a, b in pairwise(ticks)) > (left / right) ** (1 / 8)


def lowest(axes: Axes) -> float:
    """Where the lowest point of any line lies, as a share of the height of the axes."""
    ends = [
        axes.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))[:, 1].min()
        for line in axes.lines
        if line.get_transform() == axes.transData
    ]
    return float((min(ends) - axes.bbox.y0) / axes.bbox.height)


def test_controls_far_below_are_drawn_without_squashing_the_rest():
    record = edit(fake(), {"accuracy_at_early_stop": 0.1135}, arm="random-mask", level=15)
    (axes,) = figures._accuracy(record).axes
    low, high = axes.get_ylim()
    assert low < 11.35
    assert 0 < lowest(axes) < drawing.BELOW
    at = axes.transData.transform([(50, y) for y in (98.0, 98.2)])[:, 1]
    linear = 0.2 / (high - low) * axes.bbox.height
    assert at[1] - at[0] > 10 * linear  # as much room as before for what is interesting
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert sum(tick > 95 for tick in shown) >= 3
    assert min(shown) < 60


def test_nothing_is_cut_off_and_panels_share_a_scale(records):
    for name in ("full", "draws", "one", "same"):
        fig = figures._curves(records[name])
        assert len({axes.get_ylim() for axes in fig.axes}) == 1
        assert all(0 <= lowest(axes) <= 1 for axes in fig.axes)
        assert "below" not in "".join(axes.get_title(loc="left") for axes in fig.axes)
        for make in (figures._accuracy, figures._differences, figures._early_stop, figures._cost):
            (axes,) = make(records[name]).axes
            assert 0 <= lowest(axes) <= 1


def test_what_is_near_has_one_linear_scale():
    axes = Figure().add_subplot()
    axes.plot([0, 1], [98.0, 98.3])
    drawing.all_of_it([axes], 97.0, 0.5, 100)
    assert axes.get_yscale() == "linear"
    low, high = axes.get_ylim()
    assert low < 98.0 < 98.3 < high
    assert high - low >= 0.5


def test_pixels_of_all_levels_have_one_scale(records):
    fig = mask_figures.pixels(records["full"])
    norms = {(image.norm.vmin, image.norm.vmax) for axes in fig.axes for image in axes.images}
    assert len(norms) == 1
    assert len([image for axes in fig.axes for image in axes.images]) == 4
    assert len(fig.axes) == 5  # and one bar for them
    assert norms.pop()[0] == 0


def test_survivors_of_each_layer():
    record = edit(
        fake(levels=3), {"kept": {"fc1.weight": 23520, "fc2.weight": 0, "fc3.weight": 500}}, level=2
    )
    fig = mask_figures.layers(record)
    (axes,) = fig.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["fc1", "fc2", "fc3"]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines if line.get_linestyle() != "None"}
    assert len(lines) == 3
    assert next(iter(lines.values())) == pytest.approx([80, 80, 90], abs=0.05)
    assert list(lines.values())[1] == pytest.approx([10, np.nan, 50], nan_ok=True)
    crosses = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"]
    assert [1] in crosses
    said = [" ".join(f.get_suptitle().split()) for f in (fig, mask_figures.layers(fake(levels=3)))]
    assert ["x: no weight left" in text for text in said] == [True, False]


@pytest.mark.parametrize("model", ["resnet20", "vgg19", "conv6"])
def test_names_of_many_layers_fit(model):
    with matplotlib.style.context(drawing.STYLE):
        fig = mask_figures.layers(fake(model, seeds=(0,), levels=2))
        fig.draw_without_rendering()
    boxes = [label.get_window_extent() for label in fig.axes[0].get_xticklabels() if label.get_text()]
    assert len(boxes) >= 7
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert all(fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0 for box in boxes)


def test_how_a_run_was_pruned_stands_in_every_figure(records, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(drawing, "save", lambda fig, folder, name: seen.setdefault(name, fig) and [])
    figures.draw(replace(records["full"], config=replace(records["full"].config, one_shot=True)), tmp_path)
    assert len(seen) == 8
    for fig in seen.values():
        assert "one-shot pruning by magnitude" in " ".join(fig.get_suptitle().split())


def test_winning_tickets_have_a_ring_and_differences_are_those_of_the_table():
    record = fake(seeds=(0, 1, 2, 3, 4), levels=6)
    won = [level for level in range(7) if stats.verdict(record, level).word == "winning"]
    assert won
    (axes,) = figures._accuracy(record).axes
    rings = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert len(rings) == len(won)
    (axes,) = figures._differences(record).axes
    line = next(line for line in axes.lines if line.get_label() == "minus reinit")
    gaps = [stats.compare(record, ("ticket", level), ("reinit", level)) for level in range(1, 7)]
    assert list(line.get_ydata()) == pytest.approx([100 * gap.mean for gap in gaps])
    two = figures._differences(fake(seeds=(0, 1), levels=2))
    assert "band" not in two.get_suptitle()


def test_bands_are_intervals_where_there_are_seeds_for_one():
    values = [1.0, 2.0, 6.0]
    mean, half = stats.mean_interval(values)
    assert drawing.spread(values) == (mean, mean - half, mean + half)
    assert drawing.spread([1.0, 3.0]) == (2.0, 1.0, 3.0)
    assert drawing.spread([1.0]) == (1.0, 1.0, 1.0)
    assert drawing.band_note(5) == ["band: 95 % interval of the mean"]
    assert drawing.band_note(2) == ["band: range of the seeds"]
    assert drawing.band_note(1) == []


def test_constant_networks_have_no_early_stop_to_draw():
    record = edit(fake(levels=3), {"kept": {"fc1.weight": 0}, "early_stop_step": 1}, arm="ticket", level=3)
    (axes,) = figures._early_stop(record).axes
    points = {line.get_label(): len(line.get_ydata()) for line in axes.lines}
    assert points == {"ticket": 3, "reinit": 4, "random-mask": 4, "dense": 2}
    assert "empty layer" in axes.texts[0].get_text()


def test_report_imports_neither_torch_nor_pyplot():
    code = (
        "import sys, sparselth.report.figures, sparselth.report.tables\n"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
