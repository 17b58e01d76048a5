"""Tickets in the files of others and back: each format beside an independent reader of it."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

from sparselth.errors import SparselthError, UsageError
from sparselth.exchange import FORMATS, export_ticket, import_ticket
from sparselth.masks import Masks
from sparselth.tickets import Ticket, load_ticket, save_ticket


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 4 * 4, 11),
        nn.Linear(11, 3),
    )


def drawn(model: nn.Module, share: float = 0.3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        n: torch.rand(p.shape, generator=draw) < share for n, p in model.named_parameters() if p.dim() > 1
    }


@pytest.fixture
def ticket(tmp_path: Path) -> Ticket:
    model = small()
    return load_ticket(save_ticket(tmp_path / "t.safetensors", model, drawn(model), model.state_dict()))


def zeroed(ticket: Ticket) -> dict[str, Tensor]:
    model = small()
    ticket.apply(model)
    return dict(model.state_dict())


def equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_dense_state_dict_is_what_load_state_dict_takes(name: str, ticket: Ticket, tmp_path: Path) -> None:
    export_ticket(ticket, "torch", tmp_path / name)
    found = load_file(tmp_path / name) if "safe" in name else torch.load(tmp_path / name, weights_only=True)
    equal(found, zeroed(ticket))
    small().load_state_dict(found)


def test_csr_gives_the_same_products(ticket: Ticket, tmp_path: Path) -> None:
    said = export_ticket(ticket, "csr", tmp_path / "x.pt")
    assert said == "filters [N, C, k, k] lie there as matrices [N, C k k]"
    found, right = torch.load(tmp_path / "x.pt", weights_only=True), zeroed(ticket)
    for name, tensor in right.items():
        if name in ticket.masks:
            assert found[name].layout == torch.sparse_csr
            assert found[name].values().numel() == int(ticket.masks[name].sum())
            assert found[name].col_indices().dtype == torch.int32
            assert torch.equal(found[name].to_dense().view(tensor.shape), tensor)
        else:
            assert torch.equal(found[name], tensor)
    x = torch.randn(80, 4)
    torch.testing.assert_close(found["4.weight"] @ x, right["4.weight"] @ x)
    with pytest.raises(UsageError, match="safetensors has no sparse tensors"):
        export_ticket(ticket, "csr", tmp_path / "x.safetensors")


def test_torch_prune_and_back(ticket: Ticket, tmp_path: Path) -> None:
    """A module that was pruned by torch loads it; what that module saves then is the ticket again."""
    export_ticket(ticket, "torch-prune", tmp_path / "x.pt")
    model = small()
    for layer in (model[0], model[4], model[5]):
        prune.identity(layer, "weight")
    model.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    x = torch.randn(2, 3, 6, 6)
    plain = small()
    ticket.apply(plain)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "again.pt")
    import_ticket(tmp_path / "again.pt", "torch-prune", tmp_path / "back.safetensors")
    back = load_ticket(tmp_path / "back.safetensors")
    assert back.masks == ticket.masks
    equal(back.snapshot, zeroed(ticket))
    assert back.notes["imported"]["format"] == "torch-prune"
    assert back.apply(small()) == ticket.masks


def test_masks_that_torch_prune_found_are_taken_with_their_values(tmp_path: Path) -> None:
    model = small()
    prune.l1_unstructured(model[4], "weight", 0.7)
    prune.ln_structured(model[0], "weight", 0.4, n=2, dim=0)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    import_ticket(tmp_path / "x.pt", "torch-prune", tmp_path / "t.safetensors")
    ticket, plain = load_ticket(tmp_path / "t.safetensors"), small()
    assert ticket.apply(plain).kept == round(0.3 * 880) + 3 * 27
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))


def open_lth(folder: Path, model: nn.Module, masks: dict[str, Tensor], step: str) -> None:
    """What open_lth writes of a level: masks as int32, a state_dict at a step; torch 1.4 wrote no zip."""
    folder.mkdir(exist_ok=True)
    ints = {name: mask.int() for name, mask in masks.items()}
    torch.save(ints, folder / "mask.pth", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), folder / f"model_{step}.pth", _use_new_zipfile_serialization=False)


def test_a_level_of_open_lth_goes_back_to_its_first_step(tmp_path: Path) -> None:
    model, later, level = small(), small(), tmp_path / "level"
    with torch.no_grad():
        for p in later.parameters():
            p.add_(1)
    masks = drawn(model)
    open_lth(level, later, masks, "ep40_it0")
    open_lth(level, later, masks, "ep10_it0")
    open_lth(level, model, masks, "ep2_it0")
    import_ticket(level, "open_lth", tmp_path / "t")
    ticket = load_ticket(tmp_path / "t")
    assert ticket.masks == Masks(masks)
    equal(
        ticket.snapshot,
        {n: t.masked_fill(~masks[n], 0) if n in masks else t for n, t in model.state_dict().items()},
    )
    import_ticket(level / "mask.pth", "open_lth", tmp_path / "u", weights=level / "model_ep2_it0.pth")
    equal(load_ticket(tmp_path / "u").snapshot, ticket.snapshot)
    with pytest.raises(
        UsageError, match=r"mask.pth: has no 0.weight, of which there is a mask; name its `weights`"
    ):
        import_ticket(level / "mask.pth", "open_lth", tmp_path / "v")
    (level / "mask.pth").unlink()
    with pytest.raises(SparselthError, match=r"has no mask.pth"):
        import_ticket(level, "open_lth", tmp_path / "v")


def test_a_checkpoint_of_open_lth_has_both(tmp_path: Path) -> None:
    model = small()
    masks = drawn(model)
    state = {f"module.model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"module.mask_{name.replace('.', '___')}": mask.float() for name, mask in masks.items()}
    checkpoint = {
        "ep": 3,
        "it": 7,
        "model_state_dict": OrderedDict(state),
        "optimizer_state_dict": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict(),
        "logger": "test_loss,0,2.3",
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    import_ticket(tmp_path / "checkpoint.pth", "open_lth", tmp_path / "t")
    ticket = load_ticket(tmp_path / "t")
    assert ticket.masks == Masks(masks)
    ticket.apply(small())
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(SparselthError, match="has weights and no masks"):
        import_ticket(tmp_path / "plain.pth", "open_lth", tmp_path / "u")


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.1, 1.0])
def test_hidden_networks_keep_the_largest_scores(keep: float, tmp_path: Path) -> None:
    model = small()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    scores = {f"module.{i}.scores": torch.randn(model[i].weight.shape) for i in (0, 4)}
    checkpoint = {
        "epoch": 1,
        "arch": "cResNet18",
        "state_dict": state | scores,
        "best_acc1": torch.tensor(93.1),
    }
    torch.save(checkpoint | {"optimizer": {}, "curr_acc1": "Not evaluated"}, tmp_path / "model_best.pth")
    import_ticket(tmp_path / "model_best.pth", "hidden-networks", tmp_path / "t", keep=keep)
    ticket = load_ticket(tmp_path / "t")
    for i in (0, 4):  # as the paper's code computes it, one weight after the other
        values = scores[f"module.{i}.scores"].abs().flatten().tolist()
        dropped = sorted(range(len(values)), key=values.__getitem__)[: int((1 - keep) * len(values))]
        assert set((~ticket.masks[f"{i}.weight"]).flatten().nonzero()[:, 0].tolist()) == set(dropped)
    assert "5.weight" not in ticket.masks
    assert ticket.notes["imported"]["keep"] == keep
    ticket.apply(small())
    with pytest.raises(UsageError, match="says no share of weights to keep"):
        import_ticket(tmp_path / "model_best.pth", "hidden-networks", tmp_path / "u")
    with pytest.raises(UsageError, match="`keep` 2: expected more than 0"):
        import_ticket(tmp_path / "model_best.pth", "hidden-networks", tmp_path / "u", keep=2)


def decompressed(file: Path) -> dict[str, Tensor]:
    """Dense tensors of a sparse-bitmask file, bit after bit, from the format's description."""
    found = load_file(file)
    names = [name.removesuffix(".bitmask") for name in found if name.endswith(".bitmask")]
    dense = {}
    for name in names:
        shape = found.pop(f"{name}.shape").tolist()
        bits, values = (
            found.pop(f"{name}.bitmask").reshape(-1, -(-shape[-1] // 8)),
            found.pop(f"{name}.compressed"),
        )
        starts = found.pop(f"{name}.row_offsets").flatten().tolist()
        rows = []
        for row, start in zip(bits.tolist(), starts, strict=True):
            line, at = [], start
            for k in range(shape[-1]):
                there = row[k // 8] >> k % 8 & 1
                line.append(values[at].item() if there else 0.0)
                at += there
            rows.append(line)
        dense[f"{name}.weight"] = torch.tensor(rows).view(shape)
    return found | dense


def test_compressed_tensors_is_read_bit_after_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(45, 7, bias=False))
    masks = drawn(model)
    ticket = load_ticket(save_ticket(tmp_path / "t", model, masks, model.state_dict()))
    assert export_ticket(ticket, "compressed-tensors", tmp_path / "x.safetensors") == ""
    found = decompressed(tmp_path / "x.safetensors")
    assert found.keys() == ticket.snapshot.keys()
    for name, tensor in ticket.snapshot.items():
        assert torch.equal(found[name], tensor), name


def test_compressed_tensors_reads_it_itself(ticket: Ticket, tmp_path: Path) -> None:
    """Version 0.9.4 does; 0.20 has no sparse-bitmask."""
    library = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    if not hasattr(library, "BitmaskConfig") or not hasattr(library, "load_compressed"):
        pytest.skip("this compressed-tensors has no sparse-bitmask")
    export_ticket(ticket, "compressed-tensors", tmp_path / "x.safetensors")
    equal(dict(library.load_compressed(tmp_path / "x.safetensors", library.BitmaskConfig())), zeroed(ticket))


def test_onnx_computes_the_same(ticket: Ticket, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = small(), torch.randn(2, 3, 6, 6)
    said = export_ticket(ticket, "onnx", tmp_path / "x.onnx", module=model, example=x)
    assert said.startswith("checked by onnxruntime")
    session = runtime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    plain = small()
    ticket.apply(plain)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 6, 6)
        (found,) = session.run(None, {"input": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_onnx_of_a_network_that_gives_zeros_is_not_said_to_be_checked(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = small()
    nn.init.zeros_(model[5].weight)
    nn.init.zeros_(model[5].bias)
    ticket = load_ticket(save_ticket(tmp_path / "t", model, drawn(model), model.state_dict()))
    said = export_ticket(ticket, "onnx", tmp_path / "x", module=small(), example=torch.randn(2, 3, 6, 6))
    assert "all outputs are 0" in said


def test_onnx_without_its_packages_or_the_network_is_one_line(
    ticket: Ticket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="give its `model`"):
        export_ticket(ticket, "onnx", tmp_path / "x.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(
        SparselthError, match="needs the package onnx, which is not installed: pip install onnx"
    ):
        export_ticket(ticket, "onnx", tmp_path / "x.onnx", module=small(), example=torch.zeros(1, 3, 6, 6))
    assert not (tmp_path / "x.onnx").exists()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    model[1].weight = model[0].weight
    ticket = load_ticket(save_ticket(tmp_path / "t", model, drawn(model), model.state_dict()))
    prune.custom_from_mask(model[1], "weight", ticket.masks["0.weight"])
    torch.save(model.state_dict(), tmp_path / "pruned.pt")  # 0.weight is 1.weight_orig there
    import_ticket(tmp_path / "pruned.pt", "torch-prune", tmp_path / "back")
    back = load_ticket(tmp_path / "back")
    assert back.masks == ticket.masks
    assert back.header["tied"] == {"1.weight": "0.weight"}
    for name in ("x.pt", "x.safetensors"):
        export_ticket(ticket, "torch", tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("x.pt", "x.safetensors")]
    assert torch.load(tmp_path / "x.pt", weights_only=True)["1.weight"].equal(ticket.snapshot["1.weight"])
    assert sizes[1] >= 2 * 4 * 35


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/sparselth-evil",)


@pytest.mark.parametrize("of", [name for name, form in FORMATS.items() if form.read])
@pytest.mark.parametrize("how", ["pickle", "torch", "module"])
def test_a_checkpoint_that_pickles_code_is_refused_in_a_line(of: str, how: str, tmp_path: Path) -> None:
    file = tmp_path / "evil.pth"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif how == "torch":
        torch.save({"state_dict": {"a": torch.zeros(2)}, "args": Evil()}, file)
    else:
        torch.save(small(), file)
    with pytest.raises(
        SparselthError, match=r"holds code or objects( \(.*\))?, and nothing here unpickles"
    ) as raised:
        import_ticket(file, of, tmp_path / "t", keep=0.5)
    assert "\n" not in str(raised.value)
    assert not Path("/tmp/sparselth-evil").exists()
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("of", [name for name, form in FORMATS.items() if form.read])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"text", b"PK\x03\x04rubbish", {}, [], {"state_dict": 3}, {"a": "b"}, {1: torch.ones(1)}],
    ids=str,
)
def test_what_is_no_checkpoint_is_a_line(of: str, content: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(SparselthError) as raised:
        import_ticket(file, of, tmp_path / "t", keep=0.5)
    assert "x.pth" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_mask_of_another_shape_is_a_line(tmp_path: Path) -> None:
    state = {"fc.weight_orig": torch.ones(3, 4), "fc.weight_mask": torch.ones(4, 3)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=r"fc.weight: the mask has shape \[4, 3\], the tensor \[3, 4\]"):
        import_ticket(tmp_path / "x.pt", "torch-prune", tmp_path / "t")
    torch.save(state | {"fc.weight_mask": torch.full((3, 4), 0.5)}, tmp_path / "x.pt")
    with pytest.raises(SparselthError, match="expected a mask of 0s and 1s"):
        import_ticket(tmp_path / "x.pt", "torch-prune", tmp_path / "t")


def test_formats_say_what_they_are_not_for(ticket: Ticket, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format open_lth: is read only; export to compressed-tensors, "):
        export_ticket(ticket, "open_lth", tmp_path / "x")
    with pytest.raises(UsageError, match="format csr: is written only; import from "):
        import_ticket(ticket.file, "csr", tmp_path / "x")
    with pytest.raises(UsageError, match="unknown format 'onxx': did you mean 'onnx'"):
        export_ticket(ticket, "onxx", tmp_path / "x")
    with pytest.raises(UsageError, match=r"`trained` .* has no trained weights"):
        export_ticket(ticket, "torch", tmp_path / "x", trained=True)


@pytest.mark.parametrize("trained", [False, True])
def test_a_ticket_of_a_run_is_exported_as_it_begins_or_ends(trained: bool, tmp_path: Path) -> None:
    from test_tickets import put

    file, _ = put(tmp_path, "seed0-ticket-00", 3, rewound=True)
    ticket: Any = load_ticket(file)
    for to in ("torch", "torch-prune", "csr"):
        export_ticket(ticket, to, tmp_path / f"{to}.pt", trained=trained)
    found = torch.load(tmp_path / "torch.pt", weights_only=True)
    right = (ticket.trained() if trained else ticket.rewound()).state_dict()
    equal(found, dict(right))
    import_ticket(tmp_path / "torch-prune.pt", "torch-prune", tmp_path / "back")
    assert load_ticket(tmp_path / "back").masks == ticket.masks
    export_ticket(ticket, "compressed-tensors", tmp_path / "x.safetensors", trained=trained)
    equal(decompressed(tmp_path / "x.safetensors"), dict(right))
    assert json.loads(json.dumps(ticket.notes))["cell"] == "seed0-ticket-00"
