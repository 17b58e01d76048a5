"""The arms: what is trained under a level's mask, and from where.

An arm is an object in a registry; `register` takes one from any file. Imports no torch by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparselth.errors import UsageError
from sparselth.registry import Registry

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sparselth.config import Recipe
    from sparselth.models import Model
    from sparselth.params import Params


class Arm:
    """The ticket's mask on the weights of the rewind step, unless a subclass says otherwise.

    `meaning` is its line in `ls arms`. Generators are the cell's own, and the CPU's. A `fresh` arm draws its
    weights: it may do so several times, `reinits`, and trains the full budget from step 0 on. One that
    `goes_on` is not rewound: what its `weights` reads are the trained ones that its mask was found in. One
    `alone` finds its mask in what it trained itself at the level before, where others have the ticket's.
    """

    fresh = False
    goes_on = False
    alone = False

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

    def recipe(self, recipe: Recipe) -> Recipe:
        """How it is trained, of as many steps as others; UsageError where that makes no sense."""
        return recipe


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


class SignedReinit(Reinit):
    """Weights drawn anew, each with the sign that it had at the rewind step."""

    def weights(self, model: Model, rewound: Callable[[], Tensor], generator: Generator) -> Tensor:
        fresh, signs = super().weights(model, rewound, generator), rewound()
        for spec in model.params.weights:
            fresh[spec.span] = fresh[spec.span].abs().copysign(signs[spec.span])
        return fresh


class ConstantSigns(Arm):
    """Of the rewound weights their signs: in each layer all have one size, its root mean square."""

    def weights(self, model: Model, rewound: Callable[[], Tensor], generator: Generator) -> Tensor:
        weights = rewound()
        for spec in model.params.weights:
            layer = weights[spec.span]
            layer.copy_(layer.sign() * layer.square().mean().sqrt())
        return weights


class GoesOn(Arm):
    """Trained weights, with the learning rate of the rewind step."""

    goes_on = True


class Alone(GoesOn):
    """A chain of its own."""

    alone = True


class LastRate(Arm):
    """The last learning rate from the first step on."""

    def recipe(self, recipe: Recipe) -> Recipe:
        from dataclasses import replace

        if recipe.cosine:
            raise UsageError(
                f"`arms` {self.name}: trains at the last learning rate, which `cosine` lets fall to 0; use "
                "`lr_drops`, or leave the arm out"
            )
        return replace(recipe, lr=recipe.lr_at(recipe.steps - 1), warmup=0, lr_drops=())


class Finetune(GoesOn, LastRate):
    """Both."""


ARMS: Registry[Arm] = Registry("arm")


def register(arm: Arm) -> Arm:
    """Make an arm known by its name, which must be free."""
    return ARMS.add(arm.name, arm)


register(Arm("ticket", "the mask found by pruning, the original weights of the rewind step"))
register(Reinit("reinit", "the ticket's mask, fresh weights from the same law"))
register(RandomMask("random-mask", "the mask shuffled within each layer, the original weights"))
register(RandomReinit("random-reinit", "the mask shuffled within each layer, fresh weights"))
register(GoesOn("lr-rewind", "the ticket's mask, the trained weights, the learning rate of the rewind step"))
register(Finetune("finetune", "the ticket's mask, the trained weights, the last learning rate"))
register(LastRate("last-rate", "the ticket trained at the last learning rate"))
register(Alone("continue", "never rewound: each level goes on from, and prunes, what it trained before"))
register(SignedReinit("signed-reinit", "the ticket's mask, fresh weights with the original signs"))
register(ConstantSigns("constant-signs", "the ticket's mask, the original signs, one size in each layer"))
