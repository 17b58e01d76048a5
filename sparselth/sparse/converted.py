"""Converted networks: what all of them can do and what they say no to; a chain of layers, and any module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselth.sparse.device import DTYPES, Device
from sparselth.sparse.forms import Formed
from sparselth.sparse.reference import Given, containers, unfolded
from sparselth.sparse.report import Report, table
from sparselth.sparse.segment import Segment


class Converted(nn.Module):
    """A network that was converted; call it as the model, in its dtype on its device, with any batch.

    On CUDA a call can be captured in a CUDA graph, as any other network's after a call of the same shape: it
    never waits for the device and branches on shapes alone. The times it was chosen by are those of graphs;
    without one, launches from Python come on top, which matters for small layers.

    Inference only: no gradients (an input that requires one is a ValueError unless under torch.no_grad()),
    and `train()` is one too; inside another model it stays in evaluation mode. It copies and pickles. Its
    `state_dict()` has dense weights with zeros, as computed: behind compaction and folded norms.
    `torch.compile` goes around it; `torch.jit.trace` and `torch.export` cannot see inside and raise. On a CPU
    calls from several threads take turns.
    """

    report: Report
    dtype: torch.dtype
    device: torch.device

    @property
    def forms(self) -> list[Formed]:
        """The forms of all its layers."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Converted:
        # a model that holds this one calls it from its own train(), and is right to
        if mode and sys._getframe(1).f_code is not nn.Module.train.__code__:
            raise ValueError("expected inference, got train(): a converted network is not trained")
        super().train(False)
        return self

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls instead of `forward` while it traces."""
        raise ValueError("torch.jit.trace cannot see inside a converted network: save it with torch.save")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Converted:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (probe.dtype, probe.device) != (self.dtype, self.device):
            raise ValueError(
                f"expected {DTYPES[self.dtype]} on {self.device}, got {probe.dtype} on {probe.device}: "
                "convert the model there"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class ConvertedChain(Converted, Segment):
    """Layers one behind the other, on [B, ...]."""

    def __init__(self, plan: list[Formed], report: Report, device: Device) -> None:
        Segment.__init__(self, plan)
        self.report, self.dtype, self.device = report, device.dtype, device.at

    @property
    def forms(self) -> list[Formed]:
        return self.plan

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if torch.compiler.is_compiling():
            y = _outside(self.answer, (x,), {})
            return y
        fits = x.dtype is self.dtype and x.shape[1:] == self.before and x.device == self.device
        if fits and not torch.is_grad_enabled() and len(x) and not torch._C._is_any_autocast_enabled():
            y = self.run(x)
            return y
        return self.answer(x)

    def answer(self, x: Tensor) -> Tensor:
        """`forward`, of anything."""
        fits = x.dtype is self.dtype and x.shape[1:] == self.before and x.device == self.device
        alike = x.dtype is self.dtype and x.dim() == 1 + len(self.before) and x.device == self.device
        if not alike or (len(self.before) == 1 and not fits):
            raise ValueError(f"{self._expected}, got {x.dtype} {list(x.shape)} on {x.device}")
        refuse([x])
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            try:
                y: Tensor = Segment.forward(self, x)
                return y
            except RuntimeError as error:
                if fits:
                    raise
                why = str(error).splitlines()[0]
                raise ValueError(f"{self._expected}, got {list(x.shape)}: {why}") from None

    @property
    def _expected(self) -> str:
        shape = ", ".join(map(str, self.before))
        return f"expected {DTYPES[self.dtype]} [B, {shape}] on {self.device}"


class ConvertedModule(Converted):
    """Any module: traced, or with its layers replaced in a copy."""

    def __init__(
        self,
        network: nn.Module,
        like: Given | None,
        outputs: pytree.TreeSpec | None,
        report: Report,
        device: Device,
    ) -> None:
        """`like`: inputs that a traced network takes; `outputs`: containers of what it gives; else None."""
        super().__init__()
        self.network, self.like, self.outputs = network, like, outputs
        self.report, self.dtype, self.device = report, device.dtype, device.at
        self.eval()

    @property
    def forms(self) -> list[Formed]:
        return [form for m in self.network.modules() if isinstance(m, Segment) for form in m.plan]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside(self.answer, args, kwargs)
        return self.answer(*args, **kwargs)

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, of anything."""
        given = None if self.like is None else self.like.again(args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs)) if given is None else given.tensors
        refuse([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        # behind large weights Python is cold: to enter what changes nothing would take 0.1 ms
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self.device.type):
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return self._found(given, args, kwargs)
        return self._found(given, args, kwargs)

    def _found(self, given: Given | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if given is None:
            return self.network(*args, **kwargs)
        return self._restored(self.network(*given.tensors))

    @cached_property
    def containers(self) -> Any:
        """Those of the outputs, for `unfolded`."""
        return None if self.outputs is None else containers(self.outputs)

    def _restored(self, out: Any) -> Any:
        """The outputs in the containers that the model has for them."""
        leaves = unfolded(out, self.containers)
        if leaves is not None and all(isinstance(leaf, Tensor) for leaf in leaves):
            return out
        leaves, own = pytree.tree_flatten(out)
        same = self.outputs is None or own == self.outputs
        return out if same else pytree.tree_unflatten(leaves, self.outputs)  # type: ignore[arg-type]


def explain(converted: Converted) -> str:
    """What was measured for every layer and for whole networks, and what was chosen, as a table."""
    return table(converted.report, weight_bytes(converted))


def weight_bytes(converted: Converted) -> int:
    """Bytes of all weights, indices and biases that the network holds."""
    left = {*converted.parameters(), *converted.buffers()}
    return sum(form.bytes for form in converted.forms) + sum(t.numel() * t.element_size() for t in left)


def refuse(tensors: list[Tensor]) -> None:
    """ValueError for what a converted network cannot be asked for."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError("expected an input without gradient, got requires_grad=True: use torch.no_grad()")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(answer: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call as it stands between compiled graphs; no compiler sees into it."""
    if torch.compiler.is_exporting():
        raise ValueError("torch.export cannot see inside a converted network: save it with torch.save")
    return answer(*args, **kwargs)
