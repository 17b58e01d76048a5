"""The report says of a made-up run what was put into it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from matplotlib.figure import Figure

from sparselth.experiments.imp import ImpConfig
from sparselth.models import get_model
from sparselth.report import figures, stats, tables
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
    return FakeRecord(Path("run"), config, points, evaluations)


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
    ("df", "quantile"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (4, 2.7764),
        (9, 2.2622),
        (30, 2.0423),
        (31, 2.0395),
        (60, 2.0003),
        (120, 1.9799),
    ],
)
def test_t_quantile_has_the_tabled_values(df, quantile):
    assert stats.t_quantile(df) == pytest.approx(quantile, abs=6e-5)


def test_t_quantiles_fall_to_that_of_the_normal_law():
    quantiles = [stats.t_quantile(df) for df in range(1, 200)]
    assert all(a > b for a, b in pairwise(quantiles))
    assert stats.t_quantile(10**9) == pytest.approx(1.959964)


def test_interval_of_known_values():
    mean, half = stats.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5)
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


@pytest.mark.parametrize(
    ("change", "where", "word", "why"),
    [
        ({}, {}, "winning", "above it on 3 of 3 seeds"),
        ({"accuracy_at_early_stop": 0.978}, {"arm": "ticket", "level": 1}, "winning", "-0.20"),
        ({"accuracy_at_early_stop": 0.9779}, {"arm": "ticket", "level": 1}, "below dense", "-0.21"),
        ({"early_stop_step": 901}, {"arm": "ticket", "level": 1, "seed": 0}, "matching", "against 900"),
        ({"accuracy_at_early_stop": 0.981}, {"arm": "reinit"}, "matching", "on 0 of 3 seeds"),
        ({"accuracy_at_early_stop": 0.985}, {"arm": "reinit", "seed": 2}, "matching", "on 2 of 3 seeds"),
        ({"kept": {"fc1.weight": 9, "fc2.weight": 0}}, {"arm": "ticket", "seed": 1}, "below dense", "fc2"),
        ({"accuracy_at_early_stop": 0.113}, {}, "no verdict", "guesses"),
    ],
)
def test_verdict(change, where, word, why):
    found = stats.verdict(edit(small(), change, **where), 1)
    assert found.word == word
    assert why in found.why


def test_many_seeds_win_by_the_interval_though_one_seed_is_behind():
    record = small(seeds=tuple(range(8)))
    for seed in range(8):
        record = edit(record, {"accuracy_at_early_stop": 0.975 + seed * 1e-4}, arm="reinit", seed=seed)
    assert (
        stats.verdict(edit(record, {"accuracy_at_early_stop": 0.9811}, arm="reinit", seed=3), 1).word
        == "winning"
    )
    assert (
        stats.verdict(edit(record, {"accuracy_at_early_stop": 0.9999}, arm="reinit", seed=3), 1).word
        == "matching"
    )


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


def rows_of(text: str) -> list[str]:
    return text.split("\n\n")[1].splitlines()


@pytest.mark.parametrize("name", ["full", "one", "unfinished", "none", "draws"])
def test_table_has_every_level_in_columns_that_fit(name, records):
    record = records[name]
    rows = rows_of(tables.table(record))
    assert len({len(row) for row in rows}) == 1
    assert [int(row.split()[0]) for row in rows[2:]] == list(range(record.config.levels + 1))
    if len(record.config.arms) <= 3:
        assert max(map(len, tables.table(record).splitlines())) <= 100


def test_table_says_what_a_finished_run_shows(records):
    text = " ".join(tables.table(records["full"]).split())
    assert "lenet-300-100 on mnist, seeds 0-2, 5,000 steps of Adam" in text
    assert " ".join(stats.RULE.split()) in text
    assert re.search(r"\d+ of 15 tickets are winning, the smallest with [\d.]+ % of the weights", text)
    assert re.search(
        r"At 21.1 % remaining the ticket is 0.\d\d ± 0.\d\d pp above reinit and stops \d.\d\dx sooner", text
    )
    assert re.search(r"The ticket is [\d.]+ ± [\d.]+ pp above random-mask", text)
    assert "Unfinished" not in text
    assert tables.MISSING not in "".join(rows_of(tables.table(records["full"])))


def test_table_leaves_out_what_was_not_run(records):
    text = tables.table(records["one"])
    assert "random-mask" not in text
    assert "above reinit and" not in text
    assert "One seed" in text
    assert "±" not in "".join(rows_of(text))


def test_table_of_an_unfinished_run_counts_its_cells(records):
    record = records["unfinished"]
    text = tables.table(record)
    assert f"Unfinished: {len(record.points)} of 138 cells are there" in text
    assert tables.MISSING in "".join(rows_of(text))


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
    same = edit(fake(seeds=(3, 5), levels=4), {"accuracy_at_early_stop": 0.98, "early_stop_step": 100})
    return {
        "full": full,
        "one": fake(seeds=(0,), arms=("ticket",), levels=2),
        "unfinished": replace(full, points=part),
        "none": replace(full, points=[], evaluations=[]),
        "dense": replace(full, points=[p for p in full.points if p["level"] == 0]),
        "draws": fake(
            "lenet5", arms=("ticket", "reinit", "random-mask", "random-reinit"), reinits=3, levels=4
        ),
        "same": same,
    }


@pytest.mark.parametrize("name", ["full", "one", "unfinished", "dense", "draws", "same"])
def test_figures_are_drawn(name, records, tmp_path):
    paths = figures.draw(records[name], tmp_path / "figures")
    cost = ("cost",) * (name != "dense")  # one level is no comparison
    names = ("accuracy", "early_stop", "curves", "first_layer", *cost, "pixels")
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
    figures._level_axis(axes, shares)
    left, right = axes.get_xlim()
    assert left > 100 > shares[-1] > right
    ticks = sorted(axes.get_xticks(), reverse=True)
    assert (ticks[0], ticks[-1]) == (100, shares[-1])
    assert 5 <= len(ticks) <= 8
    assert min(a / b for a, b in pairwise(ticks)) > (left / right) ** (1 / 8)


def test_lines_that_would_squash_the_figure_are_cut_and_named():
    record = edit(fake(), {"accuracy_at_early_stop": 0.1135}, arm="random-mask", level=15)
    (axes,) = figures._accuracy(record).axes
    assert axes.get_ylim()[0] > 90
    assert "random-mask falls to 11.3 %" in [text.get_text() for text in axes.texts]


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
