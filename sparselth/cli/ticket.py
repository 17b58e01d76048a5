"""`sparselth ticket inspect|verify|diff|export|import FILE`: what can be done with a ticket's file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparselth.cli.options import PATH, as_flags, data_dir, output
from sparselth.errors import SparselthError, UsageError, check_number

if TYPE_CHECKING:
    from sparselth.tickets import Ticket

MOST_BATCH = 4096


@click.group()
def ticket() -> None:
    """Inspect, verify, compare, export or import the file of a ticket, of a module or of a run."""


def _print(schema: str, document: dict[str, Any]) -> None:
    print(json.dumps({"schema": f"sparselth.ticket-{schema}/1"} | document, indent=2, default=str))


@ticket.command()
@click.argument("file", type=PATH)
@click.option("--batch", type=int, default=1, show_default=True, help="Samples of a call that is timed.")
@click.option("--image", metavar="HxW", help="What convolutions read, where the ticket does not say.")
@click.option("--no-times", is_flag=True, help="Measure nothing on this machine.")
@output
def inspect(
    file: Path, batch: int, image: str | None, no_times: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Show layers, densities, bytes, where it came from, and why it is faster on this machine or not.

    Each layer is timed dense and by every sparse form that fits it, under its mask and under random masks, a
    second or two a layer; times are kept in the user's cache.
    """
    from sparselth.compare import layers
    from sparselth.tickets import load_ticket

    check_number("batch", batch, 1, MOST_BATCH)
    size = _size(image)
    found = load_ticket(file)
    facts, bytes_, dense = layers(found), file.stat().st_size, _dense_bytes(found)
    speeds, device = _speeds(found, batch, size, quiet or as_json) if not no_times else ([], "")
    if as_json:
        document = {
            "file": str(file),
            "bytes": bytes_,
            "dense_bytes": dense,
            "weights_remaining": found.weights_remaining,
            "header": found.header,
            "layers": [asdict(one) | {"density": one.density} for one in facts],
        }
        if not no_times:
            document |= {"batch": batch, "device": device}
            document["speeds"] = [
                asdict(one) | {"faster": one.faster, "doubtful": one.doubtful} for one in speeds
            ]
        _print("inspect", document)
        return
    from sparselth.report import ticket_tables

    text = ticket_tables.facts(found, bytes_, dense, facts)
    if not no_times and facts:
        text += "\n\n" + ticket_tables.fast(facts, speeds, batch, device)
    print(as_flags(text))


def _size(image: str | None) -> tuple[int, int] | None:
    if image is None:
        return None
    numbers = re.fullmatch(r"(\d{1,4})x(\d{1,4})", image)
    if not numbers or not int(numbers[1]) * int(numbers[2]):
        raise UsageError(f"`image` {image:.40}: expected height x width, such as 32x32")
    return int(numbers[1]), int(numbers[2])


def _dense_bytes(found: Ticket) -> int | None:
    try:
        return found.dense_bytes
    except SparselthError:  # its first level is not beside it
        return None


def _speeds(found: Ticket, batch: int, image: tuple[int, int] | None, quiet: bool) -> tuple[list[Any], str]:
    import sys

    import torch

    from sparselth.machine import cpu_name
    from sparselth.measure.ticket_layers import speeds

    speeds_ = []
    for speed in speeds(found, batch, image):
        speeds_.append(speed)
        if not quiet and sys.stderr.isatty():
            print(f"\rmeasured {len(speeds_)} of {len(found.masks)} layers", end="", file=sys.stderr)
    if not quiet and sys.stderr.isatty():
        print(file=sys.stderr)
    return speeds_, f"{cpu_name()}, threads {torch.get_num_threads()}, torch {torch.__version__}"


@ticket.command()
@click.argument("file", type=PATH)
@click.option("--run", type=PATH, help="The run it came from: its network is evaluated again.")
@data_dir
@output
def verify(
    file: Path, run: Path | None, data_dir: Path | None, as_json: bool, quiet: bool, debug: bool
) -> int:
    """Compute the checksum of FILE again; with --run also its network's accuracy on the test images.

    Exit code 3 where the file is not what the run wrote, or the accuracy another one.
    """
    from sparselth.report.ticket_tables import verified
    from sparselth.verify import verify as check

    found = check(file, run, data_dir)
    if as_json:
        document = {"file": str(file), "checksum": found.checksum, "ok": not found.faults}
        document |= {"accuracy": found.accuracy, "stated_accuracy": found.stated, "images": found.images}
        _print("verify", document | {"faults": found.faults})
        return 3 if found.faults else 0
    print(verified(file, found.checksum, found.ticket.header["schema"]))
    if found.accuracy is not None and found.stated is not None:
        print(
            f"evaluated again: {100 * found.accuracy:.2f} % of {found.images:,} test images, "
            f"the run says {100 * found.stated:.2f} %"
        )
    for fault in found.faults:
        print(f"FAILED: {fault}")
    return 3 if found.faults else 0


@ticket.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@output
def diff(a: Path, b: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Compare two tickets of one network: masks in common beside chance, weights that differ."""
    from sparselth.compare import differences
    from sparselth.report.ticket_tables import overlap
    from sparselth.tickets import load_ticket

    first, second = load_ticket(a), load_ticket(b)
    found = differences(first, second)
    if as_json:
        rows = [
            asdict(one) | {name: getattr(one, name) for name in ("times_chance", "sigmas", "jaccard")}
            for one in [*found.layers, found.total]
        ]
        document = {"a": str(a), "b": str(b), "layers": rows[:-1], "total": rows[-1], "others": found.others}
        _print("diff", document)
    else:
        print(overlap(first, second, found))


@ticket.command(name="export")
@click.argument("file", type=PATH)
@click.option("--to", required=True, metavar="FORMAT", help="See `sparselth ls formats`.")
@click.option("--out", type=PATH, required=True, help="The file to write.")
@click.option(
    "--trained", is_flag=True, help="Of a run's ticket: the trained weights, not those it began with."
)
@click.option("--model", metavar="NAME", help="Of a module, for onnx: the network, as my_net.py:make.")
@click.option(
    "--dataset", metavar="NAME", default="", help="What that network reads.  [default: the model's]"
)
@output
def export_(
    file: Path,
    to: str,
    out: Path,
    trained: bool,
    model: str | None,
    dataset: str,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write a ticket for others: torch, csr, onnx, compressed-tensors or torch-prune."""
    from sparselth.exchange import export_ticket, module_of
    from sparselth.tickets import load_ticket

    found = load_ticket(file)
    module, example = module_of(model, dataset) if model else (None, None)
    said = export_ticket(found, to, out, trained=trained, module=module, example=example)
    if as_json:
        _print("export", {"file": str(out), "format": to, "bytes": out.stat().st_size, "said": said})
    elif not quiet:
        print(f"{out}: {to}, {out.stat().st_size:,} bytes" + f"; {said}" * bool(said))


@ticket.command(name="import")
@click.argument("file", type=PATH)
@click.option("--from", "of", required=True, metavar="FORMAT", help="See `sparselth ls formats`.")
@click.option("--out", type=PATH, required=True, help="The ticket to write.")
@click.option("--keep", type=float, help="Of files with scores: the share of weights that stays, as 0.5.")
@click.option("--weights", type=PATH, help="A file with a state_dict to take the values from.")
@output
def import_(
    file: Path,
    of: str,
    out: Path,
    keep: float | None,
    weights: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write a ticket of the masks of others: torch-prune, open_lth or hidden-networks."""
    from sparselth.exchange import import_ticket
    from sparselth.tickets import load_ticket

    import_ticket(file, of, out, keep=keep, weights=weights)
    found = load_ticket(out)
    if as_json:
        about = {"bytes": out.stat().st_size, "weights_remaining": found.weights_remaining}
        _print("import", {"file": str(out), "format": of} | about)
    elif not quiet:
        masks = found.masks
        print(f"{out}: {out.stat().st_size:,} bytes, {masks.kept:,} of {masks.size:,} weights kept")
