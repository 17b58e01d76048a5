"""What a ticket has in every layer, and what two tickets have in common beside what chance would give."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from sparselth import chance
from sparselth.errors import SparselthError
from sparselth.module_tickets import bits
from sparselth.params import TensorSpec
from sparselth.patterns import UNSTRUCTURED, get_pattern, pattern_of

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.tickets import Ticket


@dataclass(frozen=True)
class LayerFacts:
    """A pruned tensor [N, K]: its weights, and units and inputs without any."""

    name: str
    shape: tuple[int, ...]
    kept: int
    size: int
    dead_units: int  # of N
    dead_inputs: int  # of the second axis

    @property
    def density(self) -> float:
        return self.kept / self.size if self.size else 1.0


def layers(ticket: Ticket) -> list[LayerFacts]:
    """What its masks are, in their order."""
    found = []
    for name, mask in ticket.masks.items():
        many = mask.dim() > 1 and mask.numel() > 0
        dead_units = int((~mask.flatten(1).any(1)).sum()) if many else 0
        dead_inputs = int((~mask.transpose(0, 1).flatten(1).any(1)).sum()) if many else 0
        kept = int(mask.sum())
        found.append(LayerFacts(name, tuple(mask.shape), kept, mask.numel(), dead_units, dead_inputs))
    return found


@dataclass(frozen=True)
class Overlap:
    """Two masks, and values where both keep a weight; chance is that of random masks of the same counts."""

    name: str
    size: int
    kept: tuple[int, int]
    both: int
    differ: int  # weights kept in both whose values differ
    by_chance: float  # weights that random masks have in common, on average
    variance: float  # of these
    pattern: str = UNSTRUCTURED  # that both masks are in, and so the random ones

    @staticmethod
    def of(name: str, one: Tensor, other: Tensor, differ: int) -> Overlap:
        """Of the masks of one tensor; random ones are in whole groups where both of these are."""
        spec, masks = TensorSpec(name, tuple(one.shape), 0), (one.flatten(), other.flatten())
        named = pattern_of(spec, masks)
        a, b = (mask.numpy() for mask in masks)
        pattern = get_pattern(named)
        law = pattern.overlap(spec, a, b) if pattern else chance.Overlap.of(a, b)
        kept = law.a, law.b
        return Overlap(name, law.n, kept, law.shared, differ, law.expected, law.deviation**2, named)

    @property
    def times_chance(self) -> float:
        """The common weights as a multiple of chance; 1 where neither keeps anything."""
        return self.both / self.by_chance if self.by_chance else 1.0

    @property
    def sigmas(self) -> float:
        """How far from chance, in standard deviations; 0 where counts leave nothing to chance."""
        return (self.both - self.by_chance) / sqrt(self.variance) if self.variance else 0.0

    @property
    def jaccard(self) -> float:
        """Weights in both, as a share of those in either."""
        either = sum(self.kept) - self.both
        return self.both / either if either else 1.0


@dataclass(frozen=True)
class Differences:
    """Layers that both tickets have, and names of other tensors whose values differ."""

    layers: list[Overlap]
    others: list[str]

    @property
    def total(self) -> Overlap:
        """All layers together; chance is that of masks with the same counts in every layer."""
        rows = self.layers
        kept = sum(row.kept[0] for row in rows), sum(row.kept[1] for row in rows)
        size, both, differ = (sum(getattr(row, name) for row in rows) for name in ("size", "both", "differ"))
        by_chance, variance = (sum(getattr(row, name) for row in rows) for name in ("by_chance", "variance"))
        patterns = ", ".join(dict.fromkeys(row.pattern for row in rows))
        return Overlap("all", size, kept, both, differ, by_chance, variance, patterns)


def differences(a: Ticket, b: Ticket) -> Differences:
    """What two tickets of one network have in common; SparselthError where they are of two."""
    for name in [*a.masks, *b.masks]:
        shapes = [list(t.masks[name].shape) if name in t.masks else "no mask" for t in (a, b)]
        if shapes[0] != shapes[1]:
            raise SparselthError(
                f"{a.file} and {b.file}: {name} has {shapes[0]} there, {shapes[1]} here; expected one network"
            )
    first, second = a.snapshot, b.snapshot
    rows = []
    for name, mask in a.masks.items():
        other = b.masks[name]
        differ = int(_unlike(first[name], second[name])[mask & other].sum())
        rows.append(Overlap.of(name, mask, other, differ))
    rest = [name for name in first if name not in a.masks]
    others = [n for n in rest if n not in second or bool(_unlike(first[n], second[n]).any())]
    return Differences(rows, others)


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ; everywhere where their types or shapes do."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return torch.ones(a.shape, dtype=torch.bool, device="cpu")
    one, two = (torch.from_numpy(bits("", t).copy()) for t in (a, b))
    return (one != two) & ~((one != one) & (two != two))
