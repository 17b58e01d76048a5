"""Decoders as most of today's are, in the words that people write them in: one program, against float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from conversions import close, double, joins, leaves, random_masks, times, timing
from decoders import Llama, halves, past
from sparselth import sparse
from sparselth.sparse.blocks import Attention, HeadNorm, JoinedBlocks, Rotary
from sparselth.sparse.heads import Layout, Place, count, place, place_of
from sparselth.sparse.reference import Given
from sparselth.sparse.tokens import JoinedTokens, Values
from sparselth.sparse.tracing import trace

WORDS, WIDTH, HEADS, HIDDEN = 50, 48, 6, 40


def sliced(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return (x * cos[None, None]) + (torch.cat((-b, a), dim=-1) * sin[None, None])


def each_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    a, b = torch.chunk(x, 2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    a, b = x.split(half, -1)
    return torch.cat([a * cos + b * sin, a * -sin + b * cos], -1)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).type_as(x)


def every_second(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return cos * x + sin * torch.stack((-b, a), -1).flatten(-2)


def in_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((halves(x[..., :half], cos[:, :half], sin[:, :half]), x[..., half:]), -1)


def tokens_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return halves(x.transpose(1, 2), cos[:, None], sin[:, None]).transpose(1, 2)


def by_its_own(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Angles that every layer computes anew."""
    angles = torch.arange(x.shape[2]).outer(torch.ones(x.shape[3])) * 0.1
    return halves(x, angles.cos(), angles.sin())


def by_positions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each sequence of a batch with others, as [B, 1, T, D]."""
    more = torch.arange(1.0, x.shape[0] + 1)[:, None, None, None]
    return halves(x, (cos * more).cos(), (sin * more).sin())


def each_half_but(x: Tensor, cos: Tensor, sin: Tensor, first: Callable[..., Tensor]) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, : a.shape[-1]], sin[:, : a.shape[-1]]
    return torch.cat((first(a, b, cos, sin), a * sin + b * cos), -1)


def by_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Angles that are others for each head."""
    more = torch.arange(1.0, x.shape[1] + 1)[:, None, None]
    return halves(x, cos * more, sin * more)


def by_number(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of heads that are not turned alike: no rotary positions."""
    return x * torch.arange(1.0, x.shape[1] + 1)[:, None, None] + x.flip(-1) * sin


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of numbers that change below a view of them."""
    a, b = x.chunk(2, -1)
    x = x.mul_(2 * cos)
    return x + torch.cat((-b, a), -1) * sin


def thrice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return halves(x, cos, sin) + x * cos.square()


def by_itself(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x * x


WORDINGS = (
    halves,
    sliced,
    each_half,
    backwards,
    neighbours,
    every_second,
    in_part,
    tokens_first,
    by_its_own,
    by_positions,
)
OTHERS = (in_place, by_head, by_number, thrice, by_itself)


def made(monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: Any) -> tuple[Any, nn.Module]:
    """It converted, and the dense masked one in float64."""
    monkeypatch.setattr(timing, "seconds", joins)
    model.eval().requires_grad_(False)
    for t in model.parameters():
        if t.dim() == 1:
            t.copy_(0.5 + torch.rand_like(t))  # of norms
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() == 2 and not n.startswith("words")}
    exact = copy.deepcopy(model).double()
    for n, mask in masks.items():
        exact.get_parameter(n).mul_(mask)
    fast = sparse.convert(model, masks, inputs)
    blocks = [m for m in fast.modules() if isinstance(m, JoinedBlocks)]
    assert ("joined blocks" in fast.report.networks) == bool(blocks)  # nor was there one that is wrong
    return fast, exact


def steps(network: nn.Module, kind: type) -> list[Any]:
    return [
        s for m in network.modules() if isinstance(m, JoinedBlocks) for s in m.steps if isinstance(s, kind)
    ]


def llama(rotate: Any = halves, shared: int = 2) -> Llama:
    torch.manual_seed(0)
    return Llama(WORDS, WIDTH, 2, HEADS, shared, HIDDEN, rotate)


def behind(length: int = 5, shared: int = 2, batch: int = 1, new: int = 1) -> Any:
    return torch.randint(WORDS, (batch, new)), past(2, shared, length, WIDTH // HEADS * shared, batch)


def right(fast: nn.Module, exact: nn.Module, *inputs: Any) -> None:
    found, reference = fast(*inputs), exact(*double(inputs))
    for y, own in zip(leaves(found), leaves(reference), strict=True):
        assert y.shape == own.shape
        close(y, own)


@pytest.mark.parametrize("rotate", [*WORDINGS, *OTHERS])
def test_a_token_behind_others(rotate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = made(monkeypatch, llama(rotate), behind())
    whole = rotate in WORDINGS
    assert len(steps(fast, Attention)) == 2 * whole
    assert len(steps(fast, Rotary)) == 4 * whole
    held = io.BytesIO()
    torch.save(fast, held)
    held.seek(0)
    again = torch.load(held, weights_only=False)
    for batch, new, length in ((1, 1, 5), (1, 1, 5), (1, 1, 0), (1, 1, 301), (2, 1, 5), (1, 3, 4)):
        inputs = behind(length, 2, batch, new)
        right(fast, exact, *inputs)
        assert all(map(torch.equal, leaves(fast(*inputs)), leaves(again(*inputs))))
    for one in fast.modules():
        assert (
            not isinstance(one, JoinedBlocks) or len(one.run.chains) == 1
        )  # others went the way of the graph


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rotate", [*WORDINGS, *OTHERS])
def test_sequences(rotate: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = made(monkeypatch, llama(rotate), torch.randint(WORDS, (batch, 9)))
    whole = rotate in WORDINGS
    assert len(steps(fast, Attention)) == 2 * whole
    assert len(steps(fast, Rotary)) == 4 * whole
    assert all(step.shared == 2 for step in steps(fast, Attention))
    again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    for shape in ((batch, 9), (batch, 9), (2, 9), (batch, 4), (1, 1)):
        ids = torch.randint(WORDS, shape)
        right(fast, exact, ids)
        assert torch.equal(fast(ids), again(ids))


@pytest.mark.parametrize("threads", [1, 2])
def test_sequences_in_parts(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own angles, and the bits of one alone."""

    def seconds(calls: Any, sample: Any) -> Any:
        return times({n: 1e-9 if n.endswith("in parts") else s for n, s in joins(calls, sample).items()})

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, ids = llama(by_positions).eval().requires_grad_(False), torch.randint(WORDS, (3, 9))
        monkeypatch.setattr(timing, "seconds", seconds)
        fast = sparse.convert(model, None, ids)
        assert fast.report.chosen == "joined blocks in parts"
        assert len(steps(fast, Rotary)) == 4
        exact = copy.deepcopy(model).double()
        for _ in range(2):
            right(fast, exact, torch.randint(WORDS, (3, 9)))
    finally:
        torch.set_num_threads(before)


def test_angles_of_all_layers_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for rotate in (halves, each_half, backwards, sliced, tokens_first):
        fast, _ = made(monkeypatch, llama(rotate), behind())
        (one,) = (m for m in fast.modules() if isinstance(m, JoinedBlocks))
        assert len(one.given) == 3  # tokens, cosines, sines with their signs
    fast, _ = made(monkeypatch, llama(by_its_own), torch.randint(WORDS, (2, 9)))
    (one,) = (m for m in fast.modules() if isinstance(m, JoinedBlocks))
    assert len(one.given) == 3


@pytest.mark.parametrize("shared", [1, 2, 3, 6])
def test_any_number_of_heads_share(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = made(monkeypatch, llama(shared=shared), behind(shared=shared))
    assert [step.shared for step in steps(fast, Attention)] == [shared, shared]
    for length in (0, 5, 140):
        right(fast, exact, *behind(length, shared))


@pytest.mark.parametrize("sequence", [False, True])
def test_norms_of_heads(sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3 has them, of queries and keys by themselves."""
    torch.manual_seed(0)
    model = Llama(WORDS, WIDTH, 2, HEADS, 2, HIDDEN, normed=True)
    inputs = (torch.randint(WORDS, (2, 9)),) if sequence else behind()
    fast, exact = made(monkeypatch, model, inputs[0] if sequence else inputs)
    assert len(steps(fast, Attention)) == 2
    assert len(steps(fast, Rotary)) == len(steps(fast, HeadNorm)) == 4
    again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    for shape in ((2, 9), (2, 9), (1, 4)) if sequence else (5, 0, 130):
        given = (torch.randint(WORDS, shape),) if sequence else behind(shape)
        right(fast, exact, *given)
        assert all(map(torch.equal, leaves(fast(*given)), leaves(again(*given))))
    state = {name: t.clone() for name, t in fast.state_dict().items()}
    changed = next(name for name, t in state.items() if t.shape == (8,))
    before = leaves(fast(*inputs))[0]
    fast.load_state_dict(state | {changed: 2 * state[changed] + torch.rand(8)})
    assert not torch.equal(leaves(fast(*inputs))[0], before)


class Normed(nn.Module):
    """Heads that are normed in some way, in an attention among tokens."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm, self.of_q, self.of_v = way, nn.RMSNorm(WIDTH), nn.LayerNorm(8), nn.RMSNorm(8)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.crossed = nn.LayerNorm(9)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 6, 8)).unbind(2)  # [B, T, H, D]
            if self.way == "tokens first":
                q, v = self.of_q(q), self.of_v(v)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            if self.way == "heads first":
                q, v = self.of_q(q), self.of_v(v)
            elif self.way == "twice":
                q = self.of_q(self.of_v(q))
            elif self.way == "features":
                q = self.crossed(q.mT).mT
            elif self.way == "repeated":
                v = self.of_v(v[:, :3].repeat_interleave(2, 1))
            elif self.way == "negative":
                v = -v
            elif self.way == "read":
                x = x + self.of_v(k).transpose(1, 2).flatten(2)
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.norm(x)


@pytest.mark.parametrize(
    ("way", "normed", "joined"),
    [
        ("tokens first", 4, 2),
        ("heads first", 4, 2),
        ("twice", 4, 2),
        ("features", 0, 0),
        ("read", 0, 0),
        ("negative", 0, 0),
        ("repeated", 0, 0),
    ],
)
def test_ways_to_norm_heads(way: str, normed: int, joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fast, exact = made(monkeypatch, Normed(way), torch.randn(2, 9, WIDTH))
    for batch, t in ((2, 9), (2, 9), (1, 9)) if way == "features" else ((2, 9), (2, 9), (1, 9), (3, 4)):
        right(fast, exact, torch.randn(batch, t, WIDTH))
    assert len(steps(fast, HeadNorm)) == normed
    assert len(steps(fast, Attention)) == joined


def test_norms_that_are_hooked_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Normed("heads first")
    model.of_q.register_forward_hook(lambda module, args, y: y * 1.5)
    fast, exact = made(monkeypatch, model, torch.randn(2, 9, WIDTH))
    assert not steps(fast, HeadNorm)
    right(fast, exact, torch.randn(2, 9, WIDTH))


class Squared(nn.Module):
    """Units whose activation is the square of a ReLU's, as Primer has them."""

    def __init__(self, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.does, self.up, self.down = does, nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.does(F.relu(self.up(x))))


@pytest.mark.parametrize(
    "does",
    [lambda x: x.square(), torch.square, lambda x: x**2, lambda x: x.pow(2.0), lambda x: torch.pow(x, 2)],
)
def test_squares_are_products(does: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = made(monkeypatch, Squared(does), torch.randn(2, 9, WIDTH))
    (one,) = (m for m in fast.modules() if isinstance(m, JoinedTokens))
    assert [step.product for step in one.steps].count(True) == 1
    right(fast, exact, torch.randn(2, 9, WIDTH))


class Crossed(nn.Module):
    """Queries of two layers, in one of the ways to make them, behind a past."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm, self.head = way, nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.p, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> Any:
        b, t, _ = x.shape
        angles = torch.arange(past[0].shape[2], past[0].shape[2] + t)[:, None] * torch.linspace(1, 0.1, 8)
        cos, sin, y = angles.cos(), angles.sin(), self.norm(x)
        q, k, v = (f(y).view(b, t, 6, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        p = self.p(y).view(b, t, 6, 8).transpose(1, 2) if self.way in ("sum", "halves", "pairs") else q
        k, v = torch.cat((past[0], halves(k, cos, sin)), 2), torch.cat((past[1], v), 2)
        if self.way == "sum":
            q = q * cos + p * sin
        elif self.way == "halves":
            q = torch.cat((q[..., :4] * cos[:, :4], p[..., 4:] * cos[:, 4:]), -1)
        elif self.way == "pairs":
            cos, sin = cos[:, :4], sin[:, :4]
            q = torch.cat((q[..., :4] * cos - p[..., 4:] * sin, q[..., 4:] * cos + p[..., :4] * sin), -1)
        elif self.way == "changed":
            angles = angles.clone()
            angles.mul_(2)
            q = halves(q, angles.cos(), angles.sin())
        elif self.way == "keys":  # positions by the number of keys, which the past makes
            at = torch.arange(k.shape[2] - t, k.shape[2])[:, None] * torch.linspace(1, 0.1, 8)
            q = halves(q, at.cos(), at.sin())
        else:
            assert self.way == "rotary"
            q = halves(q, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + y)), (k, v)


@pytest.mark.parametrize("way", ["sum", "halves", "pairs", "changed", "keys", "rotary"])
def test_heads_of_two_layers_and_positions_of_keys(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def given(length: int) -> Any:
        return torch.randn(1, 1, WIDTH), past(1, 6, length, WIDTH, 1)[0]

    fast, exact = made(monkeypatch, Crossed(way), given(5))
    assert len(steps(fast, Attention)) == (way == "rotary")
    for length in (5, 6, 0, 77):
        right(fast, exact, *given(length))


class Sharing(nn.Module):
    """Two blocks of a token behind its past, whose six queries share two keys, in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm = way, nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 6 * 8 + 2 * 2 * 8), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Any) -> Any:
        new = []
        for keys, values in cache:
            b, t, _ = x.shape
            heads = self.qkv(self.norm(x)).unflatten(-1, (10, 8)).transpose(1, 2)
            q, k, v = heads.split([6, 2, 2], 1)
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            s = k.shape[2]
            more: dict[str, Any] = {}
            if self.way == "asked":
                ks, vs, more = k, v, {"enable_gqa": True}
            elif self.way == "expanded":
                ks, vs = (y[:, :, None].expand(b, 2, 3, s, 8).reshape(b, 6, s, 8) for y in (k, v))
            elif self.way == "function":
                ks, vs = (torch.repeat_interleave(y, 3, dim=1) for y in (k, v))
            elif self.way == "stacked":
                ks, vs = (torch.stack([y] * 3, 2).flatten(1, 2) for y in (k, v))
            elif self.way == "in turn":  # every second query's, not those of three in a row
                ks, vs = (y.repeat(1, 3, 1, 1) for y in (k, v))
            elif self.way == "unlike":
                ks, vs = k.repeat_interleave(3, 1), v.repeat(1, 3, 1, 1)
            else:
                assert self.way == "both"
                ks, vs, more = k[:, :1], v[:, :1], {"enable_gqa": True}
            y = F.scaled_dot_product_attention(q, ks, vs, **more)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, WIDTH))
            new.append((k, v))
        return x, new


@pytest.mark.parametrize(
    ("way", "joined"),
    [
        ("asked", 2),
        ("expanded", 2),
        ("function", 2),
        ("stacked", 0),
        ("in turn", 0),
        ("unlike", 0),
        ("both", 0),
    ],
)
def test_ways_to_share_keys(way: str, joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def given(length: int) -> Any:
        return torch.randn(1, 1, WIDTH), past(2, 2, length, 16, 1)

    fast, exact = made(monkeypatch, Sharing(way), given(5))
    found = steps(fast, Attention)
    assert [(step.heads, step.shared) for step in found] == [(6, 2)] * joined
    for length in (5, 0, 40):
        right(fast, exact, *given(length))


class Repeated(nn.Module):
    """Attention among tokens whose queries, keys and values come in so many heads each, and are repeated."""

    def __init__(self, heads: tuple[int, ...], times: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.times, self.norm = heads, times, nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 8 * sum(heads)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            heads = self.qkv(self.norm(x)).unflatten(-1, (-1, 8)).transpose(1, 2).split(self.heads, 1)
            q, k, v = (y.repeat_interleave(n, 1) for y, n in zip(heads, self.times, strict=True))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.norm(x)


@pytest.mark.parametrize(
    ("heads", "times", "shared"),
    [
        ((6, 2, 2), (1, 3, 3), 2),
        ((6, 2, 2), (1, 1, 1), 2),
        ((6, 1, 1), (1, 6, 6), 1),
        ((6, 3, 2), (1, 2, 3), 0),  # keys by two, values by three
        ((2, 6, 6), (3, 1, 1), 0),  # queries
        ((6, 1, 1), (1, 3, 3), 0),  # by three, and each of those by two
    ],
)
def test_heads_that_are_repeated(
    heads: tuple[int, ...], times: tuple[int, ...], shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    fast, exact = made(monkeypatch, Repeated(heads, times), torch.randn(2, 9, WIDTH))
    assert [step.shared for step in steps(fast, Attention)] == [shared] * 2 * (shared > 0)
    for shape in ((2, 9), (2, 9), (3, 4)):
        right(fast, exact, torch.randn(*shape, WIDTH))


def test_other_angles_are_other_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are given to each call, not kept."""
    fast, exact = made(monkeypatch, llama(), behind())
    word, cache = behind(3)
    first = fast(word, cache)[0]
    for length in (3, 4, 3):  # other positions
        right(fast, exact, word, [tuple(t[:, :, :length] for t in pair) for pair in behind(8)[1]])
    assert torch.equal(fast(word, cache)[0], first)


class Turning(nn.Module):
    """Of heads [1, 2, 3, 4] by what a test says."""

    def __init__(self, does: Callable[..., Tensor]) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.does(x.view(1, 3, 2, 4).transpose(1, 2), cos, sin)


def layout(does: Callable[..., Tensor]) -> tuple[Layout, fx.Node, list[Tensor]]:
    """Of a graph whose tokens [1, 3, 8] are the root; what it gives, and what it was given."""
    model, inputs = Turning(does), [torch.randn(1, 3, 8), torch.randn(3, 4), torch.randn(3, 4)]
    given = Given.of(model, tuple(inputs))
    traced = trace(model, given)
    values = Values(traced)
    values.run(*given.tensors)
    cos, sin, root, *_, output = traced.graph.nodes  # inputs by name
    last = output.args[0]
    cos.name, sin.name = "cos", "sin"
    return Layout(values, lambda node: count(1, 3, 8) if node is root else None, tokens=3), last, inputs


@pytest.mark.parametrize("does", WORDINGS[:-2])
def test_terms_are_what_the_graph_computes(does: Callable[..., Tensor]) -> None:
    found, last, (x, cos, sin) = layout(does)
    terms = found.terms(last)
    assert terms is not None
    total = torch.zeros(1, 2, 3, 4)
    for term in terms:
        assert term.factor is not None
        by = {"cos": cos, "sin": sin}[str(term.factor)].flatten()[term.at.clamp(min=0)]
        by = torch.where(term.at < 0, 1.0, by) * term.sign
        total += x.flatten()[term.index] * by
    torch.testing.assert_close(total, does(x.view(1, 3, 2, 4).transpose(1, 2), cos, sin))
    turned = found.turned(last)
    assert turned is not None
    assert turned.turn.place == Place(0, 4)
    assert turned.turn.heads == 2
    assert turned.turn.first == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "does",
    [
        in_place,
        by_head,
        by_number,
        thrice,
        by_itself,
        lambda x, cos, sin: x * cos,  # one term
        lambda x, cos, sin: x * cos + x.flip(1) * sin,  # unknown
        lambda x, cos, sin: x * cos * cos + x * sin,  # two factors
        lambda x, cos, sin: x * cos + x.transpose(1, 2).reshape(1, 2, 3, 4) * sin,  # of other tokens
        lambda x, cos, sin: x * cos + x,  # a term without one
        lambda x, cos, sin: torch.cat((x * cos, x * sin), 1),  # heads of two kinds
        lambda x, cos, sin: x[:, :1] * cos + x[:, 1:] * sin,  # of another head
        lambda x, cos, sin: x * cos + x[..., :1] * sin,  # one feature for all
        lambda x, cos, sin: each_half_but(x, cos, sin, lambda a, b, c, s: a * c + b * c),
        lambda x, cos, sin: each_half_but(x, cos, sin, lambda a, b, c, s: a * c + b * s + a),
        lambda x, cos, sin: torch.cat((x[..., :2] * cos[:, :2] + x[..., 2:] * cos[:, :2], x[..., 2:]), -1),
    ],
)
def test_what_are_no_rotary_positions(does: Callable[..., Tensor]) -> None:
    found, last, _ = layout(does)
    assert found.turned(last) is None


def test_numbers_that_are_in_tensors_are_not_known() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: x.shape[0] * 2 - 1] * x.sum().item()

    traced = fx.symbolic_trace(Cut())
    values = Values(traced)
    values.run(torch.ones(2, 3))
    known = {node.name for node in values.numbers}
    assert {"mul", "sub"} <= known
    assert "item" not in known


def test_places() -> None:
    assert place(count(2, 3, 4, 5).transpose(1, 2), 20) == Place(0, 5)
    assert place(count(2, 3, 8, 5)[:, :, 4:].transpose(1, 2), 40) == Place(20, 5)
    assert place(count(1, 3, 2, 5).transpose(1, 2).repeat_interleave(3, 1), 10) == Place(0, 5, 3)
    assert place(count(1, 3, 2, 5).transpose(1, 2).repeat(1, 3, 1, 1), 10) is None
    assert place(count(1, 3, 2, 5).transpose(1, 2).flip(1), 10) is None
    assert place(count(1, 3, 2, 5).transpose(1, 2).flip(3), 10) is None
    assert place(count(3, 4), 4) is None
    assert place_of(torch.tensor([0, 0, 5])) is None
    assert place_of(torch.tensor([7])) == Place(7, 0)
