"""Params.of: where the tensors of any module lie, which are pruned; copies in and out lose nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselth.errors import SparselthError, UsageError
from sparselth.params import Params


class LayerNorm2d(nn.Module):
    """A norm of a user's own, with a scale of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4))


class Everything(nn.Module):
    """A layer of every kind, tied weights, frozen ones, buffers of all dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.attend = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.conv = nn.Conv1d(8, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.layer = nn.LayerNorm((3, 8))
        self.own = LayerNorm2d()
        self.lstm = nn.LSTM(8, 4)
        self.one = nn.Linear(8, 1)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.bias = nn.Parameter(torch.zeros(3, 7))
        self.temperature = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("seen", torch.tensor(2**62 + 12345))
        self.register_buffer("hidden", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("exact", torch.rand(3, dtype=torch.float64))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("turns", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("unsaved", torch.ones(3), persistent=False)


def test_weights_are_what_multiplies_and_nothing_else() -> None:
    params = Params.of(Everything())
    assert [spec.name for spec in params.weights] == [
        *("places", "embed.weight", "attend.in_proj_weight", "attend.out_proj.weight", "conv.weight"),
        *("up.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "one.weight"),
    ]
    trained = [spec.name for spec in params.trained]
    assert {"token", "bias", "temperature", "layer.weight", "own.scale", "attend.bias_k"} <= {*trained}
    assert "empty" not in trained
    fixed = [spec.name for spec in params.statistics]
    assert {"frozen.weight", "frozen.bias", "norm.running_mean", "norm.num_batches_tracked"} <= {*fixed}
    assert {"seen", "hidden", "exact", "flags", "turns"} <= {*fixed}
    assert "unsaved" not in fixed


def test_every_tensor_begins_on_its_own_line_of_memory() -> None:
    params, end = Params.of(Everything()), 0
    for spec in params.all:
        assert spec.offset == end
        assert spec.offset % 16 == 0
        end = spec.end
    assert params.size == end
    assert params.full_mask().sum() == params.prunable


@pytest.mark.parametrize("seed", range(3))
def test_what_is_gathered_is_scattered_to_the_same_bits(seed: int) -> None:
    torch.manual_seed(seed)
    one, other = Everything(), Everything()
    params = Params.of(one)
    flat = params.gather(one)
    assert flat.shape == (1, params.size)
    assert flat.dtype == torch.float32
    for tensor in other.state_dict().values():
        tensor.zero_()
    params.scatter(flat, other)
    for (name, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert other.head.weight is other.embed.weight
    assert torch.equal(params.gather(other).view(torch.int32), flat.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_other_dtypes_come_back_whole(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).to(dtype)
    params, before = Params.of(net), {name: t.clone() for name, t in net.state_dict().items()}
    flat = params.gather(net)
    for tensor in net.state_dict().values():
        tensor.zero_()
    params.scatter(flat, net)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        ("one.weight", {"one.weight"}),
        ("head.weight", {"embed.weight"}),  # by its other name
        ("attend", {"attend.in_proj_weight", "attend.out_proj.weight"}),
        ("lstm.*", {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}),
        (nn.MultiheadAttention, {"attend.in_proj_weight", "attend.out_proj.weight"}),
        ((nn.Conv1d, "places"), {"conv.weight", "places"}),
    ],
)
def test_weights_are_excluded_by_name_module_glob_or_type(exclude: object, gone: set[str]) -> None:
    every = {spec.name for spec in Params.of(Everything()).weights}
    params = Params.of(Everything(), exclude)  # type: ignore[arg-type]
    assert {spec.name for spec in params.weights} == every - gone
    assert gone <= {spec.name for spec in params.trained}


def test_the_output_layer_goes_at_half_the_rate() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    first, last = Params.of(net, output="1.weight").weights
    assert (first.output, first.rate_scale) == (False, 1.0)
    assert (last.output, last.rate_scale, last.fan_in, last.fan_out) == (True, 0.5, 4, 2)


@pytest.mark.parametrize(
    ("make", "exclude", "said"),
    [
        (lambda: nn.ReLU(), (), "ReLU: has no prunable weights"),
        (lambda: nn.Linear(3, 3).requires_grad_(False), (), "Linear: has no prunable weights"),
        (lambda: nn.Linear(3, 3), "weight", "Linear: has no prunable weights"),
        (lambda: nn.Linear(3, 3), "wieght", "did you mean 'weight'"),
        (lambda: nn.Linear(3, 3), nn.Conv2d, "exclude 'Conv2d'"),
    ],
)
def test_modules_without_weights_are_refused_in_a_line(make: object, exclude: object, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Params.of(make(), exclude)  # type: ignore[operator, arg-type]
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named() -> None:
    with pytest.raises(SparselthError, match=r"weight has no shape yet"):
        Params.of(nn.LazyLinear(3))
    with pytest.raises(SparselthError, match=r"weight is complex"):
        Params.of(nn.Linear(3, 3, dtype=torch.complex64))
    params = Params.of(nn.Linear(3, 4))
    with pytest.raises(SparselthError, match=r"weight has shape \[4, 2\], expected \[4, 3\]"):
        params.gather(nn.Linear(2, 4))
    with pytest.raises(SparselthError, match=r"Conv2d: has no weight|weight has shape"):
        params.scatter(torch.zeros(1, params.size), nn.Conv2d(1, 1, 3))
