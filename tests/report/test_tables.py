"""The whole text of made-up runs: each word of it follows from a few numbers, and is read here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from points import KEPT, points, record

from sparselth.config import Recipe
from sparselth.report import stats, tables
from sparselth.runs import RunRecord

DENSE = (0.97, 0.98, 0.99)


def full() -> RunRecord:
    """Three seeds, four levels: two tickets that win, one that matches, one below dense."""
    shared: dict[str, Any] = {"clock": "processor"}
    some = points("ticket", 0, DENSE, [500, 600, 1000], step_seconds=2e-3, state_bytes=4_000_000, **shared)
    for level, gain, stop, lead in (
        (1, 0.001, [400, 500, 900], 0.01),
        (2, 0.002, [300, 400, 800], 0.02),
        (3, 0.0, [500, 600, 1000], 0.0),
        (4, -0.01, [600, 700, 1000], 0.03),
    ):
        accuracies = [dense + gain for dense in DENSE]
        left = shared | {"weights_remaining": 0.6**level}
        cost = {"step_seconds": 1e-3 / level, "state_bytes": 4_000_000 // 2**level}
        some += points("ticket", level, accuracies, stop, **left, **cost)
        some += points("reinit", level, [a - lead for a in accuracies], [2 * s for s in stop], **left)
        masked = [a - 2 * lead - 0.01 * (seed - 1) for seed, a in enumerate(accuracies)]
        some += points("random-mask", level, masked, [50, 900, 400], **left)
    return record(some, 3, levels=4, arms=("ticket", "reinit", "random-mask"), rate=0.4)


FULL = """\
lenet-300-100 on mnist, seeds 0-2, 1,000 steps of Adam (lr 0.001, batch 60)
iterative pruning by magnitude, 40 % a level by layer, rewound to step 0

                ───── ticket ─────   ────── reinit ─────   ── random-mask ───
level  left %     accuracy %  step     accuracy %   step     accuracy %  step       verdict
    0   100.0   98.00 ± 2.48   700                                                    dense
    1    60.0   98.10 ± 2.48   600   97.10 ± 2.48  1,200   96.10 ± 0.00   450       winning
    2    36.0   98.20 ± 2.48   500   96.20 ± 2.48  1,000   94.20 ± 0.00   450       winning
    3    21.6   98.00 ± 2.48   700   98.00 ± 2.48  1,400   98.00 ± 0.00   450      matching
    4    13.0   97.00 ± 2.48   767   94.00 ± 2.48  1,533   91.00 ± 0.00   450   below dense

level  left %       vs dense      vs reinit   vs random-mask
    0   100.0
    1    60.0   +0.10 ± 0.01   +1.00 ± 0.01     +2.00 ± 2.48
    2    36.0   +0.20 ± 0.01   +2.00 ± 0.01     +4.00 ± 2.48
    3    21.6   +0.00 ± 0.01   +0.00 ± 0.01     +0.00 ± 2.48
    4    13.0   -1.00 ± 0.01   +3.00 ± 0.01     +6.00 ± 2.48

left %: prunable weights remaining. step: the early-stop step, of minimum validation loss.
accuracy %: on the test set at early stop, mean over the seeds ± 95 % interval. vs: the ticket minus
  it in pp, seed by seed, ± 95 % interval of the mean.
On 1 of 3 seeds dense was still improving at its last evaluation; train for more steps before
  trusting how steps compare.

RULE

What a level costs, training its ticket: the processor time of a step, the median between
  evaluations; and weights, gradients, optimizer state, masks and indices. Dense is level 0.
level  left %   s per 1,000 steps  of dense   state in KB  of dense
    0   100.0               2.000     1.000         4,000     1.000
    1    60.0               1.000     0.500         2,000     0.500
    2    36.0               0.500     0.250         1,000     0.250
    3    21.6               0.333     0.167           500     0.125
    4    13.0               0.250     0.125           250     0.062

2 of 4 tickets are winning, the smallest with 36.0 % of the weights. Each level is read on its own,
so that one in forty may win by chance; reading 4 at once, by Holm's correction, all of them still
win. 1 more matches dense, the smallest with 21.6 %. 1 is below dense. At 21.6 % remaining the
ticket is not clearly different from reinit (+0.00 ± 0.01 pp) and stops 2.00x sooner (step 700
against 1,400). The ticket is not clearly different from random-mask (+0.00 ± 2.48 pp) and does not
clearly stop sooner or later (step 700 against 450)."""


def begun() -> RunRecord:
    """Two seeds of an unfinished run by SGD; a layer of one ticket is empty."""
    some = points("ticket", 0, [0.98, None], [1000, 0]) + points("ticket", 1, [0.97, 0.99], 600)
    some += points("ticket", 2, [0.9, 0.8], weights_remaining=0.009, kept=KEPT | {"fc2.weight": 0})
    some += points("reinit", 1, [0.5, None])
    recipe = Recipe(steps=1000, lr=0.05, optimizer="sgd", batch_size=20)
    return record(some, 2, levels=3, recipe=recipe)


BEGUN = """\
lenet-300-100 on mnist, seeds 0,1, 1,000 steps of SGD (lr 0.05, batch 20)
iterative pruning by magnitude, 20 % a level by layer, rewound to step 0

                ───── ticket ────   ──── reinit ────
level  left %   accuracy %   step   accuracy %  step   verdict   vs dense   vs reinit
    0   100.0        98.00  1,000                        dense
    1    80.0        98.00    600        50.00   500         –      -1.00      +47.00
    2     0.9        85.00    500            –     –         –      -8.00           –
    3       –            –      –            –     –         –          –           –

left %: prunable weights remaining. step: the early-stop step, of minimum validation loss.
accuracy %: on the test set at early stop. vs: the ticket minus it in pp. 2 seeds: no interval, and
  luck is not excluded; five tell more.
Unfinished: 6 of 14 cells are there; – marks what is missing.
On 1 of 1 seeds dense was still improving at its last evaluation; train for more steps before
  trusting how steps compare.

RULE

From level 2 on fc2 has no weight left on at least one seed."""

ONE = """\
lenet-300-100 on mnist, seed 0, 1,000 steps of Adam (lr 0.001, batch 60)
iterative pruning by magnitude, 20 % a level by layer, rewound to step 0

                ──── ticket ────
level  left %   accuracy %  step   verdict   vs dense
    0   100.0        98.00   500     dense
    1       –            –     –         –          –

left %: prunable weights remaining. step: the early-stop step, of minimum validation loss.
accuracy %: on the test set at early stop. vs: the ticket minus it in pp. 1 seed: no interval, and
  luck is not excluded; five tell more.
Unfinished: 1 of 2 cells are there; – marks what is missing.

RULE"""


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def shown(of: RunRecord) -> str:
    """The table with the rule, which test_stats reads, left out."""
    return tables.table(of).replace(tables.fill(stats.rule(of)), "RULE")


def test_a_table_says_what_follows_from_its_numbers() -> None:
    assert shown(full()) == FULL
    assert shown(begun()) == BEGUN
    assert shown(record(points("ticket", 0, [0.98]), 1, arms=("ticket",))) == ONE


def test_shares_in_percent() -> None:
    shares = {1.0: "100.0", 0.0: "0.0", 0.01: "1.0", 0.0099: "0.99", 0.00123: "0.12", 1.2e-5: "0.0012"}
    assert {share: tables.percent(share) for share in shares} == shares


def test_means_stand_under_means() -> None:
    assert tables._aligned(["", "1.00", "–"]) == ["", "1.00", "–"]
    cells = ["1.0 ± 10.00", "", "–", "2.0 ± 3.00", "4.0"]
    assert tables._aligned(cells) == ["1.0 ± 10.00", "", "–", "2.0 ±  3.00", "4.0        "]


def gap(low: float, high: float, half: float | None = 0.01) -> Any:
    return SimpleNamespace(mean=(low + high) / 2, half=half, low=low, high=high)


SOME = gap(-0.5, 0.5)


SO, LATER = "is not clearly different from reinit (%s1.00 ± 1.00 pp) and SAME", gap(1, 2)
ABOVE, BELOW = ("is %d.00 ± 1.00 pp " + side + " reinit and %s" for side in ("above", "below"))


@pytest.mark.parametrize(
    ("accuracy", "later", "stops", "says"),
    [
        (None, SOME, (500, 500), ""),
        (SOME, None, (500, 500), ""),
        (gap(0.1, 0.3, None), SOME, (500, 500), ""),
        (gap(1e-9, 0.02), SOME, (500, 400), SO % "+"),
        (gap(-0.02, -1e-9), SOME, (500, 400), SO % "-"),
        (gap(2e-9, 0.02), SOME, (500, 400), ABOVE % (1, "SAME")),
        (gap(-0.02, -2e-9), SOME, (500, 400), BELOW % (1, "SAME")),
        (gap(0.01, 0.03), gap(0, 9), (500, 400), ABOVE % (2, "SAME")),
        (gap(0.01, 0.03), gap(-9, 0), (500, 400), ABOVE % (2, "SAME")),
        (gap(0.01, 0.03), LATER, (0, 400), ABOVE % (2, "SAME")),
        (gap(0.01, 0.03), LATER, (500, 0), ABOVE % (2, "SAME")),
        (gap(0.01, 0.03), LATER, (1, 1), ABOVE % (2, "stops 1.00x later STEPS")),
        (gap(0.01, 0.03), LATER, (500, 400), ABOVE % (2, "stops 1.25x later STEPS")),
        (gap(0.01, 0.03), gap(0.25, 0.5), (500, 400), ABOVE % (2, "stops 1.25x later STEPS")),
        (gap(0.01, 0.03), gap(-2, -1), (400, 1000), ABOVE % (2, "stops 2.50x sooner STEPS")),
    ],
)
def test_a_ticket_against_a_control_in_words(
    accuracy: Any, later: Any, stops: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = stops
    of = record(points("ticket", 2, [0.5] * 2, own) + points("reinit", 2, [0.5] * 2, other), levels=2)

    def compare(of_: RunRecord, a: Any, b: Any, field: str = "accuracy_at_early_stop") -> Any:
        assert (of_, a, b) == (of, ("ticket", 2), ("reinit", 2))
        return {"accuracy_at_early_stop": accuracy, "early_stop_step": later}[field]

    monkeypatch.setattr(tables, "compare", compare)
    steps = f"(step {own:,} against {other:,})"
    same = f"does not clearly stop sooner or later {steps}"
    assert tables._against(of, "reinit", 2) == says.replace("SAME", same).replace("STEPS", steps)


LEFT = {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.75, 4: 0.005}


@pytest.mark.parametrize(
    ("words", "seeds", "says"),
    [
        (["too few seeds"], 1, "1 seed is too few to tell which tickets win; five can."),
        (["below dense", "too few seeds"], 2, "2 seeds are too few to tell which tickets win; five can."),
        (["winning"], 3, "1 of 1 tickets is winning, the smallest with 50.0 % of the weights."),
        (["winning", "matching"], 3, "1 of 2 tickets is winning, the smallest with 50.0 % of the weights. "
         "EACH 2 HOLM, all of them still win. 1 more matches dense, the smallest with 25.0 %."),
        (["matching", "matching", "winning", "winning"], 3, "2 of 4 tickets are winning, the smallest with "
         "0.5 % of the weights. EACH 4 HOLM, 1 of them still win. "
         "2 more match dense, the smallest with 25.0 %."),
        (["matching"], 3, "NONE yet. 1 matches dense, the smallest with 50.0 %."),
        (["below dense", "unclear", "unclear", "unclear"], 3, "NONE. 3 are unclear. 1 is below dense."),
        (["below dense", "below dense", "unclear"], 3, "NONE yet. 1 is unclear. 2 are below dense."),
    ],
)  # fmt: skip
def test_how_many_tickets_are_what(
    words: list[str], seeds: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "winning_at_once", lambda of: {1} if of is asked else None)
    each = "Each level is read on its own, so that one in forty may win by chance; reading"
    holm, none = "at once, by Holm's correction", "No ticket is winning"
    asked = record([], seeds, levels=4)
    found = tables._counted(asked, dict(enumerate(words, 1)), LEFT)
    assert " ".join(found) == says.replace("EACH", each).replace("HOLM", holm).replace("NONE", none)


def test_some_of_them() -> None:
    assert [tables._of(n, 2) for n in range(3)] == ["none of them", "1 of them", "all of them"]


@pytest.mark.parametrize(("left", "told"), [(0.401, False), (0.4, True), (0.1, True), (0.099, False)])
def test_the_level_near_a_fifth_is_put_into_words(
    left: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def against(of: RunRecord, arm: str, level: int) -> str:
        return "" if arm in silent else f"beats {arm} at {level}"

    silent = set[str]()
    monkeypatch.setattr(tables, "_counted", lambda of, words, remaining: [f"{sorted(words.items())}."])
    monkeypatch.setattr(tables, "_against", against)
    some = points("ticket", 0, DENSE)
    for arm in ("ticket", "reinit", "random-mask"):
        some += points(arm, 1, DENSE, weights_remaining=left)
    of = record(some, levels=2, arms=("ticket", "reinit", "random-mask"))
    word = f"[(1, '{stats.verdict(of, 1).word}')]."
    where = f"At {tables.percent(left)} % remaining the ticket"
    both = f" {where} beats reinit at 1. The ticket beats random-mask at 1."
    assert tables._closing(of) == word + both * told
    silent.add("reinit")
    assert tables._closing(of) == word + f" {where} beats random-mask at 1." * told
    silent.clear()
    for arm, says in (
        ("reinit", f"{where} beats random-mask at 1."),
        ("random-mask", f"{where} beats reinit at 1."),
        ("ticket", ""),
    ):
        some = [p for p in of.points if (p["arm"], p["level"], p["seed"]) != (arm, 1, 1)]
        text = tables._closing(record(some, levels=2, arms=of.config.arms))
        assert text[text.find("At ") :] == says if says and told else "beats" not in text


def test_layers_without_a_weight_are_named_from_the_first_level_on() -> None:
    some = points("ticket", 0, [0.9])
    for level, empty in ((1, {}), (2, {"fc1.weight": 0, "fc3.weight": 0}), (3, {"fc2.weight": 0})):
        some += points("ticket", level, [0.9], weights_remaining=0.9, kept=KEPT | empty)
    said = "From level 2 on fc1 and fc3 has no weight left on at least one seed."
    assert tables._closing(record(some[::-1], 3, levels=3)) == said
    assert tables._closing(record([])) == ""


def test_what_dense_costs_is_told_before_any_level_is_there() -> None:
    some = points("ticket", 0, [0.9], step_seconds=2e-3, state_bytes=4000)
    assert tables._costs(record(some)).splitlines()[-1].split() == [
        "0",
        "100.0",
        "2.000",
        "1.000",
        "4",
        "1.000",
    ]
    assert tables._costs(record(points("ticket", 1, [0.9], step_seconds=2e-3, state_bytes=4000))) == ""
