"""The file of a strong ticket: small, exact, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sparselth import strong_tickets, tickets
from sparselth.errors import SparselthError
from sparselth.files import array_bytes, load_arrays
from sparselth.frozen import LAWS, METHODS, Frozen, effective, mask_of
from sparselth.models import Model, get_model
from sparselth.strong_tickets import Content

LENET, SMALL, RESNET = (get_model(name) for name in ("lenet-300-100", "lenet-300-100@0.1", "resnet20@0.5"))
WHERE = {"dataset": "mnist", "config": "0" * 8, "rewind_step": 0}


def scored(model: Model, frozen: Frozen) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores [P] with running statistics as training may leave them, and redraws [M]."""
    draw = torch.Generator().manual_seed(3)
    method, params = METHODS[frozen.method], model.params
    scores = method.start(frozen, params, draw)
    scores[: params.mask_size] += 0.1 * torch.randn(params.mask_size, generator=draw)
    for spec in params.statistics:
        scores[spec.span] = torch.rand(spec.numel, generator=draw) + 0.5
    if not method.has_generations:
        return scores, None
    redraws = torch.zeros(params.mask_size, dtype=torch.int32)
    for spec in params.weights:
        if frozen.method == "iterand":
            redraws[spec.span] = torch.randint(0, 700, (spec.numel,), generator=draw, dtype=torch.int32)
        else:
            there = torch.randint(0, spec.numel, (spec.numel,), generator=draw) - torch.arange(spec.numel)
            redraws[spec.span] = (there * (torch.rand(spec.numel, generator=draw) < 0.3)).int()
    return scores, redraws


def written(file: Path, model: Model, frozen: Frozen) -> torch.Tensor:
    """The network whose ticket the file is, as training computed with it."""
    scores, redraws = scored(model, frozen)
    content = Content.of(model.params, frozen, mask_of(frozen, model.params, scores), redraws, scores)
    strong_tickets.save(file, model.params, content, model=model.name, cell=file.stem, **WHERE)
    return effective(frozen, model.params, scores, redraws)


@pytest.mark.parametrize(
    ("name", "law"),
    [*((name, METHODS[name].law) for name in METHODS), *(("recycle", law) for law in LAWS[1:])],
)
def test_a_file_is_the_network_bit_for_bit(name: str, law: str, tmp_path: Path) -> None:
    file = tmp_path / "seed5-ticket-00.safetensors"
    model = get_model("lenet-300-100@0.1")
    network = written(file, model, METHODS[name].frozen(5, law=law, keep=0.3))
    ticket = tickets.load(file)
    np.testing.assert_array_equal(ticket.content.weights, network.numpy())
    assert ticket.model is model
    assert ticket.weights_remaining == np.count_nonzero(network[: model.params.mask_size]) / 23_920
    for net in (ticket.trained(), ticket.rewound()):
        for spec, (_, weight) in zip(
            model.weights, [p for p in net.named_parameters() if p[0].endswith("weight")], strict=True
        ):
            assert torch.equal(weight.flatten(), network[spec.span])
            assert torch.equal(weight != 0, ticket.masks[spec.name])
    before = file.read_bytes()
    written(file, model, METHODS[name].frozen(5, law=law, keep=0.3))
    assert file.read_bytes() == before


def test_batch_norms_come_back(tmp_path: Path) -> None:
    file = tmp_path / "seed1-ticket-00.safetensors"
    network = written(file, RESNET, METHODS["edge-popup"].frozen(1))
    np.testing.assert_array_equal(tickets.load(file).content.weights, network.numpy())
    norms = 4 * sum(spec.numel for spec in RESNET.params.statistics)
    assert file.stat().st_size <= RESNET.params.prunable / 8 + norms + 6144


@pytest.mark.parametrize(
    ("model", "keep"), [*(("lenet-300-100", keep) for keep in (0.02, 0.3, 0.5, 0.9)), ("conv6@0.5", 0.5)]
)
def test_a_bit_a_weight_and_4_kb_at_most(model: str, keep: float, tmp_path: Path) -> None:
    file, network = tmp_path / "seed0-ticket-00.safetensors", get_model(model)
    written(file, network, METHODS["edge-popup"].frozen(0, keep=keep))
    weights, size = network.params.prunable, file.stat().st_size
    assert size <= weights / 8 + 4096
    share = -(keep * np.log2(keep) + (1 - keep) * np.log2(1 - keep))
    assert size <= 1.05 * share * weights / 8 + 4096


def test_a_recycled_sign_takes_a_bit_at_most(tmp_path: Path) -> None:
    """Of weights of one magnitude only the sign can be another, wherever it is from."""
    file = tmp_path / "seed0-ticket-00.safetensors"
    written(file, LENET, METHODS["recycle"].frozen(0))
    found, _ = load_arrays(file)
    redraws = sum(array.size for name, array in found.items() if name.startswith("redraws/"))
    kept = 266_200 / 2
    share = 0.15  # a third was recycled, from one of the other sign every second time
    assert redraws < 1.05 * kept / 8 * -(share * np.log2(share) + (1 - share) * np.log2(1 - share))


def test_what_a_dropped_weight_was_is_not_in_the_file(tmp_path: Path) -> None:
    frozen = METHODS["iterand"].frozen(0)
    scores, redraws = scored(SMALL, frozen)
    assert redraws is not None
    mask = mask_of(frozen, SMALL.params, scores)
    content = Content.of(SMALL.params, frozen, mask, redraws, scores)
    other = Content.of(SMALL.params, frozen, mask, torch.where(mask, redraws, 77), scores)
    for name, array in strong_tickets.arrays(SMALL.params, content).items():
        np.testing.assert_array_equal(array, strong_tickets.arrays(SMALL.params, other)[name])


def test_what_is_no_strong_ticket_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "seed0-ticket-00.safetensors"
    written(file, SMALL, METHODS["iterand"].frozen(0))
    arrays, header = load_arrays(file)

    def refused(**changes: object) -> None:
        changed = {name: changes.pop(name, array) for name, array in arrays.items()}
        file.write_bytes(array_bytes(changed, header | changes))  # type: ignore[arg-type]
        with pytest.raises(SparselthError, match=str(file.name)) as told:
            tickets.load(file)
        assert "\n" not in str(told.value)

    some = arrays["mask/fc2.weight"]
    refused(**{"mask/fc2.weight": some[:-1]})
    refused(**{"mask/fc2.weight": some.astype(np.float32)})
    refused(**{"mask/fc2.weight": np.zeros((1 << 20, 4), np.uint8)})
    refused(**{"redraws/fc2.weight/0": some[:7]})
    refused(model="lenet-300-100@0.5")
    frozen = header["frozen"]
    refused(frozen=frozen | {"method": "edge-popdown"})
    refused(frozen=frozen | {"keep": 0.0})
    refused(frozen=frozen | {"more": 1})
    refused(frozen=frozen | {"seed": 1 << 64})
    refused(frozen=frozen | {"seed": 1.5})
    refused(frozen={})
    refused(frozen=[])
    written(file, SMALL, METHODS["edge-popup"].frozen(0))
    found = load_file(file)
    found["mask/fc3.weight"][3] ^= 1
    save_file(found, file, {"sparselth": "{}"})
    with pytest.raises(SparselthError):
        tickets.load(file)
