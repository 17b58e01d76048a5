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
    def norms(self) -> tuple[TensorSpec, ...]:
        """Scale and shift of every batch norm: trained, never pruned, behind the biases."""
        return self._channels(("scale", "shift"), self.biases[-1])

    @cached_property
    def statistics(self) -> tuple[TensorSpec, ...]:
        """Running mean and variance of every batch norm, which no optimizer sees: the end of the buffer."""
        return self._channels(("mean", "var"), (*self.biases, *self.norms)[-1])

    @property
    def unpruned(self) -> tuple[TensorSpec, ...]:
        """All that is behind the weights."""
        return self.biases + self.norms + self.statistics

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

    @cached_property
    def mask_size(self) -> int:
        """Floats of the flat buffer that weights take, alignment included."""
        return self.weights[-1].offset + -(-self.weights[-1].numel // ALIGN) * ALIGN

    @cached_property
    def flat_size(self) -> int:
        """Floats of one replica's flat buffer, alignment included."""
        return _end(self.unpruned[-1])

    @cached_property
    def trained_size(self) -> int:
        """Floats of the flat buffer that the optimizer sees: all but running statistics."""
        return _end((*self.biases, *self.norms)[-1])

    @cached_property
    def prunable(self) -> int:
        """Number of weights that pruning ranks; biases are not among them."""
        return sum(spec.numel for spec in self.weights)

    def _channels(self, names: tuple[str, str], behind: TensorSpec) -> tuple[TensorSpec, ...]:
        """Two vectors of every batch norm, behind a tensor."""
        found: list[TensorSpec] = []
        for i, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=False)):
            for name in names if isinstance(layer, BatchNorm) else ():
                behind = TensorSpec(f"{self._label(i)}.{name}", shape[:1], _end(behind))
                found.append(behind)
        return tuple(found)

    def _label(self, index: int) -> str:
        kind = type(self.layers[index])
        count = sum(isinstance(layer, kind) for layer in self.layers[: index + 1])
        return f"{ {Conv: 'conv', Linear: 'fc', BatchNorm: 'norm'}[kind] }{count}"


def _end(spec: TensorSpec) -> int:
    return spec.offset + -(-spec.numel // ALIGN) * ALIGN


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


def _vgg(widths: tuple[tuple[int, ...], ...]) -> tuple[Layer, ...]:
    """3 x 3 convolutions with batch norm, a pool between the groups, the mean image at the end."""
    layers: list[Layer] = []
    for group in widths:
        for width in group:
            layers += [Conv(width, 3, 1), BatchNorm(), ReLU()]
        layers[-1:] = [MaxPool(2), ReLU()]
    return (*layers[:-2], ReLU(), AvgPool(), Linear(10))


# Of the paper's three learning rates, 0.1 with warm-up is the one that finds the smallest tickets. Images
# are neither flipped nor shifted here. The short recipe is not the paper's: it takes minutes of a CPU core,
# most of them for evaluations.
_register(
    Model(
        name="vgg19",
        input=(3, 32, 32),
        layers=_vgg(((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)),
        recipes={
            "short": Recipe(steps=100, lr=0.02, batch_size=32, optimizer="sgd", weight_decay=1e-4),
            "paper": Recipe(  # 160 epochs of 703 steps
                steps=112_480,
                lr=0.1,
                batch_size=64,
                optimizer="sgd",
                weight_decay=1e-4,
                warmup=10_000,
                lr_drops=(56_240, 84_360),
            ),
        },
        source="Frankle & Carbin 2019, Figure 2, which prunes its convolutions by --scope global",
        dataset="cifar10",
    )
)


def get_model(name: str) -> Model:
    """The model of that name; an unknown name raises UsageError with the nearest one."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]
