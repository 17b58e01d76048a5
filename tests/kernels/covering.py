"""Which combinations of a test's parameters Triton's interpreter runs; a device runs all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def covering(cases: Sequence[Mapping[str, str]]) -> list[int]:
    """Which of the cases to run so that every value of every parameter is met, in company that changes.

    Greedy: the case with the most values not met yet, among those the one with the most new pairs.
    """
    values = [set(case.items()) for case in cases]
    pairs = [set(combinations(sorted(case), 2)) for case in values]
    left, met, kept = set[Any]().union(*values), set[Any](), list[int]()
    while left:
        best = max(range(len(cases)), key=lambda i: (len(values[i] & left), len(pairs[i] - met), -i))
        left.difference_update(values[best])
        met.update(pairs[best])
        kept.append(best)
    return sorted(kept)
