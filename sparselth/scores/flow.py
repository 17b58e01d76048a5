"""SynFlow: what flows through a weight where every weight counts by its size, without any data.

The network is taken as the sum over all paths of the product of the |w| along them, R = sum f(1; |w|):
biases and shifts are 0, norms pass on what they get times the size of their scale, and dropout does nothing.
Float64, because R is a product over the depth. Where activations are ReLUs, what flows into a unit flows out
of it: every layer of a chain has the same sum of scores, R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparselth.errors import SparselthError
from sparselth.models import Model
from sparselth.models.module import ModuleModel
from sparselth.models.torch import network as torch_network
from sparselth.models.torch import tensors
from sparselth.scores import Batch, register
from sparselth.scores.gradients import joined, slopes

ROUNDS = 100  # of Tanaka et al. 2020


@register("synflow", "the flow through the weight of |w| along all paths (Tanaka et al. 2020)", rounds=ROUNDS)
def synflow(
    network: Model, weights: Tensor, mask: Tensor, batch: Batch, generator: torch.Generator
) -> Tensor:
    sizes = weights[: mask.numel()].double().abs() * mask
    found = flow(network, weights, sizes)
    if not bool(found.isfinite().all()):
        raise SparselthError(
            f"score synflow: the flow through `model` {network.name} is beyond float64; use another `score`"
        )
    if int(mask.sum()) == network.params.prunable and not found.any():
        raise SparselthError(
            f"score synflow: nothing flows through `model` {network.name} from an input of ones; use another "
            "`score`"
        )
    return found


def flow(network: Model, weights: Tensor, sizes: Tensor) -> Tensor:
    """What flows through each prunable weight, float64 [M], where these have `sizes` [M], from 0 on.

    Whatever else there is in `weights` [P], scales of norms and what is not pruned, counts by its size.
    """
    if isinstance(network, ModuleModel) and network.tokens:
        raise SparselthError(
            f"score synflow: `model` {network.name} reads tokens, and no input of ones is there; use another "
            "`score`"
        )
    net = torch_network(network, weights).to(weights.device).double().eval()
    found, params = tensors(network, net), network.params
    with torch.no_grad():
        for spec in params.weights:
            found[spec.name].copy_(sizes[spec.span].view(spec.shape))
        for spec in params.trained:
            tensor = found[spec.name]
            last = spec.name.rpartition(".")[2]
            if last == "shift" or last.startswith("bias") or last.endswith("bias"):
                tensor.zero_()
            else:
                tensor.abs_()
    hooks = [one.register_forward_hook(_passed) for one in net.modules() if _is_norm(one)]
    ranked = [found[spec.name].requires_grad_() for spec in params.weights]
    ones = torch.ones(1, *network.input, dtype=torch.float64, device=weights.device)
    total = net(ones).sum()
    for hook in hooks:
        hook.remove()
    parts = slopes("synflow", total, ranked)
    return joined(network, [w * g for w, g in zip(ranked, parts, strict=True)], sizes)


def _is_norm(module: nn.Module) -> bool:
    """By the names of types, as norms of a user's own have them too."""
    name = type(module).__name__
    return "Norm" in name and not [*module.children()]


def _passed(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """In place of what a norm makes of its input: that times the size of its scale."""
    (x, *_), scale = inputs, getattr(module, "weight", None)
    if not isinstance(scale, Tensor):
        return x
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):  # by channel, which comes second
        scale = scale.view(-1, *(1 for _ in x.shape[2:]))
    return x * scale.abs()
