"""Below which share of survivors a layer is trained faster compressed than dense, on this machine.

Measured once for each layer shape, processor and library, on one thread, and kept in the user's cache
folder; what was measured among other programs is kept with its spread, and measured again by the next run. A
compressed layer's time is a straight line in its density: two random masks give the line, and
break-even is where it meets 95 % of the dense layer's time, update included. Small layers can be faster
through the compressed kernels even with all their weights; then it is ALWAYS.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from sparselth.engine.compressed import COLUMNS, Ends, Product, make_index
from sparselth.engine.layers import DenseLinear, Place, activation
from sparselth.engine.layout import compressible
from sparselth.engine.vendor import VendorNetwork
from sparselth.files import read_cache, write_cache
from sparselth.kernels.masked_update import bind_masked_adam
from sparselth.kernels.step_parts import Call
from sparselth.machine import cpu_name
from sparselth.models import Conv, Layer, Model
from sparselth.params import TensorSpec

MARGIN = 0.95
ALWAYS = 2.0
DENSITIES = 0.05, 0.35, 1.0
ROUNDS, SECONDS = 5, 0.1  # rounds of all, interleaved, until the time is up
SPREAD = 1.5  # times the least that the upper quartile may be for a time to be believed for good


@dataclass(frozen=True)
class Case:
    """One layer as it stands in a network."""

    spec: TensorSpec
    layer: Layer
    before: tuple[int, ...]
    after: tuple[int, ...]
    first: bool
    batch: int
    kernels: str


def break_even(model: Model, batch: int, kernels: str) -> dict[str, float]:
    """Break-even density of every weight tensor for "native" or "torch" kernels; 0 where dense is best.

    What the cache does not hold is measured now: a second or two for a small network. {} for a network that
    stays dense.
    """
    if not compressible(model):
        return {}
    return densities(
        {
            spec.name: Case(spec, layer, shape, after, spec is model.weights[0], batch, kernels)
            for spec, layer, shape, after in model.producers
        }
    )


def densities(cases: Mapping[str, Case]) -> dict[str, float]:
    """Break-even density of each; what the cache does not hold is measured now."""
    known, found, new = read_cache("break_even"), dict[str, float](), False
    for name, case in cases.items():
        key = (
            f"{case.layer} {'first ' * case.first}on {list(case.before)}, batch {case.batch}, {case.kernels}"
        )
        key += f", {cpu_name()}, torch {torch.__version__}"
        before = _kept(known.get(key))
        if before is None or before.spread > SPREAD:
            now = _measure(case)
            if before is None or now.spread <= before.spread:
                before, new = now, True
                known[key] = {"density": round(now.density, 3), "spread": round(now.spread, 3)}
        found[name] = round(before.density, 3)
    if new:
        write_cache("break_even", known)
    return found


def gain(convolutions: Iterable[tuple[int, float, int, int]]) -> float:
    """What convolutions gain together, above 0 where it pays; each by the pixels of its result, its
    break-even, all its weights and the kept ones. They go together, weighted by their work, since the
    vendor's want another layout of the images."""
    return sum(pixels * (min(share, 1.05) * numel - kept) for pixels, share, numel, kept in convolutions)


@dataclass(frozen=True)
class Measured:
    """A break-even density, and how much the times behind it varied."""

    density: float
    spread: float  # the largest of upper quartile / least


def _kept(data: Any) -> Measured | None:
    """One that a cache file has; None where it is none. Before there was a spread it was a number alone."""
    try:
        density, spread = (data, 1.0) if isinstance(data, float) else (data["density"], data["spread"])
        found = Measured(float(density), float(spread))
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return found if 0 <= found.density <= ALWAYS and 1 <= found.spread < float("inf") else None


def _measure(case: Case) -> Measured:
    """One layer's break-even density."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _seconds([_dense(case), *(_compressed(case, d) for d in DENSITIES)])
    finally:
        torch.set_num_threads(threads)
    dense, sparse, denser, full = map(min, times)
    spread = max(quantiles(values, n=4)[2] / min(values) for values in times)
    if full < MARGIN * dense:
        return Measured(ALWAYS, spread)
    slope = max(denser - sparse, 1e-9) / (DENSITIES[1] - DENSITIES[0])
    return Measured(min(1.0, max(0.0, DENSITIES[0] + (MARGIN * dense - sparse) / slope)), spread)


def _seconds(calls: list[Call]) -> list[list[float]]:
    """The seconds of each, all in turn."""
    found: list[list[float]] = [[] for _ in calls]
    began, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - began < SECONDS:
        for call, values in zip(calls, found, strict=True):
            start = time.perf_counter()
            call()
            values.append(time.perf_counter() - start)
        rounds += 1
    return found


def _dense(case: Case) -> Call:
    """Forward, backward and masked update of a dense layer, as `dense` or `vendor` has it."""
    spec, layer, before, first = case.spec, case.layer, case.before, case.first
    weights, grad = _random(1, *spec.matrix), torch.zeros(1, *spec.matrix, dtype=torch.float32, device="cpu")
    bits = torch.full((1, -(-spec.numel // 8)), 255, dtype=torch.uint8, device="cpu")
    update = _update(weights, grad, bits, case.kernels)
    bias, dbias = torch.zeros(2, 1, spec.shape[0], 1, dtype=torch.float32, device="cpu")
    if isinstance(layer, Conv):
        model = Model("", (before[0], before[1], before[2]), (layer,), {}, "")
        flat, slopes = (
            _random(1, model.params.size),
            torch.zeros(1, model.params.size, dtype=torch.float32, device="cpu"),
        )
        vendor = VendorNetwork(model, flat, slopes, first=first)
        x = _random(1, prod(before), case.batch).mT.contiguous().mT
        dy = torch.randn(case.batch, *case.after, dtype=torch.float32, device="cpu").contiguous(
            memory_format=torch.channels_last
        )

        def convolve() -> None:
            vendor.forward(x)
            vendor.backward(dy.movedim(0, -1)[None])
            update()

        return convolve
    y = activation(weights, 1, case.after, case.batch)
    x, dy = activation(weights, 1, before, case.batch).normal_(), torch.randn_like(y)
    product = DenseLinear(Place(weights, bias, grad, dbias, y, before, not first))

    def run() -> None:
        product.forward(x)
        product.backward(dy)
        update()

    return run


def _compressed(case: Case, density: float) -> Call:
    """The same of a compressed layer under a random mask."""
    spec, before = case.spec, case.before
    mask = (
        torch.rand(spec.matrix, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        < density
    )
    index = make_index(spec, case.layer, before, mask, case.first)
    columns = -(-case.batch // COLUMNS) * COLUMNS
    weights, grad = _random(1, index.kept), torch.zeros(1, index.kept, dtype=torch.float32, device="cpu")
    x, y = (
        _random(prod(before), columns),
        torch.zeros(prod(case.after), columns, dtype=torch.float32, device="cpu"),
    )
    ends = Ends(x, y, None if case.first else torch.zeros_like(x), torch.randn_like(y))
    product = Product(case.layer, spec, before, case.after, weights[0], grad[0], index, case.kernels)
    calls = product.forward(
        ends, torch.zeros(spec.shape[0], dtype=torch.float32, device="cpu"), relu=False
    ) + product.backward(ends)
    update = _update(weights, grad, None, case.kernels)

    def run() -> None:
        for call in calls:
            call()
        update()

    return run


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def _update(weights: Tensor, grad: Tensor, bits: Tensor | None, kernels: str) -> Call:
    w, g = weights.view(1, -1), grad.view(1, -1)
    moments = torch.zeros_like(w), torch.zeros_like(w)
    return partial(bind_masked_adam(w, g, moments, bits, kernels=kernels), 1, 1e-4)
