r"""A step of scores over frozen weights, up to the weights that the next forward pass computes with.

    d = dL/dw_eff w,  g = d sign(s),  a = momentum a + g + decay s,  s -= lr a   (straight-through, then SGD)
    w_eff = w where |s| is among the k largest of its group, else 0              (an exact count, no sort)

| rule      | ranks by | g         | w_eff, kept | of                                              |
| magnitude | abs(s)   | d sign(s) | w           | edge-popup (Ramanujan et al. 2020), recycling   |
| score     | s        | d         | w           | IteRand (Chijiwa et al. 2021)                   |
| ternary   | abs(s)   | d         | w sign(s)   | signed supermask (Koster et al. 2022)           |

Scores, gradient, momentum, frozen and effective weights are fp32 [M]. A group is one or more spans of these,
a layer or all of them; nothing outside the spans is read or written. Equal scores go by lowest index, over
the spans of a group in their order; 0.0 and -0.0 are equal, NaN is the largest. Every weight has a gradient,
kept or not.

On a CPU one C call does it in one pass: it counts the scores above a bracket around the threshold of the step
before, writes their weights, and lists those inside, 1 to 3 % of a group, of which the threshold is selected.
Where it is not among these, as at the first step, keys are counted by their first 12 bits, and w_eff takes a
second pass. Steps round as masked_update's. Elsewhere torch takes them, and magnitude_threshold ranks.

Floor: s, g, a and w are read, s, a and w_eff written: 28 bytes a weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparselth.kernels import _native, bitmask
from sparselth.kernels._choose import choose
from sparselth.kernels.magnitude_threshold import launch

RULES = ("magnitude", "score", "ternary")
Span = tuple[int, int]  # first weight, how many
Groups = Sequence[Sequence[Span]]


def top(scores: Tensor, keep: int, signed: bool = False, *, kernels: str = "auto") -> Tensor:
    """Which of scores [n] are the `keep` largest, or of largest magnitude unless `signed`: bool [n].

    `kernels` is "native" (C, on a CPU), "triton" or "reference" (those of magnitude_threshold), or "auto".
    """
    if not 0 <= keep <= len(scores):
        raise ValueError(f"keep: expected 0 to {len(scores)}, got {keep}")
    if (kernels := _choose(kernels, scores)) == "native":
        kept = torch.empty(len(scores), dtype=torch.bool, device="cpu")
        flat = scores.contiguous()
        rule = "score" if signed else "magnitude"
        _bind(flat, None, None, None, None, kept, [[(0, len(flat))]], [keep], rule)[0]()
        return kept
    if not signed:
        return _largest(scores, None, keep, kernels)
    above = ~(scores < 0)
    n = int(above.sum())
    if keep <= n:
        return _largest(scores, above, keep, kernels)
    # all of these, and of the negative ones those nearest to 0: the largest magnitudes go, lowest index first
    below = ~above
    far = _largest(scores.flip(0), below.flip(0), len(scores) - keep, kernels)
    return above | (below & ~far.flip(0))


def _largest(scores: Tensor, among: Tensor | None, keep: int, kernels: str) -> Tensor:
    """The `keep` largest magnitudes among some; equal ones go by lowest index."""
    n = len(scores)
    masks = [] if among is None else [bitmask.pack(among.view(1, 1, n))]
    alive = n if among is None else int(among.sum())
    going = torch.tensor([[alive - keep]], device="cpu")
    bits, _ = launch([scores.contiguous().view(1, 1, n)], going, masks, kernels=kernels)
    found: Tensor = bitmask.unpack(bits[0, : -(-n // 8)], n)
    return found


def bind_score_update(
    scores: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    weights: Tensor,
    effective: Tensor,
    groups: Groups,
    keep: Sequence[int],
    *,
    rule: str,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    kernels: str = "auto",
) -> Callable[[float], None]:
    """A function that takes one step at a learning rate, in place; each tensor is fp32 [M], `grad` stays.

    The momentum starts at 0; without any its buffer is None. `keep` has a number of each group. `weights` may
    change between calls. `kernels` as in `top`; but for the native ones, steps are torch's.
    """
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(
            f"expected a momentum buffer if and only if there is momentum, got momentum {momentum}"
        )
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if len(keep) != len(groups):
        raise ValueError(f"keep: expected a number of each of {len(groups)} groups, got {len(keep)}")
    for group, n in zip(groups, keep, strict=True):
        if not 0 <= n <= (most := sum(count for _, count in group)):
            raise ValueError(f"keep: expected 0 to {most}, got {n}")
        if any(first < 0 or count < 0 or first + count > len(scores) for first, count in group):
            raise ValueError(f"groups: expected spans within {len(scores)} weights, got {list(group)}")
    if (kernels := _choose(kernels, scores)) == "native":
        call, u = _bind(scores, grad, momentum_buffer, weights, effective, None, groups, keep, rule)
        u.momentum, u.decay = momentum, weight_decay

        def run(lr: float) -> None:
            u.rate = -lr
            call()

        return run

    def run_torch(lr: float) -> None:
        reference(
            scores,
            grad,
            momentum_buffer,
            weights,
            effective,
            groups,
            keep,
            rule=rule,
            momentum=momentum,
            weight_decay=weight_decay,
            lr=lr,
            kernels=kernels,
        )

    return run_torch


def reference(
    scores: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    weights: Tensor,
    effective: Tensor,
    groups: Groups,
    keep: Sequence[int],
    *,
    rule: str,
    momentum: float,
    weight_decay: float,
    lr: float,
    kernels: str = "reference",
) -> None:
    """The step by torch's operations, on any device."""
    for group, n in zip(groups, keep, strict=True):
        places = [slice(first, first + count) for first, count in group]
        for place in places:
            s = scores[place]
            g = grad[place] * weights[place]
            if rule == "magnitude":
                g.mul_(s.sign())
            if weight_decay:
                g.add_(s, alpha=weight_decay)
            if momentum_buffer is not None:
                g = momentum_buffer[place].mul_(momentum).add_(g)
            s.sub_(g, alpha=lr)
        kept = top(torch.cat([scores[p] for p in places]), n, rule == "score", kernels=kernels)
        for place, mask in zip(places, torch.split(kept, [count for _, count in group]), strict=True):
            found = weights[place] * scores[place].sign() if rule == "ternary" else weights[place]
            effective[place] = torch.where(mask, found, 0.0)


def _choose(kernels: str, t: Tensor) -> str:
    has = ("native", "triton", "reference") if t.is_cpu else ("triton", "reference")
    return choose(kernels, has, t)


class _Update(ctypes.Structure):  # struct score_update
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("s", "g", "a", "w", "out", "kept", "spans", "ends", "keep")],
        *[(name, ctypes.c_void_p) for name in ("bracket", "listed")],
        ("groups", ctypes.c_int64),
        *[(name, ctypes.c_float) for name in ("momentum", "decay", "rate")],
        ("rule", ctypes.c_int32),
    ]


def _bind(
    s: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    w: Tensor | None,
    out: Tensor | None,
    kept: Tensor | None,
    groups: Groups,
    keep: Sequence[int],
    rule: str,
) -> tuple[Callable[[], None], _Update]:
    for name, t in (("scores", s), ("grad", g), ("momentum", a), ("weights", w), ("effective", out)):
        if t is not None:
            _native.check(name, t, (len(s),), contiguous=True)
    spans = torch.tensor([span for group in groups for span in group], dtype=torch.int64, device="cpu")
    ends = torch.tensor([len(group) for group in groups], dtype=torch.int64, device="cpu").cumsum(0)
    counts = torch.tensor([*keep], dtype=torch.int64, device="cpu")
    most = max((sum(count for _, count in group) for group in groups), default=0)
    listed = torch.empty(most, dtype=torch.int64, device="cpu")
    bracket = torch.tensor([[0.0, -1.0]] * len(groups), dtype=torch.float32, device="cpu")
    tensors = s, g, a, w, out, kept, spans, ends, counts, bracket, listed
    names = ("s", "g", "a", "w", "out", "kept", "spans", "ends", "keep", "bracket", "listed")
    arguments = _Update(**{name: _native.address(t) for name, t in zip(names, tensors, strict=True)})
    arguments.groups, arguments.rule = len(groups), RULES.index(rule)
    return _native.bind("score_update", arguments, *tensors), arguments


def floor(weights: int) -> dict[str, int]:
    """Bytes and FLOPs of a step with momentum."""
    return {"bytes": 28 * weights, "flops": 8 * weights}
