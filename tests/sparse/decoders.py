"""Decoders as GPT-2 and as Llama are, in plain torch: for tests and benchmarks of conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, t, width = x.shape
        parts = self.qkv(self.first(x)).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh")), (k, v)


class Decoder(nn.Module):
    """One token behind others, as GPT-2 computes it, its head tied to its embedding."""

    def __init__(self, words: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Any]]:
        x, new = self.words(ids), []
        for block, before in zip(self.blocks, past, strict=True):
            x, here = block(x, before)
            new.append(here)
        return self.head(self.norm(x)), new


def past(depth: int, heads: int, length: int, width: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    shape = batch, heads, length, width // heads
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(depth)]


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Positions [T, D] turn pairs of features that are half a head apart."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Shared(nn.Module):
    """A block as Llama has it: RMS norms, rotary positions, queries that share keys, gated units."""

    def __init__(self, width: int, heads: int, shared: int, hidden: int, normed: bool = False) -> None:
        super().__init__()
        self.heads, self.shared, self.head = heads, shared, width // heads
        self.of_q, self.of_k = (nn.RMSNorm(self.head) if normed else nn.Identity() for _ in range(2))
        self.first, self.second = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, shared * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, positions: Any, past: Any, rotate: Any) -> tuple[Tensor, Any]:
        b, t, width = x.shape
        y = self.first(x)
        q = self.q(y).view(b, t, self.heads, self.head).transpose(1, 2)
        k, v = (f(y).view(b, t, self.shared, self.head).transpose(1, 2) for f in (self.k, self.v))
        q, k = rotate(self.of_q(q), *positions), rotate(self.of_k(k), *positions)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        times = self.heads // self.shared
        keys, values = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), (k, v)


class Llama(nn.Module):
    """One token behind others, or whole sequences where nothing is past."""

    def __init__(
        self,
        words: int,
        width: int,
        depth: int,
        heads: int,
        shared: int,
        hidden: int,
        rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = halves,
        normed: bool = False,
    ) -> None:
        super().__init__()
        self.words, self.rotate = nn.Embedding(words, width), rotate
        self.blocks = nn.ModuleList(Shared(width, heads, shared, hidden, normed) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, words, bias=False)
        d = width // heads
        turns = 10000 ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("turns", torch.cat((turns, turns)))

    def forward(self, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> Any:
        at = 0 if past is None else past[0][0].shape[2]
        angles = (torch.arange(ids.shape[1]) + at)[:, None] * self.turns
        positions, x, new = (angles.cos(), angles.sin()), self.words(ids), []
        for i, block in enumerate(self.blocks):
            x, here = block(x, positions, None if past is None else past[i], self.rotate)
            new.append(here)
        y = self.head(self.norm(x))
        return y if past is None else (y, new)
