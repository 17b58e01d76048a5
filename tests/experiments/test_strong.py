"""Strong tickets end to end on real digits: what each arm is, what files hold, what is a mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import strong_tickets, tickets
from sparselth.cli import screen
from sparselth.config import Cell, Recipe, config_from_json
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job
from sparselth.errors import UsageError
from sparselth.experiments import strong_jobs
from sparselth.experiments.base import Place
from sparselth.experiments.run import plan
from sparselth.experiments.strong import StrongConfig
from sparselth.frozen import METHODS, weights_of
from sparselth.models import Model, get_model
from sparselth.models.torch import network
from sparselth.runs import RunRecord, cell_path, read
from sparselth.streams import stream

Cli = Callable[..., tuple[int, str, str]]
DIGITS = load("mnist5k", Path())
WORDS = "--model lenet-300-100 --dataset mnist5k --seeds 0 --steps 60 --eval-every 30 --workers 1 --quiet"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Two widths, two shares, all arms, of a method that redraws."""
    from sparselth.cli.main import run

    out = tmp_path_factory.mktemp("runs") / "strong"
    words = f"strong iterand {WORDS} --width 0.1,0.2 --keep 0.2,0.5 --every 20 --redraw 0.5"
    assert run([*words.split(), "--out", str(out)]) == 0
    return read(out)


def config(**changes: Any) -> StrongConfig:
    values: dict[str, Any] = {"dataset": "mnist5k", "device": "cpu", "seeds": (0,)}
    return StrongConfig(**values | changes)


def content(record: RunRecord, cell: Cell) -> strong_tickets.Content:
    params = record.config.model_of(cell).params
    return strong_tickets.read(cell_path(record.path, cell), params)[0]


# ---- cells


def test_a_cell_an_arm_and_a_point(record: RunRecord) -> None:
    assert record.complete
    found = [(p["arm"], p["width"], p["keep"], p["draw"]) for p in record.points]
    points = [(width, keep) for width in (0.1, 0.2) for keep in (0.2, 0.5)]
    assert found == [
        *(("ticket", *point, 0) for point in points),
        *(("random-mask", *point, 0) for point in points),
        *(("dense", width, 1.0, 0) for width in (0.1, 0.2)),
        # a fifth in three rounds, a half in one
        *(("imp", width, *rest) for width in (0.1, 0.2) for rest in ((0.2, 0), (0.2, 1), (0.2, 2), (0.5, 0))),
    ]
    for p in record.points:
        size = get_model(f"lenet-300-100@{p['width']:g}").params.prunable
        assert p["method"] == "iterand"
        assert p["weights_remaining"] == sum(p["kept"].values()) / size
        assert p["file_bytes"] == cell_path(record.path, Cell.of(p)).stat().st_size
        assert p["coded_bytes"] <= p["file_bytes"]
        assert 0 <= p["final_accuracy"] <= 1
        assert p["train_seconds"] >= 0


def test_all_wait_for_the_ticket_and_imp_for_the_round_before() -> None:
    some = config(keep=(0.2, 0.5), width=(0.5, 1.0))
    needs = {cell: some.needs(cell) for cell in some.cells()}
    ticket = Cell(0, "ticket", 2)
    assert needs[ticket] == needs[Cell(0, "dense", 2)] == ()
    assert needs[Cell(0, "random-mask", 2)] == (ticket,)
    assert needs[Cell(0, "imp", 2, 1)] == (ticket, Cell(0, "dense", 2))
    assert needs[Cell(0, "imp", 2, 2)] == (ticket, Cell(0, "imp", 2, 1))
    assert needs[Cell(0, "imp", 2)] == (ticket, Cell(0, "imp", 2, 2))
    assert needs[Cell(0, "imp", 3)] == (Cell(0, "ticket", 3), Cell(0, "dense", 2))
    assert not [cell for cell in config(keep=(1.0,)).cells() if cell.arm == "imp"]
    assert set(needs) >= {need for some in needs.values() for need in some}


def test_a_run_goes_on_with_more_seeds_and_arms_and_no_other_points(tmp_path: Path, cli: Cli) -> None:
    words = f"strong edge-popup {WORDS} --width 0.05 --out {tmp_path / 'run'}".split()
    assert cli(*words, "--arms", "ticket")[0] == 0
    assert cli(*words, "--arms", "ticket,random-mask", "--seeds", "0,1", "--resume")[0] == 0
    assert len(read(tmp_path / "run").points) == 4
    code, out, _ = cli("strong", "--out", str(tmp_path / "run"), "--resume", "--quiet")  # flags are the run's
    assert code == 0
    assert "edge-popup, signed-constant weights" in out
    code, _, err = cli("strong", "recycle", "--out", str(tmp_path / "run"), "--resume", "--quiet")
    assert code == 1
    assert "holds a run with another" in err
    words += ["--arms", "ticket,random-mask", "--seeds", "0,1"]
    for flag in ("keep", "width"):
        code, _, err = cli(*words, f"--{flag}", "0.3", "--resume")
        assert (code, len(err.splitlines())) == (1, 1)
        assert f"holds a run with other {flag}, and keeps its cells" in err
    code, _, err = cli(*words, "--keep", "0.3,0.5")
    assert code == 1
    assert "holds a run with fewer keep" in err
    assert "add --resume to extend it" in err
    assert len(read(tmp_path / "run").points) == 4


def test_a_run_goes_on_with_more_shares_and_widths(tmp_path: Path, cli: Cli) -> None:
    """What is there stays as it is, to the byte."""
    words = f"strong edge-popup {WORDS} --width 0.1 --keep 0.5 --out {tmp_path / 'run'}".split()
    assert cli(*words)[0] == 0
    cells = {file.name: file.read_bytes() for file in (tmp_path / "run" / "cells").iterdir()}
    lines = (tmp_path / "run" / "cells.jsonl").read_text().splitlines()
    for more in ("--width 0.05,0.1", "--width 0.05,0.1 --keep 0.2,0.5", "--width 0.05,0.1 --keep 0.2,0.5"):
        code, _, err = cli(*words, *more.split(), "--resume")
        assert code == 0, err
    record = read(tmp_path / "run")
    assert not record.damage
    assert record.complete
    assert record.config.sweeps == ("keep 0.5 width 0.1", "keep 0.5 width 0.05,0.1")
    assert [*record.config.levels] == [(0.1, 0.5), (0.05, 0.5), (0.05, 0.2), (0.1, 0.2)]
    for name, before in cells.items():
        assert (tmp_path / "run" / "cells" / name).read_bytes() == before
    assert set(lines) <= set((tmp_path / "run" / "cells.jsonl").read_text().splitlines())
    found = {(p["arm"], p["width"], p["keep"]) for p in record.points if not p["draw"]}
    points = [(width, keep) for width in (0.05, 0.1) for keep in (0.2, 0.5)]
    assert found == {(arm, *one) for arm in ("ticket", "random-mask", "imp") for one in points} | {
        ("dense", width, 1.0) for width in (0.05, 0.1)
    }
    for p in (p for p in record.points if not p["draw"]):
        size = get_model(f"lenet-300-100@{p['width']:g}").params.prunable
        assert p["weights_remaining"] == pytest.approx(p["keep"], abs=20 / size)
    rows = record.config.summary(record)
    assert [(row["width"], row["keep"], row["level"]) for row in rows] == [
        *((0.05, 0.2, 2), (0.05, 0.5, 1), (0.1, 0.2, 3), (0.1, 0.5, 0))
    ]
    mean = {(p["width"], p["keep"]): p["final_accuracy"] for p in record.points if p["arm"] == "ticket"}
    assert [row["arms"]["ticket"]["accuracy"] for row in rows] == [mean[r["width"], r["keep"]] for r in rows]


def test_a_run_that_goes_on_is_named_as_it_began() -> None:
    """So the runs of a version before, whose digest has their points, go on, too."""
    first = config(keep=(0.5,), width=(0.5, 1.0))
    more = config(keep=(0.3, 0.5), width=(0.5, 1.0)).going_on(first)
    most = config(keep=(0.3, 0.5), width=(0.25, 0.5, 1.0)).going_on(more)
    assert more.sweeps == ("keep 0.5 width 0.5,1.0",)
    assert most.sweeps == ("keep 0.5 width 0.5,1.0", "keep 0.3,0.5 width 0.5,1.0")
    assert {first.digest, more.digest, most.digest} == {first.digest}
    assert first.digest != config(keep=(0.3, 0.5), width=(0.5, 1.0)).digest
    for before, after in ((first, more), (more, most), (first, most)):
        assert set(before.cells()) < set(after.cells())
        for cell in before.cells():
            assert after.point(cell) == before.point(cell)
            assert after.model_of(cell) is before.model_of(cell)
            assert set(before.needs(cell)) == set(after.needs(cell))
            assert after.frozen(cell) == before.frozen(cell)
    assert config_from_json(most.to_json()) == most
    assert config(keep=(0.3, 0.5), width=(0.25, 0.5, 1.0)).going_on(most) == most
    assert config(keep=(0.3,)).going_on(first).sweeps == ()  # is refused
    levels = [most.level_at(place) for place in range(6)]
    assert sorted(levels) == [*range(6)]
    assert [most.level_at(place, "dense") for place in range(6)] == [4, 4, 0, 0, 1, 1]
    assert [most.rung(Cell(0, "ticket", level)) for level in levels] == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "sweeps", [("keep 0.5",), ("keep x width 1.0",), ("keep 0.4 width 1.0",), ("keep 0.5 width nan",)]
)
def test_what_was_no_span_before_is_a_line(sweeps: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="`sweeps` keep") as told:
        config(sweeps=sweeps).cells()
    assert "\n" not in str(told.value)


def test_settings_of_the_method_are_filled_in() -> None:
    some, its = config(method="iterand"), METHODS["iterand"]
    assert (some.keep, some.law, some.every, some.redraw) == ((0.5,), "signed-constant", its.every, its.share)
    assert config(method="signed").keep == (METHODS["signed"].keep,)
    assert some.recipe == METHODS["iterand"].recipe(get_model("lenet-300-100"))
    assert config_from_json(some.to_json()) == some
    assert some.digest == replace(some, seeds=(1, 2), arms=("ticket",)).digest
    assert some.digest != replace(some, every=0).digest


def test_runs_of_a_version_before_are_named_as_they_were() -> None:
    some = config(dataset="mnist", keep=(0.3, 0.5), width=(0.5, 1.0))
    signed = config(dataset="cifar10", method="signed", model="conv2", spread="even")
    signed = replace(signed, seeds=(0, 1, 2), recipe=replace(signed.recipe, lr=0.001))
    for one, digest in ((some, "1b82aacf"), (signed, "4a3ba48c")):
        assert one.digest == digest
        before = {name: value for name, value in one.to_json().items() if name not in ("sweeps", "spread")}
        assert config_from_json(before) == one


def test_signed_masks_of_convolutions_keep_more_of_small_layers() -> None:
    some = config(method="signed", model="conv2", dataset="cifar10", width=(0.25,))
    assert some.spread == "root"
    assert "more of small ones" in some.how
    assert config_from_json(some.to_json()) == some
    (cell, *_) = some.cells()
    assert some.frozen(cell).spread == "root"
    assert config(method="signed").spread == "even"
    other = config(model="conv2", dataset="cifar10", arms=("ticket", "signed"))
    assert (other.spread, other.frozen(Cell(0, "signed", 0)).spread) == ("even", "root")
    assert config(method="signed", model="conv2", dataset="cifar10", scope="global").spread == "even"


# ---- what arms are


def test_a_random_mask_keeps_as_many_of_the_same_weights(record: RunRecord) -> None:
    for level in range(4):
        ticket, other = (content(record, Cell(0, arm, level)) for arm in ("ticket", "random-mask"))
        params = record.config.model_of(Cell(0, "ticket", level)).params
        assert ticket.kept(params) == other.kept(params)
        share = (ticket.mask * other.mask != 0).sum() / np.count_nonzero(ticket.mask)
        assert share < np.count_nonzero(ticket.mask) / params.prunable + 0.05
        first = weights_of(ticket.frozen, params)
        for one in (ticket, other):
            drawn = weights_of(one.frozen, params, torch.from_numpy(one.redraws))
            found = one.weights(params)[: params.mask_size]
            assert torch.equal(found, drawn * torch.from_numpy(one.mask))
            assert one is ticket or torch.equal(drawn, first)
        assert other.redraws is not None
        assert not other.redraws.any()
        assert ticket.redraws is not None
        assert ticket.redraws.any()


def test_imp_keeps_as_many_weights_as_the_ticket_in_every_layer(record: RunRecord) -> None:
    kept = {(p["arm"], p["level"], p["draw"]): p["kept"] for p in record.points}
    for level in range(4):
        assert kept["imp", level, 0] == kept["ticket", level, 0]
    whole = kept["dense", 2, 0]
    for level in (0, 2):
        rounds = [kept["imp", level, draw] for draw in (1, 2, 0)]
        for before, after in zip([kept["dense", level, 0], *rounds], rounds, strict=False):
            for name in whole:
                assert 0.55 * before[name] < after[name] < 0.62 * before[name]  # 0.2 ** (1 / 3)


def test_imp_prunes_the_largest_weights_of_the_round_before_and_rewinds(record: RunRecord) -> None:
    some, place = record.config, Place(record.path, None, {})
    params = some.model_of(Cell(0, "imp", 2)).params
    before, _ = tickets.read(cell_path(record.path, Cell(0, "dense", 2)), params)
    mask, weights = some.start(Cell(0, "imp", 2, 1), place)
    for spec in params.weights:
        size, stays = np.abs(before.weights[spec.span]), mask[spec.span].numpy()
        assert size[stays].min() >= size[~stays].max()
    assert torch.equal(weights, init_weights(some.model_of(Cell(0, "imp", 2)), stream(0, "dense", 0, "init")))
    narrower = some.start(Cell(0, "imp", 2), place)[0]
    assert not (narrower & ~mask).any()
    ticket = tickets.load(cell_path(record.path, Cell(0, "imp", 2)))
    np.testing.assert_array_equal(ticket.content.mask, narrower.numpy())


def test_the_file_is_the_network_that_was_measured(record: RunRecord) -> None:
    images = Resident(DIGITS, "cpu", 500).test()
    for p in record.points:
        ticket = tickets.load(cell_path(record.path, Cell.of(p)))
        nets = [ticket.trained().eval()]
        if p["arm"] in ("ticket", "random-mask"):
            nets.append(strong_tickets.load(cell_path(record.path, Cell.of(p))).network())
        for net in nets:
            with torch.no_grad():
                right = [(net(x[0].T).argmax(1) == y[0, 0]).sum().item() for x, y in images]
            assert sum(right) / 1000 == pytest.approx(p["final_accuracy"], abs=1 / 1000)  # a tie at most


def test_the_loaded_network_is_that_of_training_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[Cell, np.ndarray] = {}
    real = strong_jobs.strong

    def watched(some: Any) -> Any:
        finish = real(some)

        def call(model: Model, job: Job, *more: Any) -> Any:
            computed[job.who] = job.network(model)[0].numpy().copy()
            return finish(model, job, *more)

        return call

    monkeypatch.setattr(strong_jobs, "strong", watched)
    (tmp_path / "cells").mkdir()
    (tmp_path / "checkpoints").mkdir()
    place = Place(tmp_path, Resident(DIGITS, "cpu", 500), {})
    for method in METHODS:
        some = config(
            method=method, width=(0.05,), arms=("ticket",), every=10 if method == "iterand" else None
        )
        some = replace(some, recipe=replace(some.recipe, steps=25, eval_every=25))
        (cell,) = some.cells()
        assert some.compute([cell], place)
        loaded = tickets.load(cell_path(tmp_path, cell))
        np.testing.assert_array_equal(loaded.content.weights, computed[cell])


def test_batch_norms_of_a_random_mask_know_the_images() -> None:
    draw = torch.Generator().manual_seed(0)
    model = get_model("resnet20@0.25")
    data = torch.randn(64, *model.input, generator=draw) + 2

    class Data:
        device = "cpu"

        def split(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.arange(64), torch.arange(0)

    def gathered(_: Any, replicas: int, batch: int) -> Any:
        return lambda index: (data[index].flatten(1).T[None], None)

    some = METHODS["edge-popup"].frozen(0)
    flat = METHODS["edge-popup"].start(some, model.params, draw)
    flat[: model.params.mask_size] = weights_of(some, model.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strong_jobs, "Gather", gathered)
        found = strong_jobs._calibrated(model, flat, Place(Path(), Data(), {}), 0)  # type: ignore[arg-type]
    assert torch.equal(found[: model.params.trained_size], flat[: model.params.trained_size])
    with torch.no_grad():
        train, test = network(model, found)(data), network(model, found).eval()(data)
    torch.testing.assert_close(train, test, rtol=0.05, atol=0.05)  # but for the unbiased variance


# ---- price and plan


def test_every_width_is_timed_and_trained_networks_apart() -> None:
    some = config(width=(0.05, 0.1), recipe=Recipe(steps=10, lr=0.1, optimizer="sgd", batch_size=20))
    assert [some.rung(Cell(0, arm, level)) for arm in ("ticket", "dense", "imp") for level in (1, 0)] == [
        *(0, 1, 2, 3, 2, 3)
    ]
    assert some.timed_rungs(True) == [0, 1, 2, 3]
    sampled = [some.sample(rung, 0, "cpu") for rung in range(4)]
    assert [(model.name, job.frozen is None, recipe.optimizer) for model, job, recipe in sampled] == [
        ("lenet-300-100@0.1", False, "sgd"),
        ("lenet-300-100@0.05", False, "sgd"),
        ("lenet-300-100@0.1", True, "adam"),
        ("lenet-300-100@0.05", True, "adam"),
    ]
    assert some.widest.name == "lenet-300-100@0.1"
    assert some.start_step(Cell(0, "random-mask", 0)) == 10


def test_no_usual_loop_stands_beside_it() -> None:
    """One that trains weights would take another network's time."""
    planned = plan(config(width=(0.05,), recipe=Recipe(steps=10, lr=0.1)))
    assert planned.images is not None
    assert screen._usual(planned) is None


def test_a_dry_run_has_a_price(document: Callable[..., dict[str, Any]]) -> None:
    found = document(*f"strong recycle {WORDS} --width 0.05,0.1 --dry-run".split())
    assert found["schema"] == "sparselth.strong-plan/1"
    assert found["cells"] == 8
    assert found["seconds"] > 0
    assert found["config"]["method"] == "recycle"


# ---- other methods, and other commands


def test_other_methods_stand_beside_the_ticket(tmp_path: Path, cli: Cli) -> None:
    words = (
        f"strong edge-popup {WORDS} --width 0.05,0.1 --arms ticket,recycle,signed --out {tmp_path / 'run'}"
    )
    code, out, err = cli(*words.split())
    assert code == 0, err
    found = read(tmp_path / "run")
    assert {(p["arm"], p["method"]) for p in found.points} == {
        *(("ticket", "edge-popup"), ("recycle", "recycle"), ("signed", "signed"))
    }
    some = found.config
    recipes = [some.recipe_of(Cell(0, arm, 0)) for arm in ("ticket", "recycle", "signed")]
    assert {(recipe.steps, recipe.batch_size) for recipe in recipes} == {(60, recipes[0].batch_size)}
    assert recipes[1].lr == METHODS["recycle"].recipe(get_model("lenet-300-100")).lr
    first, other = (some.frozen(Cell(0, arm, 0)) for arm in ("ticket", "recycle"))
    assert (other.method, other.every, other.keep) == ("recycle", METHODS["recycle"].every, first.keep)
    params = some.models[0].params
    assert torch.equal(weights_of(first, params), weights_of(other, params))
    text = " ".join(out.split())
    assert "vs recycle" in text
    assert "Against recycle of the same width:" in text


def test_a_benchmark_of_levels_says_that_there_are_none(record: RunRecord, cli: Cli) -> None:
    code, _, err = cli("bench", "--run", str(record.path), "--device", "cpu")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "is a run of strong; expected one of imp, by levels" in err


# ---- what goes wrong


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("edge-popdown", "unknown method 'edge-popdown': did you mean 'edge-popup'?"),
        ("edge-popup --keep 0", "--keep 0: expected different shares of the weights, above 0 and at most 1"),
        ("edge-popup --keep 1.5", "--keep 1.5: expected different shares"),
        ("edge-popup --keep 0.5,0.5", "--keep 0.5,0.5: expected different shares"),
        ("edge-popup --keep half", "expected numbers such as 0.5 or 0.1,0.3,0.5"),
        ("edge-popup --keep nan", "--keep nan: expected"),
        ("edge-popup --width 0.001", "0.001 of the 300 units of layer 0 is no unit"),
        ("edge-popup --width 0", "--width 0: expected different positive numbers"),
        ("edge-popup --width inf", "--width inf: expected"),
        ("edge-popup --arms dense", "'ticket' is missing"),
        ("edge-popup --arms ticket,imp", "'dense' is missing"),
        ("recycle --arms ticket,recycle", "recycle is what the ticket is found by"),
        ("edge-popup --arms ticket,reinit", "unknown arm 'reinit'"),
        ("edge-popup --every 10", "--every 10: has no effect with edge-popup; use iterand or recycle"),
        ("supermask --spread root", "--spread root: has no effect with supermask, which keeps by chance"),
        ("edge-popup --spread root --scope global", "--spread root: expected --scope layer"),
        ("iterand --redraw 1.5", "--redraw 1.5: expected a share from 0 to 1"),
        ("iterand --every -1", "--every -1: expected 0 or more"),
        ("edge-popup --law laplace", "laplace"),
        ("edge-popup --model conv2", "--model conv2 takes images of 3 x 32 x 32"),
        ("edge-popup signed", "unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    words: str, said: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("strong", *f"{words} --dataset mnist5k --quiet --out run".split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert not [*tmp_path.iterdir()]


def test_a_model_without_layers_to_prune_is_one_line(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "none.py"
    file.write_text(
        "from sparselth.models import Model, ReLU, register\n"
        'register(Model(name="none", input=(1, 28, 28), layers=(ReLU(),), recipes={}, source=""))\n'
    )
    code, _, err = cli(*f"strong edge-popup --plugin {file} --model none".split())
    assert (code, len(err.splitlines())) == (2, 1)
    assert "model none: has no weights; expected a Conv or a Linear among its layers" in err


def test_too_many_networks_are_counted_before_they_are_listed() -> None:
    with pytest.raises(UsageError, match="there are 160,000,000 networks; expected at most 100,000"):
        config(
            seeds=tuple(range(4000)), keep=tuple(i / 100 for i in range(1, 101)), width=tuple(range(1, 101))
        ).cells()
