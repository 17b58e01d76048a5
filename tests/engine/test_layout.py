"""The compressed domain holds what the dense buffers hold, and leaves out only what cannot matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselth.engine.dense import Network, init_weights
from sparselth.engine.layout import Layout, live_units
from sparselth.models import MODELS, get_model
from sparselth.streams import stream

NAMES = ["lenet-300-100", "lenet5"]


def start(name: str, keep: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [1, P] and a random mask [M]; the fewer are kept, the more units are dead."""
    model = get_model(name)
    flat = init_weights(model, stream(seed, "ticket", 0, "init"))[None] + 0.01
    chance = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(seed))
    mask = model.params.full_mask() & (chance < keep)
    flat[:, : model.params.mask_size] *= mask
    flat *= model.params.full_mask().new_ones(model.params.size).logical_and(_real(name))
    return flat, mask


def _real(name: str) -> torch.Tensor:
    """Where numbers are, in [P]: not in the gaps between tensors."""
    model = get_model(name)
    found = torch.zeros(model.params.size, dtype=torch.bool)
    for spec in model.weights + model.biases:
        found[spec.span] = True
    return found


@given(
    st.sampled_from(NAMES),
    st.sampled_from([1.0, 0.3, 0.05, 0.004, 0.0]),
    st.integers(0, 10**6),
    st.booleans(),
    st.data(),
)
def test_expand_undoes_compress(name: str, keep: float, seed: int, decays: bool, data: st.DataObject) -> None:
    model = get_model(name)
    names = [spec.name for spec in model.weights]
    compressed = frozenset(data.draw(st.lists(st.sampled_from(names), unique=True)))
    flat, mask = start(name, keep, seed)
    layout = Layout(model, mask, compressed, decays)
    layout.leave_out(flat)
    buffer = layout.compress(flat)
    assert buffer.shape == (1, layout.size)
    assert torch.equal(layout.expand(buffer), flat)
    if decays:
        assert torch.equal(layout.expand(buffer, weights=False), flat)
    trained = sum(int(layout.trained(spec).sum()) for spec in model.weights if spec.name in compressed)
    dense = sum(spec.numel for spec in model.weights if spec.name not in compressed)
    assert sum(layout.spans[spec.name][1] for spec in model.weights) == trained + dense
    inside = layout.mask(mask)
    for spec in model.weights:
        kept = layout.view(inside, spec)
        expected = mask[spec.span]
        assert kept.all() if spec.name in compressed else torch.equal(kept, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.03, 0.01])
def test_what_is_left_out_changes_no_logit(name: str, keep: float) -> None:
    model = get_model(name)
    flat, mask = start(name, keep)
    every = frozenset(spec.name for spec in model.weights)
    layout = Layout(model, mask, every)
    bare = layout.expand(layout.compress(flat), weights=False)
    assert not torch.equal(bare, flat)  # something was left out
    x = torch.randn(1, 784, 50, generator=torch.Generator().manual_seed(1))
    expected = Network(model, flat, 50).forward(x)
    unread = x.clone()
    unread[0, ~layout.inputs] = float("nan") if len(model.weights[0].shape) == 2 else 0.0
    assert torch.equal(Network(model, bare, 50).forward(x), expected)
    units = live_units(model, mask, every)
    assert all(live.any() for live in units.values())
    if name == "lenet-300-100":
        assert not units["fc1.weight"].all()
        assert not layout.inputs.all()


def test_a_dense_layer_lets_go_of_nothing() -> None:
    model = get_model("lenet-300-100")
    mask = torch.zeros(model.params.mask_size, dtype=torch.bool)
    assert not live_units(model, mask, frozenset(s.name for s in model.weights))["fc2.weight"].any()
    units = live_units(model, mask, frozenset())
    assert all(units[spec.name].all() for spec in model.weights)


@pytest.mark.parametrize("name", [name for name in sorted(MODELS) if MODELS[name].is_chain])
def test_all_of_a_dense_network_is_live(name: str) -> None:
    model = get_model(name)
    every = frozenset(spec.name for spec in model.weights)
    assert all(live.all() for live in live_units(model, model.params.full_mask(), every).values())
