"""Activations in the epilogue of a native kernel against float64, at every level this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselth.kernels import _activations
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels.sparse_conv2d_rows import ConvRows, sparse_conv2d_rows

PASS = ConvRows.from_dense(torch.ones(1, 1, 1, 1), (1, 331))


def through(x: Tensor, activation: str, kernels: str) -> Tensor:
    """act(x), behind a convolution that changes nothing."""
    return sparse_conv2d_rows(PASS, x.view(1, 1, 1, -1), None, activation, kernels=kernels).view(-1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_numbers(activation: str, kernels: str) -> None:
    """Where a function bends, and far from there, where e^x is 0 or infinite."""
    near, far = torch.linspace(-7, 7, 301), torch.tensor([3.0, 6.0, 20.0, 88.0, 104.0, 200.0, 1e6])
    edges = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-40, 3.0000002, 2.9999998, 5.9999995, 6.0000005])
    x = torch.cat([near, far, -far, edges, torch.zeros(331 - 301 - 14 - 9)])
    exact, found = ACTIVATIONS[activation](x.double()), through(x, activation, kernels)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    assert bool((found[exact == 0] == 0).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_of_nan_and_infinity(activation: str, value: float, kernels: str) -> None:
    x = torch.zeros(331)
    x[::7] = value
    exact, found = ACTIVATIONS[activation](x), through(x, activation, kernels)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_numbers_are_places_in_the_table() -> None:
    assert [_activations.number(name) for name in ACTIVATIONS] == [*range(len(ACTIVATIONS))]
    with pytest.raises(ValueError, match=r"activation: expected none, relu, relu6, .*, got 'swish'"):
        _activations.number("swish")
