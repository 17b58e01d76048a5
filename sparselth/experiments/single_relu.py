"""How well networks of one hidden layer compute a single ReLU, max(0, <w, x>), of Gaussian x: exactly.

For x ~ N(0, I) the products of ReLUs have a closed form (Cho & Saul 2009),

    E[relu(<u, x>) relu(<v, x>)] = |u| |v| / 2 pi (sin t + (pi - t) cos t),   t the angle of u and v,

so that the mean square error of sum a_i relu(<v_i, x>) is a quadratic of `a`: no sample is drawn, and its
least value over all `a`, that of random features, bounds from below what any choice of whole neurons reaches.
Errors are shares of E[target^2]: 0 is the target itself, 1 what the network 0 has. All networks may be scaled
by one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STEPS, RATE = 200, 0.05  # of Adam, which trains scores
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of neurons kept, of which the best counts


def products(u: Floats, v: Floats) -> Floats:
    """E[relu(<u_i, x>) relu(<v_j, x>)] of rows u [N, D] and v [M, D], [N, M]."""
    return _product(*_angles(u, v))


def _product(size: Floats, angle: Floats) -> Floats:
    found: Floats = size / (2 * pi) * (np.sin(angle) + (pi - angle) * np.cos(angle))
    return found


def _angles(u: Floats, v: Floats) -> tuple[Floats, Floats]:
    size = np.linalg.norm(u, axis=1)[:, None] * np.linalg.norm(v, axis=1)
    cosine = np.divide(u @ v.T, size, out=np.zeros_like(size), where=size > 0)
    return size, np.arccos(np.clip(cosine, -1, 1))


def random_features(hidden: Floats, target: Floats) -> float:
    """The least error of any output weights over hidden weights [N, D], for a target [D]."""
    gram, reach = products(hidden, hidden), products(hidden, target[None])[:, 0]
    values, vectors = np.linalg.eigh(gram)
    there = values > 1e-12 * values[-1]
    share = ((vectors.T @ reach)[there] ** 2 / values[there]).sum() / _power(target)
    return float(max(0.0, 1 - share))


def error(hidden: Floats, output: Floats, target: Floats) -> float:
    """Of the network with hidden weights [N, D] and output weights [N], times the number that is best."""
    spread = output @ products(hidden, hidden) @ output
    reach = output @ products(hidden, target[None])[:, 0]
    return float(1 - reach**2 / (spread * _power(target))) if spread > 0 else 1.0


Slope = Callable[[Sequence[Floats]], tuple[float, list[Floats]]]


def neuron_slope(hidden: Floats, output: Floats, target: Floats) -> Slope:
    """The error of a mask [N] of neurons, and its gradient by the mask."""
    gram = products(hidden, hidden) * np.outer(output, output)
    reach, power = products(hidden, target[None])[:, 0] * output, _power(target)

    def slope(masks: Sequence[Floats]) -> tuple[float, list[Floats]]:
        (mask,) = masks
        side = gram @ mask
        spread, toward = mask @ side, mask @ reach
        near, far = -2 * toward / (spread * power), toward**2 / (spread**2 * power)
        return float(1 - toward**2 / (spread * power)), [near * reach + 2 * far * side]

    return slope


def weight_slope(hidden: Floats, output: Floats, target: Floats) -> Slope:
    """The error of masks [N, D] and [N] of the weights of both layers, and its gradients by the masks."""
    power, length = _power(target), float(np.linalg.norm(target))

    def slope(masks: Sequence[Floats]) -> tuple[float, list[Floats]]:
        inner, outer = hidden * masks[0], output * masks[1]
        size = np.linalg.norm(inner, axis=1)
        unit = np.divide(inner, size[:, None], out=np.zeros_like(inner), where=size[:, None] > 0)
        sizes, angle = _angles(inner, inner)
        there = _angles(inner, target[None])[1][:, 0]
        gram, reach = _product(sizes, angle), _product(size * length, there)
        side = gram @ outer
        spread, toward = outer @ side, outer @ reach
        if spread <= 0:
            return 1.0, [np.zeros_like(hidden), np.zeros_like(output)]
        near, far = -2 * toward / (spread * power), toward**2 / (spread**2 * power)
        pull = unit * (np.sin(there) * length)[:, None] + (pi - there)[:, None] * target
        turn = unit * ((np.sin(angle) * size) @ outer)[:, None] + (pi - angle) @ (outer[:, None] * inner)
        by_inner = outer[:, None] * (near * pull + 2 * far * turn) / (2 * pi)
        by_outer = (near * reach + 2 * far * side) * output
        return float(1 - toward**2 / (spread * power)), [by_inner * hidden, by_outer]

    return slope


def neurons(
    hidden: Floats, output: Floats, target: Floats, draw: np.random.Generator
) -> tuple[float, Floats]:
    """The least error found by keeping whole neurons by trained scores; and the mask [N]."""
    slope, found = neuron_slope(hidden, output, target), list[tuple[float, Floats]]()
    for share in _different(SHARES, len(hidden)):
        (mask,), least = _trained([draw.random((len(hidden),))], [share], slope)
        found.append((least, mask))
    return min(found, key=lambda one: one[0])


def weights(
    hidden: Floats, output: Floats, target: Floats, draw: np.random.Generator
) -> tuple[float, Floats]:
    """The least error found by keeping weights of both layers by trained scores; the mask [N, D + 1]."""
    n, d = hidden.shape
    slope, found = weight_slope(hidden, output, target), list[tuple[float, Floats]]()
    for share in _different((1 / d, 2 / d, 0.5), n * d):
        masks, least = _trained([draw.random((n, d)), draw.random((n,))], [share, 0.5], slope)
        found.append((least, np.concatenate([masks[0], masks[1][:, None]], axis=1)))
    return min(found, key=lambda one: one[0])


def _power(target: Floats) -> float:
    return float(target @ target) / 2


def _different(shares: Sequence[float], n: int) -> list[float]:
    """Shares that keep different numbers of n."""
    return [*{max(1, round(share * n)): share for share in shares}.values()]


def _trained(scores: list[Floats], shares: list[float], slope: Slope) -> tuple[list[Floats], float]:
    """The best masks that scores come by, straight-through: a mask keeps the share of largest scores."""
    best, least = list[Floats](), np.inf
    first, second = ([np.zeros_like(one) for one in scores] for _ in range(2))
    for step in range(1, STEPS + 1):
        masks = [_top(one, share) for one, share in zip(scores, shares, strict=True)]
        loss, grads = slope(masks)
        if loss < least:
            best, least = masks, loss
        for one, grad, mean, square in zip(scores, grads, first, second, strict=True):
            mean += 0.1 * (grad - mean)
            square += 0.001 * (grad**2 - square)
            one -= RATE * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-12)
    return best, float(least)


def _top(scores: Floats, share: float) -> Floats:
    kept, mask = max(1, round(share * scores.size)), np.zeros(scores.size)
    mask[np.argpartition(scores.ravel(), -kept)[-kept:]] = 1
    return mask.reshape(scores.shape)
