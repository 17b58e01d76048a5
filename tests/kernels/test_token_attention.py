"""Attention of one new token against float64, at every level this machine has."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import token_attention as ta

CASES = settings(max_examples=int(os.environ.get("SPARSELTH_CASES", "25")), deadline=None)
SHAPES = [(1, 1, 0, 1), (1, 12, 64, 64), (2, 3, 129, 80), (3, 5, 7, 7), (1, 2, 300, 131), (2, 1, 128, 33)]
GROUPS = [(2, 3, 130, 16), (1, 5, 7, 33), (1, 2, 0, 8)]
Shape = tuple[int, int, int, int]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Even where so many do not pay."""
    monkeypatch.setattr(ta, "MANY", 0)
    torch.set_num_threads(request.param)
    return int(request.param)


def drawn(shape: Shape, apart: int = 0, group: int = 1) -> list[Tensor]:
    """q, k, v, past keys and values: batch, heads of these, past, width; with `apart` in memory of others."""
    b, h, s, d = shape
    if not apart:
        q = torch.randn(b, h * group, 1, d)
        return [q, *(torch.randn(b, h, n, d) for n in (1, 1, s, s))]
    parts = torch.randn(b, 1, (2 + group) * h, d).transpose(1, 2)  # as one layer gives them
    parts = parts.split([h * group, h, h], 1)
    past = [
        torch.full((b, s + apart, h + 1, d + apart), torch.nan)[:, :s, :h, :d].transpose(1, 2) for _ in "kv"
    ]
    return [*parts, *(t.normal_() for t in past)]


def compare(tensors: list[Tensor], scale: float | None, kernels: str) -> None:
    exact, *copies = ta.reference(*(t.double() for t in tensors), scale)
    y, keys, values = ta.token_attention(*tensors, scale, kernels=kernels)
    assert y.shape == exact.shape
    assert float((y - exact).norm() / exact.norm()) < 2e-6
    for found, copy in zip((keys, values), copies, strict=True):
        assert torch.equal(found.double(), copy)


@pytest.mark.parametrize("apart", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: Shape, apart: int, threads: int, kernels: str) -> None:
    for scale in (None, 0.3):
        compare(drawn(shape, apart), scale, kernels)


@pytest.mark.parametrize("apart", [0, 3])
@pytest.mark.parametrize("group", [2, 7, 64, 65, 130])
@pytest.mark.parametrize("shape", GROUPS)
def test_queries_that_share_keys(shape: Shape, group: int, apart: int, threads: int, kernels: str) -> None:
    tensors = drawn(shape, apart, group)
    compare(tensors, None, kernels)
    q, k, v, past_keys, past_values = tensors
    keys, values = torch.cat([past_keys, k], 2), torch.cat([past_values, v], 2)
    own = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    y, *_ = ta.token_attention(*tensors, kernels=kernels)
    torch.testing.assert_close(y, own, rtol=1e-5, atol=1e-6)


@CASES
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    b, h, s, d = (data.draw(st.integers(*ends)) for ends in ((1, 3), (1, 4), (0, 400), (1, 150)))
    tensors = drawn((b, h, s, d), data.draw(st.sampled_from((0, 1, 16))), data.draw(st.integers(1, 5)))
    compare(tensors, data.draw(st.sampled_from((None, 0.2))), "auto")


def test_heads_side_by_side_are_a_view(kernels: str) -> None:
    y, _, _ = ta.token_attention(*drawn((2, 3, 5, 8)), kernels=kernels)
    if kernels != "torch":
        assert y.transpose(1, 2).reshape(2, 1, 24).data_ptr() == y.data_ptr()


def test_large_products_do_not_overflow(kernels: str) -> None:
    """The softmax follows the largest so far, also where a later block has it."""
    q, k, v, past_keys, past_values = drawn((1, 2, 300, 16))
    for rows in (slice(0, 1), slice(200, 201), slice(299, 300)):
        past_keys[:, :, rows] *= 100
        compare([q * 30, k, v, past_keys, past_values], 1.0, kernels)


@pytest.mark.parametrize("at", [0, 150, 299])
def test_nan_and_infinity(at: int, kernels: str) -> None:
    for which in range(5):
        tensors = drawn((1, 3, 300, 16))
        place = at if which > 2 else 0
        tensors[which][0, 1, place, 5] = torch.nan
        y, _, _ = ta.token_attention(*tensors, kernels=kernels)
        exact, _, _ = ta.reference(*tensors)
        assert torch.equal(y.isnan(), exact.isnan())
        assert bool(y[:, [0, 2]].isfinite().all())
    q, k, v, past_keys, past_values = drawn((1, 3, 300, 16))
    q[0, 0], past_keys[0, 0, at] = 1.0, -torch.inf  # weighs nothing
    q[0, 1], past_keys[0, 1, at] = 1.0, torch.inf  # NaN, as in torch
    q[0, 2], k[0, 2], past_keys[0, 2] = 1.0, -torch.inf, -torch.inf  # nothing weighs anything
    y, _, _ = ta.token_attention(q, k, v, past_keys, past_values, kernels=kernels)
    exact, _, _ = ta.reference(*(t.double() for t in (q, k, v, past_keys, past_values)))
    assert torch.equal(y.isnan(), exact.isnan())
    torch.testing.assert_close(y[0, 0].double(), exact[0, 0], rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setattr(ta, "MANY", 0)
    tensors, found = drawn((2, 5, 200, 64)), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(ta.token_attention(*tensors, kernels=kernels))
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


def test_as_torch(kernels: str) -> None:
    """Of what a decoder writes: two copies and one attention."""
    q, k, v, past_keys, past_values = drawn((2, 4, 33, 64))
    y, keys, values = ta.token_attention(q, k, v, past_keys, past_values, kernels=kernels)
    own = F.scaled_dot_product_attention(q, torch.cat([past_keys, k], 2), torch.cat([past_values, v], 2))
    torch.testing.assert_close(y, own, rtol=1e-5, atol=1e-6)
    assert keys.is_contiguous()
    assert values.is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, a, b: (q.double(), k, v, a, b), "q: expected fp32"),
        (
            lambda q, k, v, a, b: (q, k, v, a, b[:, :, 1:]),
            r"past_keys, past_values: expected fp32 \[2, 3, S, 8\]",
        ),
        (lambda q, k, v, a, b: (q, k, v, a.mT.contiguous().mT, b), "the numbers of D side by side"),
        (lambda q, k, v, a, b: (q, k, v.repeat(1, 1, 1, 2)[..., ::2], a, b), "v: expected the numbers"),
        (lambda q, k, v, a, b: (q[0], k, v, a, b), r"q: expected \[B, H, 1, D\]"),
        (lambda q, k, v, a, b: (torch.cat([q, q], 2), k, v, a, b), r"q: expected \[B, H, 1, D\]"),
        (lambda q, k, v, a, b: (q, k[:1], v, a, b), r"k: expected fp32 \[2, 3, 1, 8\]"),
    ],
)
def test_refused(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ta.token_attention(*change(*drawn((2, 3, 5, 8))))


def test_a_bound_one_follows_any_past(kernels: str) -> None:
    q, k, v, *_ = drawn((1, 3, 0, 16))
    y = torch.empty(1, 1, 3, 16).transpose(1, 2)
    bound = ta.TokenAttention(q, k, v, y, kernels=kernels)
    for past in (0, 200, 3):
        _, _, _, past_keys, past_values = drawn((1, 3, past, 16))
        found = bound.follow(past_keys, past_values)
        q.normal_()  # is read by the run
        bound.run()
        for one, exact in zip((y, *found), ta.reference(q, k, v, past_keys, past_values), strict=True):
            torch.testing.assert_close(one, exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="y: expected heads side by side"):
        ta.TokenAttention(q, k, v, torch.empty(1, 3, 1, 32)[..., :16])


def test_no_gradient() -> None:
    q, *others = drawn((1, 1, 3, 4))
    with pytest.raises(ValueError, match="q: this op has no gradient"):
        ta.token_attention(q.requires_grad_(), *others)


def test_floor() -> None:
    assert ta.floor(1, 12, 64, 64) == {"bytes": 4 * 768 * 262, "flops": 4 * 768 * 65}
