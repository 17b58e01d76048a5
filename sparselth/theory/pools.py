"""Pools of random numbers: when do they hit a target, cover an interval, hold every number of a grid?

Draws are [n, draws], so that the first n rows are the same however many there are: a pool only grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparselth.errors import SparselthError
from sparselth.kernels.subset_sum import subset_sum

CLOSE = 60  # bits of the sums that are searched, of 63


def closest(
    values: Tensor, targets: Tensor, size: int | None = None, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The nearest subset of each row: chosen, bool [count, n], and its error, float64 [count].

    Numbers go to a grid as fine as int64 allows, about 2^-CLOSE of what a row adds up to; on that grid the
    answer is exact, and numbers that lie on it, as k / 2^b do, are not rounded at all. The error is that of
    the numbers as they are. Not a finite number: SparselthError.
    """
    values, targets = values.double(), targets.double()
    if not (values.isfinite().all() and targets.isfinite().all()):
        raise SparselthError("subset sums: expected finite numbers, found NaN or infinity")
    if not len(values):
        return torch.zeros(values.shape, dtype=torch.bool, device="cpu"), targets
    top = float((values.abs().sum(1) + targets.abs()).max())
    grid = 2.0 ** (CLOSE - int(np.ceil(np.log2(top))) if top else 0)
    chosen = subset_sum((values * grid).round().long(), (targets * grid).round().long(), size, kernels)
    return chosen, ((values * chosen).sum(1) - targets).abs()


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """U[-1, 1], float64 [rows, columns]."""
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1


@dataclass
class Curve:
    """Shares of pools by their n, as they were asked for; `at` computes one, once."""

    share: Callable[[int], float]
    shares: dict[int, float] = field(default_factory=dict)

    def at(self, n: int) -> float:
        if n not in self.shares:
            self.shares[n] = self.share(n)
        return self.shares[n]

    def least(self, low: int, guess: int, wanted: float) -> int:
        """The least n >= low with a share of `wanted`, of shares that grow with n."""
        high = max(low, guess)
        while self.at(high) < wanted:
            low, high = high + 1, max(high + 1, high * 5 // 4)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(middle) >= wanted else (middle + 1, high)
        return high


class Pools:
    """So many pools that grow, numbers from a stream of its own, one row of all pools after the other."""

    def __init__(self, draws: int, generator: torch.Generator) -> None:
        self.generator, self.rows = generator, torch.empty(0, draws, dtype=torch.float64, device="cpu")

    def first(self, n: int) -> Tensor:
        """The first n numbers of every pool, [draws, n]."""
        if n > len(self.rows):
            more = uniform(n - len(self.rows), self.rows.shape[1], self.generator)
            self.rows = torch.cat([self.rows, more])
        return self.rows[:n].T.contiguous()


def errors(pools: Pools, n: int, k: int | None, z: float) -> Tensor:
    """How far from z the nearest sum of k of n numbers is in every pool, [draws]."""
    values = pools.first(n)
    if k == 1:
        return (values - z).abs().amin(1)
    return closest(values, values.new_full((len(values),), z), k)[1]


def covering(numbers: NDArray[np.float64], low: float = -0.5, high: float = 0.5) -> float:
    """The least epsilon at which every z of [low, high] has a subset sum of `numbers` [n] within epsilon."""
    sums = np.zeros(1)
    for x in numbers:
        sums = np.sort(np.concatenate([sums, sums + x]), kind="stable")  # which merges two lists in order
    sums = np.concatenate([[-1e9], sums, [1e9]])
    first, last = np.searchsorted(sums, low) - 1, np.searchsorted(sums, high) + 1
    sums = sums[max(first, 0) : last + 1]
    furthest = np.clip((sums[:-1] + sums[1:]) / 2, low, high)
    gaps = np.minimum(np.abs(furthest - sums[:-1]), np.abs(sums[1:] - furthest))
    return float(gaps[(sums[1:] >= low) & (sums[:-1] <= high)].max())


def grid_numbers(rows: int, columns: int, bits: int, generator: torch.Generator) -> Tensor:
    """U[-1, 1] on the grid of 2^-bits, as whole numbers from -2^bits to 2^bits, int64 [rows, columns]."""
    top = 2**bits
    return torch.randint(-top, top + 1, (rows, columns), generator=generator, device="cpu")


def holds_grid(numbers: list[int], bits: int) -> int:
    """Of how many whole numbers, the first ones of `numbers`, subset sums are every one from -2^(bits-1) to
    2^(bits-1); one more than there are where they never are.
    """
    half = 2 ** (bits - 1)
    wanted = (1 << (2 * half + 1)) - 1
    sums, zero = 1, 0  # bit i of sums: i - zero is one
    for n, x in enumerate(numbers, 1):
        sums, zero = sums | sums << abs(x), zero + max(0, -x)
        low = zero - half
        if low >= 0 and sums >> low & wanted == wanted:
            return n
    return len(numbers) + 1
