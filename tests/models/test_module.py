"""Networks by the names of files and packages: found, shown samples, or refused in a line."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from modules import KINDS, Words, model_of, module_model
from torch import nn

from sparselth.config import Cell, Recipe
from sparselth.data import Images, get_dataset
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.errors import SparselthError, UsageError
from sparselth.models import MODELS, get_model
from sparselth.models.module import ModuleModel
from sparselth.streams import stream
from sparselth.tickets import Content, RunTicket
from sparselth.train import fit

FILE = '''
"""Networks of a user's."""
import torch
from torch import nn
from sparselth.config import Recipe

recipe = Recipe(steps=30, lr=2e-3)

def make():
    """A small one."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))

def wide(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(9), nn.Linear(9, classes))

def convolutions():
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(324, 10))

def views():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Linear(4 * 26 * 26, 10)
        def forward(self, x):
            return self.two(self.one(x).view(len(x), -1))
    return Views()

def nothing(): pass
def number(): return 3
def fails(): raise KeyError("layers")
def relu(): return nn.Sequential(nn.Flatten(), nn.ReLU())
def pair():
    class Pair(nn.Linear):
        def forward(self, x): return super().forward(x.flatten(1)), x
    return Pair(784, 10)
def mean(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Flatten(0))
def colours(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
def doubles(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
def half():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    net.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=torch.float16)))
    return net
wrong = 3
'''
DIGITS = get_dataset("mnist5k")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FILE)
    return tmp_path


def fitted(name: str) -> ModuleModel:
    found = get_model(name).on(DIGITS)
    assert isinstance(found, ModuleModel)
    return found


def test_a_function_of_a_file_is_a_model_with_the_files_recipe(folder: Path) -> None:
    name = f"{folder}/net.py:make"
    model = fitted(name)
    assert name in MODELS
    assert model is fitted(name)
    assert model.recipes == {"short": Recipe(steps=30, lr=2e-3)}
    assert (model.name, model.source, model.input, model.classes) == (name, "A small one.", (1, 28, 28), 10)
    assert [spec.name for spec in model.weights] == ["1.weight", "4.weight"]
    assert [spec.output for spec in model.weights] == [False, True]
    assert model.params.prunable == 784 * 12 + 120
    assert model.shapes[0] == (1, 28, 28)
    assert model.shapes[-1] == (10,)
    assert not model.convolves


def test_classes_are_those_of_the_data_and_lazy_layers_are_shown_samples(folder: Path) -> None:
    model = get_model("net.py:wide").on(replace(DIGITS, name="three", classes=3))
    assert [spec.shape for spec in model.params.weights] == [(9, 784), (3, 9)]


def test_initial_weights_are_those_of_the_seeds_stream(folder: Path) -> None:
    model, draw = fitted("net.py:convolutions"), stream(3, "ticket", 0, "init")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    weights = init_weights(model, draw)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(draw.initial_seed())
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(324, 10))
    assert torch.equal(model.params.gather(net)[0], weights)
    assert torch.equal(model.params.gather(model.build(3))[0], weights)
    assert not torch.equal(init_weights(model, stream(3, "reinit", 1, "init")), weights)


def test_a_network_that_views_its_images_does_not_get_them_channels_last(folder: Path) -> None:
    colours = replace(DIGITS, name="colours", shape=(3, 28, 28))
    for name, takes in (("colours", True), ("views", False)):
        model = get_model(f"net.py:{name}").on(colours)
        assert isinstance(model, ModuleModel)
        assert model.seen.channels_last is takes


def test_the_output_is_the_last_weight_that_is_reached() -> None:
    assert [spec.name for spec in model_of(KINDS["words"]).weights if spec.output] == ["embed.weight"]  # tied
    assert [spec.name for spec in model_of(KINDS["convolutions"]).weights if spec.output] == ["head.weight"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("net.py:nothing", "gives nothing; expected a torch.nn.Module"),
        ("net.py:number", "gives a int; expected a torch.nn.Module"),
        ("net.py:fails", "KeyError: 'layers'"),
        ("net.py:relu", "has no prunable weights"),
        ("net.py:pair", "gives a tuple for 2 samples; expected one tensor"),
        ("net.py:mean", r"gives shape \[20\] for 2 samples; expected one tensor"),
        ("net.py:colours", "cannot read samples of 1 x 28 x 28, as mnist5k has them: RuntimeError"),
        ("net.py:doubles", "cannot read samples of 1 x 28 x 28"),
        ("net.py:half", r"scale is torch.float16; expected torch.float32"),
        ("net.py:absent", "no function 'absent'"),
        ("net.py:wrong", "no function 'wrong'"),
        ("absent.py:make", "absent.py cannot be read"),
        ("torchvision:resnet19", "did you mean 'resnet18'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(folder: Path, name: str, said: str) -> None:
    with pytest.raises(SparselthError, match=said) as caught:
        _ = fitted(name).seen
    assert "\n" not in str(caught.value)
    if "no function" not in said and "cannot be read" not in said:
        assert name.rpartition(":")[2] in str(caught.value)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="timm is not installed; `pip install timm`"):
        get_model("timm:some_net")


def test_torchvisions_classifiers_have_the_classes_of_the_data() -> None:
    model = get_model("torchvision:resnet18").on(get_dataset("cifar10"))
    assert model.params.prunable == 11_166_912 + 5120  # convolutions and fc, from torchvision's table
    assert model.params.weights[-1].shape == (10, 512)
    assert model.params.weights[-1].output


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("resnet10t", (24, 1, 3, 3)),
        ("vit_tiny_patch16_224", (192, 3, 16, 16)),
        ("mobilenetv3_small_050", None),
    ],
)
def test_timms_networks_read_the_images_of_the_data_and_train(
    name: str, first: tuple[int, ...] | None
) -> None:
    pytest.importorskip("timm", reason="timm is an optional dependency")
    dataset = get_dataset("mnist5k") if first and first[1] == 1 else get_dataset("cifar10")
    model = get_model(f"timm:{name}").on(dataset)
    shapes = [spec.shape for spec in model.params.weights]
    assert first is None or first in shapes
    assert model.params.weights[-1].output
    assert shapes[-1][0] == 10
    again = get_model(f"timm:{name}").on(dataset)
    weights = init_weights(model, stream(0, "ticket", 0, "init"))
    assert torch.equal(init_weights(again, stream(0, "ticket", 0, "init")), weights)
    draw = np.random.default_rng(0)
    x = draw.integers(256, size=(30, prod(dataset.shape)), dtype=np.uint8)
    y = draw.integers(10, size=30)
    data = Resident(Images(dataset, x[:20], y[:20], x[20:], y[20:], "", ""), "cpu", 10)
    recipe = Recipe(steps=2, lr=0.01, batch_size=4, eval_every=2, optimizer="sgd")
    mask = model.params.full_mask()
    mask[::3] = False
    weights[: len(mask)] *= mask
    job = Job(Cell(0, "ticket", 1), State.start(weights[None], recipe), mask)
    fit(model, data, [job], recipe)
    assert job.diverged is None
    assert not job.state.weights[0, : len(mask)][~mask].any()
    assert not torch.equal(job.state.weights[0], weights)
    assert 0 <= job.state.evaluations[-1]["validation_accuracy"] <= 1


def test_timm_names_the_nearest_of_its_networks() -> None:
    pytest.importorskip("timm", reason="timm is an optional dependency")
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        get_model("timm:resnet18z")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array([0, 3]), "tells 3 classes apart; drawn has labels from 0 to 3"),
        (np.array([-1, 2]), "has labels from -1 to 2"),
        (np.array([0.5, 1.0]), "are no labels; expected `loss"),
        (np.zeros((2, 5), dtype=np.int64), r"gives \[3\] for a sample, whose labels in drawn are \[5\]"),
    ],
)
def test_labels_that_the_network_cannot_tell_are_refused_in_a_line(labels: np.ndarray, said: str) -> None:
    model = model_of(KINDS["averages"])
    model.check_labels(np.array([0, 1, 2]))
    with pytest.raises(UsageError, match=said):
        model.check_labels(np.array([0, 1, 2]), labels)


def test_labels_of_tokens_are_one_each() -> None:
    model = model_of(KINDS["words"])
    model.check_labels(np.array([[0, 1, 2, 3, 10]]))
    with pytest.raises(UsageError, match=r"expected \['classes'\]"):
        model.check_labels(np.array([1, 2]))


def test_targets_that_are_no_labels_need_an_accuracy() -> None:
    make, shape = KINDS["averages"].make, KINDS["averages"].shape
    square = module_model(make, shape, loss=lambda a, b: (a[:, 0] - b).square().mean())
    with pytest.raises(UsageError, match="expected `accuracy"):
        square.check_labels(np.array([0.5]))
    square = module_model(make, shape, loss=square.loss, accuracy=lambda a, b: torch.zeros(()))
    square.check_labels(np.array([0.5]))


@pytest.mark.parametrize("what", ["nodes", "producers", "parts", "norms", "is_chain"])
def test_what_needs_known_layers_is_told_that_there_are_none(what: str) -> None:
    with pytest.raises(UsageError, match="is a module of torch's, and this takes networks of known layers"):
        getattr(model_of(KINDS["words"]), what)
    with pytest.raises(UsageError, match="has one width"):
        model_of(KINDS["words"]).widened(0.5)


def test_a_word_model_with_its_own_output() -> None:
    model = module_model(lambda: Words(7), (5,), tokens=True)
    assert [spec.name for spec in model.weights if spec.output] == ["head.weight"]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_ticket_is_the_network_of_its_seed(seed: int, folder: Path) -> None:
    """With what `make` draws and no state holds, too."""
    (folder / "shuffled.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('order', torch.randperm(784), persistent=False)\n"
        "        self.fc = nn.Linear(784, 10)\n\n"
        "    def forward(self, x):\n        return self.fc(x.flatten(1)[:, self.order])\n\n\n"
        "def make():\n    return Net()\n"
    )
    model = fitted("shuffled.py:make")
    net = model.build(seed)
    flat = model.params.gather(net)
    mask = np.ones(model.params.mask_size, bool)
    ticket = RunTicket(
        model, {"cell": f"seed{seed}-ticket-01"}, Content(mask, flat[0].numpy()), None, Path("t")
    )
    x = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(ticket.trained()(x), net.eval()(x))
