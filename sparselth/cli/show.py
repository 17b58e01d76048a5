"""`sparselth show RUN`: the table or the JSON of a run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparselth.cli.options import PATH, as_flags, output

if TYPE_CHECKING:
    from sparselth.runs import RunRecord


@click.command()
@click.argument("run", type=PATH)
@output
def show(run: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Print the table of the run in folder RUN, finished or not; --json prints its points."""
    from sparselth.begun import recalled
    from sparselth.runs import read

    with recalled(run):
        record = read(run)
        if record.damage:
            again = "" if record.complete else "; `resume` computes what is missing again"
            print(as_flags(f"note: {run}: {record.damage}{again}"), file=sys.stderr)
        report(record, as_json)


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
