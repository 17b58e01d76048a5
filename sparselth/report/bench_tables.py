"""Rows of `bench` as text: a table in 80 columns, with more of them where there is room, and words.

All speed-ups of a table are over one thing: dense at its best of the same layer, batch size and dtype.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparselth.report.bench_words import Row, percent, ratio, sparse_best, summary

WIDTH = 80  # columns where nobody says how many there are
BUSY = 0.5  # of a machine's cores at work for others, above which times are said to be of little use
SHORT = {"dense eager": "eager", "dense columns": "columns", "dense compiled": "compiled"}
MEANING = {
    "dense": "dense: the fastest dense of eager, compiled, channels-last (convolutions) and columns "
    "(features-major).",
    "time": "time: median of interleaved rounds; IQR: from the first quartile to the third, of it.",
    "speed-up": "speed-up: over dense at its best on the same line, auto too; ? where noise decides it.",
    "auto": "auto: what sparse.convert chose, changes of layout counted.",
    "bytes": "bytes: weights with every index, as a share of dense.",
    "floor": "floor: the least time by the measured anchors, as a share of the time.",
    "peak": "peak: with activations, by torch's allocator.",
    "error": "error: largest, relative to the largest |y|, against float64 with the same weights.",
    "made in": "made in: time of conversion.",
    "pays": "pays: after so many calls it has paid, against dense at its best.",
}


class Column(NamedTuple):
    """Of a table: the last ones are left out where a line has no room for them."""

    head: str
    width: int  # with the space before it; negative: to the left
    text: Callable[[Row], str]


def report(
    rows: Sequence[Row],
    device: Mapping[str, Any],
    left_out: Sequence[str],
    notes: Mapping[str, str],
    every: bool,
    width: int = WIDTH,
    whole: bool = True,
) -> str:
    """All of it: where, the table, its legend, the words; not `whole`: it was interrupted."""
    parts = [fill(header(device), width), table(rows, every, width)]
    parts += [fill(legend(device["type"], every, width), width), fill(summary(rows), width)]
    if closing := _left_out(left_out, notes, whole):
        parts.append(fill(closing, width))
    return "\n\n".join(parts)


def header(device: Mapping[str, Any]) -> str:
    """The device, its anchors, and whether it was quiet."""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in device["flops_per_s"].items())
    moved = {int(size): rate / 1e9 for size, rate in device["bytes_per_s"].items()}
    bandwidth = ", ".join(f"{rate:,.0f} ({buffer(size)})" for size, rate in sorted(moved.items()))
    cpu = device["type"] == "cpu"
    count = f"{device['threads']} thread{'s' * (device['threads'] > 1)}"
    threads = f", {count} on {device['cores']} core{'s' * (device['cores'] > 1)}" if cpu else ""
    lines = [
        f"{device['name']}{threads}, torch {device['torch']}",
        f"floors from measured anchors: GB/s {bandwidth}; GFLOP/s {rates}",
    ]
    return "\n".join([*lines, *busy(device)])


def busy(device: Mapping[str, Any]) -> list[str]:
    """A line where a processor had other work when it began."""
    if device["type"] != "cpu" or device["load"] <= BUSY * device["cores"]:
        return []
    return [
        f"This machine is busy (load {device['load']:.1f} on {device['cores']} cores at the start): "
        "expect wide spreads, and repeat what matters when it is quiet."
    ]


def fill(text: str, width: int) -> str:
    """Every line wrapped; what goes over is indented."""
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        for line in text.splitlines()
    )


def _left_out(cells: Sequence[str], notes: Mapping[str, str], whole: bool) -> str:
    """What was not measured, and why."""
    said = []
    if cells:
        shown = "; ".join(cells[:4])
        more = f"; and {len(cells) - 4:,} more, all under left_out in the JSON" if len(cells) > 4 else ""
        if whole:
            said.append(f"Not measured, too large for the default table or out of time: {shown}{more}.")
            said[-1] += " Name them with `shape` and `batch`."
        else:
            said.append(f"Not measured when it was interrupted: {shown}{more}.")
    said += [f"Not measured, {name}: {why}" for name, why in notes.items()]
    return "\n".join(said)


def buffer(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def table(rows: Sequence[Row], every: bool = False, width: int = WIDTH) -> str:
    """A block for each shape, dtype and mask, a line for each batch; `every`: for each implementation."""
    blocks: dict[tuple[Any, ...], dict[int, list[Row]]] = {}
    for row in rows:
        key = row["shape"], row["dtype"], row["mask"], row["sparsity"]
        blocks.setdefault(key, {}).setdefault(row["batch"], []).append(row)
    columns, _ = fitting(EVERY if every else BEST, width)
    lines = [head(columns)]
    for batches in blocks.values():
        lines += ["", fill(_heading(next(iter(batches.values()))[0]), width)]
        for batch in sorted(batches):
            of_batch = _every(batches[batch]) if every else [_best(batches[batch])]
            lines += [line(columns, [column.text(row) for column in columns]) for row in of_batch]
    return "\n".join(lines)


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[str]]:
    """The columns that a line has room for, and the names of the others."""
    room, shown = width, []
    for column in columns:
        room -= abs(column.width)
        if room < 0:
            break
        shown.append(column)
    return shown, [column.head for column in columns[len(shown) :]]


def head(columns: Sequence[Column]) -> str:
    return line(columns, [column.head for column in columns])


def line(columns: Sequence[Column], texts: Sequence[str]) -> str:
    """Texts as a line of a table."""
    return "".join(
        f"{text:>{column.width}}" if column.width > 0 else f" {text:<{-column.width - 1}}"
        for column, text in zip(columns, texts, strict=True)
    ).rstrip()


def legend(device: str, every: bool = False, width: int = WIDTH) -> str:
    """What the columns mean that are there, which ones are not, and how times were taken."""
    shown, hidden = fitting(EVERY if every else BEST, width)
    heads = [column.head for column in shown]
    lines = [text for name, text in MEANING.items() if name in heads or name == "auto"]
    if hidden:
        lines.append(f"Where a line has {width_of(EVERY if every else BEST)} columns: {', '.join(hidden)}.")
    state = (
        "cold: behind a write of four times the second-level cache, from a CUDA graph where that can be"
        if device == "cuda"
        else "warm: the same memory in every call, so what fits lies in a cache"
    )
    return "\n".join([*lines, f"Times are {state}."])


def width_of(columns: Sequence[Column]) -> int:
    return sum(abs(column.width) for column in columns)


def seconds(taken: float | None) -> str:
    """Three digits and a unit."""
    if taken is None:
        return "–"
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if taken * scale < 999.5:
            return f"{_three(taken * scale)} {unit}"
    return f"{_three(taken)} s"


def size(count: int | None) -> str:
    if count is None:
        return "–"
    for unit, scale in (("B", 1), ("KB", 1e3), ("MB", 1e6)):
        if count / scale < 999.5:
            return f"{_three(count / scale)} {unit}"
    return f"{_three(count / 1e9)} GB"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def share(value: float | None) -> str:
    """As percent; with a decimal below ten."""
    return "–" if value is None else f"{100 * value:.0f}%" if value >= 0.0995 else f"{100 * value:.1f}%"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _heading(row: Row) -> str:
    block = f" {row['block']}x{row['block']}" if row["block"] else ""
    facts = [f"weights {size(row['dense_weight_bytes'])} dense", f"{percent(row['density'])} kept"]
    facts += [f"{row[name]:,} dead {name[5:]}" for name in ("dead_rows", "dead_columns") if row[name]]
    facts.append(f"of tiles of 16 x 16 {percent(row['tiles_16'])} in use")
    origin = f" ({row['origin']})" if row["origin"] else ""
    name = f"{row['shape']}{origin}, {row['dtype']}, {row['mask']}{block} {percent(row['sparsity'])}"
    return f"{name}: {', '.join(facts)}"


def _best(cell: list[Row]) -> Row:
    """The best sparse row with that of dense and of `auto`, as the columns of `BEST` take them."""
    dense = [row for row in cell if row["kind"] == "dense" and row["median_s"]]
    return {
        "batch": cell[0]["batch"],
        "dense": min(dense, key=lambda row: float(row["median_s"]), default=None),
        "auto": next((row for row in cell if row["kind"] == "auto"), None),
        "best": sparse_best(cell),
    }


def _every(cell: list[Row]) -> list[Row]:
    """All rows, dense ones first, the faster before the slower; the batch size stands in the first."""
    found = sorted(cell, key=lambda row: (row["kind"] != "dense", row["median_s"] or math.inf))
    return [found[0], *({**row, "batch": ""} for row in found[1:])]


def _dense(row: Row) -> str:
    return seconds(row["dense"]["median_s"]) if row["dense"] else "–"


def _its_best(row: Row) -> str:
    return SHORT.get(row["dense"]["implementation"], "ch.-last") if row["dense"] else "–"


def _speedup(row: Row) -> str:
    return "FAILED" if row["check"] != "passed" else ratio(row["speedup"], row["noisy"])


def _iqr(row: Row) -> str:
    return share(row["iqr_s"] / row["median_s"] if row["median_s"] else None)


def _bytes(row: Row) -> str:
    return share(row["weight_bytes"] / row["dense_weight_bytes"] if row["weight_bytes"] is not None else None)


def _pays(row: Row) -> str:
    if row["kind"] == "dense" or row["check"] != "passed":
        return ""
    return "?" if row["noisy"] else f"{row['pays_after']:,}" if row["pays_after"] else "never"


def _of_best(text: Callable[[Row], str]) -> Callable[[Row], str]:
    """Of the best sparse row, where there is one."""
    return lambda row: text(row["best"]) if row["best"] else "–"


BEST = (
    Column("batch", 5, lambda row: str(row["batch"])),
    Column("dense", 8, _dense),
    Column("its best", -9, _its_best),
    Column("sparse, best", -19, _of_best(lambda row: str(row["implementation"]))),
    Column("time", 8, _of_best(lambda row: seconds(row["median_s"]))),
    Column("speed-up", 9, _of_best(_speedup)),
    Column("IQR", 6, _of_best(_iqr)),
    Column("auto", 8, lambda row: _speedup(row["auto"]) if row["auto"] else "–"),
    Column("bytes", 7, _of_best(_bytes)),
    Column("floor", 6, _of_best(lambda row: share(row["floor_fraction"]))),
    Column("peak", 8, _of_best(lambda row: size(row["peak_bytes"]))),
    Column("error", 6, _of_best(lambda row: _error(row["max_rel_error"]))),
    Column("made in", 8, _of_best(lambda row: seconds(row["conversion_s"]))),
    Column("pays", 7, _of_best(_pays)),
)
EVERY = (
    Column("batch", 5, lambda row: str(row["batch"])),
    Column(
        "implementation",
        -27,
        lambda row: row["implementation"] + (f" ({row['takes']})" if row["takes"] else ""),
    ),
    Column("time", 8, lambda row: seconds(row["median_s"])),
    Column("speed-up", 9, _speedup),
    Column("IQR", 6, _iqr),
    Column("bytes", 7, _bytes),
    Column("floor", 7, lambda row: share(row["floor_fraction"])),
    Column("error", 7, lambda row: _error(row["max_rel_error"])),
    Column("peak", 9, lambda row: size(row["peak_bytes"])),
    Column("made in", 9, lambda row: seconds(row["conversion_s"])),
    Column("pays", 9, _pays),
)
