"""A transformer's blocks as one program: what `tokens` joins, and the attention between.

Where a graph goes from one group of joined tokens to the next through attention alone, heads cut out of what
they give, all of it becomes one list of calls, and heads are places in memory: tokens stay features-major
from the first block to the last. So it is for the tokens of sequences that attend to each other, and for a
decoder's one new token, whose keys and values are put behind those of the past. Tokens of other shapes than
the example's go the way of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparselth.kernels.self_attention import bind_self_attention
from sparselth.kernels.token_attention import TokenAttention, follows
from sparselth.sparse.network import InColumns
from sparselth.sparse.parts import InParts
from sparselth.sparse.tokens import VIEWS, JoinedTokens, Part, Program, Step, Values, calls

JOINS = {torch.cat, torch.concat, torch.concatenate}
NAMES = "query", "key", "value", "attn_mask", "dropout_p", "is_causal"  # arguments of torch's attention
NOTHING: dict[str, Any] = {"attn_mask": None, "dropout_p": 0, "is_causal": False, "enable_gqa": False}
Result = tuple[int, tuple[int, ...] | None]  # see JoinedBlocks


@dataclass(frozen=True)
class Attention(Step):
    """Of queries, keys and values in three values, among the tokens of each sequence.

    `past`: of one token, whose keys and values stand behind those of a pair of what is past.
    """

    heads: int = 1
    width: int = 1  # of a head
    places: tuple[tuple[int, int], ...] = ()  # of q, k, v: the first feature, and from one head to the next
    scale: float | None = None
    tokens: int = 1  # of a sequence
    causal: bool = False
    past: bool = False


class JoinedBlocks(JoinedTokens):
    """Steps on tokens, with attention among them.

    It takes tokens of the shapes `given`, then the past keys and values of each attention that has a past,
    then what `apart` reads besides: the graph that it stands for, with the same results. `order` says which:
    (value, its axes before the features), or (i, None) for keys (i even) and values of pair i // 2.
    """

    in_parts = False  # whether each sequence goes through all steps by itself

    def __init__(
        self,
        apart: fx.GraphModule,
        parts: list[Part],
        steps: list[Step],
        given: list[tuple[int, ...]],
        order: list[Result],
    ) -> None:
        nn.Module.__init__(self)
        self.apart, self.steps, self.given = apart, steps, given
        self.widths = [shape[-1] for shape in given]
        self.parts = parts  # type: ignore[assignment]  # whose modules `apart` has
        self.order, self.outputs = order, [value for value, axes in order if axes is not None]
        self.turned: list[int] = []
        self.attentions = [step for step in steps if isinstance(step, Attention)]
        self.behind = [step for step in self.attentions if step.past]
        self._link()
        self.eval()

    def _link(self) -> None:
        super()._link()
        make = partial(BlocksProgram, self)
        self.run = InParts(make, self.attentions[0].tokens, _together) if self.in_parts else InColumns(make)

    def take_parts(self) -> bool:
        """From now on each sequence goes through all steps by itself, as `sparse.parts` has it.

        False where there is but one, or sequences of several lengths.
        """
        tokens, lengths = prod(self.given[0][:-1]), {step.tokens for step in self.attentions}
        parted = len(lengths) == 1 and tokens > self.attentions[0].tokens
        self.in_parts = parted
        self._link()
        return parted

    def forward(self, *xs: Tensor) -> Any:
        n = len(self.given)
        tokens, past = xs[:n], xs[n : n + 2 * len(self.behind)]
        if not all(
            x.shape == shape and x.dtype == torch.float32 and x.is_cpu
            for x, shape in zip(tokens, self.given, strict=True)
        ):
            return self.apart(*xs)
        pairs = [*zip(past[::2], past[1::2], strict=True)]
        for step, (keys, values) in zip(self.behind, pairs, strict=True):
            if not follows((1, step.heads, 1, step.width), keys, values):
                return self.apart(*xs)
        if self._changed():
            self._link()
        rows = [x.reshape(-1, width) for x, width in zip(tokens, self.widths, strict=True)]
        found, new = self.run(*rows, *past)
        ready = iter(found)
        return [new[i] if axes is None else next(ready).view(*axes, -1) for i, axes in self.order]


def _together(parts: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The results of several programs one behind the other."""
    return [torch.cat(ys) for ys in zip(*(found for found, _ in parts), strict=True)], []


class BlocksProgram(Program):
    """The steps bound to rooms; what is past is given to each run."""

    def __init__(self, of: JoinedBlocks, tokens: int) -> None:
        self.bound: list[TokenAttention] = []
        self.new: list[Tensor] = []
        super().__init__(of, tokens)

    def _made(self, step: Step, xs: list[Tensor]) -> Tensor:
        if not isinstance(step, Attention):
            return super()._made(step, xs)
        h, d, n = step.heads, step.width, self.tokens
        room = self._take(h * d)
        if step.past:
            q, k, v = (
                x.as_strided((1, h, 1, d), (h * d, apart, d, 1), first)
                for x, (first, apart) in zip(xs, step.places, strict=True)
            )
            self.bound.append(TokenAttention(q, k, v, room.view(1, 1, h, d).transpose(1, 2), step.scale))
            self.calls.append(self.bound[-1].run)
            return room
        q, k, v, y = (
            x.as_strided((h, d, n), (apart * x.stride(0), x.stride(0), 1), first * x.stride(0))
            for x, (first, apart) in zip([*xs, room], [*step.places, (0, d)], strict=True)
        )
        self.calls.append(bind_self_attention(q, k, v, y, step.tokens, step.scale, step.causal))
        return room

    def fill(self, *xs: Tensor) -> None:
        past = xs[len(self.given) :]
        super().fill(*xs[: len(self.given)])
        pairs = zip(self.bound, past[::2], past[1::2], strict=True)
        self.new = [new for attention, keys, values in pairs for new in attention.follow(keys, values)]

    def result(self) -> Any:
        """Values, and keys and values of each attention in turn."""
        new, self.new = self.new, []
        for attention in self.bound:
            attention.leave()
        return super().result(), new


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
    stretch = _Stretch(graph, values, nodes[nodes.index(first) : end + 1])
    understood = stretch.understood()
    if understood:
        stretch.replace(f"joined_blocks{sum(1 for _ in graph.children())}")
    return understood


class _Stretch:
    """Nodes that follow each other, as steps."""

    def __init__(self, graph: fx.GraphModule, values: Values, nodes: list[fx.Node]) -> None:
        self.graph, self.values = graph, values
        self.inside = dict.fromkeys(nodes)
        self.given: dict[fx.Node, int] = {}  # tokens from outside, by the number of their value
        self.past: list[fx.Node] = []
        self.steps, self.parts = list[Step](), list[Part]()
        self.at: dict[fx.Node, int] = {}  # values of nodes
        self.results: dict[fx.Node, Result] = {}  # what others may read
        self.read: list[fx.Node] = []  # by others
        self.several: dict[fx.Node, list[int]] = {}  # values of the groups that give more than one
        self.heads: dict[fx.Node, tuple[int, ...]] = {}  # [B, H, T, D] of attentions
        self.lead = values.shapes[nodes[0].all_input_nodes[0]][:-1]  # axes before the features

    def understood(self) -> bool:
        """Whether all of it can be steps, which it finds."""
        for node in [*self.inside]:  # what needs nothing of it may come before it
            quiet = node in self.values.numbers or calls(node, VIEWS)
            if quiet and not any(source in self.inside for source in node.all_input_nodes):
                next(iter(self.inside)).prepend(node)
                del self.inside[node]
        attentions = {node: found for node in self.inside if (found := _read(node, self.values.shapes))}
        joins = {join for found in attentions.values() for join in found.joins}
        for node in self.inside:
            for source in node.args if _is_joined(self.graph, node) else ():
                self._given(source)
        self.at |= self.given
        for node in self.inside:
            if _is_joined(self.graph, node):
                right = self._tokens(node)
            elif node in attentions:
                right = self._attention(node, attentions[node])
            elif (of := self._group(node)) in self.several:
                assert of is not None
                self._give(node, self.several[of][node.args[1]])  # type: ignore[index]
                right = True
            else:
                right = node in joins or node in self.values.numbers or calls(node, VIEWS)
            if not right:
                return False
        read = [node for node in self.inside if any(user not in self.inside for user in node.users)]
        self.read = read
        once = len({*self.given, *self.past}) == len(self.given) + len(self.past)
        return once and bool(attentions) and all(node in self.results for node in read)

    def _given(self, node: Any) -> None:
        """Note what it is made of, if that comes from outside."""
        found = self._laid(node)
        if found and found[0] not in self.inside:
            self.given.setdefault(found[0], len(self.given))

    def _group(self, node: fx.Node) -> fx.Node | None:
        """Of whose results it is one."""
        return node.all_input_nodes[0] if node.target is operator.getitem else None

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
            found = self._laid(source)
            if found is None or found[0] not in self.at or not _in_order(found[1]):
                return False
            numbers[i] = self.at[found[0]]
        for step in module.steps:
            numbers[step.value] = self._number()
            part = None if step.part is None else step.part + len(self.parts)
            self.steps.append(Step(numbers[step.value], tuple(numbers[s] for s in step.sources), part))
        self.parts += [part for part in module.parts if isinstance(part, Part)]
        outputs = [numbers[value] for value in module.outputs]
        if len(outputs) == 1:
            self._give(node, outputs[0])
        else:
            self.several[node] = outputs
        return True

    def _attention(self, node: fx.Node, read: _Read) -> bool:
        if any(past in self.inside for past in read.past):
            return False
        places, sources = list[tuple[int, int]](), list[int]()
        for part in read.parts:
            found = self._laid(part)
            if found is None or found[0] not in self.at:
                return False
            root, lie = found
            place = _place(lie, self.values.shapes[root][-1])
            if place is None:
                return False
            places.append(place)
            sources.append(self.at[root])
        _, heads, tokens, width = lie.shape
        step = Attention(
            *(self._number(), tuple(sources), None),
            heads=heads,
            width=width,
            places=tuple(places),
            scale=read.scale,
            tokens=tokens,
            causal=read.causal,
            past=bool(read.past),
        )
        self.steps.append(step)
        self.at[node] = step.value
        self.heads[node] = lie.shape
        self.results |= {join: (len(self.past) + i, None) for i, join in enumerate(read.joins)}
        self.past += read.past
        return True

    def _laid(self, node: Any) -> tuple[fx.Node, Tensor] | None:
        """What it is a view of, and which numbers of those tokens it has where; None if that is unknown."""
        if not isinstance(node, fx.Node):
            return None
        known = node in self.at or node not in self.inside or self._group(node) in self.several
        if not known and calls(node, VIEWS):
            found = self._laid(node.args[0])
            others = [n for n in node.all_input_nodes if n is not node.args[0]]
            if found is None or any(n not in self.values.numbers for n in others):
                return None
            args, kwargs = fx.map_arg((node.args[1:], node.kwargs), self.values.numbers.__getitem__)
            does = node.target if callable(node.target) else getattr(Tensor, node.target)
            try:
                return found[0], does(found[1], *args, **kwargs)
            except RuntimeError:  # a view of what lies in another way
                return None
        shape = self.values.shapes.get(node, ())
        if not known or not shape or (node not in self.at and not self._is_tokens(shape)):
            return None
        if node in self.heads:  # side by side
            b, h, s, d = self.heads[node]
            return node, _count(b, s, h, d).transpose(1, 2)
        return node, _count(*shape)

    def _is_tokens(self, shape: tuple[int, ...]) -> bool:
        """Of a single one the axes before its features are 1, as many as there may be."""
        return shape[:-1] == self.lead or prod((*shape[:-1], *self.lead)) == 1

    def replace(self, name: str) -> None:
        """One node for all."""
        graph = self.graph.graph
        outside = dict.fromkeys((*self.given, *self.past))
        outside |= dict.fromkeys(
            s for node in self.inside for s in node.all_input_nodes if s not in self.inside
        )
        inner = fx.Graph()
        new = {node: inner.placeholder(f"x{i}") for i, node in enumerate(outside)}
        for node in self.inside:
            new[node] = inner.node_copy(node, new.__getitem__)
        inner.output([new[node] for node in self.read])
        given = [self.values.shapes[node] for node in self.given]
        order = [self.results[node] for node in self.read]
        apart = fx.GraphModule(self.graph, inner)
        module = JoinedBlocks(apart, self.parts, self.steps, given, order)
        self.graph.add_submodule(name, module)
        last = next(reversed(self.inside))
        with graph.inserting_after(last):
            call = last = graph.call_module(name, tuple(outside))
        for i, node in enumerate(self.read):
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, i))
            node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in self.inside)
            self.values.shapes[last] = self.values.shapes[node]
        for node in reversed(self.inside):
            graph.erase_node(node)


def _is_joined(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and type(graph.get_submodule(str(node.target))) is JoinedTokens


def _count(*shape: int) -> Tensor:
    return torch.arange(prod(shape), device="cpu").view(shape)


def _in_order(lie: Tensor) -> bool:
    return torch.equal(lie.flatten(), _count(lie.numel()))


def _place(lie: Tensor, features: int) -> tuple[int, int] | None:
    """The first feature of heads [B, H, T, D], and from one head to the next; None: they lie otherwise."""
    b, h, t, d = lie.shape
    if not lie.numel():
        return None
    heads = lie[0, :, 0, 0]
    first, apart = int(heads[0]), int(heads[-1] - heads[0]) // max(1, h - 1)
    expected = _count(b, 1, t, 1) * features + _count(h, 1, 1) * apart + _count(d) + first
    return (first, apart) if torch.equal(lie, expected) else None


@dataclass(frozen=True)
class _Read:
    """What an attention reads."""

    parts: tuple[fx.Node, ...]  # queries, keys and values of new tokens
    past: list[fx.Node]  # keys and values before them
    joins: list[fx.Node]  # what puts new ones behind those
    scale: float | None
    causal: bool


def _read(node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> _Read | None:
    """Of an attention among tokens, or of one token behind its past; None: it is none, or asks for more."""
    if node.target is not F.scaled_dot_product_attention or len(node.args) > len(NAMES):
        return None
    given: dict[str, Any] = dict(zip(NAMES, node.args, strict=False)) | node.kwargs
    parts = tuple(given.pop(name, None) for name in NAMES[:3])
    scale, causal = given.pop("scale", None), given.pop("is_causal", False)
    more = any(value != NOTHING.get(name, value) or name not in NOTHING for name, value in given.items())
    if more or not isinstance(causal, bool) or isinstance(scale, fx.Node):
        return None
    if not all(isinstance(part, fx.Node) for part in parts):
        return None
    query, keys, values = parts
    if not _halves(keys) and not _halves(values):
        alike = len(shapes.get(query, ())) == 4 and len({shapes.get(part) for part in parts}) == 1
        return _Read(parts, [], [], scale, causal) if alike else None
    if causal or keys is values or not _halves(keys) or not _halves(values):
        return None
    (past_keys, k), (past_values, v) = map(_halves, (keys, values))
    past, one = shapes.get(past_keys, ()), shapes.get(query, ())
    alike = past == shapes.get(past_values) and one == shapes.get(k) == shapes.get(v)
    if not alike or not len(one) == len(past) == 4 or one[::2] != (1, 1):
        return None
    return _Read((query, k, v), [past_keys, past_values], [keys, values], scale, causal)


def _halves(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two tensors [B, H, S, D] that it puts one behind the other, along S; () if it does not."""
    if node.op != "call_function" or node.target not in JOINS or not node.args:
        return ()
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if axis not in (2, -2) or node.kwargs.keys() - {"dim"} or not isinstance(parts, list | tuple):
        return ()
    found = tuple(part for part in parts if isinstance(part, fx.Node))
    return found if len(found) == len(parts) == 2 else ()
