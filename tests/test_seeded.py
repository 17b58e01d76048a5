"""Strong tickets as layers: the weights of the ticket to the bit, products within rounding, few bytes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_strong_tickets import scored, written
from torch import Tensor, nn

from sparselth import strong_tickets, tickets
from sparselth.data import load as load_images
from sparselth.errors import SparselthError
from sparselth.frozen import METHODS, Frozen, effective
from sparselth.kernels.hash_weights import hash_weights
from sparselth.models import Model, get_model
from sparselth.seeded import SeedConv2d, Seeded, SeedLinear, one_size, seeded

MODELS = {name: get_model(name) for name in ("lenet-300-100@0.1", "conv2@0.1", "resnet20@0.25")}
TURNED = {"iterand", "recycle", "biprop", "signed"}  # methods whose signs are not all those of the seed


def frozen_by(method: str, seed: int, **more: object) -> Frozen:
    """About 0.3 of the weights are kept; by supermask's chances, 0.8."""
    return METHODS[method].frozen(seed, keep=0.52 if method == "supermask" else 0.3, **more)  # type: ignore[arg-type]


def products(net: nn.Module) -> list[nn.Module]:
    kinds = (Seeded, nn.Linear, nn.Conv2d)
    return [module for module in net.modules() if isinstance(module, kinds)]


def near(y: Tensor, weight: Tensor, x: Tensor, product: nn.Module) -> None:
    """Within the bound that `sparselth.seeded` states."""

    def of(x: Tensor, weight: Tensor) -> Tensor:
        if weight.dim() == 2:
            return x @ weight.mT
        return nn.functional.conv2d(x, weight, None, product.stride, product.padding)  # type: ignore[arg-type]

    right, size = of(x.double(), weight.double()), of(x.double().abs(), weight.double().abs())
    assert ((y - right).abs() <= (weight[0].numel() + 2) * 2.0**-24 * size).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_ticket_is_the_network_that_was_measured(name: str, method: str, tmp_path: Path) -> None:
    model, file = MODELS[name], tmp_path / "seed5-ticket-00.safetensors"
    flat = written(file, model, frozen_by(method, 5))
    net, dense = strong_tickets.load(file).network(), tickets.load(file).trained().eval()
    assert not net.training
    assert not [*net.parameters()] or name.startswith("resnet")  # of its batch norms
    layers = products(net)
    assert all(isinstance(layer, Seeded) for layer in layers)
    for layer, spec in zip(layers, model.weights, strict=True):
        assert isinstance(layer, Seeded)
        assert torch.equal(layer.to_dense().flatten(), flat[spec.span])
        if spec.numel > 100:  # of a few kept weights, none may be turned
            assert (layer.turned is not None) == (method in TURNED)
        assert layer.share == pytest.approx(float((flat[spec.span] != 0).float().mean()))
        held = sum(tensor.numel() * tensor.itemsize for tensor in layer.state_dict().values())
        n, k = spec.matrix  # a byte is eight weights, another one their signs
        assert held == n * -(-k // 8) * (1 if layer.turned is None else 2)
    x = torch.randn(7, *model.input, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, right = net(x), dense.double()(x.double())
    assert (found - right).abs().max() <= 1e-4 * right.abs().max()


@pytest.mark.parametrize("batch", [1, 3, 49, 100])  # of the table's product, and of rows made in the cache
@pytest.mark.parametrize("method", ["edge-popup", "signed"])
def test_products_are_within_rounding(method: str, batch: int) -> None:
    model = MODELS["conv2@0.1"]
    frozen = METHODS[method].frozen(2, keep=0.4)
    net = seeded(model, effective(frozen, model.params, scored(model, frozen)[0]), 2)
    draw = torch.Generator().manual_seed(batch)
    for layer in products(net):
        assert isinstance(layer, Seeded)
        place = (layer.shape[1], 9, 7) if len(layer.shape) == 4 else (layer.shape[1],)
        x = torch.randn(batch, *place, generator=draw)
        near(layer(x), layer.to_dense(), x, layer)


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_weights_of_many_sizes_are_decoded(law: str, tmp_path: Path) -> None:
    model, file = MODELS["lenet-300-100@0.1"], tmp_path / "seed1-ticket-00.safetensors"
    for method in METHODS:
        flat = written(file, model, frozen_by(method, 1, law=law))
        for layer, spec in zip(products(strong_tickets.load(file).network()), model.weights, strict=True):
            assert isinstance(layer, Seeded if method == "biprop" else nn.Linear)
            weight = layer.to_dense() if isinstance(layer, Seeded) else layer.weight
            assert torch.equal(weight.flatten(), flat[spec.span])


def signs(n: int, k: int, seed: int = 0) -> Tensor:
    """Weights of one size, empty and full rows among them, signs of their own."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, k, generator=draw) < 0.4
    kept[0], kept[-1] = False, True
    return 0.3 * kept * torch.randn(n, k, generator=draw).sign()


def test_a_layer_takes_what_torchs_takes() -> None:
    weight = signs(13, 37)
    layer = SeedLinear(weight, 9, 2)
    for shape in ((37,), (5, 37), (2, 3, 37), (0, 37), (2, 0, 37)):
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], 13)
        torch.testing.assert_close(y, nn.functional.linear(x, weight))
    turned = torch.randn(37, 5).t()
    torch.testing.assert_close(layer(turned), nn.functional.linear(turned, weight))
    half = torch.randn(4, 37, dtype=torch.bfloat16)
    assert layer(half).dtype == torch.bfloat16
    images, filters = torch.randn(3, 4, 6, 5), signs(7, 36).view(7, 4, 3, 3)
    for stride, padding in ((1, 0), (2, 1), (3, 2)):
        torch.testing.assert_close(
            SeedConv2d(filters, 9, 2, stride, padding)(images),
            nn.functional.conv2d(images, filters, None, stride, padding),
        )
    x = torch.randn(5, 37, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.mT) @ weight)


def test_an_empty_layer_gives_0_and_a_pruned_weight_is_no_factor() -> None:
    empty = SeedLinear(torch.zeros(3, 5), 0, 0)
    assert torch.equal(empty(torch.full((2, 5), torch.inf)), torch.zeros(2, 3))
    weight = signs(6, 40)
    x = torch.randn(1, 40)
    x[0, 7] = torch.nan
    found = SeedLinear(weight, 0, 0)(x)[0]
    assert torch.equal(found.isnan(), weight[:, 7] != 0)


def test_copied_cast_loaded_and_compiled() -> None:
    weight, x = signs(8, 24), torch.randn(3, 24)
    net = nn.Sequential(SeedLinear(weight, 4, 1), nn.ReLU())
    right = net(x)
    assert torch.equal(copy.deepcopy(net)(x), right)
    assert net.bfloat16()[0].kept.dtype == torch.uint8
    assert torch.equal(net.float()(x), right)
    other = nn.Sequential(SeedLinear(-weight, 4, 1), nn.ReLU())
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), right)
    other.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(other(x), right)
    assert torch.equal(torch.compile(net, backend="eager")(x), right)
    assert net.to("meta")[0].kept.device.type == "meta"


def test_printed_it_says_what_it_holds() -> None:
    assert repr(SeedLinear(signs(8, 24), 4, 1)).startswith("SeedLinear([8, 24], seed 4, layer 1, 4")
    one = SeedLinear(hash_weights(4, 1, (8, 24)), 4, 1)
    assert "100.0 % kept, mask in 24 bytes, fp32 in 768" in repr(one)
    assert "mask and signs in 48 bytes" in repr(SeedLinear(signs(8, 24), 4, 1))
    assert "stride 2, padding 1" in repr(SeedConv2d(signs(8, 18).view(8, 2, 3, 3), 0, 0, 2, 1))


def test_one_size() -> None:
    assert one_size(torch.zeros(3))
    assert one_size(torch.tensor([0.5, -0.5, 0.0]))
    assert not one_size(torch.tensor([0.5, -0.5000001, 0.0]))


def test_real_digits_are_told_alike(tmp_path: Path) -> None:
    model, file = get_model("lenet-300-100"), tmp_path / "seed0-ticket-00.safetensors"
    written(file, model, METHODS["iterand"].frozen(0))
    images = load_images("mnist5k", Path())
    x = torch.from_numpy(images.test_images[:500]).reshape(-1, *model.input).float() / 255
    with torch.no_grad():
        found, right = strong_tickets.load(file).network()(x), tickets.load(file).trained().eval()(x)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    assert (found.argmax(1) != right.argmax(1)).sum() <= 1  # a tie at most


def test_what_is_no_strong_ticket_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(SparselthError, match="no such file"):
        strong_tickets.load(tmp_path / "none.safetensors")
    model: Model = MODELS["lenet-300-100@0.1"]
    weak = tmp_path / "seed0-ticket-00.safetensors"
    content = tickets.Content(model.params.full_mask().numpy(), torch.zeros(model.params.size).numpy())
    where = {"dataset": "mnist", "config": "0" * 8, "rewind_step": 0}
    tickets.save(weak, model.params, content, model=model.name, cell=weak.stem, **where)
    with pytest.raises(SparselthError, match=r"expected a strong ticket, .* found 'sparselth.cell/1'"):
        strong_tickets.load(weak)


def test_no_images_give_no_outputs(tmp_path: Path) -> None:
    model = MODELS["conv2@0.1"]
    frozen = frozen_by("edge-popup", 3)
    flat = METHODS["edge-popup"].start(frozen, model.params, torch.Generator().manual_seed(1))
    net = seeded(model, effective(frozen, model.params, flat), 3)
    assert net(torch.zeros(0, *model.input)).shape == (0, 10)
