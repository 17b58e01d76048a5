"""Operators: without torch's compiler until somebody uses it, then not seen by it; no gradient in silence."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth.kernels import bitmask
from sparselth.kernels._operator import fake, operator
from sparselth.kernels.bitmask import unpack

SEEN: list[bool] = []


@operator("doubled_for_a_test")
def _doubled(x: Tensor) -> Tensor:
    SEEN.append(torch.compiler.is_compiling())
    return 2 * x


@fake(_doubled)
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


FIRST_CALLS = """
import sys, torch
from sparselth.kernels.bitmask import pack
from sparselth.kernels.masked_linear import masked_linear
x, w = torch.ones(1, 2, 8), torch.ones(1, 3, 8, requires_grad=True)
masked_linear(x, w, pack(torch.ones(1, 3, 8))).sum().backward()
assert w.grad.eq(2).all()
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.host
def test_the_first_call_imports_no_compiler(environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", FIRST_CALLS], env=environment, check=True)


def test_a_compiler_sees_the_operator_and_not_what_is_in_it() -> None:
    """In a graph, and where a frame is run as it is written while the compiler looks at what it calls."""
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    @torch.compiler.disable(recursive=False)
    def plain(x: Tensor) -> Any:
        return _doubled(x)

    x = torch.arange(3.0)
    for run in (_doubled, plain):
        SEEN.clear()
        torch.compiler.reset()
        y = torch.compile(lambda x, run=run: run(x) + 1, backend=backend)(x)
        assert torch.equal(y, 2 * x + 1)
        assert SEEN == [False]
    names = [name for graph in graphs for name in graph]
    assert names[0] == "sparselth.doubled_for_a_test.default"
    assert not [name for name in names if "mul" in name]


def test_going_backward_through_one_without_a_gradient_is_said() -> None:
    y = _doubled(torch.ones(3, requires_grad=True))
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="sparselth::doubled_for_a_test: this op has no gradient"):
        y.sum().backward()
    assert not unpack(torch.ones(1, dtype=torch.uint8), 8).requires_grad


def test_a_second_definition_takes_the_place_of_the_first() -> None:
    """As of a kernel's module that is loaded again; who has the operator from before calls the new one."""

    def times(factor: float) -> Any:
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return factor * grad

        @operator("times_for_a_test", backward)
        def times(x: Tensor) -> Tensor:
            return factor * x

        return times

    x = torch.ones(3, requires_grad=True)
    first, second = times(2.0), times(3.0)
    for one in (first, second):
        (grad,) = torch.autograd.grad(one(x).sum(), x)
        assert torch.equal(one(x), torch.full((3,), 3.0))
        assert torch.equal(grad, torch.full((3,), 3.0))
    with pytest.raises(RuntimeError, match=r"sparselth::times_for_a_test: is defined as \(Tensor x\)"):

        @operator("times_for_a_test")
        def other(x: Tensor, factor: float) -> Tensor:
            return factor * x


@pytest.mark.host
def test_a_module_of_kernels_is_loaded_again() -> None:
    bits = bitmask.pack(torch.ones(1, 3, 8))
    again = importlib.reload(bitmask)
    assert torch.equal(unpack(bits, 8), again.unpack(bits, 8))
