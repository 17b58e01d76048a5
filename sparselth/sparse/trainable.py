"""`nn.Linear` and `nn.Conv2d` whose weight, gradient and optimizer state are the kept weights alone.

`weight` is a vector [kept], in the order of the dense weight. What such a layer computes is features-major in
memory, [N, B] and [N, P, Q, B], under the shape that torch expects: with strides as channels-last images have
them, so that layers that follow each other change no layout. `reshape` works on it as ever; a `view` across
the batch is refused, as it is of channels-last. Linear layers on more than [B, K] give contiguous tensors.

Sums are fp32, whatever autocast says; the result has the input's dtype. float64 goes through torch's dense
product. A pruned weight is not multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.errors import UsageError
from sparselth.kernels import _native, _pieces, bitmask
from sparselth.kernels.csr_linear import CsrIndex, csr_input_grad, csr_linear, csr_weight_grad
from sparselth.kernels.sparse_conv2d import (
    Conv2dIndex,
    bind_sparse_conv2d_weight_grad,
    sparse_conv2d,
    sparse_conv2d_input_grad,
)
from sparselth.kernels.step_parts import bind_columns, bind_rows
from sparselth.sparse.columns import refuse_second
from sparselth.sparse.forms.conv import Filters

COLUMNS = 16  # a batch is padded to a multiple where rows are laid anew: one cache line
SIZES = 4  # of images, for which a convolution keeps its index
Index = CsrIndex | Conv2dIndex
Layer = TypeVar("Layer", bound="Compressed")


class Compressed(nn.Module):
    """What both kinds of layers share; made of a dense one by `of`, and made dense again by `undo`."""

    dense_type: type[nn.Module]
    shape: tuple[int, ...]  # of the dense weight
    bits: Tensor  # the mask [N, ceil(K / 8)]; no buffer, so that no cast or move touches it
    indices: dict[tuple[int, ...], Index]  # by the size of the images

    @classmethod
    def of(cls: type[Layer], module: nn.Module, mask: Tensor) -> Layer:
        """The same module, hooks and all, with the weights that `mask`, bool, keeps."""
        weight = cast("nn.Parameter", module.weight)
        kept = nn.Parameter(weight.detach()[mask].clone(), weight.requires_grad)
        module.__class__ = cls
        layer = cast("Layer", module)
        layer.register_parameter("weight", kept)
        layer.shape, layer.bits, layer.indices = tuple(mask.shape), bitmask.pack(mask.flatten(1)), {}
        return layer

    def undo(self) -> nn.Module:
        """The same module, dense, with 0 where it was pruned."""
        weight = nn.Parameter(self.dense_weight().detach(), self.values.requires_grad)
        self.__class__ = self.dense_type  # type: ignore[assignment]
        del self.shape, self.bits, self.indices
        self.register_parameter("weight", weight)
        return self

    @property
    def values(self) -> Tensor:
        """`weight`, [kept]."""
        return cast("Tensor", self.weight)

    @property
    def mask(self) -> Tensor:
        """bool of the dense shape, True = kept."""
        found: Tensor = bitmask.unpack(self.bits, prod(self.shape[1:]))
        return found.view(self.shape)

    def dense_weight(self) -> Tensor:
        """The dense weight, 0 where it is pruned; autograd knows the way back."""
        values = self.values
        return values.new_zeros(self.shape).masked_scatter(self.mask.to(values.device), values)

    def index_bytes(self) -> int:
        """Memory of the mask and of the indices that were needed so far."""
        return self.bits.numel() + sum(index.bytes() for index in self.indices.values())

    def extra_repr(self) -> str:
        """As the dense layer, and how much of it is kept."""
        return f"{super().extra_repr()}, kept={self.values.numel()} of {prod(self.shape)}"

    def _product(self, x: Tensor, size: tuple[int, ...], make: Callable[[bool], Index]) -> Tensor:
        """The layer on x [B, ...]; `make(backward)` makes the index for images of this size."""
        backward = x.requires_grad and torch.is_grad_enabled()
        index = self.indices.get(size)
        if index is None or (backward and index.backward is None):
            if len(self.indices) >= SIZES:
                del self.indices[next(iter(self.indices))]
            index = self.indices[size] = make(backward)
        found: Tensor = _Product.apply(x, self.weight, self.bias, index)
        return found

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels take x; torch's dense product takes float64 and batches of nothing."""
        if x.device.type != "cpu" or self.values.device.type != "cpu":
            raise UsageError(
                f"{type(self).__name__}: compressed layers train on a CPU, got an input on {x.device} and "
                f"weights on {self.values.device}; sparselth.dense(model) is the same model, dense"
            )
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.dense_weight()
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **more: Any
    ) -> None:
        """Takes a dense weight that is 0 where this layer is pruned, or the vector of the kept ones."""
        key, error_msgs = f"{prefix}weight", others[-1]
        given = state_dict.get(key)
        if isinstance(given, Tensor) and given.shape == self.shape:
            mask = self.mask.to(given.device)
            if wrong := int((given[~mask] != 0).sum()):
                error_msgs.append(
                    f"{key}: {wrong:,} weights are not 0 that are pruned here; expected weights under the "
                    "same mask (multiply them by it, or compress their model with its own)"
                )
                return
            state_dict = {**state_dict, key: given[mask]}
        super()._load_from_state_dict(state_dict, prefix, *others, **more)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "indices": {}}  # made anew when first needed


class CompressedLinear(Compressed, nn.Linear):
    """`nn.Linear` of the kept weights; x [..., K] on a CPU."""

    dense_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """[..., N]"""
        x, (n, k) = input, self.shape
        if x.shape[-1:] != (k,):
            raise UsageError(f"CompressedLinear: expected an input [..., {k}], got {[*x.shape]}")
        if not self._takes(x):
            return F.linear(x, self.dense_weight(), self.bias)
        y = self._product(x.reshape(-1, k), (), lambda backward: CsrIndex.from_dense(self.mask, backward))
        return y if x.dim() == 2 else _Rows.apply(y).view(*x.shape[:-1], n)


class CompressedConv2d(Compressed, nn.Conv2d):
    """`nn.Conv2d` of the kept weights, square strides and zero padding; x [B, C, H, W] on a CPU."""

    dense_type = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """[B, N, P, Q]"""
        x, channels = input, self.shape[1]
        if x.dim() not in (3, 4) or x.shape[-3] != channels:
            raise UsageError(f"CompressedConv2d: expected images [B, {channels}, H, W], got {[*x.shape]}")
        if not self._takes(x):
            return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding)
        size = x.shape[-2], x.shape[-1]

        def make(backward: bool) -> Conv2dIndex:
            filters = Filters.of(self, self.mask)
            assert filters is not None
            return Conv2dIndex.from_dense(filters.weight, size, filters.stride, filters.padding, backward)

        y = self._product(x if x.dim() == 4 else x[None], size, make)
        return y if x.dim() == 4 else y[0]


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which torch's products would follow; those in C know of none."""
    return function if _native.LIB is not None else torch.autocast("cpu", enabled=False)(function)


class _Product(torch.autograd.Function):
    """act(W x + b) of images or vectors, batch first under any strides, to features-major memory."""

    @staticmethod
    @_plain
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, index: Index) -> Tensor:
        rows = columns(x)
        after = (index.shape[0], *index.out) if isinstance(index, Conv2dIndex) else index.shape[:1]
        y, v = _room(after, len(x)), values.float()
        b = None if bias is None else bias.float()
        if isinstance(index, Conv2dIndex):
            sparse_conv2d(index, v, rows, b, out=y.movedim(0, -1))
        else:
            csr_linear(index, v, rows, b, out=y.movedim(0, -1))
        ctx.index = index
        # x itself where it is read in place, so that torch sees who writes to it before backward
        ctx.save_for_backward(x if rows.data_ptr() == x.data_ptr() else rows.movedim(-1, 0), values)
        return y.to(x.dtype)

    @staticmethod
    @_plain
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second()
        index: Index = ctx.index
        x, values = ctx.saved_tensors
        rows, drows, v = columns(x), columns(dy), values.float()
        wants_x, wants_v, wants_b, _ = ctx.needs_input_grad
        dx = _room(tuple(rows.shape[:-1]), len(x)) if wants_x else None
        dv = db = None
        if isinstance(index, Conv2dIndex):
            if wants_v or wants_b:
                dv, db = torch.empty_like(v), v.new_empty(index.shape[0])
                bind_sparse_conv2d_weight_grad(index, drows, rows, dv, db)()
            if dx is not None:
                sparse_conv2d_input_grad(index, v, drows, out=dx.movedim(0, -1))
        else:
            if wants_v:
                dv = csr_weight_grad(index, drows, rows)
            if wants_b:
                db = drows.sum(1)
            if dx is not None:
                csr_input_grad(index, v, drows, out=dx.movedim(0, -1))
        return dx, dv if wants_v else None, db if wants_b else None, None


class _Rows(torch.autograd.Function):
    """y [B, N] in contiguous memory."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        turned = y.t()
        if y.is_contiguous() or y.dtype != torch.float32 or not y.numel():
            return y.clone(memory_format=torch.contiguous_format)
        out = torch.empty(y.shape, dtype=torch.float32, device="cpu")
        bind_rows(turned)(out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def columns(x: Tensor) -> Tensor:
    """x [B, ...] as fp32 [..., B] with the batch side by side: the same memory where it lies so."""
    x, batch = x.detach(), len(x)
    turned = x.movedim(0, -1)
    apart = [step for size, step in zip(turned.shape[:-1], turned.stride(), strict=False) if size > 1]
    beside = batch == 1 or turned.stride(-1) == 1
    if x.dtype == torch.float32 and beside and min(apart, default=batch) >= batch:
        return turned
    found = _pieces.take((*turned.shape[:-1], -(-batch // COLUMNS) * COLUMNS))[..., :batch]
    bind_columns(found.flatten(0, -2))(x.float().contiguous())
    return found


def _room(after: tuple[int, ...], batch: int) -> Tensor:
    """[B, *after] whose memory is features-major, pixels on cache lines of their own.

    No view: what a function of autograd returns may then be changed in place.
    """
    strides, step = [1], batch if len(after) > 1 else -(-batch // COLUMNS) * COLUMNS
    for size in reversed(after):
        strides.insert(1, step)
        step *= size
    return _pieces.take((batch, *after), strides)
