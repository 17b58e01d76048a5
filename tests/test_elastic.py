"""Masks and weights carried from one network to another."""

from __future__ import annotations

import numpy as np
import pytest

from sparselth.elastic import align, carry_mask, carry_weights, differing
from sparselth.errors import UsageError
from sparselth.models import get_model
from sparselth.params import Params, TensorSpec


def chain(*shapes: tuple[int, ...]) -> Params:
    """Weights of these shapes, one behind the other, with a bias each."""
    specs, offset = [], 0
    for i, shape in enumerate(shapes):
        specs.append(TensorSpec(f"w{i}", shape, offset))
        offset = specs[-1].end
    biases = []
    for i, shape in enumerate(shapes):
        biases.append(TensorSpec(f"b{i}", shape[:1], offset))
        offset = biases[-1].end
    return Params(tuple(specs), tuple(biases))


def numbered(params: Params) -> np.ndarray:
    return np.arange(1, params.size + 1, dtype=np.float32)


def matrix(params: Params, values: np.ndarray, which: int) -> np.ndarray:
    spec = params.weights[which]
    return values[spec.span].reshape(spec.matrix)


def test_the_same_network_takes_all_of_it() -> None:
    params = get_model("lenet5").params
    pairs, values = align(params, params), numbered(params)
    mask = np.random.default_rng(0).random(params.mask_size) < 0.3
    for spec in params.weights:
        mask[spec.end - (spec.end - spec.offset - spec.numel) : spec.end] = False  # the gaps
    assert differing(pairs) is None
    np.testing.assert_array_equal(carry_mask(pairs, params, mask), mask)
    found = carry_weights(pairs, params, params, values, np.zeros(params.size, np.float32))
    for spec in params.all:
        np.testing.assert_array_equal(found[spec.span], values[spec.span])


def test_wider_layers_repeat_units_and_what_reads_them_repeats_columns() -> None:
    source, target = chain((2, 3), (2, 2), (1, 2)), chain((5, 3), (3, 5), (1, 3))
    pairs, values = align(source, target), numbered(source)
    first, second, last = (matrix(source, values, i) for i in range(3))
    found = carry_weights(pairs, source, target, values, np.zeros(target.size, np.float32))
    np.testing.assert_array_equal(matrix(target, found, 0), first[[0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(matrix(target, found, 1), second[[0, 1, 0]][:, [0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(matrix(target, found, 2), last[:, [0, 1, 0]])
    assert (found[target.unpruned[0].offset :] == 0).all()  # other biases: the target's own stay
    odd = differing(pairs)
    assert odd is not None
    assert odd.target.name == "w0"


def test_narrower_layers_leave_out_the_last_units() -> None:
    source, target = chain((4, 3), (2, 4)), chain((2, 3), (2, 2))
    values = numbered(source)
    found = carry_weights(align(source, target), source, target, values, np.zeros(target.size, np.float32))
    np.testing.assert_array_equal(matrix(target, found, 0), matrix(source, values, 0)[:2])
    np.testing.assert_array_equal(matrix(target, found, 1), matrix(source, values, 1)[:, :2])


def test_filters_repeat_channels_and_a_layer_behind_them_its_fields() -> None:
    source, target = chain((2, 1, 3, 3), (2, 2 * 4)), chain((3, 2, 3, 3), (2, 3 * 4))
    values = numbered(source)
    found = carry_weights(align(source, target), source, target, values, np.zeros(target.size, np.float32))
    filters = matrix(source, values, 0).reshape(2, 1, 9)
    np.testing.assert_array_equal(matrix(target, found, 0).reshape(3, 2, 9), filters[[0, 1, 0]][:, [0, 0]])
    fields = matrix(source, values, 1).reshape(2, 2, 4)
    np.testing.assert_array_equal(matrix(target, found, 1).reshape(2, 3, 4), fields[:, [0, 1, 0]])


def test_deeper_stages_repeat_layers_in_order_and_shallower_ones_leave_out_the_last() -> None:
    short, long = chain((4, 2), (4, 4), (4, 4), (3, 4)), chain((4, 2), *[(4, 4)] * 5, (3, 4))
    assert [pair.source.name for pair in align(short, long)] == ["w0", "w1", "w2", "w1", "w2", "w1", "w3"]
    assert [pair.source.name for pair in align(long, short)] == ["w0", "w1", "w2", "w6"]
    # a run of three begins within a block: what is repeated are whole blocks
    odd, longer = chain((4, 2), *[(4, 4)] * 3, (3, 4)), chain((4, 2), *[(4, 4)] * 6, (3, 4))
    names = [pair.source.name for pair in align(odd, longer)]
    assert names == ["w0", "w1", "w2", "w3", "w2", "w3", "w2", "w4"]


def test_resnets_of_other_depths_and_widths() -> None:
    shallow, deep = get_model("resnet20").params, get_model("resnet56").params
    for source, target in ((shallow, deep), (deep, shallow), (shallow, get_model("resnet20@0.5").params)):
        pairs = align(source, target)
        assert [pair.target for pair in pairs] == [*target.weights]
        full = np.zeros(source.mask_size, bool)
        for spec in source.weights:
            full[spec.span] = True
        assert carry_mask(pairs, target, full).sum() == target.prunable
    assert differing(align(shallow, deep)) is None


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (((4, 784), (2, 4)), ((4, 3072), (2, 4)), "w0: reads 3,072 inputs here, 784 in the source's w0"),
        (((4, 1, 3, 3), (2, 4)), ((4, 1, 5, 5), (2, 4)), r"w0: is \[4, 1, 5, 5\] here"),
        (((4, 9), (2, 4)), ((4, 1, 3, 3), (2, 4)), "expected kernels of one size"),
        (
            ((4, 2), (3, 4)),
            ((4, 2), (5, 4), (3, 5)),
            "w1: the source has 2 layers of weights, this network 3",
        ),
        (((4, 2), (4, 4), (2, 4)), ((4, 2), (2, 5)), "w1: the source has 3 layers"),
    ],
)
def test_what_cannot_be_carried_names_its_layer(source: tuple, target: tuple, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError, match=said):
        align(chain(*source), chain(*target))
