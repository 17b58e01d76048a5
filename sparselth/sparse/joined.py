"""Chains of layers with sums and ReLUs between them, in one layout from end to end.

The branches of a residual network meet in sums. Each chain by itself lays its images features-major and back,
or its convolutions copy what they read; here chains, sums and ReLUs that reach each other are one list of
calls on memory of its own, features-major or in planes: images change layout where they come in and where
they leave, and a convolution adds to what lies where its result goes.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparselth.kernels.sparse_conv2d import Slices
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import Call, bind_bias_relu, sequence
from sparselth.sparse.forms.stage import columns, image
from sparselth.sparse.forms.table import Formed
from sparselth.sparse.network import Bound, InColumns
from sparselth.sparse.segment import Segment
from sparselth.sparse.tracing import layer_of

SUMS = operator.add, torch.add, "add", operator.iadd, "add_"
IN_PLACE = operator.iadd, "add_"
Plans = list[list[Formed]]


@dataclass(frozen=True)
class Step:
    """What makes a value of others; values by number, 0 comes in.

    A segment has one source, a ReLU too; two make a sum. A segment with two computes of the first and adds
    to the second.
    """

    value: int
    sources: tuple[int, ...]
    segment: int | None = None
    relu: bool = False


class Joined(nn.Module):
    """Steps on images [B, C, H, W]; the value of the last one is the result."""

    def __init__(self, segments: list[Segment], steps: list[Step]) -> None:
        super().__init__()
        self.segments, self.steps = nn.ModuleList(segments), steps
        self._link()
        self.eval()

    def _link(self) -> None:
        self.plans: Plans = [segment.plan for segment in self._parts()]
        forms = [form for plan in self.plans for form in plan]
        in_rows = all(form.made.bind for form in forms)
        self.bound = in_rows or all(form.in_columns for form in forms)
        self.run = InColumns(partial(InRows if in_rows else Program, self.plans, self.steps))

    def _parts(self) -> list[Segment]:
        return [one for one in self.segments if isinstance(one, Segment)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, P, Q]; images of another size go through the segments one by one."""
        parts = self._parts()
        if any(part.plan is not plan for part, plan in zip(parts, self.plans, strict=True)):
            self._link()  # other weights were loaded
        fits = x.is_cpu and x.dtype == torch.float32 and x.shape[1:] == self.plans[0][0].place.before
        if fits and len(x) and self.bound:
            y: Tensor = self.run(x)
            return y
        values = {0: x}
        for step in self.steps:
            y, *others = (values[source] for source in step.sources)
            y = parts[step.segment](y) if step.segment is not None else sum(others, y)
            values[step.value] = y.relu() if step.relu else y
        return values[self.steps[-1].value]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("run", "plans")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()


class Program(Bound):
    """The steps bound to memory, which is taken again as soon as nobody reads it any more.

    Images lie features-major, in a room [features, B or more] or in slices.
    """

    def __init__(self, plans: Plans, steps: list[Step], batch: int) -> None:
        self.batch = batch
        self.free: defaultdict[Hashable, list[Any]] = defaultdict(list)
        calls, ops, before = list[Call](), scheduled(steps, plans), plans[0][0].place.before
        last = {source: i for i, step in enumerate(ops) for source in step.sources}
        readers = {s.sources[0]: plans[s.segment][0] for s in reversed(ops) if s.segment is not None}
        shapes, rooms = {0: before}, {0: self._take(before, readers.get(0))}
        x = rooms[0]
        for i, step in enumerate(ops):
            plan = [] if step.segment is None else plans[step.segment]
            *others, given = step.sources  # what is added to, or changed
            fills = bool(plan) and not others
            kept = fills or last[given] > i or (len(plan) == 1 and given in others)
            after = shapes[step.value] = plan[-1].place.after if plan else shapes[given]
            rooms[step.value] = self._take(after, readers.get(step.value)) if kept else rooms[given]
            xs = [self._images(rooms[source], shapes[source]) for source in step.sources]
            y = self._images(rooms[step.value], after)
            if kept and not fills:
                calls.append(partial(self._plain(y).copy_, self._plain(xs[-1])))
            if plan:
                calls += self._chain(plan, xs[0], y, None if fills else step.relu)
            else:
                plain = self._plain(y)
                calls += [partial(torch.add, plain, self._plain(xs[0]), out=plain)] if others else []
                calls += [self._relu(y)] if step.relu else []
            for source in {*step.sources}:
                if last[source] == i and rooms[source] is not rooms[step.value]:
                    self._leave(rooms[source])
        value = steps[-1].value
        self._end(x, rooms[value], shapes[value], calls)

    def _chain(self, forms: list[Formed], x: Any, y: Any, adds: bool | None) -> list[Call]:
        """Forms one after the other; the last one fills y or, unless `adds` is None, adds to it.

        `adds`: whether a ReLU comes behind the sum."""
        calls, taken = list[Call](), list[Any]()
        for form, behind in pairwise(forms):
            taken.append(self._take(form.place.after, behind, form))
            z = self._images(taken[-1], form.place.after)
            calls += self._calls(form, x, z)
            x = z
        if adds is None:
            calls += self._calls(forms[-1], x, y)
        else:
            assert forms[-1].made.adds is not None
            calls += forms[-1].made.adds(x, y, adds)
        for room in taken:
            self._leave(room)
        return calls

    def _take(self, shape: tuple[int, ...], reader: Formed | None, writer: Formed | None = None) -> Any:
        """Room for images that `reader` reads and, within a chain, `writer` fills."""
        if writer and reader and writer.made.slices and (slices := reader.made.slices):
            room = slices(self.batch)
            if room is not None:
                free = self.free[_key(room)]
                return free.pop() if free else room
        free = self.free[prod(shape)]
        return free.pop() if free else columns(prod(shape), self.batch)

    def _leave(self, room: Any) -> None:
        self.free[_key(room)].append(room)

    def _images(self, room: Any, shape: tuple[int, ...]) -> Any:
        """As forms take them."""
        return room if isinstance(room, Slices) else image(room, shape, self.batch)

    def _plain(self, images: Any) -> Tensor:
        """As torch takes them."""
        plain: Tensor = images
        return plain

    def _calls(self, form: Formed, x: Any, y: Any) -> list[Call]:
        calls: list[Call] = form.call(x, y)
        return calls

    def _relu(self, y: Any) -> Call:
        return bind_bias_relu(y)

    def _end(self, x: Any, y: Any, shape: tuple[int, ...], calls: list[Call]) -> None:
        super().__init__(x[:, : self.batch], y[:, : self.batch], shape, calls)


class InRows(Program):
    """Images in planes: what a convolution fills the next one reads as it is."""

    def _take(self, shape: tuple[int, ...], reader: Formed | None, writer: Formed | None = None) -> Planes:
        room = reader.made.planes(self.batch) if reader and reader.made.planes else None
        channels, high, wide = shape
        room = room or Planes.of(self.batch, channels, (high, wide))
        free = self.free[_key(room)]
        return free.pop() if free else room

    def _images(self, room: Any, shape: tuple[int, ...]) -> Any:
        return room

    def _plain(self, images: Any) -> Tensor:
        plain: Tensor = images.images
        return plain

    def _calls(self, form: Formed, x: Any, y: Any) -> list[Call]:
        assert form.made.bind is not None
        return form.made.bind(x, y)

    def _relu(self, y: Any) -> Call:
        return self._plain(y).relu_

    def _end(self, x: Any, y: Any, shape: tuple[int, ...], calls: list[Call]) -> None:
        self.given, self.found = self._plain(x), self._plain(y)
        self.run = sequence(calls)

    def fill(self, x: Tensor) -> None:
        self.given.copy_(x)

    def result(self) -> Tensor:
        return self.found.clone(memory_format=torch.contiguous_format)


def _key(room: Any) -> Hashable:
    """What memory must have in common to be taken again."""
    if isinstance(room, Planes):
        return room.geometry
    return (*room.memory.shape, room.padding) if isinstance(room, Slices) else len(room)


def scheduled(steps: list[Step], plans: Plans) -> list[Step]:
    """In their order; a sum and its ReLU where a segment can compute them in one go are one step with it."""
    made = {step.value: step for step in steps}
    readers = Counter(source for step in steps for source in step.sources)
    rectified = {step.sources[0]: step.value for step in steps if step.relu and readers[step.sources[0]] == 1}
    merged, gone = dict[int, Step](), set[int]()
    for step in steps:
        pairs = (step.sources, step.sources[::-1]) if len(step.sources) == 2 else ()
        for one, other in pairs:
            by = made.get(one)
            alone = by is not None and by.segment is not None and readers[one] == 1
            if by is None or not alone or plans[by.segment or 0][-1].made.adds is None:
                continue
            value = rectified.get(step.value, step.value)
            merged[step.value] = Step(value, (by.sources[0], other), by.segment, value != step.value)
            gone |= {one, value} - {step.value}
            break
    return [merged.get(step.value, step) for step in steps if step.value not in gone]


def join(traced: fx.GraphModule, plans: Mapping[Segment, list[Formed]]) -> fx.GraphModule | None:
    """A graph in which segments that have a plan in columns stand together; None where no two of them do."""
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
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
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
        step: Step | None = None
        value = len(self.steps) + 1
        sources = tuple(self.values[s] for s in node.args if isinstance(s, fx.Node) and s in self.values)
        if not sources:
            return False
        relu = isinstance(layer_of(self.graph, node), nn.ReLU)  # torch.fx writes F.relu(x, inplace=False)
        if not relu and (node.kwargs or len(sources) != len(node.args)):
            return False
        first = node.args[0]
        assert isinstance(first, fx.Node)
        segment = _segment(self.graph, node, self.plans)
        if segment is not None:
            plan = self.plans[segment]
            if self.shapes.setdefault(first, plan[0].place.before) != plan[0].place.before:
                return False
            step = Step(value, sources, len(self.segments))
            self.segments.append(segment if segment.plan is plan else Segment(plan))
            self.shapes[node] = plan[-1].place.after
        elif len(sources) == 2 and node.target in SUMS:
            shapes = [self.shapes.get(s) for s in node.args if isinstance(s, fx.Node)]
            if shapes[0] != shapes[1] or (
                node.target in IN_PLACE and (not sources[0] or len(first.users) > 1)
            ):
                return False
            step = Step(value, sources)
        elif relu and sources[0] and len(first.users) == 1:
            step = Step(value, sources, relu=True)
        if step is None:
            return False
        self.steps.append(step)
        self.values[node] = value
        self.shapes.setdefault(node, self.shapes[first])
        return True

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
    """What a node calls, if it has a plan for images in columns."""
    found = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(found, Segment) or found not in plans:
        return None
    plan = plans[found]
    return found if len(plan[0].place.before) == len(plan[-1].place.after) == 3 else None
