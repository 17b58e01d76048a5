"""The experiment end to end on real digits: what each arm is, and what the run folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import pruning
from sparselth.config import Cell
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig, find_mask, start_weights
from sparselth.files import load_arrays
from sparselth.models import get_model
from sparselth.runs import RunRecord, cell_path
from sparselth.streams import stream

Imp = Callable[..., RunRecord]
LENET = get_model("lenet-300-100")
DIGITS = Resident(load("mnist5k", Path()), "cpu", 500)
ALL_ARMS = "ticket,reinit,random-mask,random-reinit"


def trained(record: RunRecord, who: Cell) -> tuple[np.ndarray, np.ndarray]:
    """(mask, final weights), both [M], as saved."""
    arrays, _ = load_arrays(cell_path(record.path, who))
    mask, weights = np.zeros(LENET.params.mask_size, bool), np.zeros(LENET.params.mask_size, np.float32)
    for spec in LENET.weights:
        bits = np.unpackbits(arrays[f"mask/{spec.name}"], axis=1, bitorder="little")[:, : spec.matrix[1]]
        span = spec.span
        mask[span] = bits.ravel()
        weights[span][mask[span]] = arrays[f"kept/{spec.name}"]
    return mask, weights


def starts(record: RunRecord, who: Cell) -> torch.Tensor:
    return start_weights(record.config, Place(record.path, DIGITS, {}), who)


def masks(record: RunRecord, who: Cell) -> torch.Tensor:
    return find_mask(record.config, Place(record.path, DIGITS, {}), who)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Two levels, two seeds, all arms, two draws, rewound to step 30 of 200."""
    from sparselth.cli.main import run
    from sparselth.runs import read

    out = tmp_path_factory.mktemp("runs") / "small"
    words = "imp --model lenet-300-100 --dataset mnist5k --seeds 0,1 --levels 2 --steps 200 --rewind 30"
    words += " --reinits 2 --quiet"
    assert run([*words.split(), "--arms", ALL_ARMS, "--out", str(out)]) == 0
    return read(out)


def test_every_planned_cell_is_a_point(small: RunRecord) -> None:
    assert small.complete
    # 3 tickets, 2 random-mask, 2 levels x 2 draws of each arm with fresh weights, for 2 seeds
    assert len(small.points) == 2 * (3 + 2 + 4 + 4)
    for line in small.points:
        assert 0.5 < line["accuracy_at_early_stop"] <= 1
        assert 0.5 < line["final_accuracy"] <= 1
        assert line["train_seconds"] > 0
        assert line["weights_remaining"] == sum(line["kept"].values()) / 266_200


def test_early_stop_is_found_in_the_evaluations(small: RunRecord) -> None:
    for line in small.points:
        name = ("seed", "arm", "level", "draw")
        losses = {
            e["step"]: e["validation_loss"]
            for e in small.evaluations
            if all(e[key] == line[key] for key in name)
        }
        assert list(losses) == [100, 200]
        assert line["early_stop_step"] == min(losses, key=lambda step: losses[step])
        assert line["validation_loss_at_early_stop"] == min(losses.values())


def test_level_k_prunes_the_trained_weights_of_level_k_minus_1(small: RunRecord) -> None:
    rungs = pruning.ladder(LENET.params, 2, 0.2, "layer")
    for seed in (0, 1):
        for level in (1, 2):
            before, weights = trained(small, Cell(seed, "ticket", level - 1))
            after, _ = trained(small, Cell(seed, "ticket", level))
            assert not (after & ~before).any()
            for spec in LENET.weights:
                span = spec.span
                magnitude, stays = np.abs(weights[span]), after[span]
                assert stays.sum() == rungs[level][spec.name]
                assert magnitude[stays].min() >= magnitude[before[span] & ~stays].max()


def test_tickets_and_random_masks_go_back_to_the_rewind_step(small: RunRecord) -> None:
    origin = init_weights(LENET, stream(0, "ticket", 0, "init"))
    rewound = starts(small, Cell(0, "ticket", 1))
    assert not torch.equal(rewound, origin)  # 30 steps on
    assert (rewound - origin).abs().max() < 30 * 1.2e-3 * 1.5
    for who in (Cell(0, "ticket", 2), Cell(0, "random-mask", 1), Cell(0, "random-mask", 2)):
        assert torch.equal(starts(small, who), rewound)
    assert torch.equal(
        starts(small, Cell(1, "ticket", 0)), init_weights(LENET, stream(1, "ticket", 0, "init"))
    )


def test_reinit_is_the_tickets_mask_on_fresh_weights(small: RunRecord) -> None:
    # a peer redraws and then prunes what the fresh weights learn
    for level in (1, 2):
        ticket = masks(small, Cell(0, "ticket", level))
        drawn = []
        for draw in (0, 1):
            who = Cell(0, "reinit", level, draw)
            assert torch.equal(masks(small, who), ticket)
            assert np.array_equal(trained(small, who)[0], ticket.numpy())
            drawn.append(starts(small, who))
        assert not torch.equal(drawn[0], drawn[1])
        for weights in drawn:
            assert (
                torch.corrcoef(torch.stack([weights, starts(small, Cell(0, "ticket", 0))]))[0, 1].abs() < 0.02
            )


def test_random_arms_shuffle_the_mask(small: RunRecord) -> None:
    # a peer's shuffle is a no-op: its random arm is the ticket
    for level in (1, 2):
        ticket = masks(small, Cell(0, "ticket", level))
        found = [masks(small, Cell(0, "random-mask", level))]
        found += [masks(small, Cell(0, "random-reinit", level, draw)) for draw in (0, 1)]
        for i, mask in enumerate(found):
            assert LENET.params.kept(mask) == LENET.params.kept(ticket)
            for other in [ticket, *found[:i]]:
                share = (mask & other).sum() / mask.sum()
                assert share < ticket.sum() / LENET.params.prunable + 0.02  # no more in common than chance


def test_pruned_weights_are_not_in_the_file(small: RunRecord) -> None:
    sizes = [cell_path(small.path, Cell(0, "reinit", level)).stat().st_size for level in (1, 2)]
    for level, size in zip((1, 2), sizes, strict=True):
        kept = sum(pruning.ladder(LENET.params, level, 0.2, "layer")[level].values())
        assert size < 4 * kept + 266_200 / 8 + 4 * 410 + 4000


def test_the_ticket_can_be_rebuilt_from_the_folder(small: RunRecord) -> None:
    arrays, header = load_arrays(cell_path(small.path, Cell(0, "ticket", 0)))
    assert header["schema"] == "sparselth.cell/1"
    assert header["rewind_step"] == 30
    weights = starts(small, Cell(0, "ticket", 1))
    for spec in LENET.weights:
        assert arrays[f"rewind/{spec.name}"].shape == spec.shape
        values = torch.from_numpy(arrays[f"rewind/{spec.name}"]).flatten()
        assert torch.equal(values, weights[spec.span])
    np.testing.assert_array_equal(
        small.mask(0, 2, "fc1.weight"), trained(small, Cell(0, "ticket", 2))[0][:235_200].reshape(300, 784)
    )


def test_one_shot_takes_every_mask_from_the_dense_network(imp: Imp) -> None:
    record = imp("--one-shot", "--levels", "3", "--arms", "ticket", "--seeds", "0")
    _, dense = trained(record, Cell(0, "ticket", 0))
    for level, rung in enumerate(pruning.ladder(LENET.params, 3, 0.2, "layer")):
        mask, _ = trained(record, Cell(0, "ticket", level))
        if level:
            for spec in LENET.weights:
                span = spec.span
                assert mask[span].sum() == rung[spec.name]
                assert np.abs(dense[span][mask[span]]).min() >= np.abs(dense[span][~mask[span]]).max()


def test_global_scope_ranks_all_layers_together(imp: Imp) -> None:
    record = imp("--scope", "global", "--rate", "0.5", "--levels", "2", "--arms", "ticket", "--seeds", "3")
    assert [sum(line["kept"].values()) for line in record.points] == [266_200, 133_100, 66_550]
    shares = {
        name: n / next(s.numel for s in LENET.weights if s.name == name)
        for name, n in record.points[2]["kept"].items()
    }
    assert shares["fc1.weight"] < 0.25 < shares["fc3.weight"]


def test_same_flags_give_the_same_bits_with_one_worker_or_two(
    imp: Imp, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    flags = ("--levels", "2", "--arms", "ticket,random-mask")
    one = imp(*flags, "--workers", "1", out="one", steps=30)
    two = imp(*flags, "--workers", "2", out="two", steps=30)
    assert run_contents(one.path) == run_contents(two.path)


def test_a_cell_does_not_depend_on_who_else_is_run(imp: Imp) -> None:
    # no config digest in the comparison: the runs differ, the cells must not
    many = imp("--levels", "1", "--seeds", "0-2", "--arms", ALL_ARMS, out="many", steps=30)
    few = imp("--levels", "1", "--seeds", "2", "--arms", "random-reinit,ticket", out="few", steps=30)
    for who in few.config.cells():
        a, b = load_arrays(cell_path(many.path, who))[0], load_arrays(cell_path(few.path, who))[0]
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_not_computed_again(
    imp: Imp, finished: Imp, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    record = finished("--levels", "1", "--seeds", "0")
    times = {file: file.stat().st_mtime_ns for file in (record.path / "cells").iterdir()}
    before = run_contents(record.path)
    imp("--levels", "1", "--seeds", "0")
    assert {file: file.stat().st_mtime_ns for file in (record.path / "cells").iterdir()} == times
    assert run_contents(record.path) == before


def test_one_missing_cell_is_all_that_is_computed(
    imp: Imp, finished: Imp, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    record = finished("--levels", "1", "--seeds", "0")
    before = run_contents(record.path)
    times = {file.name: file.stat().st_mtime_ns for file in (record.path / "cells").iterdir()}
    (record.path / "cells" / "seed0-reinit-01.safetensors").unlink()
    imp("--resume", "--seeds", "0")  # flags that are not given are the run's
    assert run_contents(record.path) == before
    after = {file.name: file.stat().st_mtime_ns for file in (record.path / "cells").iterdir()}
    assert {name for name in after if after[name] != times[name]} == {"seed0-reinit-01.safetensors"}


def test_a_run_is_extended_to_the_bits_of_a_larger_one(
    imp: Imp,
    cli: Callable[..., tuple[int, str, str]],
    run_contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Levels, seeds, arms and draws; found without --out: a folder's name does not tell which there are."""
    monkeypatch.setattr(ImpConfig, "draw", lambda *_: None)  # takes longer than all cells
    words = [
        "imp",
        "--model",
        "lenet-300-100",
        "--dataset",
        "mnist5k",
        "--steps",
        "20",
        "--rewind",
        "5",
        "--quiet",
    ]
    small = ("--levels", "1", "--seeds", "1", "--arms", "ticket,reinit")
    large = ("--levels", "2", "--seeds", "0-1", "--arms", "ticket,reinit,random-mask", "--reinits", "2")
    whole = imp("--rewind", "5", *large, out="whole", steps=20)
    assert cli(*words, *small)[0] == 0
    (run,) = Path("runs").iterdir()
    times = {file.name: file.stat().st_mtime_ns for file in (run / "cells").iterdir()}
    assert len(times) == 3
    code, _, err = cli(*words, *large)
    assert code == 1
    assert "holds a run with fewer seeds ([1] there, [0, 1] here); add --resume to extend it" in err
    assert cli(*words, *large, "--resume")[0] == 0
    assert [*Path("runs").iterdir()] == [run]
    assert run_contents(run) == run_contents(whole.path)
    assert {name: (run / "cells" / name).stat().st_mtime_ns for name in times} == times


def test_torn_lines_and_left_overs_are_dropped(
    imp: Imp, finished: Imp, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    record = finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    before = run_contents(record.path)
    with (record.path / "cells.jsonl").open("rb+") as file:
        file.truncate(len(before["cells.jsonl"]) - 7)
    with (record.path / "evaluations.jsonl").open("ab") as file:
        file.write(b'{"seed": 0, "arm": "tic')
    (record.path / "cells" / "seed0-ticket-00.safetensors.123.tmp").write_bytes(b"half")
    imp("--levels", "1", "--seeds", "0", "--arms", "ticket", "--resume")
    assert run_contents(record.path) == before


def test_json_is_one_document(document: Callable[..., dict[str, Any]], small: RunRecord) -> None:
    found = document("show", str(small.path))
    assert found["schema"] == "sparselth.imp/1"
    assert found["run"] == str(small.path)
    assert found["complete"] is True
    assert found["config"]["recipe"]["steps"] == 200
    assert found["points"] == small.points
    keys = {"arm", "seed", "level", "weights_remaining", "early_stop_step", "accuracy_at_early_stop"}
    assert all(keys | {"final_accuracy", "train_seconds"} <= line.keys() for line in found["points"])
    assert {row["level"] for row in found["summary"] if row["arm"] == "ticket"} == {0, 1, 2}


def test_environment_is_recorded(small: RunRecord) -> None:
    facts = json.loads((small.path / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__.split("+")[0] or facts["packages"]["torch"]
    assert facts["cpu"]
    assert facts["dataset"] == "mnist5k"
    assert facts["data_sha256"]


def test_figures_are_drawn(small: RunRecord) -> None:
    names = {"accuracy", "early_stop", "curves", "first_layer", "cost", "pixels", "layers", "differences"}
    found = {file.name for file in (small.path / "figures").iterdir()}
    assert found == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


@pytest.mark.science
def test_tickets_beat_their_controls(imp: Imp) -> None:
    """The claim of the 2019 paper, small: at a fifth of the weights, on 3,500 digits."""
    record = imp("--levels", "7", "--seeds", "0-2", steps=1500)
    at = {(p["arm"], p["level"], p["seed"]): p for p in record.points}
    # 1,000 test images: one seed's accuracy is good to 0.7 pp, so dense is compared in the mean
    gains = [
        at["ticket", 7, seed]["accuracy_at_early_stop"] - at["ticket", 0, seed]["accuracy_at_early_stop"]
        for seed in range(3)
    ]
    assert sum(gains) / 3 > -0.002
    for seed in range(3):
        ticket = at["ticket", 7, seed]
        for arm in ("reinit", "random-mask"):
            assert ticket["accuracy_at_early_stop"] > at[arm, 7, seed]["accuracy_at_early_stop"]
            assert ticket["early_stop_step"] < at[arm, 7, seed]["early_stop_step"]
    remaining = [at["ticket", level, 0]["weights_remaining"] for level in range(8)]
    assert all(a > b for a, b in pairwise(remaining))
