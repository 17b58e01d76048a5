"""Scores by the loss of a batch of training images: SNIP and GraSP, made for networks before training.

Batch norms take the batch's statistics, as training does. Images in several batches give the mean gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparselth.models import Model
from sparselth.scores import Batch, register
from sparselth.scores.gradients import built, chunks, joined, mean_loss, slopes

TEMPERATURE = 200.0  # that logits are divided by, as in Wang et al. 2020


@register("snip", "what the loss would change by without the weight, |w dL/dw| (Lee et al. 2019)")
def snip(network: Model, weights: Tensor, mask: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    net, ranked = built(network, weights, mask)
    total = [torch.zeros_like(weight) for weight in ranked]
    for x, y, share in chunks(batch):
        for sum_, g in zip(total, slopes("snip", mean_loss(network, net(x), y), ranked), strict=True):
            sum_ += share * g
    return joined(network, [w * g for w, g in zip(ranked, total, strict=True)], mask).abs()


@register("grasp", "how much of |dL/dw|² is lost without the weight, w (H dL/dw) (Wang et al. 2020)")
def grasp(network: Model, weights: Tensor, mask: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """To first order |g|² falls by 2 w (H g) without the weight w: of what the paper calls S(-w), -w (H g),
    the largest go.
    """
    net, ranked = built(network, weights, mask)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        output = net(x)
        return mean_loss(network, output / TEMPERATURE if output.is_floating_point() else output, y)

    first = [torch.zeros_like(weight) for weight in ranked]
    for x, y, share in chunks(batch):
        for sum_, g in zip(first, slopes("grasp", loss(x, y), ranked), strict=True):
            sum_ += share * g
    second = [torch.zeros_like(weight) for weight in ranked]
    for x, y, share in chunks(batch):
        with sdpa_kernel(SDPBackend.MATH):  # the one that has a second derivative
            again = slopes("grasp", loss(x, y), ranked, graph=True)
        product = torch.stack([(a * b).sum() for a, b in zip(again, first, strict=True)]).sum()
        for sum_, h in zip(second, slopes("grasp", product, ranked), strict=True):
            sum_ += share * h
    return joined(network, [w * h for w, h in zip(ranked, second, strict=True)], mask)
