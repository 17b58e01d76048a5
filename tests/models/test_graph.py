"""The networks as data: what the papers' tables say about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sparselth.data import DATASETS
from sparselth.errors import UsageError
from sparselth.models import MODELS, Conv, Linear, Model, ReLU, get_model, register

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


WIDE = {
    # 784 x 75 + 75 x 25 + 25 x 10; 16 and 32 filters and so on, of images 3 x 32 x 32
    "lenet-300-100@0.25": 60_925,
    "lenet-300-100@2": 784 * 600 + 600 * 200 + 200 * 10,
    "conv2@0.125": 9 * (3 * 8 + 8 * 8) + 16 * 16 * 8 * 32 + 32 * 32 + 32 * 10,
}


@pytest.mark.parametrize("name", WIDE)
def test_hidden_layers_of_another_width(name: str) -> None:
    base, _, factor = name.partition("@")
    model, plain = get_model(name), get_model(base)
    assert (model.name, model.params.prunable) == (name, WIDE[name])
    assert (model.classes, model.shapes[-1]) == (plain.classes, plain.shapes[-1])
    for narrow, full in zip(model.weights[:-1], plain.weights[:-1], strict=True):
        assert narrow.shape[0] == float(factor) * full.shape[0]
    assert [s.rate_scale for s in model.weights] == [s.rate_scale for s in plain.weights]
    assert get_model(name) is model
    assert name in MODELS
    assert name not in [*MODELS]


def test_a_residual_network_of_another_width_still_adds_up() -> None:
    model = get_model("resnet20@0.5")
    assert model.weights[0].shape == (8, 3, 3, 3)
    assert model.params.prunable == 67_992
    assert get_model("resnet20@1.0") is get_model("resnet20")
    assert get_model("lenet-300-100@0.5@0.5").weights == get_model("lenet-300-100@0.25").weights


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lenet-300-100@0.001", "0.001 of the 300 units of layer 0 is no unit; expected 1 to"),
        ("lenet-300-100@1e9", "expected 1 to 1,000,000"),
        ("lenet-300-100@0", "expected a positive number behind the @"),
        ("lenet-300-100@nan", "expected a positive number behind the @"),
        ("lenet-300-100@wide", "expected a positive number behind the @"),
        ("lenet-300@0.5", "unknown model 'lenet-300'"),
    ],
)
def test_a_width_that_makes_no_network_is_a_line(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        get_model(name)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="model none: has no weights; expected a Conv or a Linear"):
        Model(name="none", input=(1, 2, 5), layers=(ReLU(),), recipes={}, source="")
    with pytest.raises(UsageError, match="expected a name without @"):
        register(Model(name="a@2", input=(1, 2, 5), layers=(Linear(10),), recipes={}, source=""))
