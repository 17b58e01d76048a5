"""Compaction is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conversions import (
    close,
    dense,
    random_masks,
    weights,
)
from sparselth import sparse


@settings(max_examples=40)
@given(st.data())
def test_compaction_is_exact_with_planted_dead_parts(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1 << 16), "seed")
    torch.manual_seed(seed)
    pad = data.draw(st.integers(0, 1), "padding")
    c, f1, f2, hidden = (data.draw(st.integers(1, 6), name) for name in ("c", "f1", "f2", "hidden"))
    pool = data.draw(
        st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1)]), "pool"
    ).eval()
    size = 8
    convs = nn.Sequential(nn.Conv2d(c, f1, 3, padding=pad), nn.ReLU(), pool, nn.Conv2d(f1, f2, 2), nn.ReLU())
    flat = convs(torch.zeros(1, c, size, size))[0].numel()
    bias = data.draw(st.booleans(), "bias")
    model = nn.Sequential(
        convs, nn.Flatten(), nn.Linear(flat, hidden, bias), nn.ReLU(), nn.Linear(hidden, 3, bias)
    ).eval()
    masks = random_masks(model, data.draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]), "density"), seed)
    for name, mask in masks.items():
        for axis in (0, 1):
            dead = data.draw(st.sets(st.integers(0, mask.shape[axis] - 1), max_size=3), f"dead {name} {axis}")
            mask.index_fill_(axis, torch.tensor(sorted(dead), dtype=torch.long), False)
    x = torch.randn(3, c, size, size)
    found = sparse.compact(model, masks, x)
    close(found.model(x), dense(model, masks, x))
    assert not any(module.training for module in found.model.modules())


def test_unread_and_constant_units_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].bias.fill_(0.5)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights(model).items()}
    masks["0.weight"][1] = False  # a constant
    masks["2.weight"][:, 3] = False  # nobody reads
    masks["2.weight"][2, [0, 2, 4]] = False  # reads the constant alone, and is one
    masks["0.weight"][:, :4] = False  # dead inputs
    x = torch.randn(7, 6)
    found = sparse.compact(model, masks, x)
    assert [(u.name, u.inputs, u.outputs) for u in found.units] == [
        ("0", (6, 2), (5, 3)),
        ("2", (5, 3), (4, 3)),
        ("4", (4, 3), (3, 3)),
    ]
    close(found.model(x), dense(model, masks, x))


@pytest.mark.parametrize(("padding", "mode", "left"), [(1, "zeros", 4), (0, "zeros", 3), (1, "circular", 3)])
def test_a_constant_channel_is_kept_where_the_border_sees_it(padding: int, mode: str, left: int) -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(5, 3, 3, padding=padding, padding_mode=mode)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), second).eval()
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights(model).items()}
    masks["0.weight"][[1, 3]] = False
    with torch.no_grad():
        model[0].bias[1], model[0].bias[3] = 0.7, -0.7  # the second is 0 behind ReLU, border or not
    x = torch.randn(2, 2, 6, 6)
    found = sparse.compact(model, masks, x)
    assert found.units[0].outputs == (5, left)
    close(found.model(x), dense(model, masks, x))
