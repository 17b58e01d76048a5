"""Which weights go: magnitude, by layer or over all layers, with exact counts.

A mask is a bool vector [M], M = `params.mask_size`, in the order of the flat buffer. Of n surviving
weights exactly round(rate * n) go, the smallest magnitudes first, equal ones by lowest index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from math import floor

import torch
from torch import Tensor

from sparselth.errors import unknown
from sparselth.kernels import bitmask
from sparselth.kernels.magnitude_threshold import launch, split
from sparselth.params import Params, matrix


def excluded(params: Params, exclude: Sequence[str]) -> list[str]:
    """The weights that some entry means: "fc1.weight", its layer "fc1", or a glob, "conv*".

    UsageError for an entry that means none.
    """
    found = set[str]()
    for entry in exclude:
        meant = {
            s.name for s in params.weights if fnmatchcase(s.name, entry) or s.name.startswith(f"{entry}.")
        }
        if not meant:
            raise unknown("weight to exclude", entry, [s.name for s in params.weights])
        found |= meant
    return [s.name for s in params.weights if s.name in found]


def ladder(
    params: Params, levels: int, rate: float, scope: str, exclude: Sequence[str] = ()
) -> list[dict[str, int]]:
    """Surviving weights at levels 0 to `levels`: by tensor for scope "layer", {"all": n} for "global".

    Under "layer" the output layer goes at half the rate, and the convolutions of conv2 to conv6 at half or
    three quarters of it (Frankle & Carbin 2019, Figure 2). What is excluded stays whole: under "global" it
    stands by its name beside "all" others.
    """
    whole = excluded(params, exclude)
    now = {s.name: s.numel for s in params.weights}
    rates = {s.name: rate * s.rate_scale for s in params.weights}
    if scope == "global":
        now = {"all": params.prunable - sum(now[name] for name in whole)} | {
            name: now[name] for name in whole
        }
        rates = {"all": rate}
    rates |= dict.fromkeys(whole, 0.0)
    found = [now]
    for _ in range(levels):
        now = {name: n - rounded(rates[name] * n) for name, n in now.items()}
        found.append(now)
    return found


def prune(
    params: Params, weights: Tensor, mask: Tensor, keep: dict[str, int], kernels: str = "auto"
) -> Tensor:
    """The mask [M] that keeps the `keep` largest magnitudes of `weights` [M] among those `mask` keeps.

    `keep` is a rung of `ladder`; a rung above what `mask` keeps raises ValueError, and what it names beside
    "all" is not looked at. `kernels` is "triton",
    "reference" or "auto", as in `sparselth.kernels.magnitude_threshold`.
    """
    alive = params.kept(mask)
    ranked = [spec for spec in params.weights if "all" not in keep or spec.name not in keep]
    if "all" in keep:
        others = {name: n for name, n in alive.items() if name in keep}
        alive = {"all": sum(alive[spec.name] for spec in ranked)} | others
    for name, n in alive.items():
        if keep[name] > n:
            raise ValueError(f"{name}: cannot keep {keep[name]} of {n} weights")
    new = mask.clone()
    if not ranked:
        return new
    going = [alive["all"] - keep["all"]] if "all" in keep else [n - keep[name] for name, n in alive.items()]
    tensors, packed = [matrix(spec, weights)[None] for spec in ranked], params.packed(mask[None])
    counts = torch.tensor([going], device=weights.device)
    buffer, _ = launch(
        tensors,
        counts[:, 0] if "all" in keep else counts,
        [packed[spec.name] for spec in ranked],
        kernels=kernels,
    )
    for spec, bits in zip(ranked, split(buffer, tensors), strict=True):
        matrix(spec, new).copy_(bitmask.unpack(bits[0], spec.matrix[1]))
    return new


def schedule(first: dict[str, int], last: dict[str, int], rounds: int) -> list[dict[str, int]]:
    """Rungs from behind `first` to `last`, in each of which every part keeps the same share of what it has.

    After round i of `rounds` it is n (k / n)^(i / rounds), rounded, of n weights that end as k; of those that
    end as none the last goes in the last round.
    """
    found = []
    for i in range(1, rounds + 1):
        way = {name: n * (max(last[name], 1) / n) ** (i / rounds) if n else 0 for name, n in first.items()}
        found.append({name: rounded(n) for name, n in way.items()})
    found[-1] = {name: last[name] for name in first}
    return found


def in_rounds(
    params: Params,
    mask: Tensor,
    keep: Sequence[dict[str, int]],
    ranks: Callable[[Tensor], Tensor],
    kernels: str = "auto",
) -> Tensor:
    """The mask [M] after all rungs of `keep`; `ranks` gives numbers from 0 on, [M], for the mask so far."""
    for rung in keep:
        mask = prune(params, ranks(mask), mask, rung, kernels)
    return mask


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
