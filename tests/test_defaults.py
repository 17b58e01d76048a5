"""What the package computes does not depend on torch's default dtype and device."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselth
from sparselth import optim, pruning, sparse
from sparselth.cli.main import run
from sparselth.config import Cell, Recipe
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.engine.break_even import break_even
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.models import MODELS, get_model
from sparselth.models.torch import network, sequential
from sparselth.runs import RunRecord
from sparselth.streams import stream
from sparselth.train import fit

HERE = Path(sparselth.__file__).parent
FLOATS = {"empty", "zeros", "ones", "rand", "randn", "linspace", "eye"}
MAKERS = FLOATS | {"arange", "as_tensor", "full", "randint", "randperm", "sparse_csr_tensor", "tensor"}


@pytest.mark.parametrize(
    "file", sorted(HERE.rglob("*.py")) + sorted((HERE / "kernels").glob("*.py")), ids=str
)
def test_tensors_are_made_of_a_named_dtype_on_a_named_device(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = node.func.value, node.func.attr
            if isinstance(owner, ast.Name) and owner.id == "torch" and name in MAKERS:
                named = {keyword.arg for keyword in node.keywords}
                assert "device" in named, f"{file.name}:{node.lineno}"
                assert "dtype" in named or name not in FLOATS, f"{file.name}:{node.lineno}"


@pytest.fixture(params=["float64", "meta"])
def unusual(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Call it, and torch's default dtype is float64, or its default device "meta"."""
    if request.param == "meta":
        yield lambda: torch.set_default_device("meta")
    else:
        yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def same(found: Tensor, right: Tensor) -> bool:
    return (found.dtype, found.device) == (right.dtype, right.device) and torch.equal(found, right)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.params.size < 10**7])
def test_weights_masks_and_modules(name: str, unusual: Callable[[], None]) -> None:
    model = get_model(name)

    def made() -> list[Tensor]:
        weights = init_weights(model, stream(0, "ticket", 0, "init"))
        mask = model.params.full_mask()
        rung = pruning.ladder(model.params, 1, 0.2, "global")[1]
        kept = pruning.prune(model.params, weights[: model.params.mask_size].abs(), mask, rung)
        shuffled = pruning.shuffle(model.params, kept, stream(0, "random-mask", 1, "mask"))
        parts = [*network(model, weights).parameters(), *sequential(model, weights).parameters()]
        return [weights, mask, kept, shuffled, *(part.detach() for part in parts)]

    right = made()
    unusual()
    assert all(same(found, before) for found, before in zip(made(), right, strict=True))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "compressed"])
@pytest.mark.parametrize("name", ["lenet-300-100", "lenet5"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training(name: str, optimizer: str, sparse: bool, kernels: str, unusual: Callable[[], None]) -> None:
    model, recipe = (
        get_model(name),
        Recipe(steps=4, lr=0.01, batch_size=20, optimizer=optimizer, eval_every=2),
    )

    def trained() -> list[Tensor]:
        digits = Resident(load("mnist5k", Path()), "cpu", 250)
        weights = init_weights(model, stream(0, "ticket", 0, "init"))
        mask = torch.arange(model.params.mask_size, device="cpu") % 20 == 0
        weights[: model.params.mask_size] *= mask
        state = State.start(weights[None], recipe)
        even = dict.fromkeys((spec.name for spec in model.weights), 1.0) if sparse else None
        fit(
            model,
            digits,
            [Job(Cell(0, "ticket", 1), state, mask)],
            recipe,
            kernels=kernels,
            break_even=even,
        )
        return [state.weights, *state.moments]

    right = trained()
    unusual()
    assert all(same(found, before) for found, before in zip(trained(), right, strict=True))


@pytest.mark.parametrize("shape", ["lines", "images"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_conversion(shape: str, share: float, unusual: Callable[[], None]) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)]
    if shape == "images":
        layers = [
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        ]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(8, 96) if shape == "lines" else torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand_like(p) < share)
        right = model(x)
    unusual()
    fast = sparse.convert(model, None, x)
    with torch.no_grad():
        y = fast(x)
    assert (y.dtype, y.device) == (right.dtype, right.device)
    assert torch.allclose(y, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [optim.MaskedSGD, optim.MaskedAdam, optim.MaskedAdamW])
def test_optimizers(cls: Any, unusual: Callable[[], None]) -> None:
    start, grad = torch.linspace(1, 2, 40).view(5, 8), torch.linspace(-1, 1, 40).view(5, 8)
    mask = torch.arange(40).view(5, 8) % 3 > 0

    def stepped() -> Tensor:
        param = nn.Parameter(start.clone())
        optimizer = cls([param], lr=0.1, weight_decay=0.1, masks={param: mask})
        for _ in range(3):
            param.grad = grad.clone()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        param.grad = grad.clone()
        optimizer.step()
        return param.detach()

    right = stepped()
    unusual()
    assert same(stepped(), right)


def test_a_run(
    finished: Callable[..., RunRecord],
    run_contents: Callable[[Path], dict[str, bytes]],
    unusual: Callable[[], None],
) -> None:
    """By the command line, with workers; and it is resumed."""
    words = "--levels 1 --seeds 0 --arms ticket,reinit,random-mask"
    right = run_contents(finished(*words.split()).path)
    unusual()
    shutil.rmtree("run")
    command = "imp --model lenet-300-100 --dataset mnist5k --quiet --out run --steps 100"
    assert run([*command.split(), *words.split()]) == 0
    assert run_contents(Path("run")) == right


@pytest.mark.parametrize(
    "words",
    [
        "--shape 32x48 --batch 1,8",
        "--shape 16x8x3x3@8x8 --batch 2",
        "--model lenet-300-100 --batch 1",
        "--train --model lenet-300-100 --batch 8",
    ],
)
def test_bench(
    words: str,
    unusual: Callable[[], None],
    document: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which holds every result against float64, and whose exit code says if one is wrong."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, and no C++
    command = ["bench", "--device", "cpu", "--quick", "--quiet", *words.split(), "--out", str(tmp_path)]
    if words not in RACED:
        RACED[words] = {row["implementation"] for row in document(*command)["rows"]}
    unusual()
    assert {row["implementation"] for row in document(*command)["rows"]} == RACED[words]


RACED: dict[str, set[str]] = {}


def test_break_even(unusual: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unusual()
    assert break_even(get_model("lenet5"), 20, "auto")
