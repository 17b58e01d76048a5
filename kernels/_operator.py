"""Operators of torch from Python functions, as torch's own custom_op makes them, two seconds sooner.

`custom_op` keeps torch's compiler out of kernels, and imports it for that with a process's first call. Here
it is kept out where something else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import library

Compute = Callable[..., Any]


def operator(
    name: str, backward: Callable[..., Any] | None = None, save: Callable[..., None] | None = None
) -> Callable[[Compute], torch._ops.OpOverload]:
    """Decorator: a function that changes no argument becomes `torch.ops.sparselth.<name>`, on all devices.

    backward, save: its gradient, as `backward` and `setup_context` of torch's `register_autograd`;
    without, going backward through it is a RuntimeError. What it returns shares no memory with its arguments.
    """
    full = f"sparselth::{name}"

    def define(compute: Compute) -> torch._ops.OpOverload:
        schema = library.infer_schema(compute, mutates_args=())
        library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(full, "default", _uncompiled(compute))
        library.register_autograd(full, backward or partial(_refuse, full), setup_context=save)
        return getattr(torch.ops.sparselth, name).default  # type: ignore[no-any-return]

    return define


def _uncompiled(compute: Compute) -> Compute:
    kept_out: list[Compute] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return compute(*args, **kwargs)
        if not kept_out:
            kept_out.append(torch.compiler.disable(compute))
        return kept_out[0](*args, **kwargs)

    return call


def _refuse(name: str, ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(
        f"{name}: this op has no gradient, got requires_grad=True; detach() them or use torch.no_grad()"
    )
