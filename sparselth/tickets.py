"""Ticket files: a mask, the weights it leaves, and where they came from. The cells of a run are such files.

    mask/NAME    bits of a weight tensor, uint8 [N, ceil(K / 8)], as `sparselth.masks` packs them
    kept/NAME    its surviving trained weights, fp32 [kept], in row-major order
    bias/NAME    all of a tensor that is not pruned: biases, and what batch norms hold
    rewind/NAME  every tensor at the rewind step, in the shape a user knows it by; in the file of level 0
                 alone, since all levels of a seed go back to the same weights

A strong ticket, whose weights were never trained, is written by `strong_tickets` and read here, too.

Safetensors with a JSON header under "sparselth": schema, model, dataset, config (the digest of what a cell
computes), cell, rewind_step, shapes, and `sha256`, a checksum of arrays and header. One reader, one writer;
nothing is unpickled, and an array of another type or shape than the network's is none of a ticket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparselth import masks, strong_tickets
from sparselth.errors import SparselthError
from sparselth.files import Arrays, load_arrays, load_header, save_arrays
from sparselth.models import Model, get_model
from sparselth.params import Params, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = "sparselth.cell/1"
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Content:
    """What a file holds, as buffers in the order of Params."""

    mask: NDArray[np.bool_]  # [M]
    weights: Floats  # [P], trained; 0 where the mask is
    rewound: Floats | None = None  # [P] of the rewind step, before the mask; of level 0 alone


def arrays(params: Params, content: Content, dense: bool = False) -> Arrays:
    """The arrays of a file; `dense`: without a mask, which a network that keeps everything does not need."""
    found: Arrays = {}
    for spec in params.weights:
        mask = content.mask[spec.span]
        if not dense:
            found[f"mask/{spec.name}"] = masks.pack(mask.reshape(spec.matrix))
        found[f"kept/{spec.name}"] = content.weights[spec.span][mask]
    for spec in params.unpruned:
        found[f"bias/{spec.name}"] = content.weights[spec.span]
    if content.rewound is not None:
        for spec in params.all:
            found[f"rewind/{spec.name}"] = content.rewound[spec.span].reshape(spec.shape)
    return found


def header(params: Params, **where: Any) -> dict[str, Any]:
    """The header of a file; `where` it came from: model, dataset, config, cell, rewind_step."""
    return {"schema": SCHEMA, **where, "shapes": {spec.name: spec.shape for spec in params.weights}}


def save(file: Path, params: Params, content: Content, **where: Any) -> None:
    """Write a file, atomically; equal content gives equal bytes."""
    save_arrays(file, arrays(params, content), header(params, **where))


def read(file: Path, params: Params) -> tuple[Content, dict[str, Any]]:
    """Content and header of a run's file of a network with these parameters; SparselthError where it is none.

    Its name says which cell it is, and so does its header.
    """
    found, head = load_arrays(file, most=_most(params))
    if head.get("cell", file.stem) != file.stem:
        raise SparselthError(f"{file}: is the file of {head['cell']}")
    return _content(file, params, found), head


def _most(params: Params) -> int:
    """Bytes of a file at most: weights and those of the rewind step, masks, a header."""
    return 12 * params.size + (1 << 20)


def _content(file: Path, params: Params, found: Arrays) -> Content:
    mask, weights = np.zeros(params.mask_size, bool), np.zeros(params.size, np.float32)
    rewound = np.zeros(params.size, np.float32) if any(name.startswith("rewind/") for name in found) else None
    for spec in params.weights:
        bits = _array(file, found, f"mask/{spec.name}", np.uint8, (spec.matrix[0], -(-spec.matrix[1] // 8)))
        mask[spec.span] = masks.unpack(bits, spec.matrix[1]).ravel()
        kept = int(mask[spec.span].sum())
        weights[spec.span][mask[spec.span]] = _array(file, found, f"kept/{spec.name}", np.float32, (kept,))
    for spec in params.unpruned:
        weights[spec.span] = _array(file, found, f"bias/{spec.name}", np.float32, (spec.numel,))
    if rewound is not None:
        for spec in params.all:
            rewound[spec.span] = _array(file, found, f"rewind/{spec.name}", np.float32, spec.shape).ravel()
    return Content(mask, weights, rewound)


def _array(
    file: Path, found: Arrays, name: str, dtype: type[np.generic], shape: tuple[int, ...]
) -> NDArray[Any]:
    if name not in found:
        raise SparselthError(f"{file}: has no {name}; expected the ticket of another network")
    array = found[name]
    if array.dtype != dtype or array.shape != shape:
        raise SparselthError(
            f"{file}: does not fit the network ({name}: expected {np.dtype(dtype)} {list(shape)}, "
            f"found {array.dtype} {list(array.shape)})"
        )
    return array


def read_mask(file: Path, spec: TensorSpec) -> NDArray[np.bool_]:
    """The mask of one weight tensor, bool [N, K]."""
    name, (n, k) = f"mask/{spec.name}", spec.matrix
    return masks.unpack(_array(file, load_arrays(file, only=name)[0], name, np.uint8, (n, -(-k // 8))), k)


@dataclass(frozen=True, eq=False)
class Ticket:
    """A ticket that was found, with its network; of a strong one all networks are the one it is."""

    model: Model
    header: dict[str, Any]
    content: Content
    start: Floats | None  # [P] of the rewind step, before the mask

    @property
    def weights_remaining(self) -> float:
        """Kept share of the prunable weights."""
        return float(self.content.mask.sum()) / self.model.params.prunable

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name in `trained()` and `rewound()` -> bool of its shape, True = kept."""
        import torch

        return {
            spec.name: torch.from_numpy(self.content.mask[spec.span].reshape(spec.shape))
            for spec in self.model.params.weights
        }

    def trained(self) -> nn.Module:
        """The network as it was trained, in training mode; its pruned weights are 0."""
        return self._network(self.content.weights)

    def rewound(self) -> nn.Module:
        """The ticket itself: the network at the rewind step with its pruned weights at 0, to be trained.

        SparselthError where the weights of the rewind step are not there: they lie in the file of level 0,
        which must be beside this one.
        """
        if self.start is None:
            raise SparselthError(
                f"{self.header.get('cell', 'ticket')}: the weights of the rewind step lie in level 0's file, "
                "which is not beside it; keep the files of a run together"
            )
        weights = self.start.copy()
        weights[: len(self.content.mask)][~self.content.mask] = 0
        return self._network(weights)

    def _network(self, weights: Floats) -> nn.Module:
        import torch

        from sparselth.models.torch import network

        return network(self.model, torch.from_numpy(weights))


def load(file: str | Path) -> Ticket:
    """The ticket in a file of a run, cells/seed0-ticket-05.safetensors, of this version or an older one.

    A control arm's file is read too, and a strong ticket's. SparselthError when the file is none or cannot be
    read, UsageError when nobody knows its model.
    """
    file = Path(file)
    if not file.is_file():
        raise SparselthError(f"{file}: no such file; tickets lie in the folder cells of a run")
    head = load_header(file)
    strong = head.get("schema") == strong_tickets.SCHEMA
    if not (strong or head.get("schema") == SCHEMA) or not isinstance(head.get("model"), str):
        raise SparselthError(f"{file}: expected a ticket, {SCHEMA}, found {head.get('schema')!r}")
    model = get_model(head["model"])
    if strong:
        return _strong(file, model)
    found, head = load_arrays(file, most=_most(model.params))
    content = _content(file, model.params, found)
    start = content.rewound
    first = _level_0(file, head)
    if start is None and first.is_file() and load_header(first).get("schema") == SCHEMA:
        start = read(first, model.params)[0].rewound
    return Ticket(model, head, content, start)


def _strong(file: Path, model: Model) -> Ticket:
    """A strong ticket, its weights drawn again."""
    found, head = load_arrays(file, most=strong_tickets.most(model.params))
    strong = strong_tickets.content_of(file, model.params, found, head)
    weights = strong.weights(model.params).numpy()
    return Ticket(model, head, Content(strong.mask != 0, weights), weights)


def _level_0(file: Path, head: dict[str, Any]) -> Path:
    """Where the weights lie that a cell goes back to: seed3-ticket-00 of seed3-random-mask-07."""
    seed = re.match(r"seed\d+-", str(head.get("cell")))
    return file.with_name(f"{seed[0] if seed else ''}ticket-00.safetensors")
