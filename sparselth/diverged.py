"""What a run folder says of networks that diverged: diverged/KEY.json, in place of a cell's file and lines.

Such a file names what was run and the files that its cell was computed from, and bears a checksum. One that
is not believed is as good as none: the cell is computed again, and diverges again. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparselth.config import Cell, Config
from sparselth.errors import one_line
from sparselth.files import dump, read_json, sealed, unsealed, write_atomically
from sparselth.ledger import point

FOLDER = "diverged"


def write(path: Path, config: Config, cell: Cell, why: str, files: Mapping[Cell, str]) -> None:
    """Say that a cell has no result; `files`: checksums of the files of finished cells."""
    (path / FOLDER).mkdir(exist_ok=True)
    facts = _facts(config, cell, files)
    write_atomically(path / FOLDER / f"{cell.key}.json", dump(sealed(point(cell, why=why) | facts)))


def read(path: Path, config: Config, files: Mapping[Cell, str]) -> list[dict[str, Any]]:
    """Cells that have diverged, and why, in the order of config.cells(); none whose file is in `files`."""
    found: list[dict[str, Any]] = []
    there = {file.stem: file for file in (path / FOLDER).glob("*.json")}
    for cell in config.cells() if there else ():
        if cell not in files and cell.key in there:
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                data = unsealed(read_json(there[cell.key]))
                if data == point(cell, why=str(data["why"])) | _facts(config, cell, files):
                    found.append(point(cell, why=one_line(data["why"])))
    return found


def in_need(config: Config, finished: Collection[Cell], without: Collection[Cell]) -> list[Cell]:
    """The unfinished cells that need one `without` a result, or one that needs such a cell, and so on."""
    lost, found, before = set(without), dict[Cell, None](), -1
    while lost and len(found) > before:
        before = len(found)
        for cell in config.cells():
            if cell not in lost and cell not in finished and not lost.isdisjoint(config.needs(cell)):
                lost.add(cell)
                found[cell] = None
    return [cell for cell in config.cells() if cell in found] if found else []


def _facts(config: Config, cell: Cell, files: Mapping[Cell, str]) -> dict[str, Any]:
    return {"config": config.digest, "needs": {need.key: files.get(need) for need in config.needs(cell)}}
