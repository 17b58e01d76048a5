"""`sparselth ticket`: each command on tickets of modules and of runs, as text of 80 columns and as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparselth.files import array_bytes, load_arrays
from sparselth.runs import RunRecord
from sparselth.tickets import load_ticket, save_ticket

Cli = Callable[..., tuple[int, str, str]]
Document = Callable[..., dict[str, Any]]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    masks = {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.2 for i in (0, 2)}
    notes = {"accuracy": 0.97, "dataset": "digits", "long": "word " * 200}
    return save_ticket(tmp_path / "t.safetensors", model, masks, model.state_dict(), notes)


def test_inspect_of_a_module(file: Path, cli: Cli, document: Document) -> None:
    code, out, _ = cli("ticket", "inspect", "t.safetensors", "--batch", "2")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert f"{file.stat().st_size:,} bytes, " in out
    assert "of the 6,160 of dense weights" in out
    assert "accuracy: 0.97" in out
    assert "together: dense" in out
    found = document("ticket", "inspect", "t.safetensors", "--batch", "2")
    assert found["schema"] == "sparselth.ticket-inspect/1"
    assert [one["name"] for one in found["speeds"]] == ["0.weight", "2.weight"]
    assert found["layers"][0]["size"] == 1200
    assert found["bytes"] == file.stat().st_size
    assert "speeds" not in document("ticket", "inspect", "t.safetensors", "--no-times")


def test_verify_of_a_module(file: Path, cli: Cli, document: Document) -> None:
    code, out, _ = cli("ticket", "verify", "t.safetensors")
    assert code == 0
    assert out.startswith("t.safetensors: sparselth.ticket/1, checksum ")
    assert document("ticket", "verify", "t.safetensors")["ok"] is True
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    code, out, err = cli("ticket", "verify", "t.safetensors")
    assert (code, out) == (1, "")
    assert "its checksum is that of other content" in err
    assert err.count("\n") == 1


FLAGS = "--levels", "1", "--seeds", "0", "--arms", "ticket"


@pytest.mark.whole
def test_verify_with_its_run_evaluates_again(
    finished: Callable[..., RunRecord], cli: Cli, document: Document, tmp_path: Path
) -> None:
    finished(*FLAGS)
    ticket = "run/cells/seed0-ticket-01.safetensors"
    found = document("ticket", "verify", ticket, "--run", "run")
    assert found["ok"] is True
    assert found["accuracy"] == found["stated_accuracy"] > 0.2
    assert found["images"] == 1000
    # the same cell with other weights, all checksums right
    arrays, header = load_arrays(Path(ticket))
    arrays["kept/fc1.weight"] = -arrays["kept/fc1.weight"]
    Path("seed0-ticket-01.safetensors").write_bytes(array_bytes(arrays, header))
    code, out, _ = cli("ticket", "verify", "seed0-ticket-01.safetensors", "--run", "run")
    assert code == 3
    assert "FAILED: is not the file that run wrote" in out
    assert "FAILED: its network gets" in out
    code, _, err = cli("ticket", "verify", ticket, "--run", "elsewhere")
    assert code == 1
    assert "not a run folder" in err
    header["cell"] = "seed7-ticket-01"
    Path("seed7-ticket-01.safetensors").write_bytes(array_bytes(arrays, header))
    code, _, err = cli("ticket", "verify", "seed7-ticket-01.safetensors", "--run", "run")
    assert code == 1
    assert "has no finished cell seed7-ticket-01" in err


@pytest.mark.whole
def test_strong_tickets_are_verified_too(cli: Cli, document: Document, tmp_path: Path) -> None:
    run = str(tmp_path / "strong")
    words = ["--model", "lenet-300-100@0.1", "--dataset", "mnist5k", "--seeds", "0", "--steps", "20"]
    assert cli("strong", "edge-popup", *words, "--out", run, "--quiet")[0] == 0
    cells = sorted(Path(run, "cells").iterdir())
    assert len(cells) >= 2
    for cell in cells:
        found = document("ticket", "verify", str(cell), "--run", run)
        assert found["ok"], found
        assert found["accuracy"] == found["stated_accuracy"]
        assert cli("ticket", "inspect", str(cell), "--no-times")[0] == 0
        out = str(tmp_path / "x.pt")
        assert cli("ticket", "export", str(cell), "--to", "torch", "--out", out, "--trained")[0] == 0
        ticket: Any = load_ticket(cell)
        right, exported = ticket.trained().state_dict(), torch.load(out, weights_only=True)
        assert all(torch.equal(exported[name], tensor) for name, tensor in right.items())


NET = """from torch import nn

dataset = "mnist5k"


def make(classes):
    layers = nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * 64, classes))
"""


@pytest.mark.whole
def test_tickets_of_runs_of_a_user_s_module(
    cli: Cli, document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    words = ["--model", "net.py:make", "--seeds", "0", "--steps", "30", "--levels", "1", "--arms", "ticket"]
    assert cli("imp", *words, "--out", "run", "--quiet")[0] == 0
    first, second = (f"run/cells/seed0-ticket-0{level}.safetensors" for level in (0, 1))
    found = document("ticket", "verify", second, "--run", "run")
    assert found["ok"], found
    assert found["accuracy"] == found["stated_accuracy"]
    speeds = document("ticket", "inspect", second)["speeds"]
    assert [one["name"] for one in speeds] == ["0.weight", "4.weight"]
    assert not any(one["missing"] for one in speeds)  # it knows what each layer reads
    total = document("ticket", "diff", first, second)["total"]
    assert total["both"] == total["kept"][1] < total["kept"][0]
    assert total["differ"] == 0  # of the rewind step, both
    for trained in ((), ("--trained",)):
        assert cli("ticket", "export", second, "--to", "torch-prune", "--out", "x.pt", *trained)[0] == 0
    assert cli("ticket", "import", "x.pt", "--from", "torch-prune", "--out", "back")[0] == 0
    shutil.copy(second, "alone.safetensors")
    Path("net.py").write_text("raise SystemExit('ran')")  # nobody may import it for a lone file
    code, out, err = cli("ticket", "inspect", "alone.safetensors")
    assert (code, out) == (1, "")
    assert "its model is code, net.py:make, which is imported for tickets in the folder of their run" in err
    Path("net.py").write_text(NET)
    module = load_ticket(second).apply(load_ticket(second).trained())  # type: ignore[attr-defined]
    assert load_ticket("back").masks == module


def test_diff(file: Path, cli: Cli, document: Document) -> None:
    model, ticket = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10)), load_ticket(file)
    ticket.apply(model)
    masks = {name: torch.rand(mask.shape) < 0.5 for name, mask in ticket.masks.items()}
    save_ticket("other.safetensors", model, masks, model.state_dict())
    code, out, _ = cli("ticket", "diff", "t.safetensors", "other.safetensors")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    found = document("ticket", "diff", "t.safetensors", "other.safetensors")
    both = sum(int((masks[name] & mask).sum()) for name, mask in ticket.masks.items())
    assert found["total"]["both"] == both
    assert found["total"]["differ"] == 0
    assert [row["name"] for row in found["layers"]] == ["0.weight", "2.weight"]
    assert f"{both:,}" in out


@pytest.mark.parametrize("to", ["torch", "csr", "compressed-tensors", "torch-prune"])
def test_export(to: str, file: Path, cli: Cli, document: Document) -> None:
    code, out, _ = cli("ticket", "export", "t.safetensors", "--to", to, "--out", "x.pt")
    assert code == 0
    assert out.startswith(f"x.pt: {to}, {Path('x.pt').stat().st_size:,} bytes")
    found = document("ticket", "export", "t.safetensors", "--to", to, "--out", "y.pt")
    assert found["bytes"] == Path("y.pt").stat().st_size


def test_export_and_import_round_trip(file: Path, cli: Cli) -> None:
    assert cli("ticket", "export", "t.safetensors", "--to", "torch-prune", "--out", "x.pt")[0] == 0
    code, out, _ = cli("ticket", "import", "x.pt", "--from", "torch-prune", "--out", "back.safetensors")
    assert code == 0
    before, after = load_ticket(file), load_ticket("back.safetensors")
    assert f"{before.masks.kept:,} of 1,500 weights kept" in out
    assert before.masks == after.masks
    assert all(torch.equal(t, after.snapshot[name]) for name, t in before.snapshot.items())


@pytest.mark.whole
def test_onnx_of_a_run_and_of_a_module_of_known_layers(
    finished: Callable[..., RunRecord], cli: Cli, tmp_path: Path
) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    finished(*FLAGS)
    ticket = "run/cells/seed0-ticket-01.safetensors"
    code, out, _ = cli("ticket", "export", ticket, "--to", "onnx", "--out", "x.onnx", "--trained")
    assert code == 0
    assert "checked by onnxruntime" in out
    found: Any = load_ticket(ticket)
    x = torch.rand(3, 1, 28, 28)
    (y,) = runtime.InferenceSession("x.onnx").run(None, {"input": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(y, found.trained().eval()(x).numpy(), rtol=1e-4, atol=1e-5)
    model = found.rewound()
    save_ticket("module.safetensors", model, found.masks, found.snapshot)
    words = "ticket", "export", "module.safetensors", "--to", "onnx", "--out", "y.onnx"
    assert cli(*words)[0] == 2
    code, out, err = cli(*words, "--model", "lenet-300-100")
    assert code == 0, err
    assert "checked by onnxruntime" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("inspect", "gone"), 1, "gone: no such file"),
        (("inspect", "t.safetensors", "--batch", "0"), 2, "--batch 0: expected 1 or more"),
        (("inspect", "t.safetensors", "--image", "0x3"), 2, "--image 0x3: expected height x width"),
        (("verify", "t.safetensors", "--run", "x"), 1, "the ticket of a module, which no run evaluated"),
        (("export", "t.safetensors", "--to", "onx", "--out", "x"), 2, "did you mean 'onnx'"),
        (("export", "t.safetensors", "--to", "open_lth", "--out", "x"), 2, "is read only"),
        (("export", "t.safetensors", "--to", "torch"), 2, "--out"),
        (("export", "t.safetensors", "--to", "torch", "--out", "no/x"), 1, "cannot write no/x"),
        (("export", "t.safetensors", "--to", "torch", "--out", "x", "--trained"), 2, "--trained t.safe"),
        (("export", "t.safetensors", "--to", "onnx", "--out", "x"), 2, "give its --model"),
        (("import", "t.safetensors", "--from", "csr", "--out", "x"), 2, "is written only"),
        (("import", "gone", "--from", "open_lth", "--out", "x"), 1, "gone"),
        (("import", "t.safetensors", "--from", "torch-prune", "--out", "x"), 1, "has no NAME_mask"),
        (("diff", "t.safetensors", "gone"), 1, "gone: no such file"),
    ],
)
def test_what_is_off_is_one_line(
    words: tuple[str, ...], code: int, message: str, file: Path, cli: Cli
) -> None:
    found = cli("ticket", *words)
    assert found[0] == code, found
    assert found[1] == ""
    assert message in found[2]
    assert found[2].count("\n") == 1
    assert "a fault of sparselth" not in found[2]


def test_formats_are_listed(cli: Cli) -> None:
    code, out, _ = cli("ls", "formats")
    assert code == 0
    assert "torch-prune         export and import: masks of torch.nn.utils.prune" in out
    assert "open_lth            import: " in out


def test_older_tickets_without_a_checksum_are_said_to_have_none(file: Path, cli: Cli, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file
    from test_tickets import put

    cell, _ = put(tmp_path, "seed0-ticket-00", 1, True)
    header = load_arrays(cell)[1]
    save_file(load_file(cell), cell, metadata={"sparselth": json.dumps(header)})
    code, out, _ = cli("ticket", "verify", str(cell))
    assert code == 0
    assert "an older version wrote no checksum" in out
    shutil.copy(cell, tmp_path / "copy.safetensors")
    assert cli("ticket", "diff", str(cell), str(tmp_path / "copy.safetensors"))[0] == 0
