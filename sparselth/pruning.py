"""Which weights go: magnitude, by layer or over all layers, with exact counts.

A mask is a bool vector [M], M = `params.mask_size`, in the order of the flat buffer. Of n surviving
weights exactly round(rate * n) go, the smallest magnitudes first, equal ones by lowest index.
"""

from __future__ import annotations

from math import floor

import torch
from torch import Tensor

from sparselth.kernels import bitmask
from sparselth.kernels.magnitude_threshold import launch, split
from sparselth.params import Params, matrix


def ladder(params: Params, levels: int, rate: float, scope: str) -> list[dict[str, int]]:
    """Surviving weights at levels 0 to `levels`: by tensor for scope "layer", {"all": n} for "global".

    Under "layer" the output layer goes at half the rate, and the convolutions of conv2 to conv6 at half or
    three quarters of it (Frankle & Carbin 2019, Figure 2).
    """
    if scope == "global":
        now, rates = {"all": params.prunable}, {"all": rate}
    else:
        now = {s.name: s.numel for s in params.weights}
        rates = {s.name: rate * s.rate_scale for s in params.weights}
    found = [now]
    for _ in range(levels):
        now = {name: n - rounded(rates[name] * n) for name, n in now.items()}
        found.append(now)
    return found


def prune(
    params: Params, weights: Tensor, mask: Tensor, keep: dict[str, int], kernels: str = "auto"
) -> Tensor:
    """The mask [M] that keeps the `keep` largest magnitudes of `weights` [M] among those `mask` keeps.

    `keep` is a rung of `ladder`; a rung above what `mask` keeps raises ValueError. `kernels` is "triton",
    "reference" or "auto", as in `sparselth.kernels.magnitude_threshold`.
    """
    alive = params.kept(mask)
    if "all" in keep:
        alive = {"all": sum(alive.values())}
    for name, n in alive.items():
        if keep[name] > n:
            raise ValueError(f"{name}: cannot keep {keep[name]} of {n} weights")
    going = torch.tensor([[n - keep[name] for name, n in alive.items()]], device=weights.device)
    tensors = [matrix(spec, weights)[None] for spec in params.weights]
    buffer, _ = launch(
        tensors,
        going[:, 0] if "all" in keep else going,
        [*params.packed(mask[None]).values()],
        kernels=kernels,
    )
    new = torch.zeros_like(mask)
    for spec, bits in zip(params.weights, split(buffer, tensors), strict=True):
        matrix(spec, new).copy_(bitmask.unpack(bits[0], spec.matrix[1]))
    return new


def shuffle(params: Params, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The mask permuted within each weight tensor: the same counts in random places."""
    new = mask.clone()
    for spec in params.weights:
        span = spec.span
        new[span] = mask[span][torch.randperm(spec.numel, generator=generator, device="cpu")]
    return new


def rounded(x: float) -> int:
    """The nearest whole number, of a half the upper one."""
    # 1e-9 so that a half such as 0.3 * 5 does not fall by the error of the product
    return floor(x + 0.5 + 1e-9)
