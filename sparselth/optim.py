"""SGD, Adam and AdamW of torch under masks: pruned weights are 0 and stay exactly 0, in any model.

Each class is its torch.optim namesake with `fused=True` and two more arguments. Learning-rate schedulers,
parameter groups, closures, hooks, GradScaler, `state_dict` and `load_state_dict` work as they do there; a
checkpoint holds the masks, packed, loads into torch's own optimizer, and takes one of its; it travels through
torch.distributed.checkpoint, and one whose masks are gone is refused. A step holds the masks whatever was
written to the weights before it, and breaks the graph under torch.compile. `clip_grad_norm_` counts gradients
of pruned weights, unless `optimizer.mask_gradients()` comes before it.

    >>> import torch
    >>> from sparselth.optim import MaskedAdam
    >>> model = torch.nn.Sequential(torch.nn.Linear(784, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    >>> masks = {layer.weight: torch.rand(layer.weight.shape) < 0.2 for layer in model[::2]}
    >>> optimizer = MaskedAdam(model.parameters(), lr=1.2e-3, weight_decay=0.01, masks=masks)
    >>> bool(model[0].weight[~masks[model[0].weight]].any())  # zeroed on construction
    False

Neither momentum nor weight decay wakes a pruned weight, its moments are exactly 0, and a gradient of NaN
or infinity there has no effect. On live weights a step is that of torch.optim with `fused=True`, on a CPU to
the bit; on CUDA, fp32 parameters take one Triton launch a group, which skips memory where 8 neighbours are
pruned and rounds like torch's CPU kernels (`kernels/masked_update.py`). Everything else (other dtypes,
amsgrad, maximize, dampening, the steps of a GradScaler) goes through torch's fused kernels on a
gradient whose pruned entries were set to 0, in place; there a mask takes as much memory as its weights,
under Triton an eighth of a byte a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparselth.kernels.masked_update import masked_adam_many, masked_sgd_many
from sparselth.masked import Masked

if TYPE_CHECKING:
    from sparselth.masks import AnyMasks

_ONE = torch.ones((), dtype=torch.float32, device="cpu")


@lru_cache(maxsize=1)
def fused_loses_gradients() -> bool:
    """Whether torch's fused SGD on a CPU takes gradients of 16 bits for 0 (2.11, 16 numbers at a time)."""
    weights = torch.zeros(64, dtype=torch.bfloat16, device="cpu")
    gradient = torch.ones_like(weights)
    numbers: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.5, "lr": 1.0, "dampening": 0.5}
    flags: dict[str, Any] = {"nesterov": False, "maximize": False, "is_first_step": True}
    torch._fused_sgd_([weights], [gradient], [torch.zeros_like(weights)], **numbers, **flags)
    return bool((weights == 0).any())


class MaskedSGD(Masked, torch.optim.SGD):
    """`torch.optim.SGD` whose pruned weights and their momentum are exactly 0.

    >>> model = torch.nn.Linear(4, 2)
    >>> keep = torch.tensor([[True, False, True, False], [False, True, False, True]])
    >>> optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, masks={model.weight: keep})
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> (model.weight != 0).equal(keep)
    True

    `masks` maps parameters to bool tensors of their shape, True = kept; parameters without one train as
    ever. `kernels` is "auto" (Triton on CUDA, torch elsewhere), "triton" or "reference" (torch).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        masks: AnyMasks | None = None,
        kernels: str = "auto",
    ) -> None:
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, fused=True
        )
        self._begin(masks, kernels)

    def _prepare(self, group: dict[str, Any], params: list[Tensor], state: Sequence[list[Any]]) -> bool:
        # torch's fused step makes all buffers at once; without dampening one of zeros does the same
        for i, buffer in enumerate(state[0] if group["dampening"] == 0 else ()):
            if buffer is None:
                state[0][i] = self.state[params[i]]["momentum_buffer"] = torch.zeros_like(params[i])
        loses = any(p.is_cpu and p.itemsize < 4 for p in params) and fused_loses_gradients()
        group["fused"] = not (loses and getattr(self, "found_inf", None) is None)
        return bool(group["dampening"] == 0 and not group["maximize"] and group["fused"])

    def _torch_step(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        params, grads, *buffers = lists
        hyper: dict[str, Any] = {k: group[k] for k in ("lr", "momentum", "weight_decay", "nesterov")}
        hyper |= {
            "dampening": 0.0,
            "maximize": False,
            "is_first_step": False,
        }  # _prepare has made the buffers
        torch._fused_sgd_(params, grads, buffers[0] if buffers else [], **hyper)

    def _triton_step(self, group: dict[str, Any], lists: list[list[Tensor]], device: torch.device) -> None:
        params, grads, *buffers = lists
        masked_sgd_many(
            params,
            grads,
            [self._make_bits(param) for param in params],
            buffers[0] if buffers else None,
            self._rate(group, device),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            kernels=self._kernels,
        )


class _MaskedAdam(Masked):
    def _prepare(self, group: dict[str, Any], params: list[Tensor], state: Sequence[list[Any]]) -> bool:
        return not (group["amsgrad"] or group["maximize"])

    def _torch_step(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        params, grads, first, second, steps = lists
        torch._foreach_add_(steps, _ONE, alpha=1)  # torch's own `1` takes several times as long
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        hyper: dict[str, Any] = {k: group[k] for k in ("lr", "eps", "weight_decay")}
        hyper |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "maximize": False}
        update(params, grads, first, second, [], steps, **hyper)

    def _triton_step(self, group: dict[str, Any], lists: list[list[Tensor]], device: torch.device) -> None:
        params, grads, first, second, steps = lists
        torch._foreach_add_(steps, 1)
        masked_adam_many(
            params,
            grads,
            [self._make_bits(param) for param in params],
            (first, second),
            steps,
            self._rate(group, device),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            kernels=self._kernels,
        )


class MaskedAdam(_MaskedAdam, torch.optim.Adam):
    """`torch.optim.Adam` whose pruned weights and their moments are exactly 0.

    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = MaskedAdam(model.parameters(), lr=1e-3, masks={model.weight: model.weight.abs() > 0.2})
    >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    >>> optimizer.set_mask(model.weight, model.weight.abs() > 0.3)  # the next level of pruning

    For `masks` and `kernels` see `MaskedSGD`. For a CUDA graph give `capturable=True`, keep the gradients
    (`zero_grad(set_to_none=False)`) and take a step before capture.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        masks: AnyMasks | None = None,
        kernels: str = "auto",
    ) -> None:
        flags: dict[str, bool] = {"maximize": maximize, "capturable": capturable, "fused": True}
        torch.optim.Adam.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **flags)
        self._begin(masks, kernels)


class MaskedAdamW(_MaskedAdam, torch.optim.AdamW):
    """`torch.optim.AdamW` whose pruned weights and their moments are exactly 0; see `MaskedAdam`.

    >>> model = torch.nn.Linear(4, 2)
    >>> keep = model.weight.abs() > 0.2
    >>> groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    >>> optimizer = MaskedAdamW(groups, lr=1e-3, weight_decay=0.1, masks={model.weight: keep})
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        masks: AnyMasks | None = None,
        kernels: str = "auto",
    ) -> None:
        flags: dict[str, bool] = {"maximize": maximize, "capturable": capturable, "fused": True}
        torch.optim.AdamW.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **flags)
        self._begin(masks, kernels)
