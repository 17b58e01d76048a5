"""Products that are cut in parts become a layer for each part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversions import close, joins, random_masks, timing
from sparselth import sparse
from sparselth.sparse.reference import Given
from sparselth.sparse.splitting import split_products
from sparselth.sparse.tracing import trace

K, HIDDEN = 12, 20


class Gated(nn.Module):
    def __init__(self, does: Callable[..., Any], bias: bool = True) -> None:
        super().__init__()
        self.does, self.both, self.down = does, nn.Linear(K, 2 * HIDDEN, bias), nn.Linear(HIDDEN, K)

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


def chunked(m: Any, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, dim=-1)
    return m.down(F.silu(gate) * up)


def split(m: Any, x: Tensor) -> Tensor:
    up, gate = torch.split(m.both(x), [8, 2 * HIDDEN - 8], -1)
    return m.down(F.pad(F.gelu(gate)[..., :8] * up, (0, HIDDEN - 8)))


def evenly(m: Any, x: Tensor) -> Tensor:
    up, gate = m.both(x).split(HIDDEN, dim=-1)
    return m.down(torch.sigmoid(gate) * up) + m.down(F.relu(up))


def one_of_two(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.both(x).chunk(2, -1)[1]))


def twice(m: Any, x: Tensor) -> Tensor:
    """One layer, called for two things."""
    return chunked(m, x) + chunked(m, 2 * x)


def tokens(m: Any, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, dim=1)
    return m.down((up * F.relu(gate))[..., :HIDDEN])


def tokens_by_default(m: Any, x: Tensor) -> Tensor:
    up, gate = m.both(x.transpose(0, 1)).chunk(2)
    return m.down((up * F.relu(gate))[..., :HIDDEN])


def read_whole(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.both(x)
    gate, up = y.chunk(2, -1)
    return m.down(F.silu(gate) * up), y


def heads(m: Any, x: Tensor) -> Tensor:
    q, k = m.both(x).chunk(2, -1)
    return m.down(q.unflatten(-1, (4, 5)).sin().flatten(-2) * k)


def iterated(m: Any, x: Tensor) -> Tensor:
    return m.down(sum(m.both(x).chunk(2, -1)))


SPLIT = {chunked: [20, 20], split: [8, 32], evenly: [20, 20], one_of_two: [20], twice: [20] * 4}
WHOLE = tokens, tokens_by_default, read_whole, heads, iterated


@pytest.mark.parametrize("does", [*SPLIT, *WHOLE])
@pytest.mark.parametrize("bias", [True, False])
def test_each_part_is_a_layer(does: Any, bias: bool) -> None:
    torch.manual_seed(0)
    model, x = Gated(does, bias).eval(), torch.randn(3, 6, K)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traced = trace(model, Given.of(model, x))
    split_products(traced)
    layers = [m for m in traced.modules() if isinstance(m, nn.Linear)]
    widths = sorted(m.out_features for m in layers if m.in_features == K)
    assert widths == SPLIT.get(does, [2 * HIDDEN])
    for y, right in zip(traced(x), model(x), strict=True):
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("does", [*SPLIT, *WHOLE])
def test_conversion(does: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", joins)
    torch.manual_seed(0)
    model = Gated(does).eval().requires_grad_(False)
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() == 2}
    fast = sparse.convert(model, masks, torch.randn(3, 6, K))
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
    for shape in ((3, 6), (1, 6), (5, 2)):
        x = torch.randn(*shape, K)
        found, right = fast(x), model.double()(x.double())
        model.float()
        pairs = zip(found, right, strict=True) if isinstance(right, tuple) else [(found, right)]
        for y, own in pairs:
            close(y, own)


def test_gated_units_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", joins)
    model = Gated(chunked).eval().requires_grad_(False)
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() == 2}
    fast = sparse.convert(model, masks, torch.randn(3, 6, K))
    (program,) = (m for m in fast.modules() if type(m).__name__ == "JoinedTokens")
    assert [step.product for step in program.steps] == [False, False, True, False]
    x = torch.randn(3, 6, K)
    torch.testing.assert_close(program._apart((x,)), program(x), rtol=1e-5, atol=1e-6)


def test_hooks_keep_a_product_whole() -> None:
    model = Gated(chunked).eval()
    model.both.register_forward_hook(lambda m, args, y: y + 1)
    x = torch.randn(2, K)
    traced = trace(model, Given.of(model, x))
    split_products(traced)
    assert any(isinstance(m, nn.Linear) and m.out_features == 2 * HIDDEN for m in traced.modules())
    torch.testing.assert_close(traced(x), model(x))
