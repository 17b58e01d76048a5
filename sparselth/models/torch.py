"""A model in torch.nn, with the weights of a flat buffer; weights and biases keep their names."""

from __future__ import annotations

from collections import OrderedDict
from math import prod

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from sparselth.models.graph import AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, ReLU

Masks = dict[Tensor, Tensor]


def network(model: Model, flat: Tensor) -> nn.Sequential:
    """The model in training mode, with the weights of a flat buffer [P]; "conv1.weight" is one of them."""
    found: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (layer, before, specs) in enumerate(zip(model.layers, model.shapes, model.parts, strict=False)):
        name = specs[0].name.rpartition(".")[0] if specs else f"{type(layer).__name__.lower()}{i}"
        module: nn.Module
        match layer:
            case Conv(out, kernel, padding):
                module = nn.Conv2d(before[0], out, kernel, padding=padding)
            case MaxPool(size):
                module = nn.MaxPool2d(size)
            case AvgPool():
                module = nn.AvgPool2d((before[1], before[2]))
            case BatchNorm():
                module = nn.BatchNorm2d(before[0]) if len(before) > 1 else nn.BatchNorm1d(before[0])
            case ReLU():
                module = nn.ReLU()
            case Linear(out):
                if len(before) > 1:
                    found["flatten"] = nn.Flatten()
                module = nn.Linear(prod(before), out)
        tensors = [t for t in module.state_dict().values() if t.dim()]  # but not the count of batches
        for tensor, spec in zip(tensors, specs, strict=True):
            tensor.copy_(flat[spec.span].view(spec.shape))
        found[name] = module
    return nn.Sequential(found)


def sequential(model: Model, flat: Tensor) -> nn.Sequential:
    """The model in evaluation mode, without batch norms: what scales an output scales its weights."""
    found: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in network(model, flat).eval().named_children():
        match module:
            case nn.BatchNorm2d():
                before, product = found.popitem()
                found[before] = fuse_conv_bn_eval(product, module)  # type: ignore[type-var]
            case nn.BatchNorm1d():
                before, product = found.popitem()
                found[before] = fuse_linear_bn_eval(product, module)  # type: ignore[type-var]
            case _:
                found[name] = module
    return nn.Sequential(found).eval()


def masks(model: Model, net: nn.Sequential, mask: Tensor) -> Masks:
    """A dense float mask for every weight, from a mask [M]."""
    products = [module for module in net if isinstance(module, nn.Conv2d | nn.Linear)]
    return {
        product.weight: mask[spec.span].view(spec.shape).float()
        for product, spec in zip(products, model.weights, strict=True)
    }
