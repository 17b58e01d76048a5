"""Many networks of one model on the same images: what each loses and gets right; none is trained.

Graphs of known layers go through the replica axis, as many at once as fit beside their activations; modules,
and what a CPU gives to torch's convolutions, one after another. Running statistics of batch norms that were
averaged over a path of other weights say nothing of these: where a model has any they are computed anew for
every network, from training images, before it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sparselth.config import Cell
from sparselth.data.batches import Chunk, Resident
from sparselth.engine.autograd import AutogradNetwork, errors_named, takes_autograd
from sparselth.engine.batch import DenseForward
from sparselth.engine.choose import takes_vendor
from sparselth.engine.dense import Network
from sparselth.engine.layers import MOMENTUM
from sparselth.engine.paths import choose
from sparselth.engine.state import Stopped, measure, never
from sparselth.engine.vendor import VendorNetwork
from sparselth.models import Model
from sparselth.params import Params, matrix

BATCHES = 10  # that statistics are computed from, unless asked otherwise
FLOATS = {"cpu": 1 << 24, "cuda": 1 << 29}  # of activations at once
Make = Callable[[int, int], Tensor]  # the networks from one place to another, [r, P]
Found = tuple[list[float], list[float]]  # loss and accuracy of each network


class Many:
    """Networks of a model on images of a data set, as `seed` divides them."""

    def __init__(
        self, model: Model, data: Resident, seed: int, kernels: str = "auto", batches: int = BATCHES
    ) -> None:
        """`batches`: evaluation batches of training images that statistics are computed from."""
        paths = choose(kernels, data.device)
        self.model, self.data, self.seed = model, data, seed
        self.one_by_one = takes_autograd(model, paths)
        self.vendor = not self.one_by_one and takes_vendor(model, paths)
        self.settles: Sequence[Chunk] = []  # what statistics are computed from
        self.module: AutogradNetwork | None = None
        self.norms: list[_BatchNorm] = []
        if self.one_by_one:
            flat = torch.zeros(1, model.params.size, dtype=torch.float32, device=data.device)
            self.module = AutogradNetwork(model, Cell(seed, "ticket", 0), flat)
            self.norms = [
                one
                for one in self.module.net.modules()
                if isinstance(one, _BatchNorm) and one.running_mean is not None
            ]
        if self.norms or (not self.one_by_one and model.params.statistics):
            whole = self.training(batches * data.chunk)
            short = self._size(whole[-1]) < data.chunk
            self.settles = whole[:-1] if short and len(whole) > 1 else whole

    def training(self, most: int) -> Sequence[Chunk]:
        """So many training images at most."""
        data = self.data
        return data.held((data.training_first if self.one_by_one else data.training)(self.seed, most))

    def test(self, most: int) -> Sequence[Chunk]:
        """So many test images at most, evenly spread."""
        some = self.data.sample(most)
        return some.held(some.test_first() if self.one_by_one else some.test())

    def measure(
        self,
        count: int,
        make: Make,
        images: Sequence[Sequence[Chunk]],
        should_stop: Callable[[], bool] = never,
    ) -> list[Found]:
        """Loss and accuracy of `count` networks for each of several lots of images.

        `make(i, j)` gives the weights [j - i, P] of networks i to j; they may be changed. Raises Stopped
        where `should_stop` says so between two chunks.
        """
        found: list[Found] = [([], []) for _ in images]
        forwards: dict[int, DenseForward] = {}  # by replicas, whose buffers are filled again
        for start, end in self.parts(count):
            weights = make(start, end)
            for lot, chunks in zip(found, images, strict=True):
                if lot is found[0]:
                    forward = self._taken(weights, forwards, should_stop)
                losses, accuracies = forward(chunks, should_stop)
                lot[0].extend(losses)
                lot[1].extend(accuracies)
        return found

    def settled(self, weights: Tensor, should_stop: Callable[[], bool] = never) -> None:
        """Compute the statistics of batch norms of weights [R, P] anew, in place: means of the batches'."""
        if not self.settles:
            return
        if self.module is not None:
            for row in weights:
                self.module.flat.copy_(row)
                self._settle_module(should_stop)
                row.copy_(self.module.flat[0])
            return
        if self.vendor:
            for r in range(len(weights)):
                self._settle(VendorNetwork(self.model, *_with_grad(weights[r : r + 1])), weights[r : r + 1])
                if should_stop():
                    raise Stopped
            return
        flat, grad = _with_grad(weights)
        network = Network(self.model, flat, self._size(self.settles[0]), grad)
        self._settle(network, weights, should_stop)

    # ---- how

    def parts(self, count: int) -> Iterator[tuple[int, int]]:
        """Which networks are looked at together."""
        each = 1
        if not self.one_by_one and not self.vendor:
            each = max(1, FLOATS[self.data.device] // (self.data.chunk * sum(map(prod, self.model.shapes))))
        for start in range(0, count, each):
            yield start, min(start + each, count)

    def _taken(
        self, weights: Tensor, forwards: dict[int, DenseForward], should_stop: Callable[[], bool]
    ) -> Callable[[Sequence[Chunk], Callable[[], bool]], Found]:
        """What looks at chunks with these weights, their statistics computed."""
        if self.module is not None:
            self.module.flat.copy_(weights)
            self._settle_module(should_stop)
            return self.module.measure
        self.settled(weights, should_stop)
        if len(weights) not in forwards:
            forwards[len(weights)] = DenseForward(self.model, weights.clone(), self.vendor)
        forward = forwards[len(weights)]
        forward.weights.copy_(weights)
        return lambda chunks, stop: measure(forward, chunks, stop)

    @torch.no_grad()
    def _settle_module(self, should_stop: Callable[[], bool]) -> None:
        assert self.module is not None
        net = self.module.net.eval()
        before = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # then it is a mean
            norm.train()
        with errors_named(self.model, "evaluation"):
            for x, _ in self.settles:
                if should_stop():
                    raise Stopped
                self.module(x)
        for norm, momentum in zip(self.norms, before, strict=True):
            norm.momentum = momentum
        net.eval()

    def _settle(
        self,
        network: Network | VendorNetwork,
        weights: Tensor,
        should_stop: Callable[[], bool] = never,
    ) -> None:
        statistics = weights[:, self.model.params.trained_size :]
        total = torch.zeros_like(statistics, dtype=torch.float64)
        for x, _ in self.settles:
            if should_stop():
                raise Stopped
            statistics.zero_()  # of which a step then leaves MOMENTUM times the batch's own
            network.forward(x.expand(len(weights), -1, -1))
            total += statistics
        statistics.copy_(total / (MOMENTUM * len(self.settles)))

    def _size(self, chunk: Chunk) -> int:
        return len(chunk[0]) if self.one_by_one else int(chunk[0].shape[2])


def _with_grad(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and a place for gradients: with one a network trains, by a batch's own statistics."""
    return weights, torch.zeros_like(weights)


def line(start: Tensor, end: Tensor, places: Tensor) -> Make:
    """The networks at `places` [N] between two, 0 the first and 1 the second: both are met exactly."""
    return lambda i, j: torch.lerp(start[None], end[None], places[i:j, None])


def direction(params: Params, weights: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction [P] within what a mask [M] keeps, normalised by filter (Li et al. 2018, section 4).

    Each row of a weight [N, K], a filter or a neuron, is as long as that of `weights` [P]. Biases, batch
    norms and their statistics stay where they are.
    """
    found = torch.zeros(params.size, dtype=torch.float32, device="cpu")
    for spec in params.weights:
        found[spec.span] = torch.randn(spec.numel, generator=generator, dtype=torch.float32, device="cpu")
    found = found.to(weights.device)
    found[: params.mask_size] *= mask
    for spec in params.weights:
        rows, own = matrix(spec, found), matrix(spec, weights)
        rows *= own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return found


def square(points: int, radius: float) -> Tensor:
    """Places (a, b) of a grid [points * points, 2] from -radius to radius, a by rows; 0 is met exactly."""
    middle = (points - 1) / 2
    side = (torch.arange(points, dtype=torch.float64, device="cpu") - middle) / middle * radius
    return torch.cartesian_prod(side, side).float()


def barrier(values: Sequence[float]) -> float:
    """How far the largest of values along a line is above the mean of its ends."""
    return max(values) - (values[0] + values[-1]) / 2
