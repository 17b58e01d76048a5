"""A random network, pruned until it computes what a trained one does: each weight is a subset sum.

    features   a layer with one kept weight a neuron: it computes relu(a x_j), which is a x_j where a and x_j
               have the same sign and 0 elsewhere, so inputs of both signs take n neurons of each; n more
               keep nothing but their bias and are a constant
    sums       the layer behind it: w_ij is the sum of a_h b_ih over the kept h among the n of (j, sign)

Twice the depth (Malach et al. 2020; Pensia et al. 2020): features and sums for every layer of the target. One
layer more (Burkholz 2022): features in front alone; sums make n copies of every neuron, each with an error of
its own, and the layer behind chooses among the copies, whose weights are b alone.

All weights and biases of the source are U[-1, 1]. Which neuron serves which input is the mask's choice, so
each has n that fit in a layer of 2 n neurons an input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselth.errors import SparselthError
from sparselth.kernels.subset_sum import sums
from sparselth.models import Model
from sparselth.theory.pools import closest

NUMBERS, WORK = 1 << 22, 1 << 26  # of subset sums that are solved together, and the sums of their halves
Weights = list[tuple[Tensor, Tensor]]  # weight [N, K] and bias [N] of every layer


@dataclass(frozen=True)
class Layer:
    """A layer of the random network and what is kept of it."""

    weight: Tensor  # [N, K]
    bias: Tensor  # [N]
    keep: Tensor  # bool [N, K]
    keep_bias: Tensor  # bool [N]

    @property
    def kept(self) -> int:
        return int(self.keep.sum()) + int(self.keep_bias.sum())

    @property
    def numbers(self) -> int:
        return self.weight.numel() + self.bias.numel()


@dataclass(frozen=True)
class Pruned:
    """The random network; by layers of the target how far each weight is off, [N, K + 1], biases last."""

    layers: list[Layer]
    errors: list[Tensor]  # of the worse sign, and of the worst copy
    rounds: list[Tensor]  # uint8 [sums, G]: how often the weights of a sum were drawn again

    def module(self) -> nn.Sequential:
        """The pruned network as plain torch: fully connected layers under their masks, ReLU between them."""
        found: list[nn.Module] = []
        for layer in self.layers:
            n, k = layer.weight.shape
            linear = nn.Linear(k, n, dtype=layer.weight.dtype, device="cpu")
            with torch.no_grad():
                linear.weight.copy_(layer.weight * layer.keep)
                linear.bias.copy_(layer.bias * layer.keep_bias)
            found += [linear, nn.ReLU()]
        return nn.Sequential(*found[:-1]).eval()


@dataclass(frozen=True)
class Features:
    """What a layer can be made of: for each input and sign, and for the constant, n neurons and what each of
    them multiplies that with.
    """

    neurons: Tensor  # int64 [G, n]
    gains: Tensor  # float64 [G, n]
    of: Tensor  # int64 [G]: the input, or their number for the constant


def weights_of(model: Model, flat: Tensor) -> Weights:
    """Weights and biases of a flat buffer [P]."""
    pairs = zip(model.weights, model.biases, strict=True)
    return [(flat[w.span].view(w.shape), flat[b.span]) for w, b in pairs]


def twice(
    target: Weights,
    n: int,
    stream: Callable[[str], torch.Generator],
    size: int | None = None,
    bits: int | None = None,
    redraws: tuple[int, float] = (0, 0.0),
    should_stop: Callable[[], bool] = lambda: False,
) -> Pruned | None:
    """A random network of twice the depth; `size`: so many of n are kept for a weight, else any number.

    With `bits`, the weights of the source are multiples of 2^-bits. With `redraws` r and epsilon, the weights
    of a sum that is further off are all pruned and drawn again, r times at most (Chijiwa et al. 2021). None
    where it was stopped.
    """
    layers, errors, rounds = list[Layer](), list[Tensor](), list[Tensor]()
    for i, (weight, bias) in enumerate(target):
        first, features = _features(weight.shape[1], n, i == 0, stream(f"features/{i}"), bits)
        how = How(1, 0, size, bits, *redraws, stream(f"redraws/{i}"), should_stop)
        made = _sums(weight, bias, features, len(first.weight), stream(f"sums/{i}"), how)
        if made is None:
            return None
        second, error, again, _ = made
        layers += [_without_readers(first, second), second]
        errors.append(error)
        rounds.append(again)
    return Pruned(layers, errors, rounds)


def one_more(
    target: Weights,
    n: int,
    stream: Callable[[str], torch.Generator],
    should_stop: Callable[[], bool] = lambda: False,
) -> Pruned | None:
    """A random network of one layer more than the target; None where it was stopped."""
    first, features = _features(target[0][0].shape[1], n, True, stream("features/0"), None)
    layers, errors, rounds = [first], list[Tensor](), list[Tensor]()
    for i, (weight, bias) in enumerate(target):
        copies, constants = (n, n) if i + 1 < len(target) else (1, 0)
        how = How(copies, constants, None, None, 0, 0.0, stream(f"redraws/{i}"), should_stop)
        made = _sums(weight, bias, features, len(layers[-1].weight), stream(f"sums/{i}"), how)
        if made is None:
            return None
        layer, error, again, features = made
        layers[-1] = _without_readers(layers[-1], layer)
        layers.append(layer)
        errors.append(error)
        rounds.append(again)
    return Pruned(layers, errors, rounds)


@dataclass(frozen=True)
class How:
    """How a layer of sums is made: copies of each neuron, neurons that are constants, and as in `twice`."""

    copies: int
    constants: int
    size: int | None
    bits: int | None
    redraws: int
    epsilon: float
    again: torch.Generator
    should_stop: Callable[[], bool]


def _uniform(shape: tuple[int, ...], generator: torch.Generator, bits: int | None) -> Tensor:
    if bits is not None:
        top = 1 << bits
        return torch.randint(-top, top + 1, shape, generator=generator, device="cpu").float() / top
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1


def _features(
    inputs: int, n: int, signed: bool, generator: torch.Generator, bits: int | None
) -> tuple[Layer, Features]:
    """A layer of neurons that keep one weight each, or none; of `signed` inputs n for either sign."""
    groups = [j for j in range(inputs) for _ in range(1 + signed)] + [inputs]
    of = torch.tensor(groups, device="cpu")
    positive = torch.ones(len(of), dtype=torch.bool, device="cpu")
    if signed:
        positive[1:-1:2] = False
    numbers = _uniform((2 * n * (inputs + 1), inputs + 1), generator, bits)  # the bias behind the weights
    column, sign = of.repeat_interleave(n), positive.repeat_interleave(n)
    neurons = _assign(numbers, column, sign, generator)
    keep = torch.zeros(numbers.shape, dtype=torch.bool, device="cpu")
    keep[neurons, column] = True
    gains = numbers[neurons, column].double().view(-1, n)
    weight, bias = numbers[:, :-1].contiguous(), numbers[:, -1].clone()
    layer = Layer(weight, bias, keep[:, :-1].contiguous(), keep[:, -1].clone())
    return layer, Features(neurons.view(-1, n), gains, of)


def _assign(numbers: Tensor, column: Tensor, sign: Tensor, generator: torch.Generator) -> Tensor:
    """A neuron for every place, int64 [places]: its number of the place's column has the place's sign.

    Begins anywhere; wrong places exchange neurons with others, or with those that have none, while more fit.
    """
    places = len(column)

    def fits(neurons: Tensor, at: Tensor) -> Tensor:
        inside = at.clamp(max=places - 1)
        found = numbers[neurons, column[inside]]
        return (at >= places) | ((found != 0) & ((found > 0) == sign[inside]))

    every = torch.arange(len(numbers), device="cpu")
    order = every.clone()
    for _ in range(1000):
        wrong = (~fits(order, every)).nonzero()[:, 0]
        if not len(wrong):
            return order[:places]
        q = torch.randperm(len(every), generator=generator, device="cpu")
        p = torch.cat([wrong, q[~torch.isin(q, wrong)]])[: len(every) // 2]  # a partner each
        q = q[~torch.isin(q, p)][: len(p)]
        now = fits(order[p], p).int() + fits(order[q], q).int()
        then = fits(order[q], p).int() + fits(order[p], q).int()
        p, q = p[then >= now], q[then >= now]
        order[p], order[q] = order[q], order[p]
    raise SparselthError(f"{places} neurons of which each fits its input: not found; use a larger `n`")


def _sums(
    weight: Tensor, bias: Tensor, features: Features, inputs: int, generator: torch.Generator, how: How
) -> tuple[Layer, Tensor, Tensor, Features] | None:
    """A layer that reads `inputs` neurons and computes W x + b, how far each weight is off, how often each
    sum was drawn again, and what the layer offers the next.
    """
    rows, (groups, n) = len(weight) * how.copies, features.neurons.shape
    total = rows + how.constants
    source = _uniform((total, inputs), generator, how.bits)
    source_bias = _uniform((total,), generator, how.bits)
    keep_bias = torch.zeros(total, dtype=torch.bool, device="cpu")
    alone = (source_bias > 0).nonzero()[: how.constants, 0]
    if len(alone) < how.constants:
        raise SparselthError(
            f"{len(alone)} of {total} biases are positive, expected {how.constants}; use more"
        )
    keep_bias[alone] = True
    places = (~keep_bias).nonzero()[:, 0]  # of copy c of neuron i: c + i * copies
    wanted = torch.cat([weight, bias[:, None]], 1).double()
    keep = torch.zeros(total, inputs, dtype=torch.bool, device="cpu")
    error = torch.zeros(rows, groups, dtype=torch.float64, device="cpu")
    rounds = torch.zeros(rows, groups, dtype=torch.uint8, device="cpu")
    step = max(1, min(NUMBERS // (groups * n), WORK // (groups * sums(n, how.size))))
    for start in range(0, rows, step):
        if how.should_stop():
            return None
        row = places[start : start + step, None].expand(-1, groups).flatten()
        columns = features.neurons.repeat(len(row) // groups, 1)
        gains = features.gains.repeat(len(row) // groups, 1)
        targets = wanted[torch.arange(start, start + len(row) // groups, device="cpu") // how.copies]
        targets = targets[:, features.of].flatten()
        chosen, off = closest(source[row[:, None], columns].double() * gains, targets, how.size)
        drawn = rounds[start : start + step].view(-1)
        for again in range(1, how.redraws + 1):
            short = (off > how.epsilon).nonzero()[:, 0]
            if not len(short):
                break
            fresh = _uniform((len(short), n), how.again, how.bits)
            source[row[short, None], columns[short]] = fresh
            chosen[short], off[short] = closest(fresh.double() * gains[short], targets[short], how.size)
            drawn[short] = again
        keep[row[:, None], columns] = chosen
        error[start : start + step] = off.view(-1, groups)
    worst = error.new_zeros(rows, weight.shape[1] + 1)
    worst.scatter_reduce_(1, features.of.expand_as(error), error, "amax")
    offered = places.view(len(weight), how.copies)
    gains = torch.ones(offered.shape, dtype=torch.float64, device="cpu")
    if how.constants:
        offered = torch.cat([offered, alone[None]])
        gains = torch.cat([gains, source_bias[alone][None].double()])
    layer = Layer(source, source_bias, keep, keep_bias)
    of = torch.arange(len(offered), device="cpu")
    return layer, worst.view(len(weight), how.copies, -1).amax(1), rounds, Features(offered, gains, of)


def _without_readers(layer: Layer, reader: Layer) -> Layer:
    """The layer without the neurons that nothing behind it keeps."""
    read = reader.keep.any(0)
    return Layer(layer.weight, layer.bias, layer.keep & read[:, None], layer.keep_bias & read)
