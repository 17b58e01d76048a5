r"""Masked optimizer steps over the flat buffers of R replicas.

    g <- m * g;  then SGD with momentum or Adam on (w, g), in place

| name   | shape  | dtype |                                        Floor, fp32, dense lanes, bytes a weight:
| w, g   | [R, P] | fp32  |  weights and biases, their gradients     SGD 4 * 5 = 20, Adam 4 * 7 = 28,
| mask   | [R, M] | fp32  |  0 or 1 for the first M <= P entries     the mask 4 more
| a, b   | [R, P] | fp32  |  momentum; first and second moment

Zeros live in the weights: where the mask is 0 and w, a, b start at 0 they stay exactly 0, because a
masked gradient leaves every moment at 0 and weight decay multiplies a weight of 0. The steps are those
of `torch.optim.SGD` and `torch.optim.Adam` on the masked gradient, to the bit, since torch's own fused
kernels take them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def sgd_reference(
    w: Tensor, g: Tensor, mask: Tensor, a: Tensor, lr: float, momentum: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """New (w, a) by the textbook formula; for tests."""
    g = _masked(g, mask) + weight_decay * w
    a = momentum * a + g
    return w - lr * a, a


def adam_reference(
    w: Tensor, g: Tensor, mask: Tensor, a: Tensor, b: Tensor, step: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New (w, a, b) by the formula of Kingma & Ba 2015; `step` counts from 1; for tests."""
    g = _masked(g, mask) + weight_decay * w
    a = BETA1 * a + (1 - BETA1) * g
    b = BETA2 * b + (1 - BETA2) * g * g
    corrected = (b / (1 - BETA2**step)).sqrt() + EPS
    return w - lr * (a / (1 - BETA1**step)) / corrected, a, b


def _masked(g: Tensor, mask: Tensor) -> Tensor:
    g = g.clone()
    g[:, : mask.shape[1]] *= mask
    return g


def masked_sgd(
    w: Tensor, g: Tensor, mask: Tensor | None, a: Tensor, lr: float, momentum: float, weight_decay: float
) -> None:
    """One SGD step in place; `a` starts at 0; `mask` None means that nothing is pruned."""
    if mask is not None:
        g[:, : mask.shape[1]].mul_(mask)
    torch._fused_sgd_(
        [w],
        [g],
        [a],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,  # a = 0 makes the first step like every other
    )


def masked_adam(
    w: Tensor,
    g: Tensor,
    mask: Tensor | None,
    moments: Sequence[Tensor],
    step: Tensor,
    lr: float,
    weight_decay: float,
) -> None:
    """One Adam step in place; `moments` are (a, b); `mask` None means that nothing is pruned.

    `step`, a 0-dim fp32 tensor, counts from 1.
    """
    if mask is not None:
        g[:, : mask.shape[1]].mul_(mask)
    torch._fused_adam_(
        [w],
        [g],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        lr=lr,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=weight_decay,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )
