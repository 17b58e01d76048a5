"""No op returns what autograd takes for a constant: there is a gradient, or a refusal in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops import OPS
from sparselth.kernels._triton import INTERPRET

ON_TRITON = {"csr_lanes", "slot_linear", "block_linear", "block_conv2d", "masked_linear", "masked_conv2d"}
ON_TRITON |= {"masked_conv2d forward", "seed_linear", "seed_conv2d"}
BACKENDS = ("auto", "reference", *(["triton"] if INTERPRET else []))
CALLS = [
    (op, name, kernels)
    for op, (_, tensors) in OPS.items()
    for name in tensors
    for kernels in BACKENDS
    if kernels != "triton" or op in ON_TRITON
]


@pytest.mark.parametrize(("op", "name", "kernels"), CALLS)
def test_an_output_has_a_gradient_or_is_refused(op: str, name: str, kernels: str) -> None:
    run, tensors = OPS[op]
    given = {key: t.detach().clone() for key, t in tensors.items()}
    given[name].requires_grad_()
    with torch.no_grad():  # as a step or a converted network calls it
        run(**{key: twin(t) for key, t in given.items()}, kernels=kernels)
    refusal = ""
    try:
        out = run(**given, kernels=kernels)
        assert isinstance(out, Tensor)
        assert out.requires_grad, f"{op} gives an output without the gradient of {name}"
        out.float().sum().backward()
    except (ValueError, RuntimeError) as error:  # the latter of an operator, as it goes backward
        refusal = str(error)
    if refusal:
        assert "requires_grad" in refusal
        assert "\n" not in refusal
    else:
        gradient = given[name].grad
        assert gradient is not None
        assert gradient.any()


def twin(t: Tensor) -> Tensor:
    """A leaf of its own: some ops write into what they are given."""
    return t.detach().clone().requires_grad_(t.requires_grad)
