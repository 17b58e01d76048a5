"""Workers that train one network together, each on its share of every batch.

All hold the same network. What goes between them are sums over the team: of gradients, before mask and
update, so that all take the same step; of what batch norms see and of what evaluations find, so that both are
those of the whole batch and of all images. Whatever a clock or a signal decides, the first worker decides: it
leads, and alone writes files. That masks and weights are the same bits on all is not believed but checked.

A process is of one team at most, and for its life. Sums go over gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparselth.config import Cell
from sparselth.errors import SparselthError

PATIENCE = timedelta(minutes=30)  # for the slowest of a team; who dies is noticed at once


class Parted(SparselthError):
    """Another worker of a team has gone, and knows why; of the errors of a team this says least."""


@dataclass(frozen=True)
class Seat:
    """A worker's place in a team: where torch's store is, the team's name there, who is in it."""

    store: str | tuple[str, int]  # a file of this machine, or host and port
    team: str
    names: tuple[str, ...]
    rank: int

    def taken(self, device: str) -> Team:
        """The team, once all of it are there; SparselthError where they do not find each other."""
        size = len(self.names)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        team = Team(self.names, self.rank)
        try:
            with _silent():
                if isinstance(self.store, str):
                    store: Any = dist.FileStore(self.store, size)  # type: ignore[attr-defined]
                else:
                    store = dist.TCPStore(*self.store, is_master=False)  # type: ignore[attr-defined]
                named = dist.PrefixStore(self.team, store)  # type: ignore[attr-defined]
                dist.init_process_group(backend, None, PATIENCE, size, self.rank, named)
                team.agree(False)  # the first word, and so a connection
        except (RuntimeError, Parted) as error:  # torch's own are RuntimeErrors
            raise SparselthError(
                f"{self.names[self.rank]} does not reach the others of its team ({error}); between hosts "
                "GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME of GPUs, name the network interface"
            ) from error
        return team


@contextmanager
def _silent() -> Iterator[None]:
    """Within, nothing gets to stdout, which is for results: gloo has words of its own for it."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Team:
    """The workers of a network, as one of them; everything but `share` waits for all of them."""

    names: tuple[str, ...]
    rank: int

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def aside(self) -> str:
        """What its random draws are named apart by: those of who leads are as they are without a team."""
        return "" if self.leads else f"/worker/{self.rank}"

    def share(self, batch: int) -> slice:
        """Its samples of a batch; shares differ by one at most."""
        return slice(batch * self.rank // self.size, batch * (self.rank + 1) // self.size)

    def add(self, tensor: Tensor) -> None:
        """Make a tensor the sum of all, in place, and the same bits on all."""
        with self._together():
            dist.all_reduce(tensor)

    def rows(self, row: Tensor) -> Tensor:
        """The rows [N, ...] of all, one each."""
        found = row.new_zeros(self.size, *row.shape)
        found[self.rank] = row
        self.add(found)  # of each row all others have zeros
        return found

    def follow(self, *tensors: Tensor) -> None:
        """Make tensors those of who leads, in place."""
        with self._together():
            for tensor in tensors:
                dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, 0)

    def agree(self, wish: bool) -> bool:
        """What who leads wishes."""
        word = torch.tensor([wish], dtype=torch.uint8, device="cpu")
        self.follow(word)
        return bool(word)

    def check(self, who: Cell, what: str, tensors: Sequence[Tensor]) -> None:
        """Raise SparselthError unless these tensors of a cell are the same bits on all, by their SHA-256."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().numpy().tobytes())
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)
        others = self.rows(own)
        for name, row in zip(self.names, others, strict=True):
            if not torch.equal(row, others[0]):
                raise SparselthError(
                    f"{who}: the {what} of {name} came out other than the {what} of {self.names[0]}; "
                    "with `split` they must be the same bits: train on hosts of one kind or without `split`; "
                    "what is finished is kept, continue with `resume`"
                )

    def end(self) -> None:
        """Let go of the others, once nobody waits for anybody."""
        dist.destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Parted(f"{self.names[self.rank]} has lost the others of its team: {error}") from error


def synchronise(net: nn.Module, team: Team) -> None:
    """Have the batch norms of a module normalize by the whole batch while it trains.

    Whatever else looks at several samples at once sees its share alone.
    """
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(_batch_norm, module, team)  # type: ignore[method-assign]


def _batch_norm(norm: _BatchNorm, team: Team, x: Tensor) -> Tensor:
    """What the norm gives for a share [B, C, ...]; its running statistics move as by the whole batch."""
    if not norm.training:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)  # type: ignore[no-untyped-call]
    shape = 1, -1, *[1] * (x.dim() - 2)
    found, mean, var, count = _Normalized.apply(x, shape, norm.eps, team)
    if norm.running_mean is not None and norm.running_var is not None:
        rate = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            rate = 1 / float(norm.num_batches_tracked) if rate is None else rate
        norm.running_mean.lerp_(mean, rate or 0.0)
        norm.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), rate or 0.0)
    if norm.weight is not None:
        found = found * norm.weight.view(shape)
    if norm.bias is not None:
        found = found + norm.bias.view(shape)
    return found  # type: ignore[no-any-return]


class _Normalized(torch.autograd.Function):
    """A share x [B, C, ...] less the mean of the whole batch, over its deviation; and mean and variance [C]
    of the batch, and how many numbers a channel has there.

    Two sums over the team a step, one forward and one back. Variances of shares are joined by their distances
    from the mean of the batch, which loses no digits where the mean is large.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int], eps: float, team: Team) -> tuple[Tensor, ...]:
        ctx.dims = dims = [0, *range(2, x.dim())]
        own = x.mean(dims)
        squares = (x - own.view(shape)).square().sum(dims)
        count = own.new_full((1,), x.numel() / len(own))
        rows, channels = team.rows(torch.cat([own, squares, count])), len(own)
        means, squares, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (squares + counts * (means - mean).square()).sum(0) / count
        scale = (var + eps).rsqrt().view(shape)
        found = (x - mean.view(shape)) * scale
        ctx.save_for_backward(found, scale, count)
        ctx.shape, ctx.team = shape, team
        ctx.mark_non_differentiable(mean, var, count)
        return found, mean, var, count

    @staticmethod
    def backward(ctx: Any, d: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        found, scale, count = ctx.saved_tensors
        sums = torch.stack([d.sum(ctx.dims), (d * found).sum(ctx.dims)])
        ctx.team.add(sums)
        level, slope = (sums / count).view(2, *ctx.shape)
        return (d - level - found * slope) * scale, None, None, None
