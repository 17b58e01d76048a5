"""A decoder's blocks for one new token as one program: what `tokens` joins, and the attention between.

With one token, calls from Python and the copies of what is past take longer than attention itself. Where a
graph goes from one group of joined tokens to the next through attention alone (heads cut out of what they
give, keys and values put behind those of the past), all of it becomes one list of calls, and heads are places
in memory. More tokens than one go the way of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparselth.kernels.token_attention import TokenAttention, follows
from sparselth.sparse.network import InColumns
from sparselth.sparse.tokens import VIEWS, JoinedTokens, Part, Program, Step, Values, calls

JOINS = {torch.cat, torch.concat, torch.concatenate}
NOTHING: dict[str, tuple[Any, ...]] = {  # arguments of torch's attention that ask for nothing
    "attn_mask": (None,),
    "dropout_p": (0,),
    "is_causal": (False,),
    "enable_gqa": (False,),
}
Result = tuple[int, int | None]  # see JoinedDecoder


@dataclass(frozen=True)
class Attention(Step):
    """Of queries, keys and values in three values; one after the other in each pair of what is past."""

    heads: int = 1
    width: int = 1  # of a head
    places: tuple[tuple[int, int], ...] = ()  # of q, k, v: the first number, and from one head to the next
    scale: float | None = None


class JoinedDecoder(JoinedTokens):
    """Steps on one token [..., K], with attention among them.

    It takes as many tokens as there are `widths`, then the past keys and values of each attention, then what
    `apart` reads besides: the graph that it stands for, with the same results. `order` says which: (value,
    axes before its features), or (i, None) for keys (i even) and values of attention i // 2.
    """

    def __init__(
        self,
        apart: fx.GraphModule,
        parts: list[Part],
        steps: list[Step],
        widths: list[int],
        order: list[Result],
    ) -> None:
        nn.Module.__init__(self)
        self.apart, self.steps, self.widths = apart, steps, widths
        self.parts = parts  # type: ignore[assignment]  # whose modules `apart` has
        self.order, self.outputs = order, [value for value, axes in order if axes is not None]
        self.turned: list[int] = []
        self.attentions = [step for step in steps if isinstance(step, Attention)]
        self._link()
        self.eval()

    def _link(self) -> None:
        super()._link()
        self.run = InColumns(partial(DecoderProgram, self))

    def forward(self, *xs: Tensor) -> Any:
        n = len(self.widths)
        tokens, past = xs[:n], xs[n : n + 2 * len(self.attentions)]
        lead = tokens[0].shape[:-1]
        if lead.numel() != 1 or not all(
            x.shape == (*lead, width) and x.dtype == torch.float32 and x.is_cpu
            for x, width in zip(tokens, self.widths, strict=True)
        ):
            return self.apart(*xs)
        pairs = [*zip(past[::2], past[1::2], strict=True)]
        for step, (keys, values) in zip(self.attentions, pairs, strict=True):
            if not follows((1, step.heads, 1, step.width), keys, values):
                return self.apart(*xs)
        if self._changed():
            self._link()
        rows = [x.reshape(1, -1) for x in tokens]
        found, new = self.run(*rows, *past)
        ready = iter(found)
        return [new[i] if axes is None else next(ready).view(*[1] * axes, -1) for i, axes in self.order]


class DecoderProgram(Program):
    """The steps bound to rooms for one token; what is past is given to each run."""

    def __init__(self, of: JoinedDecoder, tokens: int) -> None:
        self.bound: list[TokenAttention] = []
        self.new: list[Tensor] = []
        super().__init__(of, tokens)

    def _made(self, step: Step, xs: list[Tensor]) -> Tensor:
        if not isinstance(step, Attention):
            return super()._made(step, xs)
        h, d = step.heads, step.width
        q, k, v = (
            x.as_strided((1, h, 1, d), (h * d, apart, d, 1), first)
            for x, (first, apart) in zip(xs, step.places, strict=True)
        )
        room = self._take(h * d)
        self.bound.append(TokenAttention(q, k, v, room.view(1, 1, h, d).transpose(1, 2), step.scale))
        self.calls.append(self.bound[-1].run)
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


def join_decoder(graph: fx.GraphModule, tensors: Iterable[Tensor]) -> None:
    """Make one node of all groups of joined tokens between which there is nothing but attention."""
    values = Values(graph)
    values.run(*tensors)
    nodes = [*graph.graph.nodes]
    joined = [node for node in nodes if _is_joined(graph, node)]
    if len(joined) < 2:
        return
    first, last = (nodes.index(joined[i]) for i in (0, -1))
    while nodes[last + 1].target is operator.getitem and nodes[last + 1].args[0] is joined[-1]:
        last += 1
    stretch = _Stretch(graph, values, nodes[first : last + 1])
    if stretch.understood():
        stretch.replace("joined_decoder")


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

    def understood(self) -> bool:
        """Whether all of it can be steps, which it finds."""
        for node in [*self.inside]:  # what needs nothing of it may come before it
            quiet = node in self.values.numbers or calls(node, VIEWS)
            if quiet and not any(source in self.inside for source in node.all_input_nodes):
                next(iter(self.inside)).prepend(node)
                del self.inside[node]
        attentions = {node: joins_of(node, self.values.shapes) for node in self.inside}
        joins = {join for pair in attentions.values() for join in pair}
        for node in self.inside:
            for source in node.args if _is_joined(self.graph, node) else ():
                self._given(source)
        self.at |= self.given
        for node in self.inside:
            if _is_joined(self.graph, node):
                right = self._tokens(node)
            elif attentions[node]:
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
        return once and bool(self.past) and all(node in self.results for node in read)

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
        self.results[node] = value, len(self.values.shapes[node]) - 1

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

    def _attention(self, node: fx.Node, joins: list[fx.Node]) -> bool:
        (past_keys, k), (past_values, v) = map(_halves, joins)
        if past_keys in self.inside or past_values in self.inside:
            return False
        places, sources = list[tuple[int, int]](), list[int]()
        one = self.values.shapes[k]
        for part in (node.args[0], k, v):
            found = self._laid(part)
            if found is None or found[0] not in self.at:
                return False
            root, lie = found
            heads = lie.reshape(one[1], one[3])
            first, apart = int(heads[0, 0]), int(heads[-1, 0] - heads[0, 0]) // max(1, one[1] - 1)
            rows = torch.arange(one[1], device="cpu")[:, None] * apart
            if not torch.equal(heads, first + rows + torch.arange(one[3], device="cpu")):
                return False
            places.append((first, apart))
            sources.append(self.at[root])
        scale: Any = node.kwargs.get("scale")
        step = Attention(self._number(), tuple(sources), None, one[1], one[3], tuple(places), scale)
        self.steps.append(step)
        self.at[node] = step.value
        self.results |= {join: (len(self.past) + i, None) for i, join in enumerate(joins)}
        self.past += [past_keys, past_values]
        return True

    def _laid(self, node: Any) -> tuple[fx.Node, Tensor] | None:
        """What it is a view of, and which numbers of that one token it has where; None if that is unknown."""
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
        numel = torch.Size(shape).numel()
        if not known or not shape or (node not in self.at and shape[-1] != numel):
            return None
        return node, torch.arange(numel, device="cpu").view(shape)

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
        widths = [self.values.shapes[node][-1] for node in self.given]
        order = [self.results[node] for node in self.read]
        apart = fx.GraphModule(self.graph, inner)
        module = JoinedDecoder(apart, self.parts, self.steps, widths, order)
        self.graph.add_submodule(name, module)
        last = next(reversed(self.inside))
        with graph.inserting_after(last):
            call = last = graph.call_module(name, tuple(outside))
        for i, node in enumerate(self.read):
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, i))
            node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in self.inside)
        for node in reversed(self.inside):
            graph.erase_node(node)
        self.graph.delete_all_unused_submodules()
        self.graph.recompile()


def _is_joined(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), JoinedTokens)


def _in_order(lie: Tensor) -> bool:
    return torch.equal(lie.flatten(), torch.arange(lie.numel(), device="cpu"))


def joins_of(node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> list[fx.Node]:
    """What makes keys and values of an attention, if it is one of a single new token; else []."""
    more = {name: value for name, value in node.kwargs.items() if name != "scale"}
    plain = all(value in NOTHING.get(name, ()) for name, value in more.items())
    if node.target is not F.scaled_dot_product_attention or len(node.args) != 3 or not plain:
        return []
    joins = [node for node in node.args[1:] if isinstance(node, fx.Node) and _halves(node)]
    q, scale = node.args[0], node.kwargs.get("scale")
    if len({*joins}) != 2 or not isinstance(q, fx.Node) or isinstance(scale, fx.Node):
        return []
    (keys, k), (values, v) = map(_halves, joins)
    past, one = shapes.get(keys, ()), shapes.get(q, ())
    alike = past == shapes.get(values) and one == shapes.get(k) == shapes.get(v)
    return joins if alike and len(one) == len(past) == 4 and one[::2] == (1, 1) else []


def _halves(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two tensors [B, H, S, D] that it puts one behind the other, along S; () if it does not."""
    if node.op != "call_function" or node.target not in JOINS or not node.args:
        return ()
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if axis not in (2, -2) or node.kwargs.keys() - {"dim"} or not isinstance(parts, list | tuple):
        return ()
    found = tuple(part for part in parts if isinstance(part, fx.Node))
    return found if len(found) == len(parts) == 2 else ()
