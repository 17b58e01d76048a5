"""One vocabulary of backends: what auto takes, and one shape of what is said where a backend is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparselth import config
from sparselth.kernels import _choose, _native
from sparselth.kernels._choose import BACKENDS, choose

X = torch.zeros(1)
NATIVE, TRITON = ("native", "torch", "reference"), ("triton", "reference")


class OnCuda:
    """A tensor of a device that is not here."""

    is_cuda, device = True, torch.device("cuda", 0)


def test_the_command_line_has_the_same_words() -> None:
    assert (*BACKENDS, "autograd") == config.KERNELS  # the way of a whole network, of no op


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("built", [True, False])
def test_auto_takes_the_first_that_is_there(
    installed: bool, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_choose, "HAS_TRITON", installed)
    monkeypatch.setattr(_choose, "INTERPRET", installed)  # which auto never takes
    monkeypatch.setattr(_native, "LIB", object() if built else None)
    cuda: Any = OnCuda()
    assert choose("auto", TRITON, X) == "reference"
    assert choose("auto", ("triton", "torch", "reference"), X) == "torch"
    assert choose("auto", TRITON, cuda) == ("triton" if installed else "reference")
    assert choose("auto", NATIVE) == ("native" if built else "torch")
    assert choose("auto", ("triton", "native", "reference"), X) == ("native" if built else "reference")
    assert [choose(backend, NATIVE) for backend in NATIVE[1:]] == ["torch", "reference"]
    if installed:
        assert choose("triton", TRITON, X) == "triton"


@pytest.mark.parametrize(
    ("kernels", "has", "said"),
    [
        ("fast", NATIVE, "expected auto, native, torch or reference on cpu"),
        ("torch", ("reference",), "expected auto or reference on cpu"),
        ("native", NATIVE, "the native kernels are missing: not built"),
        ("triton", TRITON, "Triton on a cpu tensor needs TRITON_INTERPRET=1 before import"),
    ],
)
def test_one_shape_of_what_is_not_there(
    kernels: str, has: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_choose, "HAS_TRITON", True)
    monkeypatch.setattr(_choose, "INTERPRET", False)
    monkeypatch.setattr(_native, "LIB", None)
    monkeypatch.setattr(_native, "WHY", "not built")
    with pytest.raises(ValueError, match=f"^kernels='{kernels}': {said}$"):
        choose(kernels, has, X)
    monkeypatch.setattr(_choose, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="kernels='triton': Triton is not installed"):
        choose("triton", TRITON, X)
