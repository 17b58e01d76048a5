"""R dense networks whose zeros lie in the weights, or one through torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from sparselth.data.batches import Batches
from sparselth.engine.dense import Network, cross_entropy, cross_entropy_grad
from sparselth.engine.memory import Held
from sparselth.engine.state import Batch, measure, never
from sparselth.engine.update import bind_update
from sparselth.engine.vendor import VendorNetwork
from sparselth.kernels.masked_update import Step
from sparselth.models import Model


class DenseForward:
    """R replicas with weights [R, P], for batches of any size; see `engine.state.Forward`."""

    def __init__(self, model: Model, weights: Tensor, vendor: bool) -> None:
        self.model, self.weights, self.vendor = model, weights, vendor
        self.networks: dict[int, Network | VendorNetwork] = {}

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        r, n = len(self.weights), x.shape[2]
        if n not in self.networks:
            self.networks[n] = (
                VendorNetwork(self.model, self.weights)
                if self.vendor
                else Network(self.model, self.weights, n)
            )
        return cross_entropy(self.networks[n].forward(x.expand(r, -1, -1)), y.expand(r, -1, -1))


class DenseSteps:
    """The steps of a batch through `Network`, or with `vendor` those of one job through `VendorNetwork`."""

    many = 1

    def __init__(self, batch: Batch, vendor: bool) -> None:
        model, data, recipe, weights, mask = batch.model, batch.data, batch.recipe, batch.weights, batch.mask
        self.batch, self.recipe = batch, recipe
        self.grad = torch.zeros_like(weights)
        self.batches = Batches(data, batch.who, recipe.batch_size, recipe.augment)
        self.network: Network | VendorNetwork
        if vendor:
            self.network = VendorNetwork(model, weights, self.grad)
        else:
            self.network = Network(model, weights, recipe.batch_size, self.grad)
        self.updates: list[tuple[int, Step]] = []  # the optimizer's first step, and its update
        self.state_bytes = 4 * self.grad.numel()
        rows, n = 0, model.params.trained_size
        for start, some in groupby(batch.jobs, lambda job: job.start_step):
            span = slice(rows, rows := rows + len([*some]))
            full = bool((mask[span].sum(1) == model.params.prunable).all())
            moments = [moment[span, :n] for moment in batch.moments]
            live = None if full else mask[span]
            update, size = bind_update(
                weights[span, :n], self.grad[span, :n], moments, live, recipe, batch.paths
            )
            self.updates.append((start, update))
            self.state_bytes += size
        # replicas of one seed share their validation images; a seed's rows lie side by side in a span
        self.forwards: list[tuple[int, DenseForward]] = []
        rows = 0
        for (_, seed), some in groupby(batch.jobs, lambda job: (job.start_step, job.who.seed)):
            span = slice(rows, rows := rows + len([*some]))
            self.forwards.append((seed, DenseForward(model, weights[span], vendor)))

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        for i in range(steps):
            if should_stop():
                return i
            x, y = self.batches.at(step + i)
            self.network.backward(cross_entropy_grad(self.network.forward(x), y))
            for start, update in self.updates:
                update(step + i - start + 1, self.recipe.lr_at(step + i))
        return steps

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        losses, accuracies = list[float](), list[float]()
        for seed, forward in self.forwards:
            found = measure(forward, self.batch.data.validation(seed), should_stop)
            losses += found[0]
            accuracies += found[1]
        return losses, accuracies

    def memory(self) -> Held:
        if isinstance(self.network, VendorNetwork):
            self.network.kept = []  # activations of the last step; the next one finds its own
        return self.batch.held(self.grad, self.batches)
