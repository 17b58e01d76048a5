"""A decoder as GPT-2 is one, in plain torch: for tests and benchmarks of conversion."""

from __future__ import annotations

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
