"""One replica through torch's own layers, images channels-last: the fastest dense step of large
convolutions on a CPU, where oneDNN beats the products of `sparselth.nn` by a sixth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.models import Conv, Linear, MaxPool, Model, ReLU

_aten = torch.ops.aten


class VendorNetwork:
    """`sparselth.nn.Network` for R = 1 and any batch: the same buffers, shapes and gradients."""

    def __init__(self, model: Model, flat: Tensor, grad: Tensor | None = None, first: bool = True) -> None:
        """Not `first`: the gradient of the input is computed too, for timing a layer alone."""
        self.model, self.first = model, first
        places = [i for i, layer in enumerate(model.layers) if isinstance(layer, Conv | Linear)]
        self.producers = dict(zip(places, model.weights, strict=True))
        self.flat, self.grad = flat[0], None if grad is None else grad[0]
        self.kept: list[tuple[Tensor, ...]] = []  # of every layer, what backward needs

    def forward(self, x: Tensor) -> Tensor:
        """Logits [1, classes, B] of x [1, C * H * W, B]."""
        h = x[0].T.reshape(-1, *self.model.input).contiguous(memory_format=torch.channels_last)
        self.kept = []
        for i, layer in enumerate(self.model.layers):
            kept: tuple[Tensor, ...] = (h,)
            match layer:
                case Conv():
                    h = F.conv2d(h, *self._parameters(self.flat, i), padding=layer.padding)
                case Linear():
                    kept = (h.flatten(1),)
                    h = F.linear(kept[0], *self._parameters(self.flat, i))
                case MaxPool(size):
                    h, places = _aten.max_pool2d_with_indices(h, [size, size])
                    kept = kept[0], places
                case ReLU():
                    h = h.relu_()
                    kept = (h,)
            self.kept.append(kept)
        return h.permute(*range(1, h.dim()), 0)[None]

    def backward(self, dy: Tensor) -> None:
        """Write every entry of the gradient's tensors from the gradient of the logits [1, classes, B]."""
        assert self.grad is not None
        d = dy[0].movedim(-1, 0)
        for i in reversed(range(len(self.model.layers))):
            layer, (h, *places) = self.model.layers[i], self.kept[i]
            match layer:
                case Conv():
                    d = self._conv_backward(i, layer, d, h)
                case Linear():
                    slope, bias = self._parameters(self.grad, i)
                    torch.mm(d.T, h, out=slope)
                    torch.sum(d, 0, out=bias)
                    d = d @ self._parameters(self.flat, i)[0]
                case MaxPool(size):
                    d = d.reshape(places[0].shape).contiguous(memory_format=torch.channels_last)
                    d = _aten.max_pool2d_with_indices_backward(
                        d, h, [size, size], [size, size], [0, 0], [1, 1], False, places[0]
                    )
                case ReLU():
                    d = _aten.threshold_backward(d.reshape(h.shape), h, 0)

    def _conv_backward(self, i: int, layer: Conv, d: Tensor, h: Tensor) -> Tensor:
        assert self.grad is not None
        weight, bias = self._parameters(self.flat, i)
        pad, wanted = [layer.padding] * 2, [i > 0 or not self.first, True, True]
        d = d.reshape(len(h), layer.out, *self.model.shapes[i + 1][1:])
        d = d.contiguous(memory_format=torch.channels_last)
        dx, dw, db = _aten.convolution_backward(
            d, h, weight, bias.shape, [1, 1], pad, [1, 1], False, [0, 0], 1, wanted
        )
        for slope, found in zip(self._parameters(self.grad, i), (dw, db), strict=True):
            slope.copy_(found)
        return dx  # type: ignore[no-any-return]

    def _parameters(self, flat: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of layer i, as torch has them."""
        weight = self.producers[i]
        bias = self.model.biases[self.model.weights.index(weight)]
        w, b = (flat[s.offset : s.offset + s.numel].view(s.shape) for s in (weight, bias))
        return w, b
