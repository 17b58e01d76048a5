"""Networks on a plane of weights: centre + a one + b other, for many (a, b), on the same images.

What a fully connected first layer gives is linear in its weights. So that of every network on the plane is a
combination of three products, and where most of a network's weights lie in that layer, as in LeNet-300-100,
a network costs an eighth of its products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparselth.data.batches import Chunk
from sparselth.engine.batch import DenseForward
from sparselth.engine.many import Found, Many
from sparselth.engine.state import Stopped, never
from sparselth.models import Linear, Model, Node

LEAST = 0.5  # of the weights, in the first layer, from which it pays


def measure_plane(
    many: Many,
    basis: Tensor,
    places: Tensor,
    chunks: Sequence[Chunk],
    should_stop: Callable[[], bool] = never,
) -> Found:
    """Loss and accuracy at `places` [N, 2] of the plane of `basis` [3, P]: the centre and two directions."""
    model = many.model
    rest = None if many.one_by_one or many.vendor or many.settles else behind_first(model)
    if rest is None:

        def make(i: int, j: int) -> Tensor:
            return torch.addmm(basis[:1], places[i:j], basis[1:])

        return many.measure(len(places), make, [chunks], should_stop)[0]
    first, bias = (basis[:, spec.span] for spec in model.parts[0])
    first = first.view(3, *model.parts[0][0].matrix)
    others = [spec for spec in model.params.all if spec not in model.parts[0]]
    behind = basis.new_zeros(3, rest.params.size)
    for spec, own in zip(others, rest.params.all, strict=True):
        behind[:, own.span] = basis[:, spec.span]
    found: Found = ([], [])
    forwards: dict[int, DenseForward] = {}
    outputs = [(first @ x[0] + bias[:, :, None], y) for x, y in chunks]  # [3, N, B]
    count = sum(y.shape[2] for _, y in chunks)
    for start, end in many.parts(len(places)):
        at, r = places[start:end], end - start
        if r not in forwards:
            forwards[r] = DenseForward(rest, basis.new_empty(r, rest.params.size), False)
        torch.addmm(behind[:1], at, behind[1:], out=forwards[r].weights)
        total = torch.zeros(2, r, dtype=torch.float64, device=basis.device)
        for output, y in outputs:
            if should_stop():
                raise Stopped
            x = torch.addmm(output[:1].flatten(1), at, output[1:].flatten(1)).view(r, *output.shape[1:])
            total += torch.stack(forwards[r].sums(x, y))
        losses, rights = (total / count).tolist()
        found[0].extend(losses)
        found[1].extend(rights)
    return found


def behind_first(model: Model) -> Model | None:
    """The network behind the first layer, if that is fully connected, most of it, and alone reads images."""
    first, *others = model.nodes
    if not isinstance(first.op, Linear) or model.readers[0] != (0,) or not others:
        return None
    if model.weights[0].numel < LEAST * model.params.prunable or len(model.weights) < 2:
        return None
    layers = tuple(Node(node.op, tuple(j - 1 for j in node.inputs)) for node in others)
    return Model(
        f"{model.name} behind {model.weights[0].name}", model.shapes[1], layers, {}, "", model.classes
    )
