from __future__ import annotations

import copy
import doctest
import gc
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor, nn

import sparselth.masks
from sparselth.masks import MaskError, Masks, by_parameter, pack, unpack


@given(npst.arrays(bool, npst.array_shapes(min_dims=1, max_dims=3, max_side=40)))
def test_packing_round_trips(mask: np.ndarray) -> None:
    bits = pack(mask)
    assert bits.dtype == np.uint8
    assert bits.shape == (*mask.shape[:-1], -(-mask.shape[-1] // 8))
    found = unpack(bits, mask.shape[-1])
    assert found.dtype == bool
    np.testing.assert_array_equal(found, mask)


@given(st.integers(0, 7))
def test_bits_are_little_endian_along_the_last_axis(i: int) -> None:
    mask = np.zeros(8, bool)
    mask[i] = True
    assert pack(mask)[0] == 1 << i


def test_bits_behind_the_last_weight_are_zero() -> None:
    assert pack(np.ones((3, 5), bool)).tolist() == [[31]] * 3


def test_a_mask_takes_one_bit_a_weight() -> None:
    # a peer's mask file takes int32 per weight: 1,066,758 bytes for LeNet-300-100
    layers = [(300, 784), (100, 300), (10, 100)]
    assert sum(pack(np.ones(shape, bool)).nbytes for shape in layers) <= 33_275 + 8 * 410 // 8


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match="expected 2 bytes a row for 9 weights, got 1"):
        unpack(np.zeros((4, 3, 1), np.uint8), 9)


def tied() -> nn.Sequential:
    """Two linear layers, the third of the second's weight."""
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    net[3].weight = net[2].weight
    return net


def drawn(net: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(p.shape) < 0.4 for name, p in net.named_parameters() if p.ndim > 1}


def test_masks_of_every_kind_mean_the_same() -> None:
    net = tied()
    by_name = drawn(net)
    right = {net.get_parameter(name): mask for name, mask in by_name.items()}
    kinds: list[Any] = [
        by_name,
        Masks(by_name, net),
        right,
        {name: mask.float() for name, mask in by_name.items()},
        {name: mask.long() for name, mask in by_name.items()},
        {name.replace("2.", "3."): mask for name, mask in by_name.items()},  # the other name of a tied weight
        by_name | {"3.weight": by_name["2.weight"]},
    ]
    for masks in kinds:
        for params in (
            net,
            nn.DataParallel(net),
            torch.compile(net),
            net.named_parameters(remove_duplicate=False),
        ):
            found = by_parameter(params, masks)
            assert found.keys() == right.keys()
            assert all(m.dtype == torch.bool and torch.equal(m, right[p]) for p, m in found.items())
    for masks in (Masks(by_name, net), Masks(right, net), Masks(by_name, nn.DataParallel(net)), right):
        assert by_parameter(net.parameters(), masks).keys() == right.keys()  # type: ignore[arg-type]
    assert [*Masks(dict(reversed(right.items())), net)] == ["0.weight", "2.weight"]


def test_a_part_of_the_model_takes_its_part_of_the_masks() -> None:
    net = tied()
    masks = Masks(drawn(net), net)
    assert [*by_parameter(net[0].parameters(), masks)] == [net[0].weight]
    assert [*by_parameter(nn.DataParallel(net[0]).named_parameters(), masks)] == [net[0].weight]
    assert by_parameter([net[0].bias], masks) == {}
    with pytest.raises(MaskError, match="made for a Sequential none of whose parameters"):
        by_parameter(tied().parameters(), masks)
    assert len(by_parameter(tied().named_parameters(), masks)) == 2  # by name they mean any model


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "dict", "along", "attribute"])
def test_copies_are_equal_and_know_their_model(way: str) -> None:
    net = tied()
    masks = Masks(drawn(net), net)
    twin, model = masks, net
    if way == "copy":
        twin = copy.copy(masks)
        model = None
    elif way == "deepcopy":
        twin = copy.deepcopy(masks)
    elif way == "pickle":
        twin, model = pickle.loads(pickle.dumps(masks)), None
    elif way == "dict":
        file = io.BytesIO()
        torch.save(dict(masks), file)
        file.seek(0)
        twin, model = Masks(torch.load(file, weights_only=True)), None
    elif way == "along":
        model, twin = copy.deepcopy((net, masks))
    else:
        net.masks = masks  # type: ignore[assignment]
        model = copy.deepcopy(net)
        twin = model.masks  # type: ignore[assignment]
    assert twin == masks
    assert twin.model is model
    again = Masks(twin, net)
    assert again.model is net
    if way in ("deepcopy", "along", "attribute"):
        name = next(iter(twin))
        twin[name].logical_not_()
        assert twin != masks
    if model is None:
        with pytest.raises(
            MaskError, match=r"'0.weight': parameters without names; .* Masks\(masks, model\)"
        ):
            by_parameter(net.parameters(), twin)


def test_masks_do_not_keep_a_model_alive() -> None:
    net = tied()
    masks = Masks(drawn(net), net)
    del net
    gc.collect()
    assert masks.model is None


def test_masks_say_how_many_they_keep() -> None:
    net = tied()
    masks = Masks({"0.weight": torch.arange(24).view(4, 6) < 6, "2.weight": torch.ones(4, 4)}, net)
    assert (masks.kept, masks.size, masks.sparsity) == (22, 40, 1 - 22 / 40)
    assert repr(masks) == "<Masks of 2 layers: 22 of 40 weights kept, 55.0 %>"
    assert str(masks).splitlines() == [
        "0.weight  [4, 6]   6 kept   25.0 %",
        "2.weight  [4, 4]  16 kept  100.0 %",
        "all       40      22 kept   55.0 %",
    ]
    assert Masks({}).sparsity == 0
    assert masks != dict(masks)


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"0.wieght": torch.ones(4, 6)}, "mask '0.wieght': unknown parameter .* did you mean '0.weight'"),
        (
            {"0.weight": torch.ones(6, 4)},
            r"mask of 0.weight: expected a mask bool \[4, 6\], got .* \[6, 4\]$",
        ),
        ({"0.weight": torch.full((4, 6), 0.5)}, r"0.weight: .* or 0s and 1s, got torch.float32 \[4, 6\]"),
        ({"0.weight": torch.full((4, 6), torch.nan)}, "with other numbers"),
        ({"0.weight": torch.ones(4, 6).to_sparse()}, "torch.sparse_coo"),
        ({"0.weight": np.ones((4, 6))}, "got a ndarray; torch.as_tensor"),
        (
            {nn.Parameter(torch.ones(4, 6)): torch.ones(4, 6)},
            "a parameter of this optimizer or model, got a Parameter",
        ),
        ({"2.weight": torch.ones(4, 4), "3.weight": torch.zeros(4, 4)}, r"2.weight and 3.weight: .*tied"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(masks: Any, says: str) -> None:
    for call in (by_parameter, lambda net, masks: Masks(masks, net)):
        with pytest.raises(MaskError, match=says) as error:
            call(tied(), masks)
        assert "\n" not in str(error.value)
    with pytest.raises(MaskError, match="expected names, got a"):
        Masks({nn.Parameter(torch.ones(4, 6)): torch.ones(4, 6)})


def test_the_example_runs() -> None:
    found = doctest.testmod(sparselth.masks)
    assert found.attempted > 3
    assert not found.failed
