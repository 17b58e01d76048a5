"""The one door to the engines: who trains together, and through which of them.

Jobs that take the same way train as the replicas of one batch; on a CPU, where one network fills the
caches, built-in ones train one after another. A job's mask and the paths alone decide, so that what a job
computes does not depend on the others. Modules train side by side, where they can, if several are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sparselth.config import Recipe
from sparselth.data.batches import Chunk, Resident
from sparselth.engine.autograd import AutogradNetwork, AutogradSteps, takes_autograd
from sparselth.engine.batch import DenseForward, DenseSteps
from sparselth.engine.break_even import gain
from sparselth.engine.compressed import CompressedForward, CompressedSteps
from sparselth.engine.layout import Layout, compressible
from sparselth.engine.paths import Paths, choose
from sparselth.engine.popup import PopupSteps
from sparselth.engine.popup_module import PopupModuleSteps
from sparselth.engine.replay import Replay
from sparselth.engine.side_by_side import SideBySideSteps, refusal
from sparselth.engine.state import Batch, Job, Steps, measure, never
from sparselth.errors import UsageError
from sparselth.models import Conv, Model
from sparselth.models.module import EXAMPLES, ModuleModel


@dataclass(frozen=True)
class Group:
    """Jobs that train together, and are evaluated together."""

    model: Model
    jobs: Sequence[Job]
    paths: Paths
    # of one job that trains through a chain of calls: its layers in the compressed domain, which may be none
    compressed: frozenset[str] | None = None

    def enter(self, recipe: Recipe) -> None:
        """Bring the states to the form in which they train."""
        if self.compressed is None:
            return
        for job in self.jobs:
            layout = Layout(self.model, job.mask, self.compressed, decays=recipe.weight_decay > 0)
            job.state.enter(layout)

    def leave(self) -> None:
        for job in self.jobs:
            job.state.leave()

    def networks(self, best: bool = False) -> Tensor:
        """The weights [R, P] that the jobs' networks compute with now, or at the least validation loss."""
        return torch.cat([job.network(self.model, best) for job in self.jobs])

    def measure(
        self, weights: Tensor, chunks: Sequence[Chunk], should_stop: Callable[[], bool] = never
    ) -> tuple[list[float], list[float]]:
        """(loss, accuracy) of weights [R, P] under the jobs' masks, each a list of R; may raise Stopped."""
        if takes_autograd(self.model, self.paths):
            (job,) = self.jobs
            return AutogradNetwork(self.model, job.who, weights).measure(chunks, should_stop, job.team)
        if self.compressed is None:
            dense = DenseForward(self.model, weights, takes_vendor(self.model, self.paths))
            return measure(dense, chunks, should_stop)
        (job,) = self.jobs
        layout, kernels = Layout(self.model, job.mask, self.compressed), self.paths.csr_linear.takes
        compressed = CompressedForward(self.model, layout, layout.compress(weights), kernels)
        return measure(compressed, chunks, should_stop)


def groups(
    model: Model,
    jobs: Sequence[Job],
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
    data: Resident | None = None,
) -> Iterator[Group]:
    """The jobs by how they train: `kernels` as in `engine.paths`.

    On a CPU layers with a smaller share of survivors than `break_even`, by name, are compressed where there
    are kernels for it. Several of one module train side by side if `data` says on what.
    """
    together: tuple[list[Job], list[Job]] = [], []  # trained, frozen
    device = jobs[0].state.weights.device.type
    paths = choose(kernels, device)
    if takes_autograd(model, paths):
        frozen = any(job.frozen for job in jobs)
        if frozen and not isinstance(model, ModuleModel):
            raise UsageError(
                f"`kernels` {kernels}: autograd trains no scores over frozen weights of a built-in network; "
                "use `kernels` auto"
            )
        if data is not None and len(jobs) > 1 and isinstance(model, ModuleModel) and not frozen:
            seeds = [job.who.seed for job in jobs]
            if not refusal(model, data.labels[:EXAMPLES], seeds):
                yield Group(model, jobs, paths)
                return
        yield from (Group(model, [job], paths) for job in jobs)
        return
    for job in jobs:
        compressed = None
        if job.frozen is None:
            compressed = compressed_layers(model, job.mask, break_even or {}, paths)
        if compressed is not None or trains_alone(paths, device):
            yield Group(model, [job], paths, compressed)
        else:
            together[job.frozen is not None].append(job)
    for some in together:
        if some:
            yield Group(model, some, paths)


def steps(batch: Batch) -> Steps:
    """The engine of jobs that are in the form in which they train."""
    if takes_autograd(batch.model, batch.paths):
        if batch.jobs[0].frozen is not None:
            return PopupModuleSteps(batch)
        # one of several whose others are behind, or have diverged, has the bits of one alone
        return SideBySideSteps(batch) if len(batch.jobs) > 1 else AutogradSteps(batch)
    if batch.jobs[0].frozen is not None:
        return PopupSteps(batch, takes_vendor(batch.model, batch.paths))
    if batch.jobs[0].state.layout is not None:
        return CompressedSteps(batch)
    if batch.paths.masked_update.takes == "triton":
        return Replay(batch)
    return DenseSteps(batch, takes_vendor(batch.model, batch.paths))


def prepare(
    model: Model,
    data: Resident,
    jobs: Sequence[Job],
    recipe: Recipe,
    kernels: str = "auto",
    break_even: Mapping[str, float] | None = None,
) -> Steps:
    """What takes the steps of one group of jobs in `train.fit`, to time it; states stay as it has them."""
    (group,) = groups(model, jobs, kernels, break_even, data)
    group.enter(recipe)
    return steps(Batch(model, data, group.jobs, recipe, group.paths))


def images_of_test(model: Model, data: Resident, kernels: str) -> Sequence[Chunk]:
    """The test images as `Group.measure` takes them."""
    return data.test_first() if takes_autograd(model, choose(kernels, data.device)) else data.test()


def trains_alone(paths: Paths, device: str) -> bool:
    """Whether networks train one after another: on a CPU a batch takes as long as its replicas together.

    And MKL rounds small products by where in memory their numbers begin (on Zen 4), so that a replica's
    bits would depend on how many come before it.
    """
    return device == "cpu" and paths.masked_update.takes != "triton"


def compressed_layers(
    model: Model, mask: Tensor, break_even: Mapping[str, float], paths: Paths
) -> frozenset[str] | None:
    """The layers that are trained in the compressed domain; None: the network is no chain of calls for that.

    Fully connected ones are, with no layer compressed, too: dense LeNet-300-100 takes 0.78 of the time of
    `DenseSteps`. Dense convolutions are faster through torch's own layers.
    """
    if not compressible(model) or paths.csr_linear.takes not in ("native", "torch"):
        return None
    kept = model.params.kept(mask)
    found = {s.name for s in model.weights if kept[s.name] < break_even.get(s.name, 0.0) * s.numel}
    convs = {s.name: prod(after[1:]) for s, layer, _, after in model.producers if isinstance(layer, Conv)}
    pay = (
        gain(
            (convs[s.name], break_even.get(s.name, 0.0), s.numel, kept[s.name])
            for s in model.weights
            if s.name in convs
        )
        > 0
    )
    if convs and not pay and paths.masked_conv2d.takes == "vendor":
        return None
    return frozenset(found | set(convs) if pay else found - set(convs))


def takes_vendor(model: Model, paths: Paths) -> bool:
    """Whether dense networks go through `VendorNetwork`, one at a time: they have convolutions."""
    return paths.masked_conv2d.takes == "vendor" and model.convolves
