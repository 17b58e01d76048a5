"""Memory that is used again: never while anyone can still see it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparselth.kernels import _pieces

SIZE = _pieces.LEAST


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    _pieces.clear()
    yield
    _pieces.clear()


def test_what_nobody_sees_is_used_again() -> None:
    first = _pieces.take((SIZE,))
    address = first.data_ptr()
    assert _pieces.take((SIZE,)).data_ptr() != address
    del first
    assert {_pieces.take((SIZE,)).data_ptr() for _ in range(3)} <= {address, _pieces.take((SIZE,)).data_ptr()}
    assert _pieces.held() == 2 * 4 * SIZE


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t,
        lambda t: t[5:9],
        lambda t: t.view(2, -1).t(),
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: memoryview(t.numpy()),
        lambda t: (t.requires_grad_() * 1).exp(),
        lambda t: torch.from_dlpack(t),
    ],
)
def test_what_somebody_sees_is_left_alone(keep: object) -> None:
    taken = _pieces.take((SIZE,))
    address = taken.data_ptr()
    seen = keep(taken)  # type: ignore[operator]
    del taken
    others = [_pieces.take((SIZE,)) for _ in range(3)]
    assert address not in [t.data_ptr() for t in others]
    assert seen is not None


def test_what_other_processes_may_see_or_has_another_size_is_left_alone() -> None:
    shared, resized = (_pieces.take((SIZE,)) for _ in range(2))
    shared.share_memory_()
    resized.untyped_storage().resize_(0)
    before = shared.data_ptr()
    del shared, resized
    again = [_pieces.take((SIZE,)) for _ in range(2)]
    assert all(t.untyped_storage().nbytes() == 4 * SIZE for t in again)
    assert before not in [t.data_ptr() for t in again]


def test_shapes_strides_and_small_ones() -> None:
    before = _pieces.held()
    t = _pieces.take((64, 512, 16), (1, 64 * 16, 64))
    assert t.stride() == (1, 1024, 64)
    assert not t._is_view()
    assert _pieces.take((2, 3)).is_contiguous()
    assert _pieces.take((0, 3)).shape == (0, 3)
    assert _pieces.held() == before + 4 * 64 * 512 * 16


def test_what_is_not_asked_for_any_more_is_given_back() -> None:
    before = _pieces.held()  # what other tests' objects still hold
    for i in range(40):
        _pieces.take((SIZE << i % 4,))
    assert _pieces.held() == before + 15 * 4 * SIZE
    for _ in range(_pieces.AGE + 1):
        _pieces.take((SIZE,))
    assert _pieces.held() == before + 15 * 4 * SIZE  # nothing new was needed
    _pieces.take((SIZE << 4,))
    assert _pieces.held() == before + 17 * 4 * SIZE


@pytest.mark.parametrize("size", [SIZE, SIZE + 1, 2 * SIZE - 1, 3 * SIZE + 77, 10**7])
def test_pieces_are_little_larger_than_asked_for(size: int) -> None:
    taken = _pieces.take((size,))
    assert size <= taken.untyped_storage().nbytes() // 4 <= size * 9 / 8


def test_without_torchs_count_memory_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    held = _pieces.held()
    monkeypatch.setattr(_pieces, "_USES", None)
    assert _pieces.take((SIZE,)).shape == (SIZE,)
    assert _pieces.held() == held


def test_what_can_never_be_free_is_not_held() -> None:
    held = _pieces.held()
    for _ in range(4):
        _pieces.take((SIZE,)).share_memory_()
        _pieces.take((SIZE,)).untyped_storage().resize_(0)
    assert _pieces.held() <= held + 4 * SIZE
