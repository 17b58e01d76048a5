"""A model in torch.nn, with the weights of a flat buffer; weights and biases keep their names."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from sparselth.models.graph import (
    INPUT,
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    Layer,
    Linear,
    MaxPool,
    Model,
    ReLU,
)
from sparselth.models.module import ModuleModel

Masks = dict[Tensor, Tensor]
_NORM = {
    "scale": "weight",
    "shift": "bias",
    "mean": "running_mean",
    "var": "running_var",
}  # as torch has them
PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


class Sum(nn.Module):
    """The sum of what it is given."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            x = x + other
        return x


class Graph(nn.Module):
    """The layers of a model that is no chain, in its order."""

    def __init__(self, model: Model, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.inputs = [node.inputs for node in model.nodes]
        # what reads numbers, of whatever class is put in its place
        self.flat = [isinstance(node.op, Linear) for node in model.nodes]
        # what a layer is the last to read: of 224 x 224 pixels all outputs at once are gigabytes
        self.done = [
            {j for j in node.inputs if model.readers[j + 1][-1] == i} for i, node in enumerate(model.nodes)
        ]

    def forward(self, x: Tensor) -> Tensor:
        values = {INPUT: x}
        for i, (inputs, layer) in enumerate(zip(self.inputs, self.children(), strict=True)):
            read = [values[j] for j in inputs]
            values[i] = layer(read[0].flatten(1)) if self.flat[i] else layer(*read)
            for j in self.done[i]:
                del values[j]
        return values[i]


def network(model: Model, flat: Tensor, seed: int = 0) -> nn.Module:
    """The model in training mode, with the weights of a flat buffer [P]; "conv1.weight" is one of them.

    A chain is a plain nn.Sequential, any other model a `Graph`; what is a module already is made again:
    of `seed`, whose draws are also in what no buffer saves.
    """
    if isinstance(model, ModuleModel):
        net = model.build(seed)
        model.params.scatter(flat, net)
        return net
    return _joined(model, _layers(model, flat))


def sequential(model: Model, flat: Tensor) -> nn.Module:
    """The model in evaluation mode, without batch norms: what scales an output scales its weights.

    Of a `Graph` they are still there and do nothing, and one stays what it is that is not all that reads the
    layer before it.
    """
    found = {name: layer.eval() for name, layer in _layers(model, flat).items()}
    names = list(found)
    for i, node in enumerate(model.nodes):
        if not model.may_overwrite(i):
            continue
        name, before = names[i], names[node.inputs[0]]
        norm, product = found[name], found[before]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(product, nn.Conv2d):
            found[before], found[name] = fuse_conv_bn_eval(product, norm), nn.Identity()
        elif isinstance(norm, nn.BatchNorm1d) and isinstance(product, nn.Linear):
            found[before], found[name] = fuse_linear_bn_eval(product, norm), nn.Identity()
    return _joined(model, found).eval()


def tensors(model: Model, net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a `network`, by the names that the model has for them."""
    found = dict[str, Tensor](net.named_parameters()) | dict(net.named_buffers())
    if isinstance(model, ModuleModel):
        return found
    for spec in model.params.unpruned:
        layer, _, own = spec.name.rpartition(".")
        found[spec.name] = found[f"{layer}.{_NORM.get(own, own)}"]
    return found


def masks(model: Model, net: nn.Module, mask: Tensor) -> Masks:
    """A dense float mask for every weight, from a mask [M]."""
    if isinstance(model, ModuleModel):
        named = dict(net.named_parameters())
        return {named[s.name]: mask[s.span].view(s.shape).float() for s in model.params.weights}
    products = [module for module in net.children() if isinstance(module, nn.Conv2d | nn.Linear)]
    return {
        product.weight: mask[spec.span].view(spec.shape).float()
        for product, spec in zip(products, model.weights, strict=True)
    }


def _joined(model: Model, layers: dict[str, nn.Module]) -> nn.Module:
    if not model.is_chain:
        return Graph(model, layers)
    chain = nn.Sequential()
    for (name, layer), before in zip(layers.items(), model.shapes, strict=False):
        if isinstance(layer, nn.Linear) and len(before) > 1:
            chain.add_module("flatten", nn.Flatten())
        if not isinstance(layer, nn.Identity):
            chain.add_module(name, layer)
    return chain


def _layers(model: Model, flat: Tensor) -> dict[str, nn.Module]:
    """A module for every layer."""
    found = {}
    for i, (node, specs) in enumerate(zip(model.nodes, model.parts, strict=True)):
        layer = _layer(node.op, model.shapes[node.inputs[0] + 1])
        tensors = [t for t in layer.state_dict().values() if t.dim()]  # but not the count of batches
        for tensor, spec in zip(tensors, specs, strict=True):
            tensor.copy_(flat[spec.span].view(spec.shape))
        name = specs[0].name.rpartition(".")[0] if specs else f"{type(node.op).__name__.lower()}{i}"
        found[name] = layer
    return found


def _layer(op: Layer, before: tuple[int, ...]) -> nn.Module:
    match op:
        case Conv(out, kernel, padding, stride):
            return nn.Conv2d(before[0], out, kernel, stride, padding, **PLAIN)
        case MaxPool(size, stride, padding):
            return nn.MaxPool2d(size, stride or size, padding)
        case AvgPool():
            return nn.AvgPool2d((before[1], before[2]))
        case BatchNorm():
            norm = nn.BatchNorm2d if len(before) > 1 else nn.BatchNorm1d
            return norm(before[0], **PLAIN)
        case ReLU():
            return nn.ReLU()
        case Linear(out):
            return nn.Linear(prod(before), out, **PLAIN)
        case Add():
            return Sum()
