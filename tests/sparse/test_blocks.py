"""Blocks of transformers as one program, for sequences and for a decoder's one token: against float64, and as
the graph they were made of."""

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

from conversions import close, double, joins, leaves, random_masks, times, timing
from decoders import Decoder, past
from sparselth import sparse
from sparselth.sparse.blocks import JoinedBlocks

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
    "chained": (lambda: Apart("chained"), 1),
    "crossed": (lambda: Apart("crossed"), 0),
    "named": (lambda: Apart("named"), 0),
    "mask": (lambda: Apart("mask"), 0),
    "causal": (lambda: Apart("causal"), 0),
    "read": (lambda: Apart("read"), 2),
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


def programs(network: nn.Module) -> list[JoinedBlocks]:
    return [m for m in network.modules() if isinstance(m, JoinedBlocks)]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_right_for_any_past_and_any_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, exact = converted(name, monkeypatch)
    assert fast.report.chosen == ("joined blocks" if NETWORKS[name][1] else "joined tokens"), fast.report
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


class Sequences(nn.Module):
    """Two blocks in which tokens of a sequence attend to each other, in one of the ways to write that."""

    def __init__(self, way: str, width: int = WIDTH) -> None:
        super().__init__()
        self.way, self.heads = way, width // 8
        self.register_buffer("bias", torch.randn(9, 9))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 40), nn.Linear(40, width), nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Any:
        sdpa, y, more = F.scaled_dot_product_attention, x, x.cos()
        for block in range(2):
            parts = self.qkv(self.first(x))
            b, t, _ = x.shape
            if self.way == "windows" and not block:  # of three tokens, each a sequence
                q, k, v = parts.view(3 * b, t // 3, 3, self.heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
            elif self.way == "turned":  # heads of three numbers each, eight of them
                q, k, v = parts.view(b, t, 8, 9).permute(0, 2, 1, 3).chunk(3, -1)
            elif self.way == "mixed":  # every eighth number is one head's
                q, k, v = parts.view(b, t, 3, 8, self.heads).permute(2, 0, 4, 1, 3).unbind(0)
            elif self.way == "tokens first":  # which attend to those of other sequences
                q, k, v = parts.view(b, t, 3, self.heads, 8).permute(2, 1, 3, 0, 4).unbind(0)
            else:
                cut = parts.chunk(3, -1)
                q, k, v = (cut[i].unflatten(-1, (self.heads, 8)).transpose(1, 2) for i in range(3))
            if self.way == "causal":
                y = sdpa(q, k, v, is_causal=True)
            elif self.way == "asked":
                y = sdpa(q, k, v, is_causal=t > 1)
            elif self.way == "positional":
                y = sdpa(q, k, v, None, 0.0, True)
            elif self.way == "scale":
                y = sdpa(q, k, v, scale=0.3)
            elif self.way == "same":
                y = sdpa(v, v, v)
            elif self.way == "mask":
                y = sdpa(q, k, v, self.bias[:t, :t])
            elif self.way == "crossed":
                y = sdpa(q, k[:, :, : t - 1], v[:, :, : t - 1])
            elif self.way == "late" and block:
                y = sdpa(q, k.cos(), v)
            else:
                y = sdpa(q, k, v)
            y = y.permute(2, 0, 1, 3) if self.way == "tokens first" else y.transpose(1, 2)
            x = x + self.out(y.reshape(x.shape))
            x = x + more if self.way == "two" else x  # tokens from outside, too
            x = x + self.down(F.gelu(self.up(self.second(x))))
        if self.way == "class":  # of the first token alone
            return self.head(self.first(x[:, 0]))
        return self.first(x), y.square().mean() if self.way == "read" else x


SEQUENCES = {  # how many attentions are joined
    **dict.fromkeys(("plain", "two", "turned", "causal", "positional", "scale", "same", "class"), 2),
    **dict.fromkeys(("late", "read"), 1),
    **dict.fromkeys(("mixed", "tokens first", "mask", "crossed", "asked"), 0),
}


def sequences(
    way: str, monkeypatch: pytest.MonkeyPatch, batch: int = 2, fastest: str = "joined blocks"
) -> tuple[Any, nn.Module]:
    """A converted one, and the dense one in float64."""

    def seconds(calls: Any, sample: Any) -> Any:
        return times({n: 1e-9 if n == fastest else s for n, s in joins(calls, sample).items()})

    monkeypatch.setattr(timing, "seconds", seconds)
    torch.manual_seed(0)
    model = Sequences(way).eval().requires_grad_(False)
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() == 2}
    exact = copy.deepcopy(model).double()
    for n, mask in masks.items():
        exact.get_parameter(n).mul_(mask)
    return sparse.convert(model, masks, torch.randn(batch, 9, WIDTH)), exact


def are_right(fast: Any, exact: nn.Module, *shape: int) -> list[Tensor]:
    x = torch.randn(*shape)
    before, found = x.clone(), leaves(fast(x))
    for y, right in zip(found, leaves(exact(x.double())), strict=True):
        assert y.shape == right.shape
        close(y, right)
    assert torch.equal(x, before)
    return [x, *found]


@pytest.mark.parametrize("way", SEQUENCES)
def test_sequences_are_right_for_any_batch_and_length(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = sequences(way, monkeypatch)
    count = SEQUENCES[way]
    assert fast.report.chosen == ("joined blocks" if count else "joined tokens"), fast.report
    assert sum(len(found.attentions) for found in programs(fast)) == count
    assert ("joined blocks" in fast.report.networks) == bool(count)  # nor is there one that is wrong
    again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    for shape in ((2, 9), (2, 9), (1, 9), (5, 9), (2, 4), (2, 1), (9, 2)):
        x, *found = are_right(fast, exact, *shape, WIDTH)
        assert all(map(torch.equal, found, leaves(again(x))))
    for one in programs(fast):
        assert len(one.run.chains) == 1  # other shapes went the way of the graph


def test_one_sequence_whose_tokens_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single one either order of axes is the same memory; of more it is not, and goes apart."""
    monkeypatch.setattr(timing, "seconds", joins)
    model = Sequences("tokens first").eval()
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() == 2}
    exact = copy.deepcopy(model).double()
    for n, mask in masks.items():
        exact.get_parameter(n).data.mul_(mask)
    fast = sparse.convert(model, masks, torch.randn(9, 1, WIDTH))
    assert sum(len(found.attentions) for found in programs(fast)) == 2
    with torch.no_grad():
        for shape in ((9, 1), (9, 2), (1, 9), (4, 1)):
            are_right(fast, exact, *shape, WIDTH)


@pytest.mark.parametrize("way", ["plain", "two"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sequences_in_parts(threads: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other through all steps, each with the bits of one alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast, exact = sequences(way, monkeypatch, 5, "joined blocks in parts")
        assert fast.report.chosen == "joined blocks in parts"
        (one,) = programs(fast)
        assert len(one.given) == 1 + (way == "two")
        again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
        for _ in range(2):
            x, *found = are_right(fast, exact, 5, 9, WIDTH)
            assert all(map(torch.equal, found, leaves(again(x))))
        assert {*one.run.held} == {(9, thread) for thread in range(threads)}
        are_right(fast, exact, 3, 9, WIDTH)
    finally:
        torch.set_num_threads(before)


def test_a_single_sequence_has_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = sequences("plain", monkeypatch, 1)
    assert "joined blocks" in fast.report.networks
    assert "joined blocks in parts" not in fast.report.networks


def test_sequences_of_several_lengths_have_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = sequences("windows", monkeypatch)
    assert [step.tokens for one in programs(fast) for step in one.attentions] == [3, 9]
    assert "joined blocks in parts" not in fast.report.networks
    for batch in (2, 2, 1, 5):
        are_right(fast, exact, batch, 9, WIDTH)


def test_tokens_of_another_dtype_go_the_way_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = sequences("plain", monkeypatch)
    (one,) = programs(fast)
    given, apart = [torch.randn(shape) for shape in one.given], list[Any]()
    one(*given)
    monkeypatch.setattr(one.apart, "forward", lambda *xs: apart.append(xs))
    one(*given)
    assert not apart
    one(*(t.double() for t in given))
    assert len(apart) == 1
