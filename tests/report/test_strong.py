"""What is said of a run of `strong`: means by arm, differences by seed, honest bytes; and its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparselth.config import Cell
from sparselth.experiments.strong import StrongConfig
from sparselth.report.strong import gap, mean, summary, table, values
from sparselth.report.strong_figures import draw
from sparselth.runs import RunRecord

# by arm: accuracy on seeds 0 to 2 at shares 0.1, 0.5 and 0.9, and bytes
FOUND: dict[str, list[tuple[list[float], int]]] = {
    "ticket": [([0.80, 0.82, 0.81], 15_000), ([0.96, 0.97, 0.965], 33_000), ([0.90, 0.91, 0.92], 15_000)],
    "random-mask": [([0.1, 0.1, 0.1], 15_000)] * 3,
    "dense": [([0.98, 0.981, 0.979], 1_066_000)],
    "imp": [([0.97, 0.971, 0.972], 120_000), ([0.98, 0.981, 0.979], 567_000), ([0.98, 0.98, 0.98], 975_000)],
}


def made(arms: tuple[str, ...] = ("ticket", "random-mask", "dense", "imp"), **changes: Any) -> RunRecord:
    """A run of three shares on three seeds, with the numbers of FOUND."""
    config = StrongConfig(dataset="mnist", device="cpu", keep=(0.1, 0.5, 0.9), arms=arms, **changes)
    points, lines = [], []
    for cell in config.cells():
        if cell.draw:
            continue
        accuracies, size = FOUND[cell.arm][cell.level % 3]
        width, keep = config.point(cell)
        kept = keep if cell.arm != "dense" else 1.0
        points.append(
            {
                **vars(cell),
                "method": config.method,
                "width": width,
                "keep": keep,
                "weights_remaining": kept,
                "final_accuracy": accuracies[cell.seed],
                "accuracy_at_early_stop": accuracies[cell.seed],
                "coded_bytes": size,
                "file_bytes": size + 600,
            }
        )
        lines += [
            {**vars(cell), "step": step, "validation_accuracy": accuracies[cell.seed] - 0.1 / step}
            for step in (1, 2, 3)
            if cell.arm != "random-mask"
        ]
    record = RunRecord(Path("run"), config, points, [])
    record.__dict__["evaluations"] = lines
    return record


def test_means_and_differences_by_seed() -> None:
    record = made()
    assert values(record, "ticket", 1) == {0: 0.96, 1: 0.97, 2: 0.965}
    assert values(record, "dense", 2) == values(record, "dense", 0) == {0: 0.98, 1: 0.981, 2: 0.979}
    assert mean(record, "ticket", 1) == pytest.approx(0.965)
    found = gap(record, 1, "dense")
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(-0.015), 3)
    assert found.half == pytest.approx(4.303 * 0.0045826 / 3**0.5, rel=1e-3)


def test_the_table_and_its_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = table(made())
    assert "    1    50.0    50.0   96.50 ± 1.24  33.0" in text
    flat = " ".join(text.split())
    for said in (
        "The best strong ticket, 50.0 % kept, is right on 96.50 % of the test images without",
        "-1.50 ± 1.14 pp against the trained network",
        "Over the share kept it rises and falls: 96.50 % at 50.0, 81.00 % at 10.0 and 91.00 % at 90.0.",
        "Seed and mask take 33.0 KB; the smallest trained ticket of this run that is as accurate "
        "(97.10 %, 10.0 % of the weights) takes 120.0 KB, 3.6 times as much.",
    ):
        assert said in flat
    assert "of the same width" not in flat


def test_what_was_not_run_is_not_mentioned() -> None:
    record = made(arms=("ticket",))
    flat = " ".join(table(replace(record, points=record.points[:4])).split())
    assert "Unfinished: 4 of 9 cells are there" in flat
    for word in ("dense", "against", "KB;", "trained ticket"):
        assert word not in flat.partition("keep %: weights")[2].partition("missing. ")[2]
    empty = table(replace(record, points=[]))
    assert "0 of 9 cells are there" in empty


def test_widths_are_compared_with_dense_of_their_own() -> None:
    flat = " ".join(table(made(width=(0.5, 1.0))).split())
    assert (
        "Against the trained network of the same width: -1.50 ± 1.14 pp at 0.5, -1.50 ± 1.14 pp at 1." in flat
    )
    assert "The best strong ticket, width 0.5 and 50.0 % kept," in flat


def test_the_summary_is_json() -> None:
    rows = json.loads(json.dumps(summary(made())))
    assert [row["keep"] for row in rows] == [0.1, 0.5, 0.9]
    assert rows[1]["arms"]["ticket"] == {
        "seeds": 3,
        "accuracy": pytest.approx(0.965),
        "half_width": pytest.approx(0.01242, rel=1e-3),
        "file_bytes": 33_600,
        "coded_bytes": 33_000,
        "ticket_minus": None,
    }
    assert rows[1]["arms"]["dense"]["ticket_minus"]["mean"] == pytest.approx(-0.015)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"width": (0.5, 1.0)}, {"kept", "width", "bytes", "learning"}),
        ({"arms": ("ticket",)}, {"kept", "learning"}),
    ],
)
def test_figures_are_drawn_where_there_is_something_to_see(
    changes: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    record = replace(made(**changes), path=tmp_path)
    record.__dict__["evaluations"] = made(**changes).evaluations
    (tmp_path / "cells.jsonl").write_text("")
    written = draw(record, tmp_path / "figures")
    assert {file.name for file in written} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert draw(record, tmp_path / "figures") == []  # they are there


def test_a_plan_says_what_is_swept() -> None:
    config = made(width=(0.5, 1.0)).config
    assert config.about(Cell(0, "ticket", 4)) == "width 1, 50 %"
    assert config.about(Cell(0, "imp", 3, 2)) == "width 1, 10 %, round 2 of 4"
    assert config.how == "edge-popup, signed-constant weights, ranked by layer"
    assert replace(config, method="iterand", every=300, redraw=0.1).how.endswith(
        "ranked by layer, 10 % redrawn every 300 steps"
    )
