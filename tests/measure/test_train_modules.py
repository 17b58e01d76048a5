"""A training step of any network: what is wrong with a kernel or with a gradient is seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.errors import SparselthError
from sparselth.measure import case, train_modules, trainers
from sparselth.measure.layer_gradients import check_layers
from sparselth.measure.nets import Net, random_masks, zero
from sparselth.measure.train_modules import bench_module_training
from sparselth.measure.trainers import TRAINERS, TrainedCsr, Trainee, Trainer
from sparselth.report import layer_words, network_tables
from sparselth.sparse import compress, trainable


class Small(nn.Module):
    """A convolution, a norm, a sum, dropout and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side, self.drop = nn.Conv2d(8, 8, 1), nn.Dropout(0.3)
        self.fc, self.head = nn.Linear(8 * 16, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        found: Tensor = self.head(self.drop(self.fc((y + self.side(y)).flatten(1)).relu()))
        return found


class Nothing(Small):
    def forward(self, x: Tensor) -> Any:
        return [len(x)]


def small(density: float = 0.25) -> Net:
    torch.manual_seed(0)
    module = Small()
    names = ("stem.weight", "side.weight", "fc.weight", "head.weight")
    masks = random_masks({n: tuple(module.get_parameter(n).shape) for n in names}, 1 - density)
    zero(module, masks)
    return Net("small", module.eval(), masks, lambda batch: torch.randn(batch, 3, 4, 4))


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiler, no packages of others, a cache of its own, every layer compressed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trainers, "compiled", lambda net: net)
    monkeypatch.setattr(case, "REST", 0.0)
    real = compress
    monkeypatch.setattr(trainers.sparse, "compress", lambda net, masks, x: real(net, masks, below=1.0))

    def need(*packages: str) -> None:
        raise SparselthError(f"{packages[0]} is not installed ({trainers.EXTRA})")

    monkeypatch.setattr(trainers, "need", need)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(line: str) -> None:
    assert "\n" not in line


def only(result: Any, implementation: str) -> dict[str, Any]:
    (row,) = (row for row in result.rows if row["implementation"] == implementation)
    return row


def test_a_step_with_all_that_is_said_of_it() -> None:
    net = small()
    before = {name: t.clone() for name, t in net.module.state_dict().items()}
    result = bench_module_training(net, 16, quiet)
    json.dumps(result.rows, allow_nan=False)
    assert not result.failed
    names = ["torch", "torch channels-last", "torch compiled", "torch CSR", "sparselth"]
    assert [row["implementation"] for row in result.rows] == names
    assert all(row["max_rel_error"] < 1e-6 for row in result.rows)
    parameters = sum(4 * p.numel() for p in net.module.parameters())
    kept = sum(int(m.sum()) for m in net.masks.values())
    rest = parameters - 4 * sum(m.numel() for m in net.masks.values())
    torchs, ours = only(result, "torch"), only(result, "sparselth")
    assert torchs["gradient_bytes"] == torchs["optimizer_bytes"] == torchs["weight_bytes"] == parameters
    assert ours["gradient_bytes"] == ours["optimizer_bytes"] == 4 * kept + rest
    assert ours["peak_bytes"] > ours["weight_bytes"] > 4 * kept + rest
    assert ours["layer_error"] < 1e-6
    assert {row["dense_best"] for row in result.rows} < {*names[:3]}
    said = " ".join(network_tables.report(result, "here").split())
    assert "one step of training with SGD and momentum, random mask, 25" in said
    assert "4 of 4 layers train as their kept weights." in said
    assert "Dropout is off" in said
    assert (
        "sparseprop is not among the rivals: sparseprop is not installed (pip install sparseprop, with g++)"
        in said
    )
    assert (
        "sparselab is not among the rivals: sparselab is not installed (pip install sparselth[rivals])"
        in said
    )
    assert all(torch.equal(before[name], t) for name, t in net.module.state_dict().items())
    assert net.module.drop.p == 0.3


def test_a_wrong_gradient_of_a_rival_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Trainee):
        def gradients(self) -> dict[str, Tensor]:
            return {name: 1.05 * g for name, g in super().gradients().items()}

    more = Trainer("off", "dense", lambda net, masks, given: Off(net))
    monkeypatch.setattr(trainers, "TRAINERS", (more, *TRAINERS))
    result = bench_module_training(small(), 4, quiet)
    assert [row["implementation"] for row in result.rows if row["check"] == "failed"] == ["off"]
    assert only(result, "off")["max_rel_error"] == pytest.approx(0.05, rel=1e-3)
    assert {row["dense_best"] for row in result.rows} & {"off"} == set()
    assert "gradient off by 5.0e-02 of its norm" in " ".join(network_tables.report(result, "here").split())


@pytest.mark.parametrize("part", ["weight", "input", "output"])
def test_a_kernel_that_is_a_little_wrong_is_seen_in_one_layer(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a hundred thousandth, which the gradient of a network with ties would hide."""
    place = {"weight": "csr_weight_grad", "input": "csr_input_grad", "output": "csr_linear"}[part]
    kernel = getattr(trainable, place)

    def off(*args: Any, **more: Any) -> Any:
        found = kernel(*args, **more)
        out = more.get("out", found)
        out *= 1 + 1e-5
        return found

    net = small()
    fast = compress(net.module, net.masks, below=1.0)
    x, y = torch.randn(8, 3, 4, 4), torch.randint(5, (8,))

    def found() -> dict[str, bool]:
        dense = trainers.copy.deepcopy(net.module).train()
        checks = check_layers(
            fast, dense, net.masks, lambda n: n(x.double()), lambda out: F.cross_entropy(out, y)
        )
        return {name: bool(one.fault) for name, one in checks.items()}

    assert found() == {"stem": False, "side": False, "fc": False, "head": False}
    monkeypatch.setattr(trainable, place, off)
    assert found() == {"stem": False, "side": False, "fc": True, "head": True}


def test_csr_trains_as_a_dense_layer_under_a_mask() -> None:
    torch.manual_seed(0)
    layer, mask = nn.Linear(6, 4), torch.rand(4, 6) < 0.5
    layer.weight.data *= mask
    csr, x = TrainedCsr(layer, mask), torch.randn(2, 3, 6)
    csr(x).square().sum().backward()
    found, bias = csr.values.grad, layer.bias.grad.clone()  # type: ignore[union-attr]
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(found, layer.weight.grad[mask])
    torch.testing.assert_close(bias, layer.bias.grad)


def test_what_stays_dense_in_training_is_said_by_reason() -> None:
    def one(name: str, why: str) -> dict[str, Any]:
        return {"name": name, "compressed": not why, "why": why}

    found = [one("a", ""), *(one(name, "no mask") for name in "bcdef"), one("g", "2 groups")]
    assert layer_words.compressed(found) == [
        "1 of 7 layers train as their kept weights.",
        "  dense: b, c, d and 2 more: no mask",
        "  dense: g: 2 groups",
    ]
    assert layer_words.compressed([]) == []


@pytest.mark.parametrize("package", ["sparseprop", "sparselab"])
def test_layers_of_others_where_they_are_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    monkeypatch.setattr(trainers, "need", lambda *packages: None)
    if package == "sparseprop":
        library = trainers.importlib.import_module("sparseprop.modules")
        own = library.sparsify_if_faster
        monkeypatch.setattr(library, "sparsify_if_faster", lambda m, s: own(m, s, include_dense=False))
    result = bench_module_training(small(), 16, quiet)
    assert only(result, package)["max_rel_error"] < 1e-6


def test_a_filter_without_weights_before_a_norm_is_no_tie() -> None:
    """Its norm gives its bias, 0 before training, give or take rounding, and a ReLU stands behind."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    masks = random_masks({"0.weight": (8, 3, 3, 3), "4.weight": (4, 8 * 36)}, 0.5)
    masks["0.weight"][:4] = False
    zero(module, masks)
    bias = module[1].bias
    net = Net("dead", module.eval(), masks, lambda batch: torch.randn(batch, 3, 8, 8))
    given, loss = net.given(4), net.objective(4)
    dense = train_modules._train(module)
    torch.autograd.backward(loss(dense(*given.tensors)))
    right = train_modules._exact(net, given, loss)
    assert train_modules._error(Trainee(dense), right, masks) > train_modules.GRADIENT_TIES  # a tie
    result = bench_module_training(net, 4, quiet)
    assert not result.failed
    assert all(row["max_rel_error"] < 1e-3 for row in result.rows)
    assert not bias.count_nonzero()  # the caller's network is as it was


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": lambda y, t: (y - 1).sum(1), "target": torch.zeros}, "`loss.output, target.` gives shape"),
        ({"loss": lambda y, t: 1 / 0, "target": torch.zeros}, "a step of training, in float64: ZeroDivision"),
        ({"target": lambda batch: torch.zeros(batch + 1, dtype=torch.int64)}, "match target batch_size"),
        ({"module": Nothing()}, "gives no tensor of outputs"),
    ],
)
def test_a_loss_or_a_network_that_is_wrong_is_a_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SparselthError, match=says) as found:
        bench_module_training(replace(small(), **change), 4, quiet)
    assert "\n" not in str(found.value)


class StochasticDepth(nn.Module):
    """As torchvision's, by name and by what it does."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.tensor(1 - self.p)) if self.training and self.p else x


def test_what_draws_as_it_trains_is_switched_off_or_refused() -> None:
    net = small()
    net.module.drop = StochasticDepth()
    result = bench_module_training(net, 4, quiet)
    assert not result.failed
    assert any("Dropout is off" in note for note in result.notes)
    assert net.module.drop.p == 0.5
    net.module.drop = nn.Identity()
    net.module.drop.forward = lambda x: F.dropout(x)
    with pytest.raises(SparselthError, match="`model` small: draws random numbers as it trains"):
        bench_module_training(net, 4, quiet)


def test_layers_that_share_a_weight_are_no_csr_layers() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    masks = random_masks({"0.weight": (4, 4)}, 0.5)
    both = Net("tied", nn.Sequential(one, other).eval(), masks, lambda batch: torch.randn(batch, 4))
    zero(both.module, masks)
    notes = bench_module_training(both, 4, quiet).notes
    assert "torch CSR is not among the rivals: 1 shares its weight with another layer" in notes
