"""Steps of scores against the formula in float64, exact counts against a sort; at every level there is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import kernels_of
from sparselth.kernels import _native
from sparselth.kernels._triton import INTERPRET
from sparselth.kernels.score_update import RULES, bind_score_update, floor, top

CASES = int(os.environ.get("SPARSELTH_CASES", "40"))
WAYS = [*_native.levels(), "reference"]
VALUES = [-2.0, -1.0, -0.5, -0.0, 0.0, 0.25, 1.0, 2.0, float("inf"), -float("inf"), float("nan"), 1e-40]
GROUPS = [[(0, 300)], [(304, 41), (352, 1), (368, 130)]]  # gaps between, and one behind
KEEP, SIZE = [150, 20], 512


def largest(values: Tensor, keep: int, signed: bool) -> set[int]:
    """By a sort in Python: NaN behind infinity, equal ones by their index."""

    def rank(i: int) -> tuple[bool, float, int]:
        value = float(values[i]) if signed else abs(float(values[i]))
        return value != value, 0.0 if value != value else value, i

    return set(sorted(range(len(values)), key=rank)[len(values) - keep :])


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=CASES)
@given(
    st.one_of(
        st.lists(st.sampled_from(VALUES), min_size=1, max_size=70),
        st.lists(st.floats(width=32), min_size=1, max_size=70),
    ),
    st.data(),
    st.booleans(),
)
def test_the_largest_stay_and_of_equal_ones_the_last(
    way: str, values: list[float], data: Any, signed: bool
) -> None:
    keep = data.draw(st.integers(0, len(values)))
    found = top(torch.tensor(values), keep, signed, kernels=kernels_of(way))
    assert set(found.nonzero()[:, 0].tolist()) == largest(torch.tensor(values), keep, signed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_selection_among_many_is_that_of_a_sort(way: str, scale: float) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * scale
    values[::7] = values[3]
    for signed in (False, True):
        for keep in (1, 77, 10_000, 19_999):
            kept = top(values, keep, signed, kernels=kernels_of(way))
            order = (values if signed else values.abs()).argsort(stable=True)
            assert set(kept.nonzero()[:, 0].tolist()) == set(order[-keep:].tolist())


@pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")
@pytest.mark.parametrize(("signed", "keep"), [(False, 5), (True, 3), (True, 9)])
def test_a_device_s_threshold_is_the_same(signed: bool, keep: int) -> None:
    """Of positive scores alone, and of negative ones too, whose ties go by lowest index."""
    values = torch.tensor([0.5, -2.0, -2.0, 1.0, -0.5, -2.0, -0.5, 0.0, -2.0, 1.0, 3.0])
    found = top(values, keep, signed, kernels="triton")
    assert set(found.nonzero()[:, 0].tolist()) == largest(values, keep, signed)


def inside(groups: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    there = torch.zeros(SIZE, dtype=torch.bool)
    for group in groups:
        for first, count in group:
            there[first : first + count] = True
    return there


class Step:
    """Tensors [SIZE] whose gaps hold NaN, and a step on them."""

    def __init__(self, rule: str, way: str, momentum: float, decay: float, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        there = inside(GROUPS)
        self.scores, self.weights, self.grad = (torch.randn(SIZE, generator=draw) for _ in range(3))
        self.buffer = torch.zeros(SIZE) if momentum else None
        self.effective = torch.full((SIZE,), 7.0)
        tensors = [self.scores, self.weights, self.grad, self.effective, self.buffer]
        self.all = [t for t in tensors if t is not None]
        for t in self.all:
            t[~there] = torch.nan
        self.run = bind_score_update(
            *(self.scores, self.grad, self.buffer, self.weights, self.effective, GROUPS, KEEP),
            rule=rule,
            momentum=momentum,
            weight_decay=decay,
            kernels=kernels_of(way),
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_the_formula(rule: str, decay: float, momentum: float, way: str) -> None:
    """Thresholds that hardly move and such that jump; nothing outside the spans is looked at."""
    step, there = Step(rule, way, momentum, decay), inside(GROUPS)
    s, a = step.scores.double(), torch.zeros(SIZE, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    for lr in (0.0, 0.01, 0.01, 0.01, 0.01, 3.0, 0.01, 0.01):
        step.grad.copy_(torch.randn(SIZE, generator=draw))
        step.grad[~there] = torch.nan
        g = step.grad.double() * step.weights.double()
        if rule == "magnitude":
            g *= s.sign()
        a = momentum * a + g + decay * s
        s -= lr * a
        step.run(lr)
        torch.testing.assert_close(step.scores[there].double(), s[there], rtol=1e-5, atol=1e-6)
        if step.buffer is not None:
            torch.testing.assert_close(step.buffer[there].double(), a[there], rtol=1e-5, atol=1e-6)
        for group, keep in zip(GROUPS, KEEP, strict=True):
            places = torch.cat([torch.arange(first, first + count) for first, count in group])
            scores, weights = step.scores[places], step.weights[places]
            kept = torch.zeros(len(places), dtype=torch.bool)
            kept[[*largest(scores, keep, rule == "score")]] = True
            expected = weights * scores.sign() if rule == "ternary" else weights
            assert torch.equal(step.effective[places], torch.where(kept, expected, 0.0))
    assert all(bool(t[~there].isnan().all()) for t in step.all)


@pytest.mark.skipif(_native.LIB is None, reason=f"native kernels: {_native.WHY}")
@pytest.mark.parametrize("rule", RULES)
def test_c_and_torch_agree_to_the_bit(rule: str) -> None:
    level = _native.levels()[-1]
    if level == "plain":
        pytest.skip("plain rounds a fused multiply-add twice")
    one, other, there = Step(rule, level, 0.9, 0.0), Step(rule, "reference", 0.9, 0.0), inside(GROUPS)
    for lr in (0.5, 0.25, 0.125):
        one.run(lr)
        other.run(lr)
        for mine, theirs in zip(one.all, other.all, strict=True):
            assert torch.equal(mine[there], theirs[there])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["magnitude", "score"])
def test_scores_that_are_all_alike_and_scores_that_are_not_finite(rule: str, way: str) -> None:
    for value in (0.0, -1.5, float("inf"), float("nan")):
        step, there = Step(rule, way, 0.0, 0.0), inside(GROUPS)
        step.scores.fill_(value)
        step.grad.zero_()
        step.weights.fill_(1.0)
        for _ in range(3):
            step.run(0.1)
            for group, keep in zip(GROUPS, KEEP, strict=True):
                found = torch.cat([step.effective[first : first + count] for first, count in group])
                assert found.tolist() == [0.0] * (len(found) - keep) + [1.0] * keep, value
        assert bool(step.effective[~there].isnan().all())


def test_a_step_sees_weights_that_changed_in_between() -> None:
    step, there = (
        Step("magnitude", "reference" if _native.LIB is None else "native", 0.9, 0.0),
        inside(GROUPS),
    )
    step.run(0.1)
    before = step.effective.clone()
    step.weights.mul_(2)
    step.run(0.0)
    assert torch.equal(step.effective[there], 2 * before[there])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": "largest"}, "rule: expected one of magnitude, score, ternary, got 'largest'"),
        ({"momentum": 0.0}, "expected a momentum buffer if and only if there is momentum, got momentum 0.0"),
        ({"keep": [1]}, "keep: expected a number of each of 2 groups, got 1"),
        ({"keep": [301, 1]}, "keep: expected 0 to 300, got 301"),
        ({"groups": [[(500, 13)], [(0, 2)]]}, "groups: expected spans within 512 weights"),
        ({"kernels": "fastest"}, "kernels='fastest': expected"),
    ],
)
def test_what_is_no_step_is_refused(changes: dict[str, Any], says: str) -> None:
    tensors = [torch.zeros(SIZE) for _ in range(5)]
    right: dict[str, Any] = {"groups": GROUPS, "keep": [1, 1], "rule": "score", "momentum": 0.9}
    with pytest.raises(ValueError, match=re.escape(says)):
        bind_score_update(*tensors, **right | changes)
    with pytest.raises(ValueError, match="keep: expected 0 to 512, got 513"):
        top(tensors[0], 513)


def test_the_floor_is_every_array_once() -> None:
    assert floor(10) == {"bytes": 280, "flops": 80}
