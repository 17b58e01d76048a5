"""Which nodes of a graph become one program of blocks: groups of joined tokens, attention between them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparselth.sparse.blocks import Attention, HeadNorm, JoinedBlocks, Result, Rotary
from sparselth.sparse.compaction import is_hooked
from sparselth.sparse.grouping import calls
from sparselth.sparse.heads import Factor, Layout, Place, Turned, count, in_order, place
from sparselth.sparse.sdpa import Read, read_attention
from sparselth.sparse.tokens import NORMS, VIEWS, JoinedTokens, Part, Step, Values, asks_shape

# What may be computed earlier or again: it depends on what it is given alone, and changes nothing.
QUIET = {
    *(
        "abs",
        "add",
        "arange",
        "cat",
        "clamp",
        "concat",
        "cos",
        "div",
        "einsum",
        "eq",
        "exp",
        "expand",
        "float",
    ),
    *(
        "floordiv",
        "full",
        "ge",
        "gt",
        "index_select",
        "le",
        "lt",
        "matmul",
        "mul",
        "multiply",
        "narrow",
        "ne",
    ),
    *("neg", "ones", "outer", "polar", "pow", "reciprocal", "repeat", "repeat_interleave", "rsqrt", "select"),
    *("sin", "stack", "sub", "to", "truediv", "type_as", "view_as_complex", "view_as_real", "zeros"),
}


def join_blocks(graph: fx.GraphModule, tensors: Iterable[Tensor], in_parts: bool = False) -> bool:
    """Make one node of groups of joined tokens between which there is nothing but attention, as many as go.

    `in_parts`: and let sequences go through them one by one. Whether there are such.
    """
    values, found = Values(graph), False
    values.run(*tensors)
    left = [node for node in graph.graph.nodes if _is_joined(graph, node)]
    while len(left) > 1:
        ends = range(len(left), 1, -1)
        joined = next((end for end in ends if _join(graph, values, left[0], left[end - 1])), 0)
        found |= bool(joined)
        left = left[joined or 1 :]
    graph.delete_all_unused_submodules()
    graph.recompile()
    if in_parts:
        parted = [one.take_parts() for one in graph.modules() if isinstance(one, JoinedBlocks)]
        return any(parted)
    return found


def _join(graph: fx.GraphModule, values: Values, first: fx.Node, last: fx.Node) -> bool:
    """Whether the nodes from one group to another are one now."""
    nodes = [*graph.graph.nodes]
    end = nodes.index(last)
    group = graph.get_submodule(str(last.target))
    several = isinstance(group, JoinedTokens) and len(group.outputs) > 1
    while several and nodes[end + 1].target is operator.getitem and nodes[end + 1].args[0] is last:
        end += 1
    stretch = Stretch(graph, values, nodes[nodes.index(first) : end + 1])
    understood = stretch.understood()
    if understood:
        stretch.replace(f"joined_blocks{sum(1 for _ in graph.children())}")
    return understood


class Stretch:
    """Nodes that follow each other, as steps."""

    def __init__(self, graph: fx.GraphModule, values: Values, nodes: list[fx.Node]) -> None:
        self.graph, self.values = graph, values
        self.inside = dict.fromkeys(nodes)
        self.given: dict[fx.Node | Factor, int] = {}  # tokens from outside, by the number of their value
        self.past: list[fx.Node] = []
        self.steps, self.parts = list[Step](), list[Part]()
        self.at: dict[fx.Node, int] = {}  # values of nodes
        self.results: dict[fx.Node, Result] = {}  # what others may read
        self.read: list[fx.Node] = []  # by others
        self.several: dict[fx.Node, list[int]] = {}  # values of the groups that give more than one
        self.lead = values.shapes[nodes[0].all_input_nodes[0]][:-1]  # axes before the features
        self.attentions: dict[fx.Node, Read] = {}
        self.free: dict[fx.Node, None] = {}  # tensors inside that depend on nothing inside but shapes
        self.copies: dict[fx.Node, Any] = {}
        self.equal: dict[str, fx.Node] = {}  # one of each of them
        self.layout = Layout(
            values, lambda node: self._lie(node, node not in self.inside), tokens=prod(self.lead)
        )

    def understood(self) -> bool:
        """Whether all of it can be steps, which it finds."""
        for node in [*self.inside]:  # what needs nothing of it may come before it
            if any(n in self.inside for n in node.all_input_nodes) or _is_joined(self.graph, node):
                continue
            if not _is_quiet(node, self.values):  # it could change what is behind it
                return False
            next(iter(self.inside)).prepend(node)
            del self.inside[node]
        numbers = self.values.numbers
        for node in self.inside:
            inner = [n for n in node.all_input_nodes if n in self.inside and n not in numbers]
            if node not in numbers and _is_quiet(node, self.values) and all(n in self.free for n in inner):
                self.free[node] = None
        for node in self.inside:
            if node.target is F.scaled_dot_product_attention:
                read = read_attention(node, self.values)
                if read is None:
                    return False
                self.attentions[node] = read
        for node in self.inside:
            for source in node.args if _is_joined(self.graph, node) else ():
                laid = self.layout.plain(source)
                if laid and laid[0] not in self.inside:
                    self.given.setdefault(laid[0], len(self.given))
        self.layout = Layout(
            self.values, lambda node: self._lie(node, node in self.given), self._same, prod(self.lead)
        )
        turned = dict[fx.Node, Turned | None]()
        for one in (one for read in self.attentions.values() for one in read.parts):
            of = turned[one] = self.layout.turned(one)
            if of is None and self.layout.plain(one) is None:
                return False  # before others are looked into: each is as many numbers as it has
            for factor in of.factors if of else ():
                self.given.setdefault(factor, len(self.given))
        self.at |= {node: number for node, number in self.given.items() if isinstance(node, fx.Node)}
        quiet = {node for read in self.attentions.values() for node in (*read.joins, *read.repeats)}
        for node in self.inside:
            if _is_joined(self.graph, node):
                right = self._tokens(node)
            elif node in self.attentions:
                right = self._attention(node, self.attentions[node], turned)
            elif part := self._norm_of_heads(node):
                right = self._head_norm(node, part)
            elif (of_node := self._group(node)) in self.several:
                assert of_node is not None
                self._give(node, self.several[of_node][node.args[1]])  # type: ignore[index]
                right = True
            else:
                right = node in quiet or node in self.values.numbers or calls(node, VIEWS)
                right = right or node in self.free or self.layout.known(node)
            if not right:
                return False
        self.read = [node for node in self.inside if any(user not in self.inside for user in node.users)]
        copied = all(self._is_static(f.node, quiet) for f in self.given if isinstance(f, Factor))
        once = copied and len({*self.given, *self.past}) == len(self.given) + len(self.past)
        return once and bool(self.attentions) and all(node in self.results for node in self.read)

    def _lie(self, node: fx.Node, outer: bool) -> Tensor | None:
        """Which of its own numbers a root has where; None: it is made of others."""
        shape = self.values.shapes.get(node, ())
        if not shape:
            return None
        if node in self.attentions:  # heads side by side
            b, h, s, d = shape
            return count(b, s, h, d).transpose(1, 2)
        if node in self.inside and self._norm_of_heads(node):
            found = self._normed(node)
            return None if found is None else found[3]
        of = self._group(node)
        inner = node in self.inside and (
            _is_joined(self.graph, node) or (of is not None and _is_joined(self.graph, of))
        )
        return count(*shape) if inner or (outer and self._is_tokens(shape)) else None

    def _norm_of_heads(self, node: fx.Node) -> nn.LayerNorm | nn.RMSNorm | None:
        """A norm that works on each head by itself."""
        part = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(part, NORMS) or type(part) not in NORMS or is_hooked(part) or len(node.args) != 1:
            return None
        return (
            part if len(part.normalized_shape) == 1 and len(self.values.shapes.get(node, ())) == 4 else None
        )

    def _normed(self, node: fx.Node) -> tuple[fx.Node, Place, int, Tensor] | None:
        """Of such a norm what it is of, where its heads are, how many, and which new numbers it has where."""
        found = self.layout.plain(node.args[0])
        for turned in (False, True) if found else ():  # heads before tokens, or behind them
            assert found is not None
            heads = found[1].transpose(1, 2) if turned else found[1]
            at = place(heads, self.layout.features(found[0]))
            if at and at.group == 1:
                b, h, t, d = heads.shape
                own = count(b, t, h, d)
                return found[0], at, h, own if turned else own.transpose(1, 2)
        return None

    def _head_norm(self, node: fx.Node, part: Part) -> bool:
        found = self._normed(node)
        if found is None or found[0] not in self.at:
            return False
        root, at, heads, _ = found
        self.steps.append(HeadNorm(self._number(), (self.at[root],), len(self.parts), place=at, heads=heads))
        self.at[node] = self.steps[-1].value
        self.parts.append(part)
        return True

    def _same(self, node: fx.Node) -> fx.Node:
        """The first that computes the same of the same, so that angles of every layer are computed once."""
        if node not in self.free:
            return node

        def text(n: fx.Node) -> Any:
            return self.values.numbers[n] if n in self.values.numbers and n in self.inside else self._same(n)

        key = f"{node.op} {node.target} {fx.map_arg((node.args, node.kwargs), lambda n: str(text(n)))}"
        return self.equal.setdefault(key, node)

    def _is_static(self, node: fx.Node, changing: set[fx.Node]) -> bool:
        """Whether it can be computed outside: no shape that it asks for is another one with another past."""
        left, seen = [node], {node}
        while left:
            one = left.pop()
            sources = [n for n in one.all_input_nodes if n in self.inside]
            if asks_shape(one):
                if any(source in changing for source in sources):
                    return False
            else:
                left += [n for n in sources if n not in seen]
                seen |= {*sources}
        return True

    def _copied(self, node: fx.Node, copies: dict[fx.Node, Any]) -> Any:
        """It outside, and what it is made of; a shape is that of the example."""
        if node not in self.inside:
            return node
        if node not in copies:
            if asks_shape(node):
                copies[node] = self.values.numbers[node]
            else:
                for source in node.all_input_nodes:
                    self._copied(source, copies)
                copies[node] = self.graph.graph.node_copy(node, lambda n: copies.get(n, n))
        return copies[node]

    def _group(self, node: fx.Node) -> fx.Node | None:
        """Of whose results it is one."""
        return node.all_input_nodes[0] if node.target is operator.getitem and node.all_input_nodes else None

    def _give(self, node: fx.Node, value: int) -> None:
        self.at[node] = value
        self.results[node] = value, self.values.shapes[node][:-1]

    def _number(self) -> int:
        return len(self.given) + len(self.steps)

    def _tokens(self, node: fx.Node) -> bool:
        module = self.graph.get_submodule(str(node.target))
        assert isinstance(module, JoinedTokens)
        numbers = dict[int, int]()
        for i, source in enumerate(node.args):
            found = self.layout.plain(source)
            if found is None or found[0] not in self.at or not in_order(found[1]):
                return False
            numbers[i] = self.at[found[0]]
        for step in module.steps:
            numbers[step.value] = self._number()
            part = None if step.part is None else step.part + len(self.parts)
            sources = tuple(numbers[source] for source in step.sources)
            self.steps.append(replace(step, value=numbers[step.value], sources=sources, part=part))
        self.parts += [part for part in module.parts if isinstance(part, Part)]
        outputs = [numbers[value] for value in module.outputs]
        if len(outputs) == 1:
            self._give(node, outputs[0])
        else:
            self.several[node] = outputs
        return True

    def _attention(self, node: fx.Node, read: Read, turned: dict[fx.Node, Turned | None]) -> bool:
        if any(past in self.inside for past in read.past):
            return False
        places, sources = list[Place](), list[int]()
        for part in read.parts:
            found = self._part(part, turned[part])
            if found is None:
                return False
            sources.append(found[0])
            places.append(found[1])
        _, heads, tokens, width = self.values.shapes[node]
        groups = [at.group for at in places]
        group = read.group or groups[1]
        if groups[0] != 1 or groups[1] != groups[2] or (read.group and groups[1] != 1):
            return False
        step = Attention(
            *(self._number(), tuple(sources), None),
            heads=heads,
            shared=heads // group,
            width=width,
            places=tuple(places),
            scale=read.scale,
            tokens=tokens,
            causal=read.causal,
            past=bool(read.past),
        )
        self.steps.append(step)
        self.at[node] = step.value
        self.results |= {join: (len(self.past) + i, None) for i, join in enumerate(read.joins)}
        self.past += read.past
        return True

    def _part(self, node: fx.Node, turned: Turned | None) -> tuple[int, Place] | None:
        """The value that queries, keys or values are of, and where in it."""
        if turned is None:
            found = self.layout.plain(node)
            if found is None or found[0] not in self.at:
                return None
            root, lie = found
            at = place(lie, self.layout.features(root))
            return None if at is None else (self.at[root], at)
        if turned.root not in self.at:
            return None
        sources = self.at[turned.root], *(self.given[factor] for factor in turned.factors)
        rotaries = (step for step in self.steps if isinstance(step, Rotary))
        made = next((step for step in rotaries if (step.sources, step.turn) == (sources, turned.turn)), None)
        if made is None:
            made = Rotary(self._number(), sources, None, turn=turned.turn)
            self.steps.append(made)
        return made.value, Place(0, len(turned.turn.first), turned.turn.place.group)

    def _is_tokens(self, shape: tuple[int, ...]) -> bool:
        """Of a single one the axes before its features are 1, as many as there may be."""
        return shape[:-1] == self.lead or prod((*shape[:-1], *self.lead)) == 1

    def replace(self, name: str) -> None:
        """One node for all."""
        graph, end = self.graph.graph, next(reversed(self.inside)).next
        nodes = dict[fx.Node | Factor, fx.Node]()
        for i, given in enumerate(self.given):
            if isinstance(given, Factor):
                nodes[given] = self._factor(f"{name}_factor{i}", given, end)
            else:
                nodes[given] = given
        outside = dict.fromkeys((*nodes.values(), *self.past))
        outside |= dict.fromkeys(
            s for node in self.inside for s in node.all_input_nodes if s not in self.inside
        )
        inner = fx.Graph()
        new = {node: inner.placeholder(f"x{i}") for i, node in enumerate(outside)}
        for node in self.inside:
            new[node] = inner.node_copy(node, new.__getitem__)
        inner.output([new[node] for node in self.read])
        shapes = [n.rows if isinstance(n, Factor) else self.values.shapes[n] for n in self.given]
        order = [self.results[node] for node in self.read]
        apart = fx.GraphModule(self.graph, inner)
        module = JoinedBlocks(apart, self.parts, self.steps, shapes, order)
        self.graph.add_submodule(name, module)
        with graph.inserting_before(end):
            call = last = graph.call_module(name, tuple(outside))
        for i, node in enumerate(self.read):
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, i))
            node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in self.inside)
            self.values.shapes[last] = self.values.shapes[node]
        for node in reversed(self.inside):
            graph.erase_node(node)

    def _factor(self, name: str, factor: Factor, end: fx.Node) -> fx.Node:
        """A node of its numbers."""
        self.graph.add_submodule(name, factor.module(self.values.shapes[factor.node]))
        with self.graph.graph.inserting_before(end):
            return self.graph.graph.call_module(name, (self._copied(factor.node, self.copies),))


def _is_joined(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and type(graph.get_submodule(str(node.target))) is JoinedTokens


def _is_quiet(node: fx.Node, values: Values) -> bool:
    """Whether nothing changes where it is computed earlier."""
    if node in values.numbers or calls(node, VIEWS) or node.op == "get_attr":
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return node.op in ("call_function", "call_method") and name in QUIET
