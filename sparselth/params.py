"""Which tensor of a network lies where in its flat buffer, and which of them pruning ranks.

All parameters of a network lie in one buffer [P]: first the prunable weights, then what is trained but never
pruned, last what no optimizer sees. A mask is a bool vector [M] over the front. Imports neither torch nor
numpy before it is given a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ALIGN = 16  # floats; every tensor starts on a 64-byte boundary of the flat buffer


@dataclass(frozen=True)
class TensorSpec:
    """One parameter tensor and its place in the flat buffer.

    A weight is a matrix [N, K]: N outputs, K = all that feeds one of them (C * k * k for a filter).
    `shape` is the shape a user knows it by, [C_out, C_in, k, k] for a convolution.
    """

    name: str
    shape: tuple[int, ...]
    offset: int  # in floats, within one replica's flat buffer
    fan_in: int = 0
    fan_out: int = 0
    output: bool = False  # the last layer, pruned at half the rate
    rate_scale: float = 1.0  # share of the pruning rate that a level takes of this tensor

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of a weight."""
        return self.shape[0], self.numel // self.shape[0]

    @property
    def span(self) -> slice:
        """Where it lies in a buffer [P] or, a weight, in a mask [M]."""
        return slice(self.offset, self.offset + self.numel)

    @property
    def end(self) -> int:
        """Where what is behind it may start."""
        return self.offset + aligned(self.numel)


@dataclass(frozen=True)
class Params:
    """The tensors of one network, in the order of its buffer; each part may be empty but the first."""

    weights: tuple[TensorSpec, ...]  # prunable
    trained: tuple[TensorSpec, ...] = ()  # and never pruned: biases, batch norms
    statistics: tuple[TensorSpec, ...] = ()  # that no optimizer sees

    @property
    def unpruned(self) -> tuple[TensorSpec, ...]:
        """All that is behind the weights."""
        return self.trained + self.statistics

    @property
    def all(self) -> tuple[TensorSpec, ...]:
        return self.weights + self.unpruned

    @cached_property
    def mask_size(self) -> int:
        """M: floats of the buffer that weights take, alignment included."""
        return self.weights[-1].end

    @cached_property
    def trained_size(self) -> int:
        """Floats of the buffer that the optimizer sees."""
        return (self.weights + self.trained)[-1].end

    @cached_property
    def size(self) -> int:
        """P: floats of the whole buffer, alignment included."""
        return self.all[-1].end

    @cached_property
    def prunable(self) -> int:
        """Number of weights that pruning ranks."""
        return sum(spec.numel for spec in self.weights)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a flat buffer [R, P]: weights as matrices [R, N, K], all others as [R, N, 1]."""
        shapes = [(s, s.matrix) for s in self.weights] + [(s, (s.numel, 1)) for s in self.unpruned]
        return {s.name: flat[:, s.span].view(-1, *shape) for s, shape in shapes}

    def full_mask(self) -> Tensor:
        """The mask of the dense network, bool [M]; the alignment gaps between tensors are False."""
        import torch

        mask = torch.zeros(self.mask_size, dtype=torch.bool, device="cpu")
        for spec in self.weights:
            mask[spec.span] = True
        return mask

    def packed(self, masks: Tensor) -> dict[str, Tensor]:
        """The bits of masks [R, M] by weight tensor, uint8 [R, N, ceil(K / 8)]."""
        from sparselth.kernels import bitmask

        return {s.name: bitmask.pack(masks[:, s.span].view(-1, *s.matrix)) for s in self.weights}

    def kept(self, mask: Tensor) -> dict[str, int]:
        """Surviving weights of every weight tensor, from a mask [M]."""
        return {s.name: int(mask[s.span].sum()) for s in self.weights}


def matrix(spec: TensorSpec, flat: Tensor) -> Tensor:
    """A weight's part of a vector [P] or [M] as [N, K]."""
    return flat[spec.span].view(spec.matrix)


def aligned(n: int) -> int:
    """Floats that n of them take in a buffer."""
    return -(-n // ALIGN) * ALIGN
