"""Multi-head attention whose projections are layers of their own, so that each can take a form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.sparse.compaction import is_hooked


class Attention(nn.Module):
    """What an nn.MultiheadAttention computes at inference, with the same arguments."""

    def __init__(self, like: nn.MultiheadAttention, own: bool, batched: bool) -> None:
        """`own`: whether queries, keys and values are one tensor when it is called; `batched`: [B, T, E]."""
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = like.embed_dim, like.num_heads, like.batch_first
        self.head_dim, self.in_proj_bias = like.head_dim, like.in_proj_bias
        self._qkv_same_embed_dim, self.batched = like._qkv_same_embed_dim, batched
        weight, bias = like.in_proj_weight, like.in_proj_bias
        self.one = _linear(weight, bias) if own and weight is not None else None  # for all three
        if self.one is None:
            weights = weight.chunk(3) if weight is not None else _apart(like)
            biases: Any = [None] * 3 if bias is None else bias.chunk(3)
            self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out = _linear(like.out_proj.weight, like.out_proj.bias)
        self.eval()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: (outputs, weights of the attention or None)."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected one where is_causal is set")
        if self.one is None:
            q, k, v = self.q(query), self.k(key), self.v(value)
        elif query is key and key is value:
            q, k, v = self.one(query).chunk(3, -1)
        else:  # never seen so: right, if slow
            q, k, v = (self.one(t).chunk(3, -1)[i] for i, t in enumerate((query, key, value)))
        alone = q.dim() == 2  # no batch
        axis = 0 if alone or self.batch_first else 1
        q, k, v = (self._heads(t.unsqueeze(0) if alone else t.movedim(axis, 0)) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if alone else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        y = y.transpose(1, 2).flatten(2)
        return self.out(y[0] if alone else y.movedim(0, axis)), weights

    def opens(
        self,
        query: object,
        key: object,
        value: object,
        key_padding_mask: object = None,
        need_weights: object = True,
        attn_mask: object = None,
        average_attn_weights: object = True,
        is_causal: object = False,
    ) -> bool:
        """Whether a call with these is one of `opened`."""
        own = self.one is not None and query is key and key is value
        plain = (
            key_padding_mask is None and attn_mask is None and need_weights is False and is_causal is False
        )
        return own and plain and self.batched and self.batch_first

    def opened(self, query: Tensor, *others: object, **more: object) -> tuple[Tensor, None]:
        """`forward` of one tensor [B, T, E] without masks and weights, where torch.fx sees each layer."""
        assert self.one is not None
        q, k, v = self.one(query).chunk(3, -1)
        y = F.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v))
        return self.out(y.transpose(1, 2).flatten(2)), None

    def _heads(self, t: Tensor) -> Tensor:
        """[B, T, E] as [B, heads, T, E / heads]."""
        heads: Tensor = t.unflatten(-1, (self.num_heads, self.head_dim))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores [B, heads, T, S]."""
        found = None
        if attn_mask is not None:
            found = _added(attn_mask, q.dtype)
            if found.dim() == 3:
                found = found.view(-1, self.num_heads, *found.shape[1:])
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype)
            padding = padding.view(1 if padding.dim() == 1 else len(padding), 1, 1, -1)
            found = padding if found is None else found + padding
        return found


def split_attention(model: nn.Module, call: Callable[[], object]) -> nn.Module:
    """The model with an Attention for every nn.MultiheadAttention that `call` calls and it can stand for."""
    own, batched = dict[nn.Module, bool](), dict[nn.Module, bool]()

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = "query", "key", "value"
        given = dict(zip(names, args, strict=False)) | kwargs
        own[module] = own.get(module, True) and given["query"] is given["key"] is given["value"]
        batched[module] = batched.get(module, True) and given["query"].dim() == 3

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # or torch reads the weights past the layers
    plain = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and _is_plain(m)]
    hooks = [module.register_forward_pre_hook(seen, with_kwargs=True) for module in plain]
    call()
    for hook in hooks:
        hook.remove()
    found = {m: Attention(m, own[m], batched[m]) for m in plain if m in own}
    for module in [*model.modules()]:
        for name, child in module._modules.items():
            if child in found:
                module._modules[name] = found[child]
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return found.get(model, model)  # type: ignore[call-overload,no-any-return]


def _is_plain(module: nn.MultiheadAttention) -> bool:
    return (
        type(module).forward is nn.MultiheadAttention.forward
        and not is_hooked(module)
        and module.bias_k is None
        and not module.add_zero_attn
    )


def _apart(like: nn.MultiheadAttention) -> list[Tensor]:
    assert like.q_proj_weight is not None
    assert like.k_proj_weight is not None
    assert like.v_proj_weight is not None
    return [like.q_proj_weight, like.k_proj_weight, like.v_proj_weight]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
