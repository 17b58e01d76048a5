"""Activations, means and factors of planes against float64, at every level this machine has."""

from __future__ import annotations

import pytest
import torch

from sparselth.kernels import _native
from sparselth.kernels import plane_parts as pp
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import sequence

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 7), (1, 13, 14, 14), (3, 2, 1, 67), (1, 3, 23, 29)]


def held(shape: tuple[int, int, int, int], padding: int, around: float = torch.nan) -> Planes:
    """Random images among planes of `around`."""
    b, c, h, w = shape
    if padding:
        row = w + padding
        pitch = -(-((h + 2 * padding) * row + padding) // 16) * 16
        x = Planes.of(b, c, (h, w), row, padding, pitch)
    else:
        x = Planes.of(b, c, (h, w))
    x.memory.fill_(around)
    x.images.normal_().mul_(4)
    return x


def fill(x: Planes, value: float = torch.nan) -> torch.Tensor:
    """All its memory once its images are NaN."""
    x.images.fill_(value)
    return x.memory


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Even where so many do not pay."""
    monkeypatch.setattr(pp, "MANY", 1)
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_activate(shape: tuple[int, int, int, int], padding: int, threads: int, kernels: str) -> None:
    for activation, act in ACTIVATIONS.items():
        x = held(shape, padding)
        exact = act(x.images.double())
        pp.bind_activate(x, activation, kernels)()
        torch.testing.assert_close(x.images.double(), exact, rtol=1e-6, atol=1e-6)
        assert bool(fill(x).isnan().all())  # nothing else was written


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_means_and_factors(
    shape: tuple[int, int, int, int], padding: int, threads: int, kernels: str
) -> None:
    b, c, _, _ = shape
    x, s = held(shape, padding), held((b, c, 1, 1), padding)
    given = x.images.double()
    exact, s_memory = given.mean((2, 3), keepdim=True), s.memory.clone()
    pp.bind_plane_means(x, s, kernels)()
    torch.testing.assert_close(s.images.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(x.images.double(), given)
    assert torch.equal(s.memory.isnan(), s_memory.isnan())
    for activation in ("hardsigmoid", "sigmoid", "none"):
        x.images.copy_(given)
        pp.bind_scale_planes(x, s, activation, kernels)()
        factor = ACTIVATIONS[activation](s.images.double())
        torch.testing.assert_close(x.images.double(), given * factor, rtol=1e-6, atol=1e-6)
    assert bool(fill(x).isnan().all())


def test_zeros_around_an_image_stay(kernels: str) -> None:
    """Though hardsigmoid(0) is 0.5."""
    x = held((2, 3, 5, 6), 1, around=0.0)
    pp.bind_activate(x, "hardsigmoid", kernels)()
    assert not fill(x, 0.0).any()


def test_nan_stays_in_its_plane(kernels: str) -> None:
    x, y = held((2, 3, 5, 9), 0), held((2, 3, 1, 1), 0)
    x.images[1, 2, 4, 8] = torch.nan
    calls = [pp.bind_plane_means(x, y, kernels), pp.bind_scale_planes(x, y, "sigmoid", kernels)]
    sequence(calls)()
    wrong = torch.zeros(2, 3, dtype=torch.bool)
    wrong[1, 2] = True
    assert torch.equal(y.images[:, :, 0, 0].isnan(), wrong)
    assert torch.equal(x.images.isnan().flatten(2).all(2), wrong)
    assert torch.equal(x.images.isnan().flatten(2).any(2), wrong)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize(
    ("channels", "side", "two"),
    [(96, 7, {"silu"}), (576, 7, {"mean", "factor", "relu", "silu"}), (14, 56, {"factor", "relu", "silu"})],
)
def test_a_second_thread_where_it_pays(channels: int, side: int, two: set[str]) -> None:
    torch.set_num_threads(2)
    x, s = held((1, channels, side, side), 0), held((1, channels, 1, 1), 0)
    calls = {
        "mean": pp.bind_plane_means(x, s),
        "factor": pp.bind_scale_planes(x, s, "sigmoid"),
        "relu": pp.bind_activate(x, "relu"),
        "silu": pp.bind_activate(x, "silu"),
    }
    assert {name for name, call in calls.items() if _native.arguments(call).threads == 2} == two


def test_refused() -> None:
    x = Planes.of(2, 3, (4, 5))
    with pytest.raises(ValueError, match=r"activation: expected none, relu, .* got 'tanh'"):
        pp.bind_activate(x, "tanh")
    with pytest.raises(ValueError, match=r"y: expected fp32 \[2, 3, 1, 1\] on a CPU, got .*\[2, 4, 1, 1\]"):
        pp.bind_plane_means(x, Planes.of(2, 4, (1, 1)))
    with pytest.raises(ValueError, match=r"s: expected fp32 \[2, 3, 1, 1\] on a CPU, got .*\[2, 3, 4, 5\]"):
        pp.bind_scale_planes(x, x)
    assert pp.floor("activate", 10) == {"bytes": 80, "flops": 40}
