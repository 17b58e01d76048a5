"""Outputs and gradients of R replicas against autograd in float64, over models and shapes nobody chose."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparselth.engine.dense import Network, cross_entropy, cross_entropy_grad, init_weights
from sparselth.engine.vendor import VendorNetwork
from sparselth.models import (
    INPUT,
    MODELS,
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    Layer,
    Linear,
    MaxPool,
    Model,
    Node,
    ReLU,
    get_model,
)
from sparselth.streams import stream

# relative RMS error against float64 that torch's own product has, times three
BOUND = {torch.float32: 1.5e-6, torch.float64: 1e-13}


def rms_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def reference(model: Model, flat: Tensor, x: Tensor, training: bool = True) -> Tensor:
    """Logits [R, classes, B] by torch.nn.functional, replica by replica, from x [R, K, B]."""
    named = model.params.views(flat)
    found = []
    for r in range(flat.shape[0]):
        values = [x[r].T.reshape(-1, *model.input)]
        for node, specs in zip(model.nodes, model.parts, strict=True):
            h, *others = (values[j + 1] for j in node.inputs)
            if isinstance(node.op, MaxPool):
                h = F.max_pool2d(h, node.op.size)
            elif isinstance(node.op, AvgPool):
                h = h.mean((2, 3), keepdim=True)
            elif isinstance(node.op, ReLU):
                h = h.relu()
            elif isinstance(node.op, Add):
                h = sum(others, h)
            elif isinstance(node.op, BatchNorm):
                shape = -1, *[1] * (h.dim() - 2)
                scale, shift, mean, var = (named[spec.name][r].view(shape) for spec in specs)
                if training:
                    var, mean = torch.var_mean(h, [0, *range(2, h.dim())], correction=0, keepdim=True)
                h = scale * (h - mean) / (var + 1e-5).sqrt() + shift
            else:
                spec = specs[0]
                weight = named[spec.name][r].reshape(spec.shape)
                bias = named[spec.name.replace("weight", "bias")][r, :, 0]
                if isinstance(node.op, Conv):
                    h = F.conv2d(h, weight, bias, node.op.stride, node.op.padding)
                else:
                    h = F.linear(h.flatten(1), weight, bias)
            values.append(h)
        h = values[-1]
        found.append(h.T)
    return torch.stack(found)


def check(
    model: Model,
    replicas: int,
    batch: int,
    dtype: torch.dtype,
    seed: int,
    keep: float = 1.0,
    vendor: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    flat = weights(model, replicas, generator, keep).to(dtype)
    x = torch.rand(replicas, model.shapes[0][0] * model.input[1] * model.input[2], batch, generator=generator)
    x = x.mul(8).sub(4).clamp_min(0).round() / 4  # half of it black: equal values in a pooling window
    y = torch.randint(model.classes, (replicas, 1, batch), generator=generator)
    before = flat.clone()
    grad = torch.full_like(flat, float("nan"))  # every entry must be written
    network = VendorNetwork(model, flat, grad) if vendor else Network(model, flat, batch, grad)
    logits = network.forward(x.to(dtype))
    expected_flat = before.double().requires_grad_()
    expected = reference(model, expected_flat, x.double())
    assert rms_error(logits, expected.detach()) < BOUND[dtype]
    network.backward(cross_entropy_grad(logits, y))
    # each replica's own mean loss
    loss = sum(F.cross_entropy(expected[r].T, y[r, 0]) for r in range(replicas))
    assert isinstance(loss, Tensor)
    loss.backward()
    assert expected_flat.grad is not None
    slopes, expected_slopes = model.params.views(grad), model.params.views(expected_flat.grad)
    statistics = {spec.name for spec in model.statistics}  # nobody asks for their gradient
    # a batch norm divides what cancelled by a deviation that may be 0: its gradients are good to an absolute
    # error, and so are those of the biases before it, which are 0
    slack = 1e3 * BOUND[dtype] if model.norms else 0
    for name in slopes.keys() - statistics:
        assert slopes[name].isfinite().all(), name
        error = float((slopes[name].double() - expected_slopes[name]).norm())
        assert error < slack + 20 * BOUND[dtype] * expected_slopes[name].norm().clamp_min(1e-30), name
    assert torch.equal(flat[:, : model.params.trained_size], before[:, : model.params.trained_size])
    network = VendorNetwork(model, flat) if vendor else Network(model, flat, batch)
    logits, before = network.forward(x.to(dtype)).clone(), flat.clone()
    assert rms_error(logits, reference(model, flat.double(), x.double(), training=False)) < BOUND[dtype]
    assert torch.equal(flat, before)


def weights(model: Model, replicas: int, generator: torch.Generator, keep: float = 1.0) -> Tensor:
    """Random weights [R, P], float64; running variances are positive, shifts of batch norms not 0.

    They lie on a grid: convolutions are exact in fp32, and no maximum of a pool is decided by rounding.
    """
    flat = torch.randn(replicas, model.params.size, generator=generator, dtype=torch.float64)
    flat = flat.mul(5).round() / 16
    flat[:, : model.params.mask_size] *= (
        torch.rand(replicas, model.params.mask_size, generator=generator) < keep
    )
    for spec in model.statistics[1::2]:
        flat[:, spec.span].abs_().add_(1 / 16)
    for spec in model.norms[1::2]:  # or rounding would decide what a ReLU makes of a channel that is constant
        flat[:, spec.span].add_(1 / 32)
    return flat


# whose pools no rounding decides; conv8 has the layers of conv6, vgg16 those of vgg19
PLAIN = sorted(name for name in MODELS if not MODELS[name].norms and name != "conv8")


LARGE = {name for name in PLAIN if get_model(name).params.prunable > 10**6}  # of whom two cases have to do


@pytest.mark.parametrize(
    ("name", "replicas", "batch", "dtype"),
    [
        *product(sorted({*PLAIN} - LARGE), (1,), (1, 60), BOUND),
        *product(sorted({*PLAIN} - LARGE), (3,), (7,), BOUND),
        *product(sorted(LARGE), (1,), (1,), (torch.float64,)),
        *product(sorted(LARGE), (2,), (7,), (torch.float32,)),
    ],
    ids=str,
)
def test_models_against_autograd(name: str, replicas: int, batch: int, dtype: torch.dtype) -> None:
    check(get_model(name), replicas, batch, dtype, seed=0)


@pytest.mark.parametrize(
    ("name", "batch", "dtype"),
    [
        *product(("lenet-300-100", "lenet5"), (1, 23), BOUND),
        *(("conv2", 1, torch.float64), ("conv2", 3, torch.float32)),
    ],
    ids=str,
)
def test_the_vendors_layers_against_autograd(name: str, batch: int, dtype: torch.dtype) -> None:
    check(get_model(name), 1, batch, dtype, seed=0, vendor=True)


@st.composite
def networks(draw: st.DrawFn) -> Model:
    """Small convolutional networks with odd sizes, padding, strides, pools with a rest, pools before ReLU,
    batch norm, shortcuts.

    Behind a batch norm no further pool: rounding would decide its maxima.
    """
    channels, height, width = draw(st.integers(1, 3)), draw(st.integers(5, 11)), draw(st.integers(5, 11))
    layers: list[Layer | Node] = []
    size = min(height, width)
    for _ in range(draw(st.integers(0, 2))):
        kernel, padding = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 2))
        stride, filters = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 4))
        layers.append(Conv(filters, kernel, padding, stride))
        size = (size + 2 * padding - kernel) // stride + 1
        order: list[Layer] = [ReLU()]
        if size >= 4 and BatchNorm() not in layers:
            order.insert(draw(st.integers(0, 1)), MaxPool(draw(st.sampled_from([2, 3]))))
            size //= 3
        layers += [BatchNorm()] * draw(st.booleans()) + order
        layers += shortcut(draw, len(layers), Conv(filters, 3, 1))
        if size < 4:
            break
    if isinstance(layers[-1] if layers else None, ReLU) and draw(st.booleans()):
        layers.append(AvgPool())
    if draw(st.booleans()):
        units = draw(st.integers(1, 9))
        layers += [Linear(units), *[BatchNorm()] * draw(st.booleans()), ReLU()]
        layers += shortcut(draw, len(layers), Linear(units))
    return Model("random", (channels, height, width), (*layers, Linear(10)), {}, "")


def shortcut(draw: st.DrawFn, place: int, product: Layer) -> list[Layer | Node]:
    """Layers behind a ReLU at `place` - 1, whose output is read again behind them, once or twice; or none."""
    kind = draw(st.sampled_from(["none", "none", "product", "relu", "product, relu", "relu, product"]))
    if kind == "none":
        return []
    inner: list[Layer | Node] = [{"product": product, "relu": ReLU()}[name] for name in kind.split(", ")]
    last = place + len(inner) - 1
    inputs = draw(st.permutations([place - 1, last, *draw(st.sampled_from([[], [place], [last]]))]))
    return [*inner, Node(Add(), tuple(inputs)), *[ReLU()] * draw(st.booleans())]


@given(
    networks(), st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1.0, 0.5, 0.0])
)
def test_random_networks_against_autograd(
    model: Model, replicas: int, batch: int, seed: int, keep: float
) -> None:
    check(model, replicas, batch, torch.float64, seed, keep)
    check(model, 1, batch, torch.float64, seed, keep, vendor=True)


@pytest.mark.parametrize("vendor", [False, True])
def test_no_activation_is_lost_that_somebody_is_still_to_read(vendor: bool) -> None:
    """ReLUs of the image, of what a sum reads too, of a sum; gradients that a sum gives to two of them."""
    layers = (
        *(Node(ReLU(), (INPUT,)), Node(Conv(2, 3, 1), (INPUT,)), ReLU(), Node(Conv(2, 3, 1), (1,)), ReLU()),
        *(Node(Add(), (2, 4)), ReLU(), Node(Add(), (6, 1, 6)), Node(Conv(2, 1), (0,)), ReLU()),
        *(Node(Add(), (9, 7)), MaxPool(2), Node(Linear(3), (7,)), Node(Linear(3), (11,))),
        *(Node(Add(), (12, 13)), ReLU(), Node(Add(), (15, 15)), Linear(10)),
    )
    model = Model("busy", (2, 5, 4), layers, {}, "")
    for replicas in (1,) if vendor else (1, 3):
        check(model, replicas, 3, torch.float64, seed=0, vendor=vendor)
    for other in (model, Model("first", (1, 8, 5), (ReLU(), Linear(10)), {}, "")):
        flat = weights(other, 1, torch.Generator().manual_seed(0)).float()
        x = torch.randn(1, prod(other.input), 3, generator=torch.Generator().manual_seed(1))
        before = x.clone()
        (VendorNetwork(other, flat) if vendor else Network(other, flat, 3)).forward(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    "name",
    sorted(name for name in MODELS if name not in ("vgg16", "resnet56") and not MODELS[name].needs_autograd),
)
def test_every_live_weight_gets_a_gradient(name: str) -> None:
    # a peer compares `weight < EPS` without abs and freezes every negative weight
    model = get_model(name)
    flat = init_weights(model, stream(0, "ticket", 0, "init"))[None]
    grad = torch.zeros_like(flat)
    images = 16 if model.params.prunable > 10**6 else 64
    network = Network(model, flat, images, grad)
    x = torch.rand(1, prod(model.input), images, generator=torch.Generator().manual_seed(0))
    network.backward(cross_entropy_grad(network.forward(x), torch.arange(images).remainder(10)[None, None]))
    for spec in model.weights:
        slope = grad[0, spec.span]
        weight = flat[0, spec.span]
        positive, negative = ((slope[sign] != 0).double().mean() for sign in (weight > 0, weight < 0))
        assert min(positive, negative) > 0.3, spec.name  # units that are dead at initialisation have none
        assert abs(positive - negative) < 0.1, spec.name


@pytest.mark.parametrize("name", sorted(MODELS))
def test_glorot_law_and_zero_biases(name: str) -> None:
    model = get_model(name)
    flat = init_weights(model, stream(0, "ticket", 0, "init"))
    for spec in model.weights:
        values = flat[spec.span].double()
        std = (2 / (spec.fan_in + spec.fan_out)) ** 0.5
        slack = 5 * std / spec.numel**0.5
        assert abs(values.mean()) < slack
        assert abs(values.std() - std) < slack
    for spec in model.params.unpruned:
        fresh = 1.0 if spec.name.endswith(("scale", "var")) else 0.0
        assert (flat[spec.span] == fresh).all(), spec.name
    assert not torch.equal(flat, init_weights(model, stream(1, "ticket", 0, "init")))


def test_weight_counts() -> None:
    assert get_model("lenet-300-100").params.prunable == 266_200
    lenet5 = get_model("lenet5")
    assert [spec.numel for spec in lenet5.weights] == [150, 2_400, 48_000, 10_080, 840]


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 8))
def test_loss_and_right_answers(seed: int, replicas: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(replicas, 10, batch, generator=generator) * 5
    y = torch.randint(10, (replicas, 1, batch), generator=generator)
    loss, right = cross_entropy(logits, y)
    for r in range(replicas):
        expected = F.cross_entropy(logits[r].T.double(), y[r, 0], reduction="sum")
        assert float(loss[r]) == pytest.approx(float(expected), rel=1e-5)
        assert int(right[r]) == int((logits[r].argmax(0) == y[r, 0]).sum())
