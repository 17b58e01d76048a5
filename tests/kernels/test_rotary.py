"""Rotary positions, features-major, against float64, at every level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels.rotary import MANY, bind_rotary, floor, reference, rotary

SHAPES = [
    (1, 1, 1),
    (2, 4, 1),
    (12, 64, 1),
    (3, 7, 5),
    (2, 6, 15),
    (2, 6, 16),
    (2, 6, 17),
    (1, 2, 33),
    (4, 8, 197),
]


def tensors(h: int, d: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows apart, NaN between them; features in any order."""
    torch.manual_seed(seed)
    wide = torch.full((h, d + 1, n + 3), torch.nan)
    wide[:, :d, :n] = torch.randn(h, d, n)
    a, b = (torch.cat([torch.randn(d, n), torch.full((d, 2), torch.nan)], 1)[:, :n] for _ in "ab")
    first, second = (torch.randint(d, (d,), dtype=torch.int32) for _ in "ab")
    return {"x": wide[:, :d, :n], "first": first, "second": second, "a": a, "b": b}


def close(found: Tensor, of: dict[str, Tensor]) -> None:
    right = reference(**{name: t.double() if t.is_floating_point() else t for name, t in of.items()})
    assert found.dtype == torch.float32
    assert (found - right).norm() <= 2e-7 * right.norm()  # two products and a sum, each rounded once


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_right(shape: tuple[int, int, int], kernels: str) -> None:
    of = tensors(*shape)
    close(rotary(**of, kernels=kernels), of)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_any_shape(h: int, d: int, n: int, seed: int) -> None:
    of = tensors(h, d, n, seed)
    close(rotary(**of), of)


def test_it_turns_pairs_by_angles(kernels: str) -> None:
    """As Su et al. have it: lengths stay, and products of two depend on their distance alone."""
    d, n = 8, 20
    turns = 100 ** (-torch.arange(0, d, 2) / d)
    angles = torch.cat([turns, turns])[:, None] * torch.arange(n)
    order = torch.arange(d, dtype=torch.int32)
    other = order.roll(d // 2)
    sign = torch.tensor([-1.0] * 4 + [1.0] * 4)[:, None]
    q, k = torch.randn(2, 1, d, 1).expand(2, 1, d, n)
    q, k = (
        rotary(x.contiguous(), order, other, angles.cos(), sign * angles.sin(), kernels)[0] for x in (q, k)
    )
    torch.testing.assert_close(q.norm(dim=0), q[:, 0].norm().expand(n))
    products = q.mT @ k
    for apart in range(n):
        along = products.diagonal(apart)
        torch.testing.assert_close(along, along[0].expand_as(along), rtol=1e-5, atol=4e-6)


def test_nothing_but_y_is_written_and_nan_stays_where_it_is_read(kernels: str) -> None:
    of = tensors(2, 5, 18)
    of["first"], of["second"] = (
        torch.arange(5, dtype=torch.int32),
        torch.tensor([0, 0, 3, 3, 4], dtype=torch.int32),
    )
    of["x"][1, 3, 17] = torch.nan
    wide = torch.full((2, 6, 20), 7.0)
    bind_rotary(**of, y=wide[:, :5, :18], kernels=kernels)()
    assert (wide[:, 5:] == 7).all()
    assert (wide[..., 18:] == 7).all()
    bad = torch.zeros(2, 5, 18, dtype=torch.bool)
    bad[1, [2, 3], 17] = True
    assert torch.equal(wide[:, :5, :18].isnan(), bad)


def test_results_do_not_depend_on_threads(kernels: str) -> None:
    of, found = tensors(8, 64, MANY // 512 + 3), list[Tensor]()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(rotary(**of, kernels=kernels))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("x", torch.randn(4, 3), "x: expected"),
        ("a", torch.randn(4, 4), "a: expected"),
        ("b", torch.randn(4, 3, dtype=torch.float64), "b: expected"),
        ("first", torch.arange(4), "first: expected int32"),
        ("second", torch.tensor([0, 1, 2, 4], dtype=torch.int32), "second: expected features 0 to 3"),
        ("first", torch.tensor([0, -1, 2, 3], dtype=torch.int32), "first: expected features 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, other: Any, message: str) -> None:
    of = tensors(2, 4, 3)
    with pytest.raises(ValueError, match=message):
        rotary(**of | {name: other})


def test_y_is_other_memory() -> None:
    of = tensors(2, 4, 3)
    with pytest.raises(ValueError, match="y: expected other memory"):
        bind_rotary(**of, y=of["x"])


def test_floor() -> None:
    assert floor(12, 64, 1) == {"bytes": 8 * 64 * (12 + 1 + 1), "flops": 3 * 12 * 64}
