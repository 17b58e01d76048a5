"""The two parts make up the weights of any mask; on a CPU both products are tried with dense weights."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import near
from sparselth.kernels import two_four_linear as module
from sparselth.kernels.two_four_linear import TwoFour, floor, two_four_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
NAN = float("nan")


def problem(
    density: float, dtype: torch.dtype, seed: int, n: int = 32, k: int = 64, b: int = 9
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    w, x, bias = (torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((n, k), (b, k), (n,)))
    return w, x, bias, (torch.rand(n, k, generator=g) < density).to(DEVICE)


def half(weight: TwoFour) -> Tensor:
    return weight.half.to_dense() if weight.half.is_cuda else weight.half


@settings(max_examples=CASES)
@given(
    st.floats(0, 1), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans(), st.integers(0, 10**6)
)
def test_any_mask(density: float, dtype: torch.dtype, relu: bool, seed: int) -> None:
    w, x, bias, keep = problem(density, dtype, seed, n=64)
    weight = TwoFour.from_dense(torch.where(keep, w, NAN), keep)
    kept = torch.where(keep, w, 0)
    assert torch.equal(weight.to_dense(), kept)
    first = half(weight).view(-1, 4)
    assert int((first != 0).sum(1).max()) <= 2
    # what is left over is no larger than what stayed
    left = (kept - half(weight)).view(-1, 4).abs().amax(1)
    smallest = first.abs().topk(2, dim=1).values[:, 1]
    assert bool((left <= smallest).all())
    found = two_four_linear(weight, x, bias, relu)
    right = F.linear(x.double(), kept.double(), bias.double())
    size = F.linear(x.double().abs(), kept.double().abs(), bias.double().abs())
    near(found, right.relu() if relu else right, x.shape[1], size)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("relu", [False, True])
def test_both_products_make_up_one(density: float, relu: bool) -> None:
    w, x, bias, keep = problem(density, torch.float16, 0)
    weight = TwoFour.from_dense(w, keep)
    if DEVICE == "cpu":  # no CSR products in half precision there
        weight = TwoFour(weight.half.float(), weight.rest.float())
        x, bias = x.float(), bias.float()
    found = module.launch(weight, x, bias, relu)
    right = F.linear(x.double(), torch.where(keep, w, 0).double(), bias.double())
    right = right.relu() if relu else right
    near(found, right, x.shape[1], dtype="fp16" if DEVICE == "cuda" else None)


def test_bytes_and_floor() -> None:
    w, _, _, keep = problem(1.0, torch.float16, 0)
    weight = TwoFour.from_dense(w, keep)
    left = 32 * 64 // 2
    assert weight.bytes() == 32 * 64 + 32 * 64 // 8 + left * (2 + 4) + 33 * 4
    assert floor(weight, 8) == {"bytes": weight.bytes() + 2 * (8 * 96 + 32), "flops": 8 * 32 * 64}
    assert TwoFour.from_dense(w, torch.zeros_like(keep)).bytes() == 32 * 64 + 32 * 64 // 8
    g = torch.Generator().manual_seed(0)
    keep = (torch.rand(512, 512, generator=g) < 0.1).to(DEVICE)
    weight = TwoFour.from_dense(torch.ones(512, 512, dtype=torch.float16, device=DEVICE), keep)
    assert len(weight.rest.values()) / int(keep.sum()) == pytest.approx(0.0095, rel=0.3)


def test_what_does_not_fit_is_said() -> None:
    w, x, bias, keep = (t.cpu() for t in problem(0.5, torch.float16, 0))
    weight = TwoFour.from_dense(w, keep)
    for bad, words in (
        (w.float(), r"bf16 or fp16.*got torch.float32\[32, 64\]"),
        (w[:31], r"N a multiple of 32.*\[31, 64\]"),
        (w[:, :32], r"K of 64.*\[32, 32\]"),
        (w[0], r"w\[N, K\]"),
        (w[:0], r"w\[N, K\]"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            TwoFour.from_dense(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected a bool mask"):
        TwoFour.from_dense(w, keep.float())
    for args, words in (
        ((x[:, :8],), r"expected x\[B, 64\]"),
        ((x[:0],), "not empty"),
        ((x, bias[:2]), r"bias\[32\]"),
        ((x.float(),), "of one dtype"),
        ((x.to("meta"),), "on one device"),
        ((x, bias, False, "triton"), "kernels='triton': expected auto or reference on cpu"),
        ((x, bias, False, "torch"), "kernels='torch': expected auto or reference on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            two_four_linear(weight, *args)


def test_a_gpu_without_sparse_tensor_cores_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    old = torch.ones(32, 64, dtype=torch.float16).as_subclass(Old)
    with pytest.raises(ValueError, match=r"capability 8\.0 or more, got Tesla T4"):
        TwoFour.from_dense(old)
