"""Compaction of a graph: units that nobody reads, or that are zero, go; across sums, concatenations, norms.

A unit is a channel of an image or a number of a vector, at every node that it passes through. A product makes
new ones; activations, pools, norms and depthwise filters pass them on; a sum or a gate ties those that it
joins, so that they stay or go together; a concatenation puts them side by side. Whatever else a node does
keeps all units that reach it. Exact up to rounding; as in `compaction`, what was cut is no longer multiplied.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sparselth.sparse.compaction import POINTWISE, Product, Units, plain, rebuilt
from sparselth.sparse.tracing import folded, layer_of

Norm = nn.BatchNorm1d, nn.BatchNorm2d
POOLS = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d
MOVED = nn.Sigmoid, nn.Hardsigmoid, nn.Softplus  # of zero they make something else
JOINS: tuple[Any, ...] = operator.add, operator.iadd, torch.add, "add"
JOINS += operator.mul, operator.imul, torch.mul, "mul"


def fold_norms(traced: fx.GraphModule) -> None:
    """Put every batch norm behind a product of its own into that product."""
    alone = _alone(traced)
    for node in [*traced.graph.nodes]:
        norm = layer_of(traced, node) if node.op == "call_module" else None
        if not isinstance(norm, Norm):
            continue
        before = node.all_input_nodes[0]
        product = layer_of(traced, before) if before.op == "call_module" else None
        fits = isinstance(product, nn.Linear) == isinstance(norm, nn.BatchNorm1d)
        if not isinstance(product, nn.Linear | nn.Conv2d) or not fits or len(before.users) != 1:
            continue
        if before in alone and not (isinstance(product, nn.Linear) and _rank(before) != 2):
            traced.set_submodule(str(before.target), folded(plain(product, {}), norm))  # type: ignore[arg-type]
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.recompile()


def compact_graph(traced: fx.GraphModule, tensors: list[Tensor]) -> list[Units]:
    """Cut what is dead out of products, norms and depthwise filters of a graph; what was cut, by layer."""
    ShapeProp(traced).propagate(*tensors)
    fold_norms(traced)
    return _Dead(traced).cut()


class _Dead:
    """The units of a graph: which are tied, which are read, which are zero."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced, self.alone = traced, _alone(traced)
        self.root: list[int] = []  # of each unit another that it is tied to, or itself
        self.pinned: set[int] = set()
        self.moved: set[int] = set()  # units that are not zero though their products are
        self.of: dict[fx.Node, list[int]] = {}  # the units of a node's result, along axis 1
        self.products: list[tuple[fx.Node, Product]] = []
        self.passing: list[tuple[fx.Node, nn.Module]] = []  # norms and depthwise filters
        for node in traced.graph.nodes:
            self._visit(node)

    def find(self, unit: int) -> int:
        while self.root[unit] != unit:
            self.root[unit] = self.root[self.root[unit]]
            unit = self.root[unit]
        return unit

    def _new(self, many: int) -> list[int]:
        first = len(self.root)
        self.root += range(first, first + many)
        return [*range(first, first + many)]

    def _visit(self, node: fx.Node) -> None:
        shape = _shape(node)
        sources = [self.of.get(source) for source in node.all_input_nodes]
        module = layer_of(self.traced, node)
        if module is None and node.op == "call_module" and len(node.args) == 1:
            module = self.traced.get_submodule(str(node.target))
        units = self._through(node, module, sources, shape)
        if units is None:
            for source in sources:
                self.pinned.update(source or ())
            if shape is not None and len(shape) in (2, 4):
                units = self._new(shape[1])
                self.pinned.update(units)
        if units is not None:
            self.of[node] = units

    def _through(
        self,
        node: fx.Node,
        module: nn.Module | None,
        sources: list[list[int] | None],
        shape: tuple[int, ...] | None,
    ) -> list[int] | None:
        """The units of a result whose ways are known; None: whatever reaches this node stays."""
        known = shape is not None and len(shape) in (2, 4) and bool(sources)
        if not known or shape is None or any(source is None for source in sources):
            return None
        first = sources[0]
        assert first is not None
        own = node in self.alone
        if isinstance(module, nn.Linear | nn.Conv2d) and len(sources) == 1:
            if not own or (isinstance(module, nn.Linear) and len(shape) != 2):
                return None
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                if not module.groups == module.in_channels == module.out_channels:
                    return None
                self.passing.append((node, module))
                self.moved.update(first if module.bias is not None and bool(module.bias.any()) else ())
                return first
            self.products.append((node, module))
            return self._new(shape[1])
        if isinstance(module, Norm) and own:
            self.passing.append((node, module))
            self.moved.update(first)
            return first
        if isinstance(module, nn.Flatten):
            return [unit for unit in first for _ in range(shape[1] // len(first))]
        if isinstance(module, (nn.ReLU, *POINTWISE, *POOLS)):
            self.moved.update(first if isinstance(module, MOVED) else ())
            return first
        if _is_mean(node) or (node.target in POOLING and len(sources) == 1):
            return first
        if node.op in ("call_function", "call_method") and node.target in JOINS:
            return self._joined(node, [s for s in sources if s is not None])
        if node.op == "call_function" and node.target in (torch.cat, torch.concat):
            axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            parts = node.args[0] if node.args else None
            if axis == 1 and isinstance(parts, list | tuple) and all(part in self.of for part in parts):
                return [unit for part in parts for unit in self.of[part]]
        return None

    def _joined(self, node: fx.Node, sources: list[list[int]]) -> list[int] | None:
        """Of a sum or a product of images of the same channels; a number alone changes what zero is."""
        if len(sources) != 2 or len(sources[0]) != len(sources[1]) or len(node.args) != 2:
            self.moved.update(unit for source in sources for unit in source)
            return sources[0] if len(sources) == 1 and not node.kwargs else None
        ranks = {len(_shape(source) or ()) for source in node.all_input_nodes}
        if len(ranks) != 1:
            return None
        for a, b in zip(*sources, strict=True):
            self.root[self.find(a)] = self.find(b)
        return sources[0]

    def cut(self) -> list[Units]:
        pinned, moved = ({self.find(u) for u in units} for units in (self.pinned, self.moved))
        dead = self._zero(moved) | self._unread(pinned)
        dead = {unit for unit in dead if unit not in pinned}
        for units in self.of.values():  # torch wants a channel everywhere
            if units and all(self.find(u) in dead for u in units):
                dead.discard(self.find(units[0]))
        found = []
        for node, module in self.products:
            keep_in = self._kept(self.of[node.all_input_nodes[0]], dead)
            keep_out = self._kept(self.of[node], dead)
            if not (keep_in.all() and keep_out.all()):
                found.append(_counts(node, keep_in, keep_out))
                self._set(node, _narrow(module, keep_in, keep_out))
        for node, passing in self.passing:
            keep = self._kept(self.of[node], dead)
            if not keep.all():
                self._set(node, _narrow_passing(passing, keep))
        self.traced.recompile()
        return found

    def _set(self, node: fx.Node, module: nn.Module) -> None:
        self.traced.set_submodule(str(node.target), module.eval())

    def _kept(self, units: list[int], dead: set[int]) -> Tensor:
        return torch.tensor([self.find(u) not in dead for u in units], dtype=torch.bool, device="cpu")

    def _zero(self, moved: set[int]) -> set[int]:
        """Units that are zero whatever the input: their products read nothing, and no bias is added."""
        zero: set[int] = set()
        while True:
            alive, made = {self.find(u) for u in self.pinned}, set()
            for node, module in self.products:
                there = module.weight.detach() != 0
                there[:, ~self._kept(self.of[node.all_input_nodes[0]], zero).to(there.device)] = False
                still = there.flatten(1).any(1)
                if module.bias is not None:
                    cut = all(isinstance(layer_of(self.traced, user), nn.ReLU) for user in node.users)
                    still |= module.bias > 0 if cut else module.bias != 0
                units = [self.find(u) for u in self.of[node]]
                made.update(units)
                alive.update(u for u, yes in zip(units, still.tolist(), strict=True) if yes)
            found = made - alive - moved
            if found == zero:
                return zero
            zero = found

    def _unread(self, pinned: set[int]) -> set[int]:
        """Units that no product needs for a unit that is needed."""
        needed = set(pinned)
        while True:
            more = set(needed)
            for node, module in self.products:
                there = (
                    module.weight.detach()[~self._kept(self.of[node], needed).to(module.weight.device)] != 0
                )
                read = there.movedim(1, 0).flatten(1).any(1).tolist()
                inner = self.of[node.all_input_nodes[0]]
                more.update(self.find(u) for u, yes in zip(inner, read, strict=True) if yes)
            if more == needed:
                return {self.find(u) for units in self.of.values() for u in units} - needed
            needed = more


POOLING: tuple[Callable[..., Any], ...] = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


def _alone(traced: fx.GraphModule) -> set[fx.Node]:
    """Calls of modules that nothing else calls or reads."""
    calls: dict[nn.Module, list[fx.Node]] = {}
    shared: set[int] = set()
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(traced.get_submodule(str(node.target)), []).append(node)
        elif node.op == "get_attr":
            value: Any = traced
            for word in str(node.target).split("."):
                value = getattr(value, word)
            shared.add(id(value))
    held: dict[int, int] = {}
    for module in traced.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                held[id(parameter)] = held.get(id(parameter), 0) + 1
    return {
        nodes[0]
        for module, nodes in calls.items()
        if len(nodes) == 1
        and not any(id(p) in shared or held[id(p)] > 1 for p in module.parameters(recurse=False))
    }


def _is_mean(node: fx.Node) -> bool:
    """Over the pixels."""
    if node.target not in ("mean", torch.mean) or _rank(node.all_input_nodes[0]) != 4:
        return False
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return isinstance(axes, list | tuple) and {*axes} in ({2, 3}, {-1, -2})


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else None


def _rank(node: fx.Node) -> int:
    return len(_shape(node) or ())


def _counts(node: fx.Node, keep_in: Tensor, keep_out: Tensor) -> Units:
    name = str(node.target).removeprefix("model.")
    return Units(name, (len(keep_in), int(keep_in.sum())), (len(keep_out), int(keep_out.sum())))


def _narrow(module: Product, keep_in: Tensor, keep_out: Tensor) -> Product:
    weight = _some(module.weight, keep_out)[:, keep_in.to(module.weight.device)].contiguous()
    return rebuilt(module, weight, None if module.bias is None else _some(module.bias, keep_out))


def _narrow_passing(module: nn.Module, keep: Tensor) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        weight, bias = _some(module.weight, keep), None if module.bias is None else _some(module.bias, keep)
        module.groups = len(weight)
        return rebuilt(module, weight, bias)
    assert isinstance(module, Norm)
    new = type(module)(int(keep.sum()), module.eps, affine=False)
    for name in ("running_mean", "running_var"):
        new._buffers[name] = _some(getattr(module, name), keep)
    for name in ("weight", "bias"):
        old = getattr(module, name)
        new._parameters[name] = None if old is None else nn.Parameter(_some(old, keep), requires_grad=False)
    return new


def _some(t: Tensor, keep: Tensor) -> Tensor:
    return t.detach()[keep.to(t.device)].contiguous()
