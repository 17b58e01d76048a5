"""What a transformer computes between two attentions as one program, features-major from end to end.

Linear layers, norms, activations, sums and products work on each token by itself. One by one each is a call
from Python, and each linear layer lays its tokens features-major and back; here those that follow each other
are one list of calls on memory of its own, with as many inputs and outputs as the rest of the network has for
it: tokens change layout where they come in and where they leave.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from sparselth.kernels.step_parts import Call, bind_columns, bind_rows, sequence
from sparselth.kernels.token_parts import bind_add, bind_layer_norm, bind_multiply, bind_rms_norm
from sparselth.sparse.compaction import is_hooked
from sparselth.sparse.forms.stage import columns
from sparselth.sparse.forms.table import Formed
from sparselth.sparse.grouping import IN_PLACE, PRODUCTS, SUMS, calls
from sparselth.sparse.network import InColumns
from sparselth.sparse.norms import is_square, name_norms
from sparselth.sparse.parts import InParts
from sparselth.sparse.segment import Segment

Part: TypeAlias = Segment | nn.LayerNorm | nn.RMSNorm
NORMS = (nn.LayerNorm, nn.RMSNorm)
VIEWS = {
    *(operator.getitem, "view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous"),
    *("unbind", "chunk", "split", "squeeze", "unsqueeze", torch._assert, torch.flatten, torch.reshape),
    *(torch.chunk, torch.split, torch.unbind, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
}


@dataclass(frozen=True)
class Step:
    """What makes a value of others; values by number, what comes in first.

    A part has one source; without one two sources make a sum, or a product.
    """

    value: int
    sources: tuple[int, ...]
    part: int | None = None
    product: bool = False


class JoinedTokens(nn.Module):
    """Steps on tokens [..., K]; gives the values `outputs`, one alone as it is.

    `widths` are those of what comes in. What others than such modules do not read is `turned`: given
    features-major, as it lies.
    """

    def __init__(
        self, parts: list[Part], steps: list[Step], widths: list[int], outputs: list[int], turned: list[int]
    ) -> None:
        super().__init__()
        self.parts, self.steps, self.widths = nn.ModuleList(parts), steps, widths
        self.outputs, self.turned = outputs, turned
        self._link()
        self.eval()

    def _link(self) -> None:
        self.segments = [(part, part.plan) for part in self.parts if isinstance(part, Segment)]
        norms = [part._parameters for part in self.parts if isinstance(part, NORMS)]
        self.vectors = [
            (held, name, t.data_ptr()) for held in norms for name, t in held.items() if t is not None
        ]
        self.run: InColumns | InParts = InColumns(partial(Program, self))

    def _changed(self) -> bool:
        """Whether other weights were loaded than calls are bound to."""
        if any(part.plan is not plan for part, plan in self.segments):
            return True
        return any(held[name].data_ptr() != at for held, name, at in self.vectors)  # type: ignore[union-attr]

    def forward(self, *xs: Tensor) -> Any:
        """Of [..., K]s; what is not as many tokens in fp32 on a CPU goes through the parts one by one."""
        lead, rows = xs[0].shape[:-1], list[Tensor]()
        for x, width in zip(xs, self.widths, strict=True):
            if x.shape[:-1] != lead or x.shape[-1] != width or x.dtype != torch.float32 or not x.is_cpu:
                return self._apart(xs)
            rows.append(x.reshape(-1, width))
        if not len(rows[0]):
            return self._apart(xs)
        if self._changed():
            self._link()
        found = [y.view(*lead, -1) for y in self.run(*rows)]
        return found if len(found) > 1 else found[0]

    def _apart(self, xs: tuple[Tensor, ...]) -> Any:
        values = dict(enumerate(xs))
        for step in self.steps:
            sources = [values[source] for source in step.sources]
            of_two = operator.mul if step.product else operator.add
            values[step.value] = of_two(*sources) if step.part is None else self.parts[step.part](*sources)
        found = [values[value] for value in self.outputs]
        return found if len(found) > 1 else found[0]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("run", "segments", "vectors")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()


class Program:
    """The steps bound to rooms [features, tokens or more]; each is taken again when nobody reads it."""

    def __init__(self, of: JoinedTokens, tokens: int) -> None:
        self.tokens, self.parts, self.calls = tokens, of.parts, list[Call]()
        self.free: defaultdict[int, list[Tensor]] = defaultdict(list)
        rooms = {i: columns(width, tokens) for i, width in enumerate(of.widths)}
        self.given = [self._view(room) for room in rooms.values()]
        last = {source: i for i, step in enumerate(of.steps) for source in step.sources}
        last |= dict.fromkeys(of.outputs, len(of.steps))
        for i, step in enumerate(of.steps):
            xs = [rooms[source] for source in step.sources]
            ends = [source for source in {*step.sources} if last[source] == i]
            if step.part is None and len(xs) == 2:
                rooms[step.value] = rooms[ends[0]] if ends else self._take(len(xs[0]))
                a, b, y = map(self._view, (*xs, rooms[step.value]))
                self.calls.append((bind_multiply if step.product else bind_add)(a, b, y))
            else:
                rooms[step.value] = self._made(step, xs)
            for source in ends:
                if rooms[source] is not rooms[step.value]:
                    self._leave(rooms[source])
        self.found = [rooms[value] for value in of.outputs]
        self.turned = [value in of.turned for value in of.outputs]
        self.rows = [x.view(1, -1) for x in self.given] if tokens == 1 else []
        self.turns_in = [bind_columns(x) for x in self.given]
        self.turns_out = [bind_rows(self._view(y)) for y in self.found]
        self.run = sequence(self.calls)

    def _made(self, step: Step, xs: list[Tensor]) -> Tensor:
        """The room that calls of a step with a part fill from room x."""
        assert step.part is not None
        part, x = self.parts[step.part], xs[0]
        if isinstance(part, NORMS):
            y = self._take(len(x))
            self.calls.append(bind_norm(part, self._view(x), self._view(y)))
            return y
        assert isinstance(part, Segment)
        for i, form in enumerate(part.plan):
            y = x if form.made.in_place else self._take(prod(form.place.after))
            self.calls += form.call(self._view(x), self._view(y))
            if i and y is not x:
                self._leave(x)
            x = y
        return x

    def _take(self, features: int) -> Tensor:
        free = self.free[features]
        return free.pop() if free else columns(features, self.tokens)

    def _leave(self, room: Tensor) -> None:
        self.free[len(room)].append(room)

    def _view(self, room: Tensor) -> Tensor:
        return room[:, : self.tokens]

    def fill(self, *xs: Tensor) -> None:
        """From [tokens, K]s, one a source."""
        if self.tokens == 1:
            for x, given in zip(xs, self.rows, strict=True):
                given.copy_(x)
            return
        for x, given, turn in zip(xs, self.given, self.turns_in, strict=True):
            if x.is_contiguous():
                turn(x)
            else:
                given.copy_(x.t())

    def result(self) -> Any:
        """[tokens, N]s, in memory of their own; of a single token as it lies."""
        if self.tokens == 1:
            return [room.clone() for room in self.found]
        ys = list[Tensor]()
        for room, turn, turned in zip(self.found, self.turns_out, self.turned, strict=True):
            if turned:
                ys.append(self._view(room.clone()).t())
            else:
                ys.append(torch.empty(self.tokens, len(room), dtype=torch.float32, device="cpu"))
                turn(ys[-1])
        return ys


def bind_norm(part: nn.Module, x: Tensor, y: Tensor) -> Call:
    """One of NORMS on [features, tokens]."""
    assert isinstance(part, NORMS)
    weight = None if part.weight is None else part.weight.detach()
    if isinstance(part, nn.LayerNorm):
        return bind_layer_norm(x, weight, None if part.bias is None else part.bias.detach(), y, part.eps)
    return bind_rms_norm(x, weight, y, torch.finfo(torch.float32).eps if part.eps is None else part.eps)


def join_tokens(
    traced: fx.GraphModule, plans: Mapping[Segment, list[Formed]], tensors: Iterable[Tensor]
) -> fx.GraphModule | None:
    """A graph in which what works on tokens and has a plan in columns stands together; None where none does.

    `tensors`: inputs of the graph.
    """
    new = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    values = Values(new)
    values.run(*tensors)
    name_norms(new, values)
    groups = [group for group in _groups(new, values, plans) if group.pays]
    if not groups:
        return None
    made: dict[Segment, Segment] = {}
    for i, group in enumerate(groups):
        group.replace(f"joined_tokens{i}", made)
    for group in groups:
        group.turn()
    new.delete_all_unused_submodules()
    new.recompile()
    return new


class Values(fx.Interpreter):
    """What the nodes of a graph give: shapes of tensors in fp32 on a CPU, and which give no tensor at all."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.numbers: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.is_cpu and value.dim():
            self.shapes[n] = tuple(value.shape)
        if isinstance(value, int | float | torch.Size) and self._is_of_shapes(n):
            self.numbers[n] = value
        return value

    def _is_of_shapes(self, n: fx.Node) -> bool:
        """Whether a number depends on shapes alone, not on what is in tensors."""
        return asks_shape(n) or all(source in self.numbers for source in n.all_input_nodes)


def asks_shape(node: fx.Node) -> bool:
    """Whether it gives the shape of a tensor, or numbers of it."""
    if calls(node, (getattr,)):
        return node.args[1] in ("shape", "ndim")
    return calls(node, ("size", "dim", "numel", "ndimension", "nelement", "__len__"))


class _Group:
    """Nodes that become one: each reads others of them, or what is known before the first of them."""

    def __init__(self, graph: fx.GraphModule, values: Values, plans: Mapping[Segment, list[Formed]]) -> None:
        self.graph, self.values, self.plans = graph, values, plans
        self.members: dict[fx.Node, None] = {}  # in order
        self.behind: dict[fx.Node, None] = {}  # views and shapes of them
        self.between: list[fx.Node] = []  # those of them that stand before the last member
        self.results: list[fx.Node] = []

    @property
    def pays(self) -> bool:
        products = any(isinstance(self._part(node), Segment) for node in self.members)
        read = any(user not in self.members for node in self.members for user in node.users)
        return products and read and len(self.members) > 1

    def takes(self, node: fx.Node) -> bool:
        """Whether it can be one of these."""
        shape, sources = self.values.shapes.get(node), node.all_input_nodes
        if shape is None or node.kwargs or any(source in self.behind for source in sources):
            return False
        if any(source not in self.values.shapes or source.op == "get_attr" for source in sources):
            return False
        first = next(iter(self.members), node)
        if shape[:-1] != self.values.shapes[first][:-1]:
            return False
        if (len(node.args) == 1 and self._part(node) is not None) or is_square(node):
            return True
        if not calls(node, (*SUMS, *PRODUCTS)) or len(node.args) != 2:
            return False
        if not all(isinstance(arg, fx.Node) for arg in node.args):
            return False
        alone = sources[0] in self.members and len(sources[0].users) == 1
        same = all(self.values.shapes[source] == shape for source in sources)
        return same and (alone or not calls(node, IN_PLACE))

    def _part(self, node: fx.Node) -> Part | None:
        """What a node calls, if it is a layer on tokens that has calls in columns."""
        found = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(found, Segment) and found in self.plans:
            return found
        if isinstance(found, NORMS) and type(found) in NORMS and len(found.normalized_shape) == 1:
            return None if is_hooked(found) else found
        return None

    def replace(self, name: str, made: dict[Segment, Segment]) -> None:
        """One node for all; `made`: segments of plans in columns."""
        given = [*dict.fromkeys(s for n in self.members for s in n.all_input_nodes if s not in self.members)]
        numbers = {node: i for i, node in enumerate([*given, *self.members])}
        parts, steps = list[Part](), list[Step]()
        for node in self.members:
            part = self._part(node)
            if isinstance(part, Segment):
                plan = self.plans[part]
                part = part if part.plan is plan else made.setdefault(part, Segment(plan, part.tokens))
            parts += [part] if part else []
            factors = [node.args[0]] * 2 if is_square(node) else node.args
            sources = tuple(numbers[source] for source in factors)  # type: ignore[index]
            at = len(parts) - 1 if part else None
            steps.append(Step(numbers[node], sources, at, product=calls(node, PRODUCTS) or is_square(node)))
        read = [node for node in self.members if any(user not in self.members for user in node.users)]
        widths = [self.values.shapes[source][-1] for source in given]
        self.module = JoinedTokens(parts, steps, widths, [numbers[node] for node in read], [])
        self.graph.add_submodule(name, self.module)
        graph, last = self.graph.graph, next(reversed(self.members))
        with graph.inserting_after(last):
            call = last = graph.call_module(name, tuple(given))
        self.results = [call]
        if len(read) > 1:
            self.results = []
            for i in range(len(read)):
                with graph.inserting_after(last):
                    last = graph.call_function(operator.getitem, (call, i))
                self.results.append(last)
        for node in self.between:
            last.append(node)
            last = node
        for node, result in zip(read, self.results, strict=True):
            node.replace_all_uses_with(result)
            self.values.shapes[result] = self.values.shapes[node]
        for node in reversed(self.members):
            graph.erase_node(node)

    def turn(self) -> None:
        """Results that such nodes alone read, and nobody else but for their shapes, stay features-major."""
        for value, result in zip(self.module.outputs, self.results, strict=True):
            if all(self._takes_turned(user) for user in result.users):
                self.module.turned.append(value)

    def _takes_turned(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.graph.get_submodule(str(node.target)), JoinedTokens)
        return asks_shape(node)


def _groups(graph: fx.GraphModule, values: Values, plans: Mapping[Segment, list[Formed]]) -> Iterable[_Group]:
    """Of nodes between which nothing is but views of them, and numbers."""
    group = _Group(graph, values, plans)
    for node in graph.graph.nodes:
        quiet = node.op in ("placeholder", "get_attr") or node in values.numbers or calls(node, VIEWS)
        if not group.takes(node) and not quiet:
            yield group
            group = _Group(graph, values, plans)
        if group.takes(node):
            group.members[node], group.between = None, [*group.behind]
        elif any(source in group.members or source in group.behind for source in node.all_input_nodes):
            group.behind[node] = None
    yield group
