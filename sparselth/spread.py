"""How layers share in the weights that are kept: evenly, or small layers keep larger shares."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, sqrt

SPREADS = ("even", "root")


def rooted(sizes: Sequence[int], total: int) -> list[int]:
    """Counts as the square roots of sizes go, `total` together, each at least 1 and at most its size."""
    full = set[int]()
    while len(full) < len(sizes):  # those that are full leave more to the others
        rest = [i for i in range(len(sizes)) if i not in full]
        unit = (total - sum(sizes[i] for i in full)) / sum(sqrt(sizes[i]) for i in rest)
        more = {i for i in rest if unit >= sqrt(sizes[i])}
        if not more:
            break
        full |= more
    found = [size if i in full else max(1, floor(unit * sqrt(size) + 0.5)) for i, size in enumerate(sizes)]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    found[largest] = min(max(1, found[largest] + total - sum(found)), sizes[largest])
    return found
