"""ResNet-20 beside a plain torch network written here, and tiny ones through `imp`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.config import Recipe
from sparselth.engine.dense import Network, cross_entropy_grad, init_weights
from sparselth.engine.vendor import VendorNetwork
from sparselth.errors import UsageError
from sparselth.measure.layers import of_model
from sparselth.models import (
    INPUT,
    MODELS,
    Add,
    BatchNorm,
    Conv,
    Linear,
    Model,
    Node,
    ReLU,
    get_model,
)
from sparselth.models.torch import network, sequential
from sparselth.runs import RunRecord
from sparselth.streams import stream


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, n = 3, with option B; convolutions have biases, as all of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            *(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1)),
            *(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1)),
            *(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1)),
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(F.avg_pool2d(h, 8).flatten(1))


RESNET = get_model("resnet20")


def twin(flat: Tensor) -> ResNet20:
    """The plain network with the weights of one replica [P], whatever these are called there."""
    net = ResNet20().to(flat.dtype)
    products = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for module, weight, bias in zip(products, RESNET.weights, RESNET.biases, strict=True):
            module.weight.copy_(flat[weight.span].view_as(module.weight))
            module.bias.copy_(flat[bias.span])
        for i, module in enumerate(norms):
            for tensor, spec in zip(held(module), norm_specs(i), strict=True):
                tensor.copy_(flat[spec.span])
    return net


def held(norm: nn.BatchNorm2d) -> list[Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def norm_specs(i: int) -> tuple[Any, ...]:
    return *RESNET.norms[2 * i : 2 * i + 2], *RESNET.statistics[2 * i : 2 * i + 2]


def fresh(replicas: int) -> Tensor:
    """Weights [R, P] in float64 whose batch norms scale, shift and remember."""
    flat = torch.stack([init_weights(RESNET, stream(seed, "ticket", 0, "init")) for seed in range(replicas)])
    for spec in (*RESNET.norms, *RESNET.statistics):
        flat[:, spec.span] += (
            torch.rand(replicas, spec.numel, generator=stream(9, "ticket", 0, spec.name)) / 4
        )
    return flat.double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def gradients(net: ResNet20) -> Tensor:
    """The gradient of all weights and batch norms, [P] in our order; biases before a batch norm have none."""
    found = torch.zeros(RESNET.params.size, dtype=torch.float64)
    products = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    pairs = [(spec, m.weight) for spec, m in zip(RESNET.weights, products, strict=True)]
    pairs += [(RESNET.biases[-1], net.fc.bias)]
    for i, norm in enumerate(norms):
        pairs += zip(norm_specs(i)[:2], held(norm)[:2], strict=True)
    for spec, tensor in pairs:
        assert tensor.grad is not None
        found[spec.span] = tensor.grad.flatten()
    return found


# of logits, gradients, statistics and logits of evaluation; in float32 a ReLU at 0 falls either way
BOUNDS = {torch.float64: [1e-11] * 4, torch.float32: [1e-5, 2e-2, 1e-5, 1e-5]}


@pytest.mark.parametrize(("vendor", "replicas"), [(True, 1), (False, 1), (False, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_gradients_and_statistics_are_those_of_a_plain_network(
    vendor: bool, replicas: int, dtype: torch.dtype
) -> None:
    batch, flat = 6, fresh(replicas)
    x = torch.randn(replicas, 3072, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randint(10, (replicas, 1, batch), generator=torch.Generator().manual_seed(1))
    ours = flat.to(dtype, copy=True)
    grad = torch.full_like(ours, float("nan"))
    trains = VendorNetwork(RESNET, ours, grad) if vendor else Network(RESNET, ours, batch, grad)
    logits = trains.forward(x.to(dtype)).clone()
    trains.backward(cross_entropy_grad(logits, y))
    tests = VendorNetwork(RESNET, ours) if vendor else Network(RESNET, ours, batch)
    evaluated = tests.forward(x.to(dtype))
    for r in range(replicas):
        images = x[r].T.reshape(-1, 3, 32, 32)
        net = twin(flat[r])
        outputs = net(images)
        F.cross_entropy(outputs, y[r, 0]).backward()
        running = torch.cat([t for m in net.modules() if isinstance(m, nn.BatchNorm2d) for t in held(m)[2:]])
        with torch.no_grad():
            expected = outputs.detach().T, gradients(net), running, net.eval()(images).T
        slope = torch.zeros(RESNET.params.size, dtype=torch.float64)
        for spec in (*RESNET.weights, *RESNET.biases, *RESNET.norms):
            slope[spec.span] = grad[r, spec.span].double()
        for spec in RESNET.biases[:-1]:
            assert slope[spec.span].abs().max() < 1e-4  # it is 0 but for rounding
            slope[spec.span] = 0
        statistics = torch.cat([ours[r, spec.span] for spec in RESNET.statistics])
        for mine, exact, bound in zip(
            (logits[r], slope, statistics, evaluated[r]), expected, BOUNDS[dtype], strict=True
        ):
            assert error(mine, exact) <= bound


def test_as_a_torch_module() -> None:
    flat = fresh(1)[0].float()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = network(RESNET, flat)
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(flat)(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sequential(RESNET, flat)(x), twin(flat).eval()(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in sequential(RESNET, flat).modules())
    names = dict(net.named_parameters())
    assert names["conv1.weight"].shape == (16, 3, 3, 3)
    assert names["conv8.weight"].shape == (32, 16, 3, 3)
    assert torch.equal(names["fc1.weight"].flatten(), flat[RESNET.weights[-1].span])
    before = net.eval()(x)
    net.fc1 = nn.Sequential(net.fc1)  # as a rival's layer is put in its place
    assert torch.equal(net(x), before)


def test_resnet20_is_the_papers() -> None:
    shapes = [spec.shape for spec in RESNET.weights]
    main = sum(spec.numel for spec in RESNET.weights if spec.shape[2:] == (3, 3))
    shortcuts = sum(spec.numel for spec in RESNET.weights if spec.shape[2:] == (1, 1))
    # 270K in convolutions, 2,560 in shortcuts, 640 in the output layer: Frankle & Carbin 2019, Figure 2
    assert (main, shortcuts, RESNET.weights[-1].numel) == (267_696, 2_560, 640)
    assert RESNET.params.prunable == 270_896
    assert len([shape for shape in shapes if shape[2:] == (3, 3)]) == 19
    assert RESNET.shapes[-3:] == ((64, 8, 8), (64, 1, 1), (10,))
    assert [layer.text for layer in of_model(RESNET) if layer.stride == 2] == [
        *("32x16x3x3@32x32/2", "32x16x1x1@32x32/2", "64x32x3x3@16x16/2", "64x32x1x1@16x16/2")
    ]
    recipe = RESNET.recipes["paper"]
    assert (recipe.steps, recipe.batch_size, recipe.optimizer) == (30_000, 128, "sgd")
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 1e-4)
    rates = [recipe.lr_at(step) for step in (9_999, 19_999, 20_000, 25_000)]
    assert rates == pytest.approx([0.015, 0.03, 0.003, 0.0003])


SMALL = Model(
    "small-residual",
    (1, 28, 28),
    (
        *(Conv(4, 3, 1, 3), BatchNorm(), ReLU(), Conv(6, 3, 1, 2), BatchNorm(), ReLU(), Conv(6, 3, 1)),
        *(BatchNorm(), Node(Conv(6, 1, 0, 2), (2,)), BatchNorm(), Node(Add(), (7, 9)), ReLU()),
        *(Linear(12), ReLU(), Linear(12), ReLU(), Node(Add(), (13, 15)), Linear(10)),
    ),
    {"short": Recipe(steps=40, lr=0.05, optimizer="sgd", batch_size=20, weight_decay=1e-3)},
    "",
    dataset="mnist5k",
)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_run_prunes_resumes_to_the_same_bits_and_reports(
    kernels: str,
    imp: Callable[..., RunRecord],
    cli: Callable[..., tuple[int, str, str]],
    run_contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MODELS.things, SMALL.name, SMALL)
    flags = ("--model", SMALL.name, "--levels", "1", "--seeds", "0,1", "--arms", "ticket,random-mask")
    flags += ("--rewind", "5", "--scope", "global", "--rate", "0.5", "--kernels", kernels, "--workers", "1")
    record = imp(*flags, out=kernels, steps=40)
    assert record.complete
    assert all(point["final_accuracy"] > 0.3 for point in record.points)  # chance is 0.1
    kept = [point["weights_remaining"] for point in record.points if point["arm"] == "ticket"]
    assert kept == pytest.approx([1, 0.5, 1, 0.5], abs=1e-3)
    whole = run_contents(record.path)
    for lost in ("seed1-ticket-01", "seed0-random-mask-01"):
        (record.path / "cells" / f"{lost}.safetensors").unlink()
    imp(*flags, "--resume", out=kernels, steps=40)
    assert run_contents(record.path) == whole
    code, out, _ = cli("show", str(record.path))
    assert code == 0
    assert "random-mask" in out


def test_ls_names_shortcuts_and_layers(document: Callable[..., dict[str, Any]]) -> None:
    row = next(row for row in document("ls", "models")["models"] if row["name"] == "resnet20")
    assert row["prunable"] == 270_896
    assert row["weights"]["conv10.weight"] == 16 * 32  # the first shortcut with weights


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((Linear(10), Node(Add(), (0, 1))), r"layer 1, Add\(\), reads \[0, 1\]"),
        ((Linear(10), Node(Add(), (0,))), r"layer 1, Add\(\), cannot read \(10,\)"),
        ((Linear(4), Node(Linear(5), (INPUT,)), Node(Add(), (0, 1)), Linear(10)), r"\(4,\) and \(5,\)"),
        ((Conv(2, 9), Linear(10)), r"cannot read \(1, 8, 8\)"),
        ((Linear(4), Conv(2, 1), Linear(10)), r"layer 1, Conv\(.*\), cannot read \(4,\)"),
        ((Linear(4), Node(Linear(10), (INPUT,))), "layer 0, .*is read by nobody"),
        ((Node(Linear(10), (INPUT, INPUT)),), "cannot read"),
    ],
)
def test_layers_that_do_not_fit_are_named(layers: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Model("odd", (1, 8, 8), layers, {}, "")


def test_what_a_convolution_is_called_decides_which_break_evens_are_known() -> None:
    assert repr(Conv(6, 5, 2)) == "Conv(out=6, kernel=5, padding=2)"
    assert repr(Conv(6, 5, 2, 2)) == "Conv(out=6, kernel=5, padding=2, stride=2)"
