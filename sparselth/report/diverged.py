"""What a run has no result for: networks that diverged, and the cells that need one of them."""

from __future__ import annotations

from collections.abc import Iterable

from sparselth.config import Cell
from sparselth.runs import RunRecord

SHOWN = 5  # cells that are told one by one


def said(record: RunRecord) -> list[str]:
    """A line for each cell that diverged, up to SHOWN, and one for those that need them; [] without any."""
    lines = [f"{Cell.of(line)}: {line['why']}" for line in record.diverged[:SHOWN]]
    if rest := record.diverged[SHOWN:]:
        lines.append(f"diverged, too: {named(Cell.of(line) for line in rest)}")
    if needy := record.not_computed:
        lines.append(f"not computed, because they need what diverged: {named(needy)}")
    return lines


def state(record: RunRecord) -> str:
    """What a run lacks, in a word or two: "", "unfinished", "2 of 9 cells diverged"."""
    lost, total = len(record.diverged), len(record.config.cells())
    words = [f"{lost} of {total} cells diverged"] * bool(lost) + ["unfinished"] * (not record.complete)
    return "; ".join(words)


def unfinished(record: RunRecord, of: str = "cells", mark: str = "") -> str:
    """How much of a run is there, as a sentence, "" where all is; tables have `mark` in place of the rest."""
    done, total = len(record.points), len(record.config.cells())
    if done == total:
        return ""
    text = f"{state(record)}: {done:,} of {total:,} {of} are there"
    text += f"; {mark} marks what is missing." if mark else "."
    return text[0].upper() + text[1:]


def named(cells: Iterable[Cell]) -> str:
    """Cells by seed and arm: `seed 4 ticket levels 1-3, reinit levels 1-3; seed 5 ticket level 1`."""
    by_seed: dict[int, dict[str, set[int]]] = {}
    for cell in cells:
        by_seed.setdefault(cell.seed, {}).setdefault(cell.arm, set()).add(cell.level)
    return "; ".join(
        f"seed {seed} " + ", ".join(f"{arm} {_levels(sorted(levels))}" for arm, levels in arms.items())
        for seed, arms in by_seed.items()
    )


def _levels(levels: list[int]) -> str:
    """Sorted numbers, those in a row as 1-3."""
    rows: list[list[int]] = []
    for level in levels:
        if rows and level == rows[-1][-1] + 1:
            rows[-1].append(level)
        else:
            rows.append([level])
    shown = ",".join(f"{row[0]}-{row[-1]}" if len(row) > 1 else str(row[0]) for row in rows)
    return f"level{'s' * (len(levels) > 1)} {shown}"
