"""A batch in parts beside all of it at once; threads, and what forks, errors and copies do to them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions import random_masks, times, timing
from sparselth import sparse
from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels.step_parts import Call
from sparselth.sparse.joined import Joined
from sparselth.sparse.network import BATCHES
from sparselth.sparse.parts import InParts
from test_joined import LAYOUTS, Block

pytestmark = pytest.mark.skipif(_native.LIB is None, reason="forms in columns are the native kernels'")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def parted(layout: Any, monkeypatch: pytest.MonkeyPatch, batch: int = 40) -> tuple[Any, Any]:
    """A network that was found to be faster in parts, where it has any, and the dense one that it is of."""
    clock, name, _ = layout
    best = {name: 2e-6, f"{name} in parts": 1e-6}

    def seconds(calls: Mapping[str, Call], sample: Any) -> Any:
        return times({one: best.get(one, taken) for one, taken in clock(calls, sample).items()})

    monkeypatch.setattr(timing, "seconds", seconds)
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(3, 8, 1, False), Block(8, 6, 2, True)).eval()
    masks = random_masks(model, 0.5)
    fast = sparse.convert(model, masks, torch.randn(batch, 3, 9, 9))
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    return fast, model


def joined(fast: Any) -> Joined:
    (found,) = [module for module in fast.modules() if isinstance(module, Joined)]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_compute_what_the_whole_does(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = parted(layout, monkeypatch)
    assert fast.report.chosen == f"{layout[1]} in parts", fast.report.networks
    run = joined(fast).run
    assert isinstance(run, InParts)
    for batch in (1, 2, 15, 16, 17, 31, 32, 33, 40, 70):
        x = torch.randn(batch, 3, 9, 9)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = fast(x)
            if layout[1] == "joined":  # in rows several images are summed in another order
                assert torch.equal(y, run.whole(x)), (batch, threads)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            assert check(y, exact, "fp32", terms=72, own=model(x)).fault is None
    counts = [count for count, _ in run.held]
    assert counts.count(run.part) == 2
    assert len(counts) - 2 <= BATCHES


def test_what_is_kept_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    run = joined(fast).run
    for batch in range(33, 48):
        fast(torch.randn(batch, 3, 9, 9))
    assert sorted(count for count, _ in run.held) == [12, 13, 14, 15, 16, 16]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_own_image(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(layout, monkeypatch)
    x = torch.randn(40, 3, 9, 9)
    right = fast(x)
    x[17] = torch.nan
    y = fast(x)
    assert y[17].isnan().any()
    others = [i for i in range(40) if i != 17]
    assert torch.equal(y[others], right[others])


def test_no_parts_where_there_are_less_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for layout, batch in zip(LAYOUTS, (16, 1), strict=True):
        fast, _ = parted(layout, monkeypatch, batch)
        assert fast.report.chosen == layout[1]
        assert f"{layout[1]} in parts" not in fast.report.networks


def test_copies_and_files_know_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    x = torch.randn(40, 3, 9, 9)
    y = fast(x)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(joined(again).run, InParts)
        assert torch.equal(again(x), y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    x = torch.randn(40, 3, 9, 9)
    right = fast(x)
    with mode():
        y = fast(x)
    assert y.is_inference() == (mode is torch.inference_mode)
    assert not y.requires_grad
    assert torch.equal(y, right)
    assert torch.equal(fast(x), right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_that_was_made_in_inference_mode_serves_outside(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, _ = parted(layout, monkeypatch)
    x, fresh = torch.randn(40, 3, 9, 9), pickle.loads(pickle.dumps(fast))
    with torch.inference_mode():
        fresh(x)
    assert torch.equal(fresh(x), fast(x))


def test_a_part_is_bound_to_one_thread_and_the_caller_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    run, bound = joined(pickle.loads(pickle.dumps(fast))).run, list[int]()
    make = run.make

    def noted(batch: int) -> Any:
        bound.append(_native.threads())
        return make(batch)

    monkeypatch.setattr(run, "make", noted)
    run(torch.randn(40, 3, 9, 9))
    assert bound == [1, 1, 1]  # two of 16, one of 8
    assert _native.threads() == 2


def test_more_threads_than_parts_take_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    run = joined(pickle.loads(pickle.dumps(fast))).run
    torch.set_num_threads(4)
    run(torch.randn(40, 3, 9, 9))
    assert not run.held


def test_an_error_waits_for_the_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    fast(torch.randn(40, 3, 9, 9))
    held, done = joined(fast).run.held, threading.Event()
    real = held[16, 1].run

    def slow() -> None:
        time.sleep(0.2)
        real()
        done.set()

    def fails() -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(held[16, 1], "run", slow)
    monkeypatch.setattr(held[16, 0], "run", fails)
    with pytest.raises(MemoryError, match="none left"):
        fast(torch.randn(40, 3, 9, 9))
    assert done.is_set()


def test_an_error_of_another_thread_is_told_and_the_next_call_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    x = torch.randn(40, 3, 9, 9)
    right, main = fast(x), threading.current_thread()
    held = joined(fast).run.held[16, 1]
    real = held.run

    def fails() -> None:
        assert threading.current_thread() is not main
        raise MemoryError("none left")

    monkeypatch.setattr(held, "run", fails)
    with pytest.raises(MemoryError, match="none left"):
        fast(x)
    monkeypatch.setattr(held, "run", real)
    assert torch.equal(fast(x), right)


def test_many_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    xs = [torch.randn(40, 3, 9, 9) for _ in range(4)]
    right, found = [fast(x) for x in xs], dict[int, list[Tensor]]()

    def call(i: int) -> None:
        found[i] = [fast(xs[i]) for _ in range(5)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert all(torch.equal(y, right[i]) for i in range(4) for y in found[i])


@pytest.mark.forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    x = torch.randn(40, 3, 9, 9)
    right = fast(x)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(fast(x), right) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0


def test_threads_end_with_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = parted(LAYOUTS[0], monkeypatch)
    fast(torch.randn(40, 3, 9, 9))
    assert any(one.name.startswith("sparselth-parts") for one in threading.enumerate())
    mine = {one for one in threading.enumerate() if one.name.startswith("sparselth-parts")}
    del fast
    gc.collect()
    for one in mine:
        one.join(timeout=5)
    assert not any(one.is_alive() for one in mine)
