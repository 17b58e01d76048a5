"""Params: where the tensors of a small network lie, by hand; masks over them, counted and packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparselth.models import MODELS
from sparselth.params import Params, TensorSpec, aligned, matrix

# 3 filters of 2 x 3 x 3 and 5 x 4 weights, as many biases, one running mean
FILTERS, HEAD = TensorSpec("conv.weight", (3, 2, 3, 3), 0), TensorSpec("fc.weight", (5, 4), 64)
BIASES = TensorSpec("conv.bias", (3,), 96), TensorSpec("fc.bias", (5,), 112)
MEAN = TensorSpec("norm.mean", (3,), 128)
PARAMS = Params((FILTERS, HEAD), BIASES, (MEAN,))


@pytest.mark.parametrize(("n", "takes"), [(0, 0), (1, 16), (15, 16), (16, 16), (17, 32), (54, 64)])
def test_a_tensor_takes_whole_lines_of_sixteen_floats(n: int, takes: int) -> None:
    assert aligned(n) == takes


def test_a_weight_is_a_matrix_of_outputs_and_of_all_that_feeds_one() -> None:
    assert (FILTERS.numel, FILTERS.matrix, FILTERS.span, FILTERS.end) == (54, (3, 18), slice(0, 54), 64)
    assert (HEAD.numel, HEAD.matrix, HEAD.span, HEAD.end) == (20, (5, 4), slice(64, 84), 96)
    assert (MEAN.numel, MEAN.span, MEAN.end) == (3, slice(128, 131), 144)


def test_sizes_of_a_buffer_count_what_lies_in_front() -> None:
    params, one = replace(PARAMS), Params((FILTERS,))
    assert (params.prunable, params.mask_size, params.trained_size, params.size) == (74, 96, 128, 144)
    assert (one.prunable, one.mask_size, one.trained_size, one.size) == (54, 64, 64, 64)
    assert PARAMS.unpruned == (*BIASES, MEAN)
    assert PARAMS.all == (FILTERS, HEAD, *BIASES, MEAN)
    bare = Params((FILTERS, HEAD))
    assert (bare.mask_size, bare.trained_size, bare.size) == (96, 96, 96)
    assert Params((FILTERS, HEAD), (), (MEAN,)).trained_size == 96


def test_views_are_parts_of_the_buffer() -> None:
    flat = torch.arange(2.0 * 144).view(2, 144)
    views = PARAMS.views(flat)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "conv.weight": (2, 3, 18),
        "fc.weight": (2, 5, 4),
        "conv.bias": (2, 3, 1),
        "fc.bias": (2, 5, 1),
        "norm.mean": (2, 3, 1),
    }
    assert views["fc.weight"][1, 2, 3] == 144 + 64 + 11
    assert views["norm.mean"][0, 2, 0] == 130
    views["fc.weight"].zero_()
    assert not flat[:, HEAD.span].any()
    assert matrix(FILTERS, flat[1])[2].tolist() == [144 + i for i in range(36, 54)]


def test_a_mask_keeps_all_weights_and_no_gap() -> None:
    mask = PARAMS.full_mask()
    assert (mask.dtype, mask.shape) == (torch.bool, (96,))
    assert mask.nonzero().flatten().tolist() == [*range(54), *range(64, 84)]
    assert PARAMS.kept(mask) == {"conv.weight": 54, "fc.weight": 20}
    mask[:10] = mask[83] = False
    assert PARAMS.kept(mask) == {"conv.weight": 44, "fc.weight": 19}


def test_masks_are_packed_by_row() -> None:
    masks = torch.stack([PARAMS.full_mask(), torch.zeros(96, dtype=torch.bool)])
    masks[0, 64:68] = torch.tensor([True, False, False, True])
    packed = PARAMS.packed(masks)
    assert {name: (bits.dtype, tuple(bits.shape)) for name, bits in packed.items()} == {
        "conv.weight": (torch.uint8, (2, 3, 3)),
        "fc.weight": (torch.uint8, (2, 5, 1)),
    }
    assert packed["conv.weight"][0].tolist() == [[255, 255, 3]] * 3  # 18 bits
    assert packed["fc.weight"][0].flatten().tolist() == [0b1001, 15, 15, 15, 15]
    assert not packed["conv.weight"][1].any()


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_a_model_overlaps_another(name: str) -> None:
    params, at = MODELS[name].params, 0
    for spec in params.all:
        assert spec.offset == at
        at = spec.end
    assert at == params.size
    assert params.mask_size == params.weights[-1].end
