"""Where `sparselth bench` writes: tried before minutes of measuring, taken back where nothing came of it."""

from __future__ import annotations

import csv
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparselth.errors import SparselthError


def writable(out: Path | None, csv_file: Path | None) -> None:
    """Say it before minutes of measuring."""
    for flag, folder in (("--out", out), ("--csv", csv_file and csv_file.parent)):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trial = folder / f".{os.getpid()}.tmp"
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise SparselthError(
                f"{flag}: cannot write to {folder}: {error.strerror}; choose another"
            ) from error
    if csv_file is not None and csv_file.is_dir():
        raise SparselthError(f"--csv: {csv_file} is a folder; give a file")


def write(document: dict[str, Any], out: Path | None, csv_file: Path | None) -> list[Path]:
    """The document and figures into `out`, the rows as CSV; a part without figures, beside a whole one."""
    from sparselth.files import write_atomically

    files = []
    rows = document["rows"]
    if out is not None:
        part = out / "bench-partial.json"
        files.append(part if document["partial"] else out / "bench.json")
        write_atomically(files[-1], (json.dumps(document, indent=1) + "\n").encode())
        if not document["partial"]:
            part.unlink(missing_ok=True)
        if "left_out" in document and not document["partial"]:
            from sparselth.report.bench_figures import draw

            files += [file for file in draw(rows, document["device"], out) if file.suffix == ".png"]
    if csv_file is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(csv_file, text.getvalue().encode())
        files.append(csv_file)
    return files


def leave_empty(out: Path | None) -> None:
    """Take a folder back that holds nothing."""
    if out is not None:
        with suppress(OSError):
            out.rmdir()  # unless there was something before
