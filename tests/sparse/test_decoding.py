"""A decoder with a cache as one program for one token: against float64, and as the graph it was made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversions import close, double, joins, leaves, random_masks, timing
from decoders import Decoder, past
from sparselth import sparse
from sparselth.sparse.decoding import JoinedDecoder

WIDTH = 24
Cache = list[tuple[Tensor, Tensor]]


class Apart(nn.Module):
    """Queries, keys and values of layers of their own, heads of 8, a scale."""

    def __init__(self, order: str = "", depth: int = 2) -> None:
        super().__init__()
        self.order, self.depth = order, depth
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor, cache: Cache) -> Any:
        b, t, _ = x.shape
        new = []
        for past_keys, past_values in cache:
            y = self.norm(x)
            q, k, v = (f(y).view(b, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            if self.order == "interleaved":
                q = q.transpose(1, 2).reshape(b, t, 8, 3).permute(0, 3, 1, 2)
            if self.order == "chained" and new:
                past_values, past_keys = new[-1]
            both = past_keys, k
            keys = torch.cat(tensors=both, dim=2) if self.order == "named" else torch.cat(both, -2)
            values = torch.concat([past_keys if self.order == "same" else past_values, v], dim=-2)
            mask = torch.zeros(1, keys.shape[2], dtype=x.dtype) if self.order == "mask" else None
            causal = self.order == "causal"
            if mask is None and not causal:
                y = F.scaled_dot_product_attention(q, keys, values, scale=0.3)
            else:
                y = F.scaled_dot_product_attention(q, keys, values, mask, 0.0, causal)
            y = y.transpose(1, 3) if self.order == "crossed" else y.transpose(1, 2)
            x = x + self.out(y.reshape(x.shape))
            y = self.down(F.gelu(self.up(self.norm(x))))
            x = x + (y * keys.mean() if self.order == "read" else y)
            x = x.unsqueeze(0) if self.order == "axes" else x
            new.append((values, keys))
        return {"cache": new, "x": x, "same": x.view(b, t, WIDTH)}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # the model, and how many attentions are joined
    "decoder": (lambda: Decoder(50, WIDTH, 3, 3), 3),
    "apart": (Apart, 2),
    "axes": (lambda: Apart("axes"), 2),
    "one": (lambda: Apart(depth=1), 1),
    "same": (lambda: Apart("same"), 0),
    "interleaved": (lambda: Apart("interleaved"), 0),
    "chained": (lambda: Apart("chained"), 0),
    "crossed": (lambda: Apart("crossed"), 0),
    "named": (lambda: Apart("named"), 0),
    "mask": (lambda: Apart("mask"), 0),
    "causal": (lambda: Apart("causal"), 0),
    "read": (lambda: Apart("read"), 0),
}


def given(model: nn.Module, batch: int = 1, new: int = 1, length: int = 5) -> Any:
    if isinstance(model, Decoder):
        return torch.randint(50, (batch, new)), past(3, 3, length, WIDTH, batch)
    assert isinstance(model, Apart)
    return torch.randn(batch, new, WIDTH), past(model.depth, 3, length, WIDTH, batch)


def converted(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.Module, nn.Module]:
    """And the model, and the dense masked one in float64."""
    monkeypatch.setattr(timing, "seconds", joins)
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval().requires_grad_(False)
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() == 2}
    exact = copy.deepcopy(model).double()
    for n, mask in masks.items():
        exact.get_parameter(n).mul_(mask)
    return sparse.convert(model, masks, given(model)), model, exact


def programs(network: nn.Module) -> list[JoinedDecoder]:
    return [m for m in network.modules() if isinstance(m, JoinedDecoder)]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_right_for_any_past_and_any_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, exact = converted(name, monkeypatch)
    assert fast.report.chosen == "joined tokens", fast.report
    assert sum(len(found.attentions) for found in programs(fast)) == NETWORKS[name][1]
    again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    ways = [(1, 1, 5), (1, 1, 0), (1, 1, 300), (3, 1, 5), (1, 4, 7), (1, 1, 6)]
    for batch, new, length in ways[:1] if name == "causal" else ways:
        for _ in range(2):  # the second on memory that was used
            inputs = given(model, batch, new, length)
            before = copy.deepcopy(inputs)
            found, right = fast(*inputs), exact(*double(inputs))
            assert type(found) is type(right)
            for y, reference in zip(leaves(found), leaves(right), strict=True):
                assert y.shape == reference.shape
                close(y, reference)
            assert all(map(torch.equal, leaves(inputs), leaves(before)))
            assert all(map(torch.equal, leaves(found), leaves(again(*inputs))))
    for one in programs(fast):
        assert len(one.run.chains) == 1  # other tokens went the way of the graph


def test_words_are_written_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, exact = converted("decoder", monkeypatch)
    word, cache = given(model, length=2)
    own, found = double(cache), []
    for _ in range(40):
        y, cache = fast(word, cache)
        right, own = exact(word, own)
        found.append((y, right))
        word = right.argmax(-1)
    for y, right in found:  # in memory of their own
        close(y, right)
    for one, other in zip(leaves(cache), leaves(own), strict=True):
        assert one.shape == (1, 3, 42, 8)
        close(one, other)


def test_what_is_past_may_lie_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, exact = converted("apart", monkeypatch)
    x, cache = given(model)
    wide = [tuple(torch.cat([t, t], 3)[..., :8] for t in pair) for pair in cache]
    turned = [tuple(t.mT.contiguous().mT for t in pair) for pair in cache]
    for lies in (wide, turned):
        for y, right in zip(leaves(fast(x, lies)), leaves(exact(*double((x, cache)))), strict=True):
            close(y, right)
    with pytest.raises((ValueError, RuntimeError)):
        fast(x, [(keys[:, :2], values) for keys, values in cache])


def test_nothing_of_others_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, _ = converted("decoder", monkeypatch)
    fast(*given(model))
    (program,) = programs(fast)[0].run.chains.values()
    assert not program.new
    assert not any(attention.held for attention in program.bound)


def test_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, exact = converted("decoder", monkeypatch)
    inputs = [given(model, length=length) for length in range(20)]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda one: fast(*one), inputs)]
    for y, one in zip(found, inputs, strict=True):
        for own, right in zip(leaves(y), leaves(exact(*double(one))), strict=True):
            close(own, right)


def test_other_weights_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, _ = converted("decoder", monkeypatch)
    inputs = given(model)
    state = {name: t.clone() for name, t in fast.state_dict().items()}
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in model.state_dict().values())
    before, _ = fast(*inputs)
    for changed in state:
        other = 2 * state[changed] + 0.1 * (state[changed].dim() == 1)
        fast.load_state_dict({**state, changed: other})
        assert not torch.equal(fast(*inputs)[0], before), changed
    fast.load_state_dict(state)
    assert torch.equal(fast(*inputs)[0], before)
