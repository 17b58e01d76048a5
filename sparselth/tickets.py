"""Ticket files: a mask, the weights it leaves, and where they came from. The cells of a run are such files.

    mask/NAME    bits of a weight tensor, uint8 [N, ceil(K / 8)], as `sparselth.masks` packs them
    kept/NAME    its surviving trained weights, fp32 [kept], in row-major order
    bias/NAME    all of a tensor that is not pruned: biases, and what batch norms hold
    rewind/NAME  every tensor at the rewind step, in the shape a user knows it by; in the file of level 0
                 alone, since all levels of a seed go back to the same weights

A strong ticket, whose weights were never trained, is written by `strong_tickets`, the ticket of any module,
which `save_ticket` writes, lies as `module_tickets` says; `load_ticket` reads all of them.

Safetensors with a JSON header under "sparselth": schema, model, dataset, config (the digest of what a cell
computes), cell, rewind_step, shapes, and `sha256`, a checksum of arrays and header. One reader, one writer;
nothing is unpickled, and an array of another type or shape than the network's is none of a ticket.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparselth import masks, module_tickets, strong_tickets, user_files
from sparselth.data import get_dataset
from sparselth.errors import SparselthError, UsageError
from sparselth.files import Arrays, load_arrays, load_header, read_json, save_arrays
from sparselth.masks import Masks, unwrapped
from sparselth.models import Model, get_model
from sparselth.models.module import is_module
from sparselth.params import Params, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparselth.masks import AnyMasks

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


class Ticket(ABC):
    """A ticket that was found: masks, and what they leave of the network at the rewind step."""

    file: Path
    header: dict[str, Any]

    @property
    @abstractmethod
    def masks(self) -> Masks:
        """Parameter name -> bool of its shape, True = kept."""

    @property
    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """The `state_dict` it goes back to: weights of the rewind step, 0 where pruned, and buffers."""

    @property
    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """Where it came from, in the words of who wrote it."""

    @property
    def weights_remaining(self) -> float:
        """Kept share of the prunable weights."""
        return self.masks.kept / self.masks.size if self.masks.size else 1.0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same network with all its weights; tied tensors once."""
        tensors = {tensor.data_ptr(): tensor for tensor in self.snapshot.values() if tensor.numel()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def apply(self, model: nn.Module) -> Masks:
        """Put its weights and buffers into a model of the same names and shapes; pruned weights are 0.

        Gives the masks, of that model, for an optimizer under masks; optimizers made before are made anew.
        SparselthError where the model is another, naming the first tensor that differs.
        """
        import torch

        model = unwrapped(model)
        here, there = model.state_dict(keep_vars=True), self.snapshot
        wrong = f"{self.file}: does not fit the model:"
        for name in [*there, *here]:
            ticket, found = _said(name, there), _said(name, here)
            if ticket != found:
                raise SparselthError(f"{wrong} the ticket has {ticket}, the model {found}")
        for name, first in module_tickets.first_names(model).items():
            if name != first and not _same(there[name], there[first]):
                raise SparselthError(f"{wrong} its {name} and {first} are one tensor, the ticket's two")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(there[name])
        return Masks(dict(self.masks), model)


@dataclass(frozen=True, eq=False)
class RunTicket(Ticket):
    """The ticket of a run, with its network; of a strong one all networks are the one it is."""

    model: Model
    header: dict[str, Any]
    content: Content
    start: Floats | None  # [P] of the rewind step, before the mask
    file: Path

    @cached_property
    def masks(self) -> Masks:
        """Parameter name in `trained()` and `rewound()` -> bool of its shape, True = kept."""
        import torch

        return Masks(
            {
                spec.name: torch.from_numpy(self.content.mask[spec.span].reshape(spec.shape))
                for spec in self.model.params.weights
            }
        )

    @property
    def snapshot(self) -> dict[str, Tensor]:
        return dict(self.rewound().state_dict())

    @property
    def dense_bytes(self) -> int:
        return 4 * sum(spec.numel for spec in self.model.params.all)

    @property
    def notes(self) -> dict[str, Any]:
        return {name: value for name, value in self.header.items() if name not in ("schema", "shapes")}

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

        seed = re.match(r"seed(\d+)-", str(self.header.get("cell")))
        return network(self.model, torch.from_numpy(weights), int(seed[1]) if seed else 0)


@dataclass(frozen=True, eq=False)
class ModuleTicket(Ticket):
    """The ticket of a module of the user's, who makes it and calls `apply`."""

    header: dict[str, Any]
    kept: Masks
    state: dict[str, Tensor]
    file: Path

    @property
    def masks(self) -> Masks:
        return self.kept

    @property
    def snapshot(self) -> dict[str, Tensor]:
        return dict(self.state)

    @property
    def notes(self) -> dict[str, Any]:
        found = self.header.get("notes")
        return found if isinstance(found, dict) else {}


def save_ticket(
    path: str | Path,
    model: nn.Module,
    masks: AnyMasks,
    snapshot: Mapping[str, Tensor],
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the ticket of any module: masks, the values of `snapshot` that they leave, all its other tensors.

    masks: as `sparselth.prune` gives them, or a dict by name or parameter; snapshot: what
    `sparselth.snapshot(model)` gave, or any `state_dict` of the model; notes: its provenance, as JSON.
    The values of pruned weights are not stored. UsageError where masks or snapshot are another model's.
    """
    module = unwrapped(model)
    names, kept = module_tickets.first_names(module), Masks(masks, module)
    given = {_bare(name, names): tensor for name, tensor in snapshot.items()}
    here = module.state_dict()
    for name in here:
        wanted, found = _said(name, here), _said(name, given)
        if wanted != found:
            raise UsageError(
                f"snapshot: expected {wanted} of the model, found {found}; "
                "take it of this model, by sparselth.snapshot(model)"
            )
    if other := next((name for name in given if name not in names), None):
        raise UsageError(f"snapshot: the model has no {other}; take it of this model, by sparselth.snapshot")
    state = {first: given[first] for name, first in names.items() if name == first}
    tied = {name: first for name, first in names.items() if name != first}
    network = f"{type(module).__module__}.{type(module).__qualname__}"
    words = {"network": network, "layers": module_tickets.layer_words(module, kept)}
    module_tickets.save(Path(path), kept, state, tied, notes=dict(notes or {}), **words)
    return Path(path)


def _said(name: str, tensors: Mapping[str, Tensor]) -> str:
    """A name with its tensor's shape, in words."""
    from torch.nn.parameter import is_lazy

    if name not in tensors:
        return f"no {name}"
    return f"{name} without a shape yet" if is_lazy(tensors[name]) else f"{name} {list(tensors[name].shape)}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and _bytes(a) == _bytes(b))


def _bytes(tensor: Tensor) -> bytes:
    return module_tickets.bits("", tensor).tobytes()


def _bare(name: str, names: Mapping[str, Any]) -> str:
    """A name of a `state_dict` without what torch.compile and data parallelism put before it."""
    while name not in names:
        prefix = next((p for p in ("module.", "_orig_mod.") if name.startswith(p)), "")
        if not prefix:
            break
        name = name.removeprefix(prefix)
    return name


def load_ticket(path: str | Path) -> Ticket:
    """The ticket in a file: of a module, or of a run, as `load`. SparselthError where the file is none."""
    file = Path(path)
    if file.is_file() and load_header(file).get("schema") == module_tickets.SCHEMA:
        kept, state, head = module_tickets.read(file)
        return ModuleTicket(head, Masks(kept), state, file)
    return load(file)


def load(file: str | Path) -> RunTicket:
    """The ticket in a file of a run, cells/seed0-ticket-05.safetensors, of this version or an older one.

    A control arm's file is read too, and a strong ticket's. Where the run's network is a function of a user's
    file, my_net.py:make, that file is imported, of tickets in the folder of their run. SparselthError when
    the file is none or cannot be read, UsageError when nobody knows its model.
    """
    file = Path(file)
    if not file.is_file():
        raise SparselthError(f"{file}: no such file; tickets lie in the folder cells of a run")
    head = load_header(file)
    if head.get("schema") == module_tickets.SCHEMA:
        raise SparselthError(f"{file}: the ticket of a module, not of a run; load_ticket reads it")
    strong = head.get("schema") == strong_tickets.SCHEMA
    if not (strong or head.get("schema") == SCHEMA) or not isinstance(head.get("model"), str):
        raise SparselthError(f"{file}: expected a ticket, {SCHEMA}, found {head.get('schema')!r}")
    module, dataset = is_module(head["model"]), str(head.get("dataset"))
    for key, name in (("model", head["model"]), ("dataset", dataset)) if module else ():
        if user_files.is_file(name):
            _check_run(file, key, name)
    model = get_model(head["model"])
    if module:
        model = model.on(get_dataset(dataset))
    if strong:
        return _strong(file, model)
    found, head = load_arrays(file, most=_most(model.params))
    content = _content(file, model.params, found)
    start = content.rewound
    first = _level_0(file, head)
    if start is None and first.is_file() and load_header(first).get("schema") == SCHEMA:
        start = read(first, model.params)[0].rewound
    return RunTicket(model, head, content, start, file)


def _check_run(file: Path, key: str, name: str) -> None:
    """Raise SparselthError unless a ticket lies in its run: code that a lone file names is not imported."""
    config = file.absolute().parents[1] / "config.json"
    try:
        named = read_json(config)[key]
    except (OSError, ValueError, LookupError, TypeError):
        named = None
    if named != name:
        raise SparselthError(
            f"{file}: its {key} is code, {name}, which is imported for tickets in the folder of their run "
            "alone; save_ticket makes one of it that needs no code"
        )


def _strong(file: Path, model: Model) -> RunTicket:
    """A strong ticket, its weights drawn again."""
    found, head = load_arrays(file, most=strong_tickets.most(model.params))
    strong = strong_tickets.content_of(file, model.params, found, head)
    weights = strong.weights(model.params).numpy()
    return RunTicket(model, head, Content(strong.mask != 0, weights), weights, file)


def _level_0(file: Path, head: dict[str, Any]) -> Path:
    """Where the weights lie that a cell goes back to: seed3-ticket-00 of seed3-random-mask-07."""
    seed = re.match(r"seed\d+-", str(head.get("cell")))
    return file.with_name(f"{seed[0] if seed else ''}ticket-00.safetensors")
