"""One table of the ways to run a whole network: dense torch, runtimes of others, torch CSR, and ours.

Each makes a network ready for inputs like the given ones, and says why where it cannot: a package that is
not installed, an operator that a runtime does not know. All get the same network, whose pruned weights are
0 for whoever has a use for zeros.
"""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselth import sparse, tickets
from sparselth.calls import snapshot
from sparselth.errors import SparselthError
from sparselth.machine import has_tiles
from sparselth.masks import Masks, by_parameter
from sparselth.measure import memory, outside
from sparselth.measure.memory import Memory, held
from sparselth.measure.outside import Exported, Outside
from sparselth.measure.rivals import quiet_compiler
from sparselth.sparse.reference import Given

Call = Callable[[], Any]
OURS = "sparselth"
MOSTLY = 0.5  # share of the pruned weights in Linear layers from which on torch CSR is a rival


class Pointless(Exception):
    """There is nothing in a network that a contender would do in another way."""


@dataclass
class Field:
    """What all are given: a network in evaluation mode with 0 for what is pruned, its masks, inputs."""

    net: nn.Module
    given: Given
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exported = Exported(self.net, self.given)

    @property
    def cuda(self) -> bool:
        return self.given.tensors[0].is_cuda


@dataclass
class Ready:
    """A network made ready; `bind` puts it to work on inputs."""

    bind: Callable[[Given], Call]
    parts: tuple[object, ...] = ()  # what holds its weights
    file_bytes: int | None = None  # of its own file, where that is not the dense network's
    outside: Outside | None = None
    seconds: float = 0.0
    converted: Any = None

    def memory(self, given: Given, device: str, file: int | None) -> Memory | None:
        """Of weights and of a call; of a runtime of others all is one number."""
        if self.converted is not None:  # a copy has no buffers yet: the first call makes them
            return memory.running(self.parts, _call(copy.deepcopy(self.converted), given), device, file)
        if self.outside is None:
            return memory.running(self.parts, self.bind(given), device, file)
        grown = self.outside.peak_bytes(given)
        return None if grown is None else Memory(0, 0, grown, file=self.file_bytes)


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str  # "dense", "sparse" (others that use zeros), "bf16" (dense, of less precision), "ours"
    make: Callable[[Field], Ready]
    cuda: bool = True


def make_ready(
    field: Field,
    kinds: Iterable[str] = ("dense", "sparse", "bf16", "ours"),
    say: Callable[[str], None] | None = None,
) -> tuple[dict[str, Ready], list[str]]:
    """All that can be, by name, and a line on each that cannot; SparselthError where ours cannot."""
    found: dict[str, Ready] = {}
    notes: list[str] = []
    for one in CONTENDERS:
        if one.kind not in kinds or (field.cuda and not one.cuda):
            continue
        if say:
            say(one.name)
        began = time.perf_counter()
        try:
            found[one.name] = one.make(field)
        except Pointless:
            continue
        except SparselthError as error:
            if one.kind == "ours":
                raise
            notes.append(f"{one.name} is not among the rivals: {error}")
        except Exception as error:  # whatever stands between a user and a compiler, or a package
            if one.kind == "ours" or one.name == "dense":
                raise
            notes.append(f"{one.name} is not among the rivals: {reason(error)}")
        else:
            found[one.name].seconds = time.perf_counter() - began
    return found, notes


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.160}"


def kind_of(name: str) -> str:
    return next(one.kind for one in CONTENDERS if one.name == name)


def _call(net: Callable[..., Any], given: Given) -> Call:
    args, kwargs = given.call(given.tensors)
    return partial(net, *args, **kwargs)


def _eager(field: Field) -> Ready:
    return Ready(partial(_call, field.net), (*_tensors(field.net),))


def _channels_last(field: Field) -> Ready:
    if not any(isinstance(module, nn.Conv2d) for module in field.net.modules()):
        raise Pointless
    net = copy.deepcopy(field.net).to(memory_format=torch.channels_last)
    _call(net, _turned(field.given))()
    return Ready(lambda given: _call(net, _turned(given)), (*_tensors(net),))


def _turned(given: Given) -> Given:
    """Images channels-last."""
    return given.to(
        [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in given.tensors]
    )


def _compiled(field: Field) -> Ready:
    """torch.compile at its best: weights folded in, channels-last where it convolves and takes them."""
    net, turn = copy.deepcopy(field.net), _same
    if not field.cuda:
        with suppress(Exception):  # a network that calls `view` on images
            _channels_last(field)
            net, turn = net.to(memory_format=torch.channels_last), _turned
    run = compiled(net)
    with patched(freezing=not field.cuda):
        _call(run, turn(field.given))()
    return Ready(lambda given: _call(run, turn(given)), (*_tensors(net),))


def _bf16(field: Field) -> Ready:
    """torch in bf16, channels-last where it convolves, where the CPU has tiles for that."""
    if not has_tiles():
        raise Pointless
    net, turn = copy.deepcopy(field.net).bfloat16(), _same
    if any(isinstance(module, nn.Conv2d) for module in net.modules()):
        net, turn = net.to(memory_format=torch.channels_last), _turned

    def bind(given: Given) -> Call:
        floats = [t.bfloat16() if t.is_floating_point() else t for t in given.tensors]
        return _call(net, turn(given.to(floats)))

    bind(field.given)()
    return Ready(bind, (*_tensors(net),), dense_bytes(net))  # a file of them has a header, too


def _openvino_bf16(field: Field) -> Ready:
    if not has_tiles():
        raise Pointless
    return _outside(partial(outside.openvino, name="openvino-bf16"), field)


def _same(given: Given) -> Given:
    return given


def compiled(net: nn.Module) -> Callable[..., Any]:
    """torch.compile for one shape after another."""
    quiet_compiler()
    torch.compiler.reset()  # or the eighth shape would no longer be compiled
    run: Callable[..., Any] = torch.compile(net, dynamic=False)
    return run


def patched(**settings: Any) -> AbstractContextManager[Any]:
    """Other settings of torch's compiler."""
    config: Any = importlib.import_module("torch._inductor.config")
    found: AbstractContextManager[Any] = config.patch(**settings)
    return found


def _outside(make: Callable[[Exported], Outside], field: Field) -> Ready:
    made = make(field.exported)
    made.bind(field.given)()
    return Ready(made.bind, file_bytes=made.file_bytes, outside=made)


def _deepsparse(field: Field) -> Ready:
    raise SparselthError("deepsparse reached its end of life in 2025, and PyPI has no build of it any more")


class CsrLinear(nn.Module):
    """`nn.Linear` by torch's product with a CSR matrix, which takes activations turned."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
            w = layer.weight.detach().to_sparse_csr()
            self.weight = torch.sparse_csr_tensor(
                w.crow_indices().int(), w.col_indices().int(), w.values(), w.shape, device=w.device
            )
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight @ x.reshape(-1, x.shape[-1]).t()).t()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def csr_layers(net: nn.Module, masks: Mapping[str, Tensor], whose: str = "torch") -> list[str]:
    """Names of the pruned Linear layers; SparselthError where most that is pruned is in other layers."""
    pruned = {id(p): int((~m).sum()) for p, m in by_parameter(net, masks).items()}
    names = [
        name
        for name, layer in net.named_modules()
        if type(layer) is nn.Linear and pruned.get(id(layer.weight), 0)
    ]
    inside = {id(p): pruned[id(p)] for p in (net.get_parameter(f"{n}.weight".lstrip(".")) for n in names)}
    if sum(inside.values()) < MOSTLY * sum(pruned.values()):
        raise SparselthError(f"{whose} has sparse Linear layers alone, and most weights are elsewhere")
    return names


def _csr(field: Field) -> Ready:
    names = csr_layers(field.net, field.masks)
    net = copy.deepcopy(field.net)
    if "" in names:
        net = CsrLinear(net)  # type: ignore[arg-type]
    for name in filter(None, names):
        parent, _, own = name.rpartition(".")
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(net.get_submodule(parent), own, CsrLinear(layer))
    _call(net, field.given)()
    weights = [m.weight for m in net.modules() if isinstance(m, CsrLinear)]
    return Ready(partial(_call, net), (*_tensors(net), *weights))


def _converted(field: Field) -> Ready:
    try:
        network = sparse.convert(field.net, None, example_of(field.given))
    except ValueError as error:
        raise SparselthError(f"the network cannot be converted: {error}") from None
    parts = (*network.forms, *network.parameters(), *network.buffers())
    return Ready(partial(_call, network), parts, converted=network)


def example_of(given: Given) -> Any:
    """Inputs as `convert` and `compress` take them: a tensor alone, a tuple, or a dict of all by name."""
    args, named = pytree.tree_unflatten([*given.leaves], given.spec)
    if args:
        args, kwargs = given.call(given.tensors)
        if kwargs:
            raise SparselthError("its inputs are all by position or all by name; got both")
        return args
    first = next(iter(named.values()), None)
    return first if len(named) == 1 and isinstance(first, Tensor) and given.names[:1] == (*named,) else named


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


CONTENDERS = (
    Contender("dense", "dense", _eager),
    Contender("dense channels-last", "dense", _channels_last),
    Contender("dense compiled", "dense", _compiled),
    Contender("onnxruntime", "dense", partial(_outside, outside.onnxruntime), cuda=False),
    Contender("openvino", "dense", partial(_outside, outside.openvino), cuda=False),
    Contender("dense bf16", "bf16", _bf16, cuda=False),
    Contender("openvino bf16", "bf16", _openvino_bf16, cuda=False),
    Contender("deepsparse", "sparse", _deepsparse, cuda=False),
    Contender("torch CSR", "sparse", _csr),
    Contender(OURS, "ours", _converted),
)


def files(net: nn.Module, masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes of a network's file with dense weights and as a ticket, as `save_ticket` writes both."""
    found = []
    with tempfile.TemporaryDirectory(prefix="sparselth-file-") as folder:
        for kept in ({}, masks):
            file = Path(folder, "network.safetensors")
            tickets.save_ticket(file, net, Masks(dict(kept), net), snapshot(net))
            found.append(os.stat(file).st_size)
    return found[0], found[1]


def dense_bytes(net: nn.Module) -> int:
    """Of weights and buffers, each storage once."""
    return sum(held(*_tensors(net)))


def outputs(out: Any) -> list[Any]:
    """The tensors of what a network gives, as the runtimes of others give them."""
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
