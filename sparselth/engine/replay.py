"""The step of R replicas as launches on fixed buffers: on CUDA captured once and replayed many at a time.

Everything a step needs lies on the device: the step's number, the order of the images, learning rates, the
optimizer's counts. The host waits for the device only where an evaluation is read. Fully connected layers
go through `linear_grad_update`, which never writes their gradient; the rest through `masked_update`. A
batch norm moves the running statistics of active replicas alone.
Without CUDA the same launches run one by one, in Triton's interpreter.

Account of a step of 100 LeNet-300-100, batch 60, Adam. Floor: 28 bytes of each of 266,610 weights and
biases (read forward; read and written with two moments), their bits and 60 images, 754 MB: 251 us at the 3.0
TB/s that an H100 copies, 175 us at an H200's 4.3. Launches, counted by a test: 15 (3 products forward, 2
back, 3 `linear_grad_update`, 2 ReLU back, 5 of replica_parts), of 29 before those. Expected on an H200: 220
to 260 us of updates, 3.6 GFLOP of fp32 products at 35 to 45 TFLOP/s 80 to 100, the rest 20 to 25 (gather 6,
bias_relu 6, ReLU back 6, two short ones 4): 320 to 385 us, 1.8 to 2.2 times the floor. Goal 2.

Of a step of 30 Conv-2 on an H100: floor 3.6 GB of weights and moments, 1.2 ms, and 474 GFLOP in TF32, 1.2 ms.
It counts no activations, of which a layer has 472 MB: written and read by convolutions 3.8 GB, bias and ReLU
1.9, pool 0.6 and 1.2, ReLU back 1.4, sums of biases 0.9, together 9.8 GB, 3.3 ms, and the copies by which the
vendor's convolutions fold replicas into groups. Expected 4 ms and more, over 3 times the floor; goal 2 is out
of reach until products end in ReLU and gradients are summed where they are made, or activations are bf16.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparselth.config import Recipe
from sparselth.data.batches import Batches, Done, Event, Gather, Orders, Resident
from sparselth.engine.dense import Network
from sparselth.engine.memory import Held
from sparselth.engine.state import Batch, never
from sparselth.kernels import bitmask, replica_parts
from sparselth.kernels._graphs import capture, warm_up
from sparselth.kernels.linear_grad_update import linear_grad_update
from sparselth.kernels.masked_update import masked_adam_many, masked_sgd_many
from sparselth.models import Conv, Model
from sparselth.params import TensorSpec

FIXED = 2.0**32  # losses are summed as whole numbers of 2^-32: in any order the same sum
LOST = 1e7  # the loss of an image that is not finite
MANY = 20  # steps of one graph: a launch from the host takes as long as several kernels
WARM_UP = 3


@dataclass(frozen=True)
class Pulse:
    """What changes from step to step, by replica."""

    lr: Tensor  # fp64 [R]
    count: Tensor  # fp32 [R]: the optimizer's own step, from 1
    active: Tensor  # uint8 [R]: 0 leaves a replica as it is


@dataclass(frozen=True)
class FusedUpdate:
    """The update of a fully connected layer straight from its dy and x; tensors are the replicas' own."""

    recipe: Recipe
    pulse: Pulse
    weight: Tensor  # [R, N, K]
    moments: list[Tensor]
    bits: Tensor  # [R, N, ceil(K / 8)]
    bias: Tensor  # [R, N]
    bias_moments: list[Tensor]

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        linear_grad_update(
            dy,
            x,
            self.weight,
            self.moments,
            self.bits,
            self.bias,
            self.bias_moments,
            step=self.pulse.count,
            lr=self.pulse.lr,
            active=self.pulse.active,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
            optimizer=self.recipe.optimizer,
            kernels="triton",
        )


class Shown:
    """Images of R replicas as x [R, K, B] and labels [R, 1, B], in buffers that the next call overwrites.

    Our kernel takes bytes that stay where they are; others go through torch's gather.
    """

    def __init__(self, data: Resident, replicas: int, batch: int, augment: str = "none") -> None:
        device = data.images.device
        self.data, self.first = data, torch.zeros(1, dtype=torch.int64, device=device)
        self.scale, self.shift = data.scale.flatten(), data.shift.flatten()
        plain = data.holds_bytes and augment == "none"
        self.gather = None if plain else Gather(data, replicas, batch, augment)
        self.x = torch.zeros(replicas, batch, data.images.shape[1], device=device, dtype=torch.float32)
        self.y = torch.zeros(replicas, batch, dtype=torch.int64, device=device)

    def __call__(self, order: Tensor, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Those of order [R, steps, B] at `place`, or of order [R, B]."""
        if place is None:
            order, place = order[:, None], self.first
        if self.gather is not None:
            return self.gather(order.index_select(1, place).flatten())
        replica_parts.gather(
            self.data.images,
            self.data.labels,
            self.scale,
            self.shift,
            order,
            place,
            x=self.x,
            y=self.y,
            kernels="triton",
        )
        return self.x.mT, self.y[:, None]


class Replay:
    """Trains and evaluates the jobs of a batch in lock-step; see `engine.state.Steps`."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.recipe = batch, batch.recipe
        self.weights, self.moments = batch.weights, batch.moments
        model, data, recipe, paths = batch.model, batch.data, batch.recipe, batch.paths
        weights, mask, r, device = batch.weights, batch.mask, len(batch.jobs), batch.weights.device
        linear, conv = paths.masked_linear.takes, paths.masked_conv2d.takes
        bits = model.params.packed(mask)
        convs = [spec for spec, layer, *_ in model.producers if isinstance(layer, Conv)]
        fused = [spec for spec in model.weights if spec not in convs]
        self.grad = torch.zeros_like(weights) if convs or model.norms else None
        self.pulse = Pulse(
            torch.zeros(r, dtype=torch.float64, device=device),
            torch.zeros(r, device=device, dtype=torch.float32),
            torch.zeros(r, dtype=torch.uint8, device=device),
        )
        # no methods: a cycle through the network would keep graphs and buffers alive
        updates = {spec.name: self._fused(spec, bits[spec.name]) for spec in fused}
        build = partial(Network, model, weights, bits=bits, linear=linear, conv=conv)
        self.network = build(
            recipe.batch_size, self.grad, updates=updates, active=self.pulse.active, parts=True
        )
        self.convs = self._conv_lists(model, convs, mask)
        self.state_bytes = sum(t.numel() for t in bits.values())
        self.state_bytes += 0 if self.grad is None else 4 * self.grad.numel()

        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.rates = torch.tensor(
            [recipe.lr_at(step) for step in range(recipe.steps)], dtype=torch.float64, device="cpu"
        )
        self.rates = self.rates.to(device)
        starts = [job.start_step for job in batch.jobs]
        self.starts = torch.tensor(starts, dtype=torch.float32, device=device)

        self.batches = Batches(data, batch.who, recipe.batch_size, recipe.augment)
        self.event: Callable[[], Event] = torch.cuda.Event if weights.is_cuda else Done
        self.orders = Orders(self.batches, -(-recipe.steps // self.batches.steps_per_epoch), self.event)
        self.flight: list[Event] = []
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # of the step in its epoch
        self.shown = Shown(data, r, recipe.batch_size, recipe.augment)

        images = torch.stack([data.split(who.seed)[1][: data.n_validated] for who in batch.who]).to(device)
        self.validation: list[tuple[Tensor, Shown | Gather, Network]] = []
        by_size: dict[int, tuple[Shown | Gather, Network]] = {}
        for chunk in torch.split(images, data.chunk, 1):
            n = chunk.shape[1]
            if n not in by_size and weights.is_cuda:
                by_size[n] = Shown(data, r, n), build(n, parts=True)
            elif n not in by_size:
                # in the interpreter evaluations would take all the time; a CPU has the same bits at any R
                by_size[n] = Gather(data, r, n), Network(model, weights, n)
            self.validation.append((chunk.contiguous() if weights.is_cuda else chunk.flatten(), *by_size[n]))
        self.images = images.shape[1]
        self.sums = torch.zeros(2, r, dtype=torch.int64, device=device)  # losses in 2^-32; right answers

        self.many = MANY if weights.is_cuda else 1
        self.run: dict[int, Callable[[], None]] = {1: self._step}
        self.evaluate = self._evaluate
        if weights.is_cuda:
            self._capture()
        self.pulse.active.fill_(1)

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        self.clock.fill_(step)
        done = 0
        while done < steps and not should_stop():
            epoch, place = divmod(step + done, self.batches.steps_per_epoch)
            self.orders.enter(epoch)
            n = min(self.many, steps - done, self.batches.steps_per_epoch - place)
            if n in self.run:
                self.run[n]()
            else:
                for _ in range(n):
                    self.run[1]()
            done += n
            self._throttle()
        return done

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        self.evaluate()  # on a device one launch, which nothing stops
        return self.means()

    def memory(self) -> Held:
        return self.batch.held(self.grad, (self.batches, self.orders, self.shown))

    def means(self) -> tuple[list[float], list[float]]:
        """What the last evaluation found."""
        losses, right = self.sums.tolist()
        return [loss / FIXED / self.images for loss in losses], [n / self.images for n in right]

    def _throttle(self) -> None:
        """Wait for the launch before the last one: the host may be ahead, but not by a whole run."""
        event = self.event()
        event.record()
        self.flight.append(event)
        if len(self.flight) > 2:
            self.flight.pop(0).synchronize()

    def _step(self) -> None:
        replica_parts.begin_step(
            self.clock,
            self.rates,
            self.starts,
            lr=self.pulse.lr,
            count=self.pulse.count,
            place=self.place,
            steps=self.batches.steps_per_epoch,
            kernels="triton",
        )
        x, y = self.shown(self.orders.order, self.place)
        logits = self.network.forward(x)
        self.network.backward(replica_parts.cross_entropy_grad(logits, y[:, 0], self.network.late, "triton"))
        self._update_convs()

    def _evaluate(self) -> None:
        self.sums.zero_()
        for index, gather, network in self.validation:
            x, y = gather(index)
            logits = network.forward(x)
            losses = -torch.log_softmax(logits, 1).gather(1, y).double()
            losses = losses.nan_to_num(LOST, LOST).clamp(max=LOST)
            self.sums[0] += (losses * FIXED).round().long().sum((1, 2))
            self.sums[1] += (logits.argmax(1, keepdim=True) == y).sum((1, 2))

    def _capture(self) -> None:
        """Record the graphs, behind calls that compile and measure: while nobody is active all stays."""
        gc.collect()  # graphs of batches before must not die within a capture

        def both() -> None:
            self.clock.zero_()
            self._step()
            self._evaluate()

        warm_up(both, WARM_UP)
        memory = torch.cuda.graph_pool_handle()
        self.run = {n: capture(self._step, n, memory).replay for n in (1, self.many)}
        self.evaluate = capture(self._evaluate, 1, memory).replay

    def _fused(self, spec: TensorSpec, bits: Tensor) -> FusedUpdate:
        bias, views = spec.name.replace("weight", "bias"), self.batch.model.params.views
        moments = self.moments if self.recipe.optimizer == "adam" or self.recipe.momentum else []
        weight, *first = (views(t) for t in (self.weights, *moments))
        return FusedUpdate(
            self.recipe,
            self.pulse,
            weight=weight[spec.name],
            moments=[moment[spec.name] for moment in first],
            bits=bits,
            bias=weight[bias][:, :, 0],
            bias_moments=[moment[bias][:, :, 0] for moment in first],
        )

    def _conv_lists(
        self, model: Model, convs: list[TensorSpec], mask: Tensor
    ) -> tuple[list[list[Tensor]], list[Tensor | None]]:
        """Slices of weights, gradients and moments of convolutions, biases and batch norms; the masks."""
        biases = [*(model.biases[model.weights.index(spec)] for spec in convs), *model.norms]
        spans = [s.span for s in (*convs, *biases)]
        buffers = [self.weights, *([] if self.grad is None else [self.grad]), *self.moments]
        masks = [bitmask.pack(mask[:, span].contiguous()) for span in spans[: len(convs)]]
        return [[t[:, span] for span in spans] for t in buffers], [*masks, *[None] * len(biases)]

    def _update_convs(self) -> None:
        if self.grad is None:
            return
        recipe, pulse, ((weights, grads, *moments), masks) = self.recipe, self.pulse, self.convs
        shared: dict[str, Any] = {"active": pulse.active, "kernels": "triton"}
        shared["weight_decay"] = recipe.weight_decay
        if recipe.optimizer == "adam":
            first, second = moments
            counts = [pulse.count] * len(weights)
            masked_adam_many(weights, grads, masks, (first, second), counts, pulse.lr, **shared)
        else:
            buffers = moments[0] if recipe.momentum else None
            masked_sgd_many(weights, grads, masks, buffers, pulse.lr, momentum=recipe.momentum, **shared)
