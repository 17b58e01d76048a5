"""A pruned network as the fastest one with the same outputs on this machine: `convert`.

Compaction first. Then every way to compute a layer is checked against float64 and timed on the example's
activations, once for each layer, device, dtype, library and thread count; the times are kept in the user's
cache folder. The cheapest path through layers that follow each other, changes of layout counted, is raced as
a whole against the original, against the best dense path, and against our kernels everywhere. What torch
does not do densely by itself wins by 3 % or not at all. A model that is more than a chain of layers is a
graph of such chains, and raced as a whole once more.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparselth.masks import by_parameter, unwrapped
from sparselth.sparse.choice import choose
from sparselth.sparse.compaction import fits_chain, is_chain, pruned_parts
from sparselth.sparse.converted import Converted, ConvertedChain
from sparselth.sparse.device import Device
from sparselth.sparse.module import convert_module
from sparselth.sparse.report import Report

if TYPE_CHECKING:
    from sparselth.masks import AnyMasks


def convert(
    model: nn.Module,
    masks: AnyMasks | None,
    example: Any,
    *,
    compact: bool = True,
    kernels: str = "auto",
) -> Converted:
    """The fastest network with the outputs of `model` for inputs like `example`, where these lie.

    example: the one argument of the model, usually a batch [B, ...]; or a tuple of all arguments by position,
    or a dict of all by name. masks: as `masks.by_parameter` has them, None for zeros that lie in the weights.
    The model stays as it is; it and the example are in fp32 on a CPU, or in fp32, bf16 or fp16 on CUDA. Other
    sizes of batches and images are computed right, by what is fastest for the example's. The choice is for
    torch's number of threads now, or on CUDA for its precision of fp32 (TF32 or not). What is pruned is not
    always multiplied: a NaN there may not be seen.

    Hooks, parametrizations and what else acts when the model is called are part of what it computes. Where
    torch.fx cannot trace it, layers are replaced one by one in a copy, and `explain` says so.

    `kernels`: "auto", or "triton" for what CUDA has, on a CPU in Triton's interpreter.
    ValueError: a model in training mode or one that cannot compute the example or cannot be copied; masks
    that do not fit; a device or a dtype that nothing is made for; an example that is not finite.
    """
    model = unwrapped(model)
    with torch.inference_mode(False), torch.no_grad():  # what is made in that mode could not be used outside
        if isinstance(example, Tensor) and is_chain(model) and fits_chain(model, example):
            return _convert_chain(model, masks, example, compact, kernels)
        found = by_parameter(model, masks or {})
        return convert_module(model, found, example, compact=compact, kernels=kernels)


def _convert_chain(
    model: nn.Sequential, masks: AnyMasks | None, example: Tensor, compact: bool, kernels: str
) -> Converted:
    began = time.perf_counter()
    device = Device.of(example, kernels)
    original = pruned_parts(model, masks, example)
    if not bool(example.isfinite().all()):
        raise ValueError("example: expected finite numbers, got NaN or infinity")
    left_out: dict[str, str] = {}
    with torch.cuda.device_of(example):  # type: ignore[no-untyped-call]
        found = choose(original, example, device, left_out, compact)
    report = Report(
        len(example),
        str(device),
        found.layers,
        found.units,
        found.networks,
        found.checks,
        found.chosen,
        time.perf_counter() - began,
        left_out,
    )
    return ConvertedChain(found.plan, report, device)
