"""ResNets, VGGs, Conv-k beside torchvision's networks and the papers; what pruning leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision

from sparselth.config import config_from_json
from sparselth.engine.dense import Network, init_weights
from sparselth.engine.layout import compressible
from sparselth.engine.vendor import VendorNetwork
from sparselth.errors import UsageError
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.strong import StrongConfig
from sparselth.files import read_json
from sparselth.models import MODELS, BatchNorm, Conv, Linear, MaxPool, Model, get_model
from sparselth.models.torch import network
from sparselth.params import matrix
from sparselth.pruning import ladder, prune
from sparselth.runs import RunRecord
from sparselth.streams import stream


def _resnet18() -> nn.Module:
    net = torchvision.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


class _Vgg(nn.Module):
    """torchvision's convolutions, the mean of the last 2 x 2 pixels and one fully connected layer."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.features, self.fc = net.features[:-1], nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x).mean((2, 3)))
        return out


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": _resnet18,
    "vgg16": lambda: _Vgg(torchvision.vgg16_bn()),
    "vgg19": lambda: _Vgg(torchvision.vgg19_bn()),
}


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_torchvisions_network(name: str) -> None:
    model, net = get_model(name), NETS[name]().double()
    flat = init_weights(model, stream(0, "ticket", 0, "init")).double()
    for spec in (*model.norms, *model.statistics, *model.biases):
        flat[spec.span] += torch.rand(spec.numel, generator=stream(1, "a", 0, spec.name)) / 4
    products = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    parts = [part for part, node in zip(model.parts, model.nodes, strict=True) if len(part) == 2]
    specs = [part for part, node in zip(model.parts, model.nodes, strict=True) if len(part) == 4]
    with torch.no_grad():
        for product, (weight, bias) in zip(products, parts, strict=True):
            assert product.weight.shape == weight.shape
            product.weight.copy_(flat[weight.span].view(weight.shape))
            if product.bias is None:
                flat[bias.span] = 0
            else:
                product.bias.copy_(flat[bias.span])
        for norm, tensors in zip(norms, specs, strict=True):
            state = norm.weight, norm.bias, norm.running_mean, norm.running_var
            for tensor, spec in zip(state, tensors, strict=True):
                assert tensor is not None
                tensor.copy_(flat[spec.span])
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = net.eval()(x)
    found = VendorNetwork(model, flat[None]).forward(x.flatten(1).T[None])[0].T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_resnet50_is_torchvisions() -> None:
    """At 64 x 64 in float64, given the same weights; the biases before norms are 0."""
    model, theirs = replace(get_model("resnet50"), input=(3, 64, 64)), torchvision.resnet50()
    flat = init_weights(model, stream(0, "ticket", 0, "init"))
    for spec in (*model.norms, *model.statistics, model.biases[-1]):
        flat[spec.span] += torch.rand(spec.numel, generator=stream(1, "a", 0, spec.name)) / 4
    ours = network(model, flat)
    kinds = nn.Conv2d | nn.BatchNorm2d | nn.Linear
    pairs = ([m for m in net.modules() if isinstance(m, kinds)] for net in (ours, theirs))
    for one, other in zip(*pairs, strict=True):
        found = {name: t for name, t in one.state_dict().items() if name in other.state_dict()}
        other.load_state_dict(found)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):  # by the batch's own statistics, and by running ones
        outputs = [net.double().train(mode)(x) for net in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert model.shapes[4] == (64, 16, 16)  # behind the pool
    assert [type(one) for one in ours.children()].count(nn.MaxPool2d) == 1


def test_what_only_autograd_trains_is_refused_by_the_engines() -> None:
    model = get_model("resnet50@0.0625")
    assert model.needs_autograd
    assert not get_model("resnet18").needs_autograd
    assert not replace(get_model("conv2"), layers=(MaxPool(2, 2), Linear(10))).needs_autograd
    for network_of in (VendorNetwork, lambda model, flat: Network(model, flat, 2)):
        with pytest.raises(UsageError, match="has a max pool whose squares overlap"):
            network_of(model, torch.zeros(1, model.params.size))
    with pytest.raises(UsageError, match="max pool whose squares overlap"):
        StrongConfig(model="resnet50").check()
    plain, odd = MaxPool(3, 3), MaxPool(3, 2, 1)
    assert (repr(plain), repr(odd)) == ("MaxPool(size=3)", "MaxPool(size=3, stride=2, padding=1)")
    chain = Model("chain", (1, 9, 9), (MaxPool(2, 1), Linear(10)), {}, "")
    assert chain.shapes[1] == (1, 8, 8)
    assert not compressible(chain)
    assert compressible(replace(chain, layers=(Conv(2, 3, 1), MaxPool(2), Linear(10))))


COUNTS = {  # what is ranked under scope global, what stays whole
    "resnet20": (267_696, 2_560 + 640),  # Frankle & Carbin 2019, Figure 2: 274K all, 270K convolutions
    "resnet56": (848_304, 2_560 + 640),
    "resnet18": (10_987_200, 64 * 128 + 128 * 256 + 256 * 512 + 5_120),
    "resnet50": (
        20_686_016,
        64 * 256 + 256 * 512 + 512 * 1024 + 1024 * 2048 + 2_048_000,
    ),
    "vgg16": (14_710_464, 5_120),
    "vgg19": (20_018_880, 5_120),  # Figure 2: 20.0M
    "conv2": (4_300_992, 0),  # 4.3M
    "conv4": (2_425_024, 0),  # 2.4M
    "conv6": (2_261_184, 0),
    "conv8": (5_275_840, 0),
}
SAID = {
    "resnet20": 0.27,
    "resnet56": 0.85,
    "resnet18": 11.2,
    "resnet50": 25.6,
    "vgg19": 20.0,
    "vgg16": 14.7,
    "conv8": 5.3,
}


@pytest.mark.parametrize("name", COUNTS)
def test_weights_are_as_many_as_the_papers_say(name: str) -> None:
    """He et al. 2016, Table 6: ResNet-20 0.27M, ResNet-56 0.85M parameters."""
    model = get_model(name)
    whole = [spec for spec in model.weights if spec.name in model.exempt]
    assert len(whole) == len(model.exempt)
    ranked, left = COUNTS[name]
    assert sum(spec.numel for spec in whole) == left
    assert model.params.prunable == ranked + left
    convs, norms = (sum(isinstance(n.op, kind) for n in model.nodes) for kind in (Conv, BatchNorm))
    assert norms in (0, convs)
    if name in SAID:
        # convolutions before a batch norm have no biases there
        parameters = model.params.prunable + sum(spec.numel for spec in model.norms)
        parameters += sum(spec.numel for spec in model.biases[convs if norms else 0 :])
        assert parameters / 1e6 == pytest.approx(SAID[name], rel=0.02)


def test_layers_are_as_many_as_the_names_say() -> None:
    for name, more in (("resnet20", 0), ("resnet56", 0), ("resnet18", 0), ("vgg16", 2), ("vgg19", 2)):
        products = [node.op for node in get_model(name).nodes if isinstance(node.op, Conv | Linear)]
        counted = [op for op in products if isinstance(op, Linear) or op.kernel == 3]
        # the fully connected layers of ImageNet's VGG are three, ours is one
        assert len(counted) + more == int(name.lstrip("resntvg"))
    assert all(get_model(name).evaluation_batch == 100 for name in COUNTS)


def test_recipes_are_the_papers() -> None:
    def rates(name: str, *steps: int) -> list[float]:
        return [get_model(name).recipes["paper"].lr_at(step) for step in steps]

    papers = {name: get_model(name).recipes["paper"] for name in ("resnet20", "resnet56", "resnet18")}
    papers |= {name: get_model(name).recipes["paper"] for name in ("vgg16", "vgg19")}
    assert {recipe.augment for recipe in papers.values()} == {"crop-flip"}
    assert {(recipe.optimizer, recipe.momentum) for recipe in papers.values()} == {("sgd", 0.9)}
    decays = {"resnet18": 5e-4}  # Chijiwa et al. 2021
    assert all(recipe.weight_decay == decays.get(name, 1e-4) for name, recipe in papers.items())
    sizes = {name: (recipe.steps, recipe.batch_size) for name, recipe in papers.items()}
    assert sizes == {
        "resnet20": (30_000, 128),
        "resnet56": (64_000, 128),
        "resnet18": (100 * (45_000 // 128), 128),
        "vgg16": (160 * (45_000 // 128), 128),
        "vgg19": (160 * (45_000 // 64), 64),
    }
    fifty = get_model("resnet50").recipes["paper"]
    assert (fifty.optimizer, fifty.momentum, fifty.weight_decay, fifty.augment) == (
        "sgd",
        0.9,
        1e-4,
        "crop-flip",
    )
    assert (fifty.steps, fifty.batch_size) == (90 * 1251, 1024)
    epochs = [1251 * epoch for epoch in (5, 30, 60, 80)]
    assert rates("resnet50", 0, *epochs) == pytest.approx([0.4 / 6255, 0.4, 0.04, 0.004, 0.0004])
    assert rates("resnet56", 0, 31_999, 32_000, 48_000) == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert rates("vgg16", 0, 80 * 351, 120 * 351) == pytest.approx([0.1, 0.01, 0.001])
    assert rates("vgg19", 4_999, 9_999, 80 * 703, 120 * 703) == pytest.approx([0.05, 0.1, 0.01, 0.001])
    assert rates("resnet18", 0, 17_550, 35_099) == pytest.approx([0.1, 0.05, 0.0], abs=1e-6)
    shorts = [model.recipes["short"] for model in MODELS.values()]
    assert {recipe.augment for recipe in shorts} == {"none"}  # runs that were begun go on as they began


RESNET = get_model("resnet20")


def test_what_is_left_out_is_not_looked_at_and_stays_whole() -> None:
    weights = torch.randn(RESNET.params.mask_size, generator=torch.Generator().manual_seed(0))
    for spec in RESNET.weights:
        if spec.name in RESNET.exempt:
            matrix(spec, weights).fill_(torch.nan)
    mask = RESNET.params.full_mask()
    rungs, kept = ladder(RESNET.params, 3, 0.2, "global", RESNET.exempt), 267_696
    for rung in rungs:
        assert rung == {"all": kept, "conv10.weight": 512, "conv17.weight": 2048, "fc1.weight": 640}
        mask = prune(RESNET.params, weights, mask, rung)
        found = RESNET.params.kept(mask)
        assert sum(found.values()) == kept + 3_200
        assert all(found[name] == rung[name] for name in RESNET.exempt)
        others = torch.cat([mask[s.span] for s in RESNET.weights if s.name not in RESNET.exempt])
        sizes = torch.cat([weights[s.span].abs() for s in RESNET.weights if s.name not in RESNET.exempt])
        assert others.sum() == kept
        if kept < 267_696:
            assert sizes[others].min() >= sizes[~others].max()
        kept -= round(0.2 * kept)
    everything = ladder(RESNET.params, 1, 0.2, "global", ("*",))
    assert everything[0] == everything[1]
    assert everything[1]["all"] == 0
    full = RESNET.params.full_mask()
    assert torch.equal(prune(RESNET.params, weights, full, everything[1]), full)


def test_by_layer_what_is_left_out_has_its_rate_taken() -> None:
    rungs = ladder(RESNET.params, 2, 0.5, "layer", ("fc1", "conv1*"))
    before, after = rungs[0], rungs[2]
    for spec in RESNET.weights:
        whole = spec.name == "fc1.weight" or spec.name.startswith("conv1")
        assert after[spec.name] == (before[spec.name] if whole else before[spec.name] // 4)


FLAGS = ("--levels", "2", "--seeds", "0", "--scope", "global", "--rate", "0.5", "--workers", "1")


def test_a_run_leaves_out_what_it_is_told_and_an_old_one_goes_on_as_it_began(
    imp: Callable[..., RunRecord],
    run_contents: Callable[[Path], dict[str, bytes]],
    cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lenet = get_model("lenet-300-100")
    moved = {"short": replace(lenet.recipes["short"], augment="crop-flip")}
    monkeypatch.setitem(MODELS.things, lenet.name, replace(lenet, exempt=("fc3.weight",), recipes=moved))
    record = imp(*FLAGS, out="now")
    assert record.config.exclude == ("fc3.weight",)
    assert record.config.recipe.augment == "crop-flip"
    left = [point["weights_remaining"] for point in record.points if point["arm"] == "ticket"]
    assert left == pytest.approx([1, (132_600 + 1000) / 266_200, (66_300 + 1000) / 266_200], abs=1e-9)
    plan = ("imp", "--model", lenet.name, *FLAGS, "--dataset", "mnist5k", "--dry-run")
    code, _, said = cli(*plan)
    assert code == 0
    assert "fc3.weight not at all" in " ".join(said.split())
    none = imp(*FLAGS, "--exclude", "", "--augment", "none", out="none")
    assert none.config.exclude == ()
    left = [point["weights_remaining"] for point in none.points if point["arm"] == "ticket"]
    assert left == pytest.approx([1, 0.5, 0.25], abs=1e-5)
    # as a version without the fields wrote it
    whole, file = run_contents(none.path), none.path / "config.json"
    data = {k: v for k, v in read_json(file).items() if k not in ("exclude", "code", "sha256")}
    assert data["recipe"].pop("augment") == "none"
    file.write_text(json.dumps(data))
    (none.path / "cells" / "seed0-ticket-02.safetensors").unlink()
    before = config_from_json(data)
    assert isinstance(before, ImpConfig)
    assert (before.exclude, before.digest) == ((), none.config.digest)
    assert imp("--resume", *FLAGS, out="none").complete
    now = run_contents(none.path)
    assert {name: now[name] for name in whole if name != "config.json"} == {
        name: content for name, content in whole.items() if name != "config.json"
    }


def test_ls_names_what_scope_global_leaves_out(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("ls", "models")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert "scope global leaves out conv8, conv13, conv18, fc1" in lines
    assert "--recipe paper   sgd 0.1, 35,100 steps of 128, crop-flip" in lines
    assert len([line for line in lines if line.startswith("scope global")]) == 6


def test_a_name_that_means_nothing_is_said(cli: Callable[..., tuple[int, str, str]]) -> None:
    words = ("imp", "--model", "lenet-300-100", "--dataset", "mnist5k", "--quiet")
    code, _, said = cli(*words, "--exclude", "fc4")
    assert code == 2
    assert said.startswith("sparselth: unknown weight to exclude 'fc4'")
    code, _, said = cli(*words, "--exclude", "*")
    assert code == 2
    assert "level 1 would prune nothing" in said
