"""Tickets of any module: what comes back, what a file weighs, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparselth import module_tickets, tickets
from sparselth.errors import SparselthError, UsageError
from sparselth.files import array_bytes, load_arrays
from sparselth.masks import Masks
from sparselth.tickets import ModuleTicket, load_ticket, save_ticket


class Everything(nn.Module):
    """Tied weights, a shared layer, norms, an embedding, attention, odd convolutions and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.conv = nn.Conv2d(2, 4, (3, 1), groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.turned = nn.ConvTranspose1d(3, 5, 2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.shared = nn.Sequential(layer := nn.Linear(1, 7), layer)
        self.bf16 = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("eighth", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


def drawn(model: nn.Module, share: float, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(p.shape, generator=draw) < share for n, p in model.named_parameters() if p.dim() > 1
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit."""
    a, b = a.contiguous(), b.contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bytes(
        a.reshape(-1).view(torch.uint8).numpy()
    ) == bytes(b.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.99, 1.0])
def test_any_module_comes_back_to_the_bit(share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything()
    masks, before = drawn(model, share), state(model)
    poisoned = state(model)
    for name, mask in masks.items():  # nobody looks at what is pruned
        for tied in (name, "head.weight") if name == "embed.weight" else (name,):
            poisoned[tied][~mask] = float("nan")
    file = save_ticket(tmp_path / "t.safetensors", model, masks, poisoned, {"accuracy": 0.5})
    ticket = load_ticket(file)
    assert isinstance(ticket, ModuleTicket)
    assert ticket.notes == {"accuracy": 0.5}
    assert ticket.header["network"] == f"{__name__}.Everything"
    assert ticket.masks == Masks(masks, model)
    assert list(ticket.snapshot) == [*dict.fromkeys((*ticket.snapshot, *before))]
    assert ticket.snapshot.keys() == before.keys()
    other = Everything()
    with torch.no_grad():
        for t in other.state_dict().values():
            t.zero_()
    found = ticket.apply(other)
    assert found.model is other
    assert found == ticket.masks
    for name, tensor in before.items():
        first = "embed.weight" if name == "head.weight" else name.replace("shared.1", "shared.0")
        right = tensor.masked_fill(~masks[first], 0) if first in masks else tensor
        assert same(other.state_dict()[name], right), name
        assert same(ticket.snapshot[name], right), name
    assert other.head.weight is other.embed.weight
    kept, size = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert ticket.weights_remaining == pytest.approx(kept / size)
    again = save_ticket(tmp_path / "again", other, found, ticket.snapshot, ticket.notes)
    assert again.read_bytes() == file.read_bytes()


def test_a_file_holds_what_its_table_says(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = mask[2, 6] = True
    file = save_ticket(tmp_path / "t", model, {"0.weight": mask}, model.state_dict())
    arrays = load_file(file)
    weight = model[0].weight.detach().numpy()
    assert set(arrays) == {"mask/0.weight", "kept/0.weight"} | {
        f"whole/{name}" for name in model.state_dict() if name != "0.weight"
    }
    bits = np.unpackbits(arrays["mask/0.weight"], bitorder="little")
    assert np.flatnonzero(bits).tolist() == [1, 9, 20]
    assert arrays["kept/0.weight"].tolist() == [weight[0, 1], weight[1, 2], weight[2, 6]]
    with safe_open(file, framework="numpy") as opened:
        head = json.loads(opened.metadata()["sparselth"])
    assert head["schema"] == "sparselth.ticket/1"
    assert head["shapes"] == {"0.weight": [3, 7]}
    assert set(head["versions"]) == {"sparselth", "torch"}


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 400), st.floats(0, 1), st.integers(0, 99))
def test_a_file_takes_four_bytes_a_survivor_and_a_bit_a_weight(
    n: int, k: int, share: float, seed: int
) -> None:
    import tempfile

    model = nn.Linear(k, n, bias=False)
    masks = drawn(model, share, seed)
    with tempfile.TemporaryDirectory() as folder:
        file = save_ticket(Path(folder, "t"), model, masks, model.state_dict())
        assert file.stat().st_size <= 4 * int(masks["weight"].sum()) + n * k / 8 + 1024
        assert load_ticket(file).dense_bytes == 4 * n * k


def test_a_ticket_of_a_compiled_or_parallel_model_is_that_of_the_model(tmp_path: Path) -> None:
    model = nn.Linear(5, 4)
    masks = drawn(model, 0.3)
    plain = save_ticket(tmp_path / "plain", model, masks, model.state_dict())
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        file = save_ticket(tmp_path / "wrapped", wrapped, masks, wrapped.state_dict())  # type: ignore[arg-type]
        assert file.read_bytes() == plain.read_bytes()
        assert load_ticket(file).apply(wrapped).model is model  # type: ignore[arg-type]


def test_channels_last_and_other_dtypes_of_the_model_that_takes_it(tmp_path: Path) -> None:
    model = nn.Conv2d(4, 6, 3)
    masks = drawn(model, 0.4)
    turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
    file = save_ticket(tmp_path / "t", turned, masks, turned.state_dict())
    other = nn.Conv2d(4, 6, 3).double().to(memory_format=torch.channels_last)
    load_ticket(file).apply(other)
    assert torch.equal(other.weight, (model.weight * masks["weight"]).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bias"), r"expected bias \[4\] of the model, found no bias"),
        (
            lambda s: s.update(weight=s["weight"].T),
            r"expected weight \[4, 5\] of the model, found weight \[5, 4\]",
        ),
        (lambda s: s.update(more=s["bias"]), "the model has no more"),
    ],
)
def test_a_snapshot_of_another_model_is_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    model = nn.Linear(5, 4)
    snapshot = state(model)
    change(snapshot)
    with pytest.raises(UsageError, match=message):
        save_ticket(tmp_path / "t", model, drawn(model, 0.3), snapshot)
    assert not (tmp_path / "t").exists()


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}


@pytest.mark.parametrize(
    ("model", "masks", "notes", "message"),
    [
        (nn.Linear(5, 4), {"weight": torch.ones(5, 4)}, {}, r"mask of weight: expected a mask bool \[4, 5\]"),
        (nn.Linear(5, 4), {"wieght": torch.ones(4, 5)}, {}, "did you mean 'weight'"),
        (nn.Linear(5, 4), {}, {"a": object()}, "expected what JSON can say"),
        (nn.Linear(5, 4).to(torch.float8_e4m3fnuz), {}, {}, "weight: a ticket has dense numbers"),
        (Extra(5, 4), {}, {}, "_extra_state: a ticket holds tensors alone, got dict"),
    ],
    ids=["shape", "name", "notes", "dtype", "extra"],
)
def test_what_cannot_be_written_is_one_line(
    model: nn.Module, masks: Any, notes: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        save_ticket(tmp_path / "t", model, masks, model.state_dict(), notes)
    assert not (tmp_path / "t").exists()


def test_a_model_of_other_names_or_shapes_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    ticket = load_ticket(save_ticket(tmp_path / "t", model, drawn(model, 0.3), model.state_dict()))
    others: list[tuple[nn.Module, str]] = [
        (nn.Sequential(nn.Linear(5, 4)), r"the ticket has 1.weight \[2, 4\], the model no 1.weight$"),
        (nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), r"0.weight \[4, 5\], the model 0.weight \[3, 5\]$"),
        (nn.Sequential(nn.LazyLinear(4), model[1]), r"0.weight \[4, 5\], the model 0.weight without a shape"),
        (nn.Sequential(*model, nn.Linear(2, 2)), r"the ticket has no 2.weight, the model 2.weight \[2, 2\]$"),
    ]
    square = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two = load_ticket(save_ticket(tmp_path / "two", square, {}, square.state_dict()))
    tied = nn.Sequential(layer := nn.Linear(3, 3), layer)
    for one, other, message in [(ticket, *pair) for pair in others] + [
        (two, tied, "1.weight and 0.weight are")
    ]:
        before = {n: t.clone() for n, t in other.state_dict().items() if not is_lazy(t)}
        with pytest.raises(SparselthError, match=message):
            one.apply(other)
        assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items() if name in before)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, h: a.pop("mask/weight"),
        lambda a, h: a.pop("kept/weight"),
        lambda a, h: a.pop("whole/bias"),
        lambda a, h: a.update({"whole/more": a["whole/bias"]}),
        lambda a, h: a.update({"kept/weight": a["kept/weight"][:-1]}),
        lambda a, h: a.update({"kept/weight": a["kept/weight"].astype("f8")}),
        lambda a, h: a.update({"mask/weight": a["mask/weight"][:-1]}),
        lambda a, h: h.update(shapes={"weight": [2**40, 2**40]}),
        lambda a, h: h.update(shapes={"weight": [-4, -5]}),
        lambda a, h: h.update(shapes={"weight": "45"}),
        lambda a, h: h.update(shapes={"weight": [4, 5], "other": [1]}),
        lambda a, h: h["dtypes"].update(weight="float24"),
        lambda a, h: h["dtypes"].update(weight=["float32"]),
        lambda a, h: h.update(dtypes=None),
        lambda a, h: h.update(tied={"bias": "weight"}),
        lambda a, h: h.update(tied={"more": "nobody"}),
        lambda a, h: h.pop("tied"),
    ],
)
def test_what_does_not_belong_together_is_no_ticket(
    change: Callable[[dict[str, Any], dict[str, Any]], object], tmp_path: Path
) -> None:
    model = nn.Linear(5, 4)
    file = save_ticket(tmp_path / "t", model, drawn(model, 0.3), model.state_dict())
    arrays, header = load_arrays(file)
    change(arrays, header)
    file.write_bytes(array_bytes(arrays, header))
    with pytest.raises(SparselthError, match=r"is no ticket of a module \(") as raised:
        load_ticket(file)
    assert "\n" not in str(raised.value)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    model = nn.Linear(5, 4)
    file = save_ticket(tmp_path / "t", model, drawn(model, 0.3), model.state_dict(), {"from": "here"})
    whole = file.read_bytes()
    begin = whole.index(b'{"')
    for at in range(begin, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = load_ticket(file)
        except SparselthError:
            continue
        assert whole[at : at + 1].isspace(), (at, found)  # of the header of safetensors: padding


def test_tickets_of_runs_are_read_by_the_same_call(tmp_path: Path) -> None:
    from test_tickets import PARAMS, SMALL, put

    file, content = put(tmp_path, "seed0-ticket-00", 3, rewound=True)
    ticket = load_ticket(file)
    assert isinstance(ticket, tickets.RunTicket)
    assert ticket.notes["cell"] == "seed0-ticket-00"
    assert ticket.weights_remaining == content.mask.sum() / PARAMS.prunable
    model = ticket.trained()
    masks = ticket.apply(model)
    assert masks.model is model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ticket.snapshot[name])
        assert name not in masks or not tensor[~masks[name]].any()
    assert ticket.dense_bytes == 4 * sum(spec.numel for spec in SMALL.params.all)
    module = save_ticket(tmp_path / "module", model, masks, ticket.snapshot)
    with pytest.raises(SparselthError, match="the ticket of a module, not of a run; load_ticket reads it"):
        tickets.load(module)
    with pytest.raises(SparselthError, match="no such file"):
        load_ticket(tmp_path / "gone")


def test_saving_needs_no_more_than_the_arrays(tmp_path: Path) -> None:
    assert module_tickets.first_names(nn.Sequential(layer := nn.Linear(2, 2), layer)) == {
        "0.weight": "0.weight",
        "0.bias": "0.bias",
        "1.weight": "0.weight",
        "1.bias": "0.bias",
    }
