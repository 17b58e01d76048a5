"""Smaller dense layers with the same outputs: units that no kept weight reads, or that are constant, go.

A unit is a neuron of a Linear, a filter of a Conv2d, or an input. One that nobody reads is cut out. One
with no inputs is a constant relu(bias), which the next layer's bias takes over; a convolution with zero
padding sees an edge around a constant and can take over zeros only, so there other constants stay.

Exact up to rounding. What was cut is no longer multiplied: NaN or infinity in it, which a dense
product spreads by 0 * NaN, is then not seen.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from sparselth.masks import by_parameter

if TYPE_CHECKING:
    from sparselth.masks import AnyMasks

Product = nn.Linear | nn.Conv2d
NOTHING = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity  # at inference
POINTWISE = (
    *(nn.GELU, nn.SiLU, nn.Mish, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
)
KINDS = nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, *POINTWISE, *NOTHING
DTYPES = torch.float32, torch.bfloat16, torch.float16
SELECT = 0.75  # share of live inputs up to which picking them out pays for the copy


@dataclass(frozen=True)
class Part:
    """One layer of a flattened Sequential; shapes without the batch: [C, H, W] or [K]."""

    name: str
    module: nn.Module
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """Inputs and outputs of one layer, (before, after) compaction."""

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]


@dataclass(frozen=True)
class Compacted:
    """`model` computes what the parts did; `names` are those of its layers in the model they come from."""

    model: nn.Sequential
    names: list[str]
    units: list[Units]


class Select(nn.Module):
    """The inputs that are read: x[:, index]."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


def compact(model: nn.Sequential, masks: AnyMasks | None, example: Tensor) -> Compacted:
    """The smaller network; `masks` and `example` as in `pruned_parts`, which also tells the errors."""
    return compact_parts(pruned_parts(model, masks, example))


def is_chain(model: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it is a Sequential of KINDS alone, all of them as torch wrote them, one behind the other."""
    return _is_plain(model) and all(is_known(module) for _, module in _flat(model, ""))


def fits_chain(model: nn.Sequential, example: Tensor) -> bool:
    """Whether each layer of a chain has the batch first and the axes behind it that `pruned_parts` knows."""
    x, layers = example.dim() - 1, [module for _, module in _flat(model, "")]
    for module in layers:
        if isinstance(module, nn.Linear) and x != 1:
            return x == 0 or example.shape[-1] != module.in_features
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and x != 3:
            return x == 0
        if isinstance(module, nn.Flatten):
            x = min(x, 1)
    return any(not isinstance(module, NOTHING) for module in layers)


def is_known(module: nn.Module) -> bool:
    """Whether a layer is one of KINDS and computes what its class does: no hook, no other weight."""
    kind = next((k for k in KINDS if isinstance(module, k)), None)
    if kind is None or type(module).forward is not kind.forward or is_hooked(module):
        return False
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if isinstance(module, nn.MaxPool2d):
        return not module.return_indices
    if isinstance(module, nn.Linear | nn.Conv2d):  # else a hook or a parametrization makes it
        return {"weight", "bias"} == module._parameters.keys() and module.weight is not None
    return True


def is_hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class says."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__ or hasattr(module, "parametrizations")


def pruned_parts(model: nn.Sequential, masks: AnyMasks | None, example: Tensor) -> list[Part]:
    """The layers of a Sequential, nested ones flattened, as copies in which pruned weights are zero.

    masks: as `masks.by_parameter` has them; zeros in the weights are pruned with or without. example [B, ...]
    tells the shapes. What does nothing at inference is left out.
    ValueError: training mode, another device than a CPU or CUDA, another dtype than fp32, bf16 and fp16, or
    another one of the model than of the example; a model that is no chain, a mask that fits no weight, an
    example that does not fit.
    """
    if not is_chain(model):
        raise ValueError(f"model: expected a Sequential of the layers in KINDS, got {type(model).__name__}")
    check_evaluation(model)
    found = by_parameter(model, masks or {})
    there = example.dtype in DTYPES and (example.is_cpu or example.is_cuda)
    if not there or example.dim() < 2 or not example.numel():
        raise ValueError(
            "example: expected a batch in fp32, bf16 or fp16 on a CPU or CUDA, "
            f"got {example.dtype} {list(example.shape)} on {example.device}"
        )
    parts: list[Part] = []
    x = example[:1]
    with torch.no_grad():
        for name, module in _flat(model, ""):
            if isinstance(module, NOTHING):
                continue
            _check(name, module, x)
            module = plain(module, found)
            y = module(x)
            parts.append(Part(name, module, tuple(x.shape[1:]), tuple(y.shape[1:])))
            x = y
    return parts


def check_evaluation(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected evaluation mode, got training mode: call model.eval() first")


def plain(module: nn.Module, masks: dict[Tensor, Tensor]) -> nn.Module:
    """A layer of KINDS as a copy with zeros for what is pruned, never in place."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        bias = None if module.bias is None else pruned(module.bias, masks)
        return rebuilt(module, pruned(module.weight, masks), bias)
    module = copy.copy(module)
    if hasattr(module, "inplace"):
        module.__dict__["inplace"] = False
    return module


def pruned(parameter: Tensor, masks: dict[Tensor, Tensor]) -> Tensor:
    """A copy with zeros for what is pruned, contiguous."""
    weight, mask = parameter.detach(), masks.get(parameter)
    if mask is None:
        return weight.clone(memory_format=torch.contiguous_format)
    return torch.where(mask, weight, torch.zeros_like(weight)).contiguous()


def compact_parts(parts: list[Part]) -> Compacted:
    """`compact` of layers that are already flattened and pruned."""
    places = [i for i, part in enumerate(parts) if isinstance(part.module, nn.Linear | nn.Conv2d)]
    if not places:
        return Compacted(nn.Sequential(*(part.module for part in parts)).eval(), [p.name for p in parts], [])
    layers = [_Layer(parts[place]) for place in places]
    layers[0].view(parts[places[0]].before[0])
    for source, layer in pairwise(layers):
        layer.view(len(source.bias))

    for i in reversed(range(len(layers))):
        layers[i].reads &= (layers[i].weight[layers[i].live] != 0).any(2).any(0)
        if i:
            layers[i - 1].live = layers[i].reads.clone()
    for i, (source, layer) in enumerate(pairwise(layers)):
        _fold(source, layer, [part.module for part in parts[places[i] + 1 : places[i + 1]]])
    if layers[0].reads.sum() > SELECT * len(layers[0].reads):
        layers[0].reads[:] = True
    elif not layers[0].reads.any():
        layers[0].reads[0] = True  # torch's convolutions want a channel

    modules: list[nn.Module] = []
    names, units, left = [], [], iter(layers)
    for i, part in enumerate(parts):
        if i == places[0] and not layers[0].reads.all():
            modules.append(Select(layers[0].reads.nonzero()[:, 0]))
            names.append("inputs")
        if i in places:
            layer = next(left)
            modules.append(layer.shrunk())
            units.append(layer.units())
        else:
            modules.append(part.module)
        names.append(part.name)
    return Compacted(nn.Sequential(*modules).eval(), names, units)


def rebuilt(module: Product, weight: Tensor, bias: Tensor | None) -> Product:
    """A layer with the settings of `module` and these parameters, in evaluation mode, without gradients."""
    n, k = weight.shape[:2]
    k *= module.groups if isinstance(module, nn.Conv2d) else 1
    new: Product
    if isinstance(module, nn.Linear):
        new = nn.Linear(k, n, bias is not None, device="meta")
    else:
        new = nn.Conv2d(
            k,
            n,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            bias=bias is not None,
            padding_mode=module.padding_mode,
            device="meta",
        )
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new.eval()


class _Layer:
    """A product while units are sought: weight [N, C, rest], C the units that it could read."""

    def __init__(self, part: Part) -> None:
        assert isinstance(part.module, nn.Linear | nn.Conv2d)
        self.part, self.module = part, part.module
        given = self.module.bias
        self.weight = self.module.weight.detach().clone()
        self.bias = self.weight.new_zeros(len(self.weight)).double() if given is None else given.double()
        self.live = self._all(len(self.weight))

    def view(self, units: int) -> None:
        self.weight = self.weight.view(len(self.weight), units, -1)
        self.reads = self._all(units)

    def _all(self, units: int) -> Tensor:
        return torch.ones(units, dtype=torch.bool, device=self.weight.device)

    def constant(self) -> Tensor:
        """Which live units have no inputs."""
        return self.live & ~(self.weight[:, self.reads] != 0).any(2).any(1)

    def takes_over(self, values: Tensor) -> Tensor:
        """Which units of constant `values` [C, pixels] the bias can stand for."""
        if isinstance(self.module, nn.Linear):
            return self._all(len(values))
        even = (values == values[:, :1]).all(1)
        bare = self.module.padding == "valid" or not any(_padding(self.module))
        if bare or self.module.padding_mode != "zeros":
            return even
        return even & (values[:, 0] == 0)

    def shrunk(self) -> Product:
        weight = self.weight[self.live][:, self.reads]
        shape = (-1,) if isinstance(self.module, nn.Linear) else self.module.weight.shape[1:]
        weight = weight.reshape(len(weight), *(shape if len(shape) == 1 else (-1, *shape[1:])))
        bias = self.bias[self.live].to(weight.dtype)
        return rebuilt(self.module, weight, bias if self.module.bias is not None or bias.any() else None)

    def units(self) -> Units:
        inputs = len(self.reads), int(self.reads.sum())
        return Units(self.part.name, inputs, (len(self.live), int(self.live.sum())))


def _fold(source: _Layer, layer: _Layer, between: list[nn.Module]) -> None:
    """Move the constant units of `source` into the bias of `layer`, which is behind `between`."""
    shape = source.part.after
    values = source.bias.view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)
    for module in between:
        values = module(values)
    values = values.reshape(len(source.bias), -1)
    gone = source.constant() & layer.reads & layer.takes_over(values)
    if isinstance(layer.module, nn.Conv2d):
        values = values[:, :1]
    layer.bias += (layer.weight[:, gone].double() * values[gone]).sum((1, 2))
    layer.weight[:, gone] = 0
    layer.reads &= ~gone
    if not layer.reads.any():  # torch's convolutions want a channel: one that is zero
        layer.reads[0] = True
        source.weight[0], source.bias[0], layer.weight[:, 0] = 0, 0, 0
    source.live = layer.reads.clone()


def _is_plain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return sequential and not is_hooked(module)


def _flat(model: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in model._modules.items():  # named_children would leave out what stands there twice
        assert module is not None
        found += _flat(module, f"{prefix}{name}.") if _is_plain(module) else [(prefix + name, module)]
    return found


def _check(name: str, module: nn.Module, x: Tensor) -> None:
    kind, got = type(module).__name__, list(x.shape[1:])
    if isinstance(module, nn.Linear) and got != [module.in_features]:
        raise ValueError(f"layer {name!r}: Linear expected [{module.in_features}] inputs, got {got}")
    if isinstance(module, nn.Conv2d) and (len(got) != 3 or got[0] != module.in_channels):
        raise ValueError(f"layer {name!r}: Conv2d expected [{module.in_channels}, H, W] inputs, got {got}")
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and len(got) != 3:
        raise ValueError(f"layer {name!r}: {kind} expected [C, H, W] inputs, got {got}")
    for parameter in module.parameters(recurse=False):
        if parameter.dtype != x.dtype or parameter.device != x.device:
            raise ValueError(
                f"layer {name!r}: expected {x.dtype} on {x.device} like the example, "
                f"got {parameter.dtype} on {parameter.device}"
            )


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    """Zeros on each side; "same" counts as some."""
    return (1,) if isinstance(module.padding, str) else module.padding
