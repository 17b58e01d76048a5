"""One table of all forms, for CPU and CUDA; `convert`, `bench` and the tests read it.

A `Form` says its name, the layout of its activations, which stages it fits, and how it is made. Each file of
this folder registers a family; a file of a user's registers more, and then they are checked, timed, weighed
and chosen as all others are.

Layouts of the activations, and what the `call` of a form is given:
    rows           [B, K] or [B, C, H, W], as torch has them: x -> y
    channels-last  the same images, the channels side by side: x -> y
    turned         [B, K], each feature's batch side by side, as csr_lanes reads and writes it: x -> y
    columns        [K, B] or [C, H, W, B], features-major, on a CPU: (x, y) -> calls that fill y from x
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from sparselth.errors import UsageError
from sparselth.kernels.sparse_conv2d import Slices
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import Call
from sparselth.registry import Registry
from sparselth.sparse.device import Device
from sparselth.sparse.forms.stage import Packed, Place, Stage, pack, unpack

LAYOUTS = "rows", "channels-last", "turned", "columns"
KINDS = "dense", "torch", "ours"  # dense products, torch's sparse formats, kernels that torch has not


@dataclass(frozen=True)
class Made:
    """What a form makes of a stage: how it is called, and the bytes of its weights with every index."""

    call: Callable[..., Any]
    bytes: int
    weight: Callable[[], Tensor] | None = None  # gives W back, with the dead inputs or without
    in_place: bool = False  # in columns: y is the memory of x
    slices: Callable[[int], Slices | None] | None = None  # x and y may be Slices, and x those for this batch
    # in columns, or with `bind` on planes: (x, y, activation) -> calls for y = act(y + what it computes of x)
    adds: Callable[[Any, Any, str], list[Call]] | None = None
    # of rows on a CPU: (x, y) -> calls that fill y from x; the x for this batch that is read in place
    bind: Callable[[Planes, Planes], list[Call]] | None = None
    planes: Callable[[int], Planes | None] | None = None


@dataclass(frozen=True)
class Formed:
    """A stage in one of its forms; copied and pickled as the survivors of its weight, and formed again."""

    name: str
    kind: str
    layout: str
    place: Place
    made: Made
    seconds: float  # of conversion; 0 for dense forms
    device: Device
    batch: int  # that it is made for
    bare: Stage  # without its weight, where the form gives that back

    @property
    def call(self) -> Callable[..., Any]:
        return self.made.call

    @property
    def bytes(self) -> int:
        return self.made.bytes

    @property
    def in_columns(self) -> bool:
        return self.layout == "columns"

    @property
    def in_planes(self) -> bool:
        """Whether a program on planes takes it: by `bind`, or in columns what has no more than one pixel."""
        single = all(prod(shape[1:]) == 1 for shape in (self.place.before, self.place.after))
        return self.made.bind is not None or (self.in_columns and single)

    def stage(self) -> Stage:
        """The stage that it was made of."""
        return self.bare.dressed(self.made.weight()) if self.made.weight else self.bare

    def __reduce__(self) -> tuple[Callable[..., Formed], tuple[Any, ...]]:
        held = pack(self.made.weight()) if self.made.weight else None
        return _again, (self.name, self.bare, held, self.device, self.batch)

    @property
    def gives(self) -> str:
        """The layout of y."""
        return "rows" if self.layout == "channels-last" and len(self.place.after) != 3 else self.layout


@dataclass(frozen=True)
class Form:
    """One way to compute a stage.

    `fits(stage, device, batch)` says whether it can compute such a stage there, for batches of about that
    size; `make(stage, device, batch)` does so for any batch, with what is behind the layer of the stage. What
    raises when it is made or first called is left out of the choice, and why is said.
    """

    name: str
    kind: str
    layout: str
    fits: Callable[[Stage, Device, int], bool]
    make: Callable[[Stage, Device, int], Made]

    def of(self, stage: Stage, device: Device, batch: int) -> Formed:
        began = time.perf_counter()
        made = self.make(stage, device, batch)
        seconds = 0.0 if self.kind == "dense" else time.perf_counter() - began
        bare = stage.bare() if made.weight else stage
        return Formed(self.name, self.kind, self.layout, stage.place, made, seconds, device, batch, bare)


FORMS: Registry[Form] = Registry("form", "sparselth.sparse.forms", but=("stage", "table"))


def register(form: Form) -> Form:
    """Make a form known; its name must be free."""
    if form.kind not in KINDS:
        raise UsageError(f"form {form.name!r}: expected kind {', '.join(KINDS)}, got {form.kind!r}")
    if form.layout not in LAYOUTS:
        raise UsageError(f"form {form.name!r}: expected layout {', '.join(LAYOUTS)}, got {form.layout!r}")
    return FORMS.add(form.name, form)


def _again(name: str, bare: Stage, held: Packed | None, device: Device, batch: int) -> Formed:
    return FORMS[name].of(bare if held is None else bare.dressed(unpack(held)), device, batch)


def fitting(stage: Stage, device: Device, batch: int) -> list[Form]:
    """The forms of a stage, plain torch ("dense", which fits all) first."""
    found = sorted(FORMS.values(), key=lambda form: (form.name != "dense", KINDS.index(form.kind)))
    return [form for form in found if form.fits(stage, device, batch)]
