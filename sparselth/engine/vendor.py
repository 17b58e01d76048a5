"""One replica through torch's own layers, images channels-last: the fastest dense step of large
convolutions on a CPU, where oneDNN beats the products of `dense` by a sixth."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.engine.layers import EPS, MOMENTUM
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, ReLU

_aten = torch.ops.aten


class VendorNetwork:
    """`dense.Network` for R = 1 and any batch: the same buffers, shapes, gradients and statistics."""

    def __init__(self, model: Model, flat: Tensor, grad: Tensor | None = None, first: bool = True) -> None:
        """Not `first`: the gradient of the input is computed too, for timing a layer alone."""
        model.check_engines()
        self.model, self.first = model, first
        self.flat, self.grad = flat[0], None if grad is None else grad[0]
        self.kept: list[tuple[Tensor, ...]] = []  # of every layer, what backward needs

    def forward(self, x: Tensor) -> Tensor:
        """Logits [1, classes, B] of x [1, C * H * W, B]."""
        h = x[0].T.reshape(-1, *self.model.input).contiguous(memory_format=torch.channels_last)
        self.kept, values = [], [h]
        for i, node in enumerate(self.model.nodes):
            h, *others = (values[j + 1] for j in node.inputs)
            kept: tuple[Tensor, ...] = (h,)
            match node.op:
                case Conv(_, _, padding, stride):
                    weight, bias = self._parameters(self.flat, i)
                    h = F.conv2d(h, weight, bias, stride, padding)
                case Linear():
                    kept = (h.flatten(1),)
                    h = F.linear(kept[0], *self._parameters(self.flat, i))
                case BatchNorm():
                    h, *moments = self._normalize(i, h)
                    kept = kept[0], *moments
                case AvgPool():
                    h = h.mean((2, 3), keepdim=True)
                case MaxPool(size):
                    h, places = _aten.max_pool2d_with_indices(h, [size, size])
                    kept = kept[0], places
                case ReLU():
                    h = h.relu_() if self.model.may_overwrite(i) else h.relu()
                    kept = (h,)
                case Add():
                    kept = ()
                    for other in others:
                        h = h + other
            values.append(h)
            self.kept.append(kept)
        return h.permute(*range(1, h.dim()), 0)[None]

    def backward(self, dy: Tensor) -> None:
        """Write every entry of the gradient's tensors from the gradient of the logits [1, classes, B]."""
        assert self.grad is not None
        nodes, shapes = self.model.nodes, self.model.shapes
        slopes = {len(nodes) - 1: dy[0].movedim(-1, 0)}
        for i in reversed(range(len(nodes))):
            d, node = slopes.pop(i), nodes[i]
            h, *places = self.kept[i] or (d,)
            match node.op:
                case Conv():
                    d = self._conv_backward(i, node.op, d, h)
                case Linear():
                    slope, bias = self._parameters(self.grad, i)
                    torch.mm(d.T, h, out=slope)
                    torch.sum(d, 0, out=bias)
                    d = d @ self._parameters(self.flat, i)[0]
                case BatchNorm():
                    scale, *_ = self._parameters(self.flat, i)
                    d = _aten.native_batch_norm_backward(
                        *(self._like(d, h), h, scale, None, None, *places, True, EPS, [True] * 3)
                    )
                    d, *found = d
                    for slope, new in zip(self._parameters(self.grad, i)[:2], found, strict=True):
                        slope.copy_(new)
                case AvgPool():
                    d = (d.reshape(*h.shape[:2], 1, 1) / prod(h.shape[2:])).expand(h.shape)
                case MaxPool(size):
                    d = self._like(d, places[0])
                    d = _aten.max_pool2d_with_indices_backward(
                        d, h, [size, size], [size, size], [0, 0], [1, 1], False, places[0]
                    )
                case ReLU():
                    d = _aten.threshold_backward(d.reshape(h.shape), h, 0)
                case Add():
                    pass
            for j in node.inputs:
                if j in slopes:
                    slopes[j] = slopes[j].reshape(-1, *shapes[j + 1]) + d.reshape(-1, *shapes[j + 1])
                elif j >= 0:
                    slopes[j] = d

    def _conv_backward(self, i: int, layer: Conv, d: Tensor, h: Tensor) -> Tensor:
        assert self.grad is not None
        weight, bias = self._parameters(self.flat, i)
        pad, stride = [layer.padding] * 2, [layer.stride] * 2
        wanted = [self.model.nodes[i].inputs[0] >= 0 or not self.first, True, True]
        d = d.reshape(len(h), layer.out, *self.model.shapes[i + 1][1:])
        d = d.contiguous(memory_format=torch.channels_last)
        dx, dw, db = _aten.convolution_backward(
            d, h, weight, bias.shape, stride, pad, [1, 1], False, [0, 0], 1, wanted
        )
        for slope, found in zip(self._parameters(self.grad, i), (dw, db), strict=True):
            slope.copy_(found)
        return dx  # type: ignore[no-any-return]

    def _normalize(self, i: int, h: Tensor) -> tuple[Tensor, ...]:
        """Output of batch norm i, and the moments that its backward takes."""
        training = self.grad is not None
        scale, shift, mean, var = self._parameters(self.flat, i)
        if h.numel() == h.shape[1]:  # one value has no variance
            var = var.clone()
        found: tuple[Tensor, ...] = _aten.native_batch_norm(
            h, scale, shift, mean, var, training, MOMENTUM, EPS
        )
        return found

    def _like(self, d: Tensor, h: Tensor) -> Tensor:
        """A gradient in the shape and the order of memory of `h`."""
        if h.dim() == 2:
            return d.reshape(h.shape)
        return d.reshape(h.shape).contiguous(memory_format=torch.channels_last)

    def _parameters(self, flat: Tensor, i: int) -> list[Tensor]:
        """The tensors of layer i, as torch has them."""
        return [flat[s.span].view(s.shape) for s in self.model.parts[i]]
