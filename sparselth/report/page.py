"""Text on a page as wide as the terminal: 80 columns unless there is room for more."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass

PROSE = 100  # columns of a line that is still read with ease
GAP = 3  # columns between groups


def width() -> int:
    """Columns of the terminal or of $COLUMNS, 80 where there is neither."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def report(title: str, *tables: str, legend: str, sentence: str) -> str:
    """A whole report, as wide as the terminal: what it is of, its tables, what they mean, and what follows.

    What is "" is left out.
    """
    parts = [fill(title), *tables, fill(legend), fill(sentence, indent="")]
    return "\n\n".join(part for part in parts if part)


def fill(text: str, indent: str = "  ", first: str = "") -> str:
    """Each line wrapped, what goes over indented; words longer than a line, such as paths, stay whole."""
    return "\n".join(
        textwrap.fill(
            line,
            min(width(), PROSE),
            initial_indent=first,
            subsequent_indent=indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for line in text.splitlines()
    )


@dataclass(frozen=True)
class Group:
    """Columns that stay side by side: cells from the header down, and a heading over all of them."""

    columns: list[list[str]]
    heading: str = ""

    def lines(self) -> list[str]:
        """Heading and rows, all of one width, right-aligned."""
        widths = [max(map(len, column)) for column in self.columns]
        rows = [
            "  ".join(cell.rjust(room) for cell, room in zip(row, widths, strict=True))
            for row in zip(*self.columns, strict=True)
        ]
        heading = f" {self.heading} ".center(len(rows[0]), "─") if self.heading else " " * len(rows[0])
        return [heading.ljust(len(rows[0])), *(row.rjust(len(heading)) for row in rows)]


def side_by_side(lead: Group, groups: list[Group], room: int) -> str:
    """Groups behind `lead`; those for which `room` is too narrow go into a table below, behind it again."""
    tables: list[list[str]] = []
    for group in groups:
        more = group.lines()
        if tables and len(tables[-1][0]) + GAP + len(more[0]) <= room:
            pairs = zip(tables[-1], more, strict=True)
            tables[-1] = [left + " " * GAP + right for left, right in pairs]
        else:
            pairs = zip(lead.lines(), more, strict=True)
            tables.append([left + " " * GAP + right for left, right in pairs])
    return "\n\n".join("\n".join(line.rstrip() for line in table if line.strip()) for table in tables)
