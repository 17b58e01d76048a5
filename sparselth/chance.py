"""Masks beside chance: how well numbers tell which weights are kept, and what two masks share.

auc       the chance that a kept weight has the larger number of the two, of a kept and a pruned one drawn
          at random; ties count half. 0.5 is chance (Mann & Whitney 1947), and over several layers what masks
          shuffled within each of them have in the mean
overlap   weights that two masks of a and b among n share: by chance hypergeometric, of whole groups where
          weights are kept or pruned in groups; of 2 in every 4 the sum over the fours
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, lgamma, sqrt
from typing import Self

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating]
Bits = NDArray[np.bool_]


def ranks(numbers: Numbers) -> NDArray[np.float64]:
    """The rank of each from 1 on; equal ones share the mean of theirs."""
    _, place, count = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place.reshape(-1)]


def auc(ranked: NDArray[np.float64], kept: Bits) -> float | None:
    """The AUC of numbers with these `ranks`; None where all are kept or none is."""
    n = int(kept.sum())
    rest = len(kept) - n
    if not n or not rest:
        return None
    return float((ranked[kept].sum() - n * (n + 1) / 2) / (n * rest))


def shuffled_auc(ranked: NDArray[np.float64], kept: Bits, layers: Sequence[slice]) -> float | None:
    """The mean AUC of all masks that keep as many in each of the `layers`, which are parts of these.

    Layers that keep more than others have larger or smaller numbers: that alone is no 0.5.
    """
    n = int(kept.sum())
    rest = len(kept) - n
    if not n or not rest:
        return None
    total = sum(int(kept[layer].sum()) * float(ranked[layer].mean()) for layer in layers)
    return (total - n * (n + 1) / 2) / (n * rest)


@dataclass(frozen=True)
class Overlap:
    """Weights that two masks share, of `a` and `b` among `n`; `group` of them are kept or pruned as one."""

    shared: int
    a: int
    b: int
    n: int
    group: int = 1

    @classmethod
    def of(cls, one: Bits, other: Bits, group: int = 1) -> Self:
        return cls(int((one & other).sum()), int(one.sum()), int(other.sum()), len(one), group)

    @property
    def groups(self) -> Overlap:
        """The same counted in groups."""
        return Overlap(*(count // self.group for count in (self.shared, self.a, self.b, self.n)))

    @property
    def expected(self) -> float:
        """By chance."""
        return self.a * self.b / self.n if self.n else 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation of chance."""
        if self.group > 1:
            return self.group * self.groups.deviation
        n = self.n
        if n < 2:
            return 0.0
        return sqrt(self.a * self.b / n * (n - self.a) / n * (n - self.b) / (n - 1))

    @property
    def share(self) -> float | None:
        """Of the smaller mask, what the other has too, in [0, 1]."""
        least = min(self.a, self.b)
        return self.shared / least if least else None

    def interval(self, outside: float = 0.05) -> tuple[int, int]:
        """The counts between which chance lies: below, and above, at most half of `outside`."""
        if self.group > 1:
            low, high = self.groups.interval(outside)
            return self.group * low, self.group * high
        low, high = max(0, self.a + self.b - self.n), min(self.a, self.b)
        reach = 10 * self.deviation + 10  # beyond, nothing that adds up to a part of `outside`
        low, high = max(low, int(self.expected - reach)), min(high, int(self.expected + reach))
        chances = np.array([self.chance(k) for k in range(low, high + 1)])
        below, above = np.cumsum(chances), np.cumsum(chances[::-1])
        first = int(np.searchsorted(below, outside / 2, side="right"))
        last = int(np.searchsorted(above, outside / 2, side="right"))
        return low + min(first, len(chances) - 1), high - min(last, len(chances) - 1)

    def chance(self, k: int) -> float:
        """The probability that two random masks share k weights."""
        if self.group > 1:
            return 0.0 if k % self.group else self.groups.chance(k // self.group)
        a, b, n = self.a, self.b, self.n
        if not max(0, a + b - n) <= k <= min(a, b):
            return 0.0
        return exp(_choose(a, k) + _choose(n - a, b - k) - _choose(n, b))


class Fours(Overlap):
    """The same of masks that keep 2 of every 4 weights: each four draws by itself."""

    @property
    def deviation(self) -> float:
        return sqrt(self.n / 12)  # a four shares 0, 1 or 2 in 1, 4 and 1 of 6 cases, of variance 1 / 3

    def chance(self, k: int) -> float:
        return float(self._law[k]) if 0 <= k < len(self._law) else 0.0

    @cached_property
    def _law(self) -> NDArray[np.float64]:
        fours = self.n // 4
        ends = 2 * fours + 1
        powers = np.fft.rfft([1 / 6, 4 / 6, 1 / 6], ends) ** fours
        return np.maximum(0.0, np.fft.irfft(powers, ends))


def _choose(n: int, k: int) -> float:
    """The logarithm of the number of ways to choose k of n."""
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
