"""The user's own data by FILE.py:FUNCTION: every form it may have, runs on it, and what is refused."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselth import user_files
from sparselth.data import get_dataset, load, look, own, resolve
from sparselth.data.batches import Batches, Resident
from sparselth.data.sets import check_model
from sparselth.errors import SparselthError, UsageError
from sparselth.measure.usual import Pictures
from sparselth.models import get_model

HEAD = """
import numpy as np, torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset
draw = np.random.default_rng(0)
images = draw.integers(256, size=(60, 3, 8, 8), dtype=np.uint8)
floats = draw.normal(size=(60, 5)).astype(np.float32)
tokens = draw.integers(99, size=(60, 7))
y = np.arange(60) % 4
def split(x, y): return x[:48], y[:48], x[48:], y[48:]
def pairs(x, y): return (x[:48], y[:48]), (x[48:], y[48:])
class Stream(IterableDataset):
    def __iter__(self): return iter([])
class Large(Dataset):
    def __len__(self): return 10 ** 12
    def __getitem__(self, i): return images[0], 0
class Own(Dataset):
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], str]:
    """`mine("split(images, y)")`: the name of a function that gives this."""

    def make(given: str) -> str:
        file = tmp_path / "my_data.py"
        for number in range(99):
            file = tmp_path / f"my_data{number}.py"
            if not file.exists():
                break
        file.write_text(f"{HEAD}\ndef load():\n    return {given}\n")
        return f"{file}:load"

    return make


FORMS = [
    ("split(images, y)", (3, 8, 8), np.uint8, 4),
    ("pairs(images, y)", (3, 8, 8), np.uint8, 4),
    ("split(torch.from_numpy(images), torch.from_numpy(y))", (3, 8, 8), np.uint8, 4),
    ("split(floats, y.astype(np.int32))", (5,), np.float32, 4),
    ("split(floats.astype(np.float64), list(y))", (5,), np.float32, 4),
    ("split(torch.from_numpy(floats).bfloat16(), y[:, None])", (5,), np.float32, 4),
    ("split(images > 127, y > 1)", (3, 8, 8), np.float32, 2),
    ("split(tokens, y)", (7,), np.int64, 4),
    ("split(tokens, np.roll(tokens, -1, 1))", (7,), np.int64, None),
    ("split(floats, floats[:, 0])", (5,), np.float32, None),
    ("split(floats, floats[:, :2])", (5,), np.float32, None),
    ("(Own(images[:48], y[:48]), Own(images[48:], y[48:]))", (3, 8, 8), np.uint8, 4),
    ("[TensorDataset(*map(torch.tensor, part)) for part in pairs(floats, y)]", (5,), np.float32, 4),
]


@pytest.mark.parametrize(("given", "shape", "kind", "classes"), FORMS)
def test_every_form_is_read(
    given: str, shape: tuple[int, ...], kind: type, classes: int | None, mine: Callable[[str], str]
) -> None:
    name = mine(given)
    spec, images = get_dataset(name), load(name, Path())
    assert (spec.shape, spec.classes, spec.n_train, spec.n_test) == (shape, classes, 48, 12)
    assert (spec.mean, spec.std, spec.tokens) == ((0.0,), (1.0,), kind is np.int64)
    assert images.train_images.dtype == images.test_images.dtype == kind
    assert images is load(name, Path())
    assert images is look(name, None)
    assert images is resolve(name, None, print)
    known: dict[str, Any] = {}
    exec(HEAD, known)
    whole = known["images"] if shape == (3, 8, 8) else known["floats"] if shape == (5,) else known["tokens"]
    if ">" in given:
        whole = whole > 127
    both = np.concatenate([images.train_images, images.test_images]).reshape(60, *shape)
    np.testing.assert_allclose(both, whole, rtol=4e-3 if "bfloat16" in given else 0)
    data = Resident(images, "cpu", 5)
    x, _ = data.test_first()[0]
    scale = 255 if kind is np.uint8 else 1
    expected = torch.from_numpy(both[48:53] / scale).double()
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)
    if kind is np.float32:
        assert np.array_equal(x.numpy(), both[48:53])  # nothing is scaled


def test_torchvision_sets_of_pictures_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pictures.py"
    file.write_text("""
import numpy as np
from torchvision.datasets import FakeData
asked = []
class Told(FakeData):
    def __getitem__(self, i):
        asked.append(i)
        return super().__getitem__(i)
def load():
    return Told(20, (3, 6, 5), 3), Told(5, (3, 6, 5), 3, random_offset=20)
""")
    monkeypatch.setattr(own, "TELLS", -1.0)
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(own, "progress", lambda *words: told.append(words))
    name = f"{file}:load"
    images = load(name, Path())

    module = user_files.module("dataset", name)
    picture, label = module.FakeData(20, (3, 6, 5), 3)[7]
    assert np.array_equal(images.train_images[7].reshape(3, 6, 5), np.asarray(picture).transpose(2, 0, 1))
    assert images.train_labels[7] == label
    twice = [i for i in range(8) for _ in range(2)]  # whether they stay as they are
    assert module.asked == [0, *twice, *range(8, 20), 0, *twice[:10]]
    load(name, Path())
    assert len(module.asked) == 29 + 11
    assert told[3] == (name, 3, 20)
    assert len(told) == 20 + 5


REFUSED = [
    ("images", "gives a ndarray; expected (train_x, train_y, test_x, test_y)"),
    ("None", "gives a NoneType; expected"),
    ("(images, y, images)", "gives a tuple of 3; expected"),
    ("{'train': images}", "gives a dict; expected"),
    ("split(images, y)[:3] + (y,)", "test x has 12 samples, test y 60; expected as many"),
    ("split(images, y - 1)", "training y has the label -1; expected labels from 0 on"),
    ("split(images, y + 1)", "has labels from 1 to 4; expected them from 0 on"),
    ("split(images, y * 10 ** 6)", "has a label 3000000 and 48 training samples"),
    ("split(images, y.astype(str))", "training y is <U21 [48]; expected numbers"),
    ("split(images, [None] * 60)", "training y is object [48]; expected numbers"),
    ("split(np.where(floats > 2, np.nan, floats), y)", "numbers that are not finite, the first in sample"),
    ("split(floats * np.float32(1e38) * 1e9, y)", "numbers that are not finite, the first in sample 0"),
    ("split(floats, np.where(y > 2, np.inf, y))", "training y has 12 numbers that are not finite"),
    ("(images, y, images[:0], y[:0])", "has no test samples"),
    ("(images[:0], y[:0], images, y)", "has no training samples"),
    ("(images[:7], y[:7], images, y)", "has 7 training samples; expected 8 at least"),
    ("(images, y, images[:, :1], y)", "are uint8 [3, 8, 8], those of the test uint8 [1, 8, 8]"),
    ("(images, y, images / 255, y)", "[3, 8, 8], those of the test float32 [3, 8, 8]; expected the same"),
    ("(tokens, tokens, tokens, y)", "training labels are int64 [60, 7], those of the test int64 [60]"),
    ("split(y, y)", "training x is int64 [48]; expected [N, C, H, W]"),
    ("split(images.astype(int), y)", "training x is int64 [48, 3, 8, 8]; expected floats or bytes (uint8)"),
    ("split(tokens - 5, y)", "; expected tokens from 0 on, or floats"),
    ("split([floats[0], images[0]] * 30, y)", "training x is a list (ValueError"),
    ("split(floats, 3)", "'int' object is not subscriptable"),
    ("(floats, 3, floats, 3)", "training x has 60 samples, training y one; expected as many"),
    ("(Own([], []), Own([], []))", "gives an empty Dataset"),
    ("(Stream(), Stream())", "gives a Dataset without a length"),
    ("(Own(images[:9], y[:2]), Own(images, y))", "sample 2: IndexError: index 2 is out of bounds"),
    ("([*images], [*y])", "sample 0 of its Dataset is a ndarray; expected (x, y)"),
    ("(Own([images[0], images[0][:2]], y), Own(images, y))", "1 is uint8 [2, 8, 8], sample 0 is uint8"),
    ("(Large(), Large())", "its 1,000,000,000,000 samples take 192,000 GB in memory, there are"),
    ("(Own([images[0], floats[0]], y), Own(images, y))", "sample 1 is float32 [5], sample 0 is uint8"),
    ("(Own([images[0], images[0] / 2], y), Own(images, y))", "sample 1 is float64 [3, 8, 8], sample 0"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_is_no_data_set_is_said_in_a_line(given: str, said: str, mine: Callable[[str], str]) -> None:
    name = mine(given)
    with pytest.raises(SparselthError) as found:
        get_dataset(name)
    assert str(found.value).startswith(f"`dataset` {name}: ")
    assert said in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "moves", ["self.x[i] + draw.normal(size=(3, 8, 8))", "self.x[i][:, :, :: draw.choice([1, -1])]"]
)
def test_random_transforms_are_not_frozen_in_silence(moves: str, mine: Callable[[str], str]) -> None:
    name = mine("(Noisy(images, y), Noisy(images, y))")
    file = Path(name.rpartition(":")[0])
    noisy = f"class Noisy(Own):\n    def __getitem__(self, i):\n        return {moves}, self.y[i]\n"
    file.write_text(f"{file.read_text()}\n{noisy}")
    with pytest.raises(UsageError, match=r"gives another sample \d each time; leave out random transforms"):
        get_dataset(name)


def test_models_read_what_has_as_many_numbers(mine: Callable[[str], str]) -> None:
    lenet, conv = get_model("lenet-300-100"), get_model("lenet5")
    resized = "split(np.resize(images, {}), y)"
    for shape in ("(60, 1, 28, 28)", "(60, 28, 28)", "(60, 784)"):
        spec = get_dataset(mine(resized.format(shape)))
        check_model(spec, lenet)
        if shape == "(60, 784)":
            with pytest.raises(UsageError, match=r"takes images of 1 x 28 x 28, .* has samples of 784"):
                check_model(spec, conv)
        else:
            check_model(spec, conv)
    for given, said in (
        ("split(np.resize(images, (60, 28, 28, 1)), y)", "as 28 x 28 x 1; put channels first, as x.trans"),
        ("split(np.resize(tokens, (60, 784)), y)", "has tokens of 784"),
        ("split(np.resize(floats, (60, 784)), floats)", "are no classes; expected a whole number a sample"),
        ("split(np.resize(floats, (60, 784)), y * 3 + 2 - 2 * (y == 0))", "10 classes apart, .* has 12"),
    ):
        with pytest.raises(UsageError, match=said):
            check_model(get_dataset(mine(given)), lenet if "28, 1" not in given else conv)


DIGITS = """
from pathlib import Path
from sparselth.data import load as read

def load():
    digits = read("mnist5k", Path())
    train, test = ({x}(images){after} for images in (digits.train_images, digits.test_images))
    return train, digits.train_labels, test, digits.test_labels
"""


@pytest.mark.parametrize(("x", "after"), [("", ""), ("", " / 255"), ("lambda x: x.reshape(-1, 28, 28)", "")])
def test_a_run_on_it_resumes_to_the_same_bits_and_knows_another_text(
    x: str,
    after: str,
    cli: Callable[..., tuple[int, str, str]],
    document: Callable[..., dict[str, Any]],
    run_contents: Callable[[Path], dict[str, bytes]],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("digits.py")
    file.write_text(DIGITS.format(x=f"({x})" if x else "", after=after))
    words = (
        "imp",
        "--model",
        "lenet-300-100",
        "--dataset",
        "digits.py:load",
        "--levels",
        "1",
        "--seeds",
        "0",
    )
    words += ("--arms", "ticket,random-mask", "--steps", "150", "--workers", "1", "--rate", "0.5")
    found = document(*words)
    assert found["config"]["dataset"] == "digits.py:load"
    (code,) = found["config"]["code"]
    assert code.startswith("digits.py:load ")
    run = Path(found["run"])
    assert run.name.startswith("lenet-300-100-digits-")
    assert all(point["final_accuracy"] > 0.6 for point in found["points"])
    assert len(found["points"]) == 3
    whole = run_contents(run)
    (run / "cells" / "seed0-random-mask-01.safetensors").unlink()
    code, _, said = cli(*words, "--out", str(run), "--resume", "--quiet")
    assert (code, said) == (0, f"note: {run}: {said.partition(': ')[2].partition(': ')[2]}" if said else "")
    assert run_contents(run) == whole
    file.write_text(file.read_text() + "# another text\n")
    code, _, said = cli(*words, "--out", str(run), "--resume")
    assert code == 1
    assert "holds a run with another code" in said
    assert "digits.py:load" in said
    file.unlink()
    shown = subprocess.run(
        [sys.executable, "-m", "sparselth", "show", str(run)], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "random-mask" in shown.stdout
    code, _, said = cli(*words, "--out", str(run), "--resume")
    assert code == 2
    assert said.splitlines()[-1].startswith("sparselth: --dataset digits.py:load: digits.py cannot be read")


def test_the_file_of_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """docs/extending.md: Kuzushiji-MNIST, for which the digits inside the package stand here."""
    from torchvision import datasets

    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (text,) = re.findall(r"```python\n# my_data.py: .*?\n(.*?)```", page, re.DOTALL)
    digits = load("mnist5k", Path())
    parts = {
        True: (digits.train_images, digits.train_labels),
        False: (digits.test_images, digits.test_labels),
    }

    class Stands:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            pixels, labels = parts[train]
            self.data, self.targets = torch.from_numpy(pixels).view(-1, 28, 28), torch.from_numpy(labels)

    monkeypatch.setattr(datasets, "KMNIST", Stands)
    (tmp_path / "my_data.py").write_text(text)
    images = load(f"{tmp_path / 'my_data.py'}:load", Path())
    assert images.spec.shape == (1, 28, 28)
    assert np.array_equal(images.test_images, digits.test_images)
    check_model(images.spec, get_model("lenet-300-100"))


def test_a_killed_run_goes_on_to_the_same_bits(
    cli: Callable[..., tuple[int, str, str]],
    run_contents: Callable[[Path], dict[str, bytes]],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL behind the first cell, images moved."""
    monkeypatch.chdir(tmp_path)
    Path("digits.py").write_text(DIGITS.format(x="(lambda x: x.reshape(-1, 1, 28, 28))", after=""))
    words = ["imp", "--model", "lenet-300-100", "--dataset", "digits.py:load", "--levels", "2"]
    words += ["--seeds", "0", "--augment", "crop-flip", "--steps", "200", "--workers", "1"]
    words += ["--quiet", "--resume", "--out"]
    killed, whole, lines = Path("killed"), Path("whole"), Path("killed") / "cells.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "sparselth", *words, "killed"], env=environment)
    until = time.monotonic() + 120
    while not (lines.exists() and lines.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(lines.read_text().splitlines()) < 7
    for out in (killed, whole):
        code, _, said = cli(*words, str(out))
        assert code == 0, said
    assert run_contents(killed) == run_contents(whole)


@pytest.mark.parametrize("given", ["images", "images[:, :2]", "images[:, 0]", "floats", "images / 255"])
def test_the_usual_loop_sees_the_same_numbers(given: str, mine: Callable[[str], str]) -> None:
    images = load(mine(f"split({given}, y)"), Path())
    pictures = Pictures(images, images.test_images, images.test_labels)
    (x, y), *_ = Resident(images, "cpu", 12).test_first()
    for i in range(12):
        torch.testing.assert_close(pictures[i][0].flatten(), x[i].flatten(), rtol=1e-6, atol=1e-6)
        assert pictures[i][1] == y[i]
    if x.dim() == 4:
        moved = Pictures(images, images.test_images, images.test_labels, "crop-flip")
        assert any((moved[i][0].flatten() != x[i].flatten()).any() for i in range(12))


NET = """
from torch import nn
from torch.nn.functional import cross_entropy

class Guess(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(99, 16), nn.Linear(16, 32), nn.Linear(32, 99)
    def forward(self, x):
        print("forward")
        return self.out(self.mix(self.embed(x)).relu())

print("net")

def make():
    print("make")
    return Guess()

def loss(output, target):
    return cross_entropy(output.flatten(0, 1), target.flatten())

def accuracy(output, target):
    return (output.argmax(2) == target).double().mean()
"""


def test_tokens_and_targets_train_a_network_of_ones_own(
    mine: Callable[[str], str], document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Every token is to say its successor: what the network learns shows that x and y arrived as they are.

    What the files print is no part of the JSON document.
    """
    name, net = mine("print('load') or split(tokens, (tokens + 1) % 99)"), tmp_path / "my_net.py"
    net.write_text(NET)
    words = ("imp", "--model", f"{net}:make", "--dataset", name, "--levels", "1", "--seeds", "0")
    words += ("--arms", "ticket", "--steps", "200", "--lr", "0.02", "--batch-size", "20", "--workers", "1")
    found = document(*words, "--out", str(tmp_path / "run"))
    assert len(found["config"]["code"]) == 2
    assert [point["final_accuracy"] > 0.8 for point in found["points"]] == [True, True]  # chance is 0.01


def test_scores_over_frozen_weights_on_it(
    mine: Callable[[str], str], document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    name = mine("split(np.resize(images, (60, 784)), y)")
    words = ("strong", "edge-popup", "--model", "lenet-300-100", "--dataset", name, "--seeds", "0")
    found = document(
        *words,
        *["--arms", "ticket", "--steps", "20", "--batch-size", "10", "--workers", "1", "--out"],
        str(tmp_path / "r"),
    )
    assert len(found["points"]) == 1


def test_a_worker_that_is_spawned_does_not_read_again(mine: Callable[[str], str]) -> None:
    name = mine("split(images, y)")
    images = load(name, Path())
    Path(name.rpartition(":")[0]).unlink()
    own._loaded.clear()
    user_files._modules.clear()
    with pytest.raises(UsageError, match="cannot be read"):
        load(name, Path())
    own.remember(pickle.loads(pickle.dumps(images)))
    assert np.array_equal(load(name, Path()).train_images, images.train_images)


def test_its_batches_are_the_users(mine: Callable[[str], str]) -> None:
    from sparselth.config import Cell

    data = Resident(load(mine("split(tokens, np.roll(tokens, -1, 1))"), Path()), "cpu", 5)
    x, y = Batches(data, [Cell(0, "ticket", 0)], 6).first(2)
    assert torch.equal(x.roll(-1, 2), y)
