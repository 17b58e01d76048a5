"""Where the tensors of a replica lie in the buffer that training works on.

A dense layer lies there whole. A compressed one is a vector of its survivors: what was pruned takes no
memory and no time, not in the weights, the gradient or the optimizer's state. Survivors that cannot matter
are left out too: a unit whose output no survivor reads gets no gradient, so without weight decay its
weights stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselth.kernels import bitmask
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU
from sparselth.params import ALIGN, TensorSpec


def compressible(model: Model) -> bool:
    """Whether layers of a model can be compressed: a chain of what there are kernels for.

    Those are products of stride 1, the first of which reads the images, and pools of 2 x 2, each with or
    without a ReLU.
    """
    ops = [node.op for node in model.nodes]
    known = (
        isinstance(op, Linear | ReLU)
        or (isinstance(op, Conv) and op.stride == 1)
        or (isinstance(op, MaxPool) and op.size == 2 and op.tiles)
        for op in ops
    )
    return model.is_chain and all(known) and isinstance(ops[0], Linear | Conv)


class Layout:
    """One replica's buffer [1, size] in which the layers `compressed` are vectors of what is trained.

    `mask` is bool [M]. With `decays`, weight decay moves every survivor, so none is left out.
    """

    def __init__(self, model: Model, mask: Tensor, compressed: frozenset[str], decays: bool = False) -> None:
        self.model, self.compressed = model, compressed
        units = live_units(model, mask, frozenset() if decays else compressed)
        self.inputs = units["input"]  # bool [C * H * W]
        self.spans: dict[str, tuple[int, int]] = {}  # offset and length, by tensor
        self._trained: dict[str, Tensor] = {}  # bits [N, ceil(K / 8)]
        self._left_out: dict[str, tuple[Tensor, Tensor]] = {}  # bits, and the weights
        offset = 0
        for spec in model.weights:
            n = spec.numel
            if spec.name in compressed:
                survivors = _matrix(spec, mask)
                trained = survivors & units[spec.name][:, None]
                self._trained[spec.name] = bitmask.pack(trained)
                self._left_out[spec.name] = (
                    bitmask.pack(survivors & ~trained),
                    torch.empty(0, dtype=torch.float32, device="cpu"),
                )
                n = int(trained.sum())
            self.spans[spec.name] = offset, n
            offset += _aligned(n)
        self.mask_size = offset
        for spec in model.biases:
            self.spans[spec.name] = offset, spec.numel
            offset += _aligned(spec.numel)
        self.size = offset

    def trained(self, spec: TensorSpec) -> Tensor:
        """What is trained of a compressed layer, bool [N, K]."""
        found: Tensor = bitmask.unpack(self._trained[spec.name], spec.matrix[1])
        return found

    def view(self, buffer: Tensor, spec: TensorSpec) -> Tensor:
        """A tensor's part of a buffer [1, size], as a vector."""
        offset, n = self.spans[spec.name]
        return buffer[0, offset : offset + n]

    def mask(self, mask: Tensor) -> Tensor:
        """The mask [M] in this layout, bool [1, mask_size]: compressed layers keep all they hold."""
        found = torch.ones(1, self.mask_size, dtype=torch.bool, device="cpu")
        for spec in self.model.weights:
            if spec.name not in self.compressed:
                self.view(found, spec).copy_(_matrix(spec, mask).flatten())
        return found

    def compress(self, flat: Tensor) -> Tensor:
        """A buffer [1, P] of the model in this layout, [1, size]."""
        found = flat.new_zeros(1, self.size)
        for spec in self.model.weights + self.model.biases:
            whole = _matrix(spec, flat[0]).flatten()
            if spec.name in self.compressed:
                whole = whole[self.trained(spec).flatten()]
            self.view(found, spec).copy_(whole)
        return found

    def expand(self, compact: Tensor, weights: bool = True) -> Tensor:
        """Inverse of `compress`, [1, P], with what was pruned at 0; `weights` puts what was left out back."""
        found = compact.new_zeros(1, self.model.params.size)
        for spec in self.model.weights + self.model.biases:
            whole, values = _matrix(spec, found[0]).flatten(), self.view(compact, spec)
            if spec.name not in self.compressed:
                whole.copy_(values)
                continue
            whole[self.trained(spec).flatten()] = values
            if weights:
                bits, kept = self._left_out[spec.name]
                whole[bitmask.unpack(bits, spec.matrix[1]).flatten()] = kept
        return found

    def leave_out(self, flat: Tensor) -> None:
        """Remember, of weights [1, P], those that are neither trained nor pruned."""
        for spec in self.model.weights:
            if spec.name in self.compressed:
                bits, _ = self._left_out[spec.name]
                where = bitmask.unpack(bits, spec.matrix[1]).flatten()
                self._left_out[spec.name] = bits, _matrix(spec, flat[0]).flatten()[where]

    def bytes(self) -> int:
        """Memory of what this object holds beside the buffers."""
        bits = [*self._trained.values(), *(t for pair in self._left_out.values() for t in pair)]
        return sum(t.numel() * t.element_size() for t in bits)


def live_units(model: Model, mask: Tensor, layers: frozenset[str]) -> dict[str, Tensor]:
    """The units whose output a survivor reads: bool [N] of every weight tensor, and [C * H * W] of "input".

    Only `layers` let go of a unit that nobody reads; the others compute it and read what it reads.
    """
    found = {}
    live = torch.ones(model.weights[-1].shape[0], dtype=torch.bool, device="cpu")
    producers = [spec.shape[0] for spec in model.weights[:-1]]  # a filter's plane is one unit
    for spec, units in zip(reversed(model.weights), [*reversed(producers), 0], strict=True):
        if spec.name not in layers:
            live = torch.ones_like(live)
        found[spec.name] = live
        read = (_matrix(spec, mask) & live[:, None]).any(0)
        live = read.view(units, -1).any(1) if units else read
    channels, height, width = model.input
    if len(model.weights[0].shape) == 4:  # what a convolution reads is [C, k, k]
        live = live.view(channels, -1).any(1).repeat_interleave(height * width)
    found["input"] = live
    return found


def _matrix(spec: TensorSpec, flat: Tensor) -> Tensor:
    """A tensor's part of a vector [P] or [M] as [N, K]."""
    return flat[spec.span].view(spec.matrix)


def _aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN
