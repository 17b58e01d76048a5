"""Rows of whole networks as text: a table, the memory, and what they say in words.

All speed-ups of a batch size are over one thing: the fastest dense rival that is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sparselth.measure.noise import EVEN
from sparselth.report import layer_words
from sparselth.report.bench_tables import WIDTH, Column, fill, fitting, head, line, share, width_of
from sparselth.report.bench_words import ratio

if TYPE_CHECKING:
    from sparselth.measure.case import Result
    from sparselth.measure.memory import Memory

LEGEND = """\
IQR: from the first quartile to the third of interleaved rounds, of the median. speed-up: over dense at its \
best with the same batch; ? where noise decides it. weights: with every index. peak: weights, indices and \
activations; for a step gradients and moments too."""
WIDER = """\
error: against float64, of the logits relative to the largest, of a step that of the gradient's norm. make: \
conversion, and measuring what this machine had not measured before."""


def report(result: Result, where: str, width: int = WIDTH) -> str:
    """All of it: what was measured and `where`, the table with its legend, the memory, the words."""
    said = [fill(line, width) for line in sentences(result)]
    first = [fill(title(result), width), fill(where, width), ""]
    tables = [table(result.rows, width), fill(legend(width), width), "", memory_table(result.memory), ""]
    return "\n".join([*first, *tables, *said])


def title(result: Result) -> str:
    """What was measured, in a line."""
    facts, kept = result.facts, f"{100 * result.facts['kept']:.3g} %"
    name = facts["network"]
    if result.what == "ticket":
        return (
            f"{name}, seed {facts['seed']}, ticket of level {facts['level']} of {facts['run']}: "
            f"{kept} of the weights, on {facts['images']:,} test images of {facts['data']}"
        )
    if result.what == "module":
        return f"{name}, {facts['mask']}, {kept} of the weights"
    if result.what == "module-training":
        return f"{name}, one step of training with SGD and momentum, {facts['mask']}, {kept} of the weights"
    if result.what == "model":
        return f"{name}, random mask, {kept} of every layer's weights, on random images"
    return f"{name}, one step of training with Adam, random mask, {kept} of every layer's weights"


def sentences(result: Result) -> list[str]:
    """What the rows say, one thing after the other."""
    said: list[str] = []
    for _, group in groupby(result.rows, key=lambda row: row["batch"]):
        rows = list(group)
        said += [_sentence(rows), *_in_bf16(rows)]
        if not result.facts.get("dead_are_zero", True):
            said.append("CHECK FAILED: pruned weights or their moments are not zero after these steps.")
        said += _failures(rows)
    if result.what in ("ticket", "model"):
        said.append(_agreement(result.rows))
    said += layer_words.layers(_layers(result), result.facts.get("whole", ""))
    said += layer_words.compressed(result.facts.get("compression", ()))
    said += result.notes
    if "accuracy" in result.facts:
        said += _of_ticket(result.facts)
    return said


def _layers(result: Result) -> Sequence[Mapping[str, Any]]:
    """What was chosen for the layers, at the last batch size."""
    found: Sequence[Mapping[str, Any]] = result.facts.get("layers", ())
    return found


def _of_ticket(facts: Mapping[str, Any]) -> list[str]:
    recorded, file, dense = (facts[k] for k in ("recorded_accuracy", "file_bytes", "dense_file_bytes"))
    wrong = "" if recorded is None else f"; CHECK FAILED: the run recorded {100 * recorded:.2f} %"
    return [
        f"Test accuracy: dense {100 * facts['dense_accuracy']:.2f} %, "
        f"ticket {100 * facts['accuracy']:.2f} %{wrong}.",
        f"Stored file: the ticket's cell {file:,} bytes, the dense network stored the same way "
        f"{dense:,}, {file / dense:.3f} of it.",
    ]


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    ours = rows[-1]
    gain, best, times = ours["speedup"], ours["dense_best"], (ours["median_s"], ours["dense_median_s"])
    what = f"Batch {ours['batch']}: sparselth takes {_ms(times[0])} ms, {best} {_ms(times[1])} ms"
    if ours["check"] == "failed":
        return f"{what}, and is wrong: use {best}."
    if ours["noisy"]:
        return f"{what}; too noisy to say who wins, repeat on a quiet machine."
    if gain < EVEN[0]:
        return f"{what}; use dense, sparselth takes {1 / gain:.2f} times as long."
    if gain <= EVEN[1] or ours["pays_after"] is None:
        return f"{what}; neither wins."
    made, calls = ours["conversion_s"], ours["pays_after"]
    after = f"{calls:,} call{'s' * (calls != 1)}"
    return f"{what}: {gain:.2f}x; making it took {made:.2g} s, paid back after {after}."


def _in_bf16(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the CPU has tiles for bf16, what dense networks in it take beside ours in fp32."""
    ours = rows[-1]
    dense = [row for row in rows if row.get("dtype") == "bf16" and row["check"] == "passed"]
    if not dense or ours["check"] == "failed":
        return []
    best = min(dense, key=lambda row: row["median_s"])
    gain = ours["median_s"] / best["median_s"]
    more = (
        f"{gain:.2f} times as fast as sparselth" if gain >= 1 else f"sparselth {1 / gain:.2f} times as fast"
    )
    return [
        f"In bf16, for which this CPU has tiles (AMX), {best['implementation']} takes "
        f"{_ms(best['median_s'])} ms; {more}, in fp32. Off from float64 by {_off(best)} and {_off(ours)}."
    ]


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"CHECK FAILED: {row['implementation']} at batch {row['batch']} is off by {_off(row)} "
        f"from float64{_differ(row)}; it counts for nothing."
        for row in rows
        if row["check"] == "failed"
    ]


def _differ(row: Mapping[str, Any]) -> str:
    if "fault" in row:
        return f" ({row['fault']})"
    return f", {row.get('differing_predictions', 0)} predictions differ"


def _agreement(rows: Sequence[Mapping[str, Any]]) -> str:
    ours = [row for row in rows if row["implementation"] == "sparselth"]
    images = ours[0]["images"]
    off, ties = (max(row[key] for row in ours) for key in ("differing_predictions", "ties"))
    if not off:
        return f"Predictions are those of the dense network with its zeros on all {images:,} images."
    tied = f"on {ties} of them two classes tie within rounding"
    return f"Predictions differ on {off} of {images:,} images; {tied}."


def table(rows: Sequence[Mapping[str, Any]], width: int = WIDTH) -> str:
    """A line for every implementation and batch."""
    columns, _ = fitting(COLUMNS, width)
    lines = [line(columns, [column.text(dict(row)) for column in columns]) for row in rows]
    return "\n".join([head(columns), *lines])


def legend(width: int) -> str:
    """What the columns mean that are there, and which ones are not."""
    _, hidden = fitting(COLUMNS, width)
    if not hidden:
        return f"{LEGEND} {WIDER}"
    return f"{LEGEND}\nWhere a line has {width_of(COLUMNS)} columns: {', '.join(hidden)}."


def _off(row: Mapping[str, Any]) -> str:
    error = row["max_rel_error"]
    return "NaN" if error is None else f"{error:.1e}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _kb(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e3:,.1f}"


def _make(row: Mapping[str, Any]) -> str:
    return f"{row['conversion_s']:.2f}" if "conversion_s" in row else ""


def _pays(row: Mapping[str, Any]) -> str:
    if "pays_after" not in row or row["check"] == "failed":
        return ""
    return "?" if row["noisy"] else "never" if row["pays_after"] is None else f"{row['pays_after']:,}"


def _speedup(row: Mapping[str, Any]) -> str:
    return "FAILED" if row["check"] == "failed" else ratio(row["speedup"], row["noisy"])


COLUMNS = (
    Column("batch", 5, lambda row: str(row["batch"])),
    Column("", -23, lambda row: str(row["implementation"])),
    Column("ms", 10, lambda row: _ms(row["median_s"])),
    Column("speed-up", 10, _speedup),
    Column("IQR", 6, lambda row: share(row["iqr_s"] / row["median_s"])),
    Column("weights KB", 12, lambda row: _kb(row["weight_bytes"])),
    Column("peak KB", 12, lambda row: _kb(row["peak_bytes"])),
    Column("error", 9, lambda row: _off(row)),
    Column("file KB", 12, lambda row: _kb(row.get("file_bytes"))),
    Column("make s", 8, _make),
    Column("pays after", 12, _pays),
)


def memory_table(pairs: Mapping[str, tuple[Memory, Memory]]) -> str:
    """The table "memory, dense and pruned"; the keys name what was running."""
    labels = {
        "weights": "weights",
        "indices": "indices, masks",
        "gradients": "gradients",
        "optimizer": "optimizer state",
        "activations": "activations",
        "peak": "together",
        "file": "stored file",
    }
    lines = [f"{'memory, dense and pruned':<34}{'dense KB':>12}{'pruned KB':>12}{'of dense':>10}"]
    for title, (dense, pruned) in pairs.items():
        lines.append(title)
        for name, label in labels.items():
            before, after = getattr(dense, name), getattr(pruned, name)
            if before is None or after is None:
                continue
            share = f"{after / before:.3f}" if before else ""
            lines.append(f"  {label:<32}{before / 1e3:>12,.1f}{after / 1e3:>12,.1f}{share:>10}".rstrip())
    return "\n".join(lines)
