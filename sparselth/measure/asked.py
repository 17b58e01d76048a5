"""What `bench` measures of layers: cells of its table, asked for one by one or the default ones.

Of default cells those come first that tell most, since time may be up before the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparselth import runs
from sparselth.errors import UsageError
from sparselth.measure.layers import Layer, block_of, defaults, distinct, of_model, parse
from sparselth.models import get_model

ORDER = 64, 1, 256, 8, 1024, 4096  # batches of the default table
SWEEP = Layer((2048, 2048), origin="square")  # where the break-even sparsity is sought
SWEEP_BATCHES, SWEEP_SPARSITIES = (64, 1, 8, 256), (0.3, 0.5, 0.7, 0.8, 0.95)
SWEPT = "dense eager", "dense columns", "CSR", "csr_linear", "csr_tiled", "slot_linear"
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

    @property
    def exact(self) -> bool:
        """Whether the layers are named, and so measured however long it takes."""
        return bool(self.shapes) or self.run is not None

    def cells(self) -> list[Cell]:
        """Most wanted first."""
        layers = distinct(parse(text) for text in self.shapes) or defaults()
        batches = self.batches or tuple(sorted(ORDER))
        dtypes = self.dtypes or (("fp32", "tf32", "bf16", "fp16") if self.device == "cuda" else ("fp32",))
        if self.run is not None:
            masks = ticket_masks(self.run, self.level, self.seed, self.sparsities[0])
            return [
                Cell(layer, batch, dtype, "magnitude", 1 - float(mask.float().mean()), mask)
                for dtype in dtypes
                for batch in batches
                for layer, mask in masks
            ]
        if self.exact or self.batches or self.dtypes or self.kinds:
            return cells(layers, batches, dtypes, self.kinds or ("random",), self.sparsities)
        return default_cells(self.device, self.sparsities, layers)


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
    """The default table, most wanted first: what tells the break-even, then every layer at some batch."""
    every = [
        [Cell(layer, batch, "fp32", "random", s) for s in sparsities for layer in layers] for batch in ORDER
    ]
    dtypes = ("tf32", "bf16", "fp16") if device == "cuda" else ("bf16", "fp16")
    squares = [layer for layer in layers if layer.origin == "square"]
    small = [layer for layer in squares if device == "cuda" or layer.shape[0] <= SWEEP.shape[0]]
    others = cells(squares if device == "cuda" else small[:1], (64, 1), dtypes, ("random",), sparsities)
    filters = [layer for layer in layers if layer.text in BLOCKED]
    blocks = cells([*small, *filters], (64, 1), ("fp32",), ("block",), sparsities)
    if device == "cuda":
        blocks += cells([*squares, *filters], (4096, 64, 1), ("bf16",), ("block",), sparsities)
    sweep = [
        Cell(SWEEP, batch, "fp32", "random", s, only=() if s in sparsities else SWEPT)
        for batch in SWEEP_BATCHES
        for s in sorted({*sparsities, *(SWEEP_SPARSITIES if len(sparsities) == 1 else ())})
    ]
    found = [*sweep, *every[0], *every[1], *blocks, *others, *(cell for row in every[2:] for cell in row)]
    seen = {cell.text: cell for cell in reversed(found)}
    return [cell for cell in found if seen[cell.text] is cell]


def cells(
    layers: Sequence[Layer],
    batches: Sequence[int],
    dtypes: Sequence[str],
    kinds: Sequence[str],
    sparsities: Sequence[float],
) -> list[Cell]:
    """All that was asked for; blocks only of weights that are large enough for them."""
    return [
        Cell(layer, batch, dtype, kind, sparsity)
        for sparsity in sparsities
        for dtype in dtypes
        for kind in kinds
        for batch in batches
        for layer in layers
        if kind == "random" or block_of(layer)
    ]
