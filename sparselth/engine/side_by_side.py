"""Replicas of a user's module in one step: forward and loss of all by torch.vmap, and one backward.

One module serves all; parameters are views of the flat buffer [R, P], their gradients of another. What a
replica computes must not depend on who is beside it, rounding apart: modules that draw random numbers are
refused, and so are those that vmap cannot take, that keep something in Python, or that differ from seed to
seed in more than their tensors. `refusal` tries a step; what it refuses trains one by one.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparselth.data.batches import Batches, Chunk
from sparselth.engine.autograd import errors_named, mean_loss, sums
from sparselth.engine.memory import Held, is_out_of_memory
from sparselth.engine.state import Batch, Stopped, never
from sparselth.engine.update import bind_update
from sparselth.errors import SparselthError
from sparselth.kernels.masked_update import Step
from sparselth.models.module import ModuleModel
from sparselth.models.torch import tensors
from sparselth.params import copy_floats, floats
from sparselth.streams import drawing_apart
from sparselth.user_files import said

DRAWS = "it draws random numbers in its forward, as dropout does"
SHARED = "numpy or Python draws random numbers in its forward"
COMPILED = "torch.compile makes its code for one network"
_OF_COMPILED = "_compiled_call_impl", "dynamo_ctx"
_TORCHS = {*vars(nn.Module())}  # attributes that every module has
_PLAIN = int | float | complex | str | bytes | bool | torch.dtype | torch.device | type | None


class Replicas:
    """R networks with weights [R, P], for batches of any size; gradients are added to `grad`."""

    def __init__(self, model: ModuleModel, seed: int, flat: Tensor, grad: Tensor | None = None) -> None:
        self.model, self.flat = model, flat
        self.net = model.build(seed).to(flat.device)
        found, r = tensors(model, self.net), len(flat)
        trained = {spec.name for spec in model.params.weights + model.params.trained}
        parameters = {name for name, _ in self.net.named_parameters()}
        self.parameters, self.buffers = dict[str, Tensor](), dict[str, Tensor]()
        for spec in model.params.all:
            tensor, place = found[spec.name], flat[:, spec.span].view(r, *spec.shape)
            if spec.name not in parameters:
                # not views: vmap's batch norm would write to a copy of what does not lie in one piece
                self.buffers[spec.name] = tensor.detach().repeat(r, *[1] * tensor.dim())
                for one, numbers in zip(self.buffers[spec.name], place, strict=True):
                    copy_floats(one, numbers)
                continue
            if spec.name in trained and grad is not None:
                place = place.detach().requires_grad_()
                place.grad = grad[:, spec.span].view(r, *spec.shape)
            self.parameters[spec.name] = place

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of each, [R], of samples x [R, B, ...]; buffers move on."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
            own = parameters | buffers
            loss = mean_loss(self.model, functional_call(self.net, own, (x,)), y)
            return loss, {name: own[name].detach() for name in buffers}

        losses, self.buffers = _mapped(one)(self.parameters, self.buffers, x, y)
        return losses  # type: ignore[no-any-return]

    @torch.no_grad()
    def sums(self, x: Tensor, y: Tensor, rows: slice) -> tuple[Tensor, Tensor, int]:
        """Summed loss and right answers of some, float64, on the same samples [B, ...]; and of how many."""
        counts = list[int]()

        def one(own: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            loss, right, count = sums(self.model, functional_call(self.net, own, (x,)), y)
            counts.append(count)
            return loss, right

        own = {name: tensor[rows] for name, tensor in (self.parameters | self.buffers).items()}
        loss, right = _mapped(one, (0, None, None))(own, x, y)
        return loss, right, counts[0]

    def keep(self) -> None:
        """Write the buffers to the flat one."""
        for spec in self.model.params.statistics:
            if spec.name in self.buffers:  # or it is a parameter that is not trained
                place = self.flat[:, spec.span].view(len(self.flat), *spec.shape)
                for row, buffer in zip(place, self.buffers[spec.name], strict=True):
                    row.copy_(floats(buffer))


def _mapped(call: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """All replicas at once; where torch has no way for an operation it loops, and that is not news."""
    mapped = torch.vmap(call, in_dims, randomness="error")

    def quiet(*values: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return mapped(*values)

    return quiet


class SideBySideSteps:
    """The steps of R jobs of one module; see `engine.state.Steps`."""

    many = 1

    def __init__(self, batch: Batch) -> None:
        model, recipe, weights, mask = batch.model, batch.recipe, batch.weights, batch.mask
        assert isinstance(model, ModuleModel)
        self.batch, self.recipe, self.model, n = batch, recipe, model, model.params.trained_size
        self.grad = torch.zeros(len(weights), n, dtype=torch.float32, device=weights.device)
        self.networks = Replicas(model, batch.who[0].seed, weights, self.grad)
        self.batches = Batches(batch.data, batch.who, recipe.batch_size, recipe.augment)
        self.updates: list[tuple[int, Step]] = []  # the optimizer's first step, and its update
        self.state_bytes, rows = 4 * self.grad.numel(), 0
        for start, some in groupby(batch.jobs, lambda job: job.start_step):
            span = slice(rows, rows := rows + len([*some]))
            full = bool((mask[span].sum(1) == model.params.prunable).all())
            moments = [moment[span, :n] for moment in batch.moments]
            live = None if full else mask[span]
            update, size = bind_update(weights[span, :n], self.grad[span], moments, live, recipe, batch.paths)
            self.updates.append((start, update))
            self.state_bytes += size

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        taken = 0
        self.networks.net.train()
        apart, named = drawing_apart(str(self.grad.device)), errors_named(self.model, "training side by side")
        with apart, named, _nothing_drawn():
            while taken < steps and not should_stop():
                now = step + taken
                x, y = self.batches.first(now)
                self.grad.zero_()
                self.networks.losses(x, y).sum().backward()  # type: ignore[no-untyped-call]
                for start, update in self.updates:
                    update(now - start + 1, self.recipe.lr_at(now))
                taken += 1
        self.networks.keep()
        return taken

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        losses, accuracies, rows = list[float](), list[float](), 0
        self.networks.net.eval()
        for (_, seed), some in groupby(self.batch.jobs, lambda job: (job.start_step, job.who.seed)):
            span = slice(rows, rows := rows + len([*some]))
            found = self._measure(span, self.batch.data.validation_first(seed), should_stop)
            losses += found[0]
            accuracies += found[1]
        return losses, accuracies

    def _measure(
        self, rows: slice, chunks: Sequence[Chunk], should_stop: Callable[[], bool]
    ) -> tuple[list[float], list[float]]:
        found = []
        with errors_named(self.model, "evaluation side by side"):
            for x, y in chunks:
                if should_stop():
                    raise Stopped
                found.append(self.networks.sums(x, y, rows))
        total = sum(count for *_, count in found)
        loss, right = (sum(column) / total for column in (*zip(*found, strict=True),)[:2])
        return loss.tolist(), right.tolist()

    def memory(self) -> Held:
        return self.batch.held(self.grad, self.batches)


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """SparselthError where numpy or Python drew random numbers, which all replicas would share."""
    before = _stand()
    yield
    if _stand() != before:
        raise SparselthError(f"{SHARED}, after a first step in which none were; use `replicas` 1")


def _stand() -> tuple[Any, ...]:
    """Where the generators of Python and numpy stand."""
    _, numbers, *more = np.random.get_state()
    return random.getstate(), np.asarray(numbers).tobytes(), more


def refusal(model: ModuleModel, labels: Tensor, seeds: Iterable[int]) -> str:
    """Why networks of these seeds cannot train side by side; "" where they can. Tries a step of two.

    `labels` are those of a few samples, on the device.
    """
    first, *others = dict.fromkeys(seeds)
    net = model.build(first)
    if any(name.rpartition(".")[2] in _OF_COMPILED for name in _attributes(net)):
        return COMPILED
    for seed in others:
        if name := _differs(_attributes(net), _attributes(model.build(seed))):
            return f"its {name}, which is neither parameter nor buffer, differs from seed to seed"
    flat = model.params.gather(net).repeat(2, 1).to(labels.device)
    x = model.example()[: len(labels)].to(labels.device)
    y = labels[: len(x)]
    with drawing_apart(str(labels.device)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that vmap takes one after another
        stand = _stand()
        try:
            two = Replicas(model, first, flat, torch.zeros_like(flat))
            before = {name: _as_is(value) for name, value in _attributes(two.net).items()}
            two.losses(x.expand(2, *x.shape), y.expand(2, *y.shape)).sum().backward()  # type: ignore[no-untyped-call]
            two.net.eval()
            two.sums(x, y, slice(0, 2))
            two.net.train()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return DRAWS if "called random operation" in str(error) else said(error)
        if _stand() != stand:
            return SHARED
    after = {name: _as_is(value) for name, value in _attributes(two.net).items()}
    for name in before | after:
        if not _same(before.get(name), after.get(name)):
            return f"it keeps {name} from one call to the next"
    return ""


class _Holds(tuple[Any, ...]):
    """What a list, dict or set held at a time."""


def _as_is(value: Any) -> Any:
    """A value, of a container what it holds now, within others too."""
    if isinstance(value, dict):
        return _Holds([*value, *map(_as_is, value.values())])
    if isinstance(value, list | tuple | set | deque):
        return _Holds(map(_as_is, value))
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether a value is the very same, numbers and words by value, and so is what containers hold."""
    if type(one) is _Holds is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


def _attributes(net: nn.Module) -> dict[str, Any]:
    """What modules have beside parameters and saved buffers, by name."""
    found = dict[str, Any]()
    for path, one in net.named_modules():
        own = {name: value for name, value in vars(one).items() if name not in _TORCHS}
        own |= {name: one._buffers[name] for name in one._non_persistent_buffers_set}
        found |= {f"{path}.{name}" if path else name: value for name, value in own.items()}
    return found


def _differs(some: dict[str, Any], others: dict[str, Any]) -> str:
    """The first name under which they differ, or could."""
    for name in some | others:
        if name not in some or name not in others or not _alike(some[name], others[name]):
            return name
    return ""


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are known to be the same."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_alike, one.values(), other.values()))
    return isinstance(one, nn.Module) or (isinstance(one, _PLAIN) and bool(one == other))
