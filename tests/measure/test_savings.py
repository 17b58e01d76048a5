"""What a level saves: counts by hand, times beside dense, words, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import tickets
from sparselth.clock import Timing
from sparselth.config import Cell
from sparselth.measure.savings import _timed, flops, savings
from sparselth.models import get_model
from sparselth.report.savings import sentence, table
from sparselth.runs import RunRecord, cell_path

Cli = Callable[..., tuple[int, str, str]]


def test_flops_are_two_a_kept_weight_and_place() -> None:
    model = get_model("lenet5")
    mask = model.params.full_mask().numpy()
    weights = np.random.default_rng(0).normal(size=model.params.size).astype(np.float32)

    def ticket() -> tickets.RunTicket:
        where = {"cell": "seed0-ticket-00", "model": "lenet5", "dataset": "mnist"}
        return tickets.RunTicket(model, where, tickets.Content(mask, weights), weights, Path("none"))

    x = torch.zeros(1, 1, 28, 28)
    dense = 2 * (150 * 28 * 28 + 2400 * 10 * 10 + 48_000 + 10_080 + 840)
    assert flops(ticket(), x) == dense
    conv2 = model.params.weights[1]
    mask[conv2.offset : conv2.offset + 1000] = False
    assert flops(ticket(), x) == dense - 2 * 1000 * 10 * 10


def test_counts_are_those_of_the_files(finished: Callable[..., RunRecord], cli: Cli) -> None:
    record = finished("--levels", "2", "--arms", "ticket")
    rows = savings(record, batch=8)
    assert [row["level"] for row in rows] == [0, 1, 2]
    params = record.config.network.params
    for row in rows:
        file = cell_path(record.path, Cell(0, "ticket", row["level"]))
        kept = int(tickets.read(file, params)[0].mask.sum())
        assert row["parameters"] == kept + 410
        assert row["flops"] == 2 * kept
        assert row["check"] == "passed"
        assert row["inference_seconds"] > 0
        if row["level"]:
            assert row["file_bytes"] == pytest.approx(file.stat().st_size, abs=64)
        point = next(p for p in record.points if (p["seed"], p["level"]) == (0, row["level"]))
        assert (row["step_seconds"], row["state_bytes"]) == (point["step_seconds"], point["state_bytes"])
    assert rows[0]["inference_of_dense"] == 1.0
    assert rows[0]["file_bytes"] < cell_path(record.path, Cell(0, "ticket", 0)).stat().st_size / 1.9

    document = json.loads(cli("show", "run", "--savings", "--json")[1])
    assert document["schema"] == "sparselth.savings/1"
    assert [row["parameters"] for row in document["rows"]] == [row["parameters"] for row in rows]
    out = cli("show", "run", "--savings")[1]
    assert "inference of 64" in out
    assert "266,610" in out


def row(level: int, **values: Any) -> dict[str, Any]:
    whole = {"level": level, "seed": 0, "weights_remaining": 0.5**level, "parameters": 100, "flops": 1000}
    whole |= {
        "step_seconds": 1e-3,
        "state_bytes": 4000,
        "file_bytes": 500,
        "final_accuracy": 0.9,
        "batch": 64,
    }
    return whole | {"inference_seconds": 1e-4, "inference_of_dense": 1.0, "noisy": False} | values


def test_words_and_doubts() -> None:
    half = {"parameters": 50, "flops": 400, "file_bytes": 300, "step_seconds": 6e-4, "final_accuracy": 0.895}
    rows = [row(0), row(1, **half, inference_seconds=7e-5, inference_of_dense=0.7, noisy=True)]
    text = sentence(rows)
    assert "0.500 of the parameters, 0.400 of the FLOPs and 0.600 of the file, 0.60 of the time" in text
    assert "0.70 of the time of inference (within noise); its accuracy is -0.50 pp from dense" in text
    assert "0.700?" in table(rows, "title")
    failed = row(
        1, **half, inference_seconds=None, inference_of_dense=None, noisy=True, check="failed", why="off"
    )
    assert "CHECK FAILED: level 1: off" in table([row(0), failed], "title")
    assert "nothing is saved yet" in sentence([row(0)])


def test_times_stand_beside_dense_at_its_best() -> None:
    best, slow = Timing(1e-4, 0.99e-4, 1.01e-4, 50), Timing(2e-4, 1.99e-4, 2.01e-4, 50)
    assert _timed(slow, best, dense=True)["inference_of_dense"] == 1.0
    found = _timed(slow, best, dense=False)
    assert (found["inference_of_dense"], found["noisy"]) == (2.0, False)
    assert _timed(None, best, dense=False)["inference_seconds"] is None
    assert _timed(Timing(0.9e-4, 0.5e-4, 3e-4, 20), best, dense=False)["noisy"]


def test_another_experiment_has_none(finished: Callable[..., RunRecord], cli: Cli) -> None:
    finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    assert cli("predict", "run", "--at", "5", "--out", "said", "--quiet")[0] == 0
    for flag in ("masks", "savings"):
        code, out, err = cli("show", "said", f"--{flag}")
        assert (code, out) == (2, "")
        assert f"said: is a run of predict; --{flag} is for runs of imp" in err
