"""Whole neurons beside weights and random features: gradients, bounds, what cells keep, mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import tickets
from sparselth.config import Cell
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.experiments import neuron_scores, single_relu
from sparselth.experiments.neurons import NeuronsConfig
from sparselth.files import load_arrays
from sparselth.frozen import METHODS, weights_of
from sparselth.models import get_model
from sparselth.params import matrix
from sparselth.report.neurons import draw as draw_figures
from sparselth.runs import RunRecord, cell_path, read

Cli = Callable[..., tuple[int, str, str]]
DIGITS = load("mnist5k", Path())
WORDS = "neurons --dataset mnist5k --seeds 0 --steps 60 --eval-every 30 --workers 1 --quiet"


def drawn(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    """Hidden and output weights, the target x_1, and a generator."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)), draw.standard_normal(n), np.eye(d)[0], draw


# ---- a single ReLU, exactly


def test_products_are_expectations() -> None:
    hidden, _, target, draw = drawn(4, 5)
    x = draw.standard_normal((400_000, 5))
    outputs = np.maximum(x @ np.concatenate([hidden, target[None]]).T, 0)
    expected = outputs.T @ outputs / len(x)
    found = single_relu.products(hidden, np.concatenate([hidden, target[None]]))
    np.testing.assert_allclose(found, expected[:4], rtol=0.03, atol=0.03)
    np.testing.assert_allclose(np.diag(found), (hidden**2).sum(1) / 2)


def test_the_error_of_a_network_is_that_of_samples() -> None:
    hidden, output, target, draw = drawn(6, 5)
    x = draw.standard_normal((300_000, 5))
    values, right = np.maximum(x @ hidden.T, 0) @ output, np.maximum(x @ target, 0)
    best = (values @ right) / (values @ values)
    expected = ((best * values - right) ** 2).mean() / (right**2).mean()
    assert single_relu.error(hidden, output, target) == pytest.approx(expected, abs=0.01)
    assert single_relu.error(hidden, -3 * output, target) == pytest.approx(
        single_relu.error(hidden, output, target)
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_of_neurons_is_nearer_than_random_features(seed: int) -> None:
    hidden, output, target, draw = drawn(9, 6, seed)
    bound = single_relu.random_features(hidden, target)
    found, mask = single_relu.neurons(hidden, output, target, draw)
    every = [
        single_relu.error(hidden, output * np.array(kept), target)
        for kept in itertools.product((0, 1), repeat=9)
    ]
    assert bound < min(every) <= found + 1e-12
    assert found == pytest.approx(single_relu.error(hidden, output * mask, target))
    assert found <= np.quantile(every, 0.1)  # the scores are trained, not drawn
    wider = np.concatenate([hidden, draw.standard_normal((3, 6))])
    assert single_relu.random_features(wider, target) < bound


def test_random_features_are_least_squares() -> None:
    hidden, _, target, draw = drawn(7, 4)
    x = draw.standard_normal((300_000, 4))
    outputs, right = np.maximum(x @ hidden.T, 0), np.maximum(x @ target, 0)
    fitted, *_ = np.linalg.lstsq(outputs, right, rcond=None)
    expected = ((outputs @ fitted - right) ** 2).mean() / (right**2).mean()
    assert single_relu.random_features(hidden, target) == pytest.approx(expected, abs=0.01)
    for angle in (0.3, 1.2):  # as hard in any direction, whose weights have the same law
        turned = np.array([np.cos(angle), np.sin(angle), 0, 0])
        rotation = np.eye(4)
        rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        assert single_relu.random_features(hidden @ rotation.T, turned) == pytest.approx(
            single_relu.random_features(hidden, target)
        )


@pytest.mark.parametrize("kind", ["neurons", "weights"])
def test_gradients_are_differences(kind: str) -> None:
    hidden, output, target, draw = drawn(5, 4)
    make = single_relu.neuron_slope if kind == "neurons" else single_relu.weight_slope
    slope = make(hidden, output, target)
    masks = (
        [0.5 + draw.random((5,))]
        if kind == "neurons"
        else [0.5 + draw.random((5, 4)), 0.5 + draw.random((5,))]
    )
    _, grads = slope(masks)
    for mask, grad in zip(masks, grads, strict=True):
        for place in np.ndindex(mask.shape):
            before = mask[place]
            mask[place] = before + 1e-6
            above, _ = slope(masks)
            mask[place] = before - 1e-6
            below, _ = slope(masks)
            mask[place] = before
            assert (above - below) / 2e-6 == pytest.approx(grad[place], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("units", [8, 64])
def test_weights_reach_what_neurons_of_the_same_width_do_not(units: int) -> None:
    hidden, output, target, draw = drawn(units, 24)
    found, mask = single_relu.weights(hidden, output, target, draw)
    assert found < 1e-3
    assert single_relu.error(hidden * mask[:, :-1], output * mask[:, -1], target) == pytest.approx(
        found, abs=1e-9
    )
    bound = single_relu.random_features(hidden, target)
    assert 0.2 < bound < single_relu.neurons(hidden, output, target, draw)[0]


def test_a_network_of_nothing_is_as_wrong_as_0() -> None:
    hidden, output, target, _ = drawn(3, 4)
    assert single_relu.error(hidden, 0 * output, target) == 1
    assert single_relu.weight_slope(hidden, output, target)([0 * hidden, 0 * output])[0] == 1


# ---- images


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    from sparselth.cli.main import run

    out = tmp_path_factory.mktemp("runs") / "neurons"
    assert run([*WORDS.split(), "--width", "0.1,0.2", "--units", "8,16", "--out", str(out)]) == 0
    return read(out)


def test_every_arm_has_a_cell_a_width_and_a_number_of_units(record: RunRecord) -> None:
    assert record.complete
    found = {(p["arm"], p.get("width", p.get("units"))) for p in record.points}
    arms = ("weights", "neurons", "random-features")
    assert found == {(arm, width) for arm in arms for width in (0.1, 0.2)} | {
        (f"relu-{arm}", units) for arm in arms for units in (8, 16)
    }
    for p in record.points:
        assert p["train_seconds"] >= 0
        if p["arm"].startswith("relu-"):
            assert 0 <= max(p["relative_error"], 0) <= 1
            assert load_arrays(cell_path(record.path, Cell.of(p)))[1]["relative_error"] == p["relative_error"]
        else:
            assert {"final_accuracy", "accuracy_at_early_stop", "weights_remaining", "file_bytes"} <= set(p)


def test_neurons_are_kept_whole_and_all_arms_have_the_same_weights(record: RunRecord) -> None:
    for level in (0, 1):
        model = get_model(f"lenet-300-100@{record.config.width[level]:g}")
        frozen = weights_of(record.config.frozen(Cell(0, "weights", level)), model.params).numpy()
        kept, fitted, strong = (
            tickets.load(cell_path(record.path, Cell(0, arm, level))).content
            for arm in ("neurons", "random-features", "weights")
        )
        for i, spec in enumerate(model.weights):
            hidden, drawn_ = not spec.output, frozen[spec.span]
            rows = kept.mask[spec.span].reshape(spec.matrix)
            assert (rows.all(1) | ~rows.any(1)).all()
            assert rows.any(1).sum() == (round(0.5 * spec.shape[0]) if hidden else spec.shape[0])
            gain = np.float32(2**0.5) if i else np.float32(1)
            np.testing.assert_allclose(kept.weights[spec.span], drawn_ * gain * rows.ravel(), rtol=1e-6)
            assert np.array_equal(fitted.weights[spec.span], drawn_) == hidden
            where = strong.mask[spec.span]
            np.testing.assert_array_equal(strong.weights[spec.span][where], drawn_[where])
        assert not kept.weights[model.biases[0].offset :].any()
        assert fitted.weights[model.biases[-1].span].any()


def test_the_score_of_a_neuron_takes_the_gradient_of_its_mask() -> None:
    """Against autograd through an explicit mask."""
    model, data = get_model("lenet-300-100@0.1"), Resident(DIGITS, "cpu", 500)
    layers = [
        matrix(s, weights_of(METHODS["edge-popup"].frozen(0, law="normal"), model.params))
        for s in model.weights
    ]
    x, y = (t[..., :64] for t in data.validation(0)[0])
    masks = [
        (torch.rand(len(layer), generator=torch.Generator().manual_seed(1)) < 0.5).float()
        for layer in layers[:-1]
    ]
    wanted = [mask.clone().requires_grad_() for mask in masks]
    h = x[0]
    for layer, mask in zip(layers[:-1], wanted, strict=True):
        h = (layer @ h).relu() * mask[:, None]
    torch.nn.functional.cross_entropy((layers[-1] @ h).T, y[0, 0]).backward()
    outputs = neuron_scores.features(layers, x[0], masks)
    found = neuron_scores.slopes(layers, outputs, masks, y)
    for mask, slope in zip(wanted, found, strict=True):
        assert mask.grad is not None
        torch.testing.assert_close(slope, mask.grad, rtol=1e-4, atol=1e-6)


def test_the_fitted_output_layer_has_the_least_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 300, generator=draw), torch.randint(0, 3, (300,), generator=draw)
    weight, bias = neuron_scores.logistic(x, y, 3, 1e-2, lambda: False)

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        fit = torch.nn.functional.cross_entropy((w @ x + b[:, None]).T, y)
        return float(fit + 1e-2 * (w**2).sum() / 2)

    for _ in range(20):
        step = 0.05 * torch.randn(3, 5, generator=draw), 0.05 * torch.randn(3, generator=draw)
        assert loss(weight, bias) < loss(weight + step[0], bias + step[1])


def test_what_is_missing_comes_out_the_same(
    record: RunRecord, tmp_path: Path, cli: Cli, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(record.path, run)
    for key in ("seed0-neurons-01", "seed0-random-features-00", "seed0-relu-weights-01"):
        (run / "cells" / f"{key}.safetensors").unlink()
    code, _, err = cli(*WORDS.split(), "--width", "0.1,0.2", "--units", "8,16", "--out", str(run), "--resume")
    assert code == 0, err
    assert run_contents(run) == run_contents(record.path)


def test_the_table_the_document_and_figures(
    record: RunRecord, document: Callable[..., dict[str, Any]], cli: Cli, tmp_path: Path
) -> None:
    shown = document("show", str(record.path))
    assert shown["schema"] == "sparselth.neurons/1"
    assert len(shown["summary"]) == 12
    text = " ".join(cli("show", str(record.path))[1].split())
    assert "Whole neurons cannot be below random features" in text
    assert "With 16 units the single ReLU is missed by" in text
    names = {file.name for file in draw_figures(record, tmp_path / "figures")}
    assert names == {"width.png", "width.svg", "single_relu.png", "single_relu.svg"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--keep 0", "--keep 0: expected a share above 0 and at most 1"),
        ("--model lenet5", "--model lenet5: expected one of fully connected layers alone"),
        ("--width 0.001", "is no unit"),
        ("--units 0", "--units 0: expected different numbers from 1 to 2,048"),
        ("--inputs 1", "--inputs 1: expected 2 or more"),
        ("--arms neuron", "unknown arm 'neuron': did you mean 'neurons'?"),
        ("--law laplace", "laplace"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    words: str, said: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*f"neurons --dataset mnist5k --quiet --out run {words}".split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert not [*tmp_path.iterdir()]


def test_a_price_before_anything_is_trained(document: Callable[..., dict[str, Any]]) -> None:
    plan = document(*WORDS.split(), "--width", "0.05,0.1", "--dry-run")
    assert (plan["schema"], plan["cells"]) == ("sparselth.neurons-plan/1", 3 * (2 + 6))
    assert plan["seconds"] > 0
    some = NeuronsConfig(dataset="mnist5k", width=(0.05, 0.1))
    assert [some.rung(Cell(0, "neurons", level)) for level in (0, 1)] == [1, 0]
    assert some.start_step(Cell(0, "random-features", 0)) == some.recipe.steps
