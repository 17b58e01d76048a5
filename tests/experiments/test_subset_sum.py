"""`sparselth subset-sum`: its cells, a small run and what it says, bad input; the bars, on MNIST."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselth import tickets
from sparselth.config import Cell, Recipe, config_from_json
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.errors import UsageError
from sparselth.experiments.base import Place
from sparselth.experiments.run import run
from sparselth.experiments.subset_sum import CASES, CONSTRUCTIONS, SubsetSum
from sparselth.files import load_arrays
from sparselth.models import MODELS, Linear, Model, ReLU
from sparselth.runs import cell_path, read
from sparselth.streams import stream
from sparselth.theory.construct import twice, weights_of

Cli = Callable[..., tuple[int, str, str]]
TINY = Model(
    "tiny-fc", (1, 28, 28), (Linear(3), ReLU(), Linear(10)), {"short": Recipe(steps=60, lr=1e-2)}, "here"
)
SMALL = ["--model", "tiny-fc", "--narrow", "tiny-fc", "--dataset", "mnist5k", "--workers", "1"]
SMALL += [
    "--draws",
    "20",
    "--n",
    "8",
    "--few",
    "6",
    "--wide",
    "8",
    "--size",
    "3",
    "--bits",
    "2",
    "--copies",
    "6",
]
SMALL += ["--epsilon", "0.05"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS.things, TINY.name, TINY)


def test_cells_and_what_they_need() -> None:
    config = SubsetSum()
    assert config_from_json(config.to_json()) == config
    cells = config.cells()
    assert len(cells) == len(set(cells))
    assert {cell.arm for cell in cells} == {*CASES, "target"}
    for cell in cells:
        needs = config.needs(cell)
        assert all(cells.index(need) < cells.index(cell) for need in needs)
        assert len(needs) == (cell.arm in (*CONSTRUCTIONS, "density"))
        assert config.work(cell) > 0
    alone = SubsetSum(cases=("fixed-size",), seeds=(0, 1))
    assert {cell.arm for cell in alone.cells()} == {"fixed-size"}
    assert not alone.reads
    assert alone.digest == SubsetSum(cases=("covering",)).digest  # a run goes on with more cases
    assert alone.digest != SubsetSum(draws=20).digest
    fixed = [config.fixed[cell.level] for cell in cells if cell.arm == "fixed-size"]
    assert len({*fixed}) == 60


def test_a_small_run(
    tmp_path: Path,
    cli: Cli,
    document: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    run_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("subset-sum", *SMALL, "--dry-run")
    assert (code, out) == (0, "")
    assert "\nprice    about" in err
    plan = document("subset-sum", *SMALL, "--dry-run")
    assert plan["schema"] == "sparselth.subset-sum-plan/1"
    assert plan["seconds"] > 0
    assert not [*tmp_path.iterdir()]

    code, out, err = cli("subset-sum", *SMALL, "--out", "run")
    assert code == 0, err
    assert f"[{plan['cells']}/{plan['cells']}] seed 0 " in err
    for word in ("fixed-size", "covering", "quantised", "redraws", "density", "one-more", "tiny-fc", "√k"):
        assert word in out, word
    assert cli("show", "run")[1] in out
    figures = {file.name for file in Path("run", "figures").glob("*.png")}
    assert figures == {
        *(
            "from_one_to_half.png",
            "fixed_size.png",
            "covering.png",
            "redraws.png",
            "density.png",
            "errors.png",
        )
    }

    shown = document("show", "run")
    assert shown["schema"] == "sparselth.subset-sum/1"
    points = shown["points"]
    assert len(points) == plan["cells"]
    wanted = {"theorem", "n", "k", "epsilon", "covered", "weights_used", "max_error"}
    assert all(wanted <= one.keys() for one in points)
    theorems = {"malach", "natale", "lueker", "quantised", "iterand", "pensia", "burkholz", "target"}
    assert {one["theorem"] for one in points} == theorems
    for one in points:
        if one["arm"] in CONSTRUCTIONS:
            assert 0 < one["within_epsilon"] <= 1
            assert 0 < one["weights_used"] <= one["source_weights"]
            assert 0 <= one["accuracy"] <= 1
            assert sum(one["histogram"]) == one["target_weights"]
    assert len(shown["summary"]) == len(points)

    # a cell that is lost is computed again, to the same bits
    before = run_contents(Path("run"))
    for name in ("twice", "fixed-size", "target"):
        Path("run", "cells", f"seed0-{name}-00.safetensors").unlink()
    assert cli("subset-sum", "--resume", "--out", "run", "--quiet")[0] == 0
    assert run_contents(Path("run")) == before
    rebuilt(Path("run"))
    config = read(Path("run")).config
    data = Resident(load("mnist5k", Path()), "cpu", 500)
    for stop in (lambda: True, Late(5)):  # at once, and while the pruned network runs
        place = Place(Path("run"), data, {}, should_stop=stop)
        assert config.compute([Cell(0, "twice", 0)], place) is None
    assert run_contents(Path("run")) == before


class Late:
    """True from the call of that number on."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def rebuilt(path: Path) -> None:
    """The network of `twice` from its stream and the masks of its file, on the test images."""
    record = read(path)
    config, cell = record.config, Cell(0, "twice", 0)
    (need,) = config.needs(cell)
    (line,) = [one for one in record.points if one["arm"] == "twice"]
    flat = torch.from_numpy(tickets.read(cell_path(path, need), TINY.params)[0].weights)

    def draw(purpose: str) -> torch.Generator:
        return stream(0, "subset-sum/twice", 0, purpose)

    pruned = twice(weights_of(TINY, flat), config.n, draw)
    assert pruned is not None
    arrays, _ = load_arrays(cell_path(path, cell))
    for i, layer in enumerate(pruned.layers):
        bits = torch.from_numpy(arrays[f"mask/{i}"])
        mask = (bits[:, :, None] >> torch.arange(8) & 1).flatten(1)[:, : layer.weight.shape[1]].bool()
        assert torch.equal(mask, layer.keep)
    images = load("mnist5k", Path())
    mean, std = images.spec.mean[0], images.spec.std[0]
    x = (torch.from_numpy(images.test_images).flatten(1).float() / 255 - mean) / std
    with torch.no_grad():
        found = pruned.module()(x).argmax(1)
    right = float((found == torch.from_numpy(images.test_labels)).double().mean())
    assert right == pytest.approx(line["accuracy"], abs=2.5 / len(x))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--epsilon", "0"], "--epsilon 0: expected a number above 0, at most 0.05"),
        (["--epsilon", "nan"], "--epsilon nan: expected a"),
        (["--epsilon", "0.2"], "--epsilon 0.2: expected a number above 0"),
        (["--epsilon", "1e-9"], "--epsilon 1e-09: takes about"),
        (["--n", "0"], "--n 0: expected 2 or more"),
        (["--n", "90"], "--n 90: takes about"),
        (["--wide", "300", "--size", "20"], "--wide 300: takes about"),
        (["--copies", "90"], "--copies 90: takes about"),
        (["--size", "27"], "--size 27: expected at most the 26 candidates of --wide"),
        (["--draws", "3"], "--draws 3: expected 10 or more"),
        (["--bits", "0"], "--bits 0: expected 1 or more"),
        (["--cases", "fixed"], "unknown cases 'fixed': did you mean 'fixed-size'?"),
        (["--cases", ""], "--cases : expected one at least"),
        (["--model", "lenet5"], "--model lenet5: expected fully connected layers"),
        (["--narrow", "conv2"], "--narrow conv2: expected fully connected layers"),
        (["--dataset", "cifar10"], "--dataset cifar10: expected images that --model fc-500 takes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_anything_runs(
    words: list[str], says: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("subset-sum", *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert says in err
    assert not [*tmp_path.iterdir()]


def test_a_number_that_no_machine_has_memory_for_is_told_by_the_library() -> None:
    with pytest.raises(UsageError, match="`n` 120: takes about"):
        SubsetSum(n=120).check()
    SubsetSum(n=120, cases=("fixed-size",)).check()  # which does not use it


@pytest.mark.science
def test_the_least_n_is_that_of_the_first_moment(tmp_path: Path) -> None:
    """Within two of C(n, k) 2 epsilon f_k(z) = 1 for k from 3 to 10, within 40 % for 1 and 2."""
    record = run(SubsetSum(cases=("fixed-size",)), out=tmp_path / "run", workers=1)
    assert len(record.points) == 60
    for one in record.points:
        if one["epsilon"] < 0.009:
            continue
        k, n, law = one["k"], one["n"], one["first_moment"]
        assert abs(n - law) <= (2 if k > 2 else 0.4 * law), one


@pytest.mark.science
def test_a_trained_network_inside_a_random_one(tmp_path: Path) -> None:
    """784-500-10 of 20 candidates a weight: all within epsilon but a few; drawn again, all of them."""
    config = SubsetSum(cases=("twice", "redrawn"), dataset="mnist5k")
    record = run(config, out=tmp_path / "run", workers=1)
    found = {one["arm"]: one for one in record.points}
    assert found["twice"]["target_weights"] == 397_510
    assert found["twice"]["within_epsilon"] > 1 - 30 / 397_510
    assert found["redrawn"]["within_epsilon"] == 1
    assert found["redrawn"]["max_error"] <= config.epsilon
    for one in (found["twice"], found["redrawn"]):
        assert abs(one["accuracy"] - one["target_accuracy"]) <= 0.002  # one or two of 1,000 images
