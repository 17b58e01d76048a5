"""The networks as data: what the papers' tables say about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sparselth.data import DATASETS
from sparselth.models import MODELS, Conv, get_model

# Frankle & Carbin 2019, Figure 2: convolutional weights, all weights, steps, learning rate, the rate
# a level prunes convolutions at. The paper has 1.7M for all weights of Conv-6; its layers have 2.3M.
PAPER = {
    "conv2": (38_592, 4_300_992, 20_000, 2e-4, 0.10),
    "conv4": (259_776, 2_425_024, 25_000, 3e-4, 0.10),
    "conv6": (1_144_512, 2_261_184, 30_000, 3e-4, 0.15),
}
# per cent of the weights that are left after so many levels at rate 0.2
REMAINING = {
    "conv2": {7: 21.23, 10: 10.97, 11: 8.81, 14: 4.57, 18: 1.93},
    "conv4": {7: 23.88, 10: 13.35, 11: 11.06, 12: 9.18, 22: 1.72},
    "conv6": {7: 26.61, 10: 15.29, 12: 10.62, 13: 8.86, 20: 2.54},
}


@pytest.mark.parametrize("name", PAPER)
def test_conv_networks_are_the_papers(name: str) -> None:
    model = get_model(name)
    convolutional, everything, steps, lr, conv_rate = PAPER[name]
    assert sum(spec.numel for spec in model.weights if spec.name.startswith("conv")) == convolutional
    assert model.params.prunable == everything
    recipe = model.recipes["paper"]
    assert (recipe.steps, recipe.lr, recipe.batch_size, recipe.optimizer) == (steps, lr, 60, "adam")
    assert (recipe.warmup, recipe.weight_decay, recipe.lr_drops) == (0, 0, ())
    rates = {spec.name: 0.2 * spec.rate_scale for spec in model.weights}
    convs = sum(isinstance(node.op, Conv) for node in model.nodes)
    expected = [conv_rate] * convs + [0.2, 0.2, 0.1]
    assert list(rates.values()) == pytest.approx(expected)
    for levels, left in REMAINING[name].items():
        kept = sum(spec.numel * (1 - rates[spec.name]) ** levels for spec in model.weights)
        assert 100 * kept / model.params.prunable == pytest.approx(left, abs=0.05)


def test_shapes_of_conv4() -> None:
    model = get_model("conv4")
    assert [spec.shape for spec in model.weights] == [
        (64, 3, 3, 3),
        (64, 64, 3, 3),
        (128, 64, 3, 3),
        (128, 128, 3, 3),
        (256, 128 * 8 * 8),
        (256, 256),
        (10, 256),
    ]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_fits_its_data_set(name: str) -> None:
    model = get_model(name)
    spec = DATASETS[model.dataset]
    assert model.input == spec.shape
    assert model.classes == spec.classes == model.shapes[-1][0]
    assert {"short", "paper"} <= set(model.recipes)
    assert model.weights[-1].rate_scale == 0.5  # the output layer


def test_ls_models_names_the_images(document: Callable[..., dict[str, Any]]) -> None:
    found = {row["name"]: row for row in document("ls", "models")["models"]}
    assert found["conv6"]["prunable"] == 2_261_184
    assert (found["conv6"]["input"], found["conv6"]["dataset"]) == ([3, 32, 32], "cifar10")
    assert (found["lenet5"]["input"], found["lenet5"]["dataset"]) == ([1, 28, 28], "mnist")
