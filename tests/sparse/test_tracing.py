"""What torch.fx does not see into: shapes that are unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselth.sparse.reference import Given
from sparselth.sparse.tracing import trace


class Reshaped(nn.Module):
    """With batch norm, dropout and a parameter of its own in front, that unpacking computes once more."""

    def __init__(self, does: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.does, self.first, self.scale = does, nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.norm = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        return self.does(self.norm(self.first(x) * self.scale))


def unpacked(x: Tensor) -> Tensor:
    return (lambda b, t, k: x.new_ones(t, k) * b)(*x.shape)


def of_pairs(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.cat((-b, a), -1)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "star": lambda x: x.view(*x.shape),
    "slice": lambda x: x.reshape(*x.shape[:-1], -1, 2).flatten(-2),
    "size": lambda x: x.reshape(*x.size()[:-1], 4, -1).mean(-1),
    "list": lambda x: x.view([*x.shape[:2], 2, 4]),
    "sum": lambda x: sum(d for d in x.shape) * x,
    "arguments": unpacked,
    "pairs": of_pairs,
    "parts": lambda x: [part * i for i, part in enumerate(x.chunk(3, -1))],
    "twice": lambda x: of_pairs(of_pairs(x)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_unpacked_is_traced(way: str) -> None:
    torch.manual_seed(0)
    model = Reshaped(WAYS[way]).eval().requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traced = trace(model, Given.of(model, torch.randn(2, 5, 8)))
    traced.graph.lint()
    for batch in (2, 1, 7):
        x = torch.randn(batch, 5, 8)
        found, right = traced(x), model(x)
        pairs = zip(found, right, strict=True) if isinstance(right, list) else [(found, right)]
        assert all(torch.equal(y, own) for y, own in pairs)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert sum(node.op == "call_module" for node in traced.graph.nodes) <= 3  # none was noted once more


def test_a_length_is_not_known() -> None:
    model = Reshaped(lambda x: x * len(x)).eval()
    with pytest.raises(TypeError, match="a length is not known while torch"):
        trace(model, Given.of(model, torch.randn(2, 5, 8)))
