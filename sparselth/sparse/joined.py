"""Chains of layers with what stands between them, in one layout from end to end.

The branches of a residual network meet in sums, those of squeeze and excitation in products. Each chain by
itself lays its images features-major and back, or its convolutions copy what they read; here chains, sums,
products, means and activations that reach each other are one list of calls on memory of its own,
features-major or in planes: images change layout where they come in and where they leave, and a convolution
adds to what lies where its result goes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparselth.kernels.sparse_conv2d import CELL
from sparselth.sparse.forms.stage import LAYERS
from sparselth.sparse.network import InColumns
from sparselth.sparse.parts import InParts
from sparselth.sparse.programs import InRows, Plans, Program, Step
from sparselth.sparse.segment import Segment

DOES: dict[str, Callable[..., Tensor]] = {  # steps without a segment, on images as torch has them
    "sum": lambda *values: sum(values[1:], values[0]),
    "scale": torch.mul,
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "flat mean": lambda x: x.mean((2, 3)),
    "flat": lambda x: x.flatten(1),
}


class Joined(nn.Module):
    """Steps on images [B, C, H, W]; the value of the last one is the result."""

    in_parts = False  # whether few images at a time go through all steps

    def __init__(self, segments: list[Segment], steps: list[Step]) -> None:
        super().__init__()
        self.segments, self.steps = nn.ModuleList(segments), steps
        self._link()
        self.eval()

    def _link(self) -> None:
        self.linked = [(segment, segment.plan) for segment in self._parts()]
        self.plans: Plans = [plan for _, plan in self.linked]
        forms = [form for plan in self.plans for form in plan]
        in_columns = all(form.in_columns for form in forms)
        self.bound = in_columns or all(form.in_planes for form in forms)
        self.part = CELL if in_columns else 1
        make = partial(Program if in_columns else InRows, self.plans, self.steps)
        self.run = InParts(make, self.part) if self.in_parts else InColumns(make)

    def take_parts(self, batch: int) -> bool:
        """From now on a few images at a time go through all steps, as `sparse.parts` has it.

        False where a batch of this size has no parts.
        """
        self.in_parts = True
        self._link()
        return self.bound and batch > self.part

    def _parts(self) -> list[Segment]:
        return [one for one in self.segments if isinstance(one, Segment)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, P, Q] or [B, N]; images of another size go through the segments one by one."""
        if any(part.plan is not plan for part, plan in self.linked):
            self._link()  # other weights were loaded
        fits = x.is_cpu and x.dtype == torch.float32 and x.shape[1:] == self.plans[0][0].place.before
        if fits and len(x) and self.bound:
            y: Tensor = self.run(x)
            return y
        values, parts = {0: x}, self._parts()
        for step in self.steps:
            given = [values[source] for source in step.sources]
            y = parts[step.segment](*given) if step.segment is not None else DOES[step.does](*given)
            values[step.value] = y if step.activation == "none" else LAYERS[step.activation][0]()(y)
        return values[self.steps[-1].value]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("run", "plans", "linked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()
