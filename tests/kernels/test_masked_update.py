"""Against the formula in float64, against torch.optim to the bit, and what pruned weights may never do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels.masked_update import adam_reference, masked_adam, masked_sgd, sgd_reference

SHAPES = [(1, 1, 1), (1, 37, 30), (3, 64, 64), (2, 131, 127)]  # R, P, M


def tensors(r: int, p: int, m: int, keep: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w, g = torch.randn(2, r, p, generator=generator)
    mask = (torch.rand(r, m, generator=generator) < keep).float()
    w[:, :m] *= mask
    return w, g, mask


@pytest.mark.parametrize("keep", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_the_formula(shape: tuple[int, int, int], weight_decay: float, keep: float) -> None:
    w, g, mask = tensors(*shape, keep)
    a, b = torch.zeros_like(w), torch.zeros_like(w)
    expected = [t.double() for t in (w, a, b)]
    count = torch.zeros(())
    for step in range(1, 6):
        grad = g * step
        expected = list(
            adam_reference(*expected[:1], grad.double(), mask, *expected[1:], step, 1e-2, weight_decay)
        )
        count.fill_(step)
        masked_adam(w, grad.clone(), mask, (a, b), count, 1e-2, weight_decay)
        for found, right in zip((w, a, b), expected, strict=True):
            assert (found - right).norm() <= 1e-6 * right.norm().clamp_min(1)
    w, g, mask = tensors(*shape, keep)
    a = torch.zeros_like(w)
    expected = [w.double(), a.double()]
    for step in range(1, 6):
        grad = g * step
        expected = list(sgd_reference(expected[0], grad.double(), mask, expected[1], 1e-2, 0.9, weight_decay))
        masked_sgd(w, grad.clone(), mask, a, 1e-2, 0.9, weight_decay)
        for found, right in zip((w, a), expected, strict=True):
            assert (found - right).norm() <= 1e-6 * right.norm().clamp_min(1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_dense_steps_are_those_of_torch_optim_to_the_bit(optimizer: str, weight_decay: float) -> None:
    w, g, _ = tensors(1, 1000, 900, 1.0)
    parameter = torch.nn.Parameter(w.clone())
    if optimizer == "adam":
        theirs: torch.optim.Optimizer = torch.optim.Adam(
            [parameter], lr=1e-3, weight_decay=weight_decay, fused=True
        )
    else:
        theirs = torch.optim.SGD([parameter], lr=1e-3, momentum=0.9, weight_decay=weight_decay, fused=True)
    a, b, count = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(())
    for step in range(1, 21):
        parameter.grad = g * step
        theirs.step()
        if optimizer == "adam":
            masked_adam(w, g * step, None, (a, b), count.fill_(step), 1e-3, weight_decay)
        else:
            masked_sgd(w, g * step, None, a, 1e-3, 0.9, weight_decay)
        assert torch.equal(w, parameter)


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 0.1), st.sampled_from(["adam", "sgd"]))
def test_pruned_weights_and_their_moments_stay_exactly_zero(
    seed: int, keep: float, weight_decay: float, optimizer: str
) -> None:
    # in peers, momentum and weight decay wake pruned weights
    w, _, mask = tensors(2, 50, 40, keep, seed)
    moments = [torch.zeros_like(w), torch.zeros_like(w)]
    generator, count = torch.Generator().manual_seed(seed), torch.zeros(())
    for step in range(1, 201):
        g = torch.randn(w.shape, generator=generator)
        if optimizer == "adam":
            masked_adam(w, g, mask, moments, count.fill_(step), 1e-2, weight_decay)
        else:
            masked_sgd(w, g, mask, moments[0], 1e-2, 0.9, weight_decay)
    for t in (w, *moments):
        assert not t[:, :40][mask == 0].any()
    assert w[:, :40][mask == 1].all()
    assert w[:, 40:].all()  # biases live
