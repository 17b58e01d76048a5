"""What a case of subset-sum finds: the line of its cell, and what its file holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselth import masks
from sparselth.files import Arrays
from sparselth.kernels.subset_sum import subset_sum, sums
from sparselth.models import Model
from sparselth.models.torch import network
from sparselth.theory import laws
from sparselth.theory.construct import Pruned, one_more, twice, weights_of
from sparselth.theory.pools import Curve, Pools, closest, covering, errors, grid_numbers, holds_grid, uniform

HALF = 0.5  # of the pools
MORE = 20  # times the pools where k is 1: n goes into the hundreds, and one number is quickly looked at
NEARLY = 0.99  # of the weights that density looks at
FEWER = 4  # pools where 2^n sums of each are laid out
CHOSEN = 2000  # so many
DECADES = np.linspace(-9, 0, 91)  # edges of the histogram of errors, log10
THEOREMS = {
    "twice": "pensia",
    "redrawn": "iterand",
    "sparse": "natale",
    "exact": "quantised",
    "one-more": "burkholz",
}

Line = tuple[dict[str, Any], Arrays]  # a cell's line, and what its file holds
Draw = Callable[[str], torch.Generator]  # a stream for a purpose
Chunks = Sequence[tuple[Tensor, Tensor]]  # images [1, K, B] and labels [1, 1, B]


def point(
    theorem: str,
    n: int | None,
    k: int | None,
    epsilon: float | None,
    covered: float | None,
    weights_used: float | None,
    max_error: float | None,
    **more: Any,
) -> dict[str, Any]:
    """A line: n candidates, k of them kept (None: any number), the share that came within epsilon."""
    found = {"theorem": theorem, "n": n, "k": k, "epsilon": epsilon, "covered": covered}
    return found | {"weights_used": weights_used, "max_error": max_error, **more}


def fixed_size(k: int, z: float, epsilon: float, draws: int, generator: torch.Generator) -> Line:
    """The least n at which half of the pools have k numbers that add up to z, beside the first moment."""
    pools = Pools(draws * (MORE if k == 1 else 1), generator)
    law = laws.first_moment(k, z, epsilon)
    found: dict[int, Tensor] = {}

    def share(n: int) -> float:
        found[n] = errors(pools, n, k, z)
        return float((found[n] < epsilon).double().mean())

    curve = Curve(share)
    n = curve.least(k, law, HALF)
    there = curve.at(law)
    line = point(
        "malach" if k == 1 else "natale",
        *(n, k, epsilon, curve.at(n), k, float(found[n].max())),
        z=z,
        first_moment=law,
        covered_at_first_moment=there,
        entropy=laws.entropy_n(k, epsilon),
    )
    return line, {"errors": found[n].numpy()}


def covered(n: int, epsilon: float, draws: int, generator: torch.Generator) -> Line:
    """How near the subset sums of n numbers come to every target in [-1/2, 1/2]."""
    needed = np.array([covering(row) for row in uniform(-(-draws // FEWER), n, generator).numpy()])
    shares = {f"2^-{i}": float((needed <= 2.0**-i).mean()) for i in range(1, 13)}
    median = float(np.median(needed))
    line = point(
        *("lueker", n, None, epsilon, float((needed <= epsilon).mean()), None, float(needed.max())),
        median_error=median,
        pigeonhole=2.0 ** -(n + 1),
        shares=shares,
    )
    return line, {"errors": needed}


def quantised(bits: int, draws: int, generator: torch.Generator) -> Line:
    """The least n numbers on the grid of 2^-bits that hold all of it in [-1/2, 1/2], in half of the pools."""
    most = 6 * bits + 24
    numbers = grid_numbers(draws, most, bits, generator)
    first = np.array([holds_grid(row, bits) for row in numbers.tolist()])
    n = int(np.sort(first)[-(-draws // 2) - 1])
    line = point(
        *("quantised", n, None, 0.0, float((first <= n).mean()), None, 0.0 if n <= most else None),
        bits=bits,
        least=int(first.min()),
        most=int(first.max()),
    )
    return line, {"first": first}


def redrawn(k: int, rounds: int, epsilon: float, draws: int, generator: torch.Generator) -> Line:
    """The least n of which k hit 0 in one of so many rounds, each with numbers of its own."""
    draws *= MORE if k == 1 else 1
    pools = Pools(draws * rounds, generator)
    found: dict[int, Tensor] = {}

    def share(n: int) -> float:
        found[n] = errors(pools, n, k, 0.0).view(rounds, draws).amin(0)
        return float((found[n] < epsilon).double().mean())

    curve = Curve(share)
    n = curve.least(k, max(k, laws.first_moment(k, 0.0, epsilon) // rounds), HALF)
    line = point(
        *("iterand", n, k, epsilon, curve.at(n), k, float(found[n].max())), redraws=rounds, drawn=n * rounds
    )
    return line, {"errors": found[n].numpy()}


def density(model: Model, flat: Tensor, k: int | None, epsilon: float, draw: Draw) -> Line:
    """The least n candidates, of which k are kept, for 99 % of a sample of a network's weights."""
    weights = torch.cat([t.flatten() for pair in weights_of(model, flat) for t in pair]).double()
    places = torch.arange(min(CHOSEN, len(weights)), device="cpu") * len(weights) // min(CHOSEN, len(weights))
    targets = weights[places]
    inner, outer = Pools(len(targets), draw("features")), Pools(len(targets), draw("sums"))
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def share(n: int) -> float:
        products = inner.first(n).abs() * outer.first(n)
        if k == 1:
            nearest = (products - targets[:, None]).abs().min(1)
            found[n] = F.one_hot(nearest.indices, n).bool(), nearest.values
        else:
            found[n] = closest(products, targets, k)
        return float((found[n][1] <= epsilon).double().mean())

    curve = Curve(share)
    n = curve.least(k or 2, laws.first_moment(k, 0.0, epsilon) if k else 10, NEARLY)
    chosen, error = found[n]
    used = float(chosen.sum(1).double().mean())
    theorem = {1: "malach", None: "pensia"}.get(k, "natale")
    line = point(
        *(theorem, n, k, epsilon, curve.at(n), used, float(error.max())),
        density=used / n,
        model=model.name,
        sample=len(targets),
    )
    return line, {"errors": error.numpy()}


def construction(
    case: str,
    model: Model,
    flat: Tensor,
    n: int,
    k: int | None,
    bits: int,
    rounds: int,
    epsilon: float,
    draw: Draw,
    test: Chunks,
    should_stop: Callable[[], bool],
) -> Line | None:
    """Prune a random network until it computes what a trained one [P] does, then run both on the test images.

    None where it was stopped.
    """
    grid = bits if case == "exact" else None
    if grid is not None:
        flat, epsilon = (flat * 2**grid).round() / 2**grid, 0.0
    target = weights_of(model, flat)
    if case == "one-more":
        pruned = one_more(target, n, draw, should_stop)
    else:
        redraws = rounds if case == "redrawn" else 0, epsilon
        pruned = twice(target, n, draw, k, grid, redraws, should_stop)
    if pruned is None:
        return None
    right = run(network(model, flat).eval(), test, should_stop)
    ours = right and run(pruned.module(), test, should_stop)
    if not right or not ours:
        return None
    (wanted, labels), (found, _) = right, ours
    error = torch.cat([e.flatten() for e in pruned.errors])
    within = float((error <= epsilon).double().mean())
    used = sum(layer.kept for layer in pruned.layers)
    line = point(
        *(THEOREMS[case], n, k, epsilon, within, used, float(error.max())),
        model=model.name,
        target_accuracy=_accuracy(wanted, labels),
        accuracy=_accuracy(found, labels),
        within_epsilon=within,
        target_weights=len(error),
        source_weights=sum(layer.numbers for layer in pruned.layers),
        layers=len(pruned.layers),
        redraws=max(int(one.max()) for one in pruned.rounds),
        redrawn_weights=n * sum(int(one.sum()) for one in pruned.rounds),
        output_error=float((found - wanted).abs().max()),
        agreement=float((found.argmax(1) == wanted.argmax(1)).double().mean()),
        histogram=np.histogram(np.log10(error.clamp(min=1e-9).numpy()), DECADES)[0].tolist(),
    )
    return line, _kept(pruned)


def _kept(pruned: Pruned) -> Arrays:
    """Masks of the random network, packed; its weights are drawn again. And the error of every weight."""
    found: Arrays = {}
    for i, layer in enumerate(pruned.layers):
        found[f"mask/{i}"] = masks.pack(layer.keep.numpy())
        found[f"mask_bias/{i}"] = masks.pack(layer.keep_bias.numpy()[None])
    found |= {f"rounds/{i}": one.numpy() for i, one in enumerate(pruned.rounds) if one.any()}
    return found | {f"error/{i}": error.float().numpy() for i, error in enumerate(pruned.errors)}


def run(net: nn.Module, test: Chunks, should_stop: Callable[[], bool]) -> tuple[Tensor, Tensor] | None:
    """Outputs of a network on the test images, [images, classes], and the labels; None where stopped."""
    outputs, labels = [], []
    for x, y in test:
        if should_stop():
            return None
        with torch.no_grad():
            outputs.append(net(x[0].T))
        labels.append(y.flatten())
    return torch.cat(outputs), torch.cat(labels)


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


@lru_cache
def seconds_of_a_sum() -> float:
    """What a sum of a half costs on one core here, from a few problems of 20 numbers."""
    values = torch.arange(200 * 20, device="cpu").view(200, 20) ** 3 % 1_000_003 - 500_000
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        subset_sum(values, values.new_zeros(200))
        best = min(best, time.process_time() - began)
    return best / (200 * sums(20, None))
