"""Random masks whose layers keep what a law says of their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparselth.models import Model
from sparselth.scores import Batch, register


@register(
    "erk",
    "random; under scope global a layer keeps as (inputs + outputs + k + k) goes (Evci et al. 2020)",
    autograd=False,
)
def erk(network: Model, weights: Tensor, mask: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Of a layer whose shape sums to s, the j-th weight of a random order has -(j + 1/2) / s.

    The K largest of all then are round(e s) of every layer, at most all it has, with the e that makes them K.
    """
    found = torch.zeros(mask.numel(), dtype=torch.float64, device="cpu")
    alive = mask.cpu()
    for spec in network.params.weights:
        draws = torch.rand(spec.numel, generator=generator, dtype=torch.float32, device="cpu")
        draws[~alive[spec.span]] = 2.0  # behind all others
        places = torch.empty(spec.numel, dtype=torch.float64, device="cpu")
        places[draws.argsort(stable=True)] = torch.arange(spec.numel, dtype=torch.float64, device="cpu")
        found[spec.span] = -(places + 0.5) / sum(spec.shape)
    return found.to(weights.device)
