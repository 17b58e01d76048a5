"""The bound update: the rule of torch.optim under a mask, in rows with and without a tail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparselth.config import Recipe
from sparselth.engine.paths import choose
from sparselth.engine.update import bind_update
from sparselth.kernels import _native

ADAM = Recipe(steps=9, lr=1e-2, weight_decay=0.01)
SGD = replace(ADAM, optimizer="sgd")
RECIPES = [ADAM, SGD, replace(SGD, momentum=0.0)]
KERNELS = ["reference", pytest.param("auto", marks=pytest.mark.skipif(not _native.LIB, reason=_native.WHY))]
R, M, N, TAIL = 3, 80, 96, 16  # masks cover M of N trained numbers; statistics follow


def buffers(recipe: Recipe, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """Weights, gradients and moments [R, N + TAIL], and a mask [R, M]."""
    generator = torch.Generator().manual_seed(0)
    weights, grad = torch.randn(2, R, N + TAIL, generator=generator)
    moments = [torch.zeros_like(weights) for _ in range(2 if recipe.optimizer == "adam" else 1)]
    mask = torch.rand(R, M, generator=generator) < 0.4 if masked else None
    if mask is not None:
        weights[:, :M] *= mask
    return [weights, grad, *moments], mask


def run(recipe: Recipe, kernels: str, rows: list[Tensor], mask: Tensor | None) -> int:
    weights, grad, *moments = rows
    update, size = bind_update(weights, grad, moments, mask, recipe, choose(kernels, "cpu"))
    first = grad.clone()
    for step in range(1, 4):
        grad.copy_(first * step)
        update(step, recipe.lr)
    return size


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=["adam", "sgd", "plain"])
def test_rows_with_a_tail_are_rows_without(recipe: Recipe, masked: bool, kernels: str) -> None:
    whole, mask = buffers(recipe, masked)
    tails = [t[:, N:].clone() for t in whole]
    apart = [t[:, :N].contiguous() for t in whole]
    size = run(recipe, kernels, [t[:, :N] for t in whole], mask)
    assert run(recipe, kernels, apart, mask) == size
    assert size == (R * (4 * M if kernels == "reference" else N // 8) if masked else 0)
    for strided, packed, tail in zip(whole, apart, tails, strict=True):
        assert torch.equal(strided[:, :N], packed)
        assert torch.equal(strided[:, N:], tail)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("recipe", RECIPES, ids=["adam", "sgd", "plain"])
def test_the_rule_is_torchs_and_pruned_weights_stay_zero(recipe: Recipe, kernels: str) -> None:
    (weights, grad, *moments), mask = buffers(recipe, masked=True)
    assert mask is not None
    live = torch.ones(weights.shape, dtype=torch.bool)
    live[:, :M] = mask
    param = torch.nn.Parameter(weights.double())
    rule: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        rule = torch.optim.Adam([param], lr=recipe.lr, weight_decay=recipe.weight_decay)
    else:
        rule = torch.optim.SGD([param], recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    first = grad.clone().double()
    run(recipe, kernels, [weights, grad, *moments], mask)
    for step in range(1, 4):
        param.grad = first * step * live
        rule.step()
    torch.testing.assert_close(weights.double(), param.detach(), rtol=1e-5, atol=1e-6)
    for t in (weights, *moments):
        assert not t[~live].any()
