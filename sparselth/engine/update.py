"""The masked update of weights in one flat buffer, bound to its tensors once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparselth.config import Recipe
from sparselth.engine.paths import Paths
from sparselth.kernels import bitmask
from sparselth.kernels.masked_update import (
    Step,
    bind_masked_adam,
    bind_masked_sgd,
    masked_adam,
    masked_sgd,
)

Bound = tuple[Step, int]


def bind_update(
    weights: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    mask: Tensor | None,
    recipe: Recipe,
    paths: Paths,
) -> Bound:
    """The update as a function of the optimizer's own step, from 1, and the learning rate; bytes of its mask.

    `weights`, `grad` and `moments` are [R, n]; `mask` is bool [R, M] for the first M of them, the rest is
    not pruned; None means that nothing is.
    """
    if not weights.is_contiguous():  # running statistics lie behind each row; torch's update has no strides
        return _bind_rows(weights, grad, moments, mask, recipe, paths)
    adam, momentum, decay = recipe.optimizer == "adam", recipe.momentum, recipe.weight_decay
    if paths.masked_update.takes == "torch":
        return _bind_torch(weights, grad, moments, mask, recipe)
    bits = None if mask is None else _bits(mask, weights)
    size = 0 if bits is None else bits.numel()
    if adam:
        first, second = moments
        return bind_masked_adam(weights, grad, (first, second), bits, weight_decay=decay), size
    buffer = moments[0] if momentum else None
    return bind_masked_sgd(weights, grad, buffer, bits, momentum=momentum, weight_decay=decay), size


def _bind_rows(
    weights: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    mask: Tensor | None,
    recipe: Recipe,
    paths: Paths,
) -> Bound:
    """Each row by itself."""
    each = list[Bound]()
    for r in range(len(weights)):
        row = slice(r, r + 1)
        bits = None if mask is None else mask[row]
        each.append(
            bind_update(weights[row], grad[row], [moment[row] for moment in moments], bits, recipe, paths)
        )

    def update(step: int, lr: float) -> None:
        for one, _ in each:
            one(step, lr)

    return update, sum(size for _, size in each)


def _bind_torch(
    weights: Tensor, grad: Tensor, moments: list[Tensor], mask: Tensor | None, recipe: Recipe
) -> Bound:
    """Torch's own fused update of gradients times the mask."""
    live = None if mask is None else mask.to(weights)
    count = torch.zeros((), device=weights.device, dtype=torch.float32)

    def adam(step: int, lr: float) -> None:
        masked_adam(weights, grad, live, moments, count.fill_(step), lr, recipe.weight_decay)

    def sgd(step: int, lr: float) -> None:
        masked_sgd(weights, grad, live, moments[0], lr, recipe.momentum, recipe.weight_decay)

    return adam if recipe.optimizer == "adam" else sgd, 0 if live is None else 4 * live.numel()


def _bits(mask: Tensor, weights: Tensor) -> Tensor:
    """The packed mask of a whole buffer: what follows the weights is not pruned."""
    every = torch.ones(weights.shape, dtype=torch.bool, device=weights.device)
    every[:, : mask.shape[1]] = mask
    found: Tensor = bitmask.pack(every)
    return found
