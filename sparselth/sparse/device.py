"""What depends on where a network runs: the forms of a layer, how they are timed, and on what times depend.

On a CPU the forms are those of `formats`, in fp32, their times warm. On CUDA they are torch's own and our
Triton kernels, in fp32, bf16 or fp16; the times of layers are taken with cold caches, those of networks in
calls in a row, both of CUDA graphs where that can be. kernels="triton" asks for the forms of CUDA on a CPU,
too, where Triton's interpreter computes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparselth import clock
from sparselth.kernels import _native
from sparselth.kernels._choose import use_triton
from sparselth.kernels._graphs import capture, warm_up
from sparselth.kernels.csr_infer import PackedCsr, csr_infer
from sparselth.kernels.slot_linear import WIDEST, Slots, slot_linear
from sparselth.kernels.two_four_linear import CAPABILITY, COLUMNS, ROWS, TwoFour, two_four_linear
from sparselth.machine import cpu_name, version
from sparselth.sparse.formats import (
    OURS_CPU,
    OURS_GPU,
    Format,
    Rows,
    Stage,
    blocks,
    dense,
    formats,
    tensor_bytes,
)
from sparselth.sparse.network import bound

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INFER_BATCH, SLOT_BATCH = 16, 128  # up to which csr_infer and slot_linear are made for
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
    def ours(self) -> tuple[str, tuple[str, ...]]:
        """What a network of our kernels wherever there is one is called, and the names of their forms."""
        if self.on_gpus:
            return "triton", OURS_GPU
        return "native", OURS_CPU

    def __str__(self) -> str:
        """For people."""
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

    def rounding(self, module: nn.Module) -> float:
        """About the error of one rounding, relative; in TF32 of a product, whose operands are cut off."""
        if self.dtype == torch.float32 and self.on_gpus and _tf32(type(module)):
            return 2**-10
        return torch.finfo(self.dtype).eps / 4

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

    def formats(self, stage: Stage, x: Tensor, left_out: dict[str, str]) -> list[Format]:
        """All ways to compute a stage on batches like x, plain torch first.

        On CUDA what this device or this torch cannot do is `left_out`, and why: candidate -> reason.
        """
        if not self.on_gpus:
            return formats(stage, len(x))
        found: list[Format] = []
        for name, make in _gpu_forms(stage, len(x), self).items():
            try:
                made = make()
                for form in made:
                    self._try(form, x)
                found += made
            except Exception as error:  # no such library, too little shared memory, a compiler's error
                if name == "dense":
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                left_out[f"{stage.place.name} {name}"] = reason
        return found

    def _try(self, form: Rows, x: Tensor) -> None:
        """Raises where this form cannot run, or a CUDA graph cannot hold it."""
        _, run = bound(form, x)
        y = run()
        if not self.cuda or self.is_free(y, x):
            return
        warm_up(run)
        capture(run)


def _tf32(kind: type[nn.Module]) -> bool:
    backends = {nn.Linear: torch.backends.cuda.matmul, nn.Conv2d: torch.backends.cudnn.conv}  # type: ignore[attr-defined]
    return kind in backends and backends[kind].fp32_precision == "tf32"


def _gpu_forms(stage: Stage, batch: int, device: Device) -> dict[str, Callable[[], list[Rows]]]:
    """What is tried: name -> how to make it."""
    kernels, module = device.kernels, stage.whole
    found: dict[str, Callable[[], list[Rows]]] = {"dense": partial(dense, stage)}
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return found
    triton = use_triton(kernels, module.weight)
    if triton:
        found["block_linear" if isinstance(module, nn.Linear) else "block_conv2d"] = partial(
            blocks, stage, kernels
        )
    if isinstance(module, nn.Conv2d):
        return found
    (n, k), half = module.weight.shape, device.dtype != torch.float32
    if triton and batch <= INFER_BATCH:
        found["csr_infer"] = partial(_csr_infer, stage, module, kernels)
    if triton and half and batch <= SLOT_BATCH and k <= WIDEST:
        found["slot_linear"] = partial(_slot_linear, stage, module, kernels)
    able = not device.cuda or torch.cuda.get_device_capability(device.at) >= CAPABILITY
    if half and able and n % ROWS == k % COLUMNS == 0:
        found["two_four_linear"] = partial(_two_four_linear, stage, module)
    return found


def _csr_infer(stage: Stage, module: nn.Linear, kernels: str) -> list[Rows]:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    packed = PackedCsr.from_dense(module.weight, module.weight != 0)

    def run(x: Tensor) -> Tensor:
        return csr_infer(packed, x.t(), bias, relu, kernels).t()

    size = tensor_bytes([bias, *packed.arrays()])
    return [Rows("csr_infer", stage.place, "turned", run, size, time.perf_counter() - began)]


def _slot_linear(stage: Stage, module: nn.Linear, kernels: str) -> list[Rows]:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    slots = Slots.from_dense(module.weight.detach())

    def run(x: Tensor) -> Tensor:
        return slot_linear(slots, x, bias, relu, kernels)

    size = tensor_bytes([bias]) + slots.bytes()
    return [Rows("slot_linear", stage.place, "rows", run, size, time.perf_counter() - began)]


def _two_four_linear(stage: Stage, module: nn.Linear) -> list[Rows]:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    weight = TwoFour.from_dense(module.weight.detach())

    def run(x: Tensor) -> Tensor:
        return two_four_linear(weight, x, bias, relu).contiguous()

    size = tensor_bytes([bias]) + weight.bytes()
    return [Rows("two_four_linear", stage.place, "rows", run, size, time.perf_counter() - began)]
