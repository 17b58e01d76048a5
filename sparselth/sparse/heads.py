"""Which numbers of which tokens the heads of an attention are, and what rotary positions do to them.

Between a product and an attention a graph has views, and, of queries and keys, products with numbers that
depend on the position alone, negations, sums and concatenations. Here each of its values is a sum of terms:
numbers of some tokens, each by a sign and by a number from outside; so it does not matter in what words a
model says it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from sparselth.sparse.grouping import IN_PLACE, PRODUCTS, SUMS, calls
from sparselth.sparse.norms import CASTS
from sparselth.sparse.tokens import VIEWS, Values

JOINS = {torch.cat, torch.concat, torch.concatenate}
STACKS = {torch.stack}
REPEATS = {torch.repeat_interleave, "repeat_interleave", "expand", "repeat"}
NEGATIVES = {operator.neg, torch.neg, torch.negative, "neg", "negative"}
DIFFERENCES = {operator.sub, torch.sub, torch.subtract, "sub", "subtract"}
MOST = 1 << 24  # numbers of a value that is followed: what is noted of each takes 20 bytes


@dataclass(frozen=True)
class Term:
    """Numbers `index` of a flattened root, by `sign`, and by numbers `at` of a flattened factor, or by 1."""

    root: fx.Node
    index: Tensor
    sign: Tensor  # 1, -1, or 0
    factor: fx.Node | None
    at: Tensor  # -1: none

    def views(self, does: Callable[..., Any]) -> list[Term]:
        """What a view makes of it, one or several."""
        found = [[x] if isinstance(x, Tensor) else x for x in map(does, (self.index, self.sign, self.at))]
        return [Term(self.root, i, sign, self.factor, at) for i, sign, at in zip(*found, strict=True)]


Laid: TypeAlias = tuple[Term, ...]


@dataclass(frozen=True)
class Place:
    """Heads in features: of the first one, from one to the next, and how many in a row share one."""

    first: int
    apart: int
    group: int = 1


@dataclass(frozen=True)
class Factor:
    """Numbers [tokens, features] to multiply by; equal ones are one."""

    node: fx.Node
    at: bytes
    sign: bytes
    rows: tuple[int, int]

    def module(self, shape: tuple[int, ...]) -> Picked:
        """What makes them of the node's value, of `shape`."""
        at = torch.frombuffer(bytearray(self.at), dtype=torch.int64).view(self.rows)
        sign = torch.frombuffer(bytearray(self.sign), dtype=torch.int8).view(self.rows)
        return Picked(at, sign, shape)


class Picked(nn.Module):
    """Numbers `at` of a tensor of `shape`, -1 for a 1, by `sign`; of another tensor none at all."""

    def __init__(self, at: Tensor, sign: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.rows = shape, (*at.shape,)
        self.at: Tensor | None
        self.ones: Tensor | None
        self.sign: Tensor | None
        whole = torch.equal(at.flatten(), torch.arange(prod(shape), device="cpu"))
        self.register_buffer("at", None if whole else at.clamp(min=0))
        self.register_buffer("ones", at < 0 if bool((at < 0).any()) else None)
        self.register_buffer("sign", None if bool((sign == 1).all()) else sign.float())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape != self.shape or x.dtype != torch.float32:
            return x.new_empty(0)
        x = x.reshape(self.rows) if self.at is None else x.reshape(-1)[self.at]
        x = x if self.ones is None else x.masked_fill(self.ones, 1.0)
        return x if self.sign is None else x * self.sign


@dataclass(frozen=True)
class Turn:
    """Heads [H, D]: feature `first[d]` of each by one factor, and `second[d]` by another one."""

    place: Place
    heads: int
    first: tuple[int, ...]
    second: tuple[int, ...]


@dataclass(frozen=True)
class Turned:
    """What does so to which tokens."""

    root: fx.Node
    turn: Turn
    factors: tuple[Factor, Factor]


class Layout:
    """What values of a stretch of a graph are made of.

    `roots`: how those lie that are so many tokens themselves; `same`: of equal values from outside one.
    """

    def __init__(
        self,
        values: Values,
        roots: Callable[[fx.Node], Tensor | None],
        same: Callable[[fx.Node], fx.Node] = lambda node: node,
        tokens: int = 1,
    ) -> None:
        self.values, self.roots, self.same, self.tokens = values, roots, same, tokens
        self.found: dict[fx.Node, Laid | list[Laid] | None] = {}
        self.outer: dict[fx.Node, Laid | None] = {}
        self.texts: dict[bytes, bytes] = {}  # of factors, each held once

    def terms(self, node: Any) -> Laid | None:
        """Of a tensor; None: unknown."""
        found = self._found(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, tuple) else None

    def features(self, root: fx.Node) -> int:
        """Numbers of each token."""
        return prod(self.values.shapes[root]) // self.tokens

    def known(self, node: fx.Node) -> bool:
        """Whether it is made of roots in a way that is understood."""
        return self._found(node) is not None

    def plain(self, node: Any) -> tuple[fx.Node, Tensor] | None:
        """What it is a view of, and which numbers of it are where; None if it is no such thing."""
        terms = self.terms(node)
        if terms is None or len(terms) != 1 or terms[0].factor or not bool((terms[0].sign == 1).all()):
            return None
        return terms[0].root, terms[0].index

    def turned(self, node: Any) -> Turned | None:
        """Of heads [B, H, T, D] that are turned by positions; None: they are no such thing."""
        terms = self.terms(node)
        if terms is None or len(terms) != 2 or len({term.root for term in terms}) != 1:
            return None
        root, shape = terms[0].root, terms[0].index.shape
        if len(shape) != 4 or not prod(shape):
            return None
        b, h, t, d = shape
        features = self.features(root)
        own = [term.index - count(b, 1, t, 1) * features for term in terms]
        begins = torch.minimum(*(x[0, :, 0].amin(-1) for x in own))
        place = place_of(begins)
        orders = [x[0, 0, 0] - begins[0] for x in own]
        if place is None or any(int(order.max()) >= d for order in orders):
            return None
        for x, order in zip(own, orders, strict=True):
            if not bool((x == begins[:, None, None] + order).all()):
                return None
        factors = list[Factor]()
        for term in terms:
            at, sign = (x[:, :1].expand_as(x) for x in (term.at, term.sign))
            if term.factor is None or not torch.equal(at, term.at) or not torch.equal(sign, term.sign):
                return None
            rows = [x[:, 0].reshape(b * t, d).contiguous().numpy().tobytes() for x in (at, sign)]
            rows = [self.texts.setdefault(text, text) for text in rows]
            factors.append(Factor(term.factor, rows[0], rows[1], (b * t, d)))
        first, second = (tuple(order.tolist()) for order in orders)
        return Turned(root, Turn(place, h // place.group, first, second), (factors[0], factors[1]))

    def _found(self, node: fx.Node) -> Laid | list[Laid] | None:
        if node not in self.found:
            lie = self.roots(node)
            self.found[node] = (_term(node, lie),) if lie is not None else self._made(node)
        return self.found[node]

    def _made(self, node: fx.Node) -> Laid | list[Laid] | None:
        if node.op not in ("call_function", "call_method") or not node.args or calls(node, IN_PLACE):
            return None
        if prod(self.values.shapes.get(node, ())) > MOST:
            return None
        try:
            if calls(node, JOINS | STACKS):
                return self._joined(node)
            if calls(node, VIEWS | REPEATS | CASTS):
                return self._view(node, self._found(of)) if isinstance(of := node.args[0], fx.Node) else None
            if calls(node, NEGATIVES):
                found = self.terms(node.args[0])
                return None if found is None else tuple(replace(term, sign=-term.sign) for term in found)
            if len(node.args) == 2 and not node.kwargs and node in self.values.shapes:
                if calls(node, (*SUMS, *DIFFERENCES)):
                    return self._sum(node)
                if calls(node, PRODUCTS):
                    return self._product(node)
        except (RuntimeError, IndexError, TypeError):  # a view of what lies in another way
            return None
        return None

    def _view(self, node: fx.Node, of: Laid | list[Laid] | None) -> Laid | list[Laid] | None:
        """Of what is made as `of` says."""
        if of is None or calls(node, CASTS):
            return of if node in self.values.shapes and node.args[0] in self.values.shapes else None
        if isinstance(of, list):
            return of[node.args[1]] if node.target is operator.getitem else None  # type: ignore[index]
        numbers = self.values.numbers
        if any(n not in numbers for n in node.all_input_nodes if n is not node.args[0]):
            return None
        args, kwargs = fx.map_arg((node.args[1:], node.kwargs), numbers.__getitem__)
        does = node.target if callable(node.target) else getattr(Tensor, node.target)
        parts = [term.views(lambda x: does(x, *args, **kwargs)) for term in of]
        several = [*zip(*parts, strict=True)]
        return several[0] if node in self.values.shapes else several

    def _sum(self, node: fx.Node) -> Laid | None:
        a, b = (self.terms(arg) for arg in node.args)
        if a is None or b is None or any(x.index.shape != a[0].index.shape for x in b):
            return None
        return a + (tuple(replace(x, sign=-x.sign) for x in b) if calls(node, DIFFERENCES) else b)

    def _product(self, node: fx.Node) -> Laid | None:
        """By numbers from outside."""
        for x, by in (node.args, node.args[::-1]):
            terms, factor = self.terms(x), self._outside(by)
            if terms is None or factor is None or any(term.factor for term in terms):
                continue
            base, index, sign = factor[0].root, factor[0].index, factor[0].sign
            shape = terms[0].index.shape
            index, sign = index.expand(shape), sign.expand(shape)
            return tuple(replace(term, factor=base, at=index, sign=term.sign * sign) for term in terms)
        return None

    def _outside(self, node: Any) -> Laid | None:
        """One term of something that is no view: so that views of it in every layer are of one thing."""
        if not isinstance(node, fx.Node) or self.terms(node) is not None or node not in self.values.shapes:
            return None
        if node not in self.outer:
            found: Laid | None = None
            if calls(node, VIEWS | REPEATS | CASTS | NEGATIVES) and isinstance(node.args[0], fx.Node):
                found = self._outside(node.args[0])
                if found is not None and calls(node, NEGATIVES):
                    found = (replace(found[0], sign=-found[0].sign),)
                elif found is not None:
                    viewed = self._view(node, found)
                    found = viewed if isinstance(viewed, tuple) else None
            self.outer[node] = found or (_term(self.same(node), count(*self.values.shapes[node])),)
        return self.outer[node]

    def _joined(self, node: fx.Node) -> Laid | None:
        """Parts side by side; terms with equal factors go together."""
        parts = [self.terms(part) for part in node.args[0]]  # type: ignore[union-attr]
        if not parts or any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        if len({term.root for part in known for term in part}) != 1:
            return None
        named = dict.fromkeys(term.factor for part in known for term in part if term.factor)
        factors: list[fx.Node | None] = [*named] or [None]
        slots = [slot for part in known if (slot := _slots(part, factors))]
        if len(slots) < len(known) or not callable(node.target):
            return None
        does = partial(node.target, **node.kwargs)
        columns = [[slot[i] for slot in slots] for i in range(len(factors))]
        return tuple(
            Term(
                known[0][0].root,
                does([term.index for term in terms], *node.args[1:]),
                does([term.sign for term in terms], *node.args[1:]),
                factor,
                does([term.at for term in terms], *node.args[1:]),
            )
            for factor, terms in zip(factors, columns, strict=True)
        )


def _slots(part: Laid, factors: list[fx.Node | None]) -> Laid | None:
    """A term for each factor: what has none goes with the first that is missing, the others are 0."""
    by = {term.factor: term for term in part}
    if len(by) < len(part):
        return None
    bare, found = by.pop(None, None), list[Term]()
    for factor in factors:
        term = by.get(factor)
        if term is None and bare is not None:
            term, bare = bare, None
        found.append(term or replace(part[0], sign=part[0].sign * 0, at=torch.full_like(part[0].at, -1)))
    return None if bare is not None else tuple(found)


def _term(node: fx.Node, lie: Tensor) -> Term:
    ones = torch.ones((), dtype=torch.int8, device="cpu").expand(lie.shape)
    return Term(node, lie, ones, None, torch.full((), -1, device="cpu").expand(lie.shape))


def place_of(begins: Tensor) -> Place | None:
    """Of the first features [H] of heads; None: they lie otherwise."""
    h = len(begins)
    group = int((begins == begins[0]).sum())
    if h % group:
        return None
    apart = int(begins[-1] - begins[0]) // max(1, h // group - 1)
    expected = begins[0] + count(h) // group * apart
    return Place(int(begins[0]), apart, group) if apart >= 0 and torch.equal(begins, expected) else None


def place(lie: Tensor, features: int) -> Place | None:
    """Of heads [B, H, T, D]; None: they lie otherwise."""
    if lie.dim() != 4 or not lie.numel():
        return None
    b, _, t, d = lie.shape
    begins = lie[0, :, 0, 0]
    expected = count(b, 1, t, 1) * features + begins[:, None, None] + count(d)
    return place_of(begins) if torch.equal(lie, expected) else None


def count(*shape: int) -> Tensor:
    return torch.arange(prod(shape), device="cpu").view(shape)


def in_order(lie: Tensor) -> bool:
    return torch.equal(lie.flatten(), count(lie.numel()))
