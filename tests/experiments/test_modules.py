"""Runs of networks in a user's file, on data of a user's: as any other run; or refused in a line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparselth import strong_tickets, tickets, user_files
from sparselth.begun import read_environment, recalled
from sparselth.data import get_dataset, load
from sparselth.engine.side_by_side import DRAWS
from sparselth.errors import UsageError
from sparselth.experiments.imp import ImpConfig
from sparselth.files import sealed
from sparselth.models import get_model
from sparselth.runs import read

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "any-network.md").read_text()
EXTENDING = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
SALIENCY = re.findall(r"```python\n# saliency.py\n(.*?)```", EXTENDING, re.DOTALL)[0]
NET = re.findall(r"```python\n# my_net.py\n(.*?)```", PAGE, re.DOTALL)[0]
WORDS = '''
"""The next letter of a few words, by attention; input and output share their weights."""
import numpy as np
import torch
from torch import nn

TEXT = "the quick brown fox jumps over the lazy dog and away from it all the way home " * 9

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Embedding(27, 8), nn.Parameter(torch.randn(6, 8) / 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 27, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("hidden", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, x):
        return self.head(self.body(self.embed(x) + self.places, mask=self.hidden, is_causal=True))

def make():
    return Words()

def load():
    codes = np.array([max(0, ord(c) - 96) for c in TEXT])
    x, y = (np.stack([codes[i + k : i + k + 6] for i in range(0, 600, 2)]) for k in (0, 1))
    return x[:200], y[:200], x[200:], y[200:]
'''
LINE = '''
"""A line through points, with a loss of its own."""
import numpy as np
from torch import nn

def make(): return nn.Linear(3, 1)
def loss(output, target): return (output[:, 0] - target).square().mean()
def accuracy(output, target): return ((output[:, 0] - target).abs() < 0.5).float().mean()

def load():
    x = np.random.default_rng(0).normal(size=(150, 3)).astype("float32")
    y = (x @ np.array([1.0, -2.0, 0.5], dtype="float32"))
    return x[:100], y[:100], x[100:], y[100:]

def three():
    x, y, *test = load()
    return x, (y > 0).astype("int64") * 2, test[0], (test[1] > 0).astype("int64") * 2

def two(): return nn.Linear(3, 2)
def flat(): return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))

def houses():
    x, y, *test = load()
    return x, 3e5 + 5e4 * y, test[0], 3e5 + 5e4 * test[1]
'''
TALKS = """
class Talks(nn.Linear):
    def forward(self, x):
        print("forward")
        return super().forward(x)

def make():
    print("make")
    return Talks(3, 1)
"""
TINY = ["--seeds", "0", "--steps", "20", "--eval-every", "10", "--batch-size", "20", "--quiet"]
Contents = Callable[[Path], dict[str, bytes]]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files = {
        "my_net": NET,
        "words": WORDS,
        "line": LINE,
        "saliency": SALIENCY,
    }
    for name, text in files.items():
        Path(f"{name}.py").write_text(text)
    Path("no_loss.py").write_text(LINE.replace("def loss", "def lost"))
    Path("no_accuracy.py").write_text(LINE.replace("def accuracy", "def rightness"))
    return tmp_path


def test_every_arm_score_scope_and_rewinding_takes_a_module(folder: Path, cli: Cli) -> None:
    words = [
        "imp",
        "--model",
        "my_net.py:make",
        "--dataset",
        "mnist5k",
        *TINY,
        "--levels",
        "2",
        "--rewind",
        "3",
    ]
    words += ["--arms", "ticket,reinit,random-mask,random-reinit", "--scope", "global", "--out", "run"]
    code, out, err = cli(*words, "--score", "saliency", "--plugin", "saliency.py", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert len(said["points"]) == 9
    assert said["config"]["code"][0].startswith("my_net.py:make ")
    dense, last = (tickets.load(Path(f"run/cells/seed0-ticket-0{level}.safetensors")) for level in (0, 2))
    assert last.weights_remaining == pytest.approx(0.64, abs=1e-3)
    net, rewound = last.trained(), last.rewound()
    for name, mask in last.masks.items():
        for one in (net, rewound):
            weight = one.get_parameter(name)
            assert not weight[~mask].any()
            assert weight[mask].any()
    buffers = dict(rewound.named_buffers())
    assert int(buffers["1.num_batches_tracked"]) == 3  # of the rewind step
    assert int(dict(net.named_buffers())["1.num_batches_tracked"]) == 20
    assert not torch.equal(buffers["1.running_mean"], torch.zeros(8))
    assert dense.weights_remaining == 1


@pytest.mark.parametrize(
    ("model", "data"), [("my_net.py:make", "mnist5k"), ("words.py:make", "words.py:load")]
)
def test_a_run_has_the_same_files_whoever_trains_beside(
    model: str, data: str, folder: Path, cli: Cli, run_contents: Contents
) -> None:
    words = ["imp", "--model", model, "--dataset", data, *TINY, "--levels", "1"]
    found = []
    for out, more in (("one", ["--workers", "1"]), ("two", ["--workers", "2", "--replicas", "3"])):
        code, _, err = cli(*words, "--out", out, *more)
        assert code == 0, err
        found.append(run_contents(Path(out)))
    assert found[0] == found[1]
    assert cli(*words, "--arms", "ticket", "--out", "three")[0] == 0
    every = "ticket,reinit,random-mask"
    assert cli(*words, "--arms", every, "--out", "three", "--resume")[0] == 0
    assert run_contents(Path("three")) == found[0]  # what came later, too


def test_replicas_are_side_by_side_where_they_can_and_it_is_said_where_they_cannot(
    folder: Path, cli: Cli, run_contents: Contents
) -> None:
    Path("plain.py").write_text(NET.replace("        nn.Dropout(0.1),\n", ""))
    words = ["imp", "--dataset", "mnist5k", *TINY[:-1], "--levels", "1", "--workers", "1", "--arms", "ticket"]
    words += [
        "--optimizer",
        "sgd",
        "--lr",
        "0.05",
    ]  # Adam makes steps of what is rounding before a batch norm
    words[words.index("--seeds") + 1] = "0,1"
    flags = {"alone": [], "together": ["--replicas", "3"], "strict": ["--replicas", "3", "--deterministic"]}
    for out, more in flags.items():
        code, _, err = cli(*words, "--model", "plain.py:make", "--out", out, "--quiet", *more)
        assert code == 0, err
        assert "one after another" not in err
    alone, together = (read(Path(out)).points for out in ("alone", "together"))
    losses = "validation_loss_at_early_stop"
    for one, other in zip(alone, together, strict=True):
        assert one["kept"] == other["kept"]
        assert one[losses] == pytest.approx(other[losses], rel=1e-3)
        assert one["final_accuracy"] == pytest.approx(other["final_accuracy"], abs=0.003)
    assert [point[losses] for point in alone] != [point[losses] for point in together]
    assert run_contents(Path("alone")) == run_contents(Path("strict"))
    code, _, err = cli(*words, "--model", "my_net.py:make", "--replicas", "3", "--dry-run")
    assert code == 0
    (said,) = [line for line in err.splitlines() if line.startswith("note: networks")]
    assert said == f"note: networks of my_net.py:make train one after another: {DRAWS}"


def test_a_built_in_network_goes_through_autograd_on_request(folder: Path, cli: Cli) -> None:
    for kernels in ("autograd", "auto"):
        words = ["imp", "--model", "lenet-300-100", "--dataset", "mnist5k", *TINY, "--levels", "1"]
        assert cli(*words, "--kernels", kernels, "--out", kernels)[0] == 0
    points = [read(Path(kernels)).points for kernels in ("autograd", "auto")]
    for one, other in zip(*points, strict=True):
        assert one["kept"] == other["kept"]
        assert one["validation_loss_at_early_stop"] == pytest.approx(
            other["validation_loss_at_early_stop"], rel=1e-3
        )


def test_a_loss_and_an_accuracy_of_the_files_own(folder: Path, cli: Cli) -> None:
    words = ["imp", "--model", "line.py:make", "--dataset", "line.py:load", *TINY, "--levels", "1"]
    code, out, err = cli(*words, "--lr", "0.1", "--rate", "0.4", "--out", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["points"][0]["final_accuracy"] > 0.5


def test_a_loss_of_its_own_has_its_own_scale(folder: Path, cli: Cli) -> None:
    """Squares of prices are 1e11 from the first and have not diverged."""
    words = ["imp", "--model", "line.py:make", "--dataset", "line.py:houses", *TINY, "--levels", "1"]
    code, out, err = cli(*words, "--rate", "0.4", "--out", "run", "--json")
    assert code == 0, err
    (dense, *_) = json.loads(out)["points"]
    assert dense["validation_loss_at_early_stop"] > 1e10


@pytest.mark.parametrize(
    ("model", "data"), [("my_net.py:make", "mnist5k"), ("words.py:make", "words.py:load")]
)
def test_all_arms_have_one_mask_by_a_score_whose_forward_draws(
    model: str, data: str, folder: Path, cli: Cli
) -> None:
    text = SALIENCY.replace("net(x)", "net(x).flatten(0, -2)").replace(", y)", ", y.flatten())")
    assert text.count("flatten(") > SALIENCY.count("flatten(") + 1
    name = f"saliency-{data.partition('.')[0]}"  # one of a name in a process
    Path("drawing.py").write_text(text.replace('"saliency"', f'"{name}"'))
    words = ["imp", "--model", model, "--dataset", data, *TINY, "--levels", "1", "--rate", "0.5"]
    words += ["--workers", "1", "--score", name, "--plugin", "drawing.py"]
    code, _, err = cli(*words, "--arms", "ticket,reinit", "--out", "run")
    assert code == 0, err
    ticket, reinit = (
        tickets.load(Path(f"run/cells/seed0-{arm}-01.safetensors")) for arm in ("ticket", "reinit")
    )
    for layer, mask in ticket.masks.items():
        assert torch.equal(mask, reinit.masks[layer]), layer
        if mask.numel() > 100:  # by gradients that are not 0: the lowest places are not all that goes
            gone = (~mask).flatten().nonzero()[:, 0]
            assert gone.max() > len(gone), layer


def test_a_plan_has_a_price_and_figures_are_drawn(folder: Path, cli: Cli, figures: bool) -> None:
    words = ["imp", "--model", "words.py:make", "--dataset", "words.py:load", *TINY, "--levels", "1"]
    code, out, err = cli(*words, "--dry-run", "--json")
    assert code == 0, err
    assert 0 < json.loads(out)["seconds"] < 60
    code, out, err = cli(*words, "--out", "run")
    assert code == 0, err
    drawn = {file.name for file in Path("run/figures").glob("*.png")}
    assert {"accuracy.png", "layers.png"} <= drawn
    assert "pixels.png" not in drawn  # the first weights are of places
    assert "words.py:make on words.py:load" in cli("show", "run")[1]


def test_a_data_set_that_the_networks_file_names_is_of_the_run_as_one_that_is_given(
    folder: Path, cli: Cli
) -> None:
    text = (folder / "line.py").read_text()
    (folder / "own.py").write_text(text + "\ndataset = 'line.py:load'\n")
    words = [
        "imp",
        "--model",
        "own.py:make",
        *TINY,
        "--rate",
        "0.4",
        "--levels",
        "1",
        "--out",
        "run",
        "--quiet",
    ]
    assert cli(*words, "--seeds", "0")[0] == 0
    code, _, err = cli(*words, "--seeds", "0,1", "--resume")
    assert (code, err) == (0, "")
    (folder / "line.py").write_text(text + "# other numbers\n")
    code, _, err = cli(*words, "--seeds", "0,1", "--resume")
    assert code != 0
    assert "holds a run with another code" in err


def test_a_file_that_was_changed_is_another_run(folder: Path, cli: Cli) -> None:
    words = [
        "imp",
        "--model",
        "my_net.py:make",
        "--dataset",
        "mnist5k",
        *TINY,
        "--arms",
        "ticket",
        "--out",
        "run",
    ]
    assert cli(*words, "--levels", "1")[0] == 0
    Path("my_net.py").write_text(NET.replace("0.1", "0.2"))
    code, _, err = cli(*words, "--levels", "2", "--resume")
    assert code == 1
    assert "run: holds a run with another code (" in err
    assert len(err.strip().splitlines()) == 1


def test_a_file_that_was_changed_is_read_again_by_what_begins_then(folder: Path) -> None:
    def config() -> ImpConfig:
        return ImpConfig(model="line.py:make", dataset="line.py:load", seeds=(0,), levels=1, rate=0.4)

    first = config()
    network, images = first.network, load("line.py:load", Path())
    assert (network.params.prunable, len(images.train_images)) == (3, 100)
    Path("line.py").write_text(LINE.replace("[:100]", "[:120]").replace("nn.Linear(3, 1)", "nn.Linear(3, 4)"))
    assert first.network is network  # it has begun
    second = config()
    assert second.code != first.code
    assert (second.network.params.prunable, load("line.py:load", Path()).spec.n_train) == (12, 120)
    assert config().network is second.network


def test_strong_tickets_of_a_module(folder: Path, cli: Cli, run_contents: Contents) -> None:
    words = ["strong", "edge-popup", "--model", "my_net.py:make", "--dataset", "mnist5k", *TINY]
    words += ["--workers", "1", "--keep", "0.5"]
    code, out, err = cli(*words, "--out", "run", "--json")
    assert code == 0, err
    points = {point["arm"]: point for point in json.loads(out)["points"]}
    assert {*points} == {"ticket", "random-mask", "dense", "imp"}
    assert points["ticket"]["weights_remaining"] == pytest.approx(0.5, abs=1e-3)
    assert points["ticket"]["kept"] == points["random-mask"]["kept"]
    file = "run/cells/seed0-ticket-00.safetensors"
    assert Path(file).stat().st_size < points["imp"]["file_bytes"] / 8
    code, out, err = cli("ticket", "verify", file, "--run", "run")
    assert code == 0, err
    net = tickets.load(Path(file)).trained()
    assert int(dict(net.named_buffers())["1.num_batches_tracked"]) == 20
    assert not any(tensor.any() for name, tensor in net.named_parameters() if name.endswith("bias"))
    with pytest.raises(UsageError, match="gives it with its weights"):
        strong_tickets.load(file)
    assert cli(*words, "--arms", "ticket", "--out", "again")[0] == 0
    arms = ["--arms", "ticket,random-mask,dense,imp"]
    assert cli(*words, *arms, "--out", "again", "--replicas", "4", "--resume")[0] == 0
    assert run_contents(Path("again")) == run_contents(Path("run"))
    user_files._modules.clear()
    Path("my_net.py").write_text("raise SystemExit(9)")
    assert "edge-popup" in cli("show", "run")[1]


def test_a_run_is_shown_without_the_code_that_made_its_network(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["imp", "--model", "line.py:two", "--dataset", "no_loss.py:three", *TINY, "--levels", "1"]
    Path("line.py").write_text(
        LINE.replace("def loss", "def lost").replace("nn.Linear(3, 2)", "nn.Linear(3, 3)")
    )
    assert cli(*words, "--rate", "0.4", "--out", "run")[0] == 0
    shown, said = cli("show", "run"), cli("show", "run", "--json")
    assert shown[0] == said[0] == 0
    assert "100.0" in shown[1]
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    for name in ("line", "no_loss"):  # an import would be an error
        (folder / f"{name}.py").write_text("raise SystemExit(9)")
    user_files._modules.clear()
    assert cli("show", "../run")[1] == shown[1]
    assert json.loads(cli("show", "../run", "--json")[1])["points"] == json.loads(said[1])["points"]
    config = read(Path("../run")).config
    with recalled(Path("../run")):
        network = config.network
        assert [(spec.name, spec.shape, spec.output) for spec in network.weights] == [
            ("weight", (3, 3), True)
        ]
        assert (network.classes, network.params.trained_size, network.params.prunable) == (3, 32, 9)
        with pytest.raises(UsageError, match="computes nothing"):
            network.build(0)
    with pytest.raises(UsageError, match="cannot be read"):  # and only within
        _ = config.network
    environment = read_environment(Path("../run"))
    del environment["network"]  # a run of an older version, which has the tickets' shapes
    Path("../run/environment.json").write_text(json.dumps(sealed(environment)))
    assert cli("show", "../run")[1] == shown[1]
    environment["network"] = {"weights": [["weight", [-3], 1]]}
    Path("../run/environment.json").write_text(json.dumps(sealed(environment)))
    code, _, err = cli("show", "../run")
    assert code == 2
    assert "what its run says of it cannot be read" in err
    assert len(err.strip().splitlines()) == 1


def test_what_a_network_prints_is_no_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("talks.py").write_text(LINE.replace("def make(): return nn.Linear(3, 1)", TALKS))
    capsys.readouterr()
    assert get_model("talks.py:make").on(get_dataset("line.py:load")).params.prunable == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert {"make", "forward"} <= {*err.split()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("imp --model my_net.py:made --dataset mnist5k", "my_net.py has no function 'made'; it has make"),
        ("imp --model our_net.py:make --dataset mnist5k", "our_net.py cannot be read"),
        ("imp --model torchvision:resnet17 --dataset cifar10", "did you mean 'resnet"),
        (
            "imp --model my_net.py:make --dataset cifar10",
            "cannot read samples of 3 x 32 x 32, as cifar10 has them",
        ),
        ("imp --model words.py:make --dataset mnist5k", "cannot read samples of 1 x 28 x 28"),
        (
            "imp --model no_loss.py:two --dataset no_loss.py:three --levels 1 --rate 0.4",
            "tells 2 classes apart; no_loss.py:three has labels from 0",
        ),
        (
            "imp --model no_loss.py:make --dataset line.py:load --levels 1 --rate 0.4",
            "are no labels; expected `loss(output, target)`",
        ),
        (
            "imp --model no_accuracy.py:flat --dataset no_accuracy.py:three --levels 1 --rate 0.4",
            "or `accuracy(output, target)` in the file of the network",
        ),
        ("imp --model my_net.py:make@0.5 --dataset mnist5k", "no function 'make@0.5'"),
        (
            "strong edge-popup --model my_net.py:make --dataset mnist5k --width 0.5",
            "--width 0.5: expected 1; my_net.py:make is a module of torch's and has one width",
        ),
        ("strong edge-popup --model lenet5 --kernels autograd", "--kernels autograd: expected auto"),
        ("neurons --model my_net.py:make", "takes networks of known layers alone"),
        ("subset-sum --model my_net.py:make", "takes networks of known layers alone"),
    ],
)
def test_what_is_off_is_said_in_a_line(folder: Path, cli: Cli, words: str, said: str) -> None:
    code, out, err = cli(*words.split(), "--quiet")
    lines = [line for line in err.strip().splitlines() if "no CUDA device" not in line]
    assert code == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert out == ""
