"""Linear layers whose outputs are cut in parts that go different ways, as a layer each.

Gated units often come out of one product, `gate, up = self.gate_up(x).chunk(2, -1)`. As two layers, each
takes its form with the activation behind it, and what follows is joined. Heads of an attention stay one
product: they are places in memory.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from sparselth.sparse.compaction import is_known, rebuilt
from sparselth.sparse.grouping import PRODUCTS, calls
from sparselth.sparse.tracing import layer_of

CUTS = {torch.chunk, "chunk", torch.split, "split"}


def split_products(traced: fx.GraphModule) -> None:
    """In place: a layer for each part of a product whose parts go through activations and products alone."""
    graph = traced.graph
    for node in [*graph.nodes]:
        layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        parts = _parts(traced, node, layer) if isinstance(layer, nn.Linear) else []
        if not parts:
            continue
        assert isinstance(layer, nn.Linear)
        (cut,) = node.users
        rows = _cut(cut, torch.arange(len(layer.weight), device="cpu"))
        for part in parts:
            i = part.args[1]
            assert isinstance(i, int)
            name = f"{str(node.target).replace('.', '_')}_{i}_{node.name}"
            bias = None if layer.bias is None else layer.bias.detach()[rows[i]]
            traced.add_submodule(name, rebuilt(layer, layer.weight.detach()[rows[i]], bias))
            with graph.inserting_before(cut):
                own = graph.call_module(name, node.args)
            part.replace_all_uses_with(own)
            graph.erase_node(part)
        graph.erase_node(cut)
        graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()


def _parts(traced: fx.GraphModule, node: fx.Node, layer: nn.Linear) -> list[fx.Node]:
    """What takes a part each, by number; none where the product is not cut so, or views are made of parts."""
    if not is_known(layer) or len(node.args) != 1 or node.kwargs or len(node.users) != 1:
        return []
    (cut,) = node.users
    if not calls(cut, CUTS) or cut.args[0] is not node or len(cut.all_input_nodes) != 1:
        return []
    axes = [*cut.args[2:], *(value for name, value in cut.kwargs.items() if name == "dim")]
    parts = [*cut.users]
    if axes != [-1] or any(part.target is not operator.getitem for part in parts):
        return []
    users = [user for part in parts for user in part.users]
    pointwise = all(calls(user, PRODUCTS) or layer_of(traced, user) is not None for user in users)
    return parts if pointwise else []


def _cut(cut: fx.Node, x: torch.Tensor) -> list[torch.Tensor]:
    """x in the parts that the columns of the product are cut into."""
    several: Any = cut.args[1] if len(cut.args) > 1 else next(v for k, v in cut.kwargs.items() if k != "dim")
    parts = torch.chunk(x, several) if cut.target in (torch.chunk, "chunk") else torch.split(x, several)
    return [*parts]
