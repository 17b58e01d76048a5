"""What `bench` measures of layers: cells of its table, asked for one by one or the default ones.

Of default cells those come first that tell most, since time may be up before the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselth import runs
from sparselth.errors import UsageError
from sparselth.measure.layers import Layer, block_of, defaults, distinct, of_model, parse, strong
from sparselth.models import get_model

ORDER = 64, 1, 256, 8, 1024, 4096  # batches of the default table
SWEEP = Layer((2048, 2048), origin="square")  # where the break-even sparsity is sought
SWEEP_BATCHES, SWEEP_SPARSITIES = (64, 1, 8, 256), (0.3, 0.5, 0.7, 0.8, 0.95)
SWEPT = "dense eager", "dense columns", "CSR", "csr_linear", "csr_tiled", "slot_linear"
STRONG_BATCHES = 1, 4, 16, 64
STRONG = "dense eager", "dense compiled", "dense columns", "csr_tiled", "seed_linear", "seed_conv2d"
BLOCKED = "128x128x3x3@16x16", "512x512x3x3@4x4"  # convolutions of it that are pruned in blocks, too


@dataclass(frozen=True)
class Cell:
    """What is measured at once; `mask`: that of a ticket, instead of a drawn one."""

    layer: Layer
    batch: int
    dtype: str
    kind: str
    sparsity: float
    mask: Tensor | None = None
    only: tuple[str, ...] = ()  # rivals; () is all

    @property
    def text(self) -> str:
        return f"{self.layer.text}, batch {self.batch:,}, {self.dtype}, {self.kind} {100 * self.sparsity:g} %"

    @property
    def flops(self) -> int:
        """Of the dense product."""
        return self.layer.flops() * self.batch


@dataclass(frozen=True)
class Asked:
    """What the user asked for; () is the default."""

    device: str
    sparsities: tuple[float, ...]
    shapes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    run: Path | None = None  # whose tickets' masks are taken
    level: int | None = None
    seed: int | None = None
    strong: bool = False  # weights that are not stored

    @property
    def exact(self) -> bool:
        """Whether the layers are named, and so measured however long it takes."""
        return bool(self.shapes) or self.run is not None or self.strong

    def cells(self) -> list[Cell]:
        """Most wanted first."""
        layers = distinct(parse(text) for text in self.shapes) or (strong() if self.strong else defaults())
        batches = self.batches or tuple(sorted(ORDER))
        dtypes = self.dtypes or (("fp32", "tf32", "bf16", "fp16") if self.device == "cuda" else ("fp32",))
        if self.run is not None:
            asked = [ticket_masks(self.run, self.level, self.seed, s) for s in self.sparsities]
            return _distinct(
                Cell(layer, batch, dtype, "magnitude", 1 - float(mask.float().mean()), mask)
                for dtype in dtypes
                for batch in batches
                for masks in asked
                for layer, mask in masks
            )
        if self.strong:
            dtypes = self.dtypes or (("bf16", "fp32") if self.device == "cuda" else ("fp32",))
            found = cells(layers, self.batches or STRONG_BATCHES, dtypes, ("strong",), self.sparsities)
            return [replace(cell, only=STRONG) for cell in found]
        if self.exact or self.batches or self.dtypes or self.kinds:
            return cells(layers, batches, dtypes, self.kinds or ("random",), self.sparsities)
        return default_cells(self.device, self.sparsities, layers)

    def named(self, wanted: Sequence[Cell]) -> set[int]:
        """Places of the first cells of every sparsity, batch size, dtype and kind of mask that was named."""
        seen: dict[tuple[Any, ...], int] = {}
        for i, cell in enumerate(wanted):
            place = (
                cell.batch if self.batches else None,
                cell.dtype if self.dtypes else None,
                cell.kind if self.kinds else None,
            )
            if cell.sparsity in self.sparsities:
                seen.setdefault((cell.sparsity, *place), i)
        return {*seen.values()}


def ticket_masks(
    run: Path, level: int | None, seed: int | None, sparsity: float
) -> list[tuple[Layer, Tensor]]:
    """The layers of a run's network with the masks of a ticket; without a level, of the nearest sparsity."""
    record = runs.read(run)
    model = get_model(record.config.model)
    points = [p for p in record.points if p["arm"] == "ticket" and p["level"] > 0]
    points = [p for p in points if seed is None or p["seed"] == seed]
    points = [p for p in points if level is None or p["level"] == level]
    if not points:
        which = "" if level is None else f" of level {level}"
        whose = "" if seed is None else f" of seed {seed}"
        raise UsageError(f"`run` {run}: no finished ticket{which}{whose}; `sparselth show {run}` lists them")
    point = min(points, key=lambda p: (abs(1 - p["weights_remaining"] - sparsity), p["seed"]))
    return [
        (
            layer,
            torch.from_numpy(record.mask(point["seed"], point["level"], spec.name).copy()).view(layer.shape),
        )
        for layer, spec in zip(of_model(model), model.weights, strict=True)
    ]


def default_cells(device: str, sparsities: Sequence[float], layers: Sequence[Layer]) -> list[Cell]:
    """The default table, most wanted first: every layer at the sparsities that were asked for, batch size by
    batch size, each with what tells the break-even; blocks and other dtypes behind the second."""
    plain = ("fp32",), ("random",)
    dtypes = ("tf32", "bf16", "fp16") if device == "cuda" else ("bf16", "fp16")
    squares = [layer for layer in layers if layer.origin == "square"]
    small = [layer for layer in squares if device == "cuda" or layer.shape[0] <= SWEEP.shape[0]]
    others = cells(squares if device == "cuda" else small[:1], (64, 1), dtypes, ("random",), sparsities)
    filters = [layer for layer in layers if layer.text in BLOCKED]
    blocks = cells([*small, *filters], (64, 1), ("fp32",), ("block",), sparsities)
    if device == "cuda":
        blocks += cells([*squares, *filters], (4096, 64, 1), ("bf16",), ("block",), sparsities)
    first = [layer for layer in layers if layer.text == SWEEP.text]
    found: list[Cell] = []
    for place, batch in enumerate(ORDER):
        found += cells([*first, *layers], (batch,), *plain, sparsities)
        if batch in SWEEP_BATCHES and len(sparsities) == 1:
            found += [Cell(SWEEP, batch, "fp32", "random", s, only=SWEPT) for s in SWEEP_SPARSITIES]
        if place == 1:
            found += [*blocks, *others]
    return _distinct(found)


def cells(
    layers: Sequence[Layer],
    batches: Sequence[int],
    dtypes: Sequence[str],
    kinds: Sequence[str],
    sparsities: Sequence[float],
) -> list[Cell]:
    """All that was asked for, layer by layer; blocks only of weights that are large enough for them."""
    return [
        Cell(layer, batch, dtype, kind, sparsity)
        for layer in layers
        for dtype in dtypes
        for kind in kinds
        for sparsity in sparsities
        for batch in batches
        if kind != "block" or block_of(layer)
    ]


def _distinct(found: Iterable[Cell]) -> list[Cell]:
    """Each once, where it stands first."""
    seen: dict[str, Cell] = {}
    for cell in found:
        seen.setdefault(cell.text, cell)
    return [*seen.values()]
