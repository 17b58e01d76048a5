"""Captures that fail, on a stand-in for CUDA under torch's own `torch.cuda.graph`: all is as it was."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparselth.kernels import _graphs

ROOT = Path(__file__).resolve().parents[2]
Pool = tuple[int, int]
POOL = (0, 7)


class Cuda:
    """Streams by name, and an allocator that knows which captures are under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.pools, self.released = "default", list[Pool](), list[Pool]()
        self.breaks = self.synchronized = False
        cuda = self

        class Graph:
            def capture_begin(self, pool: Pool, **options: object) -> None:
                cuda.pools.append(pool)

            def capture_end(self) -> None:
                if cuda.breaks:  # the end of a capture raises before the allocator hears of it
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.pools.pop()

            def replay(self) -> None: ...

        def end(device: int, pool: Pool) -> None:
            if pool not in self.pools:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.pools.remove(pool)

        def synchronize() -> None:
            self.synchronized = True

        def set_stream(stream: str) -> None:
            self.current = stream

        monkeypatch.setattr(_graphs, "side", lambda device: SimpleNamespace(wait_stream=lambda other: None))
        for name, stand_in in {
            "CUDAGraph": Graph,
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None, name=self.current),
            "current_device": lambda: 0,
            "set_stream": lambda stream: set_stream(stream.name),
            "stream": self.stream,
            "graph_pool_handle": lambda: POOL,
            "synchronize": synchronize,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        later = "torch.cuda._graph_annotations.maybe_stamp_capture_root"  # torch 2.14
        if find_spec(later.rpartition(".")[0]):
            monkeypatch.setattr(later, lambda stream: None, raising=False)
        release: Callable[[int, Pool], None] = lambda device, pool: self.released.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def stream(self, _: object) -> Stream:
        return Stream(self)


class Stream:
    """torch.cuda.stream: makes the stream of captures current, and gives back what was."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.before, self.cuda.current = self.cuda.current, "side"

    def __exit__(self, *_: object) -> None:
        self.cuda.current = self.before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_the_stand_in_leaves_what_a_broken_capture_leaves(cuda: Cuda) -> None:
    """Without the helper: the stream of the capture stays current, before torch 2.15, and its pool open."""
    cuda.breaks = True
    with (
        pytest.raises(RuntimeError),
        torch.cuda.graph(torch.cuda.CUDAGraph(), pool=POOL, stream=_graphs.side(0)),
    ):
        pass
    assert cuda.current == ("default" if torch.__version__ >= (2, 15) else "side")
    assert cuda.pools == [POOL]


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), torch.OutOfMemoryError("no memory"), KeyboardInterrupt()]
)
def test_a_failed_capture_leaves_nothing(cuda: Cuda, error: BaseException) -> None:
    def call() -> None:
        assert cuda.current == "side"
        raise error

    cuda.breaks = True
    with pytest.raises(RuntimeError, match="previous error during capture") as found:
        _graphs.capture(call)
    assert found.value.__context__ is error
    assert (cuda.current, cuda.pools, cuda.released, cuda.synchronized) == ("default", [], [POOL], True)


def test_an_error_behind_the_end_of_a_capture_is_told(cuda: Cuda) -> None:
    """The pool is closed already, and its graph will release it."""

    def broken(self: object) -> None:
        cuda.pools.pop()
        raise RuntimeError("cannot be instantiated")

    torch.cuda.CUDAGraph.capture_end = broken
    with pytest.raises(RuntimeError, match="cannot be instantiated"):
        _graphs.capture(lambda: None)
    assert (cuda.current, cuda.pools, cuda.released) == ("default", [], [])


def test_calls_are_captured_so_many_times_or_run_from_python(cuda: Cuda) -> None:
    where: list[str] = []
    run = _graphs.replayed(lambda: where.append(cuda.current), 3)
    assert where == ["side"] * (_graphs.WARM_UP + 3)  # on the side, warming up and captured
    run()
    assert (len(where), cuda.current) == (_graphs.WARM_UP + 3, "default")
    cuda.breaks = True
    run = _graphs.replayed(lambda: where.append(cuda.current), 3)
    where.clear()
    run()
    assert where == ["default"] * 3


def test_nobody_captures_by_other_means() -> None:
    found = []
    for folder in ("sparselth", "kernels", "bench", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            if not {"cuda", "graph"} <= {*re.findall(r"\w+", text := file.read_text())}:
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda.graph":
                    found.append(file.name)
    assert {*found} - {Path(__file__).name} == {"_graphs.py"}
