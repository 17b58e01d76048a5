"""How sharp a minimum is: the largest eigenvalues of the loss's Hessian, by Lanczos, without the Hessian.

A product with the Hessian is the gradient of a gradient's product with the vector (Pearlmutter 1994). Within
the live subspace, what a mask keeps and all else that is trained, pruned weights are no variables: their rows
and columns are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselth.config import Cell
from sparselth.data.batches import Chunk
from sparselth.engine.autograd import AutogradNetwork, errors_named, mean_loss
from sparselth.engine.state import Stopped, never
from sparselth.models import Model
from sparselth.models.torch import tensors
from sparselth.streams import drawing_apart, seed_everything

STEPS, TOLERANCE = 60, 1e-3  # of `lanczos`: at most, and of the largest eigenvalue relative to its size
LEAST = 5  # steps before it may have converged


class Hessian:
    """The Hessian of one network's mean loss over chunks x [B, ...], labels [B, ...], in evaluation mode.

    Called with a vector [n], n = `params.trained_size`, it gives its product within the live subspace. Raises
    Stopped where `should_stop` says so between two chunks.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        weights: Tensor,
        mask: Tensor,
        chunks: Sequence[Chunk],
        should_stop: Callable[[], bool] = never,
    ) -> None:
        self.model, self.chunks, self.should_stop = model, chunks, should_stop
        self.network = AutogradNetwork(model, Cell(seed, "ticket", 0), weights[None].clone())
        self.network.net.eval()
        found, params = tensors(model, self.network.net), model.params
        self.live = torch.zeros(params.trained_size, dtype=weights.dtype, device=weights.device)
        self.specs, self.variables = list[slice](), list[Tensor]()
        for spec in params.weights + params.trained:
            self.live[spec.span] = mask[spec.span].to(self.live) if spec in params.weights else 1.0
            variable = found[spec.name]
            assert isinstance(variable, nn.Parameter)
            self.specs.append(spec.span)
            self.variables.append(variable)
        self.count = sum(len(y) for _, y in chunks)

    def __call__(self, vector: Tensor) -> Tensor:
        vector, product = vector * self.live, torch.zeros_like(vector)
        parts = [vector[span].view(one.shape) for span, one in zip(self.specs, self.variables, strict=True)]
        with drawing_apart(str(vector.device)), errors_named(self.model, "evaluation"), torch.enable_grad():
            seed_everything(0, str(vector.device))
            for x, y in self.chunks:
                if self.should_stop():
                    raise Stopped
                loss = mean_loss(self.model, self.network(x), y) * (len(y) / self.count)
                slopes = torch.autograd.grad(loss, self.variables, create_graph=True, materialize_grads=True)
                along = torch.stack(
                    [(slope * part).sum() for slope, part in zip(slopes, parts, strict=True)]
                ).sum()
                if not along.requires_grad:  # the loss is linear
                    continue
                found = torch.autograd.grad(along, self.variables, materialize_grads=True)
                for span, one in zip(self.specs, found, strict=True):
                    product[span] += one.flatten()
        return product * self.live


@dataclass(frozen=True)
class Spectrum:
    """Ritz values from the largest down, and how far the first is from an eigenvalue at most."""

    values: list[float]
    bound: float
    steps: int

    @property
    def converged(self) -> bool:
        return self.bound <= TOLERANCE * abs(self.values[0])


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int = STEPS, tolerance: float = TOLERANCE
) -> Spectrum:
    """The ends of a symmetric operator's spectrum by Lanczos with full reorthogonalisation, until the largest
    Ritz value is within `tolerance`, relative to its size, of an eigenvalue, or `steps` are taken."""
    steps = min(steps, len(start))
    basis = torch.empty(steps, len(start), dtype=start.dtype, device=start.device)
    diagonal, beside = list[float](), list[float]()
    vector, values, bound = start / start.norm(), torch.zeros(1, dtype=torch.float64, device="cpu"), 0.0
    for k in range(steps):
        basis[k] = vector
        new = product(vector)
        diagonal.append(float(new.double() @ vector.double()))
        for _ in range(2):  # once leaves what rounding put back
            new = new - basis[: k + 1].T @ (basis[: k + 1] @ new)
        length = float(new.double().norm())
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64, device="cpu")
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        bound = length * abs(float(vectors[-1, -1]))
        size = float(values.abs().max())
        if (k + 1 >= LEAST and bound <= tolerance * abs(float(values[-1]))) or length <= 1e-7 * size:
            break
        beside.append(length)
        vector = new / length
    return Spectrum(values.flip(0).tolist(), bound, len(diagonal))
