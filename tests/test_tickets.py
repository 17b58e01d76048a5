"""Ticket files: what a run writes can be loaded by path, trained on and converted; what is none says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from sparselth import sparse, tickets
from sparselth.config import Cell
from sparselth.data.batches import Resident
from sparselth.engine.dense import Network, init_weights
from sparselth.errors import SparselthError
from sparselth.files import load_arrays
from sparselth.models import get_model
from sparselth.optim import MaskedAdam
from sparselth.runs import RunRecord, cell_path
from sparselth.streams import stream

Run = Callable[..., RunRecord]
FLAGS = "--levels", "2", "--seeds", "0", "--rewind", "30", "--arms", "ticket,random-mask"
LENET = get_model("lenet-300-100")


def cell(record: RunRecord, level: int, arm: str = "ticket") -> Path:
    return cell_path(record.path, Cell(0, arm, level))


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


def test_trained_is_the_network_whose_accuracy_was_recorded(finished: Run, digits: Resident) -> None:
    record = finished(*FLAGS)
    network = tickets.load(cell(record, 2)).trained().eval()
    right = 0
    with torch.no_grad():
        for x, y in digits.test():
            right += int((network(x[0].T).argmax(1) == y.flatten()).sum())
    point = next(p for p in record.points if (p["level"], p["arm"]) == (2, "ticket"))
    assert right / digits.n_test == point["final_accuracy"]


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


def test_the_module_computes_what_the_engines_do(finished: Run, digits: Resident) -> None:
    record = finished(*FLAGS)
    content, _ = tickets.read(cell(record, 1), LENET.params)
    x, _ = digits.test()[0]
    ours = Network(LENET, torch.from_numpy(content.weights)[None], x.shape[2]).forward(x)[0].T
    with torch.no_grad():
        theirs = tickets.load(cell(record, 1)).trained()(x[0].T)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


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
