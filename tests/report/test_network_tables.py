"""Whole networks in words: what a table leaves out, who wins, what failed."""

from __future__ import annotations

from typing import Any

from sparselth.measure.case import Result
from sparselth.measure.memory import Memory
from sparselth.report import network_tables


def test_the_table_leaves_out_what_is_not_there() -> None:
    pair = Memory(1000, 0, 500, file=2000), Memory(100, 50, 500, file=300)
    lines = network_tables.memory_table({"inference, batch 8": pair}).splitlines()
    assert lines[0].startswith("memory, dense and pruned")
    assert [line.split() for line in lines[2:]] == [
        ["weights", "1.0", "0.1", "0.100"],
        ["indices,", "masks", "0.0", "0.1"],
        ["activations", "0.5", "0.5", "1.000"],
        ["together", "1.5", "0.7", "0.433"],
        ["stored", "file", "2.0", "0.3", "0.150"],
    ]


def row(name: str, batch: int, speedup: float, **more: Any) -> dict[str, Any]:
    return {
        "implementation": name, "batch": batch, "median_s": 1e-3 / speedup, "iqr_s": 1e-5,
        "dense_best": "dense", "dense_median_s": 1e-3, "speedup": speedup, "weight_bytes": 1000,
        "peak_bytes": None, "max_rel_error": 1e-7, "check": "passed", "noisy": False,
    } | more  # fmt: skip


def sparse(batch: int, speedup: float, **more: Any) -> dict[str, Any]:
    made = {"conversion_s": 0.5, "pays_after": 1000, "images": 2000, "differing_predictions": 0, "ties": 0}
    return row("sparselth", batch, speedup, **made | more)


def test_the_words_say_who_wins_and_what_failed() -> None:
    rows = [
        *[row("dense", 1, 1.0), row("dense compiled", 1, 9.0, max_rel_error=None, check="failed")],
        *[sparse(1, 2.0), row("dense", 64, 1.0), sparse(64, 1.01), row("dense", 256, 1.0), sparse(256, 0.5)],
    ]
    facts = {
        "run": "here",
        "network": "lenet5",
        "level": 3,
        "seed": 1,
        "kept": 0.25,
        "images": 2000,
        "data": "digits",
        "accuracy": 0.9,
        "dense_accuracy": 0.91,
        "recorded_accuracy": 0.8,
        "file_bytes": 500,
        "dense_file_bytes": 1000,
    }
    found = Result("ticket", "cpu", rows, {}, True, facts, ["no meter"])
    assert network_tables.sentences(found) == [
        "Batch 1: sparselth takes 0.500 ms, dense 1.000 ms: 2.00x; making it took 0.5 s, paid back after "
        "1,000 calls.",
        "CHECK FAILED: dense compiled at batch 1 is off by NaN from float64, 0 predictions differ; it counts "
        "for nothing.",
        "Batch 64: sparselth takes 0.990 ms, dense 1.000 ms; neither wins.",
        "Batch 256: sparselth takes 2.000 ms, dense 1.000 ms; use dense, sparselth takes 2.00 times as long.",
        "Predictions are those of the dense network with its zeros on all 2,000 images.",
        "no meter",
        "Test accuracy: dense 91.00 %, ticket 90.00 %; CHECK FAILED: the run recorded 80.00 %.",
        "Stored file: the ticket's cell 500 bytes, the dense network stored the same way 1,000, 0.500 of it.",
    ]
    lines = network_tables.report(found, "a machine").splitlines()
    assert lines[:4] == [
        "lenet5, seed 1, ticket of level 3 of here: 25 % of the weights, on 2,000 test",
        "  images of digits",
        "a machine",
        "",
    ]
    assert max(map(len, lines)) <= 80
    assert sum("FAILED" in line for line in network_tables.table(rows).splitlines()) == 1


def test_noise_names_no_winner() -> None:
    rows = [row("dense", 1, 1.0), sparse(1, 14.5, noisy=True), row("dense", 8, 1.0), sparse(8, 2.0)]
    facts = {"network": "lenet5", "kept": 0.1}
    said = network_tables.sentences(Result("model", "cpu", rows, {}, False, facts))
    assert said[0].endswith("ms; too noisy to say who wins, repeat on a quiet machine.")
    assert "2.00x" in said[1]
    lines = network_tables.table(rows, 140).splitlines()
    assert [line.count("?") for line in lines] == [0, 0, 2, 0, 0]  # the speed-up, and when it has paid
    for width in (60, 80, 140):
        assert max(map(len, network_tables.table(rows, width).splitlines())) <= width
        assert ("pays after" in network_tables.table(rows, width)) == (width == 140)
        assert ("pays after" in network_tables.legend(width)) == (width != 140)


def test_weights_that_wake_in_a_step_are_said() -> None:
    facts = {"network": "lenet5", "kept": 0.1, "dead_are_zero": False}
    rows = [row("torch", 60, 1.0), row("sparselth", 60, 2.0, pays_after=None, check="failed")]
    said = network_tables.sentences(Result("training", "cpu", rows, {}, True, facts))
    assert said[1] == "CHECK FAILED: pruned weights or their moments are not zero after these steps."
    assert said[2].startswith("CHECK FAILED: sparselth at batch 60 is off by 1.0e-07 from float64")
    assert "images" not in " ".join(said)


def test_ours_where_it_is_wrong_wins_nothing() -> None:
    rows = [row("dense", 1, 1.0), sparse(1, 3.0, check="failed", fault="off")]
    facts = {"network": "net", "kept": 0.1, "mask": "random mask"}
    first, second = network_tables.sentences(Result("module", "cpu", rows, {}, True, facts))
    assert first == "Batch 1: sparselth takes 0.333 ms, dense 1.000 ms, and is wrong: use dense."
    assert second.startswith("CHECK FAILED: sparselth at batch 1")
