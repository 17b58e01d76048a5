"""Masks and weights of one network on another: which layer takes after which, and how far each reaches.

Layers are matched by their place. Where depths differ, layers in a row of one shape are a stage: a deeper
stage repeats the layers of the source in order, a shallower one leaves out its last (Chen et al. 2021,
arXiv:2103.16547). Where widths differ, unit i takes after unit i mod N of the source: a wider layer repeats
its units in order, a narrower one leaves out the last; what reads a layer repeats its columns likewise.
Pixels are not repeated, but channels of filters are. Kernels must be of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sparselth.errors import UsageError
from sparselth.params import Params, TensorSpec


@dataclass(frozen=True)
class Pair:
    """A weight tensor and the one it takes after."""

    source: TensorSpec
    target: TensorSpec
    rows: NDArray[np.int64]  # [N of the target]: the source's row of each
    columns: NDArray[np.int64]  # [K of the target]

    @property
    def same_shape(self) -> bool:
        return self.source.shape == self.target.shape

    def carry(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """The part of a vector [P] or [M] of the source, as the target's [N, K]."""
        whole = values[self.source.span].reshape(self.source.matrix)
        return whole[np.ix_(self.rows, self.columns)]


def align(source: Params, target: Params) -> list[Pair]:
    """Every weight tensor of the target with the one of the source that it takes after.

    UsageError, naming the layer, where the networks are too different.
    """
    pairs: list[Pair] = []
    for before, spec, previous in _in_depth(source.weights, target.weights):
        rows = np.arange(spec.shape[0]) % before.shape[0]
        pairs.append(Pair(before, spec, rows, _columns(before, spec, previous)))
    return pairs


def carry_mask(pairs: Sequence[Pair], target: Params, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask [M] of the source as one of the target."""
    found = np.zeros(target.mask_size, bool)
    for pair in pairs:
        found[pair.target.span] = pair.carry(mask).ravel()
    return found


def carry_weights(
    pairs: Sequence[Pair],
    source: Params,
    target: Params,
    weights: NDArray[np.float32],
    onto: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Weights [P] of the source as the target's, `onto` weights of its own.

    Biases, norms and their statistics come along where the networks have the same ones, and stay those of
    `onto` otherwise.
    """
    found = onto.copy()
    for pair in pairs:
        found[pair.target.span] = pair.carry(weights).ravel()
    shapes = [[(spec.name, spec.shape) for spec in params.unpruned] for params in (source, target)]
    if shapes[0] == shapes[1]:
        for ours, theirs in zip(target.unpruned, source.unpruned, strict=True):
            found[ours.span] = weights[theirs.span]
    return found


def differing(pairs: Sequence[Pair]) -> Pair | None:
    """The first pair whose shapes differ."""
    return next((pair for pair in pairs if not pair.same_shape), None)


Triple = tuple[TensorSpec, TensorSpec, tuple[TensorSpec, TensorSpec] | None]


def _in_depth(source: Sequence[TensorSpec], target: Sequence[TensorSpec]) -> list[Triple]:
    """(source's, target's, the pair before it) of every layer of the target."""
    if len(source) == len(target):
        matched = [*zip(source, target, strict=True)]
    else:
        stages = [
            [[*group] for _, group in groupby(each, lambda spec: spec.shape)] for each in (source, target)
        ]
        shapes = [[stage[0].shape for stage in each] for each in stages]
        if shapes[0] != shapes[1]:
            odd = next((i for i, pair in enumerate(zip(*shapes, strict=False)) if pair[0] != pair[1]), None)
            at = stages[1][odd][0].name if odd is not None else target[-1].name
            raise UsageError(
                f"{at}: the source has {len(source)} layers of weights, this network {len(target)}, and from "
                "there on their stages differ; expected the same stages, of more or fewer layers each"
            )
        matched = []
        for ours, theirs in zip(stages[1], stages[0], strict=True):
            matched += [(theirs[_repeated(j, len(theirs))], spec) for j, spec in enumerate(ours)]
    return [(*pair, matched[i - 1] if i else None) for i, pair in enumerate(matched)]


def _repeated(j: int, n: int) -> int:
    """Which of a stage's n layers the j-th takes after; two by two, as residual blocks hold them."""
    if j < n:
        return j
    period = max(1, n - n % 2)
    return n - period + (j - n) % period


def _columns(
    source: TensorSpec, target: TensorSpec, previous: tuple[TensorSpec, TensorSpec] | None
) -> NDArray[np.int64]:
    """The source's column of each of the target's."""
    (_, k), (_, k_here) = source.matrix, target.matrix
    if source.shape[2:] != target.shape[2:] or len(source.shape) != len(target.shape):
        raise UsageError(
            f"{target.name}: is {list(target.shape)} here, {list(source.shape)} in the source's "
            f"{source.name}; expected kernels of one size"
        )
    if k == k_here:
        return np.arange(k)
    if len(source.shape) > 2:
        field = k // source.shape[1]
        channels = np.arange(target.shape[1]) % source.shape[1]
        return (channels[:, None] * field + np.arange(field)).ravel()
    if previous is not None:
        before, before_here = previous[0].shape[0], previous[1].shape[0]
        if k % before == 0 and k_here % before_here == 0 and k // before == k_here // before_here:
            field = k // before
            units = np.arange(before_here) % before
            return (units[:, None] * field + np.arange(field)).ravel()
    raise UsageError(
        f"{target.name}: reads {k_here:,} inputs here, {k:,} in the source's {source.name}; expected as "
        "many, because inputs that are no units of the layer before cannot be repeated"
    )
