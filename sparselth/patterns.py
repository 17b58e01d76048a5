"""Weights that are pruned in groups, so that what is left runs fast: 2:4, blocks, whole units.

    2:4         of every 4 weights that lie side by side in a row the best 2 stay, half of a layer, once
    block:16    blocks of 16 x 16 of the matrix [N, K]; of a convolution 16 filters by 16 channels at one tap
    unit        all that feeds a neuron or filter; the output layer stays whole

Groups are ranked by the mean of their weights' scores, within a layer or over all layers, and go at a level
the lowest first, equal ones by lowest index. Of n groups that are left exactly round(rate * n) go; but units
of several layers differ in size, and go until the next one would leave fewer than n - round(rate * n) of n
weights. 2:4 is decided within every 4, so that the scope changes nothing of it but what is excluded by
default. A layer that is no multiple of the groups stays whole, and says why.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparselth.params import Params, TensorSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sparselth.chance import Bits, Overlap

UNSTRUCTURED = "unstructured"
CHUNK = 1 << 20  # fours that are counted at once
EXPECTED = "expected unstructured, 2:4, unit, or blocks of 2 to 128, block:16"


class Pattern(ABC):
    """How the weights of a layer lie in groups."""

    @abstractmethod
    def misfit(self, spec: TensorSpec) -> str:
        """Why a layer stays whole; "" where it does not."""

    @abstractmethod
    def groups(self, spec: TensorSpec) -> Tensor:
        """The number of the group of each of its weights, [numel], from 0 on; all groups are of one size."""

    @abstractmethod
    def next(self, spec: TensorSpec, kept: int, rate: float) -> int:
        """Weights that a level leaves of `kept`."""

    @abstractmethod
    def pick(self, groups: Tensor, scores: Tensor, mask: Tensor, keep: int) -> Tensor:
        """The mask of a layer that keeps so many weights of those that `mask` keeps, all [numel]."""

    @abstractmethod
    def shuffle(self, groups: Tensor, mask: Tensor, generator: Generator) -> Tensor:
        """A random mask of a layer that keeps as much in the same pattern."""

    @abstractmethod
    def holds(self, spec: TensorSpec, mask: Tensor) -> bool:
        """Whether the mask [numel] of a layer that fits is in the pattern."""

    @abstractmethod
    def overlap(self, spec: TensorSpec, one: Bits, other: Bits) -> Overlap:
        """What two masks [numel] of a layer share, beside chance in the pattern."""

    def whole(self, params: Params, exclude: Sequence[str] = ()) -> dict[str, str]:
        """Layers that stay whole because they do not fit, by name, and why."""
        from sparselth.pruning import excluded

        out = excluded(params, exclude)
        return {s.name: why for s in params.weights if s.name not in out and (why := self.misfit(s))}

    def ladder(
        self, params: Params, levels: int, rate: float, scope: str, exclude: Sequence[str] = ()
    ) -> list[dict[str, int]]:
        """Surviving weights at levels 0 to `levels`, as `pruning.ladder` gives them.

        Of units under "global" a rung is the least that is left: it may be up to one unit more.
        """
        from sparselth.pruning import excluded

        still = {*excluded(params, exclude), *self.whole(params, exclude)}
        found = [{s.name: s.numel for s in params.weights}]
        for _ in range(levels):
            found.append(
                {
                    s.name: n if s.name in still else self.next(s, n, rate * s.rate_scale)
                    for s in params.weights
                    for n in [found[-1][s.name]]
                }
            )
        return found

    def prune(self, params: Params, scores: Tensor, mask: Tensor, keep: dict[str, int]) -> Tensor:
        """The mask [M], on the CPU, that keeps the groups of the highest `scores` [M], down to a rung."""
        import torch

        scores, new = scores.cpu().double(), mask.cpu().clone()
        for spec in params.weights:
            kept = int(new[spec.span].sum())
            if keep[spec.name] > kept:
                raise ValueError(f"{spec.name}: cannot keep {keep[spec.name]} of {kept} weights")
            if keep[spec.name] < kept:
                there = new[spec.span].clone()
                found = torch.where(there, scores[spec.span], 0)
                new[spec.span] = self.pick(self.groups(spec), found, there, keep[spec.name])
        return new

    def shuffled(self, params: Params, mask: Tensor, generator: Generator) -> Tensor:
        """`pruning.shuffle` in the pattern: as much of every layer is kept, in random groups.

        Weight by weight where a mask that was carried from another network is not in the pattern.
        """
        import torch

        new = mask.clone()
        for spec in params.weights:
            own = mask[spec.span]
            if bool(own.all()):
                continue
            if self.misfit(spec) or not self.holds(spec, own):
                new[spec.span] = own[torch.randperm(spec.numel, generator=generator, device="cpu")]
            else:
                new[spec.span] = self.shuffle(self.groups(spec), own, generator)
        return new


class Groups(Pattern):
    """Groups that go as one."""

    @abstractmethod
    def size(self, spec: TensorSpec) -> int:
        """Weights of a group."""

    def sizes(self, params: Params, exclude: Sequence[str] = ()) -> list[int]:
        """Weights of a group, of each layer that is pruned."""
        from sparselth.pruning import excluded

        still = {*excluded(params, exclude), *self.whole(params, exclude)}
        return [self.size(spec) for spec in params.weights if spec.name not in still]

    def next(self, spec: TensorSpec, kept: int, rate: float) -> int:
        from sparselth.pruning import rounded

        size = self.size(spec)
        return (kept // size - rounded(rate * (kept // size))) * size

    def ladder(
        self, params: Params, levels: int, rate: float, scope: str, exclude: Sequence[str] = ()
    ) -> list[dict[str, int]]:
        from sparselth.pruning import excluded, rounded

        if scope != "global":
            return super().ladder(params, levels, rate, scope, exclude)
        still = {*excluded(params, exclude), *self.whole(params, exclude)}
        whole = {s.name: s.numel for s in params.weights if s.name in still}
        sizes = {*self.sizes(params, exclude)}
        size = sizes.pop() if len(sizes) == 1 else 1  # groups of one size are counted, others by weight
        counts = [(params.prunable - sum(whole.values())) // size]
        for _ in range(levels):
            counts.append(counts[-1] - rounded(rate * counts[-1]))
        return [{"all": size * n} | whole for n in counts]

    def prune(self, params: Params, scores: Tensor, mask: Tensor, keep: dict[str, int]) -> Tensor:
        import torch

        if "all" not in keep:
            return super().prune(params, scores, mask, keep)
        scores, new = scores.cpu().double(), mask.cpu().clone()
        ranked = [spec for spec in params.weights if spec.name not in keep]
        means, alive, sizes = [], [], []
        for spec in ranked:
            sums, there = self.sums(self.groups(spec), scores[spec.span], new[spec.span])
            means.append(sums / self.size(spec))
            alive.append(there)
            sizes.append(torch.full_like(sums, self.size(spec), dtype=torch.int64))
        stays, size = torch.cat(alive), torch.cat(sizes)
        places = stays.nonzero()[:, 0]
        places = places[torch.cat(means)[places].sort(stable=True).indices]
        going = size[places].cumsum(0) <= int(size[stays].sum()) - keep["all"]
        if int(size[stays].sum()) < keep["all"]:
            raise ValueError(f"all: cannot keep {keep['all']} of {int(size[stays].sum())} weights")
        stays[places[going]] = False
        for spec, left in zip(ranked, torch.split(stays, [len(one) for one in alive]), strict=True):
            new[spec.span] &= left[self.groups(spec)]
        return new

    @staticmethod
    def sums(groups: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of each group the sum of its scores, float64, and whether it is left."""
        import torch

        count = int(groups.max()) + 1
        found = torch.zeros(count, dtype=torch.float64, device="cpu")
        found.index_add_(0, groups, torch.where(mask, scores, 0))
        alive = torch.zeros(count, dtype=torch.bool, device="cpu")
        alive[groups[mask]] = True
        return found, alive

    def pick(self, groups: Tensor, scores: Tensor, mask: Tensor, keep: int) -> Tensor:
        sums, alive = self.sums(groups, scores, mask)
        places = alive.nonzero()[:, 0]
        going = len(places) - keep * len(alive) // len(groups)
        alive[places[sums[places].sort(stable=True).indices[:going]]] = False
        return mask & alive[groups]

    def shuffle(self, groups: Tensor, mask: Tensor, generator: Generator) -> Tensor:
        import torch

        count = int(groups.max()) + 1
        alive = torch.zeros(count, dtype=torch.bool, device="cpu")
        alive[groups[mask]] = True
        alive = alive[torch.randperm(count, generator=generator, device="cpu")]
        return alive[groups]

    @abstractmethod
    def apart(self, spec: TensorSpec, mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """A view of the mask [numel] of a layer that fits, and over which of its axes a group reaches."""

    def holds(self, spec: TensorSpec, mask: Tensor) -> bool:
        import torch

        own, axes = self.apart(spec, mask)  # without a number for each of what may be 100 million weights
        return torch.equal(own.amin(axes), own.amax(axes))

    def overlap(self, spec: TensorSpec, one: Bits, other: Bits) -> Overlap:
        from sparselth.chance import Overlap

        return Overlap.of(one, other, self.size(spec))


class Units(Groups):
    """Rows of the matrix: all that feeds a neuron or filter."""

    def misfit(self, spec: TensorSpec) -> str:
        return "its units are the classes" if spec.output else ""

    def size(self, spec: TensorSpec) -> int:
        return spec.matrix[1]

    def groups(self, spec: TensorSpec) -> Tensor:
        import torch

        n, k = spec.matrix
        return torch.arange(n, device="cpu").repeat_interleave(k)

    def apart(self, spec: TensorSpec, mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return mask.view(spec.matrix), (1,)


@dataclass(frozen=True)
class Blocks(Groups):
    """Blocks of `side` x `side`, of a convolution at every tap."""

    side: int

    def misfit(self, spec: TensorSpec) -> str:
        n, c = spec.shape[:2]
        if n % self.side == 0 and c % self.side == 0:
            return ""
        return f"{n} x {c} is no multiple of {self.side}"

    def size(self, spec: TensorSpec) -> int:
        return self.side**2

    def groups(self, spec: TensorSpec) -> Tensor:
        import torch

        n, c = spec.shape[:2]
        taps, wide = spec.numel // (n * c), c // self.side
        row = torch.arange(n, device="cpu").div(self.side, rounding_mode="floor")[:, None, None]
        column = torch.arange(c, device="cpu").div(self.side, rounding_mode="floor")[None, :, None]
        tap = torch.arange(taps, device="cpu")
        return ((row * taps + tap) * wide + column).reshape(-1)

    def apart(self, spec: TensorSpec, mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        n, c = spec.shape[:2]
        return mask.view(n // self.side, self.side, c // self.side, self.side, -1), (1, 3)


class TwoFour(Pattern):
    """2 of every 4 in a row."""

    def misfit(self, spec: TensorSpec) -> str:
        return "" if spec.matrix[1] % 4 == 0 else f"rows of {spec.matrix[1]} are no multiple of 4"

    def groups(self, spec: TensorSpec) -> Tensor:
        import torch

        return torch.arange(spec.numel, device="cpu").div(4, rounding_mode="floor")

    def next(self, spec: TensorSpec, kept: int, rate: float) -> int:
        return spec.numel // 2

    def pick(self, groups: Tensor, scores: Tensor, mask: Tensor, keep: int) -> Tensor:
        import torch

        going = scores.view(-1, 4).sort(dim=1, stable=True).indices[:, :2]
        return (
            torch.ones(len(mask) // 4, 4, dtype=torch.bool, device="cpu").scatter_(1, going, False).view(-1)
        )

    def shuffle(self, groups: Tensor, mask: Tensor, generator: Generator) -> Tensor:
        import torch

        draw = torch.rand(len(mask), generator=generator, dtype=torch.float64, device="cpu")
        return self.pick(groups, draw, mask, len(mask) // 2)

    def holds(self, spec: TensorSpec, mask: Tensor) -> bool:
        import torch

        parts = torch.split(mask.view(-1, 4), CHUNK)  # it adds bits as int64
        return all(bool((part.sum(1) == 2).all()) for part in parts)

    def overlap(self, spec: TensorSpec, one: Bits, other: Bits) -> Overlap:
        from sparselth.chance import Fours

        return Fours.of(one, other)


def known(name: str) -> str | None:
    """What was expected where a name is no pattern's."""
    blocks = re.fullmatch(r"block:(\d{1,3})", name)
    right = name in (UNSTRUCTURED, "2:4", "unit") or (blocks and 2 <= int(blocks[1]) <= 128)
    return None if right else EXPECTED


def in_words(name: str) -> str:
    """What goes at once."""
    side = name.partition(":")[2]
    return {"unit": "whole units", "2:4": "fours"}.get(name, f"blocks of {side} x {side}")


def get_pattern(name: str) -> Pattern | None:
    """The pattern of that name; None of weights that go one by one."""
    if name == UNSTRUCTURED:
        return None
    if name in ("2:4", "unit"):
        return TwoFour() if name == "2:4" else Units()
    return Blocks(int(name.partition(":")[2]))


def pattern_of(spec: TensorSpec, masks: Sequence[Tensor]) -> str:
    """The name of the pattern of the largest groups that all masks [numel] of a layer are in.

    Unstructured where they are in none, and where one keeps everything or nothing, as in every pattern.
    """
    if len(spec.shape) < 2 or any(bool(mask.all()) or not bool(mask.any()) for mask in masks):
        return UNSTRUCTURED
    n, c = spec.shape[:2]
    sides = [side for side in range(2, 129) if n % side == c % side == 0]
    found, broken = {UNSTRUCTURED: 1}, list[int]()
    for name in ("2:4", "unit", *(f"block:{side}" for side in sides)):
        pattern = get_pattern(name)
        assert pattern is not None
        if isinstance(pattern, Blocks) and any(pattern.side % side == 0 for side in broken):
            continue  # it would be made of blocks of that side
        if not pattern.misfit(spec) and all(pattern.holds(spec, mask) for mask in masks):
            found[name] = pattern.size(spec) if isinstance(pattern, Groups) else 2
        elif isinstance(pattern, Blocks):
            broken.append(pattern.side)
    return max(found, key=lambda name: found[name])
