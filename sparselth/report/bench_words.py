"""What the rows of `bench` say: who wins where, from which sparsity on, and what noise decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from sparselth.measure.noise import EVEN

Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> str:
    """Where sparse wins, where it loses, the break-even sparsity of each batch, and what failed."""
    said = []
    cells = in_cells(rows)
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
    return "\n".join(said)


def sparse_best(cell: Iterable[Row]) -> Row | None:
    """The fastest that is neither dense nor `auto`."""
    own = [row for row in cell if row["kind"] in ("ours", "torch") and row["speedup"]]
    return max(own, key=lambda row: float(row["speedup"]), default=None)


class Point(NamedTuple):
    """The best speed-up at a sparsity, and whether noise decides it."""

    sparsity: float
    speedup: float
    noisy: bool


def crossing(points: Sequence[Point]) -> float | None:
    """The sparsity from which on the speed-up is 1 or more, between measured ones that noise does not decide.

    None where there is none, or where one that noise decides lies in between.
    """
    told = [point for point in points if not point.noisy]
    if not told or told[-1].speedup < 1:
        return None
    found = told[0].sparsity
    for a, b in pairwise(told):
        if a.speedup < 1 <= b.speedup:
            share = math.log(1 / a.speedup) / math.log(b.speedup / a.speedup)
            found = a.sparsity + (b.sparsity - a.sparsity) * share
    low, high = _around(told, found)
    return None if any(low < point.sparsity < high for point in points if point.noisy) else found


def _around(told: Sequence[Point], at: float) -> tuple[float, float]:
    """The measured sparsities at or next to this one."""
    below = [point.sparsity for point in told if point.sparsity <= at]
    above = [point.sparsity for point in told if point.sparsity >= at]
    return max(below), min(above)


def swept(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[int, list[Point]]]:
    """(shape, dtype, mask) -> batch -> its points, where several sparsities were measured."""
    found: dict[tuple[str, str, str], dict[int, list[Point]]] = {}
    for (shape, batch, dtype, mask, sparsity), cell in in_cells(rows).items():
        if (best := sparse_best(cell)) is not None:
            point = Point(sparsity, best["speedup"], _noisy(cell))
            found.setdefault((shape, dtype, mask), {}).setdefault(batch, []).append(point)
    several = {
        key: {batch: sorted(points) for batch, points in sorted(by.items()) if len(points) > 1}
        for key, by in found.items()
    }
    return {key: by for key, by in several.items() if by}


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
        how = f"{ratio(gains[0][0])} to {ratio(gains[-1][0])}" if len(gains) > 1 else ratio(gains[0][0])
        middle = gains[len(gains) // 2][0]
        parts.append(f"sparse wins on {_count(won, cells)}: {how}")
        if len(gains) > 2:
            parts[-1] += f", in the middle {ratio(middle)}, most on {gains[-1][1]}"
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
    """Whether noise decides between the best sparse and dense."""
    best = sparse_best(cell)
    return bool(best and best["noisy"])


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
        parts = [f"batch {batch:,} {_from_on(points)}" for batch, points in by_batch.items()]
        said.append(
            f"Break-even sparsity of {shape}, {dtype}, {mask}, between measured ones: {'; '.join(parts)}."
        )
    return said


def _from_on(points: Sequence[Point]) -> str:
    """The break-even as far as noise lets it be told."""
    told = [point for point in points if not point.noisy]
    if not told:
        return "too noisy to say"
    lowest, highest = told[0].sparsity, told[-1].sparsity
    if told[-1].speedup < 1:
        return f"none up to {percent(highest)}" + ", too noisy above" * (points[-1].sparsity > highest)
    if all(point.speedup >= 1 for point in told):
        below = "too noisy below" if points[0].sparsity < lowest else "the lowest measured"
        return f"at or below {percent(lowest)}, {below}"
    if (at := crossing(points)) is not None:
        return f"{100 * at:.0f} %"
    low, high = _around(told, crossing(told) or lowest)
    return f"from {percent(low)} to {percent(high)}, too noisy between"


def _auto(rows: Sequence[Row]) -> list[str]:
    """`auto` beside dense that takes and gives rows, too: what a user had before."""
    own = [row for row in rows if row["kind"] == "auto" and row.get("like_speedup")]
    if not own:
        return []
    beside = "auto beside dense with the same layout of input and output"
    told = [row for row in own if not row["like_noisy"]]
    unclear = (
        f"; too noisy to say in {len(own) - len(told)} of {len(own)} cases" if len(told) < len(own) else ""
    )
    if not told:
        return [f"{beside}: too noisy to say."]
    told.sort(key=lambda row: float(row["like_speedup"]))
    slow = [row for row in told if row["like_speedup"] < EVEN[0]]
    if not slow:
        least = f"{ratio(told[0]['like_speedup'])} ({_name(told[0])})"
        return [f"{beside}: never below {EVEN[0]}x; its least is {least}{unclear}."]
    named = ", ".join(
        f"{ratio(row['like_speedup'])} on {row['shape']} at batch {row['batch']:,} ({row['takes']})"
        for row in slow[:6]
    )
    more = f", and {len(slow) - 6} more" if len(slow) > 6 else ""
    return [
        f"FLAGGED: {beside}: below {EVEN[0]}x in {len(slow)} of {len(own)} cases: {named}{more}{unclear}."
    ]


def _name(row: Row) -> str:
    return (
        f"{row['implementation']} on {row['shape']}, batch {row['batch']:,}, {row['dtype']}, {row['mask']} "
        f"{percent(row['sparsity'])}"
    )


def in_cells(rows: Sequence[Row]) -> dict[tuple[str, int, str, str, float], list[Row]]:
    """By shape, batch, dtype, mask and sparsity."""
    found: dict[tuple[str, int, str, str, float], list[Row]] = {}
    for row in rows:
        found.setdefault(_cell(row), []).append(row)
    return found


def _cell(row: Row) -> tuple[str, int, str, str, float]:
    return row["shape"], row["batch"], row["dtype"], row["mask"], row["sparsity"]


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def ratio(value: float | None, noisy: bool | None = False) -> str:
    """Three digits; with a question mark where noise decides it."""
    if value is None:
        return "–"
    text = f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x" if value < 99.95 else f"{value:,.0f}x"
    return text + "?" * bool(noisy)
