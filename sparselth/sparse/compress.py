"""Any model whose layers train as their kept weights alone, faster and smaller the sparser it is, on a CPU.

    >>> import torch
    >>> from sparselth.sparse import compress, dense
    >>> model = torch.nn.Sequential(torch.nn.Linear(784, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    >>> keep = torch.rand(300, 784, generator=torch.Generator().manual_seed(0)) < 0.05
    >>> fast = compress(model, {"0.weight": keep})
    >>> fast[0].weight.shape == (keep.sum(),)  # and so are its gradient and what an optimizer holds for it
    True
    >>> optimizer = torch.optim.Adam(fast.parameters())  # any optimizer, any loop
    >>> fast.state_dict()["0.weight"].shape  # the dense one, 0 where it is pruned
    torch.Size([300, 784])
    >>> dense(fast)[0]
    Linear(in_features=784, out_features=300, bias=True)

Which layers pay is measured as the engines measure it: `engine.break_even`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparselth import models
from sparselth.engine.break_even import Case, densities, gain
from sparselth.errors import UsageError
from sparselth.kernels import _native
from sparselth.kernels.sparse_conv2d import Conv2dIndex
from sparselth.masks import by_parameter, unwrapped
from sparselth.params import TensorSpec
from sparselth.sparse import columns, fused
from sparselth.sparse.forms.conv import Filters
from sparselth.sparse.reference import copied
from sparselth.sparse.trainable import Compressed, CompressedConv2d, CompressedLinear

if TYPE_CHECKING:
    from sparselth.masks import AnyMasks

# Without an example: the least break-even of nine layers of a ResNet-18 and a LeNet on an AMD EPYC was 0.37
BELOW = 0.25
FAST_PATHS = (  # of torch, which would read dense weights: what is False where it is not taken
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),  # which that path alone takes
)
ENOUGH = 32  # images: from two cache lines of the batch on a convolution's times grow with it


@dataclass(frozen=True)
class Choice:
    """What became of one layer that has a mask or could have one."""

    name: str
    shape: tuple[int, ...]
    kept: int
    below: float | None  # the density under which it pays, where that was asked
    compressed: bool
    why: str


class Compression(tuple[Choice, ...]):
    """The choices for a model, one a layer; printed as a table."""

    def __str__(self) -> str:
        rows = [["layer", "weight", "kept", "pays below", "became", "why"]]
        for one in self:
            size = prod(one.shape)
            share = f"{100 * one.kept / size:.3g} %" if size else "–"
            below = "–" if one.below is None else f"{100 * one.below:.3g} %"
            below = "always" if one.below and one.below > 1 else below
            became = "compressed" if one.compressed else "dense"
            rows.append([one.name, "x".join(map(str, one.shape)), share, below, became, one.why])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        some = [one for one in self if one.compressed]
        kept, size = sum(one.kept for one in some), sum(prod(one.shape) for one in some)
        lines.append(
            f"{len(some)} of {len(self)} layers compressed: {kept:,} of their {size:,} weights train"
        )
        if _native.LIB is None:
            lines.append(f"native kernels: {_native.WHY}")
        return "\n".join(lines)


@dataclass
class _Layer:
    """A layer that may be compressed."""

    module: nn.Module
    mask: Tensor
    kept: int
    below: float | None = None
    case: Case | None = None  # as it stood on the example

    @property
    def pays(self) -> bool:
        return self.below is not None and self.kept < self.below * self.mask.numel()


def compress(model: nn.Module, masks: AnyMasks, example: Any = None, below: float | None = None) -> nn.Module:
    """A copy of `model` in which the layers that pay train as their kept weights alone.

    `masks` of any kind that `masks.by_parameter` takes, True = kept; what they prune counts as 0, whatever
    the model holds there. `example`: a batch as the model is trained on (a tensor, or a tuple or dict of
    arguments), on which the layers are measured against dense ones, once for each shape on this machine.
    `below`: the density under which a layer is compressed, instead of measuring; 0.25 without either.

    `nn.Linear` of any leading dimensions and `nn.Conv2d` with square stride and padding are compressed; what
    is tied, not pruned, or of another kind stays dense. Batch norms and pools become such that take images
    as the convolutions leave them. What has a mask and stays dense is 0 where it is pruned, but a plain
    optimizer wakes it: `masks_left(fast, masks)` are the masks that a masked optimizer still needs.
    `print(fast.compression)` says which layer took what, and why. What is compressed already stays as it is.
    UsageError for a model that is not on a CPU, or masks that do not fit. The copy has no second derivative.
    """
    model = unwrapped(model)
    if below is not None and not below >= 0:
        raise UsageError(f"`below` {below}: expected a density, 0 or more")
    if elsewhere := next((f"{n} on {p.device}" for n, p in model.named_parameters() if not p.is_cpu), None):
        raise UsageError(f"compress: expected a model on a CPU, got {elsewhere}; model.cpu() moves it there")
    masked = {id(p): mask for p, mask in by_parameter(model, _of_the_rest(model, masks)).items()}
    copy = copied(model)
    layers: dict[str, _Layer] = {}
    left: dict[str, Choice] = {}
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for (path, old), new in zip(model.named_modules(), copy.modules(), strict=True):
        for name, param in old.named_parameters(recurse=False):
            whole, mask = f"{path}.{name}".lstrip("."), masked.get(id(param))
            if mask is None and not (name == "weight" and isinstance(old, nn.Linear | nn.Conv2d)):
                continue
            if isinstance(old, Compressed) and name == "weight":
                left[whole] = Choice(whole, old.shape, param.numel(), None, True, "compressed before")
                continue
            kept = param.numel() if mask is None else int(mask.sum())
            why = _why_not(old, name, mask, names[id(param)])
            left[whole] = Choice(whole, tuple(param.shape), kept, None, False, why)
            if mask is not None:
                with torch.no_grad():
                    new.get_parameter(name).masked_fill_(~mask, 0)
                if not why:
                    layers[whole] = _Layer(new, mask, kept)
    together: bool | None = None  # convolutions
    if below is None and example is not None:
        together = _measure(copy, layers, example)
    else:
        for layer in layers.values():
            layer.below = BELOW if below is None else below
    for name, layer in layers.items():
        pays, why = _pays(layer, together)
        left[name] = Choice(name, tuple(layer.mask.shape), layer.kept, layer.below, pays, why)
        if pays:
            kind = CompressedConv2d if isinstance(layer.module, nn.Conv2d) else CompressedLinear
            kind.of(layer.module, layer.mask)
    for module in copy.modules():
        for type_, name in FAST_PATHS:
            if isinstance(module, type_) and hasattr(module, name):
                module.__dict__.setdefault(f"was_{name}", getattr(module, name))
                setattr(module, name, False)
    if any(isinstance(module, CompressedConv2d) for module in copy.modules()):
        columns.enter(copy)
    fused.enter(copy)
    copy.compression = Compression(left.values())  # type: ignore[assignment]
    return copy


def dense(model: nn.Module) -> nn.Module:
    """A copy of a compressed model with dense layers again, 0 where they are pruned."""
    copy = copied(unwrapped(model))
    for module in copy.modules():
        if isinstance(module, Compressed):
            module.undo()
        for _, name in FAST_PATHS:
            if f"was_{name}" in module.__dict__:
                setattr(module, name, module.__dict__.pop(f"was_{name}"))
    columns.leave(copy)
    fused.leave(copy)
    copy.__dict__.pop("compression", None)
    return copy


def masks_left(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """Of masks by name those of the layers that stayed dense, for `MaskedSGD(..., masks=masks_left(...))`."""
    gone = {
        f"{n}.weight".lstrip(".") for n, module in model.named_modules() if isinstance(module, Compressed)
    }
    return by_parameter(model, {n: mask for n, mask in masks.items() if n not in gone})


def compressed_state(model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` with the kept weights alone; the same model's `load_state_dict` takes it."""
    state: dict[str, Any] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Compressed):
            state[f"{name}.weight".lstrip(".")] = module.values.detach()
    return state


def _of_the_rest(model: nn.Module, masks: AnyMasks) -> AnyMasks:
    """Masks without those of layers that are compressed already, which must be the ones they have."""
    names = {
        f"{n}.weight".lstrip("."): one for n, one in model.named_modules() if isinstance(one, Compressed)
    }
    rest = dict[Any, Tensor]()
    for key, mask in masks.items():
        one = names.get(key) if isinstance(key, str) else None
        if one is None:
            rest[key] = mask
        elif mask.shape != one.shape or not bool((mask.bool() == one.mask.to(mask.device)).all()):
            raise UsageError(
                f"{key}: is compressed under another mask; expected the same, or a dense model, as "
                "sparselth.dense(model) is"
            )
    return rest if names else masks


def _why_not(module: nn.Module, name: str, mask: Tensor | None, names: int) -> str:
    """Why a layer stays dense whatever its density, or ""."""
    if mask is None:
        return "no mask"
    if names > 1:
        return "tied: its weight has several names"
    if type(module) not in (nn.Linear, nn.Conv2d) or name != "weight":
        return f"no trainable kernels for {type(module).__name__}"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernels for {module.weight.dtype}"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 or module.dilation != (1, 1):
            return f"{module.groups} groups" if module.groups > 1 else "dilation"
        filters = Filters.of(module, torch.zeros_like(mask))
        if filters is None or filters.weight.shape != mask.shape or len({*module.kernel_size}) > 1:
            return "no kernels for this kernel size, stride or padding"
        wide = module.kernel_size[0] + 64
        try:
            Conv2dIndex.from_dense(filters.weight, (wide, wide), filters.stride, filters.padding)
        except ValueError as error:
            return str(error)
    return ""


def _pays(layer: _Layer, together: bool | None) -> tuple[bool, str]:
    """Whether a layer is compressed, and why."""
    if layer.below is None:
        return False, "the example does not reach it"
    if together is None or isinstance(layer.module, nn.Linear):
        return layer.pays, "" if layer.pays else "keeps too many weights"
    if together:
        return True, "" if layer.pays else "as the other convolutions: images then change no layout"
    return False, "the convolutions together would lose" if layer.pays else "keeps too many weights"


def _measure(model: nn.Module, layers: Mapping[str, _Layer], example: Any) -> bool:
    """Fill in which density each layer pays below; whether the convolutions, together, gain."""
    _run(model, layers, example)
    cases = {name: layer.case for name, layer in layers.items() if layer.case}
    for name, density in densities(cases).items():
        layers[name].below = density
    convolutions = [one for one in layers.values() if one.case and isinstance(one.module, nn.Conv2d)]
    return (
        gain(
            (prod(one.case.after[1:]), one.below or 0.0, one.mask.numel(), one.kept)
            for one in convolutions
            if one.case
        )
        > 0
    )


def _run(model: nn.Module, layers: Mapping[str, _Layer], example: Any) -> None:
    """Let the example through, and note what each layer takes."""
    kernels = "torch" if _native.LIB is None else "native"

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor) -> None:
            layer, x = layers[name], args[0] if args else named["input"]
            spec = TensorSpec(name, tuple(layer.mask.shape), 0)
            if isinstance(module, nn.Conv2d):
                x, y = (t if t.dim() == 4 else t[None] for t in (x, y))
                filters, size = Filters.of(module, layer.mask), module.kernel_size[0]
                assert filters is not None
                kind: models.Layer = models.Conv(len(y[0]), size, filters.padding, filters.stride)
                before, after, batch = tuple(x.shape[1:]), tuple(y.shape[1:]), min(len(x), ENOUGH)
            else:
                kind, before, after = models.Linear(y.shape[-1]), (x.shape[-1],), (y.shape[-1],)
                batch = y.numel() // max(1, y.shape[-1])
            layer.case = Case(spec, kind, before, after, False, batch, kernels)

        return hook

    hooks = [
        layer.module.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was
