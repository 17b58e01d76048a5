"""Steps of a joined network bound to memory: one list of calls, on images features-major or in planes."""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels.plane_parts import bind_activate, bind_plane_means, bind_scale_planes
from sparselth.kernels.sparse_conv2d import Slices
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import Call, is_native, sequence
from sparselth.sparse.forms.stage import activated, columns, image, with_activation
from sparselth.sparse.forms.table import Formed
from sparselth.sparse.network import Bound

Plans = list[list[Formed]]


@dataclass(frozen=True)
class Step:
    """What makes a value of others; values by number, 0 comes in.

    A segment has one source; one with two computes of the first and adds to the second. Without a segment it
    is what it `does`: the "sum" of two, or of one for the activation behind it; "scale", the first, of one
    pixel, times the second; the "mean" of each plane as one pixel, or as [B, C] the "flat mean"; "flat", one
    pixel as [B, C].
    """

    value: int
    sources: tuple[int, ...]
    segment: int | None = None
    does: str = "sum"
    activation: str = "none"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(with_activation(state))

    @property
    def fills(self) -> bool:
        """Whether its value has memory of its own; else it is the last source, changed."""
        return len(self.sources) == 1 and (self.segment is not None or self.does.endswith("mean"))


class Program(Bound):
    """The steps bound to memory, which is taken again as soon as nobody reads it any more.

    Images lie features-major, in a room [features, B or more] or in slices.
    """

    def __init__(self, plans: Plans, steps: list[Step], batch: int) -> None:
        self.batch = batch
        self.free: defaultdict[Hashable, list[Any]] = defaultdict(list)
        calls, ops, before = list[Call](), scheduled(steps, plans), plans[0][0].place.before
        last = {source: i for i, step in enumerate(ops) for source in step.sources}
        readers = _readers(ops, plans)
        parted = _parted(ops, plans)
        shapes, rooms = {0: before}, {0: self._take(before, readers.get(0))}
        x = rooms[0]
        for i, step in enumerate(ops):
            plan = [] if step.segment is None else plans[step.segment]
            *others, given = step.sources  # what is added to, or changed
            kept = step.fills or last[given] > i or (len(plan) == 1 and given in others)
            after = shapes[step.value] = plan[-1].place.after if plan else _shape(step, shapes[given])
            in_parts = step.value in parted
            rooms[step.value] = (
                self._take(after, readers.get(step.value), None, in_parts) if kept else rooms[given]
            )
            y = rooms[step.value]
            if kept and not step.fills:
                calls.append(partial(self._plain(y, after).copy_, self._plain(rooms[given], shapes[given])))
            if plan:
                calls += self._chain(plan, rooms[step.sources[0]], y, None if step.fills else step.activation)
            else:
                from_ = step.sources[0]
                calls += self._does(step, rooms[from_], shapes[from_], y, after)
                calls += self._activate(y, after, step.activation)
            for source in {*step.sources}:
                if last[source] == i and rooms[source] is not y:
                    self._leave(rooms[source])
        value, first = steps[-1].value, ops[0].segment
        once = ops[0].sources == (0,) and sum(0 in step.sources for step in ops) == 1
        reader = plans[first][0] if once and first is not None else None
        self._end(x, rooms[value], shapes[value], calls, reader)

    def _chain(self, forms: list[Formed], x: Any, y: Any, adds: str | None) -> list[Call]:
        """Forms one after the other from a room to another, which they fill or add to.

        `adds`: the activation behind that sum; None where there is none."""
        calls, taken = list[Call](), list[Any]()
        final = max(i for i, form in enumerate(forms) if not form.made.in_place)
        for i, form in enumerate(forms):
            given = x
            if i == final:
                x = y
            elif not form.made.in_place:
                in_parts = all(one.made.planes is not None for one in forms[i : i + 2])
                x = self._take(form.place.after, forms[i + 1], form, in_parts)
                taken.append(x)
            calls += self._calls(form, given, x, adds if i == final else None)
        for room in taken:
            self._leave(room)
        return calls

    def _take(
        self,
        shape: tuple[int, ...],
        reader: Formed | None,
        writer: Formed | None = None,
        in_parts: bool = False,
    ) -> Any:
        """Room for images that `reader` reads and, within a chain, `writer` fills.

        `in_parts`: that convolutions on planes alone read and write.
        """
        if writer and reader and writer.made.slices and (slices := reader.made.slices):
            room = slices(self.batch)
            if room is not None:
                free = self.free[_key(room)]
                return free.pop() if free else room
        free = self.free[prod(shape)]
        return free.pop() if free else columns(prod(shape), self.batch)

    def _leave(self, room: Any) -> None:
        self.free[_key(room)].append(room)

    def _plain(self, room: Any, shape: tuple[int, ...]) -> Tensor:
        """As torch takes it."""
        return image(room, shape, self.batch)

    def _calls(self, form: Formed, x: Any, y: Any, adds: str | None) -> list[Call]:
        x, y = (
            room if isinstance(room, Slices) else image(room, shape, self.batch)
            for room, shape in ((x, form.place.before), (y, form.place.after))
        )
        calls: list[Call] = form.call(x, y) if adds is None else _added(form, x, y, adds)
        return calls

    def _does(
        self, step: Step, x: Any, before: tuple[int, ...], y: Any, after: tuple[int, ...]
    ) -> list[Call]:
        """What a step without a segment does to y, the memory of its last source or to be filled."""
        if step.does == "sum" and len(step.sources) == 2:
            images = self._plain(y, after)
            return [partial(torch.add, images, self._plain(x, before), out=images)]
        if step.does == "scale":
            return [self._scale(y, after, x, before)]
        return [self._mean(x, before, y)] if step.does.endswith("mean") else []

    def _scale(self, y: Any, after: tuple[int, ...], gate: Any, before: tuple[int, ...]) -> Call:
        return partial(self._plain(y, after).mul_, self._plain(gate, before))

    def _mean(self, x: Any, before: tuple[int, ...], y: Any) -> Call:
        means = self._plain(y, (before[0], 1, 1))
        return partial(torch.mean, self._plain(x, before), (1, 2), True, out=means)

    def _activate(self, y: Any, shape: tuple[int, ...], activation: str) -> list[Call]:
        return activated(self._plain(y, shape), activation)

    def _end(self, x: Any, y: Any, shape: tuple[int, ...], calls: list[Call], reader: Formed | None) -> None:
        """`reader`: the one that reads x and is the first of the calls; None where there are more."""
        super().__init__(x[:, : self.batch], y[:, : self.batch], shape, calls)


class InRows(Program):
    """Images in planes: what a convolution fills the next one reads as it is.

    Single pixels and what is no image lie side by side, [B, features]: for one image as forms in columns have
    them, for several they are turned around each of these.
    """

    def _take(
        self,
        shape: tuple[int, ...],
        reader: Formed | None,
        writer: Formed | None = None,
        in_parts: bool = False,
    ) -> Planes:
        if _is_single(shape):
            room = Planes.of(self.batch, shape[0], (1, 1), pitch=1)
        else:
            made = reader.made.planes(self.batch) if reader and reader.made.planes else None
            whole = made or Planes.of(self.batch, shape[0], (shape[1], shape[2]))
            parts = _native.threads() if in_parts and self.batch == 1 and whole.bare else 1
            fits = parts > 1 and shape[1] % parts == 0
            room = Planes.of(1, shape[0], (shape[1], shape[2]), parts=parts) if fits else whole
        free = self.free[_key(room)]
        return free.pop() if free else room

    def _plain(self, room: Any, shape: tuple[int, ...]) -> Tensor:
        plain: Tensor = room.images
        return plain

    def _calls(self, form: Formed, x: Any, y: Any, adds: str | None) -> list[Call]:
        if form.made.bind is not None:
            return form.made.bind(x, y) if adds is None else _added(form, x, y, adds)
        rows, more = (room.memory[:, :, 0] for room in (x, y))
        if self.batch == 1:
            here, there = (t.view(-1, 1) for t in (rows, more))
            return super()._calls(form, here, there, adds)
        here = columns(rows.shape[1], self.batch)
        there = here if y is x else columns(more.shape[1], self.batch)
        calls = super()._calls(form, here, there, adds)
        if not calls:  # nothing moves
            return []
        inner, outer = (t[:, : self.batch] for t in (here, there))
        first: list[Call] = [partial(inner.copy_, rows.t())]
        if adds is not None:
            first.append(partial(outer.copy_, more.t()))
        return [*first, *calls, partial(more.copy_, outer.t())]

    def _scale(self, y: Any, after: tuple[int, ...], gate: Any, before: tuple[int, ...]) -> Call:
        return bind_scale_planes(y, gate)

    def _mean(self, x: Any, before: tuple[int, ...], y: Any) -> Call:
        return bind_plane_means(x, y)

    def _activate(self, y: Any, shape: tuple[int, ...], activation: str) -> list[Call]:
        if activation == "none":
            return []
        if _is_single(shape):  # one row of all of them
            lines = y.memory.view(self.batch, 1, -1)
            y = Planes(lines, (1, lines.shape[2]), lines.shape[2], 0)
        return [bind_activate(y, activation)]

    def _end(self, x: Any, y: Any, shape: tuple[int, ...], calls: list[Call], reader: Formed | None) -> None:
        self.given, self.found, self.shape = x.images, y.images, (self.batch, *shape)
        self.read, self.held = _movable(calls[0], reader, self.given), self.given
        self.run = sequence(calls)

    def fill(self, x: Tensor) -> None:
        if self.read is None:
            self.given.copy_(x.view(self.given.shape))
            return
        self.held = x.contiguous()  # lives while it is read
        self.read.x = self.held.data_ptr()

    def result(self) -> Tensor:
        self.held = self.given
        found: Tensor = self.found
        if not found.is_contiguous():
            return found.contiguous().view(self.shape)
        y = torch.empty(self.shape, dtype=torch.float32, device="cpu")  # a clone takes long where it is cold
        ctypes.memmove(y.data_ptr(), found.data_ptr(), 4 * y.numel())
        return y


def _movable(call: Any, reader: Formed | None, x: Tensor) -> Any:
    """The arguments of a foreign call that copies what it reads from x, to read what lies as torch has it."""
    if reader is None or reader.made.bind is None or not is_native(call):
        return None
    if reader.made.planes and reader.made.planes(len(x)) is not None:  # read in place
        return None
    arguments, (_, c, h, w) = call.args[0]._obj, x.shape
    if arguments.x != x.data_ptr():
        return None
    arguments.x_image, arguments.x_channel, arguments.x_row = c * h * w, h * w, w
    return arguments


def _key(room: Any) -> Hashable:
    """What memory must have in common to be taken again."""
    if isinstance(room, Planes):
        return room.geometry
    return (*room.memory.shape, room.padding) if isinstance(room, Slices) else len(room)


def _added(form: Formed, x: Any, y: Any, activation: str) -> list[Call]:
    assert form.made.adds is not None
    return form.made.adds(x, y, activation)


def _is_single(shape: tuple[int, ...]) -> bool:
    """Whether it is that of [C, 1, 1] or [K]."""
    return prod(shape[1:]) == 1


def _shape(step: Step, given: tuple[int, ...]) -> tuple[int, ...]:
    """Of the value of a step without a segment."""
    if step.does == "mean":
        return given[0], 1, 1
    return given[:1] if step.does in ("flat", "flat mean") else given


def _readers(ops: list[Step], plans: Plans) -> dict[int, Formed | None]:
    """Of each value the first form of a segment that reads its memory, also once it was changed."""
    found: dict[int, Formed | None] = {}
    for step in reversed(ops):
        if step.segment is not None:
            found[step.sources[0]] = plans[step.segment][0]
        if not step.fills:
            found.setdefault(step.sources[-1], found.get(step.value))
    return found


def _parted(ops: list[Step], plans: Plans) -> set[int]:
    """Values whose memory convolutions on planes alone fill, add to and read."""
    found, root = set[int](), {0: 0}  # by the value that first had the memory
    last = {source: i for i, step in enumerate(ops) for source in step.sources}
    for i, step in enumerate(ops):
        plan = [] if step.segment is None else plans[step.segment]
        first, *others = step.sources
        root[step.value] = step.value if step.fills else root[step.sources[-1]]
        reads = bool(plan) and plan[0].made.planes is not None
        writes = bool(plan) and plan[-1].made.planes is not None
        if step.fills and writes:
            found.add(step.value)
        if not reads:
            found.discard(root[first])
        for source in others:
            copied = last[source] > i or (len(plan) == 1 and source == first)
            if not writes or copied:
                found.discard(root[source])
    found.discard(root[ops[-1].value])
    return {value for value, of in root.items() if of in found}


def scheduled(steps: list[Step], plans: Plans) -> list[Step]:
    """In their order; a sum and the activation behind it are one step with a segment that computes both."""
    made = {step.value: step for step in steps}
    readers = Counter(source for step in steps for source in step.sources)
    behind = {
        step.sources[0]: step for step in steps if step.activation != "none" and readers[step.sources[0]] == 1
    }
    merged, gone = dict[int, Step](), set[int]()
    for step in steps:
        sums = step.segment is None and step.does == "sum" and len(step.sources) == 2
        for one, other in (step.sources, step.sources[::-1]) if sums else ():
            by = made.get(one)
            alone = by is not None and by.segment is not None and readers[one] == 1
            if by is None or not alone or plans[by.segment or 0][-1].made.adds is None:
                continue
            end = behind.get(step.value, step)
            merged[step.value] = Step(
                end.value, (by.sources[0], other), by.segment, activation=end.activation
            )
            gone |= {one, end.value} - {step.value}
            break
    return [merged.get(step.value, step) for step in steps if step.value not in gone]
