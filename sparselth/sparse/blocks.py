"""A transformer's blocks as one program: what `tokens` joins, and the attention between.

Where a graph goes from one group of joined tokens to the next through attention alone, heads cut out of what
they give, all of it becomes one list of calls, and heads are places in memory: tokens stay features-major
from the first block to the last. So it is for the tokens of sequences that attend to each other, and for a
decoder's one new token, whose keys and values are put behind those of the past; with rotary positions, and
where several queries share keys and values, too. Tokens of other shapes than the example's go the way of the
graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparselth.kernels.rotary import bind_rotary
from sparselth.kernels.self_attention import bind_self_attention
from sparselth.kernels.token_attention import TokenAttention, follows
from sparselth.sparse.heads import Place, Turn
from sparselth.sparse.network import InColumns
from sparselth.sparse.parts import InParts
from sparselth.sparse.tokens import JoinedTokens, Part, Program, Step, bind_norm

NOWHERE = Place(0, 0)
Result = tuple[int, tuple[int, ...] | None]  # see JoinedBlocks


@dataclass(frozen=True)
class Attention(Step):
    """Of queries, keys and values in three values, among the tokens of each sequence.

    `past`: of one token, whose keys and values stand behind those of a pair of what is past.
    """

    heads: int = 1
    shared: int = 1  # heads of the keys and values
    width: int = 1  # of a head
    places: tuple[Place, ...] = ()  # of q, k, v
    scale: float | None = None
    tokens: int = 1  # of a sequence
    causal: bool = False
    past: bool = False


@dataclass(frozen=True)
class Rotary(Step):
    """Heads of the first value by the two others; the result has them side by side."""

    turn: Turn | None = None


@dataclass(frozen=True)
class HeadNorm(Step):
    """Each head of a value by the same norm; the result has them side by side."""

    place: Place = NOWHERE
    heads: int = 1


class JoinedBlocks(JoinedTokens):
    """Steps on tokens, with attention among them.

    It takes tokens of the shapes `given`, then the past keys and values of each attention that has a past,
    then what `apart` reads besides: the graph that it stands for, with the same results. `order` says which:
    (value, its axes before the features), or (i, None) for keys (i even) and values of pair i // 2.
    """

    in_parts = False  # whether each sequence goes through all steps by itself

    def __init__(
        self,
        apart: fx.GraphModule,
        parts: list[Part],
        steps: list[Step],
        given: list[tuple[int, ...]],
        order: list[Result],
    ) -> None:
        nn.Module.__init__(self)
        self.apart, self.steps, self.given = apart, steps, given
        self.widths = [shape[-1] for shape in given]
        self.parts = parts  # type: ignore[assignment]  # whose modules `apart` has
        self.order, self.outputs = order, [value for value, axes in order if axes is not None]
        self.turned: list[int] = []
        self.attentions = [step for step in steps if isinstance(step, Attention)]
        self.behind = [step for step in self.attentions if step.past]
        self._link()
        self.eval()

    def _link(self) -> None:
        super()._link()
        make = partial(BlocksProgram, self)
        self.run = InParts(make, self.attentions[0].tokens, _together) if self.in_parts else InColumns(make)

    def take_parts(self) -> bool:
        """From now on each sequence goes through all steps by itself, as `sparse.parts` has it.

        False where there is but one, or sequences of several lengths.
        """
        tokens, lengths = prod(self.given[0][:-1]), {step.tokens for step in self.attentions}
        parted = len(lengths) == 1 and tokens > self.attentions[0].tokens
        self.in_parts = parted
        self._link()
        return parted

    def forward(self, *xs: Tensor) -> Any:
        n = len(self.given)
        tokens, past = xs[:n], xs[n : n + 2 * len(self.behind)]
        if not all(
            x.shape == shape and x.dtype == torch.float32 and x.is_cpu
            for x, shape in zip(tokens, self.given, strict=True)
        ):
            return self.apart(*xs)
        pairs = [*zip(past[::2], past[1::2], strict=True)]
        for step, (keys, values) in zip(self.behind, pairs, strict=True):
            if not follows((1, step.shared, 1, step.width), keys, values):
                return self.apart(*xs)
        if self._changed():
            self._link()
        rows = [x.reshape(-1, width) for x, width in zip(tokens, self.widths, strict=True)]
        found, new = self.run(*rows, *past)
        ready = iter(found)
        return [new[i] if axes is None else next(ready).view(*axes, -1) for i, axes in self.order]


def _together(parts: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The results of several programs one behind the other."""
    return [torch.cat(ys) for ys in zip(*(found for found, _ in parts), strict=True)], []


class BlocksProgram(Program):
    """The steps bound to rooms; what is past is given to each run."""

    def __init__(self, of: JoinedBlocks, tokens: int) -> None:
        self.bound: list[TokenAttention] = []
        self.new: list[Tensor] = []
        super().__init__(of, tokens)

    def _made(self, step: Step, xs: list[Tensor]) -> Tensor:
        if isinstance(step, Rotary):
            return self._turned(step, *xs)
        if isinstance(step, HeadNorm):
            return self._normed(step, *xs)
        if not isinstance(step, Attention):
            return super()._made(step, xs)
        h, d = step.heads, step.width
        room = self._take(h * d)
        each = h, step.shared, step.shared
        if step.past:
            q, k, v = (
                x.as_strided((1, heads, 1, d), (len(x), at.apart, d, 1), at.first)
                for x, heads, at in zip(xs, each, step.places, strict=True)
            )
            self.bound.append(TokenAttention(q, k, v, room.view(1, 1, h, d).transpose(1, 2), step.scale))
            self.calls.append(self.bound[-1].run)
            return room
        q, k, v, y = (
            self._heads(x, heads, d, at)
            for x, heads, at in zip([*xs, room], [*each, h], [*step.places, Place(0, d)], strict=True)
        )
        self.calls.append(bind_self_attention(q, k, v, y, step.tokens, step.scale, step.causal))
        return room

    def _turned(self, step: Rotary, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        of = step.turn
        assert of is not None
        d = len(of.first)
        room = self._take(of.heads * d)
        at, to = self._heads(x, of.heads, d, of.place), self._heads(room, of.heads, d, Place(0, d))
        first, second = (torch.tensor(f, dtype=torch.int32, device="cpu") for f in (of.first, of.second))
        self.calls.append(bind_rotary(at, first, second, self._view(a), self._view(b), to))
        return room

    def _normed(self, step: HeadNorm, x: Tensor) -> Tensor:
        assert step.part is not None
        part: Any = self.parts[step.part]
        d = int(part.normalized_shape[0])
        room = self._take(step.heads * d)
        at, to = self._heads(x, step.heads, d, step.place), self._heads(room, step.heads, d, Place(0, d))
        self.calls += [bind_norm(part, one, y) for one, y in zip(at, to, strict=True)]
        return room

    def _heads(self, x: Tensor, heads: int, width: int, at: Place) -> Tensor:
        row = x.stride(0)
        return x.as_strided((heads, width, self.tokens), (at.apart * row, row, 1), at.first * row)

    def fill(self, *xs: Tensor) -> None:
        past = xs[len(self.given) :]
        super().fill(*xs[: len(self.given)])
        pairs = zip(self.bound, past[::2], past[1::2], strict=True)
        self.new = [new for attention, keys, values in pairs for new in attention.follow(keys, values)]

    def result(self) -> Any:
        """Values, and keys and values of each attention in turn."""
        new, self.new = self.new, []
        for attention in self.bound:
            attention.leave()
        return super().result(), new
