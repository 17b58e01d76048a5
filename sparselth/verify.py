"""Whether a ticket is what was written, and whether its network still reaches the accuracy of its run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselth import begun, data, runs
from sparselth.config import Cell
from sparselth.errors import SparselthError
from sparselth.files import file_sum, load_header
from sparselth.tickets import RunTicket, Ticket, load_ticket

if TYPE_CHECKING:
    from sparselth.runs import RunRecord

ROUNDING = 2  # images on either side that another processor's rounding may decide


@dataclass(frozen=True)
class Verified:
    """What was found of a file; `faults` says in words what is not as it should be."""

    ticket: Ticket
    checksum: str  # of arrays and header; "" where an older version wrote none
    accuracy: float | None = None  # on the test, at the end of training, of its network now
    stated: float | None = None  # the same as the run says
    images: int = 0  # that accuracies are of
    faults: list[str] = field(default_factory=list)


def verify(file: Path, run: Path | None = None, data_dir: Path | None = None) -> Verified:
    """Read a ticket, its checksum computed again; with the run it came from, evaluate its network again.

    SparselthError where the file is no ticket, or the run has no such cell or no accuracy of it.
    """
    ticket = load_ticket(file)
    stated = load_header(file).get("sha256")
    checksum = stated if isinstance(stated, str) else ""
    if run is None:
        return Verified(ticket, checksum)
    if not isinstance(ticket, RunTicket):
        raise SparselthError(f"{file}: the ticket of a module, which no run evaluated; leave out `run`")
    record = runs.read(run)
    cell, point = _point(ticket, record)
    faults = []
    if ticket.header.get("config") not in (None, record.config.digest):
        faults.append(f"was computed by another configuration than that of {run}")
    if record.files.get(cell, file_sum(file)) != file_sum(file):
        faults.append(f"is not the file that {run} wrote")
    accuracy, images = _accuracy(ticket, cell, record, run, data_dir)
    expected = float(point["final_accuracy"])
    if abs(accuracy - expected) * images > ROUNDING:
        faults.append(
            f"its network gets {100 * accuracy:.2f} % of {images:,} test images right, the run says "
            f"{100 * expected:.2f} %"
        )
    return Verified(ticket, checksum, accuracy, expected, images, faults)


def _point(ticket: RunTicket, record: RunRecord) -> tuple[Cell, dict[str, Any]]:
    """The finished cell that a ticket says it is."""
    key = ticket.header.get("cell", ticket.file.stem)
    for point in record.points:
        cell = Cell.of(point)
        if cell.key == key:
            if not isinstance(point.get("final_accuracy"), float):
                raise SparselthError(f"{record.path}: says no accuracy of {key} to compare with")
            return cell, point
    raise SparselthError(f"{record.path}: has no finished cell {key}; expected the run of {ticket.file}")


def _accuracy(
    ticket: RunTicket, cell: Cell, record: RunRecord, run: Path, data_dir: Path | None
) -> tuple[float, int]:
    """Test accuracy of the network as it was trained, by the engine that trained it, and its images."""
    import torch

    from sparselth.data.streamed import opened
    from sparselth.engine.state import Job, State
    from sparselth.train import accuracies_on_test

    config, strong = record.config, "frozen" in ticket.header
    chunk, most = config.evaluation
    images = data.look(config.dataset, data_dir)
    resident = opened(images, "cpu", chunk, most, config.shown_as)
    weights = torch.from_numpy(ticket.content.weights.copy())[None]
    state = State.start(weights, config.recipe, config.recipe.steps)
    job = Job(cell, state, torch.from_numpy(ticket.content.mask.copy()), config.recipe.steps)
    even = begun.read_environment(run).get("break_even") if not strong else None
    found = accuracies_on_test(ticket.model, resident, [job], config.kernels, even or {})
    return found[0][1], resident.n_tested
