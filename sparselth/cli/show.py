"""`sparselth show RUN`: the table or the JSON of a run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparselth.cli.options import PATH, as_flags, output
from sparselth.errors import SparselthError, UsageError

if TYPE_CHECKING:
    from sparselth.runs import RunRecord


@click.command()
@click.argument("run", type=PATH)
@click.option("--masks", is_flag=True, help="What the masks of a run of imp look like, beside chance.")
@click.option("--savings", is_flag=True, help="What each level of a run of imp saves; measures inference.")
@output
def show(run: Path, masks: bool, savings: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Print the table of the run, or sweep, in folder RUN, finished or not; --json prints its points."""
    from sparselth.begun import recalled
    from sparselth.cluster.store import is_sweep
    from sparselth.runs import read

    if is_sweep(run):
        if masks or savings:
            raise UsageError(f"{run}: is a sweep; `{'masks' if masks else 'savings'}` is for a run of it")
        show_sweep(run, as_json)
        return
    with recalled(run):
        record = read(run)
        if record.damage:
            again = "" if record.complete else "; `resume` computes what is missing again"
            print(as_flags(f"note: {run}: {record.damage}{again}"), file=sys.stderr)
        if masks:
            _masks(record, as_json)
        elif savings:
            _savings(record, as_json)
        else:
            report(record, as_json)


def show_sweep(path: Path, as_json: bool, wall: dict[str, Any] | None = None) -> None:
    """The table of a sweep, or the document of `sweep NAME --json`; its figure is drawn where that can be."""
    from sparselth.cluster.store import read, recalled_all
    from sparselth.report.sweep import draw, table, to_json

    with recalled_all(path):
        record = read(path)
        if as_json:
            print(json.dumps(to_json(record) | ({"wall": wall} if wall else {}), indent=2))
            return
        print(as_flags(table(record)))
        try:
            written = draw(record)
        except (OSError, SparselthError) as error:
            print(f"note: the figure is not drawn ({error})", file=sys.stderr)
            return
    if written:
        print("\nfigures  " + ", ".join(str(file) for file in written if file.suffix != ".svg"))


def _masks(record: RunRecord, as_json: bool) -> None:
    """Degrees, dead units and overlaps of the masks; figures and masks.json go into the run's folder."""
    from sparselth.report.mask_laws import draw
    from sparselth.report.masks import Numbers, table
    from sparselth.runs import reporting

    _check_imp(record, "masks")
    with reporting(record):
        numbers = Numbers(record)
        document = {"schema": "sparselth.masks/1", "run": str(record.path)} | numbers.to_json()
        print(json.dumps(document, indent=2) if as_json else table(numbers))
        folder = record.path / "figures"
        try:
            written = draw(numbers, folder)
        except OSError as error:
            print(f"note: {folder} cannot be written ({error.strerror}), nothing is drawn", file=sys.stderr)
            return
    if written and not as_json:
        print("\nfigures  " + ", ".join(str(file) for file in written if file.suffix != ".svg"))


def _savings(record: RunRecord, as_json: bool) -> None:
    """Parameters, FLOPs, times and bytes by level, beside dense."""
    from sparselth.measure.savings import savings
    from sparselth.report.savings import sentence, table

    _check_imp(record, "savings")
    rows = savings(record)
    document = {
        "schema": "sparselth.savings/1",
        "run": str(record.path),
        "rows": rows,
        "sentence": sentence(rows),
    }
    title = f"what pruning saves, seed {rows[0]['seed']} of {record.config.title}"
    print(json.dumps(document, indent=2) if as_json else table(rows, title))


def _check_imp(record: RunRecord, flag: str) -> None:
    if record.config.name != "imp":
        raise UsageError(f"{record.path}: is a run of {record.config.name}; `{flag}` is for runs of imp")


def report(record: RunRecord, as_json: bool, wall: dict[str, Any] | None = None) -> None:
    """The table, or the document of `NAME --json`; `wall` is what computing it took just now."""
    from sparselth.ledger import point
    from sparselth.report.diverged import said
    from sparselth.report.page import fill
    from sparselth.runs import reporting

    config = record.config
    with reporting(record):
        if as_json:
            document = {
                "schema": f"sparselth.{config.name}/1",
                "run": str(record.path),
                "config": config.to_json(),
                "complete": record.complete,
                "points": config.told(record),
                "diverged": record.diverged,
                "not_computed": [point(cell) for cell in record.not_computed],
                "summary": config.summary(record),
            } | ({"wall": wall} if wall else {})
            text = json.dumps(document, indent=2)
        else:
            text = config.table(record)
            if lost := said(record):
                text += "\n\n" + fill(as_flags("\n".join(lost)))
    print(text)
