"""One table of the formats that tickets are exported to and imported from.

A `Format` says its name, what it is, how a ticket is written in it, how masks and tensors are found in one of
its files, or both. Each file of this folder registers one, and so may a file of a user's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselth.errors import SparselthError, UsageError
from sparselth.files import file_sum
from sparselth.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparselth.masks import Masks
    from sparselth.models import Model
    from sparselth.tickets import Ticket


@dataclass(frozen=True, eq=False)
class Given:
    """What is exported: tensors by name as the network has them, pruned weights 0, and its masks."""

    state: dict[str, Tensor]
    masks: Masks
    module: nn.Module | None = None  # the network itself in evaluation mode, where it is known
    example: Tensor | None = None  # a batch of what it reads


@dataclass(frozen=True, eq=False)
class Found:
    """What a file of others holds: masks, and every tensor of the network by name, pruned or not."""

    masks: dict[str, Tensor]
    state: dict[str, Tensor]
    keep: float | None = None  # the share of every tensor that was asked to stay, where a file has scores


@dataclass(frozen=True)
class Format:
    """A format, with `write(given, file)`, which may return what is to be said of it, and `read`.

    `read(file, keep)` is given the share of weights that scores keep, or None.
    """

    name: str
    meaning: str
    write: Callable[[Given, Path], str] | None = None
    read: Callable[[Path, float | None], Found] | None = None


FORMATS: Registry[Format] = Registry(
    "format", "sparselth.exchange", but=("table", "checkpoint", "state_dicts")
)


def register(form: Format) -> Format:
    """Make a format known; its name must be free."""
    return FORMATS.add(form.name, form)


def export_ticket(
    ticket: Ticket,
    to: str,
    file: Path,
    *,
    trained: bool = False,
    module: nn.Module | None = None,
    example: Any = None,
) -> str:
    """Write a ticket in a format, and say of the file what there is to say.

    trained: the trained weights of a run's ticket, in place of those of the rewind step. A format that needs
    the network itself, ONNX, is given `module` and an `example` of what it reads; of a run they are known.
    """
    from sparselth.tickets import RunTicket

    form = FORMATS[to]
    if form.write is None:
        raise UsageError(f"format {to}: is read only; export to {_names(lambda one: one.write)}")
    if trained and not isinstance(ticket, RunTicket):
        raise UsageError(
            f"`trained` {ticket.file}: the ticket of a module has no trained weights, a run's has"
        )
    if isinstance(ticket, RunTicket):
        module = (ticket.trained() if trained else ticket.rewound()).eval()
        state = dict(module.state_dict())
        if example is None:
            example = example_of(ticket.model)
    else:
        state = ticket.snapshot
        if module is not None:
            ticket.apply(module.eval())
    return form.write(Given(state, ticket.masks, module, example), file)


def example_of(model: Model) -> Tensor:
    """A batch of what a network reads: noise, or the first token."""
    import torch

    from sparselth.models.module import ModuleModel

    if isinstance(model, ModuleModel) and model.tokens:
        return model.example()
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, *model.input, generator=draw, dtype=torch.float32, device="cpu")


def module_of(name: str, dataset: str = "") -> tuple[nn.Module, Tensor]:
    """A network by the name of its model, and an example of what it reads: of a data set or its own."""
    import torch

    from sparselth.data import get_dataset
    from sparselth.models import get_model
    from sparselth.models.torch import network

    model = get_model(name)
    model = model.on(get_dataset(dataset or model.dataset))
    empty = torch.zeros(model.params.size, dtype=torch.float32, device="cpu")
    return network(model, empty), example_of(model)


def import_ticket(
    source: Path, of: str, file: Path, *, keep: float | None = None, weights: Path | None = None
) -> None:
    """Write a file of others as a ticket.

    keep: the share of each tensor that stays, of files with scores in place of masks; weights: a file with a
    `state_dict` to take the values from, in place of the file's own. UsageError where a mask is of another
    shape than its tensor, SparselthError where a file is none of the format.
    """
    from sparselth import module_tickets
    from sparselth.exchange.checkpoint import plain_state, tied_names
    from sparselth.masks import Masks

    form = FORMATS[of]
    if form.read is None:
        raise UsageError(f"format {of}: is written only; import from {_names(lambda one: one.read)}")
    found = form.read(source, keep)
    if weights is not None:
        found = replace(found, state=plain_state(weights))
    for name, mask in found.masks.items():
        if name not in found.state:
            where = weights or source
            raise UsageError(f"{where}: has no {name}, of which there is a mask; name its `weights`")
        if mask.shape != found.state[name].shape:
            shapes = f"{list(mask.shape)}, the tensor {list(found.state[name].shape)}"
            raise UsageError(f"{source}: {name}: the mask has shape {shapes}; expected one shape")
    if not found.masks:
        raise SparselthError(f"{source}: has no masks; expected a file of {form.meaning}")
    tied = tied_names(found.state)
    masks = {tied.get(name, name): mask for name, mask in found.masks.items()}
    state = {name: tensor for name, tensor in found.state.items() if name not in tied}
    origin: dict[str, Any] = {"format": of, "file": source.name, "sha256": _sum(source)}
    origin |= {} if weights is None else {"weights": weights.name, "weights_sha256": _sum(weights)}
    origin |= {} if found.keep is None else {"keep": found.keep}
    module_tickets.save(file, Masks(masks), state, tied, notes={"imported": origin}, network="")


def _sum(source: Path) -> str:
    """The checksum of a file, or of the files of a folder."""
    if source.is_file():
        return file_sum(source)
    return json.dumps({one.name: file_sum(one) for one in sorted(source.glob("*.pth"))})


def _names(has: Callable[[Format], object]) -> str:
    return ", ".join(name for name, form in FORMATS.items() if has(form))
