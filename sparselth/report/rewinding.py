"""A run of `rewinding` as text, JSON and a figure: tickets and fresh weights by rewind step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sparselth.report.diverged import unfinished
from sparselth.report.drawing import WIDTH, band_note, extremes, heading, save_each, short
from sparselth.report.lines import by_seed, gap, gap_json, level_of_dense, line, mean_cell, said
from sparselth.report.page import Group, report, side_by_side, width
from sparselth.report.stats import FEWEST, Gap, holm, mean_interval, signed
from sparselth.report.tables import MISSING, levels_and_steps, percent, title
from sparselth.runs import RunRecord

ACCURACY = "accuracy_at_early_stop"
MOST_PANELS = 4


def values(record: RunRecord, kind: str, k: int, level: int, field: str = ACCURACY) -> dict[int, float]:
    """Seed → a field of tickets, or of the mean of the fresh draws, of a rewind step and level."""
    return by_seed(record.points, field, arm=f"{kind}-{k}", level=level)


def dense(record: RunRecord, field: str = ACCURACY) -> dict[int, float]:
    return by_seed(record.points, field, arm="dense")


def lead(record: RunRecord, k: int, level: int) -> Gap | None:
    """Tickets minus fresh weights, paired by seed."""
    return gap(record, values(record, "ticket", k, level), values(record, "reinit", k, level))


def against_dense(record: RunRecord, k: int, level: int) -> Gap | None:
    return gap(record, values(record, "ticket", k, level), dense(record))


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal."""
    titled = title(record, record.config.method)
    return report(titled, _rows(record), legend=_legend(record), sentence=sentence(record))


def _rows(record: RunRecord) -> str:
    places, columns = levels_and_steps(record, dense=True)
    own = [
        ["dense", mean_cell(dense(record)), *("" for _ in places)],
        *(
            [kind, "", *(mean_cell(values(record, kind, k, level)) for level, k in places)]
            for kind in ("ticket", "reinit")
        ),
    ]
    gaps = [
        [name, "", *(_shown(of(record, k, level)) for level, k in places)]
        for name, of in (("reinit", lead), ("dense", against_dense))
    ]
    groups = [Group(own, "accuracy %"), Group(gaps, "ticket minus")]
    return side_by_side(columns, groups, width())


def _shown(found: Gap | None) -> str:
    return MISSING if found is None else signed(found)


def _legend(record: RunRecord) -> str:
    config = record.config
    kind = " ± 95 % interval (Student's t)" if len(config.seeds) >= FEWEST else ""
    lines = [
        "rewind: the step whose weights tickets go back to. accuracy: on the test at early stop, mean over "
        f"the seeds{kind}; ticket minus: in pp, seed by seed{kind}.",
        "reinit: the masks of that step's tickets on fresh weights, trained from step 0 on.",
    ]
    return "\n".join(filter(None, [*lines, unfinished(record)]))


def winning(record: RunRecord, level: int) -> set[int]:
    """The steps whose tickets are above fresh weights, all steps of a level read at once (Holm 1979)."""
    gaps = {k: found for k in record.config.rewind if (found := lead(record, k, level)) is not None}
    return holm({k: found.chance(0.0) for k, found in gaps.items() if found.error is not None})


def sentence(record: RunRecord) -> str:
    """From which step on tickets beat fresh weights, with the interval that says so, or that it is open."""
    config, left = record.config, record.config.remaining()
    parts = [_of_level(record, level, f"{percent(left[level])} %") for level in config.levels]
    return " ".join(parts)


def _of_level(record: RunRecord, level: int, where: str) -> str:
    steps, won = record.config.rewind, winning(record, level)
    gaps = {k: found for k in steps if (found := lead(record, k, level)) is not None}
    if len(gaps) < len(steps):
        return f"At {where} of the weights not all is measured yet."
    at = {k: f"at step {k:,} ({signed(found)} pp)" for k, found in gaps.items()}
    if any(found.error is None for found in gaps.values()):
        n = min(found.seeds for found in gaps.values())
        return (
            f"At {where} of the weights it is open from which step on tickets beat reinit, with {n} "
            f"seed{'s' * (n > 1)}: {', '.join(at.values())}."
        )
    first = next((k for i, k in enumerate(steps) if set(steps[i:]) <= won), None)
    if first is None and won:
        clear, rest = (", ".join(at[k] for k in steps if (k in won) == side) for side in (True, False))
        return f"At {where} of the weights tickets beat reinit {clear}; it is open {rest}."
    if first is None:
        return f"At {where} of the weights tickets are not clearly above reinit: {', '.join(at.values())}."
    before = [k for k in steps if k < first]
    more = f"; before, it is open {at[before[-1]]}" if before else ""
    best = max(steps, key=lambda k: mean_interval(values(record, "ticket", k, level).values())[0])
    if beside := said(against_dense(record, best, level)):
        more += f". The best, of step {best:,}, are {beside} dense"
    since = "from the first step on, " if first == 0 else ""
    later = " and later" if first != steps[-1] and first else ""
    return f"At {where} of the weights tickets beat reinit {since}{at[first]}{later}{more}."


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """A JSON object a level and rewind step: means and half-widths over the seeds."""
    rows, left = [], record.config.remaining()
    for level in record.config.levels:
        won = winning(record, level)
        for k in record.config.rewind:
            tickets = values(record, "ticket", k, level)
            if not tickets:
                continue
            row: dict[str, Any] = {"level": level, "weights_remaining": left[level], "rewind_step": k}
            row["seeds"] = len(tickets)
            for kind in ("ticket", "reinit"):
                if found := values(record, kind, k, level):
                    mean, half = mean_interval(found.values())
                    row[kind] = {"mean": mean, "half_width": half}
            row["minus"] = {
                "reinit": gap_json(lead(record, k, level)),
                "dense": gap_json(against_dense(record, k, level)),
            }
            row["above_reinit"] = k in won
            rows.append(row)
    return rows


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Draw what is not there yet, or is older than the points."""
    last = folder / "rewinding.svg"
    if last.exists() and last.stat().st_mtime_ns > (record.path / "cells.jsonl").stat().st_mtime_ns:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return save_each({"rewinding": _figure}, record, folder)


def _figure(record: RunRecord) -> Figure | None:
    """Accuracy against the rewind step, a panel a level: tickets, fresh weights, dense."""
    config, left = record.config, record.config.remaining()
    levels = [
        level for level in config.levels if any(values(record, "ticket", k, level) for k in config.rewind)
    ][-MOST_PANELS:]
    if not levels:
        return None
    fig = Figure(figsize=(WIDTH, 1.2 + 1.5 * len(levels)), layout="constrained")
    panels = fig.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, level in zip(panels, levels, strict=True):
        for i, kind in enumerate(("ticket", "reinit")):
            found = {k: some for k in config.rewind if (some := values(record, kind, k, level))}
            if found:
                rows = [[100 * value for value in some.values()] for some in found.values()]
                line(axes, [*found], rows, kind, i)
        if base := dense(record):
            level_of_dense(axes, base)
        drawn = extremes(axes)
        pad = 0.06 * max(float(drawn.max() - drawn.min()), 0.5)
        axes.set_ylim(float(drawn.min()) - pad, float(drawn.max()) + pad)
        axes.set_title(f"{short(left[level])} % remaining", loc="left")
        _steps(axes, config.rewind)
    panels[-1].set_xlabel("rewind step")
    fig.supylabel("test accuracy at early stop (%)", fontsize=8)
    fig.suptitle(heading(record, band_note(len(config.seeds))), fontsize=7)
    handles = [one for one in panels[-1].lines if not str(one.get_label()).startswith("_")]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.8)
    return fig


def _steps(axes: Axes, steps: tuple[int, ...]) -> None:
    """A scale for steps: even where there is one alone, else logarithmic with room for 0."""
    if positive := [k for k in steps if k]:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    axes.set_xticks([*steps], [f"{k:,}" for k in steps])
    axes.xaxis.set_minor_locator(NullLocator())
