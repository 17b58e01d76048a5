"""Operators of torch from Python functions, as torch's own custom_op makes them, two seconds sooner.

`custom_op` keeps torch's compiler out of kernels, and imports it for that with a process's first call. Here
it is kept out where something else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import library

Compute = Callable[..., Any]
# Decorator: what gives the shapes of an operator's results; torch 2.11 else refuses a second one, of a module
# that is loaded again.
fake = partial(library.register_fake, allow_override=True)


@dataclass
class _Defined:
    """What an operator calls: torch defines one once, a module that is loaded again brings new functions."""

    schema: str
    compute: Compute
    backward: Callable[..., Any]
    save: Callable[..., None] | None


_defined: dict[str, _Defined] = {}  # by the operator's full name


def operator(
    name: str, backward: Callable[..., Any] | None = None, save: Callable[..., None] | None = None
) -> Callable[[Compute], torch._ops.OpOverload]:
    """Decorator: a function that changes no argument becomes `torch.ops.sparselth.<name>`, on all devices.

    backward, save: its gradient, as `backward` and `setup_context` of torch's `register_autograd`;
    without, going backward through it is a RuntimeError. What it returns shares no memory with its arguments.
    A second function of the same name and signature takes the place of the first, as of a module that is
    loaded again; one of another signature is a RuntimeError.
    """
    full = f"sparselth::{name}"

    def define(compute: Compute) -> torch._ops.OpOverload:
        schema = library.infer_schema(compute, mutates_args=())
        new = _Defined(schema, _uncompiled(compute), backward or partial(_refuse, full), save)
        now = _defined.setdefault(full, new)
        if now is new:
            _register(full, now)
        elif now.schema != schema:
            raise RuntimeError(f"{full}: is defined as {now.schema}, not as {schema}; start Python anew")
        else:
            vars(now).update(vars(new))
        return getattr(torch.ops.sparselth, name).default  # type: ignore[no-any-return]

    return define


def _register(full: str, now: _Defined) -> None:
    library.define(full, now.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(full, "default", lambda *args, **kwargs: now.compute(*args, **kwargs))
    library.register_autograd(
        full,
        lambda ctx, *grads: now.backward(ctx, *grads),
        setup_context=lambda *args, **kwargs: now.save and now.save(*args, **kwargs),
    )


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
