"""What a run would cost on GPUs that are not here: counted FLOPs, and a model that says what it assumes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from sparselth.config import EXPERIMENTS, Recipe
from sparselth.data import get_dataset
from sparselth.errors import SparselthError, UsageError
from sparselth.experiments import cost
from sparselth.experiments.cost import GPUS, flops, gpus_named, made_up, modelled
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.training import Training
from sparselth.models import get_model
from sparselth.models.torch import network

Cli = Callable[..., tuple[int, str, str]]
PAPER = get_model("resnet50").recipes["paper"]


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(cost, "decoding", lambda spec: 100.0)
    return 100.0


def config(**changes: Any) -> ImpConfig:
    values = {"model": "resnet50", "seeds": (0, 1, 2), "levels": 2, "recipe": PAPER}
    return ImpConfig(**(values | changes))


@pytest.mark.parametrize("name", ["resnet20@0.25", "resnet50@0.125"])
def test_flops_are_those_of_the_layers_as_they_run(name: str) -> None:
    """Products of a layer: as many as its output has numbers, times what each of them reads."""
    model = replace(get_model(name), input=(3, 64, 64))
    net, found = network(model, torch.zeros(model.params.size)), [0, 0]

    def ran(layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        products = output[0].numel() * layer.weight[0].numel()
        found[0] += 2 * products
        found[1] += 2 * products * (2 + inputs[0].requires_grad)  # its weights' gradient, and its input's

    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(ran)
    net(torch.zeros(1, 3, 64, 64).expand(2, -1, -1, -1))
    assert flops(model) == tuple(found)


def test_resnet50_is_of_4_billion_products() -> None:
    forward, training = flops(get_model("resnet50"))
    assert forward / 2e9 == pytest.approx(4.09, abs=0.01)  # torchvision's table
    assert training / forward == pytest.approx(2.97, abs=0.01)


def test_a_network_a_gpu_first_then_batches_over_what_is_left() -> None:
    """A step of 1,024 needs two H100s; nine networks at one time are spread before batches are split on."""
    assert [modelled(config(), n, "h100").each for n in (2, 8, 18, 27, 64)] == [2, 2, 2, 3, 7]
    small = config(recipe=replace(PAPER, batch_size=64))
    assert [modelled(small, n, "h100").each for n in (1, 9, 18)] == [1, 1, 2]
    few = config(seeds=(0,), arms=("ticket",), recipe=replace(PAPER, batch_size=3))
    assert modelled(few, 64, "h100").each == 3  # an image each, which is what `split` may be
    with pytest.raises(SparselthError, match="does not fit 1 GPUs of 80 GB"):
        modelled(config(), 1, "h100")


def test_hours_are_those_of_the_formula(rate: float) -> None:
    gpu, plan = GPUS["h200"], config(seeds=(0,), arms=("ticket",), levels=1)
    forward, training = flops(get_model("resnet50"))
    found = modelled(plan, 4, "h200")
    assert found.each == 4  # one network at one time
    weights = get_model("resnet50").params.trained_size
    step = max(256 * training / (gpu.flops * gpu.share), 256 / (gpu.cores * rate))
    step += 2 * 3 / 4 * 4 * weights / gpu.near + (1 + 2 * 53) * cost.LATENCY  # 53 batch norms
    look = max(forward / (gpu.flops * gpu.share), 1 / (gpu.cores * rate)) / 4
    each = 90 * 1251 * step + (90 * 5000 + 2 * 50_000) * look
    assert found.seconds == pytest.approx(2 * each)
    assert found.gpu_hours == pytest.approx(4 * 2 * each / 3600)
    assert found.busy == pytest.approx(1)
    # from epoch 5 on, level 1 trains 85 epochs
    rewound = modelled(replace(plan, rewind=5 * 1251), 4, "h200")
    assert rewound.seconds == pytest.approx(each + 85 * 1251 * step + (85 * 5000 + 2 * 50_000) * look)


def test_more_gpus_take_less_time_and_more_hours() -> None:
    found = [modelled(config(), number, "a100") for number in (8, 16, 64)]
    assert found[0].seconds > found[1].seconds > found[2].seconds
    assert found[0].gpu_hours <= found[2].gpu_hours
    assert all(0 < one.busy <= 1 + 1e-9 for one in found)
    digits = ImpConfig(model="lenet5", seeds=(0,), levels=1, recipe=Recipe(steps=1000, lr=1e-3))
    assert "images lie in the GPU's memory" in modelled(digits, 1, "a100").assumptions["decoding"]


def test_a_step_takes_the_launches_of_its_kernels_at_least() -> None:
    """By its products a step of lenet-300-100 would take 3 us of a GPU; five layers start 25 kernels."""
    recipe = Recipe(steps=1000, lr=1e-3)
    digits = ImpConfig(model="lenet-300-100", seeds=(0,), arms=("ticket",), levels=1, recipe=recipe)
    found = modelled(digits, 1, "h100")
    assert found.seconds == pytest.approx(2 * 1000 * 25 * cost.LAUNCH, rel=0.1)
    assert "25 kernels" in found.assumptions["launches"]


def test_what_imp_does_not_compute_has_no_model() -> None:
    """neurons trains only a part of its networks, and at-init of some levels none."""
    for name in ("strong", "neurons", "at-init", "schedule"):
        experiment = EXPERIMENTS[name]
        assert issubclass(experiment, Training)
        with pytest.raises(UsageError, match=f"the model knows what imp computes, not what {name} does"):
            modelled(experiment(), 8, "h100")


def test_numbers_of_gpus_are_read() -> None:
    assert gpus_named("64xH100") == (64, "h100")
    assert gpus_named("h200") is gpus_named("bench/4xh100.json") is None
    for wrong in ("8xv100", "0xh100"):
        with pytest.raises(UsageError, match="8xh100; known are a100, h100, h200"):
            gpus_named(wrong)


def test_the_command_prints_a_model_and_all_that_it_assumes(cli: Cli) -> None:
    """Without the data set, and without a GPU."""
    words = ["imp", "--model", "resnet50", "--recipe", "paper", "--seeds", "0", "--levels", "1"]
    words += ["--arms", "ticket", "--dry-run", "--price-on"]
    code, out, err = cli(*words, "8xh100")
    assert (code, out) == (0, "")
    said = " ".join(err.split())
    assert "on 8 H100 SXM" in said
    assert "measured nothing of it on such GPUs: this is a model" in said
    for line in (
        "step",
        "GPU",
        "decoding",
        "batch",
        "launches",
        "all-reduce",
        "evaluation",
        "networks",
        "left out",
    ):
        assert f"\n  {line} " in err
    assert "4 bytes x 25," in said
    assert "1 groups of 8 GPUs take them in the order of a run (--split 8)" in said
    assert max(map(len, err.splitlines())) <= 80
    code, out, _ = cli(*words, "8xh100", "--json")
    found = json.loads(out)["price_on"]
    assert code == 0
    assert found["measured"] is False
    assert found["gpu_hours"] == pytest.approx(8 * found["seconds"] / 3600)
    assert cli(*words, "8xv100")[0] == 2
    assert cli(*words, "1xh100")[0] == 1


def test_a_made_up_jpeg_is_decoded_at_some_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(cost, "SECONDS", 0.02)
    assert cost.decoding(get_dataset("imagenet")) > 0
    with Image.open(io.BytesIO(made_up())) as picture:
        assert picture.size == (500, 375)
    assert 80_000 < len(made_up()) < 150_000  # as those of ImageNet
