"""Forms one after the other as one function, from batch first to batch first, layouts changed between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselth.kernels.sparse_conv2d import Slices
from sparselth.kernels.step_parts import Call, bind_columns, bind_rows, sequence
from sparselth.sparse.forms.stage import columns, image
from sparselth.sparse.forms.table import Formed

BATCHES = 4  # sizes for which buffers are kept


def network(plan: list[Formed]) -> Callable[[Tensor], Tensor]:
    """Batch first to batch first; forms in columns that follow each other are one chain."""
    steps: list[Callable[[Tensor], Tensor]] = []
    layout = "rows"
    for in_columns, group in groupby(plan, key=lambda form: form.in_columns):
        forms = list(group)
        if in_columns:
            steps.append(InColumns(partial(Chain, forms)))
            layout = "rows"
            continue
        for form in forms:
            if form.layout != layout:
                steps.append(partial(turn, layout=form.layout))
            steps.append(form.call)
            layout = form.gives
    if layout != "rows":
        steps.append(partial(turn, layout="rows"))

    if len(steps) == 1:
        return steps[0]

    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


def turn(x: Tensor, layout: str) -> Tensor:
    """The same numbers in the order in memory that rows, channels-last or turned have."""
    if layout == "channels-last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "turned":
        return x.t().contiguous().t()
    y = x.contiguous()
    if y is x and x.dim() == 4 and 1 in x.shape[1:]:  # in any order: torch is to see rows
        return x.view(-1).view(x.shape)
    return y


def bound(form: Formed, x: Tensor) -> tuple[Call, Callable[[], Tensor]]:
    """A call that computes this form on x, laid beforehand as it likes it, and one that gives y, too."""
    if not form.in_columns:
        run = partial(form.call, turn(x, form.layout))
        return run, run
    place, batch = form.place, len(x)
    here, there = (columns(prod(shape), batch, x.dtype) for shape in (place.before, place.after))
    given = image(here, place.before, batch)
    y = image(here if form.made.in_place else there, place.after, batch)
    calls = form.call(given, given if form.made.in_place else y)
    run_all = sequence(calls) if calls else _nothing
    given.copy_(x.movedim(0, -1))

    def result() -> Tensor:
        given.copy_(x.movedim(0, -1))
        run_all()
        return y.movedim(-1, 0).contiguous()

    return run_all, result


class Held(Protocol):
    """Memory for batches of one size, and what computes on it."""

    run: Call

    def fill(self, *args: Any, **kwargs: Any) -> None:
        """From batch first."""

    def result(self) -> Any:
        """Batch first, in memory of its own; one or several."""


class InColumns:
    """What `make(batch)` binds, on batches of any size; buffers are kept for the last few sizes.

    `fill` takes all that it is called with; the rows of the first are the batch.
    """

    def __init__(self, make: Callable[[int], Held]) -> None:
        self.make, self.lock = make, threading.Lock()
        self.chains: dict[tuple[int, int], Held] = {}

    def __call__(self, x: Tensor, *more: Tensor) -> Any:
        key = len(x), torch.get_num_threads()
        with self.lock:
            chain = self.chains.get(key)
            if chain is None:
                if len(self.chains) == BATCHES:
                    del self.chains[next(iter(self.chains))]
                with torch.inference_mode(False):  # or buffers could not be written outside of that mode
                    chain = self.chains[key] = self.make(len(x))
            chain.fill(x, *more)
            chain.run()
            return chain.result()


class Bound:
    """Calls in columns from x [K, B] to y [N, B], images of the shape `after`."""

    def __init__(self, x: Tensor, y: Tensor, after: tuple[int, ...], calls: list[Call]) -> None:
        self.x, self.y, self.shape = x, y, (y.shape[1], *after)
        self.turn_in, self.turn_out = bind_columns(self.x), bind_rows(self.y)
        self.run = sequence(calls) if calls else _nothing

    def fill(self, x: Tensor) -> None:
        self.turn_in(x if x.is_contiguous() else x.contiguous())

    def result(self) -> Tensor:
        """Batch first, in memory of its own."""
        y = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        self.turn_out(y)
        return y


class Chain(Bound):
    """Forms in columns, bound to two buffers that take turns; without forms, room for `shape`.

    What goes from one sparse convolution to the next has a place of its own, where it can be read as it is.
    """

    def __init__(self, forms: Sequence[Formed], batch: int, shape: tuple[int, ...] = ()) -> None:
        places = [form.place for form in forms]
        before, after = (places[0].before, places[-1].after) if places else (shape, shape)
        features = max(prod(shape) for shape in (before, *(place.after for place in places)))
        here, there = columns(features, batch), columns(features if places else 0, batch)
        first = here[: prod(before), :batch]
        calls: list[Call] = []
        slices: Slices | None = None  # where convolution follows convolution
        for i, (form, place) in enumerate(zip(forms, places, strict=True)):
            x = slices or _view(here, place.before, batch)
            room = forms[i + 1].made.slices if form.made.slices and i + 1 < len(forms) else None
            slices = room(batch) if room else None
            if slices:
                calls += form.call(x, slices)
            elif form.made.in_place:
                calls += form.call(x, x)
            else:
                calls += form.call(x, _view(there, place.after, batch))
                here, there = there, here
        super().__init__(first, here[: prod(after), :batch], after, calls)


def _view(memory: Tensor, shape: tuple[int, ...], batch: int) -> Tensor:
    return image(memory[: prod(shape)], shape, batch)


def _nothing() -> None:
    pass
