"""Networks of R replicas with hand-written gradients, in plain torch.

Activations are features-major, the batch last: [R, C, H, W, B] or [R, K, B]. What one weight
touches is then contiguous, flattening is free, and convolution and pooling run over whole rows;
LeNet-5 takes 2.4 times less per step than torch's NCHW path on a CPU. All parameters of a replica
lie in one flat buffer [R, P] (`model.weights`, then `model.biases` and `model.norms`), and so do the
gradients: one mask multiplication and one optimizer call serve the network. The running statistics of
batch norms are the end of that buffer, where no update comes: they go wherever the weights go.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from sparselth.engine.layers import (
    BiasReLU,
    Bound,
    DenseAdd,
    DenseBatchNorm,
    DenseConv,
    DenseLinear,
    DenseMean,
    DensePool,
    DenseReLU,
    MaskedConv,
    MaskedLinear,
    PartsPool,
    Place,
    Update,
    activation,
    channels_last,
)
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, ReLU
from sparselth.models.module import ModuleModel


def init_weights(model: Model, generator: torch.Generator) -> Tensor:
    """Gaussian Glorot weights, zero biases: one replica's flat buffer [P] (Glorot & Bengio 2010).

    Batch norms begin with scale and variance 1, shift and mean 0. What is a module draws its own.
    """
    if isinstance(model, ModuleModel):
        return model.params.gather(model.drawn(generator))[0]
    flat = torch.zeros(model.params.size, dtype=torch.float32, device="cpu")
    for spec in model.weights:
        std = sqrt(2 / (spec.fan_in + spec.fan_out))
        flat[spec.span] = (
            torch.randn(spec.numel, generator=generator, dtype=torch.float32, device="cpu") * std
        )
    for spec in model.norms[::2] + model.statistics[1::2]:
        flat[spec.span] = 1
    return flat


class Network:
    """R replicas of `model` for batches of B; owns its activations, borrows weights and gradients.

    A network without gradients and updates is one for evaluation: batch norms take running statistics.
    Others move those of replicas that are `active`, uint8 [R], or of all.

    `flat` and `grad` are [R, P]. `forward` takes [R, C*H*W, B] and returns logits [R, classes, B];
    `backward` takes the gradient of the logits and writes every entry of the gradient's views.
    The returned tensors are buffers that the next call overwrites. A layer's output is kept while somebody
    is still to read it; the gradients of several readers are summed.

    With `bits`, the packed masks of the weights by name ([R, N, ceil(K / 8)]), `linear` and `conv` say
    what those layers go through: "torch", "triton", or "auto" for a convolution that measures. A fully
    connected layer in `updates` calls that with its dy and x instead of writing gradients.

    With `parts`, biases that the vendor's products take a pass for are added where they cost nothing, through
    kernels/replica_parts.py: by the ReLU, and that of the last layer, in training, by the loss: `forward`
    then returns the logits without `late`, their bias [R, classes]. Images lie channels-last in memory, as
    masked_conv2d takes and gives them.
    """

    def __init__(
        self,
        model: Model,
        flat: Tensor,
        batch: int,
        grad: Tensor | None = None,
        bits: Mapping[str, Tensor] | None = None,
        linear: str = "torch",
        conv: str = "torch",
        updates: Mapping[str, Update] | None = None,
        active: Tensor | None = None,
        parts: bool = False,
    ) -> None:
        model.check_engines()
        replicas, nodes, readers = flat.shape[0], model.nodes, model.readers
        self.late: Tensor | None = None
        left: dict[int, Tensor] = {}  # biases that a layer did not add, by its place
        weight, updates = model.params.views(flat), updates or {}
        slope = model.params.views(grad) if grad is not None else {}
        training = grad is not None or bool(updates)
        self.layers: list[Bound] = []
        self.shapes = [(replicas, *shape, batch) for shape in model.shapes]  # of the image and all outputs
        self.inputs = [node.inputs for node in nodes]
        # what a layer is the last to read
        self.done = [
            {j for j in node.inputs if j >= 0 and readers[j + 1][-1] == i} for i, node in enumerate(nodes)
        ]
        for i, node in enumerate(nodes):
            layer, source, others = node.op, node.inputs[0], readers[i + 1]
            before, after, alone = model.shapes[source + 1], model.shapes[i + 1], model.may_overwrite(i)
            takes = {Conv: conv, Linear: linear}.get(type(layer), "torch")
            masked = bits is not None and takes != "torch"  # then only the shape of the output is needed
            make = channels_last if parts else activation
            reader = nodes[others[0]].op if len(others) == 1 else None
            match layer:
                case ReLU():
                    owns_dy = not isinstance(reader, Add)  # which gives it to others, too
                    if source in left:
                        self.layers.append(BiasReLU(left[source], owns_dy))
                    else:
                        self.layers.append(DenseReLU(alone, owns_dy))
                case AvgPool():
                    self.layers.append(DenseMean())
                case Add():
                    self.layers.append(DenseAdd(make(flat, replicas, after, batch)))
                case BatchNorm():
                    tensors = [weight[s.name] for s in model.parts[i]]
                    slopes = [slope[s.name] for s in model.parts[i][:2]] if slope else None
                    self.layers.append(DenseBatchNorm(tensors, slopes, training, active))
                case MaxPool(size):
                    out = make(flat, replicas, after, batch)
                    dx = make(flat if training else flat[:0], replicas if training else 0, before, batch)
                    before_it = self.layers[source] if alone else None
                    cuts = parts and isinstance(before_it, DenseReLU)
                    if isinstance(before_it, DenseReLU):
                        before_it.passes = cuts
                    self.layers.append((PartsPool if parts else DensePool)(size, out, dx, cuts))
                case Conv() | Linear():
                    name, bias = (s.name for s in model.parts[i])
                    out = make(flat.to("meta") if masked else flat, replicas, after, batch)
                    place = Place(
                        weight[name],
                        weight[bias],
                        dweight=slope.get(name),
                        dbias=slope.get(bias),
                        out=out,
                        before=before,
                        wants_dx=training and source >= 0,
                        update=updates.get(name),
                    )
                    leaves = parts and takes == {Conv: "auto", Linear: "torch"}[type(layer)]
                    if i + 1 == len(nodes):
                        leaves = leaves and training and isinstance(layer, Linear)
                        self.late = place.bias[:, :, 0] if leaves else None
                    else:
                        leaves = leaves and isinstance(reader, ReLU)
                        left |= {i: place.bias[:, :, 0]} if leaves else {}
                    mask = bits[name] if bits is not None and masked else None
                    self.layers.append(_product(layer, place, mask, takes, not leaves, parts))

    def forward(self, x: Tensor) -> Tensor:
        values = {-1: x.view(self.shapes[0])}
        for i, layer in enumerate(self.layers):
            values[i] = layer.forward(*[values[j] for j in self.inputs[i]])
            for j in self.done[i]:
                del values[j]
        return values[i]

    def backward(self, dy: Tensor) -> None:
        slopes = {len(self.layers) - 1: dy}
        for i in reversed(range(len(self.layers))):
            dx = self.layers[i].backward(slopes.pop(i))
            for j in self.inputs[i]:
                if j in slopes:
                    slopes[j] = slopes[j].reshape(self.shapes[j + 1]) + dx.reshape(self.shapes[j + 1])
                elif j >= 0:
                    slopes[j] = dx


def _product(
    layer: Conv | Linear, place: Place, bits: Tensor | None, kernels: str, adds_bias: bool, parts: bool
) -> Bound:
    """A layer with weights, through torch's products where there are no `bits`."""
    if isinstance(layer, Conv):
        if bits is None:
            return DenseConv(layer, place)
        return MaskedConv(layer, place, bits, kernels, adds_bias)
    return DenseLinear(place, adds_bias, parts) if bits is None else MaskedLinear(place, bits, kernels)


def cross_entropy_grad(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy: [R, classes, B] from logits and labels [R, 1, B]."""
    grad = torch.softmax(logits, 1)
    grad.scatter_add_(1, labels, grad.new_full((1,), -1.0).expand(labels.shape))
    return grad.div_(logits.shape[2])


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and number of right answers, each float64 [R]."""
    loss = -torch.log_softmax(logits, 1).gather(1, labels).double().sum((1, 2))
    right = (logits.argmax(1, keepdim=True) == labels).double().sum((1, 2))
    return loss, right
