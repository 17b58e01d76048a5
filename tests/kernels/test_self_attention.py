"""Attention among the tokens of sequences against float64, at every level this machine has."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels import self_attention as sa
from test_sparse_conv2d_rows import before_a_wall

CASES = settings(max_examples=int(os.environ.get("SPARSELTH_CASES", "25")), deadline=None)
SHAPES = [  # heads, features of each, sequences, tokens of each
    *((1, 1, 1, 1), (12, 64, 1, 197), (3, 7, 2, 5), (2, 131, 3, 67), (1, 256, 1, 49), (1, 257, 2, 9)),
    *((2, 64, 2, 513), (1, 40, 1, 256), (5, 13, 3, 48), (2, 16, 4, 16), (1, 9, 2, 300)),
]
Shape = tuple[int, int, int, int]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Even where so many do not pay."""
    monkeypatch.setattr(sa, "MANY", 0)
    torch.set_num_threads(request.param)
    return int(request.param)


def drawn(shape: Shape, apart: int = 0, group: int = 1) -> list[Tensor]:
    """q, k and v; with `apart` cut out of one piece of memory, beside numbers that are nobody's."""
    h, d, b, t = shape
    each = h * group, h, h
    if not apart:
        return [torch.randn(heads, d, b * t) for heads in each]
    room = torch.full((h * group, 3 * d + apart, b * t + apart), torch.nan)
    return [room[:heads, i * d : (i + 1) * d, : b * t].normal_() for i, heads in enumerate(each)]


def compare(
    tensors: list[Tensor],
    tokens: int,
    scale: float | None,
    causal: bool,
    kernels: str,
    bound: float = 2e-6,
) -> None:
    exact = sa.reference(*(t.double() for t in tensors), tokens, scale, causal)
    h, d, n = exact.shape  # of the queries
    room = torch.full((h, d + 2, n + 3), torch.nan)
    y = room[:, :d, :n]
    sa.bind_self_attention(*tensors, y, tokens, scale, causal, kernels)()
    assert float((y - exact).norm() / exact.norm()) < bound
    y.fill_(torch.nan)
    assert bool(room.isnan().all())  # nothing beside it was written


@pytest.mark.parametrize("apart", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: Shape, apart: int, threads: int, kernels: str) -> None:
    for scale, causal in ((None, False), (0.3, True)):
        compare(drawn(shape, apart), shape[3], scale, causal, kernels)


@pytest.mark.parametrize("apart", [0, 5])
@pytest.mark.parametrize("group", [2, 5])
@pytest.mark.parametrize(
    "shape", [(1, 8, 1, 5), (2, 64, 3, 197), (3, 13, 2, 48), (1, 257, 2, 9), (2, 16, 2, 513)]
)
def test_queries_that_share_keys(shape: Shape, group: int, apart: int, threads: int, kernels: str) -> None:
    tensors = drawn(shape, apart, group)
    for causal in (False, True):
        compare(tensors, shape[3], None, causal, kernels)
    q, k, v = (x.unflatten(2, (-1, shape[3])).permute(2, 0, 3, 1) for x in tensors)
    own = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = sa.self_attention(*tensors, shape[3], causal=True, kernels=kernels)
    torch.testing.assert_close(y.unflatten(2, (-1, shape[3])).permute(2, 0, 3, 1), own, rtol=1e-5, atol=1e-6)


@CASES
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    ends = ((1, 4), (1, 150), (1, 3), (1, 300))
    shape = tuple(data.draw(st.integers(*pair)) for pair in ends)
    scale, causal = data.draw(st.sampled_from((None, 0.2))), data.draw(st.booleans())
    group = data.draw(st.integers(1, 3))
    compare(drawn(shape, data.draw(st.sampled_from((0, 1, 16))), group), shape[3], scale, causal, "auto")  # type: ignore[arg-type]


def test_large_products_do_not_overflow(kernels: str) -> None:
    """The softmax follows the largest so far, also where a later block of keys has it."""
    for at in (0, 200, 299):
        q, k, v = drawn((2, 16, 2, 300))
        k[:, :, at::300] *= 100
        compare([q * 30, k, v], 300, 1.0, False, kernels, 1e-4)  # a product of 500 is off by 3e-5


def test_a_block_of_keys_that_weighs_nothing(kernels: str) -> None:
    """Before others that do."""
    q, k, v = drawn((2, 16, 1, 300))
    q[0], k[0, :, :270] = 1.0, -torch.inf
    y = sa.self_attention(q, k, v, 300, kernels=kernels)
    exact = sa.reference(*(t.double() for t in (q, k, v)), 300)
    assert bool(exact.isfinite().all())
    assert float((y - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("tokens", [1, 5, 16, 37])
def test_nothing_behind_the_tokens_is_read(tokens: int, kernels: str) -> None:
    tensors = drawn((2, 3, 1, tokens))
    walled = [before_a_wall(t) for t in tensors]
    y = sa.self_attention(*walled, tokens, kernels=kernels)
    assert torch.equal(y, sa.self_attention(*tensors, tokens, kernels=kernels))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("at", [0, 150, 299])
def test_nan_and_infinity(at: int, causal: bool, kernels: str) -> None:
    for which in range(3):
        tensors = drawn((3, 16, 2, 300))
        tensors[which][1, 5, 300 + at] = torch.nan
        y = sa.self_attention(*tensors, 300, causal=causal, kernels=kernels)
        exact = sa.reference(*tensors, 300, causal=causal)
        assert bool(y[[0, 2]].isfinite().all())
        assert bool(y[1, :, :300].isfinite().all())  # the other sequence
        assert not bool((exact.isfinite() & y.isnan()).any())
        seen = slice(300 + at, None) if causal and which else slice(300, None)
        assert torch.equal(y[1, :, seen].isnan(), exact[1, :, seen].isnan())
    q, k, v = drawn((3, 16, 1, 300))
    q[0], k[0, :, at] = 1.0, -torch.inf  # weighs nothing
    q[1], k[1, :, at] = 1.0, torch.inf  # NaN, as in torch
    q[2], k[2] = 1.0, -torch.inf  # nothing weighs anything
    y = sa.self_attention(q, k, v, 300, causal=causal, kernels=kernels)
    exact = sa.reference(*(t.double() for t in (q, k, v)), 300, causal=causal)
    assert torch.equal(y.isnan(), exact.isnan())
    torch.testing.assert_close(y[0].double(), exact[0], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_causal_token_sees_none_behind_it(kernels: str) -> None:
    q, k, v = drawn((2, 8, 1, 130))
    before = sa.self_attention(q, k, v, 130, causal=True, kernels=kernels)
    for t in (k, v):
        t[:, :, 71:] = torch.randn(2, 8, 59)
    after = sa.self_attention(q, k, v, 130, causal=True, kernels=kernels)
    assert torch.equal(before[:, :, :71], after[:, :, :71])
    assert not bool((before[:, :, 71:] == after[:, :, 71:]).all(1).any())


def test_bits_are_those_of_one_sequence_and_of_one_thread(
    monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setattr(sa, "MANY", 0)
    tensors, found = drawn((5, 64, 3, 100)), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(sa.self_attention(*tensors, 100, kernels=kernels))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    if kernels != "torch":
        alone = sa.self_attention(*(t[:, :, 100:200] for t in tensors), 100, kernels=kernels)
        assert torch.equal(alone, found[0][:, :, 100:200])


def test_as_torch(kernels: str) -> None:
    q, k, v = drawn((4, 64, 2, 33))
    turned = [t.unflatten(2, (2, 33)).permute(2, 0, 3, 1) for t in (q, k, v)]
    for causal in (False, True):
        own = F.scaled_dot_product_attention(*turned, is_causal=causal)
        y = sa.self_attention(q, k, v, 33, causal=causal, kernels=kernels)
        torch.testing.assert_close(y.unflatten(2, (2, 33)).permute(2, 0, 3, 1), own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "tokens", "message"),
    [
        (lambda q, k, v: (q.double(), k, v), 5, "q: expected fp32"),
        (lambda q, k, v: (q, k, v[:1]), 5, r"v: expected fp32 \[2, 8, 15\]"),
        (lambda q, k, v: (q, k.mT.contiguous().mT, v), 5, "k: expected tokens side by side"),
        (lambda q, k, v: (q[0], k, v), 5, r"q: expected \[H, D, N\]"),
        (lambda q, k, v: (q, k, v), 4, "tokens: expected a divisor of 15, got 4"),
        (lambda q, k, v: (q, k, v), 0, "tokens: expected a divisor of 15, got 0"),
    ],
)
def test_refused(change: Callable[..., tuple[Tensor, ...]], tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sa.self_attention(*change(*drawn((2, 8, 3, 5))), tokens)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
def test_a_second_thread_where_it_pays() -> None:
    torch.set_num_threads(2)
    for tokens, threads in ((16, 1), (400, 2)):
        q, k, v = drawn((2, 8, 1, tokens))
        call = sa.bind_self_attention(q, k, v, torch.empty_like(q), tokens)
        assert _native.arguments(call).threads == threads


def test_nothing_of_nothing(kernels: str) -> None:
    q = torch.empty(2, 8, 0)
    assert sa.self_attention(q, q, q, 3, kernels=kernels).shape == (2, 8, 0)


def test_no_gradient() -> None:
    q, k, v = drawn((1, 4, 1, 3))
    with pytest.raises(ValueError, match="q: this op has no gradient"):
        sa.self_attention(q.requires_grad_(), k, v, 3)


def test_floor() -> None:
    assert sa.floor(12, 64, 1, 197) == {"bytes": 16 * 768 * 197, "flops": 4 * 768 * 197 * 197}
    assert sa.floor(1, 2, 3, 4, causal=True) == {"bytes": 16 * 24, "flops": 4 * 24 * 5 // 2}
