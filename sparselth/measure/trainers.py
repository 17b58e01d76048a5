"""One table of the ways to train a pruned network: dense torch, torch CSR, layers of others, and `compress`.

Each makes of a network one that a plain loop of torch trains, and tells its gradients by the names of the
dense weights. Layers of others are looked for where their package is installed: `sparseprop` (Linear and
Conv2d) and `sparselab` (Linear).
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparselth import sparse
from sparselth.errors import SparselthError
from sparselth.measure.contenders import OURS, Pointless, compiled, csr_layers, example_of, reason
from sparselth.measure.outside import EXTRA, need
from sparselth.sparse.reference import Given
from sparselth.sparse.trainable import Compressed

Turn = Callable[[Given], Given]
Dense = Callable[[Tensor], Tensor]  # of a gradient, the dense one


def _same(given: Given) -> Given:
    return given


@dataclass
class Trainee:
    """A network in training mode."""

    net: nn.Module
    run: Callable[..., Any] | None = None  # what is called in its place
    turn: Turn = _same
    # of weights that are no dense parameters: the parameter that stands for one, and what makes it dense
    held: dict[str, tuple[nn.Parameter, Dense]] = field(default_factory=dict)
    indices: int = 0  # bytes
    seconds: float = 0.0  # to make it
    notes: list[str] = field(default_factory=list)

    def forward(self, given: Given) -> Any:
        return self.bind(given)()

    def bind(self, given: Given) -> Callable[[], Any]:
        """A forward pass on inputs that lie as it likes them."""
        placed = self.turn(given)
        args, kwargs = placed.call(placed.tensors)
        return partial(self.net if self.run is None else self.run, *args, **kwargs)

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter, by the dense network's names, float64; of pruned weights anything."""
        found = {name: p.grad.double() for name, p in self.net.named_parameters() if p.grad is not None}
        for name, (parameter, dense) in self.held.items():
            assert parameter.grad is not None
            found[name] = dense(parameter.grad).double()
        return found


@dataclass(frozen=True)
class Trainer:
    name: str
    kind: str  # "dense", "sparse", "ours"
    make: Callable[[nn.Module, Mapping[str, Tensor], Given], Trainee]


def make_trainees(
    net: nn.Module, masks: Mapping[str, Tensor], given: Given, say: Callable[[str], None]
) -> tuple[dict[str, Trainee], list[str]]:
    """All that can be, by name, each of a copy in training mode; a line on each that cannot."""
    found: dict[str, Trainee] = {}
    notes: list[str] = []
    for one in TRAINERS:
        say(one.name)
        began = time.perf_counter()
        try:
            made = one.make(copy.deepcopy(net).train().requires_grad_(True), masks, given)
        except Pointless:
            continue
        except SparselthError as error:
            notes.append(f"{one.name} is not among the rivals: {error}")
        except Exception as error:  # whatever stands between a user and a compiler, or a package
            if one.kind == "ours" or one.name == "torch":
                raise
            notes.append(f"{one.name} is not among the rivals: {reason(error)}")
        else:
            made.seconds = time.perf_counter() - began
            found[one.name] = made
            notes += made.notes
    return found, notes


def kind_of(name: str) -> str:
    return next(one.kind for one in TRAINERS if one.name == name)


def _torch(net: nn.Module, masks: Mapping[str, Tensor], given: Given) -> Trainee:
    return Trainee(net)


def _channels_last(net: nn.Module, masks: Mapping[str, Tensor], given: Given) -> Trainee:
    if not any(isinstance(module, nn.Conv2d) for module in net.modules()):
        raise Pointless
    return Trainee(net.to(memory_format=torch.channels_last), turn=_turned)


def _turned(given: Given) -> Given:
    return given.to(
        [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in given.tensors]
    )


def _compiled(net: nn.Module, masks: Mapping[str, Tensor], given: Given) -> Trainee:
    return Trainee(net, run=compiled(net))


class TrainedCsr(nn.Module):
    """`nn.Linear` whose kept weights are values of a CSR matrix, by torch's own products and gradients."""

    def __init__(self, layer: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
            index = mask.float().to_sparse_csr()
        self.shape = mask.shape
        self.starts, self.places = index.crow_indices().int(), index.col_indices().int()
        self.values = nn.Parameter(layer.weight.detach()[mask].clone())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sparse_csr_tensor(
            self.starts,
            self.places,
            self.values,
            self.shape,
            dtype=self.values.dtype,
            device=self.values.device,
            check_invariants=False,
        )
        y: Tensor = torch.sparse.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def _csr(net: nn.Module, masks: Mapping[str, Tensor], given: Given) -> Trainee:
    found = Trainee(net)
    for name in _untied(csr_layers(net, masks), masks):
        weight = f"{name}.weight".lstrip(".")
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        new, mask = TrainedCsr(layer, masks[weight]), masks[weight]
        found.net = replaced(found.net, name, new)
        found.held[weight] = new.values, _scattered(mask)
        found.indices += 4 * (new.starts.numel() + new.places.numel())
    return found


def _untied(names: list[str], masks: Mapping[str, Tensor]) -> list[str]:
    """The names, if each layer has a weight of its own, as layers of values must."""
    for name in names:
        if f"{name}.weight".lstrip(".") not in masks:
            raise SparselthError(f"{name} shares its weight with another layer")
    return names


def _scattered(mask: Tensor) -> Dense:
    def dense(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return dense


def replaced(net: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """The network with another module of that name."""
    if not name:
        return new
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, new)
    return net


def _sparseprop(net: nn.Module, masks: Mapping[str, Tensor], given: Given) -> Trainee:
    """SparseProp's layers where it finds them faster itself, as its own `swap_modules_with_sparse` asks."""
    if missing := _missing("sparseprop"):
        raise SparselthError(missing)
    with redirect_stdout(sys.stderr):
        library = importlib.import_module("sparseprop.modules")
    found, shapes = Trainee(net), _input_shapes(net, given)
    swapped = 0
    for name, layer in [*net.named_modules()]:
        weight = f"{name}.weight".lstrip(".")
        plain = type(layer) is nn.Linear or (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and {*layer.dilation} == {1}
            and len({*layer.kernel_size}) == len({*layer.stride}) == 1
            and not isinstance(layer.padding, str)
            and len({*layer.padding}) == 1
        )
        if not plain or weight not in masks or bool(masks[weight].all()) or name not in shapes:
            continue
        with redirect_stdout(sys.stderr):
            new = library.sparsify_if_faster(layer, shapes[name])
        if new is layer:
            continue
        swapped += 1
        found.net = replaced(found.net, name, new)
        found.held[weight] = new.W_val, _by_own(new.W_val, partial(_dense_of, new))
        found.indices += sum(t.numel() * t.element_size() for t in new.W_idx)
    if not swapped:
        raise SparselthError("by its own measurement it would leave all layers dense")
    return found


def _sparselab(net: nn.Module, masks: Mapping[str, Tensor], given: Given) -> Trainee:
    if missing := _missing("sparselab"):
        raise SparselthError(missing)
    names = _untied(csr_layers(net, masks, "SparseLab"), masks)
    library, layout = importlib.import_module("sparselab"), importlib.import_module("sparselab.layout")
    found = Trainee(net)
    for name in names:
        weight = f"{name}.weight".lstrip(".")
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        new = library.SparseLinear(layer.in_features, layer.out_features, layer.bias is not None)
        kept = torch.where(masks[weight] & (layer.weight == 0), 1e-30, layer.weight.detach())
        new._csr = layout.from_dense(kept)
        new._values = nn.Parameter(
            torch.from_numpy(importlib.import_module("numpy").asarray(new._csr.values))
        )
        new.bias = layer.bias
        found.net = replaced(found.net, name, new)
        found.held[weight] = new._values, _by_own(new._values, partial(layout.to_dense, new._csr))
        found.indices += 4 * new._values.numel()
    return found


def _dense_of(layer: Any) -> Tensor:
    found: Tensor = layer.to_dense().weight
    return found


def _by_own(values: nn.Parameter, dense: Callable[[], Tensor]) -> Dense:
    """A gradient made dense as a layer of others makes its own weight dense: in the weight's place."""

    @torch.no_grad()
    def made(gradient: Tensor) -> Tensor:
        before = values.detach().clone()
        values.copy_(gradient)
        found = dense().detach().clone()
        values.copy_(before)
        return found

    return made


def _missing(package: str) -> str:
    try:
        need(package)
    except SparselthError as error:
        if package == "sparseprop":  # no build on PyPI: its C++ is compiled there and then
            return str(error).replace(EXTRA, "pip install sparseprop, with g++")
        return str(error)
    return ""


def _input_shapes(net: nn.Module, given: Given) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            shapes.setdefault(name, tuple(args[0].shape))

        return hook

    hooks = [module.register_forward_pre_hook(seen(name)) for name, module in net.named_modules() if name]
    state = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        args, kwargs = given.call(given.tensors)
        net(*args, **kwargs)
    net.load_state_dict(state)  # a batch norm has seen it
    for hook in hooks:
        hook.remove()
    return shapes


def _compress(net: nn.Module, masks: Mapping[str, Tensor], given: Given) -> Trainee:
    fast = sparse.compress(net, dict(masks), example_of(given))
    found = Trainee(fast)
    for name, module in fast.named_modules():
        if isinstance(module, Compressed):
            values = cast("nn.Parameter", module.weight)
            found.held[f"{name}.weight".lstrip(".")] = values, _scattered(module.mask)
    return found


TRAINERS = (
    Trainer("torch", "dense", _torch),
    Trainer("torch channels-last", "dense", _channels_last),
    Trainer("torch compiled", "dense", _compiled),
    Trainer("torch CSR", "sparse", _csr),
    Trainer("sparseprop", "sparse", _sparseprop),
    Trainer("sparselab", "sparse", _sparselab),
    Trainer(OURS, "ours", _compress),
)
