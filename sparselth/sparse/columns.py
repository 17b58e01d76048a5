"""What stands between compressed convolutions, on images that lie features-major: batch norm and pools.

Such images have the shape [B, C, H, W] and lie in memory as [C, H, W, B]. torch's elementwise operations keep
that; its batch norm and pools would lay them anew. Each layer here is torch's own on any other input.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.errors import UsageError
from sparselth.kernels import _pieces
from sparselth.kernels.batch_norm import batch_norm, batch_norm_backward

_relu_backward = torch.ops.aten.threshold_backward.grad_input


def is_columns(x: Tensor) -> bool:
    """Whether images lie features-major, fp32, on a CPU."""
    return (
        x.dim() == 4
        and x.is_cpu
        and x.dtype == torch.float32
        and x.numel() > 0
        and x.permute(1, 2, 3, 0).is_contiguous()
    )


def lines(x: Tensor) -> Tensor:
    """[C, H W B] of images that lie so: the same memory."""
    return x.permute(1, 2, 3, 0).flatten(1)


def like_columns(x: Tensor) -> Tensor:
    """Room for images [B, C, H, W] that lie so."""
    b, c, h, w = x.shape
    return _pieces.take((b, c, h, w), (1, h * w * b, w * b, b))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = like_columns(x)
        mean, var = batch_norm(lines(x), lines(y), scale, shift, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, scale, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        refuse_second()
        x, scale, mean, var = ctx.saved_tensors
        dx = like_columns(x) if ctx.needs_input_grad[0] else None
        if not is_columns(dy):
            dy = like_columns(dy).copy_(dy)
        out = None if dx is None else lines(dx)
        dscale, dshift = batch_norm_backward(lines(dy), lines(x), mean, var, out, scale, ctx.eps)
        _, wants_scale, wants_shift, _ = ctx.needs_input_grad
        return dx, dscale if wants_scale else None, dshift if wants_shift else None, None


class ColumnsBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], features-major where x is."""
        fits = is_columns(x) and (self.weight is None or self.weight.dtype == torch.float32)
        if not fits or x.shape[1] != self.num_features or x.numel() == self.num_features:
            return super().forward(x)
        if not self.training and self.running_mean is not None:
            turned = x.permute(1, 2, 3, 0)
            flat = F.batch_norm(
                turned.view(1, len(turned), -1),
                *(self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps),
            )
            return flat.view(turned.shape).permute(3, 0, 1, 2)
        y, mean, var = cast("tuple[Tensor, ...]", _Norm.apply(x, self.weight, self.bias, self.eps))
        if self.training and self.running_mean is not None and self.running_var is not None:
            count = x.numel() // x.shape[1]
            rate = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                rate = 1 / float(self.num_batches_tracked) if rate is None else rate
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate or 0.0)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), rate or 0.0)
        return y


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else torch.clamp_min(x, 0.0, out=like_columns(x))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second()
        (y,) = ctx.saved_tensors
        return _relu_backward(dy, y, 0, grad_input=like_columns(y)), None


class ColumnsReLU(nn.ReLU):
    """`nn.ReLU`."""

    def forward(self, x: Tensor) -> Tensor:
        """max(x, 0), features-major where x is."""
        return cast("Tensor", _ReLU.apply(x, self.inplace)) if is_columns(x) else super().forward(x)


class _Pool(nn.Module):
    """A pool does the same to every plane: with channels first, the batch is its channels, channels-last."""

    def forward(self, x: Tensor) -> Any:
        """As the pool it stands for."""
        if not is_columns(x) or getattr(self, "return_indices", False):
            return super().forward(x)
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class ColumnsMaxPool2d(_Pool, nn.MaxPool2d):
    """`nn.MaxPool2d`."""


class ColumnsAvgPool2d(_Pool, nn.AvgPool2d):
    """`nn.AvgPool2d`."""


class ColumnsAdaptiveAvgPool2d(_Pool, nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d`."""


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    kind.__bases__[-1]: kind
    for kind in (
        ColumnsBatchNorm2d,
        ColumnsMaxPool2d,
        ColumnsReLU,
        ColumnsAvgPool2d,
        ColumnsAdaptiveAvgPool2d,
    )
}


def enter(model: nn.Module) -> None:
    """Let a model's batch norms and pools take images as compressed convolutions leave them."""
    for module in model.modules():
        module.__class__ = KINDS.get(type(module), type(module))


def leave(model: nn.Module) -> None:
    """Inverse of `enter`."""
    back = {kind: base for base, kind in KINDS.items()}
    for module in model.modules():
        module.__class__ = back.get(type(module), type(module))


def refuse_second() -> None:
    """Raise where backward is to be differentiated."""
    if torch.is_grad_enabled():
        raise UsageError(
            "compressed models have no second derivative: expected create_graph=False; "
            "sparselth.dense(model) has one"
        )
