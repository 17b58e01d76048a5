"""The layers of `dense.Network`, each with its hand-written gradient, in plain torch.

Activations are features-major, the batch last: [R, C, H, W, B] or [R, K, B]. What a layer returns is its own,
and stays until its next call; so does the gradient that it gives, but for those of sums and of ReLUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from sparselth.kernels import masked_conv2d, masked_linear, replica_parts  # noqa: F401  ops register
from sparselth.models import Conv

EPS, MOMENTUM = 1e-5, 0.1  # of batch norms, as torch has them

Update = Callable[[Tensor, Tensor], None]  # takes dy [R, N, B] and x [R, K, B] of a layer

_aten = torch.ops.aten
_ops = torch.ops.sparselth
_relu_backward = torch.ops.aten.threshold_backward.grad_input  # the overload itself: 6 us less a call


class Bound(Protocol):
    """A layer on its tensors; `backward` takes the gradient of what `forward` returned last.

    A layer that reads several activations gives them all the same gradient.
    """

    @property
    def forward(self) -> Callable[..., Tensor]: ...
    def backward(self, dy: Tensor) -> Tensor: ...


def activation(like: Tensor, replicas: int, shape: tuple[int, ...], batch: int) -> Tensor:
    """Zeros [R, *shape, B]. A vector's are stored batch-major behind a transposed view: the products of
    a fully connected layer run a fifth faster with 300 columns in a row than with 60."""
    if len(shape) == 1:
        return like.new_zeros(replicas, batch, *shape).mT
    return like.new_zeros(replicas, *shape, batch)


def channels_last(like: Tensor, replicas: int, shape: tuple[int, ...], batch: int) -> Tensor:
    """Zeros [R, C, H, W, B], in memory [R, B, H, W, C], or [R, N, B] as `activation`."""
    return like.new_zeros(replicas, batch, *shape[1:], shape[0]).movedim(-1, 1).movedim(2, -1)


def in_rows(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """x [R, ..., B] as [R, K, B] with K in a row, copied where it is not."""
    r, k, b = shape
    return x.movedim(-1, 1).reshape(r, b, k).mT


@dataclass(frozen=True)
class Place:
    """The tensors of one layer with weights; gradients only where they are written."""

    weight: Tensor  # [R, N, K]
    bias: Tensor  # [R, N, 1]
    dweight: Tensor | None
    dbias: Tensor | None
    out: Tensor  # [R, N, B] or [R, N, H, W, B]
    before: tuple[int, ...]  # shape of the input, without R and B
    wants_dx: bool
    update: Update | None = None


class DenseLinear:
    """y = W x + b; dW = dy x^T, db = sum dy, dx = W^T dy. Where somebody else adds the bias, y = W x."""

    def __init__(self, place: Place, adds_bias: bool = True, batch_major: bool = False) -> None:
        """`batch_major`: the input is taken, and its gradient given, with an image in a row."""
        self.place, self.y, self.adds_bias, self.batch_major = place, place.out, adds_bias, batch_major
        self.weight, self.bias = place.weight, place.bias
        self.shape = (self.y.shape[0], prod(place.before), self.y.shape[-1])
        if place.wants_dx:
            before = (self.shape[1],) if batch_major else place.before
            self.dx = activation(self.y, self.shape[0], before, self.shape[2]).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        self.x = in_rows(x, self.shape) if self.batch_major else x.reshape(self.shape)
        if not self.adds_bias:
            return torch.bmm(self.weight, self.x, out=self.y)
        return torch.baddbmm(self.bias, self.weight, self.x, out=self.y)

    def backward(self, dy: Tensor) -> Tensor:
        place = self.place
        dx = torch.bmm(self.weight.mT, dy, out=self.dx) if place.wants_dx else dy
        if place.update is not None:  # changes the weights, so it comes last
            place.update(dy, self.x)
        else:
            torch.bmm(dy, self.x.mT, out=place.dweight)
            torch.sum(dy, 2, keepdim=True, out=place.dbias)
        return dx


class DenseConv:
    """Convolution as k products, one for each row of the kernel.

    x is copied k times, shifted along W only: [C * k, H * W' * B]. The rows that row i of the kernel
    meets are a slice of that matrix, so the copies take a k-th of what im2col takes and stay in the cache.
    With a stride there is such a matrix for every phase: the rows p, p + stride, p + 2 stride, ... of x.
    """

    def __init__(self, layer: Conv, place: Place) -> None:
        self.bias, self.dbias, self.y, self.wants_dx = place.bias, place.dbias, place.out, place.wants_dx
        self.pad, k, self.stride = layer.padding, layer.kernel, layer.stride
        out = place.out
        r, n, _, columns, b = out.shape
        c, h, w = place.before
        high = h + 2 * self.pad
        self.padded = out.new_zeros(r, c, high, w + 2 * self.pad, b)
        self.inside = self.padded[:, :, self.pad : self.pad + h, self.pad : self.pad + w]
        phases = min(self.stride, k)
        self.shapes = [(r, c, k, -(-(high - p) // self.stride), columns, b) for p in range(phases)]
        self.shifted = [out.new_empty(shape) for shape in self.shapes]
        self.slices = self._slices(self.shifted)
        # the kernel's rows as matrices, and their gradients transposed, which is the faster product
        self.weight = place.weight.view(r, n, c, k, k).permute(3, 0, 1, 2, 4)
        self.kernel = out.new_empty(k, r, n, c * k)
        if place.dweight is not None:
            self.dweight = place.dweight.view(r, n, c, k, k).permute(3, 0, 2, 4, 1)
            self.dkernel = out.new_empty(k, r, c * k, n)
        if place.wants_dx:
            self.dpadded = torch.empty_like(self.padded)
            self.dx = self.dpadded[:, :, self.pad : self.pad + h, self.pad : self.pad + w]
            self.dshifted = [torch.empty_like(shifted) for shifted in self.shifted]
            self.dslices = self._slices(self.dshifted)

    def _slices(self, shifted: list[Tensor]) -> list[Tensor]:
        """What each row of the kernel meets, [R, C * k, H' * W' * B]."""
        r, c, k, _, columns, b = self.shapes[0]
        row, matrices = columns * b, [phase.view(r, c * k, -1) for phase in shifted]
        starts = [(matrices[i % self.stride], i // self.stride * row) for i in range(k)]
        return [matrix[:, :, start : start + self.y.shape[2] * row] for matrix, start in starts]

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            self.inside.copy_(x)
            x = self.padded
        (r, c, h, w, b), s = x.stride(), self.stride
        for p, (shifted, shape) in enumerate(zip(self.shifted, self.shapes, strict=True)):
            shifted.copy_(x.as_strided(shape, (r, c, w, h * s, w * s, b), x.storage_offset() + p * h))
        self.kernel.view(self.weight.shape).copy_(self.weight)
        y = self.y.flatten(2)
        torch.baddbmm(self.bias, self.kernel[0], self.slices[0], out=y)
        for kernel, rows in zip(self.kernel[1:], self.slices[1:], strict=True):
            y.baddbmm_(kernel, rows)
        return self.y

    def backward(self, dy: Tensor) -> Tensor:
        dy = dy.view(self.y.shape).flatten(2)
        if self.dbias is not None:
            torch.sum(dy, 2, keepdim=True, out=self.dbias)
        for dkernel, rows in zip(self.dkernel, self.slices, strict=True):
            torch.bmm(rows, dy.mT, out=dkernel)
        self.dweight.copy_(self.dkernel.view(self.dweight.shape))
        if not self.wants_dx:
            return dy
        for dshifted in self.dshifted:
            dshifted.zero_()
        for kernel, drows in zip(self.kernel, self.dslices, strict=True):
            drows.baddbmm_(kernel.mT, dy)
        self.dpadded.zero_()
        s, (_, _, k, _, columns, _) = self.stride, self.shapes[0]
        for p, dshifted in enumerate(self.dshifted):
            for j in range(k):
                self.dpadded[:, :, p::s, j : j + (columns - 1) * s + 1 : s].add_(dshifted[:, :, j])
        return self.dx


class MaskedLinear:
    """`DenseLinear` through the masked kernels, which take the batch first."""

    def __init__(self, place: Place, bits: Tensor, kernels: str) -> None:
        self.place, self.bits, self.kernels = place, bits, kernels
        self.shape = (place.out.shape[0], prod(place.before), place.out.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        self.x = in_rows(x, self.shape)
        place, kernels = self.place, self.kernels
        y = _ops.masked_linear(self.x.mT, place.weight, self.bits, place.bias[:, :, 0], None, kernels)
        return y.mT  # type: ignore[no-any-return]

    def backward(self, dy: Tensor) -> Tensor:
        place, dx = self.place, dy
        if place.wants_dx:
            dx = _ops.masked_linear_dx(dy.mT, place.weight, self.bits, self.kernels).mT
        if place.update is not None:
            place.update(dy, self.x)
            return dx
        assert place.dweight is not None
        place.dweight.copy_(_ops.masked_linear_dw(dy.mT, self.x.mT, self.bits, self.kernels))
        torch.sum(dy, 2, keepdim=True, out=place.dbias)
        return dx


class MaskedConv:
    """`DenseConv` through the masked kernels, which take [R, B, C, H, W] in any order of memory."""

    def __init__(self, layer: Conv, place: Place, bits: Tensor, kernels: str, adds_bias: bool = True) -> None:
        shape = (*place.weight.shape[:2], place.before[0], layer.kernel, layer.kernel)
        self.weight, self.bias = place.weight.view(shape), place.bias[:, :, 0] if adds_bias else None
        self.dweight, self.dbias = None if place.dweight is None else place.dweight.view(shape), place.dbias
        self.bits, self.wants_dx, self.size = bits, place.wants_dx, place.before[1:]
        self.y_shape = place.out.shape
        kernel = [layer.kernel] * 2
        self.rest = masked_conv2d.geometry(kernel, layer.stride, layer.padding, 1), kernels

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.permute(0, 4, 1, 2, 3)
        y = masked_conv2d.forward(self.x, self.weight, self.bits, self.bias, *self.rest)
        return y.permute(0, 2, 3, 4, 1)

    def backward(self, dy: Tensor) -> Tensor:
        assert self.dweight is not None
        assert self.dbias is not None
        dy = dy.view(self.y_shape)
        if self.rest[1] == "triton":  # one by one, or the order of a sum on CUDA would change with R
            torch.stack([d.sum((1, 2, 3)) for d in dy], out=self.dbias.squeeze(2))
        else:
            torch.sum(dy, (2, 3, 4), out=self.dbias.squeeze(2))
        dy = dy.permute(0, 4, 1, 2, 3)
        self.dweight.copy_(masked_conv2d.wgrad(dy, self.x, self.bits, *self.rest))
        if not self.wants_dx:
            return dy
        dx = masked_conv2d.dgrad(dy, self.weight, self.bits, (self.size[0], self.size[1]), *self.rest)
        return dx.permute(0, 2, 3, 4, 1)


class DensePool:
    """Maximum over size x size pixels; the gradient goes to the first maximum in row order."""

    def __init__(self, size: int, out: Tensor, dx: Tensor, cuts: bool = False) -> None:
        """`dx` is 0, and has no numbers where nothing is trained. Where it `cuts` the gradient is that of the
        ReLU before it, too."""
        self.y, self.size, self.cuts, self.dx = out, size, cuts, dx  # a rest behind the last window stays 0
        self.rest = torch.empty_like(out) if dx.numel() else out
        self.hit = torch.empty_like(self.rest)

    def _windows(self, x: Tensor) -> list[Tensor]:
        s, (rows, columns) = self.size, self.y.shape[2:4]
        return [x[:, :, i : rows * s : s, j : columns * s : s] for i in range(s) for j in range(s)]

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        first, *others = self._windows(x)
        torch.maximum(first, others[0], out=self.y)
        for other in others[1:]:
            torch.maximum(self.y, other, out=self.y)
        return self.y

    def backward(self, dy: Tensor) -> Tensor:
        # Float masks: bool ones cost three times as much here. Behind a ReLU y may have been cut to 0
        # in place; dy is 0 there, so it does not matter where it goes.
        rest = self.rest.copy_(dy.view(self.y.shape))
        *windows, (_, dlast) = zip(self._windows(self.x), self._windows(self.dx), strict=True)
        for x, dx in windows:
            torch.eq(x, self.y, out=self.hit)
            torch.mul(rest, self.hit, out=dx)
            rest.sub_(dx)
        dlast.copy_(rest)
        if self.cuts:
            return _relu_backward(self.dx, self.x, 0, grad_input=self.dx)  # type: ignore[no-any-return]
        return self.dx


class PartsPool(DensePool):
    """The same in one launch each, where x lies channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        if not replica_parts.is_channels_last(x):
            return super().forward(x)
        self.x = x
        replica_parts.max_pool(x, self.y, self.size, kernels="triton")
        return self.y

    def backward(self, dy: Tensor) -> Tensor:
        if not replica_parts.is_channels_last(self.x):
            return super().backward(dy)
        dy = dy.view(self.y.shape)
        replica_parts.max_pool_backward(dy, self.x, self.y, self.dx, self.size, self.cuts, kernels="triton")
        return self.dx


class DenseMean:
    """Mean over the pixels of each channel: [R, C, 1, 1, B]."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    def backward(self, dy: Tensor) -> Tensor:
        pixels = prod(self.shape[2:4])
        dy = dy.reshape(*self.shape[:2], 1, 1, self.shape[4]) / pixels
        return dy.expand(self.shape).contiguous()


class DenseAdd:
    """The sum of activations; each of them gets the gradient of the sum."""

    def __init__(self, out: Tensor) -> None:
        self.y = out

    def forward(self, x: Tensor, other: Tensor, *more: Tensor) -> Tensor:
        torch.add(x, other, out=self.y)
        for another in more:
            self.y.add_(another)
        return self.y

    def backward(self, dy: Tensor) -> Tensor:
        return dy


class DenseBatchNorm:
    """y = scale (x - mean) / sqrt(var + EPS) + shift for each channel of each replica.

    The channels of all replicas are those of one call of torch's own, on [1, R C, H W B]. Training takes the
    batch's mean and variance, and moves the running ones towards them as torch does; one value has no
    variance to move to.
    """

    def __init__(
        self, tensors: list[Tensor], slopes: list[Tensor] | None, training: bool, active: Tensor | None
    ) -> None:
        self.parameters, self.running = tensors[:2], tensors[2:]  # each [R, C, 1]
        self.slopes, self.training = slopes, training
        self.active = None if active is None else active.view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        # one order of memory at any R: torch's rounding depends on it
        self.x = x.reshape(1, prod(x.shape[:2]), -1).contiguous()
        self.scale, shift = (t.flatten() for t in self.parameters)
        running = [t.clone().flatten() for t in self.running] if self.training else self.running
        y, *self.moments = _aten.native_batch_norm(
            self.x, self.scale, shift, *(t.flatten() for t in running), self.training, MOMENTUM, EPS
        )
        if self.training:
            for old, new in zip(self.running, running[: 1 if self.x.shape[2] == 1 else 2], strict=False):
                new = new.view(old.shape)
                old.copy_(new if self.active is None else torch.where(self.active != 0, new, old))
        return y.view(self.shape)  # type: ignore[no-any-return]

    def backward(self, dy: Tensor) -> Tensor:
        assert self.slopes is not None
        dy = dy.reshape(self.x.shape).contiguous()
        dx, *found = _aten.native_batch_norm_backward(
            *(dy, self.x, self.scale, None, None, *self.moments, True, EPS, [True] * 3)
        )
        for slope, new in zip(self.slopes, found, strict=True):
            slope.copy_(new.view(slope.shape))
        return dx.view(self.shape)  # type: ignore[no-any-return]


class DenseReLU:
    """max(x, 0), in place where this is all that reads x."""

    passes = False  # whether the gradient comes cut already, by the pool behind it

    def __init__(self, overwrites: bool = True, owns_dy: bool = True) -> None:
        """`owns_dy`: the gradient it is given is nobody else's, and is changed in place too."""
        self.overwrites, self.owns_dy = overwrites, owns_dy

    def forward(self, x: Tensor) -> Tensor:
        self.y = x.relu_() if self.overwrites else x.relu()
        return self.y

    def backward(self, dy: Tensor) -> Tensor:
        dy = dy.view(self.y.shape)
        if self.passes:
            return dy
        dx = dy if self.owns_dy else torch.empty_like(dy)
        return _relu_backward(dy, self.y, 0, grad_input=dx)  # type: ignore[no-any-return]


class BiasReLU(DenseReLU):
    """max(x + bias, 0), in place: the products before it left the bias [R, N] out."""

    def __init__(self, bias: Tensor, owns_dy: bool = True) -> None:
        super().__init__(owns_dy=owns_dy)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        self.y = x
        if replica_parts.is_channels_last(x):
            replica_parts.bias_relu(x, self.bias, kernels="triton")
            return x
        # the vendor's convolutions of replicas one by one
        return x.add_(self.bias.view(*self.bias.shape, *[1] * (x.dim() - 2))).relu_()
