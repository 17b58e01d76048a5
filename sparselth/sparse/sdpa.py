"""What an attention of a graph reads: tokens that attend to each other, or one behind its past."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparselth.sparse.grouping import calls
from sparselth.sparse.heads import JOINS, MOST, REPEATS, Layout, count
from sparselth.sparse.tokens import VIEWS, Values

NAMES = "query", "key", "value", "attn_mask", "dropout_p", "is_causal"  # arguments of torch's attention
NOTHING: dict[str, Any] = {"attn_mask": None, "dropout_p": 0}


@dataclass(frozen=True)
class Read:
    """What an attention reads."""

    parts: tuple[fx.Node, ...]  # queries, keys and values of new tokens
    past: list[fx.Node]  # keys and values before them
    joins: list[fx.Node]  # what puts new ones behind those
    repeats: list[fx.Node]  # what repeats those for several heads
    group: int | None  # heads that share each of the keys and values; None: as they lie
    scale: float | None
    causal: bool


def read_attention(node: fx.Node, values: Values) -> Read | None:
    """Of an attention among tokens, or of one token behind its past; None: it is none, or asks for more."""
    if node.target is not F.scaled_dot_product_attention or len(node.args) > len(NAMES):
        return None
    given: dict[str, Any] = dict(zip(NAMES, node.args, strict=False)) | node.kwargs
    parts = tuple(given.pop(name, None) for name in NAMES[:3])
    scale, causal = given.pop("scale", None), given.pop("is_causal", False)
    shares = given.pop("enable_gqa", False)
    more = any(value != NOTHING.get(name, value) or name not in NOTHING for name, value in given.items())
    if more or not isinstance(causal, bool) or not isinstance(shares, bool) or isinstance(scale, fx.Node):
        return None
    shapes = [values.shapes.get(part, ()) if isinstance(part, fx.Node) else () for part in parts]
    new, keys, like = shapes
    if not len(new) == len(keys) == 4 or keys != like or not prod(keys) or new[1] % keys[1]:
        return None
    group = new[1] // keys[1]
    if group > 1 and not shares:
        return None
    behind = [_behind(part, values) for part in parts[1:]]
    if not any(behind):
        same = new[::2] == keys[::2] and new[3] == keys[3]
        return Read(parts, [], [], [], group if group > 1 else None, scale, causal) if same else None
    if causal or parts[1] is parts[2] or not all(behind):
        return None
    first, second = (one for one in behind if one)
    past, one = values.shapes.get(first.past, ()), values.shapes.get(first.new, ())
    alike = past == values.shapes.get(second.past) and one == values.shapes.get(second.new)
    if not alike or not len(past) == len(one) == 4 or one[::2] != (1, 1) or new[::2] != (1, 1):
        return None
    if past[1] != one[1]:
        return None
    return Read(
        (parts[0], first.new, second.new),
        [first.past, second.past],
        [first.join, second.join],
        [*first.repeats, *second.repeats],
        first.times * group,
        scale,
        causal,
    )


@dataclass(frozen=True)
class _Behind:
    """New keys or values behind those of the past, [B, G, S, D], each for `times` heads in a row."""

    past: fx.Node
    new: fx.Node
    join: fx.Node
    repeats: list[fx.Node]
    times: int


def _behind(node: fx.Node, values: Values) -> _Behind | None:
    chain, at = list[fx.Node](), node
    while calls(at, VIEWS | REPEATS) and at.args and isinstance(at.args[0], fx.Node):
        chain.append(at)
        at = at.args[0]
    halves, shape = _halves(at), values.shapes.get(at, ())
    if not halves or len(shape) != 4:
        return None
    if not chain:
        return _Behind(halves[0], halves[1], at, [], 1)
    if prod(shape) > MOST:
        return None
    own = count(*shape)
    found = Layout(values, lambda n: own if n is at else None).plain(node)
    if found is None or found[1].dim() != 4 or found[1].shape[1] % shape[1]:
        return None
    times = found[1].shape[1] // shape[1]
    right = torch.equal(found[1], own.repeat_interleave(times, 1))
    return _Behind(halves[0], halves[1], at, chain, times) if right else None


def _halves(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two tensors [B, H, S, D] that it puts one behind the other, along S; () if it does not."""
    if node.op != "call_function" or node.target not in JOINS or not node.args:
        return ()
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if axis not in (2, -2) or node.kwargs.keys() - {"dim"} or not isinstance(parts, list | tuple):
        return ()
    found = tuple(part for part in parts if isinstance(part, fx.Node))
    return found if len(found) == len(parts) == 2 else ()
