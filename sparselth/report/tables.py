"""A run as plain text: what was measured level by level, what follows from it, and what the numbers say."""

from __future__ import annotations

from sparselth.report.diverged import unfinished
from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.report.stats import (
    FEWEST,
    NO_VERDICT,
    SLACK,
    TOO_FEW,
    UNCLEAR,
    clock,
    compare,
    controls,
    costs,
    empty_layers,
    finished,
    mean_interval,
    nearest_level,
    per_seed,
    rule,
    seeds_named,
    signed,
    signed_pp,
    verdict,
    weights_remaining,
    winning_at_once,
)
from sparselth.report.stats import (
    summary as summary,
)
from sparselth.runs import RunRecord

MISSING = "–"


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal, without a newline at its end."""
    parts = [
        fill(title(record, record.config.method)),
        _rows(record),
        fill(_legend(record)),
        fill(rule(record)),
    ]
    if spent := _costs(record):
        parts.append(spent)
    if closing := _closing(record):
        parts.append(fill(closing, indent=""))
    return "\n\n".join(parts)


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal, two digits below 1 %."""
    value = 100 * share
    return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def title(record: RunRecord, how: str) -> str:
    """What was trained, and how it was pruned: two lines above a table."""
    config, recipe = record.config, record.config.recipe
    seeds = seeds_named(config.seeds)
    return (
        f"{config.model} on {config.dataset}, {seeds}, {recipe.steps:,} steps of "
        f"{recipe.optimizer.upper() if recipe.optimizer == 'sgd' else recipe.optimizer.title()} "
        f"(lr {recipe.lr:g}, batch {recipe.batch_size})\n{how}"
    )


def levels_and_steps(record: RunRecord, dense: bool = False) -> tuple[list[tuple[int, int]], Group]:
    """The (level, rewind step) of every row of a run over several steps, and its left columns.

    With `dense` a row of the dense network is above them.
    """
    left = record.config.remaining()
    places = [(level, k) for level in record.config.levels for k in record.config.rewind]
    shares, steps = [percent(left[level]) for level, _ in places], [f"{k:,}" for _, k in places]
    first = (["100.0"], [""]) if dense else ([], [])
    return places, Group([["left %", *first[0], *shares], ["rewind", *first[1], *steps]])


def _rows(record: RunRecord) -> str:
    """A row per level: accuracy and step of each arm, the verdict, the ticket minus dense and controls."""
    remaining, levels = weights_remaining(record), range(record.config.levels + 1)
    left = (percent(remaining[level]) if level in remaining else MISSING for level in levels)
    lead = Group([["level", *map(str, levels)], ["left %", *left]])
    groups = [_arm(record, arm) for arm in record.config.arms]
    words = (verdict(record, level).word for level in levels)
    groups.append(Group([["verdict", *(MISSING if word == NO_VERDICT else word for word in words)]]))
    for i, (name, _) in enumerate(controls(record, 0)):
        gaps = (compare(record, ("ticket", level), controls(record, level)[i][1]) for level in levels)
        shown = ("" if not level else signed(gap) if gap else MISSING for level, gap in enumerate(gaps))
        groups.append(Group([[f"vs {name}", *_aligned([*shown])]]))
    return side_by_side(lead, groups, width())


def _arm(record: RunRecord, arm: str) -> Group:
    """Mean accuracy with its interval and mean early-stop step; dense is printed once, as the ticket's."""
    accuracies, steps = [], []
    for level in range(record.config.levels + 1):
        stops = per_seed(record, arm, level, "early_stop_step")
        if level == 0 and arm != "ticket":
            accuracies, steps = [""], [""]
        elif not stops:
            accuracies.append(MISSING)
            steps.append(MISSING)
        else:
            values = per_seed(record, arm, level, "accuracy_at_early_stop").values()
            mean, half = mean_interval(values)
            interval = "" if half is None or len(values) < FEWEST else f" ± {100 * half:.2f}"
            accuracies.append(f"{100 * mean:.2f}{interval}")
            steps.append(f"{mean_interval(stops.values())[0]:,.0f}")
    return Group([["accuracy %", *_aligned(accuracies)], ["step", *steps]], arm)


def _aligned(cells: list[str]) -> list[str]:
    """Means with intervals and without, one under the other."""
    halves = [cell.partition(" ± ")[2] for cell in cells]
    room = max(map(len, halves))
    found = []
    for cell, half in zip(cells, halves, strict=True):
        if half:
            cell = f"{cell.partition(' ± ')[0]} ± {half.rjust(room)}"
        elif room and cell not in ("", MISSING):
            cell += " " * (3 + room)
        found.append(cell)
    return found


def _legend(record: RunRecord) -> str:
    seeds = len(record.config.seeds)
    lines = ["left %: prunable weights remaining. step: the early-stop step, of minimum validation loss."]
    if seeds >= FEWEST:
        lines.append(
            "accuracy %: on the test set at early stop, mean over the seeds ± 95 % interval. "
            "vs: the ticket minus it in pp, seed by seed, ± 95 % interval of the mean."
        )
    else:
        lines.append(
            "accuracy %: on the test set at early stop. vs: the ticket minus it in pp. "
            f"{seeds} seed{'s' * (seeds > 1)}: no interval, and luck is not excluded; five tell more."
        )
    lines += filter(None, [unfinished(record, mark=MISSING)])
    stops = per_seed(record, "ticket", 0, "early_stop_step").values()
    if late := sum(stop >= record.config.recipe.steps for stop in stops):
        lines.append(
            f"On {late} of {len(stops)} seeds dense was still improving at its last evaluation; "
            "train for more steps before trusting how steps compare."
        )
    return "\n".join(lines)


def _costs(record: RunRecord) -> str:
    """What training the ticket of each level costs, beside dense; empty until a level was timed."""
    found = costs(record)
    if 0 not in found:
        return ""
    columns = [["level"], ["left %"], ["s per 1,000 steps"], ["of dense"], ["state in KB"], ["of dense"]]
    for level, cost in found.items():
        seconds, size = (mean_interval(shares)[0] for shares in (cost.seconds_of_dense, cost.bytes_of_dense))
        row = (str(level), percent(cost.remaining), f"{1e3 * cost.step_seconds:.3f}", f"{seconds:.3f}")
        for column, cell in zip(
            columns, (*row, f"{cost.state_bytes / 1e3:,.0f}", f"{size:.3f}"), strict=True
        ):
            column.append(cell)
    lead, seconds_, bytes_ = (Group(columns[i : i + 2]) for i in (0, 2, 4))
    legend = (
        f"What a level costs, training its ticket: the {clock(record)} time of a step, the median between "
        "evaluations; and weights, gradients, optimizer state, masks and indices. Dense is level 0."
    )
    return "\n".join([fill(legend), side_by_side(lead, [seconds_, bytes_], width())])


def _closing(record: RunRecord) -> str:
    """Sentences computed from finished levels only; what was not run is not mentioned."""
    remaining = weights_remaining(record)
    words = {level: verdict(record, level).word for level in remaining if level}
    words = {level: word for level, word in words.items() if word != NO_VERDICT}
    said = _counted(record, words, remaining) if words else []
    level = nearest_level(remaining, 0.2)
    if level is not None and 0.1 <= remaining[level] <= 0.4 and finished(record, "ticket", level):
        where = f"At {percent(remaining[level])} % remaining the ticket"
        for arm in ("reinit", "random-mask"):
            if finished(record, arm, level) and (against := _against(record, arm, level)):
                said.append(f"{where} {against}.")
                where = "The ticket"
    emptied = [level for level in remaining if empty_layers(record, level)]
    if emptied:
        first = min(emptied)
        layers = " and ".join(empty_layers(record, first))
        said.append(f"From level {first} on {layers} has no weight left on at least one seed.")
    return " ".join(said)


def _counted(record: RunRecord, words: dict[int, str], remaining: dict[int, float]) -> list[str]:
    """How many tickets are what, given level → verdict and level → weights remaining."""
    of: dict[str, list[int]] = {}
    for level, word in words.items():
        of.setdefault(word, []).append(level)
    if TOO_FEW in of:
        seeds = len(record.config.seeds)
        return [f"{seeds} seed{'s are' if seeds > 1 else ' is'} too few to tell which tickets win; five can."]

    def smallest(word: str) -> str:
        return f"{percent(min(remaining[level] for level in of[word]))} %"

    said = []
    if winning := of.get("winning"):
        are = "are" if len(winning) > 1 else "is"
        text = (
            f"{len(winning)} of {len(words)} tickets {are} winning, the smallest with {smallest('winning')}"
        )
        said.append(f"{text} of the weights.")
        if len(words) > 1:
            still = len(winning_at_once(record))
            said.append(
                "Each level is read on its own, so that one in forty may win by chance; reading "
                f"{len(words)} at once, by Holm's correction, {_of(still, len(winning))} still win."
            )
    else:
        said.append("No ticket is winning" + " yet" * (len(words) < record.config.levels) + ".")
    if matching := of.get("matching"):
        more, match = " more" if winning else "", "match" if len(matching) > 1 else "matches"
        said.append(f"{len(matching)}{more} {match} dense, the smallest with {smallest('matching')}.")
    said += [
        f"{len(of[word])} {'is' if len(of[word]) == 1 else 'are'} {word}."
        for word in (UNCLEAR, "below dense")
        if word in of
    ]
    return said


def _of(some: int, all_: int) -> str:
    return "all of them" if some == all_ else "none of them" if some == 0 else f"{some} of them"


def _against(record: RunRecord, arm: str, level: int) -> str:
    """How the ticket of a level stands to an arm; empty where seeds are too few to tell."""
    gap = compare(record, ("ticket", level), (arm, level))
    later = compare(record, ("ticket", level), (arm, level), "early_stop_step")
    if gap is None or later is None or gap.half is None:
        return ""
    if gap.low <= SLACK and gap.high >= -SLACK:
        text = f"is not clearly different from {arm} ({signed_pp(gap)})"
    else:
        side = "above" if gap.mean > 0 else "below"
        text = f"is {100 * abs(gap.mean):.2f} ± {100 * gap.half:.2f} pp {side} {arm}"
    own, other = (
        mean_interval(per_seed(record, a, level, "early_stop_step").values())[0] for a in ("ticket", arm)
    )
    steps = f"(step {own:,.0f} against {other:,.0f})"
    if (later.low <= 0 <= later.high) or min(own, other) <= 0:
        return f"{text} and does not clearly stop sooner or later {steps}"
    if later.mean < 0:
        return f"{text} and stops {other / own:.2f}x sooner {steps}"
    return f"{text} and stops {own / other:.2f}x later {steps}"
