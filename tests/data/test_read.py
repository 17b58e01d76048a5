"""Data sets that a function reads or makes, of floats too: MNIST-1D, and a stranger's in one file."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import data, registry
from sparselth.config import Cell, Recipe
from sparselth.data import DATASETS, DatasetSpec, load
from sparselth.data.batches import Batches, Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.errors import SparselthError
from sparselth.files import sealed
from sparselth.kernels._triton import INTERPRET
from sparselth.measure.usual import Pictures
from sparselth.models import MODELS, Linear, Model, ReLU, get_model
from sparselth.runs import RunRecord
from sparselth.streams import stream
from sparselth.train import fit

RINGS = """
import numpy as np
from sparselth.config import Recipe
from sparselth.data import DatasetSpec, register as register_data
from sparselth.models import Linear, Model, ReLU, register

def read(folder):
    draw = np.random.default_rng(0)
    label = draw.integers(0, 3, 600)
    angle, radius = draw.uniform(0, 6.28, 600), 1 + label + draw.normal(0, 0.1, 600)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return x[:480], label[:480], x[480:], label[480:]

register_data(
    DatasetSpec(name="rings", title="Three rings", shape=(1, 1, 2), classes=3, n_train=480, n_test=120,
                std=(1.5,), licence="none", read=read)
)
register(
    Model("rings-mlp", (1, 1, 2), (Linear(32), ReLU(), Linear(32), ReLU(), Linear(3)),
          {"short": Recipe(steps=200, lr=1e-2, batch_size=40)}, "here", classes=3, dataset="rings")
)
"""


@pytest.fixture
def rings(tmp_path: Path) -> Iterator[Path]:
    """The file of a user, and nothing left of it afterwards."""
    file = tmp_path / "rings.py"
    file.write_text(RINGS)
    yield file
    for things in (DATASETS.things, MODELS.things):
        for name in ("rings", "rings-mlp"):
            things.pop(name, None)
    if (name := registry._plugins.pop(file.absolute(), None)) is not None:
        sys.modules.pop(name, None)


def test_one_file_is_trained_listed_resumed_and_shown(
    rings: Path,
    cli: Callable[..., tuple[int, str, str]],
    document: Callable[..., dict[str, Any]],
    run_contents: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    plugin = ("--plugin", str(rings))
    row = next(row for row in document("ls", "datasets", *plugin)["datasets"] if row["name"] == "rings")
    assert (row["train"], row["test"], row["found"], row["source"]) == (480, 120, True, "rings.py")
    run = tmp_path / "run"
    words = ("imp", "--model", "rings-mlp", "--levels", "2", "--seeds", "0", "--arms", "ticket,reinit")
    words += ("--out", str(run), "--workers", "1", "--rate", "0.5", *plugin)
    found = document(*words)
    assert found["config"]["dataset"] == "rings"
    assert [point["final_accuracy"] > 0.9 for point in found["points"]] == [True] * 5
    whole = run_contents(run)
    (run / "cells" / "seed0-reinit-02.safetensors").unlink()
    code, _, said = cli(*words, "--resume")
    assert code == 0, said
    assert run_contents(run) == whole
    (run / "cells" / "seed0-reinit-02.safetensors").unlink()
    environment = json.loads((run / "environment.json").read_text())
    environment["data_sha256"] = "0" * 16  # as if the file had read other numbers then
    (run / "environment.json").write_text(json.dumps(sealed(environment)))
    code, _, said = cli(*words, "--resume")
    assert code == 1
    assert "was begun on other images of that name (rings)" in said


def resident(spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> Resident:
    monkeypatch.setitem(DATASETS.things, spec.name, spec)
    return Resident(load(spec.name, Path()), "cpu", 7)


def made(kind: str = "f") -> DatasetSpec:
    """Two channels of 3 x 2, whose means and deviations differ."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(70, 2, 3, 2)), draw.integers(0, 4, 70)
    x = np.sin(x + y[:, None, None, None]) * [[[[2]], [[5]]]] + [[[[1]], [[-3]]]]
    if kind == "u":
        x = (20 * x + 128).clip(0, 255).astype(np.uint8)
    return DatasetSpec(
        name="made",
        title="Made",
        shape=(2, 3, 2),
        classes=4,
        n_train=60,
        n_test=10,
        licence="none",
        mean=(1.0, -3.0) if kind == "f" else (0.6, 0.3),
        std=(2.0, 5.0) if kind == "f" else (0.1, 0.4),
        read=lambda folder: (x[:60], y[:60], x[60:], y[60:]),
    )


@pytest.mark.parametrize("kind", ["f", "u"])
def test_batches_evaluations_and_pictures_are_scaled_alike(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = made(kind)
    got = resident(spec, monkeypatch)
    images = load("made", Path())
    assert images.train_images.dtype == {"f": np.float32, "u": np.uint8}[kind]
    mean, std = (np.reshape(values, (1, 2, 1)) for values in (spec.mean, spec.std))
    raw = images.train_images.reshape(60, 2, 6).astype(np.float64) / {"f": 1, "u": 255}[kind]
    expected = torch.from_numpy(((raw - mean) / std).reshape(60, 12))
    batches = Batches(got, [Cell(0, "ticket", 0), Cell(1, "ticket", 0)], 9)
    x, y = batches.at(3)
    index = batches.index(3).view(2, 9)
    torch.testing.assert_close(x.mT.double(), expected[index], rtol=1e-5, atol=1e-5)
    assert torch.equal(y[:, 0], torch.from_numpy(images.train_labels)[index])
    seen = torch.cat([x[0].T for x, _ in got.validation(0)])
    torch.testing.assert_close(seen.double(), expected[got.split(0)[1]], rtol=1e-5, atol=1e-5)
    pictures = Pictures(images, images.train_images, images.train_labels)
    if kind == "f":
        torch.testing.assert_close(pictures[5][0].flatten().double(), expected[5], rtol=1e-5, atol=1e-5)


KERNELS = ["auto", "torch", "triton"] if INTERPRET else ["auto", "torch"]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_floats_are_trained_by_every_engine(
    kernels: str, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed too: pixels that no survivor reads are not gathered."""
    got = resident(made(), monkeypatch)
    model = Model("plain", (2, 3, 2), (Linear(8), ReLU(), Linear(4)), {}, "", classes=4)
    recipe = Recipe(steps=4, lr=1e-2, batch_size=5, eval_every=4)
    found = []
    for kind in (kernels, "reference"):
        jobs = []
        for seed in range(replicas):
            mask = model.params.full_mask()
            mask[: 8 * 12].view(8, 12)[:, ::3] = False
            weights = init_weights(model, stream(seed, "ticket", 0, "init"))
            weights[: model.params.mask_size] *= mask
            jobs.append(Job(Cell(seed, "ticket", 1), State.start(weights[None], recipe), mask))
        fit(model, got, jobs, recipe, kernels=kind, break_even={spec.name: 2.0 for spec in model.weights})
        found.append(jobs)
    for ours, right in zip(*found, strict=True):
        assert ours.state.step == 4
        torch.testing.assert_close(ours.state.weights, right.state.weights, rtol=1e-4, atol=1e-5)
        assert ours.state.best_loss == pytest.approx(right.state.best_loss, rel=1e-4)


def test_other_numbers_have_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = made()
    assert spec.read
    x, y, *test = spec.read(Path())
    other = x.astype(np.float32)
    other[-1, -1, -1, -1] += 1
    digests = []
    for first in (x, x, other):
        monkeypatch.setitem(
            DATASETS.things, "made", replace(spec, read=lambda folder, a=first: (a, y, *test))
        )
        digests.append(load("made", Path()).digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("index", "array", "said"),
    [
        (0, np.zeros((59, 12)), r"expected bytes \[60, 2, 3, 2\], got float64 \[59, 12\]"),
        (2, np.zeros((10, 11)), r"expected bytes \[10, 2, 3, 2\], got float64 \[10, 11\]"),
        (0, np.zeros((60, 12), int), "got int64"),
        (0, np.full((60, 12), np.nan), "floats do as well, if all are finite"),
        (1, np.zeros(60), r"expected 60 labels from 0 to 3 for its images, got float64 \[60\]"),
        (1, np.full(60, 4), "from 0 to 3"),
        (3, np.zeros(9, int), "expected 10 labels"),
    ],
)
def test_what_does_not_fit_is_named(
    index: int, array: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = made()
    assert spec.read
    arrays = [*spec.read(Path())]
    arrays[index] = array
    monkeypatch.setitem(DATASETS.things, "made", replace(spec, read=lambda folder: tuple(arrays)))
    with pytest.raises(SparselthError, match=f"dataset made: .*{said}"):
        load("made", Path())


def test_what_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path) -> Any:
        raise ZeroDivisionError("no numbers")

    monkeypatch.setitem(DATASETS.things, "made", replace(made(), read=fails))
    with pytest.raises(SparselthError, match="dataset made: ZeroDivisionError: no numbers"):
        data.resolve("made", None, pytest.fail)


# ---- MNIST-1D


def test_without_its_package_mnist1d_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    code, _, said = cli("imp", "--model", "mnist1d-mlp", "--out", str(tmp_path / "run"))
    assert code == 1
    assert "pip install mnist1d" in said
    code, out, _ = cli("ls", "datasets")
    assert code == 0
    assert "pip install mnist1d" in out
    _, out, _ = cli("doctor")  # a package that nobody needs is no fault of the machine
    (line,) = [line for line in out.splitlines() if line.startswith("mnist1d")]
    assert "ok: " in line
    assert "pip install mnist1d" in line


def test_the_generators_of_others_go_on_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_dataset(args: object) -> dict[str, Any]:
        random.seed(1)
        np.random.seed(1)
        return {"x": np.zeros((4000, 40)), "y": np.zeros(4000, int)} | {
            "x_test": np.zeros((1000, 40)),
            "y_test": np.zeros(1000, int),
        }

    fake = ModuleType("mnist1d.data")
    fake.get_dataset_args, fake.make_dataset = lambda: None, make_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mnist1d", ModuleType("mnist1d"))
    monkeypatch.setitem(sys.modules, "mnist1d.data", fake)
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    assert load("mnist1d", Path()).train_images.shape == (4000, 40)
    assert (random.random(), np.random.random()) == expected


def test_mnist1d_is_the_authors() -> None:
    package = pytest.importorskip("mnist1d.data", reason="pip install mnist1d")
    images = load("mnist1d", Path())
    made = package.make_dataset(package.get_dataset_args())
    np.testing.assert_array_equal(images.train_images, made["x"].astype(np.float32))
    np.testing.assert_array_equal(images.test_labels, made["y_test"])
    every = np.concatenate([images.train_images, images.test_images])
    assert abs(every.mean()) < 1e-3
    assert every.std() == pytest.approx(1, abs=1e-3)
    assert set(np.bincount(np.concatenate([images.train_labels, images.test_labels]))) == {500}


def test_a_ticket_of_mnist1d(imp: Callable[..., RunRecord]) -> None:
    pytest.importorskip("mnist1d.data", reason="pip install mnist1d")
    flags = ("--model", "mnist1d-mlp", "--dataset", "mnist1d", "--levels", "1", "--seeds", "0")
    record = imp(*flags, "--arms", "ticket", "--workers", "1", steps=300)
    assert [point["final_accuracy"] > 0.5 for point in record.points] == [True, True]


def test_the_mlp_is_the_authors() -> None:
    """h = relu(W1 x); h = h + relu(W2 h); W3 h: with layers of 100, 15,000 weights."""
    model = get_model("mnist1d-mlp")
    assert [spec.shape for spec in model.weights] == [(100, 40), (100, 100), (10, 100)]
    from sparselth.engine.dense import Network

    flat = init_weights(model, stream(0, "ticket", 0, "init"))
    w1, w2, w3 = (flat[spec.span].view(spec.shape) for spec in model.weights)
    b1, b2, b3 = (flat[spec.span].normal_(generator=stream(1, "a", 0, spec.name)) for spec in model.biases)
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    h = torch.relu(x @ w1.T + b1)
    h = h + torch.relu(h @ w2.T + b2)
    found = Network(model, flat[None], 7).forward(x.T[None])[0].T
    torch.testing.assert_close(found, h @ w3.T + b3, rtol=1e-4, atol=1e-5)
