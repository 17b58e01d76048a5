"""RMS norms by their formula, in the words that people write them in, become one module each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparselth.sparse.norms import name_norms
from sparselth.sparse.tokens import Values

WIDTH = 12
Does = Callable[[Tensor, Tensor], Any]


class Norm(nn.Module):
    def __init__(self, does: Does) -> None:
        super().__init__()
        self.does, self.weight = does, nn.Parameter(0.5 + torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.does(x * 2, self.weight)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-3)).type_as(x) * weight


def transformers(x: Tensor, weight: Tensor) -> Tensor:
    dtype, x = x.dtype, x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-3)
    return weight * x.to(dtype)


NORMS: dict[str, Does] = {
    "llama": llama,
    "transformers": transformers,
    "gemma": lambda x, w: x * torch.rsqrt(torch.mean(x * x, -1, keepdim=True) + 1e-3) * (1.0 + w.float()),
    "square": lambda x, w: x.square().mean(dim=[-1], keepdim=True).add(1e-3).rsqrt() * x * w,
    "power": lambda x, w: x * (1e-3 + torch.mean(x**2, dim=(2,), keepdim=True)).rsqrt() * w,
    "function": lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-3),
    "named": lambda x, w: F.rms_norm(input=x, normalized_shape=[WIDTH], weight=w, eps=1e-3),
    "of torch": lambda x, w: F.rms_norm(x, (WIDTH,)),
    "bare": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "read": lambda x, w: (lambda y: (y, y * w))(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
    "again": lambda x, w: llama(llama(x, w), w),
}
OTHERS: dict[str, Does] = {
    "other axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3) * w,
    "two axes": lambda x, w: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-3) * w,
    "of another": lambda x, w: x.abs() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * w,
    "cubes": lambda x, w: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-3) * w,
    "product": lambda x, w: x * torch.rsqrt((x * (x + 1)).square().mean(-1, keepdim=True) + 1e-3) * w,
    "variance": lambda x, w: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3) * w,
    "added": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.mean()) * w,
    "root": lambda x, w: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "twice": lambda x, w: (lambda r: x * r + r)(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
    "double": lambda x, w: llama(x.double(), w.double()),
}


def named(does: Does) -> tuple[fx.GraphModule, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    graph = fx.symbolic_trace(Norm(does))
    before, x = copy.deepcopy(graph), torch.randn(2, 5, WIDTH)
    values = Values(graph)
    values.run(x)
    name_norms(graph, values)
    graph.recompile()
    graph.graph.lint()
    return graph, before, x


def same(found: Any, right: Any) -> None:
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_it_is_one_module(name: str) -> None:
    graph, before, x = named(NORMS[name])
    norms = [m for m in graph.modules() if isinstance(m, nn.RMSNorm)]
    assert len(norms) == 1 + (name == "again")
    same(graph(x), before(x))
    assert norms[0].elementwise_affine == (name not in ("bare", "read", "of torch"))
    assert norms[0].eps == (torch.finfo(torch.float32).eps if name == "of torch" else 1e-3)
    left = sum(node.op in ("call_function", "call_method") for node in graph.graph.nodes)
    assert left == (2 if name == "read" else 1)  # x * 2, and what others read
    if name not in ("bare", "read", "of torch", "gemma"):
        assert norms[0].weight is graph.weight or norms[0].weight is not None


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_norm_stays(name: str) -> None:
    graph, before, x = named(OTHERS[name])
    assert not any(isinstance(m, nn.RMSNorm) for m in graph.modules())
    same(graph(x), before(x))


def test_a_weight_for_each_token_stays_apart() -> None:
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight

    graph, x = fx.symbolic_trace(Each()), torch.randn(2, 5, WIDTH)
    right, values = graph(x), Values(graph)
    values.run(x)
    name_norms(graph, values)
    graph.recompile()
    (norm,) = (m for m in graph.modules() if isinstance(m, nn.RMSNorm))
    assert norm.weight is None
    same(graph(x), right)


def test_weights_of_another_shape_stay_apart() -> None:
    graph, before, x = named(
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * w[None, None]
    )
    (norm,) = (m for m in graph.modules() if isinstance(m, nn.RMSNorm))
    assert norm.weight is None
    same(graph(x), before(x))
