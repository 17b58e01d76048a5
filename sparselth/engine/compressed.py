"""One replica with layers in the compressed domain, on a CPU.

A layer above its break-even density is dense and goes through the vendor's products; below it, weights
and gradients are vectors of survivors and go through `csr_linear` and `sparse_conv2d`, which touch
nothing else. Both stand in one chain of calls, bound to fixed buffers once, so that a step costs what its
arithmetic costs. Activations are features-major as in `dense`, without the replica axis: [C, H, W, B] or
[K, B]; B is padded to whole cache lines, and the gradient of the padding is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from sparselth.data.batches import Batches, Resident
from sparselth.engine.layers import DenseConv, Place
from sparselth.engine.layout import Layout
from sparselth.engine.memory import Held
from sparselth.engine.state import Batch, measure, never
from sparselth.engine.update import bind_update
from sparselth.kernels.csr_linear import (
    CsrIndex,
    bind_csr_input_grad,
    bind_csr_linear,
    bind_csr_weight_grad,
)
from sparselth.kernels.sparse_conv2d import (
    Conv2dIndex,
    bind_sparse_conv2d,
    bind_sparse_conv2d_input_grad,
    bind_sparse_conv2d_weight_grad,
)
from sparselth.kernels.step_parts import (
    Call,
    bind_bias_relu,
    bind_cross_entropy,
    bind_cross_entropy_grad,
    bind_gather,
    bind_max_pool,
    bind_max_pool_backward,
    bind_relu_backward,
    cross_entropy,
    sequence,
)
from sparselth.models import Conv, Layer, MaxPool, Model, ReLU
from sparselth.params import TensorSpec

Index = CsrIndex | Conv2dIndex
Named = tuple[str, Call]
COLUMNS = 16  # a batch is padded to a multiple: one cache line


class CompressedForward:
    """One replica whose weights lie in `layout`, for batches of any size; see `engine.state.Forward`."""

    def __init__(self, model: Model, layout: Layout, weights: Tensor, kernels: str) -> None:
        self.model, self.layout, self.weights, self.kernels = model, layout, weights, kernels
        self.rows: Tensor | None = None  # pixels that are read; a convolution takes them all
        first = model.weights[0]
        if first.name in layout.compressed and len(first.shape) == 2 and not layout.inputs.all():
            self.rows = layout.inputs.nonzero()[:, 0].int()
        self.index = {
            spec.name: self._index(spec, layer, before)
            for spec, layer, before, _ in model.producers
            if spec.name in layout.compressed
        }
        self.chains: dict[int, Chain] = {}
        self.ready: dict[int, Ready] = {}  # by the id of images, which stay as long as it does

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[2]
        if n not in self.chains:
            self.chains[n] = self.chain(n, None)
        chain = self.chains[n]
        if len(self.model.weights[0].shape) == 2:
            if id(x) not in self.ready:
                self.ready[id(x)] = self._ready(chain, x, y)
            ready = self.ready[id(x)]
            ready.run()
            loss, right = ready.judge()
        else:
            chain.x[:, :n] = x[0]
            chain.run()
            loss, right = cross_entropy(chain.logits[:, :n], y[0, 0], self.kernels)
        found = torch.tensor([[loss], [right]], dtype=torch.float64, device="cpu")
        return found[0], found[1]

    def _ready(self, chain: Chain, x: Tensor, y: Tensor) -> Ready:
        """Images [1, K, B] that are read at every evaluation, as a fully connected layer takes them."""
        n, own = x.shape[2], torch.zeros_like(chain.x)
        own[:, :n] = x[0] if self.rows is None else x[0].index_select(0, self.rows)
        judge = bind_cross_entropy(chain.logits[:, :n], y[0, 0], self.kernels)
        return Ready(x, chain.reading(own), judge)

    def chain(self, batch: int, grad: Tensor | None) -> Chain:
        pixels = len(self.layout.inputs) if self.rows is None else len(self.rows)
        return Chain(self.model, self.layout, self.index, self.weights, pixels, batch, self.kernels, grad)

    def _index(self, spec: TensorSpec, layer: Layer, before: tuple[int, ...]) -> Index:
        mask, first = self.layout.trained(spec), spec is self.model.weights[0]
        if first and self.rows is not None:
            mask = mask[:, self.rows]
        return make_index(spec, layer, before, mask, first)


@dataclass(frozen=True)
class Ready:
    """A chain that reads images where they lie; to lay them out every time took as long as the products."""

    images: Tensor
    run: Call
    judge: Callable[[], tuple[float, int]]


class CompressedSteps:
    """The steps of one job whose state lies in a layout; see `engine.state.Steps`."""

    many = 1

    def __init__(self, batch: Batch) -> None:
        (job,) = batch.jobs
        layout, recipe, data = job.state.layout, batch.recipe, batch.data
        assert layout is not None
        kernels = batch.paths.csr_linear.takes
        self.batch, self.job, self.recipe = batch, job, recipe
        self.grad = torch.zeros_like(batch.weights)
        self.forward = CompressedForward(batch.model, layout, batch.weights, kernels)
        self.chain = chain = self.forward.chain(recipe.batch_size, self.grad)
        self.batches = Batches(data, batch.who, recipe.batch_size, recipe.augment)
        scale, shift = data.scale.flatten(), data.shift.flatten()
        x, rows = chain.x[:, : recipe.batch_size], self.forward.rows
        self.gather: Callable[[Tensor], None]
        if recipe.augment != "none":
            self.gather = partial(_gather_moved, self.batches, rows, x, chain.labels)
        elif data.holds_bytes:
            self.gather = bind_gather(data.images, data.labels, scale, shift, x, chain.labels, rows, kernels)
        else:
            self.gather = partial(_gather_floats, data, rows, x, chain.labels)
        mask = layout.mask(job.mask)
        self.update, size = bind_update(
            batch.weights, self.grad, batch.moments, None if mask.all() else mask, recipe, batch.paths
        )
        index = layout.bytes() + sum(index.bytes() for index in self.forward.index.values())
        self.state_bytes = 4 * self.grad.numel() + index + size

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        for i in range(steps):
            if should_stop():
                return i
            self.gather(self.batches.index(step + i))
            self.chain.run()
            self.update(step + i - self.job.start_step + 1, self.recipe.lr_at(step + i))
        return steps

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        return measure(self.forward, self.batch.data.validation(self.job.who.seed), should_stop)

    def memory(self) -> Held:
        return self.batch.held(self.grad, (self.batches, self.chain.x))


def _gather_floats(data: Resident, rows: Tensor | None, x: Tensor, y: Tensor, index: Tensor) -> None:
    """Fill x [K, B] and y [B]; our kernels gather bytes."""
    found = torch.addcmul(data.shift, data.images[index].T, data.scale)
    x.copy_(found if rows is None else found.index_select(0, rows))
    torch.index_select(data.labels, 0, index, out=y)


def _gather_moved(batches: Batches, rows: Tensor | None, x: Tensor, y: Tensor, index: Tensor) -> None:
    """Fill x [K, B] and y [B] with images that are shifted and flipped."""
    images, labels = batches.gather(index)
    x.copy_(images[0] if rows is None else images[0].index_select(0, rows))
    y.copy_(labels[0, 0])


def make_index(spec: TensorSpec, layer: Layer, before: tuple[int, ...], mask: Tensor, first: bool) -> Index:
    """Where what `mask` [N, K] keeps of a layer lies; the first layer has no gradient of its input."""
    if isinstance(layer, Conv):
        size = before[1], before[2]
        return Conv2dIndex.from_dense(mask.view(spec.shape), size, layer.stride, layer.padding, not first)
    return CsrIndex.from_dense(mask, backward=not first)


@dataclass
class Ends:
    """A layer's input and output and, in training, their gradients; dx is None for the network's input."""

    x: Tensor
    y: Tensor
    dx: Tensor | None
    dy: Tensor | None


class Chain:
    """Every layer's forward and, with `grad`, backward as one list of calls on fixed buffers.

    `x` [pixels, columns] and `labels` [B] are filled by the caller; `run` computes `logits` [classes,
    columns] and, with `grad`, all gradients of the mean cross-entropy.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        index: dict[str, Index],
        weights: Tensor,
        pixels: int,
        batch: int,
        kernels: str,
        grad: Tensor | None,
    ) -> None:
        columns = -(-batch // COLUMNS) * COLUMNS
        self.x = x = torch.zeros(pixels, columns, dtype=torch.float32, device="cpu")
        self.labels = torch.zeros(batch, dtype=torch.int64, device="cpu")
        forwards: list[Named] = []
        backwards: list[list[Named]] = []
        dx: Tensor | None = None
        dbias: Tensor | None = None  # of the last product: whoever reads its output writes it
        producers = iter(model.producers)
        ops = [node.op for node in model.nodes]
        layers = [*zip(ops, model.shapes, model.shapes[1:], strict=False)]
        for (layer, before, after), (next_layer, _, _) in zip(layers, [*layers[1:], layers[-1]], strict=True):
            if isinstance(layer, ReLU):
                continue  # done by what is before it
            relu = isinstance(next_layer, ReLU)
            y = torch.zeros(prod(after), columns, dtype=torch.float32, device="cpu")
            dy = torch.zeros_like(y) if grad is not None else None
            ends = Ends(x, y, dx, dy)
            if isinstance(layer, MaxPool):
                name = "pool"
                forward, backward = _pool(before, after, ends, relu, dbias, kernels)
                dbias = None
            else:
                if dx is not None and dbias is not None:
                    call = bind_relu_backward(dx.view(*before, -1), None, dbias, kernels)
                    backwards.append([("bias gradient", call)])
                spec, *_ = next(producers)
                name = spec.name.removesuffix(".weight")
                bias = model.biases[model.weights.index(spec)]
                dbias = None if grad is None else layout.view(grad, bias)
                slope = None if grad is None else layout.view(grad, spec)
                product = Product(
                    layer,
                    spec,
                    before,
                    after,
                    layout.view(weights, spec),
                    slope,
                    index.get(spec.name),
                    kernels,
                )
                forward = product.forward(ends, layout.view(weights, bias), relu)
                if not forwards:
                    self._first = product, ends, layout.view(weights, bias), relu
                backward = product.backward(ends) if grad is not None else []
                if relu and dy is not None:
                    shape = *after, columns
                    backward.insert(0, bind_relu_backward(dy.view(shape), y.view(shape), dbias, kernels))
                    dbias = None
            forwards += [(f"{name} forward", call) for call in forward]
            backwards.append([(f"{name} backward", call) for call in backward])
            x, dx = y, dy
        self.logits = x
        calls = forwards
        if dx is not None:
            logits, dlogits = x[:, :batch], dx[:, :batch]
            loss = bind_cross_entropy_grad(logits, self.labels, dlogits, dbias, kernels)
            calls.append(("cross-entropy", loss))
            calls += [call for layer in reversed(backwards) for call in layer]
        self.calls = calls  # by name, for a profile
        self.run = sequence([call for _, call in calls])

    def reading(self, x: Tensor) -> Call:
        """`run` on images [pixels, columns] that lie elsewhere, in a network that begins with a product."""
        product, ends, bias, relu = self._first
        first = product.forward(replace(ends, x=x), bias, relu)
        return sequence([*first, *(call for _, call in self.calls[len(first) :])])


def _pool(
    before: tuple[int, ...],
    after: tuple[int, ...],
    ends: Ends,
    relu: bool,
    dbias: Tensor | None,
    kernels: str,
) -> tuple[list[Call], list[Call]]:
    x, y = ends.x.view(*before, -1), ends.y.view(*after, -1)
    forward = [bind_max_pool(x, y, relu, kernels)]
    if ends.dx is None or ends.dy is None:
        return forward, []
    dx, dy = ends.dx.view(x.shape), ends.dy.view(y.shape)
    return forward, [bind_max_pool_backward(dy, x, y, dx, relu, dbias, kernels)]


@dataclass
class Product:
    """A fully connected layer or a convolution, dense or compressed, as lists of calls."""

    layer: Layer
    spec: TensorSpec
    before: tuple[int, ...]
    after: tuple[int, ...]
    weight: Tensor  # [kept] with an index, else [N * K]
    slope: Tensor | None  # its gradient
    index: Index | None
    kernels: str

    def forward(self, ends: Ends, bias: Tensor, relu: bool) -> list[Call]:
        """y = act(W x + bias)."""
        w, x, y, kernels = self.weight, self._in(ends.x), self._out(ends.y), self.kernels
        if isinstance(self.index, CsrIndex):
            return [bind_csr_linear(self.index, w, x, bias, y, relu, kernels)]
        if isinstance(self.index, Conv2dIndex):
            return [bind_sparse_conv2d(self.index, w, x, bias, y, relu, kernels)]
        if isinstance(self.layer, Conv):
            weight, column = w.view(1, *self.spec.matrix), bias.view(1, -1, 1)
            slope = None if self.slope is None else self.slope.view(weight.shape)
            place = Place(weight, column, slope, None, y[None], self.before, ends.dx is not None)
            self.dense = DenseConv(self.layer, place)
            rectify = [bind_bias_relu(ends.y, None, kernels)] if relu else []
            return [partial(self.dense.forward, x[None]), *rectify]
        w = w.view(self.spec.matrix)
        if relu:
            return [partial(torch.mm, w, x, out=y), bind_bias_relu(y, bias, kernels)]
        return [partial(torch.addmm, bias[:, None], w, x, out=y)]

    def backward(self, ends: Ends) -> list[Call]:
        """dW, and dx but for the network's input; after `forward`."""
        assert ends.dy is not None
        assert self.slope is not None
        w, slope, x, dy, kernels = self.weight, self.slope, self._in(ends.x), self._out(ends.dy), self.kernels
        dx = None if ends.dx is None else self._in(ends.dx)
        calls: list[Call]
        if isinstance(self.index, CsrIndex):
            calls = [bind_csr_weight_grad(self.index, dy, x, slope, kernels)]
            return calls if dx is None else [*calls, bind_csr_input_grad(self.index, w, dy, dx, kernels)]
        if isinstance(self.index, Conv2dIndex):
            calls = [bind_sparse_conv2d_weight_grad(self.index, dy, x, slope, None, kernels)]
            if dx is not None:
                calls.append(bind_sparse_conv2d_input_grad(self.index, w, dy, dx, kernels))
            return calls
        slope = slope.view(self.spec.matrix)
        if isinstance(self.layer, Conv):
            calls = [partial(self.dense.backward, dy[None])]
            return calls if dx is None else [*calls, partial(dx[None].copy_, self.dense.dx)]
        calls = [partial(torch.mm, dy, x.t(), out=slope)]
        return calls if dx is None else [*calls, partial(torch.mm, w.view(slope.shape).t(), dy, out=dx)]

    def _in(self, t: Tensor) -> Tensor:
        return t.view(*self.before, -1) if isinstance(self.layer, Conv) else t

    def _out(self, t: Tensor) -> Tensor:
        return t.view(*self.after, -1) if isinstance(self.layer, Conv) else t
