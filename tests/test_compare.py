"""What two tickets have in common, beside counts by hand and random masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparselth import chance
from sparselth.compare import Overlap, differences, layers
from sparselth.errors import SparselthError
from sparselth.params import TensorSpec
from sparselth.patterns import get_pattern
from sparselth.report import ticket_tables
from sparselth.tickets import Ticket, load_ticket, save_ticket


def ticket(file: Path, model: nn.Module, masks: dict[str, Tensor]) -> Ticket:
    return load_ticket(save_ticket(file, model, masks, model.state_dict()))


def test_layers_say_what_is_dead(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 2))
    line = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]])
    image = torch.zeros(3, 2, 2, 2)
    image[1, 0, 1, 1] = 1
    first, second = layers(ticket(tmp_path / "t", model, {"0.weight": line, "1.weight": image}))
    assert (first.name, first.shape, first.kept, first.size) == ("0.weight", (3, 4), 3, 12)
    assert (first.dead_units, first.dead_inputs, first.density) == (1, 2, 0.25)
    assert (second.dead_units, second.dead_inputs, second.kept) == (2, 1, 1)


def test_common_weights_and_values(tmp_path: Path) -> None:
    a, b = nn.Linear(4, 1), nn.Linear(4, 1)
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.weight[0, 1] += 1
        b.weight[0, 3] += 1  # pruned in a
        b.bias.add_(1)
    one = ticket(tmp_path / "a", a, {"weight": torch.tensor([[1, 1, 1, 0]])})
    two = ticket(tmp_path / "b", b, {"weight": torch.tensor([[0, 1, 1, 1]])})
    found = differences(one, two)
    (row,) = found.layers
    assert (row.size, row.kept, row.both, row.differ) == (4, (3, 3), 2, 1)
    assert row.by_chance == 9 / 4
    assert row.times_chance == 2 / (9 / 4)
    assert row.jaccard == 0.5
    assert found.others == ["bias"]
    assert found.total == Overlap("all", 4, (3, 3), 2, 1, row.by_chance, row.variance)
    same = differences(one, one)
    assert same.total.jaccard == 1
    assert same.total.differ == 0
    assert same.others == []


def row_of(one: Tensor, other: Tensor) -> Overlap:
    return Overlap.of("", one, other, 0)


def test_chance_is_that_of_random_masks() -> None:
    """Mean and variance of the common weights of 4,000 pairs of random masks."""
    n, a, b = 60, 12, 30
    draw = torch.Generator().manual_seed(0)
    orders = torch.rand(4000, 2, n, generator=draw).argsort(-1)
    masks = torch.stack([orders[:, 0] < a, orders[:, 1] < b], 1)
    common = masks.all(1).sum(1).double()
    row = row_of(*masks[0].view(2, 5, 12))
    assert abs(float(common.mean()) - row.by_chance) < 4 * (row.variance / 4000) ** 0.5
    assert float(common.var()) == pytest.approx(row.variance, rel=0.1)
    assert row.sigmas == pytest.approx((row.both - 6) / row.variance**0.5)
    none, whole = torch.zeros(5, 12, dtype=torch.bool), torch.ones(5, 12, dtype=torch.bool)
    for one, other in ((none, masks[0, 1]), (whole, masks[0, 1]), (whole, whole)):
        row = row_of(one.view(60), other.reshape(60))  # nothing is left to chance
        assert (row.sigmas, row.by_chance) == (0, int(other.sum()) if one is whole else 0)


@pytest.mark.parametrize("name", ["unit", "block:4", "2:4"])
def test_chance_of_masks_in_groups_is_that_of_groups(name: str) -> None:
    """Variance of the common weights of random pairs; that of single weights is a third to a 16th of it."""
    pattern, spec = get_pattern(name), TensorSpec("", (16, 8, 2, 2), 0)
    assert pattern is not None
    groups, draw = pattern.groups(spec), torch.Generator().manual_seed(0)
    first = pattern.pick(groups, torch.rand(512, generator=draw).double(), torch.ones(512) > 0, 256)
    masks = torch.stack([pattern.shuffle(groups, first, draw) for _ in range(2000)])
    common = (masks[::2] & masks[1::2]).sum(1).double()
    row = row_of(masks[0].view(spec.shape), masks[1].view(spec.shape))
    assert row.pattern == name
    assert abs(float(common.mean()) - row.by_chance) < 4 * (row.variance / 1000) ** 0.5
    assert float(common.var()) == pytest.approx(row.variance, rel=0.2)
    assert row.variance > 1.3 * chance.Overlap(0, 256, 256, 512).deviation ** 2
    single = masks[1][torch.randperm(512, generator=draw)]
    assert row_of(masks[0].view(spec.shape), single.view(spec.shape)).pattern == "unstructured"


def test_the_table_says_in_which_groups_chance_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    rows = torch.tensor([1, 0, 1, 0])[:, None].expand(4, 8)
    masks = {"0.weight": rows, "1.weight": torch.ones(4, 4)}
    one = ticket(tmp_path / "a", model, masks)
    two = ticket(tmp_path / "b", model, masks | {"0.weight": rows.flip(0)})
    found = differences(one, two)
    assert [row.pattern for row in found.layers] == ["unit", "unstructured"]
    assert found.layers[0].variance == pytest.approx(64 / 3)  # of two rows in four: 1 / 3 of a row
    text = ticket_tables.overlap(one, two, found)
    assert "by chance: of masks in whole units, as both are, of 0.weight" in " ".join(text.split())


def test_tickets_of_two_networks_are_refused(tmp_path: Path) -> None:
    one = ticket(tmp_path / "a", nn.Linear(4, 2), {"weight": torch.ones(2, 4)})
    other = nn.Linear(4, 3)
    two = ticket(tmp_path / "b", other, {"weight": torch.ones(3, 4)})
    with pytest.raises(
        SparselthError, match=r"weight has \[2, 4\] there, \[3, 4\] here; expected one network"
    ):
        differences(one, two)
    three = ticket(tmp_path / "c", other, {})
    with pytest.raises(SparselthError, match=r"weight has no mask there, \[3, 4\] here"):
        differences(three, two)
