"""What foretells masks: the dense network is trained to the same bits, AUCs are those of the masks, words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparselth import tickets
from sparselth.chance import auc, ranks
from sparselth.config import Cell
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.experiments.base import Place
from sparselth.experiments.imp import score_batch
from sparselth.experiments.predict import PredictConfig
from sparselth.experiments.predict_jobs import _foretold, _training
from sparselth.models.torch import network as torch_network
from sparselth.report import predict as report
from sparselth.runs import RunRecord, cell_path, read

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(finished: Callable[..., RunRecord]) -> RunRecord:
    return finished("--levels", "2", "--arms", "ticket", "--rewind", "5")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "said"


@pytest.fixture
def record(source: RunRecord, cli: Cli, kept: Path) -> RunRecord:
    """Computed once for all tests."""
    if kept.exists():
        shutil.copytree(kept, "said")
        return read(Path("said"))
    code, _, err = cli("predict", "run", "--at", "5,30,100", "--out", "said", "--quiet")
    assert code == 0, err
    shutil.copytree("said", kept)
    return read(Path("said"))


def place() -> Place:
    return Place(Path("run"), Resident(load("mnist5k", Path()), "cpu", 500), {})


def test_the_dense_network_trains_to_the_same_bits(source: RunRecord) -> None:
    reads = PredictConfig(source="run", at=(5, 30, 100))
    steps = {step: weights.clone() for step, weights in _training(reads, 1, place())}
    config: Any = source.config
    file = tickets.read(cell_path(Path("run"), Cell(1, "ticket", 0)), config.network.params)[0]
    assert file.rewound is not None
    np.testing.assert_array_equal(steps[5].numpy(), file.rewound)
    np.testing.assert_array_equal(steps[100].numpy(), file.weights)
    stopped = Place(Path("run"), place().data, {}, should_stop=lambda: True)
    assert [step for step, _ in _training(reads, 1, stopped)] == [-1]


def test_aucs_are_those_of_the_masks(record: RunRecord) -> None:
    config, imp = record.config, record.config.imp
    model, found = imp.network, config.ticket(Cell(0, "ticket", 2))
    assert found.rewound is not None
    weights = torch.from_numpy(found.rewound)
    net = torch_network(model, weights).double()
    x, y = score_batch(model, place(), 0, 1)
    F.cross_entropy(net(x.double()), y).backward()  # type: ignore[no-untyped-call]
    slopes = {name: p.grad for name, p in net.named_parameters()}
    for spec in model.params.weights:
        kept, w = found.mask[spec.span], found.rewound[spec.span].astype(float)
        slope = slopes[spec.name]
        assert slope is not None
        g = slope.numpy().ravel()
        numbers = {"magnitude": abs(w), "sign": np.sign(w), "gradient": abs(g), "snip": abs(w * g)}
        for name, values in numbers.items():
            layer = spec.name.removesuffix(".weight")
            assert report.found(record, name, 2, layer)[0] == pytest.approx(
                auc(ranks(values), kept), abs=2e-5
            )
    # weights at the last step are what level 1 was pruned by: nothing foretells it better
    for layer in ("fc1", "fc2", "fc3"):
        assert report.found(record, "weights@100", 1, layer) == {0: 1.0, 1: 1.0}
        assert report.found(record, "weights@5", 1, layer) == report.found(record, "magnitude", 1, layer)
    assert 0.4 < report.found(record, "sign", 2)[0] < 0.6


def test_all_weights_are_held_against_masks_shuffled_within_layers(record: RunRecord) -> None:
    """Of each layer a half is kept of what is large, and a tenth of what is small: that is no foresight."""
    (params, numbers), draw = (record.config.imp.network.params, np.random.default_rng(0)), {}
    specs = params.weights[:2]
    for where, (spec, share) in enumerate(zip(specs, (0.5, 0.1), strict=True)):
        draw[spec] = numbers.random(spec.numel) < share, numbers.random(spec.numel) - where
    sizes, mask = np.zeros(params.mask_size, np.float32), np.zeros(params.mask_size, bool)
    for spec, (kept, values) in draw.items():
        mask[spec.span], sizes[spec.span] = kept, values
    *layers, whole = _foretold(specs, "magnitude", 0, sizes, {1: mask})
    assert [one["layer"] for one in layers] == ["fc1", "fc2"]
    assert all(one["chance"] == 0.5 for one in layers)
    assert whole["auc"] > 0.55
    assert whole["auc"] == pytest.approx(whole["chance"], abs=0.01)


def test_what_is_never_pruned_is_not_foretold(
    finished: Callable[..., RunRecord], cli: Cli, document: Callable[..., Any]
) -> None:
    finished("--levels", "1", "--arms", "ticket", "--exclude", "fc1")
    said = document("predict", "run", "--at", "100", "--out", "without", "--quiet")
    assert {p["layer"] for p in said["points"]} == {"fc2", "fc3", "all"}
    assert "fc1" in cli("show", "without")[1]


def test_masks_by_magnitude_are_compared_step_by_step(record: RunRecord) -> None:
    for seed in (0, 1):
        one, two = (report.masks(record, level)[seed] for level in (1, 2))
        assert [row["step"] for row in one] == [5, 30, 100]
        assert one[0]["moved"] is None
        assert one[-1]["shared"] == 1.0
        assert 0.5 < two[0]["shared"] <= two[-1]["shared"] < 1
        assert all(0 < row["moved"] < 0.5 for row in one[1:])
        share = report.remaining(record, 2)
        assert two[0]["by_chance"] == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("groups", ["unit", "block:2", "2:4"])
def test_masks_of_a_run_in_groups_are_drawn_in_groups(
    finished: Callable[..., RunRecord], cli: Cli, groups: str
) -> None:
    finished("--levels", "1", "--arms", "ticket", "--pattern", groups, "--scope", "global", "--seeds", "0")
    code, _, err = cli("predict", "run", "--at", "5,100", "--out", "in groups", "--quiet")
    assert code == 0, err
    first, last = report.masks(read(Path("in groups")), 1)[0]
    assert last["shared"] == 1.0  # what the ticket is pruned from
    assert first["shared"] < 1.0


def test_a_mask_has_settled_once_five_in_a_row_moved_little() -> None:
    def steps(*moved: float | None) -> list[dict[str, Any]]:
        return [{"step": 10 * i, "moved": m} for i, m in enumerate(moved)]

    assert report.settled(steps(None, 0.3, 0.09, 0.09, 0.09, 0.09, 0.09, 0.5)) == 60
    assert report.settled(steps(None, 0.09, 0.09, 0.09, 0.09, 0.09)) == 50
    assert report.settled(steps(None, 0.09, 0.09, 0.1, 0.09, 0.09, 0.09, 0.09)) is None
    assert report.settled(steps(None, 0.0)) is None


def test_points_and_words(record: RunRecord, cli: Cli) -> None:
    document = json.loads(cli("show", "said", "--json")[1])
    assert document["schema"] == "sparselth.predict/1"
    points = document["points"]
    assert len(points) == 2 * (4 + 3) * 2 * 4  # seeds, predictors, levels, layers and all of them
    assert all({"predictor", "layer", "level", "seed", "auc"} <= p.keys() for p in points)
    text = cli("show", "said")[1]
    assert "magnitude" in text
    assert "weights@100" in text
    assert "is open: 2 seeds give no interval" in " ".join(text.split())
    assert {row.name for row in Path("said/figures").glob("*.png")} == {
        "foretold.png", "foretold_layers.png", "settled.png"
    }  # fmt: skip
    code, _, err = cli("predict", "run", "--at", "5,101", "--quiet")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--at 5,101: expected steps up to 100, where training ends" in err


def test_a_sentence_has_its_intervals(record: RunRecord) -> None:
    seeds = [
        point | {"seed": seed, "foretold": [
            one | {"auc": one["auc"] and one["auc"] + 0.001 * (seed - 1)} for one in point["foretold"]
        ]}
        for seed, point in enumerate([record.points[0]] * 3)
    ]  # fmt: skip
    more = RunRecord(record.path, record.config, seeds, [])
    text = report.sentence(more)
    mean = report.found(record, "magnitude", 2)[0]
    chance = report.found(record, "magnitude", 2, field="chance")[0]
    assert f"initial magnitude {mean:.3f} ± 0.002 (chance: {chance:.3f})" in text
    assert "settled on 0 of 3 seeds and shares" in text  # three looks are too few
    assert "where chance has 64" in text


def test_a_module_of_a_users(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\n\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, 10))\n"
    )
    words = [
        "--model",
        "net.py:make",
        "--dataset",
        "mnist5k",
        "--seeds",
        "0",
        "--steps",
        "20",
        "--levels",
        "1",
    ]
    code, _, err = cli("imp", *words, "--arms", "ticket", "--out", "run", "--quiet")
    assert code == 0, err
    code, _, err = cli("predict", "run", "--at", "5,20", "--out", "said", "--quiet")
    assert code == 0, err
    record = read(Path("said"))
    assert report.found(record, "weights@20", 1, "1") == {0: 1.0}
