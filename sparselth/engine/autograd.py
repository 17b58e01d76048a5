"""One network of any kind through torch's autograd: modules of users, and on request graphs of known layers.

Its tensors lie in the flat buffer, its gradients in another: so one fused update serves all of them. What the
forward draws, as dropout does, comes from a stream of (seed, arm, level, draw, step): it depends neither on
who else trains nor on where training was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.config import Cell
from sparselth.data.batches import Chunk
from sparselth.engine.memory import Held, is_out_of_memory
from sparselth.engine.paths import Paths
from sparselth.engine.state import Batch, Stopped, never
from sparselth.engine.team import Team, synchronise
from sparselth.engine.update import bind_update
from sparselth.errors import SparselthError
from sparselth.models import Model
from sparselth.models.module import IGNORED, Judge, ModuleModel
from sparselth.models.torch import network, tensors
from sparselth.params import copy_floats, floats
from sparselth.streams import drawing_apart, number, seed_everything
from sparselth.user_files import said


def takes_autograd(model: Model, paths: Paths) -> bool:
    """Whether a network is trained here."""
    return model.needs_autograd or paths.masked_linear.takes == "autograd"


@contextmanager
def errors_named(model: Model, where: str) -> Iterator[None]:
    """What a user's code raises as an error of a line; where memory is short others must know it."""
    try:
        yield
    except (SparselthError, Stopped):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SparselthError(f"`model` {model.name}: in {where}: {said(error)}") from error


def one_number(name: str, value: Any) -> Tensor:
    """What a user's `loss` or `accuracy` gave; SparselthError for anything but one number."""
    if isinstance(value, int | float):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise SparselthError(
            f"`{name}(output, target)` gives {what}; expected one number, the mean of a batch"
        )
    return value.reshape(())


def judges(model: Model) -> tuple[Judge | None, Judge | None]:
    """A user's own loss and accuracy, None where they are cross-entropy and the share of right labels."""
    return (model.loss, model.accuracy) if isinstance(model, ModuleModel) else (None, None)


def mean_loss(model: Model, output: Tensor, target: Tensor, whole: Tensor | None = None) -> Tensor:
    """The loss whose gradient trains, a number.

    Where targets are a share of the `whole` batch, that share of its mean: the sum over shares is the loss.
    """
    if (loss := judges(model)[0]) is not None:
        found = one_number("loss", loss(output, target))
        return found if whole is None else found * (len(target) / len(whole))
    output, target = output.flatten(0, -2), target.flatten()
    if whole is None:
        return F.cross_entropy(output, target)
    return F.cross_entropy(output, target, reduction="sum") / (whole != IGNORED).sum()


def sums(model: Model, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Summed loss and number of right answers, float64, and of how many."""
    own_loss, own_accuracy = judges(model)
    known = y != IGNORED if own_loss is None or own_accuracy is None else None
    count = len(y) if known is None else int(known.sum())
    if own_loss is None:
        losses = F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none")
        loss = losses.double().sum()
    else:
        loss = one_number("loss", own_loss(output, y)).double() * count
    if own_accuracy is None:
        right = (output.argmax(-1) == y).double().sum()  # what is ignored is no class
    else:
        right = one_number("accuracy", own_accuracy(output, y)).double() * count
    return loss, right, count


class AutogradNetwork:
    """A network whose tensors are views of a flat buffer [1, P], and its gradients of another.

    Called it gives the output for samples [B, ...], images channels-last where the network takes them so.
    """

    def __init__(self, model: Model, who: Cell, flat: Tensor, grad: Tensor | None = None) -> None:
        self.model, self.flat, self.who = model, flat, who
        if isinstance(model, ModuleModel):
            self.net = model.build(who.seed)
            self.channels_last = model.seen.channels_last and model.convolves
        else:
            self.net = network(model, torch.zeros(model.params.size, dtype=torch.float32, device="cpu"))
            self.channels_last = model.convolves
        self.net.to(flat.device)
        found = tensors(model, self.net)
        trained = {spec.name for spec in model.params.weights + model.params.trained}
        for spec in model.params.all:
            tensor, place = found[spec.name], flat[0, spec.span].view(spec.shape)
            if tensor.dtype == torch.float32:
                tensor.data = place
            else:
                copy_floats(tensor.detach(), place)
            if grad is not None and spec.name in trained:
                tensor.grad = grad[0, spec.span].view(spec.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net(x)  # type: ignore[no-any-return]

    def keep(self) -> None:
        """Write buffers that are no views, because of their dtype or of a new tensor, to the flat one."""
        found = tensors(self.model, self.net)
        for spec in self.model.params.statistics:
            place = self.flat[0, spec.span].view(spec.shape)
            if found[spec.name].data_ptr() != place.data_ptr():
                place.copy_(floats(found[spec.name]))

    @torch.no_grad()
    def measure(
        self, chunks: Sequence[Chunk], should_stop: Callable[[], bool] = never, team: Team | None = None
    ) -> tuple[list[float], list[float]]:
        """(loss, accuracy) in evaluation mode, a list of one each; Stopped where `should_stop` says so.

        Of a team each takes its turn at a chunk, and all come to the same.
        """
        found, who, device = list[tuple[Any, Any, int]](), self.who, str(self.flat.device)
        size, rank = (team.size, team.rank) if team else (1, 0)
        own = iter(chunks[rank::size])
        self.net.eval()
        with drawing_apart(device), errors_named(self.model, "evaluation"):
            seed_everything(number(who.seed, who.arm, who.level, "evaluation", who.draw), device)
            for _ in range(0, len(chunks), size):
                if should_stop():
                    raise Stopped
                if chunk := next(own, None):
                    x, y = chunk
                    found.append(sums(self.model, self(x), y))
        loss, right, total = (sum(column) for column in zip(*found, strict=True)) if found else (0.0, 0.0, 0)
        if team:
            of_all = torch.tensor([loss, right, total], dtype=torch.float64, device="cpu")
            team.add(of_all)
            loss, right, total = of_all
        return [float(loss / total)], [float(right / total)]


class AutogradSteps:
    """The steps of one job; see `engine.state.Steps`. Of a team each takes its share of every batch."""

    many = 1

    def __init__(self, batch: Batch) -> None:
        (job,) = batch.jobs
        model, recipe, n = batch.model, batch.recipe, batch.model.params.trained_size
        self.batch, self.job, self.recipe = batch, job, recipe
        self.grad = torch.zeros(1, n, dtype=torch.float32, device=batch.weights.device)
        self.network = AutogradNetwork(model, job.who, batch.weights, self.grad)
        self.team, share = job.team, None
        if self.team:
            share = self.team.share(recipe.batch_size)
            synchronise(self.network.net, self.team)
        self.batches = batch.data.batches(batch.who, recipe.batch_size, recipe.augment, share)
        live = None if int(job.mask.sum()) == model.params.prunable else batch.mask
        moments = [moment[:, :n] for moment in batch.moments]
        self.update, size = bind_update(batch.weights[:, :n], self.grad, moments, live, recipe, batch.paths)
        self.state_bytes = 4 * self.grad.numel() + size

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        who, network, device = self.job.drawn, self.network, self.batches.data.device
        start, taken, team, whole = self.job.start_step, 0, self.team, None
        aside = team.aside if team else ""
        network.net.train()
        with drawing_apart(device), errors_named(network.model, "training"):
            while taken < steps and not should_stop():
                now = step + taken
                seed_everything(number(who.seed, who.arm, who.level, f"step/{now}{aside}", who.draw), device)
                x, y = self.batches.first(now)
                if team:
                    whole = self.batches.labels(now)[0]
                self.grad.zero_()
                mean_loss(network.model, network(x[0]), y[0], whole).backward()  # type: ignore[no-untyped-call]
                if team:
                    team.add(self.grad)
                self.update(now - start + 1, self.recipe.lr_at(now))
                taken += 1
        network.keep()
        return taken

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        chunks = self.batch.data.validation_first(self.job.who.seed)
        return self.network.measure(chunks, should_stop, self.team)

    def memory(self) -> Held:
        return self.batch.held(self.grad, self.batches)
