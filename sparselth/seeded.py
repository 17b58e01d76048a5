"""Strong tickets as layers: a seed and packed masks in memory, in products that draw the weights they need.

    W = s v (kept - turned)       v = 1 or -1, by the hash of (seed, layer, index); s > 0, one number a layer

So is every layer whose kept weights are of one magnitude, whoever found them: edge-popup's and supermask's
have all the signs that the seed draws; redrawn, recycled, negated (`signed`) and binary (`biprop`) weights
have some turned, which is a second bit a weight, whatever generation they are of. Other laws than signed
constants leave a layer that is decoded: a torch layer in fp32.

The weights that a product computes with are those of the ticket, bit for bit. What it adds up in another
order than torch is off by rounding: |y - Wx| <= (K + 2) 2^-24 |W| |x| for K inputs, in fp32.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn

from sparselth.kernels.hash_weights import hash_weights, matrix
from sparselth.kernels.seed_conv2d import seed_conv2d, sizes
from sparselth.kernels.seed_linear import SeedWeight, seed_linear
from sparselth.models import Model
from sparselth.models.torch import network


class Seeded(nn.Module):
    """Weights of one magnitude as bits, of a layer without a bias.

    kept    uint8 [N, ceil(K / 8)]: the mask of the weights whose signs are as the seed draws them
    turned  the same of those with the other sign, None where there are none
    """

    kept: Tensor
    turned: Tensor | None

    def __init__(self, weight: Tensor, seed: int, layer: int) -> None:
        """From weights [N, ...] of which `one_size` is true, of layer number `layer` of a seed's network."""
        super().__init__()
        self.shape, self.seed, self.layer = tuple(weight.shape), seed, layer
        self.gain = float(weight.abs().max()) / sqrt(2 / matrix(self.shape)[1])
        as_drawn = (weight > 0) == (hash_weights(seed, layer, self.shape, device=weight.device) > 0)
        some = weight != 0
        self.register_buffer("kept", self._of(some & as_drawn).bits)
        others = some & ~as_drawn
        self.register_buffer("turned", self._of(others).bits if others.any() else None)
        self.share = float(some.float().mean())

    def _of(self, mask: Tensor) -> SeedWeight:
        return SeedWeight.of(mask, self.seed, self.layer, self.gain)

    def drawn(self) -> tuple[SeedWeight, SeedWeight | None]:
        """The weights of either sign: a product with the first, less one with the second."""
        kept, turned = (
            None if bits is None else SeedWeight(self.shape, bits, self.seed, self.layer, self.gain)
            for bits in (self.kept, self.turned)
        )
        assert kept is not None
        return kept, turned

    def to_dense(self) -> Tensor:
        """The weights, fp32 [N, ...]."""
        kept, turned = self.drawn()
        return kept.to_dense() if turned is None else kept.to_dense() - turned.to_dense()

    def extra_repr(self) -> str:
        held = sum(buffer.numel() for buffer in self.buffers())
        bits = "mask" if self.turned is None else "mask and signs"
        return (
            f"{list(self.shape)}, seed {self.seed}, layer {self.layer}, {100 * self.share:.1f} % kept, "
            f"{bits} in {held:,} bytes, fp32 in {4 * matrix(self.shape)[0] * matrix(self.shape)[1]:,}"
        )


class SeedLinear(Seeded):
    """x [..., K] to [..., N]."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        kept, turned = self.drawn()
        y = seed_linear(rows, kept)
        if turned is not None:
            y = y - seed_linear(rows, turned)
        return y.view(*x.shape[:-1], -1)


class SeedConv2d(Seeded):
    """x [B, C, H, W] to [B, N, OH, OW]."""

    def __init__(self, weight: Tensor, seed: int, layer: int, stride: int, padding: int) -> None:
        super().__init__(weight, seed, layer)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(0, self.shape[0], *sizes(x, [*self.shape], self.stride, self.padding))
        kept, turned = self.drawn()
        y = seed_conv2d(x, kept, stride=self.stride, padding=self.padding)
        if turned is None:
            return y
        return y - seed_conv2d(x, turned, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride {self.stride}, padding {self.padding}"


def one_size(weight: Tensor) -> bool:
    """Whether all weights but those that are 0 are of one magnitude."""
    kept = weight[weight != 0].abs()
    return not kept.numel() or bool((kept == kept[0]).all())


def seeded(model: Model, flat: Tensor, seed: int) -> nn.Module:
    """The network of a strong ticket in evaluation mode, from its weights [P]; its biases are 0.

    Layers are `SeedLinear` and `SeedConv2d` where weights are of one magnitude, and torch's elsewhere. The
    other layers, batch norms among them, are torch's.
    """
    net = network(model, flat).eval()
    products = [
        (name, product)
        for name, product in net.named_children()
        if isinstance(product, nn.Conv2d | nn.Linear)
    ]
    for layer, (name, product) in enumerate(products):
        weight = product.weight.detach()
        if not one_size(weight):
            continue
        if isinstance(product, nn.Linear):
            found: nn.Module = SeedLinear(weight, seed, layer)
            if not isinstance(net, nn.Sequential):  # a `Graph` flattens for what is nn.Linear alone
                found = nn.Sequential(nn.Flatten(), found)
        else:
            found = SeedConv2d(weight, seed, layer, product.stride[0], int(product.padding[0]))
        setattr(net, name, found)
    return net.requires_grad_(False)
