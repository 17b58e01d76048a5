"""Pruning at initialisation: masks and their checks, points that stay, layers that end, reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselth import pruning, tickets
from sparselth.config import Cell
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.errors import UsageError
from sparselth.experiments.at_init import AtInitConfig
from sparselth.experiments.at_init_jobs import critical, start, unreached
from sparselth.experiments.base import Place
from sparselth.experiments.price import Price
from sparselth.models import Add, AvgPool, Conv, Linear, Model, Node, ReLU, get_model
from sparselth.report import at_init_figures
from sparselth.report.at_init import gap, sentences, verdicts
from sparselth.report.at_init_figures import draw
from sparselth.report.stats import Gap, t_quantile
from sparselth.runs import RunRecord, cell_path, read
from sparselth.streams import stream

Cli = Callable[..., tuple[int, str, str]]
Document = Callable[..., dict[str, Any]]
SMALL = "lenet-300-100@0.1"
WORDS = f"at-init --model {SMALL} --dataset mnist5k --steps 20 --eval-every 20 --workers 1 --quiet"


def config(**changes: Any) -> AtInitConfig:
    values: dict[str, Any] = {"model": SMALL, "dataset": "mnist5k", "seeds": (0, 1), "device": "cpu"}
    return AtInitConfig(**values | changes)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    from sparselth.cli.main import run

    out = tmp_path_factory.mktemp("runs") / "at-init"
    more = "--score snip,synflow,random,imp --sparsity 0.5,0.9 --rate 0.5 --arms ticket,shuffle,reinit,invert"
    assert run([*WORDS.split(), *more.split(), "--seeds", "0-2", "--out", str(out)]) == 0
    return read(out)


def masks(record: RunRecord, arm: str, level: int, seed: int = 0) -> Tensor:
    file = cell_path(record.path, Cell(seed, arm, level))
    return torch.from_numpy(tickets.read(file, record.config.network.params)[0].mask)


# ---- cells


def test_points_keep_their_numbers_whatever_is_added() -> None:
    one = config(score=("snip", "random"), sparsity=(0.9,))
    more = config(score=("grasp", "random", "snip"), sparsity=(0.5, 0.9, 0.99)).going_on(one)
    assert more.score == ("snip", "random", "grasp")
    assert more.sparsity == (0.9, 0.5, 0.99)
    assert one.points.items() <= more.points.items()
    assert len(more.points) == 9
    assert set(one.cells()) <= set(more.cells())
    assert more.keeps(one, "score")
    assert more.keeps(one, "sparsity")
    assert not one.keeps(more, "sparsity")
    assert not config(score=("random", "snip")).keeps(one, "score")
    assert one.digest == more.digest
    assert len({one.level(i, j) for i in range(30) for j in range(30)}) == 900


def test_what_cells_wait_for() -> None:
    plan = config(score=("snip", "imp", "random"), arms=("ticket", "shuffle", "reinit", "invert"), rate=0.5)
    at = {score: level for level, (score, _) in plan.points.items()}
    cells = [cell for cell in plan.cells() if cell.seed == 0]
    arms = {score: [cell.arm for cell in cells if plan.score_of(cell) == score] for score in at}
    assert arms["snip"] == ["ticket", "shuffle", "reinit", "invert"]
    assert arms["random"] == ["ticket"]
    assert arms["imp"] == ["ticket"] * 4 + ["shuffle", "reinit"]
    dense, imp = Cell(0, "ticket", 0), at["imp"]
    assert plan.needs(dense) == plan.needs(Cell(0, "ticket", at["snip"])) == ()
    assert plan.needs(Cell(0, "invert", at["snip"])) == ()
    assert plan.needs(Cell(0, "shuffle", at["snip"])) == (Cell(0, "ticket", at["snip"]),)
    assert plan.needs(Cell(0, "ticket", imp, 1)) == (dense,)
    assert plan.needs(Cell(0, "ticket", imp, 2)) == (Cell(0, "ticket", imp, 1),)
    assert plan.needs(Cell(0, "ticket", imp)) == (Cell(0, "ticket", imp, 3),)
    left = [plan.rung_at(Cell(0, "ticket", imp, draw))["all"] for draw in (1, 2, 3, 0)]
    shares = np.array([plan.ranked, *left])
    assert (shares[1:] / shares[:-1] >= 0.5).all()
    assert left[-1] == plan.ranked - pruning.rounded(0.9 * plan.ranked)
    assert [plan.rungs()[plan.rung(cell)] for cell in cells] == [plan.rung_at(cell) for cell in cells]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": ("snip", "snip")}, "expected different scores"),
        ({"score": ("movement",)}, "`score` movement: compares with the weights that training began with"),
        ({"score": ("snap",)}, "unknown score 'snap': did you mean 'snip'"),
        ({"sparsity": (1.0,)}, "`sparsity` 1: expected different numbers between 0 and 1"),
        ({"sparsity": (0.9999999,)}, "`sparsity` 1: keeps 0 of"),
        ({"arms": ("shuffle",)}, "'ticket' is missing"),
        ({"arms": ("ticket", "random-mask")}, "unknown arm 'random-mask'"),
        ({"exclude": ("conv1",)}, "unknown weight to exclude 'conv1'"),
        (
            {"score": ("imp",), "rate": 1e-7},
            "`arms` and `rate` there are [0-9,]{9,} networks; expected at most",
        ),
        ({"score": ("imp",), "rate": 5e-324}, "there are [0-9,]{9,} networks; expected at most 100,000"),
        (
            {"score": ("imp",), "collapse": True},
            "`score` imp: trains, and with `collapse` nothing is trained",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config(**changes).check()


# ---- masks


def test_the_arms_are_what_they_say(record: RunRecord) -> None:
    assert record.complete
    model, at = record.config.network, {point: level for level, point in record.config.points.items()}
    params = model.params
    for score in ("snip", "synflow"):
        level = at[score, 0.5]
        ticket, shuffle, reinit, invert = (
            masks(record, arm, level) for arm in ("ticket", "shuffle", "reinit", "invert")
        )
        assert params.kept(shuffle) == params.kept(ticket)
        both = int((shuffle & ticket).sum()) / int(ticket.sum())
        assert 0.4 < both < 0.95  # really shuffled, where layers are half full or more
        assert torch.equal(reinit, ticket)
        # what would have gone first; synflow ranks again in every round
        assert score != "snip" or not (invert & ticket).any()
        assert not torch.equal(invert, ticket)
    one, other = (masks(record, "ticket", at["snip", 0.9], seed) for seed in (0, 1))
    assert int(one.sum()) == int(other.sum()) == record.config.rung_of(0.9)["all"]
    assert not torch.equal(one, other)


def test_arms_start_from_the_weights_they_say(digits: Resident, tmp_path: Path, record: RunRecord) -> None:
    plan, place = record.config, Place(record.path, digits, {})
    level = next(level for level, point in plan.points.items() if point == ("snip", 0.5))
    first = init_weights(plan.network, stream(0, "ticket", 0, "init"))
    for arm in ("ticket", "shuffle", "invert", "reinit"):
        _, weights = start(plan, Cell(0, arm, level), place)
        assert torch.equal(weights, first) == (arm != "reinit")
    again, _ = start(plan, Cell(0, "ticket", level), place)
    assert torch.equal(again, masks(record, "ticket", level))


def test_synflow_takes_its_rounds(monkeypatch: pytest.MonkeyPatch, digits: Resident, tmp_path: Path) -> None:
    from sparselth.scores import SCORES

    seen = list[int]()
    known = SCORES["synflow"]

    def counted(network: Any, weights: Tensor, mask: Tensor, *more: Any) -> Tensor:
        seen.append(int(mask.sum()))
        return known.score(network, weights, mask, *more)

    monkeypatch.setattr(SCORES, "things", dict(SCORES.items()) | {"synflow": replace(known, score=counted)})
    plan = config(score=("synflow",), sparsity=(0.99,))
    mask, _ = start(plan, Cell(0, "ticket", 1), Place(tmp_path, digits, {}))
    assert len(seen) == 100
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == plan.ranked
    assert seen[50] == pytest.approx(plan.ranked * 0.1, rel=0.01)
    assert int(mask.sum()) == plan.rung_of(0.99)["all"]


def test_what_is_excluded_stays_whole(digits: Resident, tmp_path: Path) -> None:
    plan = config(score=("magnitude",), exclude=("fc3",))
    plan.check()
    mask, _ = start(plan, Cell(0, "ticket", 1), Place(tmp_path, digits, {}))
    kept = plan.network.params.kept(mask)
    assert kept["fc3.weight"] == 100
    assert kept["fc1.weight"] + kept["fc2.weight"] == plan.ranked - pruning.rounded(0.9 * plan.ranked)


# ---- layers that end


def test_layers_without_a_path_are_named() -> None:
    model = get_model(SMALL)
    params, weights = model.params, init_weights(model, stream(0, "ticket", 0, "init"))
    full = params.full_mask()
    assert unreached(model, weights, full) == ([], params.prunable)
    mask = torch.zeros_like(full)
    by_name = {s.name: mask[s.span].view(s.shape) for s in params.weights}
    by_name["fc1.weight"][3, :5] = True  # into unit 3
    by_name["fc2.weight"][2, 4] = True  # from unit 4, which nothing feeds
    by_name["fc3.weight"][7, 2] = True
    assert unreached(model, weights, mask) == (["fc1", "fc2", "fc3"], 0)
    by_name["fc2.weight"][2, 3] = True
    assert unreached(model, weights, mask) == ([], 7)


def test_a_residual_network_lives_on_around_a_dead_layer() -> None:
    layers = (
        Conv(3, 3, 1),
        ReLU(),
        Conv(3, 3, 1),
        ReLU(),
        Conv(3, 3, 1),
        Node(Add(), (1, 4)),
        AvgPool(),
        Linear(2),
    )
    model = Model("around", (1, 5, 5), layers, {}, "", classes=2)
    params, weights = model.params, init_weights(model, stream(0, "ticket", 0, "init"))
    mask = params.full_mask()
    mask[params.weights[1].span] = False  # so that nothing reaches conv3
    assert unreached(model, weights, mask) == (["conv3"], params.prunable - 2 * 81)


@pytest.mark.parametrize("seed", range(6))
def test_the_critical_count_is_where_pruning_empties_a_layer(seed: int) -> None:
    params = get_model("lenet-300-100@0.02").params
    full, draw = params.full_mask(), torch.Generator().manual_seed(seed)
    ranks = torch.randint(40, (len(full),), generator=draw).float()  # many are equal
    ranks[params.weights[seed % 3].span] /= 3
    keep, (first,) = critical({s.name: ranks[s.span] for s in params.weights})
    assert all(params.kept(pruning.prune(params, ranks, full, {"all": keep})).values())
    less = params.kept(pruning.prune(params, ranks, full, {"all": keep - 1}))
    assert [name for name, n in less.items() if not n] == [f"{first}.weight"]


def test_how_far_each_score_goes(document: Document, tmp_path: Path) -> None:
    words = "at-init --collapse --model lenet5 --dataset mnist5k --seeds 0,1 --workers 1 --quiet"
    scores = "magnitude,snip,synflow"
    found = document(*words.split(), "--score", scores, "--out", str(tmp_path / "run"))
    assert found["schema"] == "sparselth.at-init/1"
    best = {p["score"]: p for p in found["points"] if p["seed"] == 0}
    assert best["synflow"]["largest_compression"] == best["synflow"]["most"] == 61_470 / 5
    assert best["synflow"]["collapsed_layers"] == []
    assert best["magnitude"]["largest_compression"] < 1000 < best["synflow"]["largest_compression"]
    assert best["magnitude"]["collapsed_layers"] == ["conv2"]
    assert {p["final_accuracy"] for p in found["points"]} == {None}
    rows = {row["score"]: row for row in found["summary"]}
    assert rows["snip"]["least"] <= rows["snip"]["largest_compression"]


# ---- a run


def test_points_have_what_the_reports_read(record: RunRecord) -> None:
    fields = {"score", "arm", "seed", "weights_remaining", "collapsed_layers", "final_accuracy"}
    for point in record.points:
        assert fields <= point.keys()
        assert (point["score"] is None) == (point["level"] == 0)
        assert point["collapsed_layers"] == [n[:-7] for n, kept in point["kept"].items() if not kept]
        assert 0 < point["weights_on_paths"] <= sum(point["kept"].values()) or point["arm"] == "invert"
    at = {score: p for p in record.points if (score := p["score"]) and p["sparsity"] == 0.9}
    assert at["snip"]["weights_remaining"] == pytest.approx(0.1, abs=1e-4)


def test_table_sentences_json_and_figures(record: RunRecord, document: Document, tmp_path: Path) -> None:
    text = record.config.table(record)
    for word in ("dense", "snip", "synflow", "random", "imp", "shuffle", "reinit", "invert", "- ticket"):
        assert word in text
    said = " ".join(sentences(record))
    assert "Shuffling within layers at 10.0 % of the weights: snip" in said
    assert said.count(" pp (") == 3 + 3 + 2  # checks of two scores, and of imp without the inverted
    assert "against a random mask" in said
    assert "against imp" in said
    found = document("show", str(record.path))
    assert len(found["points"]) == len(record.points) == len(record.config.cells())
    rows = {(row["score"], row["arm"], row["sparsity"]): row for row in found["summary"]}
    level = next(level for level, point in record.config.points.items() if point == ("snip", 0.9))
    one = gap(record, ("shuffle", level), ("ticket", level))
    assert one is not None
    assert rows["snip", "shuffle", 0.9]["minus_ticket"]["mean"] == one.mean
    assert rows["snip", "ticket", 0.9]["minus_ticket"] is None
    names = [file.name for file in draw(record, tmp_path)]
    assert names == ["accuracy.png", "accuracy.svg"]
    assert draw(record, tmp_path) == []


def test_marks_of_a_score_stand_around_it_whichever_it_has(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = config(score=("snip", "erk"), arms=("ticket", "shuffle", "reinit", "invert"))
    monkeypatch.setattr(at_init_figures, "values", lambda *_: {0: 0.5, 1: 0.6})
    fig = at_init_figures._points(replace(record, config=plan, points=[]))
    places = {line.get_label(): list(line.get_xdata()) for line in fig.axes[0].lines}
    assert places["ticket"] == pytest.approx([-0.3, 0.9])
    assert places["shuffle"] == pytest.approx([-0.1])
    assert places["invert"] == pytest.approx([0.3, 1.1])


def test_a_verdict_on_one_score_is_that_of_its_interval() -> None:
    def verdict(gap: Gap) -> str:
        return verdicts({"snip": gap})["snip"]

    assert verdict(Gap(-0.05, 0.001, 5)) == "costs"
    assert verdict(Gap(0.05, 0.001, 5)) == "gains"
    assert verdict(Gap(-0.001, 0.001, 5)) == verdict(Gap(0.0, 0.001, 5)) == "open"
    assert verdict(Gap(-0.05, None, 2)) == "too few seeds"
    half = t_quantile(4)
    assert verdict(Gap(half * 0.001, 0.00099, 5)) == "gains"
    assert verdict(Gap(half * 0.001, 0.00101, 5)) == "open"


def test_verdicts_on_several_scores_are_read_at_once() -> None:
    """Five seeds: t of 3 has a two-sided p of 0.04, which stands alone and not beside others."""
    clear, near = Gap(-0.05, 0.001, 5), Gap(0.003, 0.001, 5)
    assert verdicts({"snip": near}) == {"snip": "gains"}
    assert verdicts({"snip": near, "grasp": near}) == {"snip": "open", "grasp": "open"}
    # the clear one leaves the other to be read alone
    assert verdicts({"snip": near, "grasp": clear}) == {"snip": "gains", "grasp": "costs"}
    assert verdicts({"a": near, "b": clear, "c": near}) == {"a": "open", "b": "costs", "c": "open"}
    assert verdicts({"a": near, "b": Gap(-0.05, None, 2)}) == {"a": "gains", "b": "too few seeds"}


def test_scores_that_draw_have_no_checks_that_would_be_the_same() -> None:
    plan = config(score=("random", "erk", "snip"), arms=("ticket", "shuffle", "reinit", "invert"))
    assert plan.arms_of("random") == ("ticket",)
    assert plan.arms_of("erk") == ("ticket", "invert")
    assert plan.arms_of("snip") == plan.arms
    assert plan.left_out == (
        "shuffle, reinit, invert of random; shuffle, reinit of erk: left out, draws from the ticket's own law"
    )
    assert config(score=("snip",)).left_out == ""


def test_runs_from_before_had_checks_of_erk_and_go_on_with_them() -> None:
    told = config(score=("erk",)).to_json()
    del told["drawn"]
    old = AtInitConfig.from_json({name: value for name, value in told.items() if name != "experiment"})
    assert old.arms_of("erk") == ("ticket", "shuffle", "reinit")
    more = config(score=("erk", "random")).going_on(old)
    assert more.arms_of("erk") == ("ticket", "shuffle", "reinit")
    assert more.arms_of("random") == ("ticket",)
    assert more.digest == old.digest
    assert config(score=("erk",)).digest != old.digest


def test_the_price_counts_the_rounds_that_find_a_mask(digits: Resident) -> None:
    plan = config(score=("synflow", "snip", "imp"), arms=("ticket", "invert", "shuffle"), seeds=(0, 1))
    found = plan.beforehand(digits)
    assert {(plan.score_of(cell), cell.arm, cell.seed) for cell in found} == {
        (score, arm, seed) for score in ("synflow", "snip") for arm in ("ticket", "invert") for seed in (0, 1)
    }
    each = {plan.score_of(cell): seconds for cell, seconds in found.items()}
    assert min(each.values()) > 0
    levels = (1.0,) * len(plan.rungs())
    price = Price({1: 0.0}, levels, {1: 0.0}, levels, 0.0, 0, 0, before=found)
    assert price.run_seconds(plan, (), 1, 1) == pytest.approx(4 * (each["synflow"] + each["snip"]))
    assert price.evaluation_share(plan, ()) == 0


def test_a_run_that_goes_on_with_more_has_the_same_bits(
    cli: Cli, tmp_path: Path, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = ["--score", "snip", "--sparsity", "0.9", "--seeds", "0", "--arms", "ticket,shuffle"]
    more = ["--score", "snip,erk", "--sparsity", "0.9,0.5", "--seeds", "0,1", "--arms", "ticket,shuffle"]
    assert cli(*WORDS.split(), *first, "--out", str(twice))[0] == 0
    before = {file.name: file.read_bytes() for file in (twice / "cells").iterdir()}
    assert cli(*WORDS.split(), *more, "--out", str(twice))[0] == 1  # without --resume
    assert cli(*WORDS.split(), *more, "--out", str(twice), "--resume")[0] == 0
    assert cli(*WORDS.split(), *more, "--out", str(once))[0] == 0
    assert run_contents(once) == run_contents(twice)
    assert before.items() <= {file.name: file.read_bytes() for file in (twice / "cells").iterdir()}.items()


PLUGIN = """
from sparselth.scores import register


@register("last", "what lies behind", autograd=False, rounds=2)
def last(network, weights, mask, batch, generator):
    return mask.cumsum(0).float()
"""
MODULE = """
from torch import nn

dataset = "mnist5k"


def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Tanh(), nn.Linear(12, classes))
"""


def test_a_score_of_a_plugin_and_a_module_of_a_user(document: Document, tmp_path: Path) -> None:
    (tmp_path / "last.py").write_text(PLUGIN)
    (tmp_path / "mine.py").write_text(MODULE)
    words = f"at-init --model {tmp_path / 'mine.py'}:make --seeds 0 --steps 10 --workers 1 --quiet"
    more = ["--score", "last,snip,synflow", "--plugin", str(tmp_path / "last.py")]
    found = document(*words.split(), *more, "--arms", "ticket,shuffle", "--out", str(tmp_path / "run"))
    assert len(found["points"]) == 1 + 3 * 2
    last = next(p for p in found["points"] if p["score"] == "last" and p["arm"] == "ticket")
    assert last["kept"] == {"1.weight": 953 - 120, "3.weight": 120}
    assert last["collapsed_layers"] == []
    assert last["unreached_layers"] == []
    empty = document(
        *words.split(), *more, "--arms", "ticket", "--sparsity", "0.99", "--out", str(tmp_path / "empty")
    )
    gone = next(p for p in empty["points"] if p["score"] == "last")
    assert gone["collapsed_layers"] == ["1"]
    assert gone["unreached_layers"] == ["3"]
    assert json.dumps(gone)


def test_the_short_recipe_looks_at_networks_once() -> None:
    model = get_model("lenet-300-100")
    found = AtInitConfig.recipes({"model": "lenet-300-100"})
    assert found["short"] == replace(model.recipes["short"], eval_every=model.recipes["short"].steps)
    assert found["paper"] == model.recipes["paper"]
    assert AtInitConfig().recipe == found["short"]


def test_what_guesses_is_not_compared(record: RunRecord) -> None:
    guessing = [point | {"final_accuracy": 0.1} for point in record.points]
    assert sentences(replace(record, points=guessing)) == [
        "All tickets guess: longer training, or a lower sparsity, tells more."
    ]
    sparse = [
        point | {"final_accuracy": 0.1} if point["sparsity"] == 0.9 else point for point in record.points
    ]
    assert sentences(replace(record, points=sparse))[0].startswith(
        "Shuffling within layers at 50.0 % of the weights: snip "
    )
    assert sentences(replace(record, points=[])) == []
