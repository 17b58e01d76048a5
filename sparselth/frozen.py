"""Networks whose weights are drawn once and never trained: what is trained is a score for each weight.

A method says which weights a network computes with, given frozen weights and scores, how the gradient of
those becomes one of the scores (straight-through), and what it does between steps. Frozen weights come from
kernels/hash_weights.py by (seed, layer, index, generation): nobody stores them. Scores lie where the weights
of a network lie, at the front of its flat buffer [P]; biases are 0, and batch norms neither scale nor shift.

Imports neither torch nor numpy before it is given a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor, sqrt
from typing import TYPE_CHECKING, ClassVar

from sparselth.config import SCOPES, Recipe
from sparselth.errors import UsageError
from sparselth.params import Params, TensorSpec
from sparselth.registry import Registry
from sparselth.spread import SPREADS, rooted

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sparselth.models import Model

LAWS = ("signed-constant", "normal", "uniform")  # Kaiming's, each with variance 2 / fan_in


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What, with scores, makes a network of frozen weights; `METHODS[name].frozen(seed, ...)` fills in."""

    method: str
    seed: int
    law: str
    keep: float  # share of the weights that is kept, for supermask the chance that each is at the start
    scope: str = "layer"  # over what scores are ranked
    scaled: bool = False  # weights times sqrt(size / kept), as large as those of an unpruned layer
    every: int = 0  # steps between redraws (iterand) or recyclings; 0 is never
    share: float = 0.0  # iterand: the chance that a pruned weight is redrawn; recycle: of a layer, recycled
    spread: str = "even"  # how layers share in what is kept

    def __post_init__(self) -> None:
        for name, right, expected in (
            ("method", self.method in METHODS, f"expected one of {', '.join(METHODS)}"),
            ("law", self.law in LAWS, f"expected one of {', '.join(LAWS)}"),
            ("scope", self.scope in SCOPES, f"expected one of {', '.join(SCOPES)}"),
            ("spread", self.spread in SPREADS, f"expected one of {', '.join(SPREADS)}"),
            ("spread", self.spread == "even" or self.scope == "layer", "expected `scope` layer"),
            ("keep", 0 < self.keep <= 1, "expected a number above 0, at most 1"),
            ("share", 0 <= self.share <= 1, "expected a number from 0 to 1"),
            ("every", self.every >= 0, "expected 0 (never) or more"),
            ("seed", self.seed >= 0, "expected 0 or more"),
        ):
            if not right:
                raise UsageError(f"`{name}` {getattr(self, name)}: {expected}")

    def kept(self, n: int) -> int:
        """How many of n weights are kept."""
        return max(1, floor(self.keep * n + 0.5 + 1e-9))

    def counts(self, params: Params) -> list[int]:
        """How many weights each of the `groups` keeps."""
        sizes = [sum(spec.numel for spec in specs) for specs in self.groups(params)]
        if self.spread == "even":
            return [self.kept(size) for size in sizes]
        return rooted(sizes, self.kept(sum(sizes)))

    def groups(self, params: Params) -> Iterator[tuple[TensorSpec, ...]]:
        """The tensors that are ranked together."""
        if self.scope == "global":
            yield params.weights
        else:
            yield from ((spec,) for spec in params.weights)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Edge-popup: the kept weights are those of largest |score|, an exact count.

    ds = dL/dw_eff w sign(s) for every weight, kept or not. Others are subclasses.
    """

    name: str
    meaning: str  # in one line, with its source
    recipes: dict[str, Recipe]  # of its scores: "linear" networks, those that "convolve"
    keep: float = 0.5
    law: str = "signed-constant"
    scaled: bool = False
    every: int = 0
    share: float = 0.0
    spread: str = "even"  # where a network convolves; elsewhere layers are kept evenly
    rule: ClassVar[str] = "magnitude"  # of kernels/score_update.py, "" where none is the method's step
    draws: ClassVar[bool] = False  # a training step computes with a random mask
    has_generations: ClassVar[bool] = False  # weights change between steps
    start_bound: ClassVar[float] = 1.0  # scores begin uniform in +- sqrt(this / fan_in)

    def frozen(
        self,
        seed: int,
        *,
        keep: float | None = None,
        law: str | None = None,
        scope: str = "layer",
        scaled: bool | None = None,
        every: int | None = None,
        share: float | None = None,
        spread: str = "even",
    ) -> Frozen:
        """The method on the weights of a seed; None is its default."""
        return Frozen(
            method=self.name,
            seed=seed,
            law=self.law if law is None else law,
            keep=self.keep if keep is None else keep,
            scope=scope,
            scaled=self.scaled if scaled is None else scaled,
            every=self.every if every is None else every,
            share=self.share if share is None else share,
            spread=spread,
        )

    def recipe(self, model: Model) -> Recipe:
        """How its scores are trained."""
        return self.recipes["convolve" if model.convolves else "linear"]

    def spread_over(self, model: Model, scope: str) -> str:
        """How layers share in what is kept, unless it is said."""
        return self.spread if model.convolves and scope == "layer" else "even"

    def start(self, frozen: Frozen, params: Params, generator: Generator) -> Tensor:
        """The flat buffer [P] that training starts from: scores, biases 0, batch norms 1 and 0."""
        import torch

        flat = torch.zeros(params.size, dtype=torch.float32, device="cpu")
        for spec in params.unpruned:
            if spec.name.endswith((".scale", ".var")):
                flat[spec.span] = 1
        for spec in params.weights:
            draw = torch.rand(spec.numel, generator=generator, dtype=torch.float32, device="cpu")
            flat[spec.span] = self.begin(frozen, spec, draw)
        return flat

    def begin(self, frozen: Frozen, spec: TensorSpec, draw: Tensor) -> Tensor:
        """The first scores of a tensor, from numbers in [0, 1)."""
        return (2 * draw - 1) * sqrt(self.start_bound / spec.fan_in)

    def mask(self, frozen: Frozen, params: Params, scores: Tensor) -> Tensor:
        """Which weights are kept, bool [M], from scores [M]."""
        import torch

        from sparselth.kernels.score_update import top

        mask = torch.zeros_like(scores, dtype=torch.bool)
        for specs, count in zip(frozen.groups(params), frozen.counts(params), strict=True):
            ranked = torch.cat([scores[spec.span] for spec in specs])
            kept = top(ranked, count, self.rule == "score")
            parts = torch.split(kept, [spec.numel for spec in specs])
            for spec, part in zip(specs, parts, strict=True):
                mask[spec.span] = part
        return mask

    def drawn(self, frozen: Frozen, params: Params, scores: Tensor, step: int) -> Tensor:
        """The mask of a training step, where it is a random draw."""
        raise NotImplementedError

    def weights(self, frozen: Frozen, params: Params, generations: Tensor | None, device: str) -> Tensor:
        """The frozen weights, fp32 [M]."""
        import torch

        flat = torch.zeros(params.mask_size, dtype=torch.float32, device=device)
        for layer, spec in enumerate(params.weights):
            some = None if generations is None else generations[spec.span]
            flat[spec.span] = self.layer_weights(frozen, layer, spec, some, device)
        if frozen.scaled and frozen.spread != "even":
            for spec, count in zip(params.weights, frozen.counts(params), strict=True):
                flat[spec.span] *= sqrt(spec.numel / count)
        return flat

    def layer_weights(
        self, frozen: Frozen, layer: int, spec: TensorSpec, generations: Tensor | None, device: str
    ) -> Tensor:
        return generated(frozen, layer, spec, None, device)

    def network(self, params: Params, mask: Tensor, weights: Tensor) -> Tensor:
        """What a dense network computes with, [M], under a mask."""
        return weights * mask

    def slope(self, params: Params, scores: Tensor, mask: Tensor, weights: Tensor, grad: Tensor) -> None:
        """Turn the gradient of what the network computes with into that of the scores, in place; each [M]."""
        grad.mul_(weights)
        if self.rule != "score":
            grad.mul_(scores.sign())

    def after(
        self, frozen: Frozen, params: Params, step: int, scores: Tensor, generations: Tensor | None
    ) -> bool:
        """Whether weights change behind so many steps; then `generations` are changed in place."""
        return False

    def __hash__(self) -> int:
        return hash(self.name)


class IteRand(Method):
    """Scores are ranked with their sign; every `every` steps pruned weights are redrawn by chance."""

    rule, has_generations, start_bound = "score", True, 6.0

    def layer_weights(
        self, frozen: Frozen, layer: int, spec: TensorSpec, generations: Tensor | None, device: str
    ) -> Tensor:
        return generated(frozen, layer, spec, generations, device)

    def after(
        self, frozen: Frozen, params: Params, step: int, scores: Tensor, generations: Tensor | None
    ) -> bool:
        if not frozen.every or step % frozen.every:
            return False
        assert generations is not None
        mask = self.mask(frozen, params, scores)
        for layer, spec in enumerate(params.weights):
            falls = chance(frozen, layer, spec, step, str(scores.device)) < frozen.share
            generations[spec.span] += falls & ~mask[spec.span]
        return True


class Recycle(Method):
    """The weights of lowest score are overwritten by those of highest, within a layer.

    `generations` hold whose value of the first draw a weight has, as the distance to its place: 0 is its own.
    The n-th in place of the lowest takes the value of the n-th in place of the highest. Kept weights stay.
    """

    has_generations = True

    def layer_weights(
        self, frozen: Frozen, layer: int, spec: TensorSpec, generations: Tensor | None, device: str
    ) -> Tensor:
        import torch

        own = generated(frozen, layer, spec, None, device)
        if generations is None:
            return own
        return own[torch.arange(spec.numel, device=device) + generations]

    def after(
        self, frozen: Frozen, params: Params, step: int, scores: Tensor, generations: Tensor | None
    ) -> bool:
        if not frozen.every or step % frozen.every:
            return False
        from sparselth.kernels.score_update import top

        assert generations is not None
        mask = self.mask(frozen, params, scores)
        for spec in params.weights:
            ranked, kept = scores[spec.span], int(mask[spec.span].sum())
            n = min(floor(frozen.share * spec.numel + 0.5), spec.numel - kept, kept)
            if n:
                low = (~top(ranked, spec.numel - n)).nonzero()[:, 0]
                high = top(ranked, n).nonzero()[:, 0]
                there = generations[spec.span]
                there[low] = (high + there[high] - low).to(there.dtype)
        return True


class Biprop(Method):
    """The signs of the kept weights, times their mean magnitude: one scale a layer."""

    rule = ""

    def network(self, params: Params, mask: Tensor, weights: Tensor) -> Tensor:
        found = weights.sign() * mask
        for spec in params.weights:
            kept = mask[spec.span]
            found[spec.span] *= (weights[spec.span].abs() * kept).sum() / kept.sum().clamp_min(1)
        return found


class Supermask(Method):
    """A weight is kept with the chance sigmoid(score), drawn at every step; in the end where it is > 1/2.

    Weights are rescaled by the share that is kept, layer by layer. ds = dL/dw_eff w rescaling sigmoid'(s).
    """

    rule, draws = "", True

    def begin(self, frozen: Frozen, spec: TensorSpec, draw: Tensor) -> Tensor:
        odds = min(max(frozen.keep, 1e-3), 1 - 1e-3)
        from math import log

        return draw.zero_().add_(log(odds / (1 - odds)))

    def mask(self, frozen: Frozen, params: Params, scores: Tensor) -> Tensor:
        import torch

        mask = torch.zeros_like(scores, dtype=torch.bool)
        for spec in params.weights:
            mask[spec.span] = scores[spec.span] > 0
        return mask

    def drawn(self, frozen: Frozen, params: Params, scores: Tensor, step: int) -> Tensor:
        import torch

        mask = torch.zeros_like(scores, dtype=torch.bool)
        for layer, spec in enumerate(params.weights):
            draw = chance(frozen, layer, spec, step, str(scores.device))
            mask[spec.span] = draw < scores[spec.span].sigmoid()
        return mask

    def network(self, params: Params, mask: Tensor, weights: Tensor) -> Tensor:
        found = weights * mask
        for spec in params.weights:
            found[spec.span] *= self._rescaling(spec, mask)
        return found

    def slope(self, params: Params, scores: Tensor, mask: Tensor, weights: Tensor, grad: Tensor) -> None:
        odds = scores.sigmoid()
        grad.mul_(weights).mul_(odds * (1 - odds))
        for spec in params.weights:
            grad[spec.span] *= self._rescaling(spec, mask)

    def _rescaling(self, spec: TensorSpec, mask: Tensor) -> Tensor:
        return spec.numel / mask[spec.span].sum().clamp_min(1)


class Signed(Method):
    """The mask is -1, 0 or 1: the score's sign where its magnitude is among the largest. ds = dL/dw_eff w."""

    rule = "ternary"

    def mask(self, frozen: Frozen, params: Params, scores: Tensor) -> Tensor:
        import torch

        return super().mask(frozen, params, scores) * scores.sign().to(torch.int8)

    def slope(self, params: Params, scores: Tensor, mask: Tensor, weights: Tensor, grad: Tensor) -> None:
        grad.mul_(weights)


def generated(
    frozen: Frozen, layer: int, spec: TensorSpec, generations: Tensor | None, device: str
) -> Tensor:
    """The weights of a layer as they are drawn, [numel]."""
    from sparselth.kernels.hash_weights import hash_weights

    some = 0 if generations is None else generations.view(spec.shape)
    gain = sqrt(1 / frozen.keep) if frozen.scaled and frozen.spread == "even" else 1.0
    drawn: Tensor = hash_weights(frozen.seed, layer, spec.shape, frozen.law, some, gain=gain, device=device)
    return drawn.flatten()


def chance(frozen: Frozen, layer: int, spec: TensorSpec, step: int, device: str) -> Tensor:
    """Numbers in [0, 1], fp32 [numel]: a hash of (seed, layer, index, step), the same on every device."""
    from sparselth.kernels.hash_weights import hash_weights

    place = layer + (1 << 31)  # apart from the layers' weights
    gain = sqrt(spec.matrix[1] / 6)
    drawn: Tensor = hash_weights(frozen.seed, place, spec.shape, "uniform", step, gain=gain, device=device)
    return drawn.flatten().add_(1).mul_(0.5)


METHODS: Registry[Method] = Registry("method")


def _recipes(
    lr: float, convolving_lr: float, weight_decay: float = 1e-4, warmup: int = 0
) -> dict[str, Recipe]:
    linear = Recipe(
        steps=4000,
        lr=lr,
        batch_size=128,
        optimizer="sgd",
        weight_decay=weight_decay,
        warmup=warmup,
        cosine=True,
    )
    convolving = replace(linear, steps=1000, lr=convolving_lr, batch_size=64, warmup=warmup // 4)
    return {"linear": linear, "convolve": convolving}


for _method in (
    Method(
        name="edge-popup",
        meaning="the weights of largest |score|, layer by layer (Ramanujan et al. 2020)",
        recipes=_recipes(0.5, 0.3),
    ),
    IteRand(
        name="iterand",
        meaning="edge-popup that redraws pruned weights every so many steps (Chijiwa et al. 2021)",
        recipes=_recipes(3.0, 1.0),
        every=100,
        share=0.3,
    ),
    Recycle(
        name="recycle",
        meaning="edge-popup, lowest-score weights overwritten by highest (Gorbett & Whitley 2023)",
        recipes=_recipes(0.5, 0.3),
        every=100,
        share=0.3,
    ),
    Biprop(
        name="biprop",
        meaning="signs of the kept weights, one scale a layer (Diffenderfer & Kailkhura 2021)",
        recipes=_recipes(2.0, 1.0),
        law="normal",
    ),
    Supermask(
        name="supermask",
        meaning="each weight kept by a learned chance, drawn at every step (Zhou et al. 2019)",
        recipes=_recipes(300.0, 100.0, 0.0),
        keep=0.9,  # at chances of one half the draws drown what they are to learn: 88 % where this gives 97
    ),
    Signed(
        name="signed",
        meaning="a mask of -1, 0 and 1: kept, dropped or negated (Koster et al. 2022)",
        recipes=_recipes(0.02, 0.015, warmup=400),
        keep=0.05,
        scaled=True,
        spread="root",  # a twentieth of the first filters leaves many of them empty, and then the others die
    ),
):
    METHODS.add(_method.name, _method)


def mask_of(frozen: Frozen, params: Params, scores: Tensor) -> Tensor:
    """The mask of a network's scores [P]: bool [M], of "signed" int8 [M] in -1, 0, 1."""
    return METHODS[frozen.method].mask(frozen, params, scores[: params.mask_size])


def weights_of(
    frozen: Frozen, params: Params, generations: Tensor | None = None, device: str = "cpu"
) -> Tensor:
    """The frozen weights, fp32 [M], `scaled` included; `generations` [M] as `State` has them."""
    return METHODS[frozen.method].weights(frozen, params, generations, device)


def effective(frozen: Frozen, params: Params, scores: Tensor, generations: Tensor | None = None) -> Tensor:
    """The weights [P] that a dense network computes with, from scores [P]: masked, with signs and scales."""
    weights = weights_of(frozen, params, generations, str(scores.device))
    flat = scores.clone()
    mask = mask_of(frozen, params, scores)
    flat[: params.mask_size] = METHODS[frozen.method].network(params, mask, weights)
    return flat
