"""Rows of `bench` as text: a table of at most 110 columns, and what it says in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
WIDTH = 110
NOISE = 0.5  # interquartile range, as a share of the median, above which no winner is named
EVEN = 0.97, 1.03  # speed-ups between them are no win and no loss
BUSY = 0.5  # of a machine's cores at work for others, above which times are said to be of little use
SHORT = {"dense eager": "eager", "dense columns": "columns", "dense compiled": "compiled"}
HEAD = (
    f"{'batch':>5}{'dense':>8} {'its best':<8} {'sparse, best':<18}{'time':>8}{'IQR':>5}{'speed-up':>9}"
    f"{'floor':>6}{'bytes':>6}{'peak':>8}{'error':>6}{'made in':>8}{'pays':>7}{'auto':>6}"
)
HEAD_ALL = (
    f"{'batch':>5} {'implementation':<26}{'time':>9}{'IQR':>6}{'speed-up':>9}{'floor':>7}{'bytes':>8}"
    f"{'peak':>9}{'error':>8}{'made in':>9}{'pays after':>11}"
)
LEGEND = """\
dense: the fastest dense of eager, compiled, channels-last (convolutions) and columns (features-major).
time: median of interleaved rounds; IQR: from the first quartile to the third, as a share of it.
speed-up: over dense at its best. floor: the least time by the measured anchors, as a share of the time.
bytes: weights with every index, as a share of dense. peak: with activations, by torch's allocator.
made in: time of conversion. pays: after so many calls it has paid, against dense at its best.
error: largest, relative to the largest |y|, against float64 with the same weights.
auto: what sparse.convert chose, layout changes counted, over dense with the same input and output."""


def report(
    rows: Sequence[Row],
    device: Mapping[str, Any],
    left_out: Sequence[str],
    notes: Mapping[str, str],
    every: bool,
) -> str:
    """All of it: where, the table, its legend, the words."""
    parts = [header(device), table(rows, every), fill(legend(device["type"])), summary(rows)]
    if closing := _left_out(left_out, notes):
        parts.append(closing)
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
    if cpu and device["load"] > BUSY * device["cores"]:
        lines.append(
            f"This machine is busy (load {device['load']:.1f} on {device['cores']} cores at the start): "
            "expect wide spreads, and repeat what matters when it is quiet."
        )
    return fill("\n".join(lines))


def fill(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for line in text.splitlines()
    )


def _left_out(cells: Sequence[str], notes: Mapping[str, str]) -> str:
    """What was not measured, and why."""
    said = []
    if cells:
        shown = "; ".join(cells[:4])
        more = f"; and {len(cells) - 4:,} more, all in bench.json" if len(cells) > 4 else ""
        said.append(
            f"Not measured, too large for the default table or out of time: {shown}{more}. Name them with "
            "`shape` and `batch`."
        )
    said += [f"Not measured, {name}: {why}" for name, why in notes.items()]
    return fill("\n".join(said))


def buffer(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def table(rows: Sequence[Row], every: bool = False) -> str:
    """A block for each shape, dtype and mask, a line for each batch; `every`: for each implementation."""
    blocks: dict[tuple[Any, ...], dict[int, list[Row]]] = {}
    for row in rows:
        key = row["shape"], row["dtype"], row["mask"], row["sparsity"]
        blocks.setdefault(key, {}).setdefault(row["batch"], []).append(row)
    lines = [HEAD_ALL if every else HEAD]
    for batches in blocks.values():
        lines.append(_heading(next(iter(batches.values()))[0]))
        for batch in sorted(batches):
            lines += _every(batches[batch]) if every else [_line(batches[batch])]
    return "\n".join(lines)


def legend(device: str) -> str:
    state = (
        "cold: behind a write of four times the second-level cache, from a CUDA graph where that can be"
        if device == "cuda"
        else "warm: the same memory in every call, so what fits lies in a cache"
    )
    return f"{LEGEND}\nTimes are {state}."


def summary(rows: Sequence[Row]) -> str:
    """Where sparse wins, where it loses, the break-even sparsity of each batch, and what failed."""
    said = []
    cells = _cells(rows)
    groups: dict[tuple[Any, ...], list[list[Row]]] = {}
    for (_, _, dtype, mask, sparsity), cell in cells.items():
        groups.setdefault((dtype, mask, sparsity), []).append(cell)
    several = swept(rows)
    for (dtype, mask, sparsity), members in groups.items():
        extra = all((cell[0]["shape"], dtype, mask) in several for cell in members)
        if extra and not any(row["kind"] == "auto" for cell in members for row in cell):
            continue  # measured for the break-even sparsity, which is said below
        if all(sparse_best(cell) is None for cell in members):
            said.append(f"{dtype}, {mask} {percent(sparsity)}: nothing but dense runs here: use dense.")
            continue
        for batch in sorted({cell[0]["batch"] for cell in members}):
            here = [cell for cell in members if cell[0]["batch"] == batch]
            said.append(f"{dtype}, {mask} {percent(sparsity)}, batch {batch:,}: {_verdict(here)}")
    said += _break_even(rows)
    said += _auto(rows)
    said += [f"FAILED {_name(row)}: {row['check']}." for row in rows if row["check"] != "passed"]
    return fill("\n".join(said))


def sparse_best(cell: Iterable[Row]) -> Row | None:
    """The fastest that is neither dense nor `auto`."""
    own = [row for row in cell if row["kind"] in ("ours", "torch") and row["speedup"]]
    return max(own, key=lambda row: float(row["speedup"]), default=None)


def crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity from which on the speed-up is 1 or more, between measured ones; None: nowhere."""
    points = sorted(points)
    if points[-1][1] < 1:
        return None
    found = points[0][0]
    for (s0, g0), (s1, g1) in pairwise(points):
        if g0 < 1 <= g1:
            found = s0 + (s1 - s0) * math.log(1 / g0) / math.log(g1 / g0)
    return found


def swept(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[int, list[tuple[float, float]]]]:
    """(shape, dtype, mask) -> batch -> (sparsity, best speed-up), where several sparsities were measured."""
    found: dict[tuple[str, str, str], dict[int, list[tuple[float, float]]]] = {}
    for (shape, batch, dtype, mask, sparsity), cell in _cells(rows).items():
        if (best := sparse_best(cell)) is not None:
            found.setdefault((shape, dtype, mask), {}).setdefault(batch, []).append(
                (sparsity, best["speedup"])
            )
    several = {
        key: {batch: sorted(points) for batch, points in sorted(by.items()) if len(points) > 1}
        for key, by in found.items()
    }
    return {key: by for key, by in several.items() if by}


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


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


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x" if value < 99.95 else f"{value:,.0f}x"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%" if value >= 0.0995 else f"{100 * value:.1f}%"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _cells(rows: Sequence[Row]) -> dict[tuple[str, int, str, str, float], list[Row]]:
    found: dict[tuple[str, int, str, str, float], list[Row]] = {}
    for row in rows:
        found.setdefault(_cell(row), []).append(row)
    return found


def _cell(row: Row) -> tuple[str, int, str, str, float]:
    return row["shape"], row["batch"], row["dtype"], row["mask"], row["sparsity"]


def _heading(row: Row) -> str:
    block = f" {row['block']}x{row['block']}" if row["block"] else ""
    facts = [f"weights {size(row['dense_weight_bytes'])} dense", f"{percent(row['density'])} kept"]
    facts += [f"{row[name]:,} dead {name[5:]}" for name in ("dead_rows", "dead_columns") if row[name]]
    facts.append(f"of tiles of 16 x 16 {percent(row['tiles_16'])} in use")
    origin = f" ({row['origin']})" if row["origin"] else ""
    name = f"{row['shape']}{origin}, {row['dtype']}, {row['mask']}{block} {percent(row['sparsity'])}"
    return "\n" + textwrap.fill(f"{name}: {', '.join(facts)}", WIDTH, subsequent_indent="  ")


def _line(cell: list[Row]) -> str:
    dense = min(
        (row for row in cell if row["kind"] == "dense" and row["median_s"]),
        key=lambda row: float(row["median_s"]),
        default=None,
    )
    text = f"{cell[0]['batch']:>5}{seconds(dense['median_s'] if dense else None):>8}"
    text += f" {SHORT.get(dense['implementation'], 'ch.-last') if dense else '–':<8} "
    best = sparse_best(cell)
    if best is None:
        text += f"{'–':<81}"
    else:
        pays = f"{best['pays_after']:,}" if best["pays_after"] else "never"
        text += (
            f"{best['implementation']:<18}{seconds(best['median_s']):>8}"
            f"{_share(best['iqr_s'] / best['median_s']):>5}{_ratio(best['speedup']):>9}"
            f"{_share(best['floor_fraction']):>6}"
            f"{_share(best['weight_bytes'] / best['dense_weight_bytes']):>6}{size(best['peak_bytes']):>8}"
            f"{_error(best['max_rel_error']):>6}{seconds(best['conversion_s']):>8}{pays:>7}"
        )
    auto = next((row for row in cell if row["kind"] == "auto"), None)
    return text + f"{_ratio(auto['speedup'] if auto else None):>6}"


def _every(cell: list[Row]) -> list[str]:
    lines: list[str] = []
    for row in sorted(cell, key=lambda row: (row["kind"] != "dense", row["median_s"] or math.inf)):
        name = row["implementation"] + (f" ({row['takes']})" if row["takes"] else "")
        pays = (
            "" if row["kind"] == "dense" else "never" if not row["pays_after"] else f"{row['pays_after']:,}"
        )
        if row["check"] != "passed":
            pays = "FAILED"
        iqr = None if row["median_s"] is None else row["iqr_s"] / row["median_s"]
        share = None if row["weight_bytes"] is None else row["weight_bytes"] / row["dense_weight_bytes"]
        lines.append(
            f"{'' if lines else row['batch']:>5} {name:<26}{seconds(row['median_s']):>9}"
            f"{_share(iqr):>6}{_ratio(row['speedup']):>9}{_share(row['floor_fraction']):>7}"
            f"{_share(share):>8}{size(row['peak_bytes']):>9}{_error(row['max_rel_error']):>8}"
            f"{seconds(row['conversion_s']):>9}{pays:>11}".rstrip()
        )
    return lines


def _verdict(cells: list[list[Row]]) -> str:
    """One batch: how many layers sparse wins, by how much, and which it loses."""
    best = {cell[0]["shape"]: found for cell in cells if (found := sparse_best(cell))}
    unclear = [cell[0]["shape"] for cell in cells if _noisy(cell)]
    won = {s: row for s, row in best.items() if row["speedup"] > EVEN[1] and s not in unclear}
    lost = [s for s, row in best.items() if row["speedup"] < EVEN[0] and s not in unclear]
    even = [s for s in best if s not in won and s not in lost and s not in unclear]
    lost += [cell[0]["shape"] for cell in cells if cell[0]["shape"] not in best]
    parts = []
    if won:
        gains = sorted((row["speedup"], shape) for shape, row in won.items())
        how = f"{_ratio(gains[0][0])} to {_ratio(gains[-1][0])}" if len(gains) > 1 else _ratio(gains[0][0])
        middle = gains[len(gains) // 2][0]
        parts.append(f"sparse wins on {_count(won, cells)}: {how}")
        if len(gains) > 2:
            parts[-1] += f", in the middle {_ratio(middle)}, most on {gains[-1][1]}"
    if even:
        parts.append(f"even on {', '.join(even)}")
    if lost:
        parts.append(
            f"use dense on {', '.join(lost)}" if len(lost) < len(cells) or len(lost) == 1 else "use dense"
        )
    if unclear:
        where = ", ".join(unclear) if len(unclear) <= 4 else _count(dict.fromkeys(unclear), cells)
        parts.append(f"too noisy to say on {where}, repeat on a quiet machine")
    return "; ".join(parts) + "."


def _noisy(cell: list[Row]) -> bool:
    """Whether one of the two times that are compared spreads by more than NOISE."""
    best = sparse_best(cell)
    compared = [
        row for row in cell if best and row["implementation"] in (best["implementation"], best["dense_best"])
    ]
    return any(row["iqr_s"] > NOISE * row["median_s"] for row in compared if row["median_s"])


def _count(won: Mapping[str, Row | None], cells: list[list[Row]]) -> str:
    if len(cells) == 1:
        return next(iter(won))
    if len(won) == len(cells) == 2:
        return "both layers"
    return f"all {len(cells)} layers" if len(won) == len(cells) else f"{len(won)} of {len(cells)} layers"


def _break_even(rows: Sequence[Row]) -> list[str]:
    found = swept(rows)
    if not found:
        return [
            "Break-even sparsity: not measured, one sparsity tells nothing of it; give several, such as "
            "`sparsity` 0.5,0.8,0.9,0.95."
        ]
    said = []
    for (shape, dtype, mask), by_batch in found.items():
        parts = []
        for batch, points in by_batch.items():
            from_on, lowest, highest = crossing(points), points[0][0], points[-1][0]
            if from_on is None:
                parts.append(f"batch {batch:,} none up to {percent(highest)}")
            elif from_on == lowest:
                parts.append(f"batch {batch:,} at or below {percent(lowest)}, the lowest measured")
            else:
                parts.append(f"batch {batch:,} {100 * from_on:.0f} %")
        said.append(
            f"Break-even sparsity of {shape}, {dtype}, {mask}, between measured ones: {'; '.join(parts)}."
        )
    return said


def _auto(rows: Sequence[Row]) -> list[str]:
    own = [row for row in rows if row["kind"] == "auto" and row["speedup"]]
    if not own:
        return []
    lowest = min(own, key=lambda row: float(row["speedup"]))
    below = [row for row in own if row["speedup"] < EVEN[0]]
    if not below:
        return [
            f"auto is never below 0.97x of dense; its least is {_ratio(lowest['speedup'])} ({_name(lowest)})."
        ]
    cells = _cells(rows)
    unclear = [row for row in below if row["speedup"] + _doubt(row, cells[_cell(row)]) >= EVEN[0]]
    slow = sorted((row for row in below if row not in unclear), key=lambda row: float(row["speedup"]))
    said = []
    if slow:
        named = ", ".join(
            f"{_ratio(row['speedup'])} on {row['shape']} at batch {row['batch']:,} ({row['takes']})"
            for row in slow[:6]
        )
        more = f", and {len(slow) - 6} more" if len(slow) > 6 else ""
        said.append(
            f"FLAGGED: auto is below 0.97x of dense in {len(slow)} of {len(own)} cases: {named}{more}."
        )
    if unclear:
        least = min(unclear, key=lambda row: float(row["speedup"]))
        said.append(
            f"auto is below 0.97x in {len(unclear)} of {len(own)} cases by no more than the spread of the "
            f"times explains; the least is {_ratio(least['speedup'])} ({_name(least)})."
        )
    return said


def _doubt(row: Row, cell: list[Row]) -> float:
    """Twice the standard error of a ratio of two medians, from their quartiles."""
    bar = next(other for other in cell if other["implementation"] == row["dense_best"])
    parts = [(one["iqr_s"] / one["median_s"]) ** 2 / one["samples"] for one in (row, bar)]
    return 2 * 0.93 * float(row["speedup"]) * math.sqrt(sum(parts))


def _name(row: Row) -> str:
    return (
        f"{row['implementation']} on {row['shape']}, batch {row['batch']:,}, {row['dtype']}, {row['mask']} "
        f"{percent(row['sparsity'])}"
    )
