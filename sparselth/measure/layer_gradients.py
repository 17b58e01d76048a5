"""Compressed layers one by one against float64: outputs, and gradients of inputs, weights and biases.

The gradient of a whole network says little of its kernels: where an activation or a pool nearly ties,
rounding decides which way it falls, and one that fell another way is an error a thousand times as large.
So every layer gets what the float64 network gives it, rounded to fp32, and the gradient that comes back
to it there; no tie lies between these and what it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselth.check import Checked, check
from sparselth.sparse.trainable import Compressed

BIAS = 3  # of the results of a layer


def check_layers(
    fast: nn.Module,
    dense: nn.Module,
    masks: Mapping[str, Tensor],
    forward: Callable[[nn.Module], Any],
    loss: Callable[[Any], Tensor],
) -> dict[str, Checked]:
    """The worst of each compressed layer, by name; `dense` is the same network with 0 where it is pruned.

    forward: runs a network in float64 on some inputs; loss: of what it gives.
    """
    exact = copy.deepcopy(dense).double().train()
    layers = {name: module for name, module in fast.named_modules() if isinstance(module, Compressed)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name in layers:

        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            x = args[0].detach().float()

            def back(dy: Tensor) -> None:
                seen[name] = x, dy.detach().float()

            y.register_hook(back)  # type: ignore[no-untyped-call]

        hooks.append(exact.get_submodule(name).register_forward_hook(hook))
    torch.autograd.backward(loss(forward(exact)))
    for one in hooks:
        one.remove()
    return {
        name: _layer(layers[name], exact.get_submodule(name), masks[f"{name}.weight".lstrip(".")], *found)
        for name, found in seen.items()
    }


def _layer(fast: Compressed, exact: nn.Module, mask: Tensor, x: Tensor, dy: Tensor) -> Checked:
    """The worst of four results; numbers that are added: inputs of an output, outputs, samples and pixels."""
    own = copy.deepcopy(exact).float()
    by_unit = dy.movedim(1 if isinstance(exact, nn.Conv2d) else -1, 0).flatten(1)
    places = by_unit.shape[1]
    weight = exact.weight
    assert isinstance(weight, Tensor)
    terms = weight[0].numel(), weight.numel() // max(1, weight.shape[1]), places, places
    found, right, torchs = (_results(one, mask, x, dy) for one in (fast, exact, own))
    sums = by_unit.double().abs().sum(1)  # the bias's own cancel where a norm is behind the layer
    checks = [
        check(a, b, "fp32", terms=n, own=c, scale=sums if i == BIAS else None)
        for i, (a, b, c, n) in enumerate(zip(found, right, torchs, terms, strict=False))
    ]
    return max(checks, key=lambda one: (one.fault is not None, one.error / one.allowed))


def _results(layer: nn.Module, mask: Tensor, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of one layer: outputs, and gradients of inputs, kept weights and the bias."""
    wide = next(layer.parameters()).dtype
    x, dy = x.to(wide).requires_grad_(), dy.to(wide)
    y = layer(x)
    weight, bias = layer.weight, layer.bias
    wanted = [x, weight] if bias is None else [x, weight, bias]
    gradients: Any = torch.autograd.grad(y, wanted, dy)  # type: ignore[arg-type]
    kept = gradients[1] if gradients[1].dim() < mask.dim() else gradients[1][mask]
    return [y.detach(), gradients[0], kept, *gradients[2:]]
