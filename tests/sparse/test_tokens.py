"""What stands between two attentions as one program: against float64, and as what it was made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from conversions import close, double, joins, leaves, random_masks, times, timing
from decoders import Decoder, past
from sparselth import sparse
from sparselth.kernels import _native
from sparselth.kernels.step_parts import Call
from sparselth.sparse.tokens import JoinedTokens

WIDTH = 24


class Odd(nn.Module):
    """Values that others read, too, a sum with itself and one in place, a layer called twice, one for nobody,
    sums of what is not as many tokens and of what is no tensor, heads of views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm, self.plain = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.add = nn.Bilinear(WIDTH, WIDTH, WIDTH)  # no sum, whatever its name
        self.position = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(self.norm(x + self.position))
        y = y + y
        z = self.b(self.plain(y))
        z += x
        self.c(z)
        wide = self.a(z).unflatten(-1, (2, -1))
        last = F.gelu(self.c(y.cos() + z)) + 1
        some = self.norm(self.b(z[..., :1, :])) + z
        return y, wide.transpose(-1, -2), self.add(last, z), self.norm(self.c(some)) + last


class Mixed(nn.Module):
    """Three products of one norm, an activation that Python calls, a sum of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        x = x + past
        y = self.first(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + self.down(F.silu(self.up(self.second(x))))


class Causal(nn.Module):
    """Words behind each other, whose positions and whose mask are buffers, cut to the length of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.qkv, self.out = (
            nn.Embedding(50, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.norms, self.drop = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)), nn.Dropout()
        self.register_buffer("places", torch.randn(16, WIDTH), persistent=False)
        self.register_buffer("mask", torch.ones(16, 16).tril() == 0)

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = F.dropout(input=self.words(ids) + self.places[:t], training=False)
        parts = self.qkv(self.norms[0](x)).split(WIDTH, 2)
        q, k, v = (parts[i].view(b, t, 2, -1).transpose(1, 2) for i in range(3))
        scores = (q @ k.mT).masked_fill(self.mask[:t, :t], -torch.inf)
        x = x + self.drop(self.out((self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(b, t, WIDTH)))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def vision() -> nn.Module:
    model = VisionTransformer(16, 4, 2, 2, WIDTH, 32, num_classes=7)
    nn.init.normal_(model.heads.head.weight)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], int]] = {
    # the model, inputs for a batch, and how many programs there are
    "decoder": (
        lambda: Decoder(50, WIDTH, 2, 2),
        lambda b: (torch.randint(50, (b, 1 if b < 3 else 4)), past(2, 2, 5, WIDTH, b)),
        3,
    ),
    "causal": (Causal, lambda b: (torch.randint(50, (b, 2 * b + 1)),), 2),
    "vision": (vision, lambda b: (torch.randn(b, 3, 16, 16),), 3),
    "odd": (Odd, lambda b: (torch.randn(b, 5, WIDTH),), 4),
    "mixed": (Mixed, lambda b: tuple(torch.randn(b, 6, WIDTH) for _ in range(2)), 2),
}


def tokens_alone(calls: Mapping[str, Call], sample: Any) -> Any:
    """A clock by which blocks are slow."""
    return times({n: 1.0 if n == "joined blocks" else s for n, s in joins(calls, sample).items()})


def converted(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.Module]:
    """And the dense masked network in float64."""
    monkeypatch.setattr(timing, "seconds", tokens_alone)
    torch.manual_seed(0)
    make, draw, _ = NETWORKS[name]
    model = make().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.weight.normal_()
            module.bias.normal_()
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() == 2}
    exact = copy.deepcopy(model).double()
    for n, mask in masks.items():
        exact.get_parameter(n).mul_(mask)
    return sparse.convert(model, masks, draw(2)), exact


def programs(network: nn.Module) -> list[JoinedTokens]:
    return [m for m in network.modules() if isinstance(m, JoinedTokens)]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_right_for_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = converted(name, monkeypatch)
    _, draw, count = NETWORKS[name]
    assert fast.report.chosen == "joined tokens", fast.report
    if _native.LIB is not None:
        assert "csr_tiled" in {layer.chosen for layer in fast.report.layers}
    assert len(programs(fast)) == count
    again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    for batch in (2, 1, 7):
        for _ in range(2):  # the second on memory that was used
            given = draw(batch)
            before = copy.deepcopy(given)
            found, right = leaves(fast(*given)), leaves(exact(*double(given)))
            for y, reference in zip(found, right, strict=True):
                close(y, reference)
            assert all(torch.equal(a, b) for a, b in zip(leaves(given), leaves(before), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(found, leaves(again(*given)), strict=True))
    assert all(len(held.run.chains) == 3 for held in programs(fast))  # a program a number of tokens


def test_all_between_two_attentions_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = converted("decoder", monkeypatch)
    graph = fast.network.graph
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["model.words", "joined_tokens0", "joined_tokens1", "joined_tokens2"]
    first, middle, last = programs(fast)
    assert (first.widths, first.outputs) == ([WIDTH], [2])
    assert [step.part is None for step in middle.steps] == [False, True, False, False, True, False, False]
    # what the next one adds to stays as it lies; queries, keys and values are as torch wants them
    assert middle.outputs == [*middle.turned, middle.steps[-1].value]
    assert last.outputs == [last.steps[-1].value]
    assert not last.turned


def test_what_comes_in_from_elsewhere_goes_through_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = converted("mixed", monkeypatch)
    x, row = torch.randn(3, 6, WIDTH), torch.randn(WIDTH)
    chains = programs(fast)[0].run.chains
    count = len(chains)
    close(fast.network(x, row), exact(x.double(), row.double()))
    assert len(chains) == count  # a sum of tokens and one row
    close(fast(x.mT.contiguous().mT, x), exact(x.double(), x.double()))
    assert len(chains) == count + 1
    assert fast(x[:0], x[:0]).shape == (0, 6, WIDTH)


def test_other_weights_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = converted("mixed", monkeypatch)
    x = torch.randn(3, 6, WIDTH)
    state = {name: t.clone() for name, t in fast.state_dict().items()}
    before = fast(x, x)
    linear, norm = (next(n for n, t in state.items() if t.dim() == dim) for dim in (2, 1))
    for changed in (linear, norm):
        fast.load_state_dict({n: 2 * t if n == changed else t for n, t in state.items()})
        assert not torch.allclose(fast(x, x), before)
    fast.load_state_dict(state)
    assert torch.equal(fast(x, x), before)
    held = next(part for part in programs(fast)[0].parts if isinstance(part, nn.LayerNorm))
    held.weight = nn.Parameter(2 * held.weight, requires_grad=False)
    assert not torch.allclose(fast(x, x), before)


def test_what_does_not_pay_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(calls: Mapping[str, Call], sample: Any) -> Any:
        return times({n: 1e-9 if n == "converted" else s for n, s in joins(calls, sample).items()})

    make, draw, _ = NETWORKS["decoder"]
    model = make().eval()
    monkeypatch.setattr(timing, "seconds", apart)
    fast = sparse.convert(model, random_masks(model, 0.3), draw(2))
    assert fast.report.chosen == "converted"
    assert {*fast.report.networks} == {"original", "converted", "joined tokens"}
    assert not programs(fast)
    assert "joined tokens" in sparse.explain(fast)
