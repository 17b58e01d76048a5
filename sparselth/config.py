"""What is run, as frozen dataclasses; flags, the run folder's config.json and Python build the same object.

Imports neither torch nor numpy. Every check a user can fail is here, before anything slow starts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sparselth.errors import UsageError, unknown

ARMS = {
    "ticket": "the mask found by pruning, the original weights of the rewind step",
    "reinit": "the ticket's mask, fresh weights from the same law",
    "random-mask": "the mask shuffled within each layer, the original weights",
    "random-reinit": "the mask shuffled within each layer, fresh weights",
}
FRESH = ("reinit", "random-reinit")  # arms that draw new weights, and may do so several times

OPTIMIZERS = ("adam", "sgd")
SCOPES = ("layer", "global")
KERNELS = ("auto", "native", "torch", "triton", "reference")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained. Steps count batches; the learning rate is a function of the step."""

    steps: int
    lr: float
    batch_size: int = 60
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9  # SGD only
    weight_decay: float = 0.0
    warmup: int = 0  # steps of linear warm-up
    lr_drops: tuple[int, ...] = ()  # steps at which the rate is divided by ten
    eval_every: int = 100

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that takes `step` to `step + 1`."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * 0.1 ** sum(step >= drop for drop in self.lr_drops)


@dataclass(frozen=True)
class Replica:
    """Who is trained: the names that its random streams are derived from."""

    seed: int
    arm: str
    level: int
    draw: int = 0

    def __str__(self) -> str:
        draw = f" draw {self.draw}" if self.draw else ""
        return f"seed {self.seed} {self.arm}{draw} level {self.level}"

    @property
    def key(self) -> str:
        """A name for files, e.g. seed0-reinit-03-draw1."""
        return f"seed{self.seed}-{self.arm}-{self.level:02d}" + (f"-draw{self.draw}" if self.draw else "")


@dataclass(frozen=True, kw_only=True)
class ImpConfig:
    """One run of iterative magnitude pruning with its control arms."""

    model: str
    dataset: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    levels: int
    rate: float
    scope: Literal["layer", "global"]
    one_shot: bool
    rewind: int
    reinits: int
    device: Literal["cpu", "cuda"]
    kernels: str
    recipe: Recipe

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal configuration."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> ImpConfig:
        """Inverse of `to_json`; a missing or unknown key raises UsageError."""
        data = dict(data)
        recipe = dict(data.pop("recipe", {}))
        for cls, given in ((ImpConfig, {*data, "recipe"}), (Recipe, set(recipe))):
            known = {f.name for f in fields(cls)}
            if given != known:
                off = ", ".join(sorted(given ^ known))
                raise UsageError(f"config.json: missing or unknown {off}; it was written by another version")
        recipe["lr_drops"] = tuple(recipe["lr_drops"])
        for key in ("seeds", "arms"):
            data[key] = tuple(data[key])
        return ImpConfig(recipe=Recipe(**recipe), **data)

    def replicas(self) -> list[Replica]:
        """Every cell of the run, in the order of its files: level 0 exists once a seed, as a ticket."""
        return [
            Replica(seed, arm, level, draw)
            for seed in self.seeds
            for arm in self.arms
            for level in range(0 if arm == "ticket" else 1, self.levels + 1)
            for draw in range(self.reinits if arm in FRESH else 1)
        ]

    @property
    def digest(self) -> str:
        """Eight hex digits that name this configuration."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def check(self) -> None:
        """Raise UsageError, naming the flag, for values that make no experiment."""
        recipe = self.recipe
        _at_least("--levels", self.levels, 1, "level 0 is the dense network and always runs")
        _at_least("--steps", recipe.steps, 1)
        _at_least("--batch-size", recipe.batch_size, 1)
        _at_least("--reinits", self.reinits, 1)
        _at_least("--warmup", recipe.warmup, 0)
        if not 0 < self.rate < 1:
            raise UsageError(
                f"--rate {self.rate:g}: expected a number between 0 and 1, "
                "the share of the remaining weights that one level prunes"
            )
        if not 0 <= self.rewind < recipe.steps:
            raise UsageError(
                f"--rewind {self.rewind}: expected a step from 0 to {recipe.steps - 1}, "
                f"because training ends at step {recipe.steps}"
            )
        if not recipe.lr > 0:
            raise UsageError(f"--lr {recipe.lr:g}: expected a positive number")
        if not 0 <= recipe.momentum < 1:
            raise UsageError(f"--momentum {recipe.momentum:g}: expected a number from 0 to below 1")
        if recipe.weight_decay < 0:
            raise UsageError(f"--weight-decay {recipe.weight_decay:g}: expected 0 or a positive number")
        if recipe.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", recipe.optimizer, OPTIMIZERS)
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.kernels not in KERNELS:
            raise unknown("kernels", self.kernels, KERNELS)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"--seeds {_list(self.seeds)}: expected different numbers from 0 on")
        for arm in self.arms:
            if arm not in ARMS:
                raise unknown("arm", arm, ARMS)
        if "ticket" not in self.arms:
            raise UsageError(
                f"--arms {_list(self.arms)}: 'ticket' is missing, and every other arm controls for it"
            )
        if len(set(self.arms)) != len(self.arms):
            raise UsageError(f"--arms {_list(self.arms)}: an arm is named twice")


def _at_least(flag: str, value: int, low: int, why: str = "") -> None:
    if value < low:
        raise UsageError(f"{flag} {value}: expected {low} or more" + (f" ({why})" if why else ""))


def _list(items: tuple[object, ...]) -> str:
    return ",".join(map(str, items))
