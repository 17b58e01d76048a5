"""Samples on CUDA, with stand-ins: what a cold one does before the call that it times."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparselth import clock


class Watch(TorchDispatchMode):
    """The tensors that operators write to, and how many numbers they read."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.read = list[torch.Tensor](), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, torch.Tensor):
                self.read += value.numel()
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written.append(value)
        return func(*args, **(kwargs or {}))


def test_a_cold_call_comes_behind_a_read_of_the_whole_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write would leave dirty lines, which go back to memory within the call that is timed."""
    done: list[str] = []

    class Event:
        def __init__(self, timing: bool) -> None: ...
        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None: ...
        def elapsed_time(self, other: object) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "replayed", lambda call, calls: call)
    scratch = torch.zeros(1000)
    sample = clock.cold(lambda: done.append("call"), scratch)
    with Watch() as watch:
        assert sample() == 2e-3
    assert done == ["event", "call", "event"]
    assert watch.read >= 1000
    assert not [t for t in watch.written if t.numel() == 1000]
