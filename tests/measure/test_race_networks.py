"""Whole networks: the ticket of a small run, random masks, a training step; and every check can fail."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselth import data, runs
from sparselth.check import Checked
from sparselth.cli.main import run as command
from sparselth.config import Cell
from sparselth.engine.dense import Network, init_weights
from sparselth.errors import SparselthError, UsageError
from sparselth.files import joined, plain, sealed, sealed_line
from sparselth.measure import case, contenders, outside, race_networks, training
from sparselth.measure.case import Result
from sparselth.measure.race_networks import bench_model, bench_run
from sparselth.measure.training import bench_training
from sparselth.models import get_model
from sparselth.models.torch import sequential
from sparselth.report import network_tables

MODEL = "lenet-300-100"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two seeds and three levels; torch.compile, which takes 20 seconds, gives back what it gets."""
    place = tmp_path_factory.mktemp("networks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place))
        patch.setattr(contenders, "compiled", lambda net: net)
        patch.setattr(outside, "need", nothing_installed)
        patch.setattr(case, "REST", 0.0)
        words = f"imp --model {MODEL} --dataset mnist5k --steps 60 --levels 3 --rate 0.5 --seeds 0-1"
        assert command([*words.split(), "--arms", "ticket", "--quiet", "--out", str(place / "run")]) == 0
        yield place


def nothing_installed(*packages: str) -> None:
    """Exports and other runtimes have tests of their own."""
    raise SparselthError(f"{packages[0]} is not installed")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def quiet(line: str) -> None:
    assert line
    assert "\n" not in line


def ticket(run: Path, level: int | None = None, seed: int | None = None, *batches: int) -> Result:
    return bench_run(run, level, seed, batches or (16,), None, quiet)


def text(result: Result) -> str:
    return " ".join(network_tables.report(result, "this machine").split())


def only(result: Result, implementation: str) -> dict[str, Any]:
    (row,) = (row for row in result.rows if row["implementation"] == implementation)
    return row


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return ticket(folder / "run", None, None, 1, 16)


def test_a_ticket_beside_its_dense_network(folder: Path, result: Result) -> None:
    record = runs.read(folder / "run")
    point = next(p for p in record.points if (p["seed"], p["level"]) == (0, 3))
    json.dumps(result.rows, allow_nan=False)
    assert not result.failed
    assert {row["batch"] for row in result.rows} == {1, 16}
    for row in result.rows:
        assert row["check"] == "passed"
        assert row["max_rel_error"] < 1e-5
        assert row["level"] == 3
        assert row["test_accuracy"] == pytest.approx(point["final_accuracy"], abs=1e-3)
        assert row["speedup"] == row["dense_median_s"] / row["median_s"]
        assert row["dense_median_s"] == next(
            other["median_s"]
            for other in result.rows
            if other["implementation"] == row["dense_best"] and other["batch"] == row["batch"]
        )
    sparse = [row for row in result.rows if row["implementation"] == "sparselth"]
    cell = runs.cell_path(folder / "run", Cell(0, "ticket", 3))
    for row in sparse:
        assert row["images"] == 1000
        assert row["differing_predictions"] <= row["ties"]
        assert row["sparsity"] == pytest.approx(1 - point["weights_remaining"], abs=1e-4)
        assert row["file_bytes"] == cell.stat().st_size
        assert row["weight_bytes"] < row["peak_bytes"]
        assert row["conversion_s"] > 0
    assert all(isinstance(row["noisy"], bool) and row["samples"] >= 5 for row in result.rows)
    parameters = sum(4 * s.numel for s in get_model(MODEL).weights + get_model(MODEL).biases)
    dense = [row for row in result.rows if row["implementation"] == "dense"]
    assert {row["weight_bytes"] for row in dense} == {parameters}
    assert all(parameters < row["file_bytes"] < parameters + 2000 for row in dense)
    # the widest moment: 300 units before and behind a ReLU
    assert all(row["peak_bytes"] == parameters + row["batch"] * 4 * 2 * 300 for row in dense)


def test_the_text_says_it_in_words(result: Result) -> None:
    said = text(result)
    for part in (
        "seed 0, ticket of level 3",
        "1,000 test images of 5,000 digits of MNIST",
        "memory, dense and pruned",
        "training, batch 60",
        "Batch 1: sparselth takes",
        "Batch 16: sparselth takes",
        "Test accuracy: dense",
        "Stored file: the ticket's cell",
    ):
        assert part in said
    assert "FAILED" not in said


def test_what_there_is_can_be_kept_behind_every_batch_size(folder: Path) -> None:
    kept: list[Result] = []
    found = bench_run(folder / "run", None, None, (2, 4), None, quiet, keep=kept.append)
    assert [{row["batch"] for row in one.rows} for one in kept] == [{2}, {2, 4}]
    assert kept[0].rows == found.rows[: len(kept[0].rows)]
    assert "accuracy" not in kept[1].facts
    said = text(kept[0])
    assert "Batch 2: sparselth takes" in said
    assert "Test accuracy" not in said


def test_level_and_seed_choose_the_cell(folder: Path) -> None:
    found = ticket(folder / "run", 1, 1)
    row = only(found, "sparselth")
    assert (row["level"], row["seed"]) == (1, 1)
    assert 0.4 < row["sparsity"] < 0.51
    assert not found.failed


def broken(model: nn.Sequential, off: float) -> nn.Sequential:
    with torch.no_grad():
        model[-1].bias += off * torch.arange(10)  # type: ignore[union-attr, operator]
    return model


def test_other_predictions_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = race_networks.sparse.convert
    monkeypatch.setattr(
        race_networks.sparse, "convert", lambda model, masks, x: convert(broken(model, 3.0), masks, x)
    )
    monkeypatch.setattr(race_networks, "_check", lambda y, net, x: Checked(0.0, 1.0, 0.0, 1.0))
    found = ticket(folder / "run")
    assert found.failed
    assert only(found, "sparselth")["check"] == "failed"
    assert only(found, "sparselth")["differing_predictions"] > 100
    assert only(found, "dense")["check"] == "passed"
    assert "CHECK FAILED: sparselth at batch 16" in text(found)


@pytest.mark.parametrize("wrong", [float("nan"), 0.0, 1.0])
def test_a_wrong_rival_is_nobodys_best(folder: Path, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((16, 10), wrong)
    monkeypatch.setattr(contenders, "compiled", lambda net: lambda x: logits.clone())
    found = ticket(folder / "run")
    assert found.failed
    row = only(found, "dense compiled")
    assert row["check"] == "failed"
    assert row["max_rel_error"] is None if wrong != wrong else row["max_rel_error"] > 0.1
    assert {row["dense_best"] for row in found.rows} <= {"dense", "onnxruntime"}
    assert only(found, "sparselth")["check"] == "passed"
    json.dumps(found.rows, allow_nan=False)


def test_one_logit_that_is_off_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By twice what is allowed of the largest, in one image of sixteen."""

    def compiled(net: nn.Module) -> Any:
        def run(x: Tensor) -> Tensor:
            y: Tensor = net(x)
            y[3, 4] += 2e-5 * float(y.abs().max())
            return y

        return run

    monkeypatch.setattr(contenders, "compiled", compiled)
    found = ticket(folder / "run")
    assert found.failed
    assert only(found, "dense compiled")["check"] == "failed"
    assert only(found, "dense")["check"] == "passed"


def test_another_accuracy_than_the_recorded_fails(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "cells.jsonl").read_text().splitlines()]
    for line in lines:
        line["final_accuracy"] -= 0.01
    (copy / "cells.jsonl").write_bytes(joined(sealed_line(plain(line)) for line in lines))
    found = ticket(copy)
    assert found.failed
    assert "CHECK FAILED: the run recorded" in text(found)


def test_what_is_not_there_is_said_in_one_line(
    folder: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (copy / "cells.jsonl").read_text().splitlines(keepends=True)
    (copy / "cells.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["seed"] == 0 and json.loads(line)["level"] < 3)
    )
    cases: list[tuple[type[SparselthError], str, Any]] = [
        (UsageError, "`level` 4: expected 1 to 3", lambda: ticket(folder / "run", 4)),
        (UsageError, "`level` 0: expected 1 to 3", lambda: ticket(folder / "run", 0)),
        (UsageError, "`seed` 7: expected one of 0, 1", lambda: ticket(folder / "run", None, 7)),
        (UsageError, "`batch` 0: expected 1", lambda: ticket(folder / "run", None, None, 0)),
        (SparselthError, "level 3 is not finished; go on with", lambda: ticket(copy, 3)),
        (SparselthError, "level 1 is not finished; go on with", lambda: ticket(copy, None, 1)),
        (SparselthError, "not a run folder", lambda: ticket(tmp_path / "nothing")),
        (UsageError, "did you mean 'lenet5'", lambda: bench_model("lenet6", 0.9, [1], quiet)),
        (UsageError, "did you mean 'conv4'", lambda: bench_training("conv44", 0.9, 1, quiet)),
        (UsageError, "`sparsity` 1: expected", lambda: bench_model(MODEL, 1.0, [1], quiet)),
        (UsageError, "`sparsity` -0.1: expected", lambda: bench_training(MODEL, -0.1, 1, quiet)),
        (UsageError, "`batch` 0: expected 1", lambda: bench_training(MODEL, 0.9, 0, quiet)),
    ]
    for kind, words, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert only(ticket(copy), "sparselth")["level"] == 2  # the last that is finished

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(sealed(config | {"dataset": "mnist"})))
    done = [plain(json.loads(line)) for line in (copy / "cells.jsonl").read_text().splitlines()]
    for line in done:
        line["proof"]["config"] = runs.read_config(copy).digest
    (copy / "cells.jsonl").write_bytes(joined(sealed_line(line) for line in done))

    def offline(name: str, place: Path) -> None:
        raise SparselthError("cannot download")

    monkeypatch.setattr(data, "fetch", offline)
    with pytest.raises(SparselthError, match="cannot download"):
        bench_run(copy, 2, 0, [1], tmp_path, quiet)


@pytest.mark.parametrize("name", ["lenet5", "lenet-300-100"])
def test_sequential_computes_what_the_model_does(name: str) -> None:
    model = get_model(name)
    flat = init_weights(model, torch.Generator().manual_seed(0))
    flat[model.params.mask_size :] = torch.randn(model.params.size - model.params.mask_size)
    x = torch.randn(3, *model.input)
    expected = Network(model, flat[None], 3).forward(x.flatten(1).T[None])[0].T
    with torch.no_grad():
        torch.testing.assert_close(sequential(model, flat)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_with_a_random_mask() -> None:
    found = bench_model("lenet5", 0.9, [4], quiet)
    assert not found.failed
    assert {"dense", "dense channels-last", "dense compiled"} <= {row["implementation"] for row in found.rows}
    row = only(found, "sparselth")
    model = get_model("lenet5")
    assert row["sparsity"] == pytest.approx(
        1 - sum(round(0.1 * s.numel) for s in model.weights) / model.params.prunable, abs=1e-4
    )
    assert row["images"] == race_networks.CHECKED
    json.dumps(found.rows, allow_nan=False)


@pytest.mark.parametrize("name", ["lenet5", "lenet-300-100"])
def test_a_step_of_training(name: str) -> None:
    found = bench_training(name, 0.95, 16, quiet)
    assert not found.failed, text(found)
    ours, torchs = only(found, "sparselth"), only(found, "torch")
    model = get_model(name)
    parameters = sum(4 * s.numel for s in model.weights + model.biases)
    assert torchs["weight_bytes"] == torchs["gradient_bytes"] == parameters
    assert torchs["optimizer_bytes"] == 2 * parameters + 4 * 2 * len(model.weights)  # and their counts
    assert ours["gradient_bytes"] < 0.2 * parameters
    assert 2 * ours["gradient_bytes"] == ours["optimizer_bytes"]
    assert only(found, "sparselth dense")["gradient_bytes"] >= parameters
    json.dumps(found.rows, allow_nan=False)


@pytest.mark.parametrize("by", [1 + 1e-3, math.nan])
def test_a_wrong_gradient_fails(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = training._gradient
    monkeypatch.setattr(training, "_gradient", lambda *a: right(*a) * by)
    found = bench_training(MODEL, 0.9, 16, quiet)
    assert {row["check"] for row in found.rows} == {"failed"}
    assert found.failed
    errors = [row["max_rel_error"] for row in found.rows]
    assert errors == [pytest.approx(1e-3, rel=0.1) if math.isfinite(by) else None] * len(errors)


def test_a_woken_weight_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    step = training._our_step

    def woken(*a: Any) -> training.Step:
        made = step(*a)
        made.dead_are_zero = lambda: False
        return made

    monkeypatch.setattr(training, "_our_step", woken)
    found = bench_training(MODEL, 0.9, 16, quiet)
    assert found.failed
    assert only(found, "sparselth")["check"] == "failed"
    assert only(found, "torch")["check"] == "passed"


def test_pruned_weights_that_wake_are_found() -> None:
    model = get_model(MODEL)
    made, resident = case.random_case(model, 0.5), training._training_images(model)
    recipe = training.Recipe(steps=10, lr=1e-3, batch_size=16)
    asleep = training._our_step(model, made.pruned, made.mask, recipe, resident, {})
    awake = training._our_step(model, made.dense, made.mask, recipe, resident, {})
    assert asleep.dead_are_zero()
    assert not awake.dead_are_zero()


def test_predictions_differ_only_where_classes_do_not_tie() -> None:
    expected = torch.tensor([[1.0, 2.0], [1.0, 1.0 + 4e-6], [0.0, 5.0], [3.0, 1.0]])
    logits = torch.tensor([[1.0, 2.0], [1.0 + 4e-6, 1.0], [float("nan"), 5.0], [1.0, 3.0]])
    assert race_networks._differing(logits, expected, 1e-5) == (3, 1)


@pytest.mark.science
def test_torch_compile_is_a_rival() -> None:
    code = (
        "import torch; from torch import nn; from sparselth.measure import contenders, race_networks\n"
        "net, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval(), torch.randn(3, 8)\n"
        "with torch.no_grad():\n"
        "    given = contenders.Given.of(net, x)\n"
        "    found = contenders._compiled(contenders.Field(net, given)).bind(given)()\n"
        "    torch.testing.assert_close(found, net(x))\n"
        "assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_rival_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*a: object, **k: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(contenders, "compiled", no_compiler)
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    ready, notes = race_networks._dense_rivals(net, torch.zeros(1, 2))
    assert [*ready] == ["dense"]
    assert notes == [
        "dense compiled is not among the rivals: no C++ compiler",
        "onnxruntime is not among the rivals: onnxruntime is not installed",
        "openvino is not among the rivals: openvino is not installed",
    ]
