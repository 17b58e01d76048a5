"""Tickets on another data set or network: what each arm starts from, reports, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import tickets
from sparselth.config import Cell
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.errors import UsageError
from sparselth.experiments.base import Place
from sparselth.experiments.transfer import TransferConfig
from sparselth.files import dump, read_json, sealed
from sparselth.patterns import get_pattern
from sparselth.report import transfer as report
from sparselth.runs import RunRecord, cell_path, read
from sparselth.streams import stream

Cli = Callable[..., tuple[int, str, str]]
SHORT = ["--steps", "60", "--eval-every", "30", "--quiet"]


@pytest.fixture
def source(finished: Callable[..., RunRecord]) -> RunRecord:
    return finished("--levels", "2", "--arms", "ticket", "--rewind", "5")


def place(run: str) -> Place:
    return Place(Path(run), Resident(load("mnist5k", Path()), "cpu", 500), {})


def test_every_arm_starts_from_what_it_says(source: RunRecord, cli: Cli) -> None:
    code, _, err = cli("transfer", "--from", "run", "--to", "mnist5k", "--out", "there", *SHORT)
    assert code == 0, err
    config = read(Path("there")).config
    assert (config.rewind, config.levels, config.seeds) == (5, 2, (0, 1))
    params = config.network.params
    starts = {arm: config.start(Cell(1, arm, 2), place("there")) for arm in config.arms}
    theirs = config.ticket(Cell(1, "ticket", 2))
    assert theirs.rewound is not None
    own = tickets.read(cell_path(Path("there"), Cell(1, "own", 0)), params)[0].rewound
    assert own is not None
    drawn = init_weights(config.network, stream(1, "own", 0, "init")).numpy()
    assert 0 < np.abs(own - drawn).max() < 0.1  # five steps on
    assert not np.array_equal(own, theirs.rewound)
    for arm in ("mask", "ticket"):
        np.testing.assert_array_equal(starts[arm][0].numpy(), theirs.mask)
    shuffled = starts["random-mask"][0]
    assert params.kept(shuffled) == params.kept(torch.from_numpy(theirs.mask))
    assert not np.array_equal(shuffled.numpy(), theirs.mask)
    for arm in ("own", "mask", "random-mask"):
        np.testing.assert_array_equal(starts[arm][1].numpy(), own)
    np.testing.assert_array_equal(starts["ticket"][1].numpy(), theirs.rewound)
    # own is found in this run: the largest of what level 1 trained to
    before = tickets.read(cell_path(Path("there"), Cell(1, "own", 1)), params)[0]
    mask = starts["own"][0].numpy()
    for spec in params.weights:
        sizes, kept, alive = np.abs(before.weights[spec.span]), mask[spec.span], before.mask[spec.span]
        assert kept[~alive].sum() == 0
        assert sizes[kept].min() >= sizes[alive & ~kept].max()


def test_random_masks_of_a_source_in_groups_are_in_groups(finished: Callable[..., RunRecord]) -> None:
    """Where the target's layers fit them; else weight by weight. Counts are the mask's in any case."""
    finished("--levels", "1", "--arms", "ticket", "--seeds", "0", "--pattern", "block:4", "--rate", "0.5")
    pattern = get_pattern("block:4")
    assert pattern is not None
    for model, fits in (("lenet-300-100", 2), ("lenet-300-100@0.5", 0)):
        config: Any = TransferConfig(source="run", model=model, dataset="mnist5k")
        params, cells = config.network.params, [Cell(0, arm, 1) for arm in ("mask", "random-mask")]
        own, random = (config.start(cell, place("run"))[0] for cell in cells)
        assert params.kept(random) == params.kept(own)
        assert not torch.equal(random, own)
        there = [spec for spec in params.weights if not pattern.misfit(spec)]
        assert len(there) == fits
        for spec in there:
            assert pattern.holds(spec, random[spec.span])
    with pytest.raises(UsageError, match=r"`pattern` block:4: fits no layer of lenet-300-100@0.5"):
        config.check()  # its own tickets would be dense


def test_a_run_whose_random_masks_were_of_single_weights_takes_none_of_groups(
    finished: Callable[..., RunRecord], cli: Cli
) -> None:
    """As runs were written before a source's masks were shuffled by its groups; others go on."""
    words = ["transfer", "--from", "run", "--to", "mnist5k", "--seeds", "0", "--out", "there", *SHORT]
    for pattern, code in (("unstructured", 0), ("block:4", 1)):
        for folder in ("run", "there"):
            shutil.rmtree(folder, ignore_errors=True)
        finished("--levels", "1", "--arms", "ticket", "--seeds", "0", "--pattern", pattern, "--rate", "0.5")
        assert cli(*words)[0] == 0
        cell_path(Path("there"), Cell(0, "random-mask", 1)).unlink()
        data = read_json(Path("there/config.json"))
        del data["random_masks"], data["sha256"]
        Path("there/config.json").write_bytes(dump(sealed(data)))
        found, _, err = cli(*words, "--resume")
        assert found == code, err
    assert "holds a run with another random_masks (unstructured there, block:4 here)" in err
    assert len(err.splitlines()) == 1


def test_points_say_where_tickets_are_from(source: RunRecord, cli: Cli) -> None:
    words = [
        "transfer",
        "--from",
        "run",
        "--to",
        "mnist5k",
        "--levels",
        "1",
        "--seeds",
        "0",
        "--out",
        "there",
    ]
    code, out, err = cli(*words, *SHORT, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["schema"] == "sparselth.transfer/1"
    assert len(document["points"]) == 5
    for p in document["points"]:
        wanted = {"source", "target", "arm", "seed", "level", "weights_remaining", "final_accuracy"}
        assert wanted <= p.keys()
        assert p["source"] == p["target"] == "lenet-300-100 on mnist5k"
    assert "open: 1 seed gives no interval" in document["summary"][-1]["sentence"]
    # a run goes on with more levels and seeds, and computes nothing twice
    code, out, err = cli(*words[:5], "--out", "there", "--resume", "--levels", "2", "--seeds", "0,1", *SHORT)
    assert code == 0, err
    assert len(read(Path("there")).points) == 2 * (1 + 2 * 4)


def test_a_narrower_network_takes_masks_alone(source: RunRecord, cli: Cli) -> None:
    words = ["transfer", "--from", "run", "--to-model", "lenet-300-100@0.5", "--levels", "1", "--seeds", "0"]
    code, _, err = cli(*words, "--out", "narrow", *SHORT)
    assert code == 0, err
    record = read(Path("narrow"))
    assert record.config.arms == ("own", "mask", "random-mask")
    assert record.config.recipe.steps == 60
    mask = record.config.start(Cell(0, "mask", 1), place("narrow"))[0].numpy()
    theirs, (first, *_) = record.config.ticket(Cell(0, "ticket", 1)).mask, record.config.network.weights
    np.testing.assert_array_equal(mask[first.span], theirs[first.span])  # 150 of the 300 rows
    code, _, err = cli(*words, "--arms", "own,ticket", *SHORT)
    assert code == 2
    assert "ticket: fc1.weight is [150, 784] here and [300, 784] in the source" in err
    code, _, err = cli("transfer", "--from", "run", "--to-model", "lenet5", *SHORT)
    assert code == 2
    assert "conv1.weight: the source has 3 layers of weights, this network 5" in err


def test_mistakes_are_told_in_a_line(source: RunRecord, cli: Cli) -> None:
    said = {
        ("--levels", "3"): "run: has no finished seed 0 ticket level 3; it has tickets of seeds 0,1",
        ("--rewind", "60"): "--rewind 60: expected a step from 0 to 59",
        ("--arms", "mask"): "'own' is missing",
        ("--to", "cifar10"): "--model lenet-300-100 takes images of 1 x 28 x 28, cifar10 has",
    }
    for words, text in said.items():
        code, out, err = cli("transfer", "--from", "run", *words, *SHORT)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert text in err
    assert "transfer: expected the folder of a run of imp" in cli("transfer", "--to", "mnist5k", *SHORT)[2]


def made(source: str, values: dict[str, list[float]]) -> RunRecord:
    """A run of one level whose arms have these accuracies by seed; dense has 0.9."""
    config: Any = TransferConfig(source=source, dataset="mnist5k", seeds=(0, 1), levels=1)
    object.__setattr__(config, "seeds", (0, 1, 2))
    points = [
        {"seed": seed, "arm": arm, "level": level, "draw": 0, "weights_remaining": 0.8**level}
        | {"final_accuracy": accuracy}
        for arm, found in (values | {"dense": [0.9] * 3}).items()
        for seed, accuracy in enumerate(found)
        for level in (0 if arm == "dense" else 1,)
        for arm in ("own" if arm == "dense" else arm,)
    ]
    return RunRecord(Path(source), config, points, [])


@pytest.mark.parametrize(
    ("mask", "chance", "said"),
    [
        ((0.899, 0.901, 0.9), (0.8, 0.801, 0.799), "they serve it as well as its own"),
        ((0.899, 0.901, 0.9), (0.9, 0.901, 0.899), "but not clearly better than random ones do"),
        ((0.849, 0.851, 0.85), (0.8, 0.801, 0.799), "they transfer in part"),
        ((0.799, 0.801, 0.8), (0.85, 0.851, 0.849), "they are worse than random ones"),
        ((0.849, 0.851, 0.85), (0.85, 0.86, 0.84), "worse than its own, and not clearly better than random"),
        ((0.7, 0.95, 0.9), (0.85, 0.7, 0.99), "whether they transfer is open"),
    ],
)
def test_the_sentence_follows_from_the_points(
    source: RunRecord, mask: tuple[float, ...], chance: tuple[float, ...], said: str
) -> None:
    arms = {"own": [0.9, 0.901, 0.899], "mask": [*mask], "random-mask": [*chance], "ticket": [*mask]}
    record = made("run", arms)
    text = report.sentence(record)
    assert said in text, text
    assert "+0.00" in text  # ticket is as mask
    pp = 100 * (np.array(mask) - np.array(arms["own"])).mean()
    assert f"{pp:+.2f} ± " in text.replace("-0.00", "+0.00")
    rows = {row["arm"]: row for row in report.summary(record)[1:-1]}
    assert rows["mask"]["minus_own"]["mean"] == pytest.approx(pp / 100)
    assert "vs own" in report.table(record)


def test_the_figure_shows_every_arm(source: RunRecord, tmp_path: Path) -> None:
    values = {arm: [0.9, 0.91, 0.89] for arm in ("own", "ticket", "mask", "random-mask")}
    written = report.draw(made("run", values), tmp_path / "figures")
    assert [file.name for file in written] == ["transfer.png", "transfer.svg"]
    text = written[1].read_text()
    for label in ("target's own ticket", "source's mask", "random mask", "dense"):
        assert f"<!-- {label} -->" in text
