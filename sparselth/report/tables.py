"""A run as plain text: one row per level, the rule of the verdict, and what the numbers say."""

from __future__ import annotations

import textwrap
from functools import partial

from sparselth.report.stats import (
    NO_VERDICT,
    RULE,
    cells,
    difference,
    empty_layers,
    finished,
    mean_interval,
    nearest_level,
    per_seed,
    seed_list,
    verdict,
    weights_remaining,
)
from sparselth.runs import RunRecord

WIDTH = 100  # columns of the prose; the table itself is narrower up to three arms
MISSING = "–"


def table(record: RunRecord) -> str:
    """The whole report as text, without a newline at its end."""
    parts = [_title(record), _rows(record), _fill(_legend(record)), _fill(RULE)]
    if costs := _costs(record):
        parts.append(costs)
    if closing := _closing(record):
        parts.append(_fill(closing, indent=""))
    return "\n\n".join(parts)


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal, two digits below 1 %."""
    value = 100 * share
    return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def _fill(text: str, indent: str = "  ") -> str:
    """Wrap each line; what goes over is indented."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
        for line in text.splitlines()
    )


def _title(record: RunRecord) -> str:
    config, recipe = record.config, record.config.recipe
    seeds = f"seed{'s' * (len(config.seeds) > 1)} {seed_list(config.seeds)}"
    return (
        f"{config.model} on {config.dataset}, {seeds}, {recipe.steps:,} steps of "
        f"{recipe.optimizer.upper() if recipe.optimizer == 'sgd' else recipe.optimizer.title()} "
        f"(lr {recipe.lr:g}, batch {recipe.batch_size})"
    )


def _rows(record: RunRecord) -> str:
    config, remaining = record.config, weights_remaining(record)
    levels, arms = range(config.levels + 1), config.arms
    columns = [
        ["level", *map(str, levels)],
        ["weights %", *(percent(remaining[k]) if k in remaining else MISSING for k in levels)],
    ]
    for arm in arms:
        means, intervals, steps = zip(*(_cell(record, arm, level) for level in levels), strict=True)
        room = max(map(len, intervals))
        columns.append(["accuracy %", *map(partial(_accuracy, room), means, intervals)])
        columns.append(["step", *steps])
    words = (verdict(record, level).word for level in levels)
    columns.append(["verdict", *(MISSING if word == NO_VERDICT else word for word in words)])

    widths = [max(map(len, column)) for column in columns]
    gaps = ["", "  ", *(gap for _ in arms for gap in ("   ", "  ")), "   "]
    lines = [
        "".join(gap + cell.rjust(width) for gap, cell, width in zip(gaps, row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]
    heads = " " * (widths[0] + 2 + widths[1])
    for i, arm in enumerate(arms):
        heads += "   " + f" {arm} ".center(widths[2 + 2 * i] + 2 + widths[3 + 2 * i], "─")
    return "\n".join([heads.ljust(len(lines[0])), *lines])


def _cell(record: RunRecord, arm: str, level: int) -> tuple[str, str, str]:
    """Mean accuracy, its interval and the mean early-stop step, as printed; dense is printed once."""
    if level == 0 and arm != "ticket":
        return "", "", ""
    steps = per_seed(record, arm, level, "early_stop_step")
    if not steps:
        return MISSING, "", MISSING
    mean, half = mean_interval(per_seed(record, arm, level, "accuracy_at_early_stop").values())
    interval = "" if half is None else f"{100 * half:.2f}"
    return f"{100 * mean:.2f}", interval, f"{mean_interval(steps.values())[0]:,.0f}"


def _accuracy(room: int, mean: str, interval: str) -> str:
    """Mean ± interval; a mean without an interval stands where the other means stand."""
    if not room or mean in ("", MISSING):
        return mean
    return f"{mean} ± {interval.rjust(room)}" if interval else mean + " " * (3 + room)


def _legend(record: RunRecord) -> str:
    config = record.config
    lines = [
        "weights %: prunable weights remaining. step: the early-stop step, where validation loss is lowest."
    ]
    if len(config.seeds) > 1:
        lines.append("accuracy %: on the test set at early stop, mean over the seeds ± 95 % interval.")
    else:
        lines.append(
            "accuracy %: on the test set at early stop. One seed: no interval, and luck is not excluded."
        )
    done, total = cells(record)
    if done < total:
        lines.append(f"Unfinished: {done:,} of {total:,} cells are there; {MISSING} marks what is missing.")
    stops = per_seed(record, "ticket", 0, "early_stop_step").values()
    if late := sum(stop >= config.recipe.steps for stop in stops):
        lines.append(
            f"On {late} of {len(stops)} seeds dense was still improving at its last evaluation; "
            "train for more steps before trusting how steps compare."
        )
    return "\n".join(lines)


def _costs(record: RunRecord) -> str:
    """What training the ticket of each level costs, beside dense; empty until a level was timed."""
    rows = [
        (level, share, mean_interval(seconds)[0], mean_interval(held)[0])
        for level, share in weights_remaining(record).items()
        if (seconds := [*per_seed(record, "ticket", level, "step_seconds").values()])
        and (held := [*per_seed(record, "ticket", level, "state_bytes").values()])
    ]
    if not rows or rows[0][0] != 0:
        return ""
    _, _, dense_seconds, _ = rows[0]
    dense_bytes = mean_interval(per_seed(record, "ticket", 0, "dense_state_bytes").values())[0]
    lines = ["level  weights %   s per 1,000 steps  of dense   state in KB  of dense"]
    for level, share, step, bytes_ in rows:
        lines.append(
            f"{level:>5}  {percent(share):>9}   {1e3 * step:>17.3f}  {step / dense_seconds:>8.2f}"
            f"   {bytes_ / 1e3:>11,.0f}  {bytes_ / dense_bytes:>8.3f}"
        )
    where = "one thread of a CPU" if record.config.device == "cpu" else "the GPU"
    legend = (
        f"What a level costs, training its ticket on {where}: the median of its stretches between "
        "evaluations; and weights, gradients, optimizer state, masks and indices, beside those of dense "
        "without a mask."
    )
    return "\n".join([_fill(legend), *lines])


def _closing(record: RunRecord) -> str:
    """Sentences computed from finished levels only; what was not run is not mentioned."""
    remaining = weights_remaining(record)
    words = {level: verdict(record, level).word for level in remaining if level}
    words = {level: word for level, word in words.items() if word != NO_VERDICT}
    said = []
    if words:
        winning = [remaining[level] for level, word in words.items() if word == "winning"]
        matching = [remaining[level] for level, word in words.items() if word in ("winning", "matching")]
        if winning:
            said.append(f"{len(winning)} of {len(words)} tickets are winning, ")
            said[-1] += f"the smallest with {percent(min(winning))} % of the weights"
            if min(matching) < min(winning):
                said[-1] += f"; the smallest matching one has {percent(min(matching))} %"
        elif matching:
            said.append(f"No ticket is winning; the smallest matching one has {percent(min(matching))} %")
            said[-1] += " of the weights"
        else:
            said.append("Every ticket is below dense")
        said[-1] += "."
    level = nearest_level(remaining, 0.2)
    if level is not None and 0.1 <= remaining[level] <= 0.4 and finished(record, "ticket", level):
        where = f"At {percent(remaining[level])} % remaining the ticket is"
        for arm in ("reinit", "random-mask"):
            if finished(record, arm, level):
                said.append(f"{where} {_against(record, arm, level)}.")
                where = "The ticket is"
    emptied = [level for level in remaining if empty_layers(record, level)]
    if emptied:
        first = min(emptied)
        layers = " and ".join(empty_layers(record, first))
        said.append(f"From level {first} on {layers} has no weight left on at least one seed.")
    return " ".join(said)


def _against(record: RunRecord, arm: str, level: int) -> str:
    lead, half = mean_interval(difference(record, "accuracy_at_early_stop", ("ticket", level), (arm, level)))
    interval = "" if half is None else f" ± {100 * half:.2f}"
    if abs(lead) <= (half or 0.0):
        text = f"not clearly different from {arm} ({100 * lead:+.2f}{interval} pp)"
    else:
        text = f"{100 * abs(lead):.2f}{interval} pp {'above' if lead > 0 else 'below'} {arm}"
    own, other = (
        mean_interval(per_seed(record, a, level, "early_stop_step").values())[0] for a in ("ticket", arm)
    )
    steps = f"(step {own:,.0f} against {other:,.0f})"
    if min(own, other) <= 0 or 0.95 < other / own < 1.05:
        return f"{text} and stops at about the same step {steps}" if min(own, other) > 0 else text
    if other > own:
        return f"{text} and stops {other / own:.2f}x sooner {steps}"
    return f"{text} and stops {own / other:.2f}x later {steps}"
