"""Scores: what ranks prunable weights. The largest stay. A family is a file of this folder that registers it.

A score is `score(network, weights, mask, batch, generator)`: the model, its trained weights [P], the mask [M]
so far, a batch (x [B, ...], y [B]) of training images, and a generator of the cell's own. It gives one number
a weight, [M]; those of pruned weights do not matter. What needs gradients takes them from the network that
`sparselth.models.torch` makes of the model. One registered with start=True is given `start`, too: the weights
[P] that training began with, those of the rewind step. Whoever calls a score does so by `Scored.of`.

    >>> from sparselth.models import Model
    >>> from sparselth.scores import Batch, register
    >>> @register("large-final-low-initial", "an example of a score")  # doctest: +SKIP
    ... def example(network: Model, weights, mask, batch: Batch, generator):
    ...     return weights[: mask.numel()].abs()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselth.errors import SparselthError
from sparselth.models import Model
from sparselth.registry import Registry

Batch = tuple[Tensor, Tensor]  # x [B, C, H, W] fp32 as the network takes them, labels [B] int64
NOTHING: Batch = (  # that nobody looks at
    torch.empty(0, dtype=torch.float32, device="cpu"),
    torch.empty(0, dtype=torch.int64, device="cpu"),
)
Score = Callable[..., Tensor]  # (network, weights, mask, batch, generator), and start=


@dataclass(frozen=True)
class Scored:
    """A score and what it says in one line."""

    score: Score
    meaning: str
    autograd: bool = True  # whether it may take gradients by torch's autograd
    start: bool = False  # whether it compares with the weights that training began with
    rounds: int = 1  # in which a network that was not trained is pruned by it
    looks: bool = True  # whether it looks at the batch; else that may be `NOTHING`

    def of(
        self,
        network: Model,
        weights: Tensor,
        mask: Tensor,
        batch: Batch,
        generator: torch.Generator,
        start: Callable[[], Tensor],
    ) -> Tensor:
        """The scores [M]; `start` reads the weights [P] that training began with, where they are wanted."""
        more = {"start": start()} if self.start else {}
        return self.score(network, weights, mask, batch, generator, **more)


SCORES: Registry[Scored] = Registry("score", "sparselth.scores", but=("gradients",))


def register(
    name: str,
    meaning: str,
    autograd: bool = True,
    start: bool = False,
    rounds: int = 1,
    looks: bool = True,
) -> Callable[[Score], Score]:
    """Make a function known as a score under a name, which must be free."""

    def add(score: Score) -> Score:
        SCORES.add(name, Scored(score, meaning, autograd, start, rounds, looks))
        return score

    return add


@register("magnitude", "the size of the trained weight (Frankle & Carbin 2019)", autograd=False, looks=False)
def magnitude(
    network: Model, weights: Tensor, mask: Tensor, batch: Batch, generator: torch.Generator
) -> Tensor:
    return weights[: mask.numel()].abs()


def _beside_the_start(name: str, meaning: str, of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A score of the weights now and those that training began with, [M] each."""

    def score(
        network: Model,
        weights: Tensor,
        mask: Tensor,
        batch: Batch,
        generator: torch.Generator,
        start: Tensor,
    ) -> Tensor:
        return of(weights[: mask.numel()], start[: mask.numel()])

    register(name, meaning, autograd=False, start=True, looks=False)(score)


_beside_the_start(
    "change",
    "how much larger than at the rewind step the trained weight is, |w| - |w0| (Zhou et al. 2019)",
    lambda now, start: now.abs() - start.abs(),
)
_beside_the_start(
    "movement",
    "how far the trained weight is from that of the rewind step, |w - w0| (Zhou et al. 2019)",
    lambda now, start: (now - start).abs(),
)
_beside_the_start(
    "magnitude-at-init", "the size of the weight at the rewind step, |w0|", lambda now, start: start.abs()
)


@register(
    "random",
    "a uniform draw of the seed and level: what others are held against",
    autograd=False,
    looks=False,
)
def random(network: Model, weights: Tensor, mask: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    return torch.rand(mask.numel(), generator=generator, dtype=torch.float32, device="cpu").to(weights.device)


def ranked(name: str, scores: Tensor, mask: Tensor) -> Tensor:
    """Scores of any sign, [M], as fp32 numbers from 0 on in the same order, equal ones equal.

    What `mask` has pruned may be anything. SparselthError for NaN or another shape.
    """
    if scores.shape != mask.shape:
        raise SparselthError(
            f"score {name}: expected one number a weight, {list(mask.shape)}, got {list(scores.shape)}"
        )
    alive = scores[mask]
    if alive.isnan().any():
        raise SparselthError(f"score {name}: {int(alive.isnan().sum())} of its numbers are NaN")
    if not (alive < 0).any() and scores.dtype == torch.float32:
        return scores
    # the bits of floats from 1.0 on are ordered as the numbers are, and there are 2^30 of them
    places = torch.unique(alive, return_inverse=True)[1]
    found = torch.zeros(mask.shape, dtype=torch.float32, device=scores.device)
    found[mask] = (places.int() + 0x3F800000).view(torch.float32)
    return found
