"""The networks, as data: layers, shapes, weight counts and the recipes they are trained with.

Nothing here computes; `sparselth.nn` runs a model for R replicas at once. The module imports
neither torch nor numpy, so that `sparselth ls models` and every `--help` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from sparselth.config import Recipe
from sparselth.errors import unknown

ALIGN = 16  # floats; every tensor starts on a 64-byte boundary of the flat buffer


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
class Linear:
    """Fully connected layer with a bias; an image before it is flattened, channel first."""

    out: int


Layer = Conv | MaxPool | ReLU | Linear


@dataclass(frozen=True)
class TensorSpec:
    """One parameter tensor and its place in the flat buffer.

    A weight is a matrix [N, K]: N outputs, K = all that feeds one of them (C * k * k for a filter).
    `shape` is the shape a user knows it by, [C_out, C_in, k, k] for a convolution.
    """

    name: str
    shape: tuple[int, ...]
    offset: int  # in floats, within one replica's flat buffer
    fan_in: int = 0
    fan_out: int = 0
    output: bool = False  # the last layer, pruned at half the rate
    rate_scale: float = 1.0  # share of the pruning rate that a level takes of this tensor

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of a weight."""
        return self.shape[0], self.numel // self.shape[0]


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
                case Linear(out):
                    shape = (out,)
                case ReLU():
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
            offset += -(-prod(shape) // ALIGN) * ALIGN
        return tuple(found)

    @cached_property
    def biases(self) -> tuple[TensorSpec, ...]:
        """The biases, never pruned, behind the weights in the flat buffer."""
        offset, found = self.mask_size, []
        for spec in self.weights:
            found.append(TensorSpec(spec.name.replace("weight", "bias"), spec.shape[:1], offset))
            offset += -(-spec.shape[0] // ALIGN) * ALIGN
        return tuple(found)

    @cached_property
    def mask_size(self) -> int:
        """Floats of the flat buffer that weights take, alignment included."""
        return self.weights[-1].offset + -(-self.weights[-1].numel // ALIGN) * ALIGN

    @cached_property
    def flat_size(self) -> int:
        """Floats of one replica's flat buffer, alignment included."""
        return self.biases[-1].offset + -(-self.biases[-1].numel // ALIGN) * ALIGN

    @cached_property
    def prunable(self) -> int:
        """Number of weights that pruning ranks; biases are not among them."""
        return sum(spec.numel for spec in self.weights)

    def _label(self, index: int) -> str:
        kind = type(self.layers[index])
        count = sum(isinstance(layer, kind) for layer in self.layers[: index + 1])
        return f"{'conv' if kind is Conv else 'fc'}{count}"


MODELS: dict[str, Model] = {}


def _register(model: Model) -> None:
    MODELS[model.name] = model


_register(
    Model(
        name="lenet-300-100",
        input=(1, 28, 28),
        layers=(Linear(300), ReLU(), Linear(100), ReLU(), Linear(10)),
        recipes={
            "short": Recipe(steps=5000, lr=1.2e-3),
            "paper": Recipe(steps=50_000, lr=1.2e-3),  # Frankle & Carbin 2019, Figure 2
        },
        source="LeCun et al. 1998; Frankle & Carbin 2019, Figure 2",
    )
)
_register(
    Model(
        name="lenet5",
        input=(1, 28, 28),
        # The ReLU stands behind the pool: the same function, a quarter of the work.
        layers=(
            Conv(6, 5, padding=2),
            MaxPool(2),
            ReLU(),
            Conv(16, 5),
            MaxPool(2),
            ReLU(),
            Linear(120),
            ReLU(),
            Linear(84),
            ReLU(),
            Linear(10),
        ),
        recipes={
            "short": Recipe(steps=1200, lr=1.2e-3),
            "paper": Recipe(steps=50_000, lr=1.2e-3),  # the paper's LeNet setup
        },
        source="LeCun et al. 1998, with ReLU and max pooling; trained as the LeNet of the 2019 paper",
    )
)


def _conv_k(
    name: str, widths: tuple[int, ...], conv_rate_scale: float, short: Recipe, paper: Recipe, note: str = ""
) -> Model:
    """A scaled-down VGG for CIFAR-10: pairs of 3 x 3 convolutions, a pool behind each pair."""
    layers: list[Layer] = []
    for width in widths:
        layers += [Conv(width, 3, 1), ReLU(), Conv(width, 3, 1), MaxPool(2), ReLU()]
    layers += [Linear(256), ReLU(), Linear(256), ReLU(), Linear(10)]
    return Model(
        name=name,
        input=(3, 32, 32),
        layers=tuple(layers),
        recipes={"short": short, "paper": paper},
        source=f"Frankle & Carbin 2019, Figure 2{note}",
        dataset="cifar10",
        conv_rate_scale=conv_rate_scale,
    )


# The paper prunes convolutions of conv2 and conv4 by 10 % a level, those of conv6 by 15 %, and fully
# connected layers by 20 %. The short recipes are not the paper's: less than one epoch (750 steps), four
# to eight minutes of one CPU core a network. They show that a network learns, not what it can reach.
_register(_conv_k("conv2", (64,), 0.5, Recipe(steps=500, lr=1e-3), Recipe(steps=20_000, lr=2e-4)))
_register(_conv_k("conv4", (64, 128), 0.5, Recipe(steps=400, lr=1e-3), Recipe(steps=25_000, lr=3e-4)))
_register(
    _conv_k(
        "conv6",
        (64, 128, 256),
        0.75,
        Recipe(steps=300, lr=1e-3),
        Recipe(steps=30_000, lr=3e-4),
        note="; its 1.7M weights are not those of the layers it lists",
    )
)


def get_model(name: str) -> Model:
    """The model of that name; an unknown name raises UsageError with the nearest one."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]
