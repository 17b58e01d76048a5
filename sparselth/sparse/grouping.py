"""Which nodes of a graph are joined: chains of layers, and the sums, products and means between them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Container, Mapping
from math import prod
from typing import Any

import torch
from torch import fx, nn

from sparselth.sparse.forms.stage import activation_of
from sparselth.sparse.forms.table import Formed
from sparselth.sparse.joined import Joined
from sparselth.sparse.programs import Step
from sparselth.sparse.segment import Segment
from sparselth.sparse.tracing import layer_of, mean_at

SUMS = operator.add, torch.add, "add", operator.iadd, "add_"
PRODUCTS = operator.mul, torch.mul, "mul", operator.imul, "mul_"
IN_PLACE = operator.iadd, "add_", operator.imul, "mul_"


def join(traced: fx.GraphModule, plans: Mapping[Segment, list[Formed]]) -> fx.GraphModule | None:
    """A graph in which segments that have a plan in one layout stand together; None where no two do."""
    new = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    done: set[fx.Node] = set()
    for node in [*new.graph.nodes]:
        if node not in done and _segment(new, node, plans):
            group = _Group(new, plans, node)
            if group.members:
                done |= {*group.members}
                group.replace(f"joined{len(done)}")
    if not done:
        return None
    new.delete_all_unused_submodules()
    new.recompile()
    return new


class _Group:
    """Nodes that compute one value of one other: the longest stretch from a segment on, or none."""

    def __init__(self, graph: fx.GraphModule, plans: Mapping[Segment, list[Formed]], start: fx.Node) -> None:
        self.graph, self.plans = graph, plans
        self.source = start.all_input_nodes[0]
        self.values = {self.source: 0}
        first = _segment(graph, start, plans)
        assert first is not None
        self.shapes: dict[fx.Node, tuple[int, ...]] = {self.source: plans[first][0].place.before}
        self.segments: list[Segment] = []
        self.steps: list[Step] = []
        order = [*graph.graph.nodes]
        nodes = [node for node in order[order.index(start) :] if self._takes(node)]
        while nodes and not self._closed(nodes, order):
            nodes.pop()
        self.members = nodes
        self.steps = self.steps[: len(nodes)]
        used = {step.segment for step in self.steps if step.segment is not None}
        self.segments = self.segments[: len(used)]
        if len(used) < 2:
            self.members = []

    def _takes(self, node: fx.Node) -> bool:
        """Whether it is of the group; if so, its step is noted."""
        given = node.all_input_nodes
        if not given or any(source not in self.values for source in given):
            return False
        found = self._single(node, given[0]) if len(given) == 1 else self._pair(node)
        if found is None:
            return False
        step, self.shapes[node] = found
        self.steps.append(step)
        self.values[node] = step.value
        return True

    def _single(self, node: fx.Node, given: fx.Node) -> tuple[Step, tuple[int, ...]] | None:
        """Its step and its shape, if it reads one value, perhaps twice."""
        value, sources, shape = len(self.steps) + 1, (self.values[given],), self.shapes[given]
        segment = _segment(self.graph, node, self.plans)
        if segment is not None:
            plan = self.plans[segment]
            if plan[0].place.before != shape:
                return None
            self.segments.append(segment if segment.plan is plan else Segment(plan))
            return Step(value, sources, len(self.segments) - 1), plan[-1].place.after
        if node.args == (given, given):
            return self._pair(node)
        kept = mean_at(self.graph, node) if len(shape) == 3 else None
        if kept is not None:
            return Step(value, sources, does="mean" if kept else "flat mean"), (*shape[:1], *[1, 1] * kept)
        if not sources[0] or len(given.users) > 1:  # what may be changed in place, or seen as another
            return None
        layer = layer_of(self.graph, node)  # torch.fx writes F.relu(x, inplace=False)
        if isinstance(layer, nn.Flatten) and prod(shape[1:]) == 1:
            return Step(value, sources, does="flat"), shape[:1]
        activation = activation_of(layer)
        return None if activation == "none" else (Step(value, sources, activation=activation), shape)

    def _pair(self, node: fx.Node) -> tuple[Step, tuple[int, ...]] | None:
        """Of a sum of two, or of images times single pixels."""
        if node.kwargs or len(node.args) != 2:
            return None
        one, other = node.args
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            return None
        if node.target in IN_PLACE and (not self.values[one] or len(one.users) > 1):
            return None
        value, shape, more = len(self.steps) + 1, self.shapes[one], self.shapes[other]
        if node.target in SUMS and shape == more:
            return Step(value, (self.values[one], self.values[other])), shape
        if node.target in PRODUCTS and len(shape) == len(more) == 3 and shape[0] == more[0]:
            for gate, images in ((other, one), (one, other)):
                if prod(self.shapes[gate][1:]) == 1:
                    sources = self.values[gate], self.values[images]
                    return Step(value, sources, does="scale"), self.shapes[images]
        return None

    def _closed(self, nodes: list[fx.Node], order: list[fx.Node]) -> bool:
        """Whether others read the last of them alone, and nobody else what comes in while they compute."""
        inside = {*nodes}
        between = order[order.index(nodes[0]) : order.index(nodes[-1])]
        if any(user in between and user not in inside for user in self.source.users):
            return False
        return all(user in inside for node in nodes[:-1] for user in node.users)

    def replace(self, name: str) -> None:
        self.graph.add_submodule(name, Joined(self.segments, self.steps))
        last = self.members[-1]
        with self.graph.graph.inserting_after(last):
            new = self.graph.graph.call_module(name, (self.source,))
        last.replace_all_uses_with(new)
        for node in reversed(self.members):
            self.graph.graph.erase_node(node)


def _segment(graph: fx.GraphModule, node: fx.Node, plans: Mapping[Segment, list[Formed]]) -> Segment | None:
    """What a node calls, if it has a plan."""
    found: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, Segment) and found in plans else None


def calls(node: fx.Node, targets: Container[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets
