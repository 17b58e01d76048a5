"""Networks that people use, at small sizes: in float64 they are what they were, every layer has a form."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from conversions import NATIVE, prefer, timing
from decoders import Decoder, past
from sparselth import sparse
from sparselth.check import check
from sparselth.kernels import _native

FAST = (*NATIVE, "mixed", "converted", "to columns", "from columns")


class Translator(nn.Module):
    """An encoder and a decoder of torch's, with masks, in words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.net = nn.Transformer(16, 2, 2, 2, 32, batch_first=True, activation="gelu")

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        hidden = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        hidden = hidden.to(self.words.weight.dtype)
        padding = source == 0
        return self.net(self.words(source), self.words(target), tgt_mask=hidden, src_key_padding_mask=padding)


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 20, shape)


def images(size: int, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


zoo = torchvision.models
Make = Callable[[], nn.Module]
Inputs = Callable[[], tuple[Any, ...]]
NETWORKS: dict[str, tuple[Make, Inputs, Inputs, int]] = {  # inputs, others, how many layers take a form
    "resnet18": (lambda: zoo.resnet18(num_classes=7), lambda: images(33), lambda: images(47, 1), 21),
    "mobilenet_v3_small": (
        lambda: zoo.mobilenet_v3_small(num_classes=7),
        lambda: images(40),
        lambda: images(64, 3),
        54,
    ),
    "vit": (
        lambda: zoo.VisionTransformer(16, 8, 2, 2, 32, 64),
        lambda: images(16),
        lambda: images(16, 5),
        1 + 2 * 4 + 1,
    ),
    "convnext": (
        lambda: zoo.ConvNeXt([zoo.convnext.CNBlockConfig(8, 16, 1), zoo.convnext.CNBlockConfig(16, None, 1)]),
        lambda: images(32),
        lambda: images(48, 1),
        1 + 2 * 3 + 1 + 1,
    ),
    "decoder": (
        lambda: Decoder(20, 32, 2, 4),
        lambda: (ids(1, 1), past(2, 4, 6, 32, 1)),
        lambda: (ids(3, 2), past(2, 4, 9, 32, 3)),
        2 * 4 + 1,
    ),
    "encoder and decoder": (Translator, lambda: (ids(2, 5), ids(2, 4)), lambda: (ids(3, 7), ids(3, 4)), 24),
}


def prepared(make: Make) -> tuple[nn.Module, dict[str, Tensor]]:
    """With statistics as after training, and masks of all weights."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model, {n: torch.rand(p.shape) < 0.2 for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_people_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(*FAST))
    make, first, other, layers = NETWORKS[name]
    model, masks = prepared(make)
    twin = copy.deepcopy(model).requires_grad_(False)
    for n, mask in masks.items():
        dict(twin.named_parameters())[n].mul_(mask)
    example = first()
    converted = sparse.convert(model, masks, example)
    report = converted.report
    assert report.chosen == "converted"
    assert len(report.layers) == layers
    if _native.LIB is not None:
        assert {layer.chosen for layer in report.layers} <= {*NATIVE}
    assert not any(isinstance(m, nn.Linear | nn.Conv2d | nn.BatchNorm2d) for m in converted.modules())
    for inputs in (example, first(), other()):
        own = pytree.tree_leaves(twin(*inputs))
        wide = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
        right = pytree.tree_leaves(twin.double()(*wide))
        twin.float()
        for found, exact, torchs in zip(pytree.tree_leaves(converted(*inputs)), right, own, strict=True):
            assert check(found, exact, "fp32", terms=2000, own=torchs).fault is None
    again = pickle.loads(pickle.dumps(converted))
    assert [form.name for form in again.forms] == [form.name for form in converted.forms]
    for found, wanted in zip(*(pytree.tree_leaves(net(*example)) for net in (again, converted)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "keys of other widths", "alone"])
def test_attention(kind: str, batch_first: bool, weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that nn.MultiheadAttention takes: masks of both kinds, no batch, weights of each head."""
    monkeypatch.setattr(timing, "seconds", prefer(*FAST))
    torch.manual_seed(0)
    width, heads, b, t, s = 12, 3, 2, 5, 5 if kind == "self" else 4
    other = {"kdim": 7, "vdim": 9} if kind == "keys of other widths" else {}
    model = nn.MultiheadAttention(width, heads, batch_first=batch_first, **other).eval()
    masks = {n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters() if p.dim() > 1}

    def tensor(length: int, size: int) -> Tensor:
        if kind == "alone":
            return torch.randn(length, size)
        return torch.randn(*((b, length) if batch_first else (length, b)), size)

    q = tensor(t, width)
    k, v = q, q
    if kind != "self":
        k, v = tensor(s, other.get("kdim", width)), tensor(s, other.get("vdim", width))
    padding = torch.zeros(s, dtype=torch.bool) if kind == "alone" else torch.zeros(b, s, dtype=torch.bool)
    padding[..., -1] = True
    heads_apart = torch.randn(heads if kind == "alone" else b * heads, t, s)
    cases: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.rand(t, s) < 0.3, "average_attn_weights": False},
        {"attn_mask": heads_apart, "key_padding_mask": torch.zeros(padding.shape).masked_fill(padding, -1e4)},
    ]
    twin = copy.deepcopy(model).requires_grad_(False)
    for n, mask in masks.items():
        dict(twin.named_parameters())[n].mul_(mask)
    twin.double()
    for case in cases:
        given = {"query": q, "key": k, "value": v, "need_weights": weights} | case
        converted = sparse.convert(model, masks, given)
        assert len(converted.report.layers) == (2 if kind == "self" else 4)
        floats = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
        wide = given | {n: x.double() for n, x in floats.items()}
        for found, exact in zip(converted(**given), twin(**wide), strict=True):
            assert (found is None) == (exact is None)
            assert found is None or check(found, exact, "fp32", terms=500).fault is None


def test_dense_is_kept_where_dense_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock prefers what torch does: then it is the model's own copy that runs, zeros and all."""
    monkeypatch.setattr(timing, "seconds", prefer("dense", "original"))
    model, masks = prepared(NETWORKS["convnext"][0])
    x = torch.randn(2, 3, 32, 32)
    converted = sparse.convert(model, masks, x)
    assert converted.report.chosen == "original"
    assert {layer.chosen for layer in converted.report.layers} == {"dense"}
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in converted.modules()) == 9
    with torch.no_grad():
        for n, mask in masks.items():
            dict(model.named_parameters())[n].mul_(mask)
        assert torch.equal(converted(x), model(x))
