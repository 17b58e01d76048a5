"""What scores by gradients share: a network as autograd takes it, its loss, and numbers by weight as [M]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.errors import SparselthError
from sparselth.models import Model
from sparselth.models.module import ModuleModel
from sparselth.models.torch import network as torch_network
from sparselth.models.torch import tensors

CHUNK = 256  # images of one forward at most; more are several batches


def built(network: Model, weights: Tensor, mask: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """The network in training mode, its weights [P] under the mask [M], and the tensors that are ranked."""
    flat = weights.clone()
    flat[: mask.numel()] *= mask
    net = torch_network(network, flat).to(weights.device)
    found = tensors(network, net)
    return net, [found[spec.name] for spec in network.params.weights]


def mean_loss(network: Model, output: Tensor, target: Tensor) -> Tensor:
    """What training lowers: cross-entropy, or a user's own loss."""
    if isinstance(network, ModuleModel) and network.loss is not None:
        return network.loss(output, target)
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def chunks(batch: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The images in parts of about equal size, and each part's share."""
    x, y = batch
    number = -(-len(x) // CHUNK)
    for some, labels in zip(x.tensor_split(number), y.tensor_split(number), strict=True):
        yield some, labels, len(some) / len(x)


def slopes(name: str, value: Tensor, by: Sequence[Tensor], graph: bool = False) -> list[Tensor]:
    """The gradient of a number, 0 for tensors that it does not depend on."""
    if not value.requires_grad:
        raise SparselthError(f"score {name}: the loss does not depend on the weights; expected a network's")
    found = torch.autograd.grad(value, by, create_graph=graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(by, found, strict=True)]


def joined(network: Model, parts: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Numbers of every ranked tensor as one vector [M], 0 in the gaps between them."""
    found = torch.zeros(mask.numel(), dtype=parts[0].dtype, device=mask.device)
    for spec, part in zip(network.params.weights, parts, strict=True):
        found[spec.span] = part.detach().reshape(-1)
    return found
