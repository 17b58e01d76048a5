"""The networks, as data: layers and what they read, shapes, weight counts and recipes of training.

Nothing here computes; `sparselth.engine` trains a model. Only `torch` of this folder imports torch, so that
`sparselth ls models` and every `--help` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor, prod
from typing import Any

from sparselth.config import Recipe
from sparselth.errors import UsageError
from sparselth.params import Params, TensorSpec


@dataclass(frozen=True)
class Conv:
    """Convolution with `out` square filters, a bias, zero padding on every side."""

    out: int
    kernel: int
    padding: int = 0
    stride: int = 1

    def __repr__(self) -> str:
        # break-evens are remembered by it: what has no stride keeps the name it had before there were any
        stride = f", stride={self.stride}" if self.stride > 1 else ""
        return f"Conv(out={self.out}, kernel={self.kernel}, padding={self.padding}{stride})"


@dataclass(frozen=True)
class MaxPool:
    """Maximum over squares of `size` pixels, which lie side by side unless they are `stride` apart.

    `padding` pixels on every side are less than any. Of squares that overlap or are padded only torch's
    autograd takes gradients.
    """

    size: int = 2
    stride: int = 0  # 0: `size`
    padding: int = 0

    def __repr__(self) -> str:
        # as of Conv: what was there before has the name it had
        more = "" if self.tiles else f", stride={self.stride}, padding={self.padding}"
        return f"MaxPool(size={self.size}{more})"

    @property
    def tiles(self) -> bool:
        """Whether the squares lie side by side, without padding."""
        return self.stride in (0, self.size) and not self.padding


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


@dataclass(frozen=True)
class Add:
    """The sum of two or more activations of one shape."""


Layer = Conv | MaxPool | AvgPool | ReLU | BatchNorm | Linear | Add
MOST_UNITS = 1_000_000  # of a layer that is widened
INPUT = -1  # the place of the image among what layers read


@dataclass(frozen=True)
class Node:
    """A layer and what it reads: outputs of layers before it, by their places in `Model.layers`, or INPUT."""

    op: Layer
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A network: an input shape [C, H, W], layers, and named recipes ("short", "paper").

    A layer reads what stands before it; one that reads something else is a `Node`. The last one gives the
    logits. Layers that do not fit raise UsageError.

    Under scope "layer" fully connected layers are pruned at the rate asked for, the output layer at half
    of it, convolutions at `conv_rate_scale` times it. Under scope "global" all are ranked together, but for
    those `exempt`, by name: they stay whole, as in the papers.
    """

    name: str
    input: tuple[int, ...]
    layers: tuple[Layer | Node, ...]
    recipes: Mapping[str, Recipe]
    source: str
    classes: int = 10
    dataset: str = "mnist"  # what it is trained on unless the user names another
    conv_rate_scale: float = 1.0
    exempt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not any(isinstance(node.op, Conv | Linear) for node in self.nodes):
            raise UsageError(
                f"model {self.name}: has no weights; expected a Conv or a Linear among its layers"
            )
        for i, node in enumerate(self.nodes):
            if not node.inputs or any(not INPUT <= j < i for j in node.inputs):
                raise UsageError(
                    f"model {self.name}: layer {i}, {node.op}, reads {list(node.inputs)}; "
                    f"expected places before its own, from {INPUT}"
                )
        for i, node in enumerate(self.nodes):
            before = [self.shapes[j + 1] for j in node.inputs]
            many, images = isinstance(node.op, Add), isinstance(node.op, Conv | MaxPool | AvgPool)
            fits = len(set(before)) == 1 and many == (len(before) > 1) and not (images and len(before[0]) < 3)
            if not fits or min(self.shapes[i + 1]) < 1:
                read = " and ".join(map(str, before))
                raise UsageError(f"model {self.name}: layer {i}, {node.op}, cannot read {read}")
            if not self.readers[i + 1] and i + 1 < len(self.nodes):
                raise UsageError(f"model {self.name}: layer {i}, {node.op}, is read by nobody")

    def on(self, samples: Any) -> Model:
        """The network for a data set; only modules of torch's differ from one to another."""
        return self

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every layer with what it reads."""
        return tuple(
            layer if isinstance(layer, Node) else Node(layer, (i - 1,)) for i, layer in enumerate(self.layers)
        )

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Who reads the image, and who each layer's output, as often as they do."""
        found: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for i, node in enumerate(self.nodes):
            for j in node.inputs:
                found[j + 1].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def is_chain(self) -> bool:
        """Whether every layer reads what stands before it, and nothing else."""
        return all(node.inputs == (i - 1,) for i, node in enumerate(self.nodes))

    @cached_property
    def convolves(self) -> bool:
        return any(isinstance(node.op, Conv) for node in self.nodes)

    @property
    def needs_autograd(self) -> bool:
        """Whether a layer has no gradient in the engines, so that torch's autograd trains the network."""
        return any(isinstance(node.op, MaxPool) and not node.op.tiles for node in self.nodes)

    def check_engines(self) -> None:
        """Raise UsageError where a network of known layers is none for the engines."""
        if self.needs_autograd:
            raise UsageError(
                f"`model` {self.name}: has a max pool whose squares overlap, of which torch's autograd alone "
                "takes gradients, and this goes another way"
            )

    def may_overwrite(self, i: int) -> bool:
        """Whether layer i may work in place: it alone reads what it reads, and that is not the image."""
        (source, *_) = self.nodes[i].inputs
        return source != INPUT and self.readers[source + 1] == (i,)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of the image, and then of each layer's output: [C, H, W] or [K]."""
        found: list[tuple[int, ...]] = [self.input]
        for node in self.nodes:
            shape = found[node.inputs[0] + 1]
            match node.op:
                case Conv(out, kernel, padding, stride):
                    shape = (out, *((n + 2 * padding - kernel) // stride + 1 for n in shape[1:]))
                case MaxPool(size, stride, padding):
                    shape = (
                        *shape[:1],
                        *((n + 2 * padding - size) // (stride or size) + 1 for n in shape[1:]),
                    )
                case AvgPool():
                    shape = (*shape[:1], 1, 1)
                case Linear(out):
                    shape = (out,)
                case ReLU() | BatchNorm() | Add():
                    pass
            found.append(shape)
        return tuple(found)

    def widened(self, factor: float) -> Model:
        """The model with every hidden layer `factor` times as wide, rounded; "NAME@0.25" is its name.

        The output layer stays, and so do the rates at which layers are pruned. UsageError where a layer would
        have no unit left.
        """
        last = max(i for i, node in enumerate(self.nodes) if isinstance(node.op, Conv | Linear))
        layers: list[Layer | Node] = []
        for i, (layer, node) in enumerate(zip(self.layers, self.nodes, strict=True)):
            if i != last and isinstance(node.op, Conv | Linear):
                out = floor(node.op.out * factor + 0.5)
                if not 1 <= out <= MOST_UNITS:
                    said = "no unit" if out < 1 else f"{out:,}"
                    raise UsageError(
                        f"model {self.name}: {factor:g} of the {node.op.out} units of layer {i} is {said}; "
                        f"expected 1 to {MOST_UNITS:,}"
                    )
                wide = replace(node.op, out=out)
                layer = Node(wide, node.inputs) if isinstance(layer, Node) else wide
            layers.append(layer)
        return replace(self, name=f"{self.name}@{factor:g}", layers=tuple(layers))

    @property
    def evaluation_batch(self) -> int:
        """Images of one evaluation batch: few where a convolution's shifted copies must fit the cache."""
        return 100 if self.convolves else 500

    @property
    def producers(self) -> tuple[tuple[TensorSpec, Layer, tuple[int, ...], tuple[int, ...]], ...]:
        """Every weight tensor with its layer and the shapes of that layer's input and output."""
        layers = [
            (node.op, self.shapes[node.inputs[0] + 1], self.shapes[i + 1])
            for i, node in enumerate(self.nodes)
            if isinstance(node.op, Conv | Linear)
        ]
        return tuple((spec, *pair) for spec, pair in zip(self.weights, layers, strict=True))

    @cached_property
    def weights(self) -> tuple[TensorSpec, ...]:
        """The prunable tensors, in order; they fill the front of the flat buffer."""
        last = max(i for i, node in enumerate(self.nodes) if isinstance(node.op, Linear | Conv))
        offset, found = 0, []
        for i, node in enumerate(self.nodes):
            before = self.shapes[node.inputs[0] + 1]
            match node.op:
                case Conv(out, k):
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
        for node in self.nodes:
            match node.op:
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
        for i, node in enumerate(self.nodes):
            for name in names if isinstance(node.op, BatchNorm) else ():
                behind = TensorSpec(f"{self._label(i)}.{name}", self.shapes[i + 1][:1], behind.end)
                found.append(behind)
        return tuple(found)

    def _label(self, index: int) -> str:
        kind = type(self.nodes[index].op)
        count = sum(isinstance(node.op, kind) for node in self.nodes[: index + 1])
        return f"{ {Conv: 'conv', Linear: 'fc', BatchNorm: 'norm'}[kind] }{count}"
