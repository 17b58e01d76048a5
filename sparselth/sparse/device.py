"""What depends on where a network runs: which forms there are, how they are timed, and on what times depend.

On a CPU a network is in fp32 and its times are warm. On CUDA it is in fp32, bf16 or fp16; the times of layers
are taken with cold caches, those of networks in calls in a row, both of CUDA graphs where that can be.
kernels="triton" asks for the forms of CUDA on a CPU, too, where Triton's interpreter computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparselth import clock
from sparselth.kernels import _native
from sparselth.kernels._choose import use_triton
from sparselth.machine import cpu_name, version

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Clock = Callable[[clock.Call], clock.Sample]


@dataclass(frozen=True)
class Device:
    """Where a network runs, and in which numbers."""

    at: torch.device
    dtype: torch.dtype
    kernels: str  # "auto" or "triton", as our ops have it

    @staticmethod
    def of(example: Tensor, kernels: str = "auto") -> Device:
        """The example's; ValueError where nothing can be converted for it."""
        if kernels not in ("auto", "triton"):
            raise ValueError(f'kernels: expected "auto" or "triton", got {kernels!r}')
        use_triton(kernels, example)  # or an error
        if kernels == "auto" and example.is_cpu and example.dtype != torch.float32:
            raise ValueError(
                f"example: expected a batch in fp32 on a CPU, got {example.dtype}; bf16 and fp16 are for CUDA"
            )
        return Device(example.device, example.dtype, kernels)

    @property
    def cuda(self) -> bool:
        return self.at.type == "cuda"

    @property
    def on_gpus(self) -> bool:
        """Whether the forms are those of CUDA."""
        return self.cuda or self.kernels == "triton"

    @property
    def ours(self) -> str:
        """What a network of our kernels wherever there is one is called."""
        return "triton" if self.on_gpus else "native"

    def __str__(self) -> str:
        """As `explain` says it, and on what times depend."""
        if not self.on_gpus:
            return f"threads {torch.get_num_threads()}"
        name = torch.cuda.get_device_name(self.at) if self.cuda else f"Triton's interpreter on {cpu_name()}"
        return f"{name}, {self.numbers}"

    @property
    def numbers(self) -> str:
        """The dtype, and how precisely fp32 is multiplied."""
        if self.dtype != torch.float32 or not self.on_gpus:
            return DTYPES[self.dtype]
        linear, conv = ("tf32" if _tf32(kind) else "ieee" for kind in (nn.Linear, nn.Conv2d))
        return f"fp32, products {linear}, convolutions {conv}"

    def precision(self, module: nn.Module) -> str:
        """In what torch multiplies for this layer, as `check` has it: fp32 on CUDA may be TF32."""
        if self.dtype == torch.float32 and self.on_gpus and _tf32(type(module)):
            return "tf32"
        return DTYPES[self.dtype]

    @property
    def key(self) -> str:
        """What times depend on beside the layer, the batch and torch."""
        if self.on_gpus:
            return f"{self}, Triton {version('triton')}"
        level = _native.LEVEL or "no native kernels"
        return f"{torch.get_num_threads()} threads, {cpu_name()}, {level}"

    def layer_clock(self) -> Clock:
        return partial(clock.cold, scratch=clock.scratch()) if self.cuda else clock.warm_wall

    def network_clock(self) -> Clock:
        return clock.warm if self.cuda else clock.warm_wall

    def is_free(self, y: Tensor, x: Tensor) -> bool:
        """Whether y is a view of x: a CUDA graph of nothing is none, and there is nothing to time."""
        return self.on_gpus and y.data_ptr() == x.data_ptr()


def _tf32(kind: type[nn.Module]) -> bool:
    backends = {nn.Linear: torch.backends.cuda.matmul, nn.Conv2d: torch.backends.cudnn.conv}  # type: ignore[attr-defined]
    return kind in backends and backends[kind].fp32_precision == "tf32"
