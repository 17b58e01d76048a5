"""What the figures have in common: a column's width (3.3 in), looks, and files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparselth.files import write_atomically

WIDTH = 3.3  # inches, one column of a paper
DPI = 200
LINE = 66  # characters of a heading's line
# Okabe and Ito's colours differ for colour-blind readers; the markers differ in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "black")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*")
DASHED = (0, (4, 3))
STYLE: list[Any] = [
    "default",  # whatever the user's matplotlibrc says
    {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.linewidth": 0.4,
        "grid.color": "0.88",
        "axes.grid": True,
        "axes.axisbelow": True,
        "lines.linewidth": 1.2,
        "lines.markersize": 3.2,
        "legend.frameon": False,
        "axes.formatter.useoffset": False,
        "svg.hashsalt": "sparselth",
    },
]


def save(fig: Figure, folder: Path, name: str) -> list[Path]:
    """As PNG and SVG, each replaced in one step."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = BytesIO()
        fig.savefig(content, format=kind, dpi=DPI, metadata=metadata)
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    return paths


def look(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th thing; no two of the first 64 have both in common."""
    return COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
