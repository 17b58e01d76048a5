"""Tickets as text of 80 columns or more: what one holds, why it is fast or not, how two differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparselth.compare import Differences, LayerFacts, Overlap
from sparselth.measure.ticket_layers import PROBES, Speed
from sparselth.patterns import UNSTRUCTURED, in_words
from sparselth.report.page import fill, width
from sparselth.tickets import RunTicket, Ticket

NAME = 18  # columns of a layer's name
LONGEST_NOTE = 300


def facts(ticket: Ticket, size: int, dense_bytes: int | None, layers: list[LayerFacts]) -> str:
    """Where it came from, how many bytes it takes beside dense, and a line a layer."""
    masks = ticket.masks
    lines = [f"{ticket.file}"]
    beside = f", {size / dense_bytes:.3f} of the {dense_bytes:,} of dense weights" if dense_bytes else ""
    lines.append(f"{size:,} bytes{beside}")
    what = "weights that were never trained" if "frozen" in ticket.header else "prunable weights"
    lines.append(f"{masks.kept:,} of {masks.size:,} {what} kept, {100 * ticket.weights_remaining:.2f} %")
    network = ticket.model.name if isinstance(ticket, RunTicket) else ticket.header.get("network")
    lines.append(f"network: {network or 'not said'}")
    lines += [f"{name}: {_said(value)}" for name, value in ticket.notes.items() if name != "model"]
    if isinstance(versions := ticket.header.get("versions"), dict):
        lines.append("written with " + ", ".join(f"{name} {value}" for name, value in versions.items()))
    text = "\n".join(fill(line) for line in lines)
    rows = [["layer", "shape", "kept", "of", "%", "dead units", "inputs"]]
    for one in layers:
        shape, dead = "x".join(map(str, one.shape)), (f"{one.dead_units:,}", f"{one.dead_inputs:,}")
        share = f"{100 * one.density:.2f}"
        rows.append([short(one.name), shape, f"{one.kept:,}", f"{one.size:,}", share, *dead])
    return text + "\n\n" + table(rows)


def _said(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST_NOTE else f"{text[:LONGEST_NOTE]} ..."


def fast(layers: list[LayerFacts], found: Sequence[Speed], batch: int, device: str) -> str:
    """Each layer dense and sparse, its break-even, and in words what would have to change."""
    rows = [["layer", "kept %", "dense", "sparse", "form", "gain", "even %"]]
    density = {one.name: one.density for one in layers}
    said, faster = list[str](), list[str]()
    for speed in found:
        kept = f"{100 * density[speed.name]:.2f}"
        cells = ["-"] * 5
        if not speed.missing:
            cells[0] = duration(speed.dense)
        if speed.sparse is not None:
            cells[1:] = [
                duration(speed.sparse),
                speed.form,
                _gain(speed),
                _even(speed),
            ]
        rows.append([short(speed.name), kept, *cells])
        if speed.faster:
            faster.append(speed.name)
        else:
            said.append(f"{speed.name}: {why_not(speed, density[speed.name], batch)}")
    if faster:
        names = ", ".join(faster[:4]) + (" ..." if len(faster) > 4 else "")
        said.insert(
            0,
            f"faster, as long as less than their break-even is kept: {len(faster)} of {len(found)} ({names})",
        )
    measured = [speed for speed in found if not speed.missing]
    if measured:
        dense, best = (sum(getattr(s, name) for s in measured) for name in ("dense", "best"))
        mark = "?" * any(s.doubtful for s in measured)
        slowest = max(measured, key=lambda s: s.best)
        said.append(
            f"together: dense {duration(dense)}, with the faster of both {duration(best)}, "
            f"{dense / best:.2f}x{mark}; {slowest.name} takes {100 * slowest.best / best:.0f} % of that; "
            "sparselth.convert races whole networks, with changes of layout and all that is between layers"
        )
    if noisy := [speed.name for speed in measured if speed.doubtful]:
        said.append(
            f"other programs were at work on {len(noisy)} of {len(measured)} layers (?): these times say "
            "little; ask again on an idle machine"
        )
    head = fill(f"this machine, batch {batch}, {device}; a layer at a time, even: break-even")
    return f"{head}\n\n{table(rows)}\n\n" + fill("\n".join(said))


def _gain(speed: Speed) -> str:
    gain = speed.dense / (speed.sparse or speed.dense)
    return (f"{gain:.2f}x" if gain < 100 else f"{gain:.0f}x") + "?" * speed.doubtful


def _even(speed: Speed) -> str:
    more = ">" if speed.break_even >= max(PROBES) else ""
    return f"{more}{100 * speed.break_even:.1f}"


def why_not(speed: Speed, density: float, batch: int) -> str:
    """Why a layer is not faster, and what would have to change."""
    if speed.missing:
        return speed.missing
    if speed.sparse is None:
        return "not faster: no sparse form fits it; it stays dense"
    even, kept = f"{100 * speed.break_even:.1f} %", f"{100 * density:.2f} %"
    if 0 < speed.break_even < density:
        return (
            f"not faster: {kept} are kept, and below about {even} it would be: prune "
            f"{100 * (1 - speed.break_even / density):.0f} % of what is left, or whole units, which "
            "convert cuts out"
        )
    if speed.break_even:
        return (
            f"not faster: random masks are up to {even} kept, this one, of {kept}, is not as even as they are"
        )
    return (
        f"not faster: at a batch of {batch} dense wins from {100 * min(PROBES):.0f} % kept on; prune "
        "whole units, which convert cuts out, or serve another batch"
    )


def overlap(a: Ticket, b: Ticket, found: Differences) -> str:
    """Common weights of every layer beside chance, and values that differ."""
    rows = [["layer", "kept A", "kept B", "both", "by chance", "times", "sigmas", "jaccard"]]
    rows += [_row(one) for one in [*found.layers, found.total]]
    total = found.total
    lines = [f"A {a.file}", f"B {b.file}"]
    end = [f"values: {total.differ:,} of the {total.both:,} weights that both keep differ"]
    groups = dict[str, list[str]]()
    for one in found.layers:
        groups.setdefault(one.pattern, []).append(one.name)
    for pattern in sorted(groups.keys() - {UNSTRUCTURED}):
        end.append(f"by chance: of masks in {in_words(pattern)}, as both are, of {_some(groups[pattern])}")
    if found.others:
        end.append(f"other tensors that differ: {len(found.others):,} ({_some(found.others)})")
    return fill("\n".join(lines)) + "\n\n" + table(rows) + "\n\n" + fill("\n".join(end))


def _some(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:5]) + " ..." * (len(names) > 5)


def _row(one: Overlap) -> list[str]:
    return [
        *(short(one.name), f"{one.kept[0]:,}", f"{one.kept[1]:,}", f"{one.both:,}"),
        *(f"{one.by_chance:,.1f}", f"{one.times_chance:.2f}", f"{one.sigmas:+.1f}", f"{one.jaccard:.3f}"),
    ]


def short(name: str) -> str:
    """A layer's name in NAME columns, its middle left out."""
    return name if len(name) <= NAME else f"{name[: NAME - 14]}..{name[-12:]}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def table(rows: list[list[str]]) -> str:
    """The first column left, the others right; two columns apart where that fits the page, else one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) - 2 <= width() else " "
    lines = []
    for row in rows:
        cells = [cell.rjust(room) for cell, room in zip(row[1:], widths[1:], strict=True)]
        lines.append(gap.join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def verified(file: Path, checksum: str, schema: str) -> str:
    """The line of a file that was read whole."""
    if not checksum:
        return f"{file}: {schema}, read whole; an older version wrote no checksum"
    return f"{file}: {schema}, checksum {checksum} of arrays and header is right"
