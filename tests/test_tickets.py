"""Ticket files: what a run writes can be loaded by path, trained on and converted; what is none says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from sparselth import sparse, strong_tickets, tickets
from sparselth.config import Cell
from sparselth.data.batches import Resident
from sparselth.engine.dense import Network, init_weights
from sparselth.errors import SparselthError
from sparselth.files import array_bytes, load_arrays
from sparselth.frozen import METHODS
from sparselth.models import get_model
from sparselth.optim import MaskedAdam
from sparselth.runs import RunRecord, cell_path
from sparselth.streams import stream

Run = Callable[..., RunRecord]
FLAGS = "--levels", "2", "--seeds", "0", "--rewind", "30", "--arms", "ticket,random-mask"
LENET = get_model("lenet-300-100")


def cell(record: RunRecord, level: int, arm: str = "ticket") -> Path:
    return cell_path(record.path, Cell(0, arm, level))


@pytest.mark.whole
def test_a_ticket_is_the_rewound_weights_under_its_mask(finished: Run) -> None:
    record = finished(*FLAGS)
    for level, arm in [(0, "ticket"), (1, "ticket"), (2, "ticket"), (2, "random-mask")]:
        ticket = tickets.load(cell(record, level, arm))
        assert ticket.header["cell"] == Cell(0, arm, level).key
        rewound, first = ticket.rewound().state_dict(), load_arrays(cell(record, 0))[0]
        assert set(ticket.masks) == {"fc1.weight", "fc2.weight", "fc3.weight"}
        for name, mask in ticket.masks.items():
            start = torch.from_numpy(first[f"rewind/{name}"])
            assert rewound[name].equal(start * mask)
            assert mask.dtype == torch.bool
            if arm == "ticket":
                assert np.array_equal(mask.numpy(), record.mask(0, level, name))
        for name in ("fc1.bias", "fc3.bias"):
            assert rewound[name].equal(torch.from_numpy(first[f"rewind/{name}"]))
        point = next(p for p in record.points if (p["level"], p["arm"]) == (level, arm))
        assert ticket.weights_remaining == point["weights_remaining"]
        assert ticket.header["rewind_step"] == 30


@pytest.mark.whole
def test_trained_is_the_network_whose_accuracy_was_recorded(finished: Run, digits: Resident) -> None:
    record = finished(*FLAGS)
    network = tickets.load(cell(record, 2)).trained().eval()
    right = 0
    with torch.no_grad():
        for x, y in digits.test():
            right += int((network(x[0].T).argmax(1) == y.flatten()).sum())
    point = next(p for p in record.points if (p["level"], p["arm"]) == (2, "ticket"))
    assert right / digits.n_test == point["final_accuracy"]


@pytest.mark.whole
def test_a_ticket_trains_on_in_ones_own_loop_and_converts(finished: Run, digits: Resident) -> None:
    ticket = tickets.load(str(cell(finished(*FLAGS), 2)))
    network = ticket.rewound()
    masks = {p: ticket.masks[name] for name, p in network.named_parameters() if name in ticket.masks}
    optimizer = MaskedAdam(network.parameters(), lr=1.2e-3, masks=masks)
    x, y = digits.test()[0]
    x, y = x[0].T.contiguous(), y.flatten()
    before = F.cross_entropy(network(x), y).item()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    assert F.cross_entropy(network(x), y).item() < before
    for parameter, mask in masks.items():
        assert not parameter[~mask].any()
    fast = sparse.convert(network.eval(), ticket.masks, x[:8])
    with torch.no_grad():
        torch.testing.assert_close(fast(x[:8]), network(x[:8]), rtol=1e-4, atol=1e-4)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["lenet-300-100", "lenet5", "vgg19"])
def test_content_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    params, draw = get_model(name).params, torch.Generator().manual_seed(0)
    mask = (torch.rand(params.mask_size, generator=draw) < 0.3) & params.full_mask()
    weights, rewound = (init_weights(get_model(name), stream(seed, "ticket", 0, "init")) for seed in (0, 1))
    for spec in params.unpruned:
        weights[spec.span] = torch.randn(spec.numel, generator=draw)
    weights[: params.mask_size][~mask] = 0
    written = tickets.Content(mask.numpy(), weights.numpy(), rewound.numpy())
    tickets.save(tmp_path / "t", params, written, model=name)
    content, header = tickets.read(tmp_path / "t", params)
    for found, expected in zip(vars(content).values(), vars(written).values(), strict=True):
        assert found.tobytes() == expected.tobytes()
    assert header["model"] == name
    tickets.save(tmp_path / "again", params, content, model=name)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "t").read_bytes()


@pytest.mark.whole
def test_the_module_computes_what_the_engines_do(finished: Run, digits: Resident) -> None:
    record = finished(*FLAGS)
    content, _ = tickets.read(cell(record, 1), LENET.params)
    x, _ = digits.test()[0]
    ours = Network(LENET, torch.from_numpy(content.weights)[None], x.shape[2]).forward(x)[0].T
    with torch.no_grad():
        theirs = tickets.load(cell(record, 1)).trained()(x[0].T)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.whole
def test_without_level_0_beside_it_a_ticket_cannot_be_rewound(finished: Run, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    shutil.copy(cell(finished(*FLAGS), 2), alone)
    ticket = tickets.load(alone)
    assert ticket.trained().fc1.weight.shape == (300, 784)
    with pytest.raises(SparselthError, match="level 0's file"):
        ticket.rewound()


def rewritten(file: Path, change: Callable[[dict[str, np.ndarray], dict[str, object]], None]) -> None:
    """Change arrays and header of a ticket file."""
    arrays, header = load_file(file), load_arrays(file)[1]
    change(arrays, header)
    save_file(arrays, file, metadata={"sparselth": json.dumps(header)})


@pytest.mark.whole
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, h: a.pop("kept/fc2.weight"), "has no kept/fc2.weight"),
        (lambda a, h: a.pop("bias/fc3.bias"), "has no bias/fc3.bias"),
        (lambda a, h: a.update({"kept/fc1.weight": a["kept/fc1.weight"][:-1]}), "does not fit the network"),
        (lambda a, h: a.update({"mask/fc1.weight": a["mask/fc1.weight"][:, :-1]}), "does not fit"),
        (lambda a, h: h.update(model="lenet5"), "has no mask/conv1.weight"),
        (lambda a, h: h.update(model="lenet6"), "unknown model 'lenet6': did you mean 'lenet5'"),
        (lambda a, h: h.update(schema="other/1"), "expected a ticket, sparselth.cell/1, found 'other/1'"),
    ],
    ids=["weights", "bias", "count", "bits", "model", "unknown", "schema"],
)
def test_what_is_no_ticket_says_so(
    finished: Run, change: Callable[[dict[str, np.ndarray], dict[str, object]], None], message: str
) -> None:
    file = cell(finished(*FLAGS), 1)
    rewritten(file, change)
    with pytest.raises(SparselthError, match=message):
        tickets.load(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SparselthError, match="no such file"):
        tickets.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("a pickle, perhaps")
    with pytest.raises(SparselthError, match="cannot be read"):
        tickets.load(tmp_path / "text")


# ---- files that no run wrote: a small network, made-up numbers

SMALL = get_model("lenet-300-100@0.02")
PARAMS = SMALL.params


def made_up(seed: int, rewound: bool = False) -> tickets.Content:
    """A mask, weights under it and, of level 0, weights of the rewind step, as no training leaves them."""
    draw = np.random.default_rng(seed)
    mask = PARAMS.full_mask().numpy() & (draw.random(PARAMS.mask_size) < 0.4)
    weights, start = np.zeros((2, PARAMS.size), np.float32)
    for spec in PARAMS.all:
        weights[spec.span], start[spec.span] = draw.normal(size=(2, spec.numel))
    weights[: len(mask)][~mask] = 0
    return tickets.Content(mask, weights, start if rewound else None)


def put(
    folder: Path, key: str, seed: int, rewound: bool = False, **where: Any
) -> tuple[Path, tickets.Content]:
    file, content = folder / f"{key}.safetensors", made_up(seed, rewound)
    tickets.save(file, PARAMS, content, **{"model": SMALL.name, "cell": key} | where)
    return file, content


def same(a: tickets.Content, b: tickets.Content) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_a_file_holds_what_its_table_says(tmp_path: Path) -> None:
    content = made_up(1, rewound=True)
    found, sparse_ = tickets.arrays(PARAMS, content, dense=True), tickets.arrays(PARAMS, content)
    masks = {f"mask/{s.name}" for s in PARAMS.weights}
    assert set(sparse_) - set(found) == masks
    assert {name.split("/")[0] for name in found} == {"kept", "bias", "rewind"}
    for spec in PARAMS.weights:
        (n, k), mask = spec.matrix, content.mask[spec.span]
        assert sparse_[f"mask/{spec.name}"].shape == (n, -(-k // 8))
        bits = np.unpackbits(sparse_[f"mask/{spec.name}"], axis=1, bitorder="little")[:, :k]
        assert np.array_equal(bits.ravel(), mask)
        assert np.array_equal(found[f"kept/{spec.name}"], content.weights[spec.span][mask])
    for spec in PARAMS.unpruned:
        assert np.array_equal(found[f"bias/{spec.name}"], content.weights[spec.span])
    assert content.rewound is not None
    for spec in PARAMS.all:
        assert found[f"rewind/{spec.name}"].shape == spec.shape
        assert np.array_equal(found[f"rewind/{spec.name}"].ravel(), content.rewound[spec.span])
    file, _ = put(tmp_path, "seed3-ticket-00", 1, True, dataset="x", config="0", rewind_step=4)
    assert tickets.load(file).header == {
        "schema": "sparselth.cell/1", "model": SMALL.name, "cell": "seed3-ticket-00", "dataset": "x",
        "config": "0", "rewind_step": 4, "shapes": {s.name: [*s.shape] for s in PARAMS.weights},
    }  # fmt: skip


@pytest.mark.parametrize("key", ["seed3-ticket-07", "seed3-random-mask-07", "seed3-reinit-07.2"])
def test_a_ticket_goes_back_to_its_seed_s_level_0(key: str, tmp_path: Path) -> None:
    file, content = put(tmp_path, key, 2)
    with pytest.raises(SparselthError, match=f"^{key}: the weights of the rewind step lie in level 0's file"):
        tickets.load(file).rewound()
    other, _ = put(tmp_path, "seed13-ticket-00", 3, True)
    other.rename(tmp_path / "ticket-00.safetensors")
    put(tmp_path, "seed33-ticket-00", 4, True)
    assert tickets.load(file).start is None
    first, dense = put(tmp_path, "seed3-ticket-00", 5, True)
    ticket = tickets.load(file)
    assert ticket.model is SMALL
    assert same(ticket.content, content)
    assert ticket.start is not None
    assert dense.rewound is not None
    assert np.array_equal(ticket.start, dense.rewound)
    assert ticket.weights_remaining == content.mask.sum() / PARAMS.prunable
    before = ticket.start.copy()
    for network, weights in ((ticket.trained(), content.weights), (ticket.rewound(), before)):
        for spec, (name, tensor) in zip(PARAMS.all, named(network), strict=True):
            expected = torch.from_numpy(weights[spec.span].reshape(spec.shape))
            if spec in PARAMS.weights:
                assert ticket.masks[spec.name].dtype == torch.bool
                expected = expected * ticket.masks[spec.name]
            assert tensor.equal(expected), name
    assert np.array_equal(ticket.start, before)  # a copy is what is cut
    for spec in PARAMS.weights:
        mask = content.mask[spec.span].reshape(spec.matrix)
        assert np.array_equal(tickets.read_mask(file, spec), mask)
        assert np.array_equal(ticket.masks[spec.name].numpy(), mask.reshape(spec.shape))
    own = tickets.load(first)
    assert own.start is not None
    assert np.array_equal(own.start, dense.rewound)
    (tmp_path / "alone").mkdir()
    alone = tickets.load(shutil.copy(first, tmp_path / "alone" / "mine.safetensors")).start
    assert alone is not None
    assert np.array_equal(alone, dense.rewound)
    first.write_bytes(array_bytes({}, {"schema": "other/1", "cell": "seed3-ticket-00"}))
    assert tickets.load(file).start is None


def named(network: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Weights, then biases, as Params has them."""
    some = [(name, p.detach()) for name, p in network.named_parameters()]
    return [p for p in some if "weight" in p[0]] + [p for p in some if "bias" in p[0]]


def test_a_file_without_a_cell_is_rewound_from_the_one_level_0_beside_it(tmp_path: Path) -> None:
    file, _ = put(tmp_path, "mine", 2)
    content, header = tickets.read(file, PARAMS)
    assert same(content, made_up(2))
    assert header["cell"] == "mine"
    anonymous = tmp_path / "any.safetensors"
    tickets.save(anonymous, PARAMS, made_up(3), model=SMALL.name)
    assert same(tickets.read(anonymous, PARAMS)[0], made_up(3))
    with pytest.raises(SparselthError, match=r"^ticket: the weights of the rewind step"):
        tickets.load(anonymous).rewound()
    _, first = put(tmp_path, "ticket-00", 4, True)
    start = tickets.load(anonymous).start
    assert start is not None
    assert first.rewound is not None
    assert np.array_equal(start, first.rewound)
    file.rename(tmp_path / "yours.safetensors")
    with pytest.raises(SparselthError, match=r"yours.safetensors: is the file of mine$"):
        tickets.read(tmp_path / "yours.safetensors", PARAMS)


def test_a_strong_ticket_is_its_own_start(tmp_path: Path) -> None:
    frozen, file = METHODS["signed"].frozen(5, keep=0.4), tmp_path / "seed5-ticket-00.safetensors"
    mask = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, PARAMS.mask_size))
    mask *= PARAMS.full_mask()
    flat = METHODS["signed"].start(frozen, PARAMS, torch.Generator())
    content = strong_tickets.Content.of(PARAMS, frozen, mask, None, flat)
    strong_tickets.save(file, PARAMS, content, model=SMALL.name, cell=file.stem)
    ticket = tickets.load(file)
    assert (ticket.model, ticket.header["cell"]) == (SMALL, file.stem)
    assert np.array_equal(ticket.content.mask, mask.numpy() != 0)
    assert np.array_equal(ticket.content.weights, content.weights(PARAMS).numpy())
    assert ticket.start is not None
    assert np.array_equal(ticket.start, ticket.content.weights)
    found = strong_tickets.arrays(PARAMS, content)
    other = tmp_path / "other.safetensors"
    other.write_bytes(array_bytes({"mask/fc1.weight": found["mask/fc1.weight"]}, ticket.header))
    with pytest.raises(SparselthError, match=rf"^{other}: is no strong ticket of the network"):
        tickets.load(other)
    later, _ = put(tmp_path, "seed5-ticket-01", 2)
    assert tickets.load(later).start is None  # a strong ticket is nobody's level 0


def test_a_file_larger_than_its_network_s_can_be_is_none(tmp_path: Path) -> None:
    """12 bytes a parameter, and a megabyte for the header."""
    most = 12 * PARAMS.size + (1 << 20)
    file, _ = put(tmp_path, "seed3-ticket-00", 1, True, more="x" * most)
    for call in (tickets.load, lambda file: tickets.read(file, PARAMS)):
        with pytest.raises(SparselthError, match=f"larger than {most:,} bytes"):
            call(file)
    frozen = METHODS["edge-popup"].frozen(5)
    flat = METHODS["edge-popup"].start(frozen, PARAMS, torch.Generator())
    strong = strong_tickets.Content.of(PARAMS, frozen, PARAMS.full_mask(), None, flat)
    strong_tickets.save(file, PARAMS, strong, model=SMALL.name, more="x" * most)
    with pytest.raises(SparselthError, match=f"larger than {strong_tickets.most(PARAMS):,} bytes"):
        tickets.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, h: a.pop("mask/fc1.weight"), "has no mask/fc1.weight; expected the ticket"),
        (lambda a, h: a.pop("rewind/fc1.bias"), "has no rewind/fc1.bias"),
        (lambda a, h: a.update({"bias/fc1.bias": a["bias/fc1.bias"][1:]}), ": expected float32 [6]"),
        (lambda a, h: a.update({"bias/fc1.bias": a["bias/fc1.bias"].astype("f8")}), "found float64 [6])"),
        (lambda a, h: a.update({"kept/fc2.weight": a["kept/fc2.weight"].astype("f2")}), "found float16 ["),
        (lambda a, h: a.update({"rewind/fc2.weight": a["rewind/fc2.weight"].ravel()}), "t32 [2, 6], found"),
        (lambda a, h: a.update({"rewind/fc2.bias": a["rewind/fc2.bias"].astype("i4")}), "found int32 [2]"),
        (lambda a, h: a.update({"mask/fc1.weight": a["mask/fc1.weight"].view("i1")}), "uint8 [6, 98], fo"),
        (lambda a, h: a.update({"mask/fc1.weight": a["mask/fc1.weight"].T.copy()}), "found uint8 [98, 6]"),
        (lambda a, h: h.update(model=3), "expected a ticket, sparselth.cell/1, found 'sparselth.cell/1'"),
        (lambda a, h: h.pop("schema"), "expected a ticket, sparselth.cell/1, found None"),
    ],
)  # fmt: skip
def test_arrays_of_another_type_or_shape_are_no_ticket(
    change: Callable[[dict[str, np.ndarray], dict[str, object]], object], message: str, tmp_path: Path
) -> None:
    file, _ = put(tmp_path, "seed3-ticket-00", 1, True)
    rewritten(file, change)
    with pytest.raises(SparselthError) as raised:
        tickets.load(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)
    calls: list[Callable[[], object]] = [lambda: tickets.read(file, PARAMS)] * ("expected a" not in message)
    calls += [lambda: tickets.read_mask(file, PARAMS.weights[0])] * ("mask/fc1" in message or "98" in message)
    for call in calls:
        with pytest.raises(SparselthError) as again:
            call()
        assert str(again.value) == str(raised.value)


def test_what_is_not_there_is_no_ticket(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "gone", str(tmp_path / "gone")):
        with pytest.raises(SparselthError, match="no such file; tickets lie in the folder cells of a run"):
            tickets.load(file)
