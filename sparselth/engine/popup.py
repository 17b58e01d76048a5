"""Steps that train scores over frozen weights: strong tickets, straight-through.

Networks compute densely, with effective weights: those frozen weights that the scores keep. So forward and
backward are those of trained networks; the gradient of the effective weights, kept or not, becomes one of
the scores (`sparselth.frozen`), the optimizer takes these on, and the exact threshold says which are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparselth.config import Recipe
from sparselth.data.batches import Batches
from sparselth.engine.batch import DenseForward
from sparselth.engine.dense import Network, cross_entropy_grad
from sparselth.engine.memory import Held
from sparselth.engine.paths import Path, Paths
from sparselth.engine.state import Batch, Job, measure, never
from sparselth.engine.update import bind_update
from sparselth.engine.vendor import VendorNetwork
from sparselth.frozen import METHODS, weights_of
from sparselth.kernels.score_update import bind_score_update
from sparselth.models import Model


class Popup:
    """One job's scores, and the effective weights that they and its frozen weights make."""

    def __init__(
        self,
        model: Model,
        job: Job,
        scores: Tensor,
        grad: Tensor,
        moments: list[Tensor],
        flat: Tensor,
        recipe: Recipe,
        paths: Paths,
    ) -> None:
        """`scores`, `grad`, each of `moments` and `flat`, the effective weights, are rows [1, P]."""
        assert job.frozen is not None
        self.job, self.frozen, self.method = job, job.frozen, METHODS[job.frozen.method]
        self.params, n = model.params, model.params.mask_size
        self.scores, self.grad, self.flat = scores[0, :n], grad[0, :n], flat[0, :n]
        self.weights = torch.empty_like(self.scores)
        self.draw_weights()
        flat.copy_(scores)  # biases, batch norms, running statistics
        self.write()
        self.whole: Callable[[float], None] | None = None  # a step up to the effective weights
        takes = paths.masked_update.takes
        if recipe.optimizer == "sgd" and self.method.rule:
            groups = [*self.frozen.groups(self.params)]
            self.whole = bind_score_update(
                self.scores,
                self.grad,
                moments[0][0, :n] if recipe.momentum else None,
                self.weights,
                self.flat,
                [[(spec.offset, spec.numel) for spec in specs] for specs in groups],
                self.frozen.counts(self.params),
                rule=self.method.rule,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                kernels={"torch": "reference"}.get(takes, takes),
            )
        else:
            if takes == "triton":  # which has no step for one row of a batch
                paths = replace(paths, masked_update=Path("torch", paths.masked_update.why))
            self.update, _ = bind_update(
                scores[:, :n], grad[:, :n], [moment[:, :n] for moment in moments], None, recipe, paths
            )

    @property
    def generations(self) -> Tensor | None:
        found = self.job.state.generations
        return None if found is None else found[0]

    def draw_weights(self) -> None:
        """Make the frozen weights, in place."""
        device = str(self.scores.device)
        self.weights.copy_(weights_of(self.frozen, self.params, self.generations, device))

    def write(self, step: int | None = None) -> None:
        """Write the effective weights: of the network that is evaluated, or that takes a random step."""
        if step is None:
            self.mask = self.method.mask(self.frozen, self.params, self.scores)
        else:
            self.mask = self.method.drawn(self.frozen, self.params, self.scores, step)
        self.flat.copy_(self.method.network(self.params, self.mask, self.weights))

    def take(self, step: int, lr: float) -> None:
        """The update that takes `step` to `step + 1`, behind the gradient of the effective weights."""
        if self.whole is not None:
            self.whole(lr)
        else:
            self.method.slope(self.params, self.scores, self.mask, self.weights, self.grad)
            self.update(step - self.job.start_step + 1, lr)
        changed = self.method.after(self.frozen, self.params, step + 1, self.scores, self.generations)
        if changed:
            self.draw_weights()
        if changed or (self.whole is None and not self.method.draws):
            self.write()


class PopupSteps:
    """The steps of a batch whose weights are frozen, through `Network` or, `vendor`, `VendorNetwork`.

    With `vendor` None the network is a subclass's own.
    """

    many = 1

    def __init__(self, batch: Batch, vendor: bool | None) -> None:
        model, recipe, scores = batch.model, batch.recipe, batch.weights
        self.batch, self.recipe, self.vendor = batch, recipe, vendor
        self.grad, self.flat = torch.zeros_like(scores), torch.empty_like(scores)
        self.rows = [
            Popup(
                model,
                job,
                scores[r : r + 1],
                self.grad[r : r + 1],
                [moment[r : r + 1] for moment in batch.moments],
                self.flat[r : r + 1],
                recipe,
                batch.paths,
            )
            for r, job in enumerate(batch.jobs)
        ]
        self.network: Network | VendorNetwork | None = None
        if vendor:
            self.network = VendorNetwork(model, self.flat, self.grad)
        elif vendor is not None:
            self.network = Network(model, self.flat, recipe.batch_size, self.grad)
        self.batches = Batches(batch.data, batch.who, recipe.batch_size, recipe.augment)
        running = [spec.span for spec in model.params.statistics]
        self.running = slice(running[0].start, running[-1].stop) if running else None
        frozen = sum(row.weights.numel() for row in self.rows)
        self.state_bytes = 4 * (self.grad.numel() + self.flat.numel() + frozen)

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        assert self.network is not None
        taken = steps
        for i in range(steps):
            if should_stop():
                taken = i
                break
            for row in self.rows:
                if row.method.draws:
                    row.write(step + i)
            x, y = self.batches.at(step + i)
            self.network.backward(cross_entropy_grad(self.network.forward(x), y))
            for row in self.rows:
                row.take(step + i, self.recipe.lr_at(step + i))
        self.take_statistics()
        return taken

    def take_statistics(self) -> None:
        """Keep the running statistics of the effective networks with the scores."""
        if self.running is not None:
            self.batch.weights[:, self.running] = self.flat[:, self.running]

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        losses, accuracies = list[float](), list[float]()
        for r, row in enumerate(self.rows):
            if row.method.draws:
                row.write()
            forward = DenseForward(self.batch.model, self.flat[r : r + 1], bool(self.vendor))
            found = measure(forward, self.batch.data.validation(row.job.who.seed), should_stop)
            losses += found[0]
            accuracies += found[1]
        return losses, accuracies

    def memory(self) -> Held:
        if isinstance(self.network, VendorNetwork):
            self.network.kept = []  # activations of the last step; the next one finds its own
        return self.batch.held(self.grad, self.batches)
