"""What theory says of subset sums of n numbers drawn from U[-1, 1]: closed forms, without torch."""

from __future__ import annotations

from fractions import Fraction
from itertools import count
from math import comb, factorial, log2


def density(k: int, z: float) -> float:
    """Density of the sum of k draws from U[-1, 1] at z (Irwin 1927, Hall 1927), in exact fractions.

    At the ends of k = 1 it is the value from inside.
    """
    y = (k - abs(Fraction(z))) / 2  # from the nearer end, in draws from U[0, 1]
    if y < 0:
        return 0.0
    terms = ((-1) ** j * comb(k, j) * (y - j) ** (k - 1) for j in range(k) if j < y or j == 0)
    return float(sum(terms, Fraction(0)) / (2 * factorial(k - 1)))


def below(k: int, z: float) -> float:
    """Probability that the sum of k draws from U[-1, 1] is at most z."""
    y = (Fraction(z) + k) / 2
    if y <= 0:
        return 0.0
    if y >= k:
        return 1.0
    terms = ((-1) ** j * comb(k, j) * (y - j) ** k for j in range(k) if j < y)
    return float(sum(terms, Fraction(0)) / factorial(k))


def window(k: int, z: float, epsilon: float) -> float:
    """Probability that the sum of k draws lies within epsilon of z."""
    return below(k, z + epsilon) - below(k, z - epsilon)


def expected_hits(n: int, k: int, z: float, epsilon: float) -> float:
    """The first moment: C(n, k) 2 epsilon f_k(z), subsets of k of n draws whose sum hits z, in the mean."""
    return comb(n, k) * 2 * epsilon * density(k, z)


def first_moment(k: int, z: float, epsilon: float) -> int:
    """The least n at which one hit is expected, C(n, k) 2 epsilon f_k(z) >= 1."""
    if k == 1:
        return max(1, -int(-1 // (2 * Fraction(epsilon) * Fraction(density(1, z)))))
    return next(n for n in count(k) if expected_hits(n, k, z, epsilon) >= 1)


def entropy(share: float) -> float:
    """H2, in bits."""
    if not 0 < share < 1:
        return 0.0
    return -share * log2(share) - (1 - share) * log2(1 - share)


def entropy_n(k: float, epsilon: float) -> float:
    """The least n >= 2 k with n H2(k / n) >= log2(k / epsilon), as Natale et al. 2024 but for a constant."""
    wanted, low, high = log2(k / epsilon), 2.0 * k, 2.0 * k
    while high * entropy(k / high) < wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if middle * entropy(k / middle) >= wanted else (middle, high)
    return high


def pigeonhole(epsilon: float) -> float:
    """log2(1 / (2 epsilon)): with fewer numbers 2^n intervals of 2 epsilon cannot cover [-1/2, 1/2]."""
    return log2(1 / (2 * epsilon))


def half_sums(n: int, size: int | None = None) -> int:
    """Bytes of the sums of both halves of n numbers, of at most `size` of them."""
    halves = n // 2, n - n // 2
    if size is None:
        return 8 * sum(1 << m for m in halves)
    return 8 * sum(comb(m, j) for m in halves for j in range(size + 1))
