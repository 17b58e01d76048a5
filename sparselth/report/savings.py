"""What each level saves, as a table and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.tables import percent

Row = Mapping[str, Any]


def table(rows: Sequence[Row], title: str) -> str:
    """A line a level: counts, times and bytes, each beside dense."""
    dense = rows[0]
    lead = Group(
        [
            ["level", *(str(r["level"]) for r in rows)],
            ["left %", *(percent(r["weights_remaining"]) for r in rows)],
        ]
    )

    def counted(head: str, field: str, scale: float, digits: int = 0) -> list[list[str]]:
        values = [r[field] for r in rows]
        shown = ["–" if v is None else f"{v / scale:,.{digits}f}" for v in values]
        return [[head, *shown], ["of dense", *(_share(v, dense[field]) for v in values)]]

    times = [(r["inference_seconds"], r["noisy"]) for r in rows]
    inference = [
        ["us", *("–" if s is None else f"{1e6 * s:,.0f}" for s, _ in times)],
        ["of dense", *(_share(s, dense["inference_seconds"], noisy) for s, noisy in times)],
    ]
    groups = [
        Group(counted("parameters", "parameters", 1), "counted"),
        Group(counted("kFLOPs", "flops", 1e3), "of one input"),
        Group(counted("file KB", "file_bytes", 1e3, 1), "stored"),
        Group(counted("us a step", "step_seconds", 1e-6), "training"),
        Group(counted("state KB", "state_bytes", 1e3), "while training"),
        Group(inference, f"inference of {dense['batch']}"),
    ]
    legend = (
        "parameters: kept weights, biases and norms. FLOPs: two a kept weight and place, of linear layers "
        "and convolutions. file: what a ticket takes on the disk. training: the processor time of a step as "
        "the run measured it, and its weights, gradients, optimizer state and indices. inference: measured "
        "now, all levels in turn, each checked against float64, dense at its best; ? where noise decides it."
    )
    failed = [r for r in rows if r.get("check") == "failed"]
    parts = [fill(title), side_by_side(lead, groups, width()), fill(legend)]
    parts += [
        fill(f"CHECK FAILED: level {r['level']}: {r['why']}; its time counts for nothing") for r in failed
    ]
    return "\n\n".join([*parts, fill(sentence(rows), indent="")])


def _share(value: float | None, dense: float | None, noisy: bool = False) -> str:
    if value is None or not dense:
        return "–"
    return f"{value / dense:.3f}" + "?" * (noisy and value is not dense)


def sentence(rows: Sequence[Row]) -> str:
    """What the last level saves, and what it costs in accuracy on its seed."""
    dense, last = rows[0], rows[-1]
    if last is dense:
        return "Only the dense network is finished; nothing is saved yet."
    of = {name: last[name] / dense[name] for name in ("parameters", "flops", "file_bytes")}
    text = (
        f"At {percent(last['weights_remaining'])} % left: {of['parameters']:.3f} of the parameters, "
        f"{of['flops']:.3f} of the FLOPs and {of['file_bytes']:.3f} of the file"
    )
    if last["step_seconds"] and dense["step_seconds"]:
        text += f", {last['step_seconds'] / dense['step_seconds']:.2f} of the time of a training step"
    if last["inference_of_dense"] is not None:
        noise = " (within noise)" if last["noisy"] else ""
        text += f", {last['inference_of_dense']:.2f} of the time of inference{noise}"
    change = 100 * (last["final_accuracy"] - dense["final_accuracy"])
    return f"{text}; its accuracy is {change:+.2f} pp from dense, on seed {last['seed']} alone."
