"""The arms: what is trained under a level's mask, and from where.

An arm is an object in a registry; `register` takes one from any file. Imports no torch by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparselth.registry import Registry

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sparselth.models import Model
    from sparselth.params import Params


class Arm:
    """The ticket's mask on the weights of the rewind step, unless a subclass says otherwise.

    `meaning` is its line in `ls arms`. Generators are the cell's own, and the CPU's. A `fresh` arm draws its
    weights: it may do so several times, `reinits`, and trains the full budget from step 0 on.
    """

    fresh = False

    def __init__(self, name: str, meaning: str) -> None:
        self.name, self.meaning = name, meaning

    def mask(self, params: Params, mask: Tensor, generator: Generator) -> Tensor:
        """The mask [M] of the arm, from the ticket's."""
        return mask

    def weights(self, model: Model, rewound: Callable[[], Tensor], generator: Generator) -> Tensor:
        """The weights [P] that training starts from, before the mask; `rewound` reads the kept ones."""
        return rewound()

    def start_step(self, rewind: int) -> int:
        """The step that training starts at."""
        return 0 if self.fresh else rewind


class Reinit(Arm):
    """Weights drawn anew from the same law."""

    fresh = True

    def weights(self, model: Model, rewound: Callable[[], Tensor], generator: Generator) -> Tensor:
        from sparselth.engine.dense import init_weights

        return init_weights(model, generator)


class RandomMask(Arm):
    """The mask shuffled within each layer."""

    def mask(self, params: Params, mask: Tensor, generator: Generator) -> Tensor:
        from sparselth import pruning

        return pruning.shuffle(params, mask, generator)


class RandomReinit(RandomMask, Reinit):
    """Both."""


ARMS: Registry[Arm] = Registry("arm")


def register(arm: Arm) -> Arm:
    """Make an arm known by its name, which must be free."""
    return ARMS.add(arm.name, arm)


register(Arm("ticket", "the mask found by pruning, the original weights of the rewind step"))
register(Reinit("reinit", "the ticket's mask, fresh weights from the same law"))
register(RandomMask("random-mask", "the mask shuffled within each layer, the original weights"))
register(RandomReinit("random-reinit", "the mask shuffled within each layer, fresh weights"))
