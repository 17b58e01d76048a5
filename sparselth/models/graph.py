"""The networks, as data: layers, shapes, weight counts and the recipes they are trained with.

Nothing here computes; `sparselth.engine` trains a model. The folder imports neither torch nor numpy, so that
`sparselth ls models` and every `--help` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from sparselth.config import Recipe
from sparselth.params import Params, TensorSpec


@dataclass(frozen=True)
class Conv:
    """Convolution with `out` square filters, stride 1, a bias, zero padding on every side."""

    out: int
    kernel: int
    padding: int = 0


@dataclass(frozen=True)
class MaxPool:
    """Maximum over non-overlapping squares of `size` pixels."""

    size: int = 2


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)."""


@dataclass(frozen=True)
class AvgPool:
    """Mean of each channel over the whole image."""


@dataclass(frozen=True)
class BatchNorm:
    """Each channel brought to mean 0 and variance 1 over the batch, then scaled and shifted.

    Stands behind a convolution or a fully connected layer. That keeps its bias, which the mean takes away
    again: so every layer with weights has one, and its gradient is 0 but for rounding.
    """


@dataclass(frozen=True)
class Linear:
    """Fully connected layer with a bias; an image before it is flattened, channel first."""

    out: int


Layer = Conv | MaxPool | AvgPool | ReLU | BatchNorm | Linear


@dataclass(frozen=True)
class Model:
    """A network: an input shape [C, H, W], layers, and named recipes ("short", "paper").

    Under scope "layer" fully connected layers are pruned at the rate asked for, the output layer at half
    of it, convolutions at `conv_rate_scale` times it.
    """

    name: str
    input: tuple[int, int, int]
    layers: tuple[Layer, ...]
    recipes: Mapping[str, Recipe]
    source: str
    classes: int = 10
    dataset: str = "mnist"  # what it is trained on unless the user names another
    conv_rate_scale: float = 1.0

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of the activation before each layer, and after the last: [C, H, W] or [K]."""
        shape: tuple[int, ...] = self.input
        found = [shape]
        for layer in self.layers:
            match layer:
                case Conv(out, kernel, padding):
                    _, h, w = shape
                    shape = (out, h + 2 * padding - kernel + 1, w + 2 * padding - kernel + 1)
                case MaxPool(size):
                    c, h, w = shape
                    shape = (c, h // size, w // size)
                case AvgPool():
                    shape = (shape[0], 1, 1)
                case Linear(out):
                    shape = (out,)
                case ReLU() | BatchNorm():
                    pass
            found.append(shape)
        return tuple(found)

    @property
    def evaluation_batch(self) -> int:
        """Images of one evaluation batch: few where a convolution's shifted copies must fit the cache."""
        return 100 if any(isinstance(layer, Conv) for layer in self.layers) else 500

    @property
    def producers(self) -> tuple[tuple[TensorSpec, Layer, tuple[int, ...], tuple[int, ...]], ...]:
        """Every weight tensor with its layer and the shapes of that layer's input and output."""
        layers = [
            (layer, before, after)
            for layer, before, after in zip(self.layers, self.shapes, self.shapes[1:], strict=False)
            if isinstance(layer, Conv | Linear)
        ]
        return tuple((spec, *pair) for spec, pair in zip(self.weights, layers, strict=True))

    @cached_property
    def weights(self) -> tuple[TensorSpec, ...]:
        """The prunable tensors, in order; they fill the front of the flat buffer."""
        last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, Linear | Conv))
        offset, found = 0, []
        for i, (layer, before) in enumerate(zip(self.layers, self.shapes, strict=False)):
            match layer:
                case Conv(out, k, _):
                    shape: tuple[int, ...] = (out, before[0], k, k)
                    fans, scale = (before[0] * k * k, out * k * k), self.conv_rate_scale
                case Linear(out):
                    shape = (out, prod(before))
                    fans, scale = (prod(before), out), 1.0
                case _:
                    continue
            name, output = f"{self._label(i)}.weight", i == last
            found.append(TensorSpec(name, shape, offset, *fans, output, 0.5 if output else scale))
            offset = found[-1].end
        return tuple(found)

    @cached_property
    def biases(self) -> tuple[TensorSpec, ...]:
        """The biases, never pruned, behind the weights in the flat buffer."""
        offset, found = self.weights[-1].end, []
        for spec in self.weights:
            found.append(TensorSpec(spec.name.replace("weight", "bias"), spec.shape[:1], offset))
            offset = found[-1].end
        return tuple(found)

    @cached_property
    def norms(self) -> tuple[TensorSpec, ...]:
        """Scale and shift of every batch norm: trained, never pruned, behind the biases."""
        return self._channels(("scale", "shift"), self.biases[-1])

    @cached_property
    def statistics(self) -> tuple[TensorSpec, ...]:
        """Running mean and variance of every batch norm, which no optimizer sees: the end of the buffer."""
        return self._channels(("mean", "var"), (*self.biases, *self.norms)[-1])

    @cached_property
    def params(self) -> Params:
        """Which tensor lies where in the flat buffer."""
        return Params(self.weights, self.biases + self.norms, self.statistics)

    @cached_property
    def parts(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The tensors of every layer: weight and bias; scale, shift, mean and var; or none."""
        products = zip(self.weights, self.biases, strict=True)
        norms = zip(
            *(self.norms[::2], self.norms[1::2], self.statistics[::2], self.statistics[1::2]), strict=True
        )
        found: list[tuple[TensorSpec, ...]] = []
        for layer in self.layers:
            match layer:
                case Conv() | Linear():
                    found.append(next(products))
                case BatchNorm():
                    found.append(next(norms))
                case _:
                    found.append(())
        return tuple(found)

    def _channels(self, names: tuple[str, str], behind: TensorSpec) -> tuple[TensorSpec, ...]:
        """Two vectors of every batch norm, behind a tensor."""
        found: list[TensorSpec] = []
        for i, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=False)):
            for name in names if isinstance(layer, BatchNorm) else ():
                behind = TensorSpec(f"{self._label(i)}.{name}", shape[:1], behind.end)
                found.append(behind)
        return tuple(found)

    def _label(self, index: int) -> str:
        kind = type(self.layers[index])
        count = sum(isinstance(layer, kind) for layer in self.layers[: index + 1])
        return f"{ {Conv: 'conv', Linear: 'fc', BatchNorm: 'norm'}[kind] }{count}"
