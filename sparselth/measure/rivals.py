"""Every way to compute one layer that is measured: dense, torch's sparse formats, our kernels, `convert`.

A rival makes a form of a weight, which takes `conversion_s`, and binds it to a batch: activations lie as it
likes them best, copied there beforehand. `auto` takes and gives rows as torch's layers do, so that its
changes of layout count; it is compared with dense layers that do the same.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth import clock, sparse
from sparselth.kernels import _native
from sparselth.kernels._triton import HAS_TRITON
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d
from sparselth.kernels.block_linear import BlockWeight, block_linear
from sparselth.kernels.csr_infer import PackedCsr, csr_infer
from sparselth.kernels.csr_linear import CsrIndex, bind_csr_linear
from sparselth.kernels.csr_packed import Packed, bind_csr_packed
from sparselth.kernels.slot_linear import Slots, slot_linear
from sparselth.kernels.sparse_conv2d import Conv2dIndex, bind_sparse_conv2d
from sparselth.kernels.sparse_conv2d_rows import PackedConv2d, sparse_conv2d_rows_call
from sparselth.measure.layers import Layer
from sparselth.sparse.formats import columns, image, tensor_bytes

Call = Callable[[], object]
Bound = tuple[Call, Callable[[], Tensor]]  # a call, and a function that calls and gives [B, ...]
DEAD = 0.25  # share of dead inputs from which compaction cuts them out of a single layer
INFER_BATCH = 16  # up to which csr_infer is made for
SLOT_BATCH = 128  # and slot_linear


@dataclass(frozen=True)
class Case:
    """One layer with its mask in the weights, and a batch."""

    layer: Layer
    dtype: str
    device: str
    weight: Tensor  # [N, K] or [N, C, k, k], pruned ones 0
    x: Tensor  # [B, ...]
    block: int | None  # side of the blocks that the mask was drawn in
    dead_inputs: float  # share

    @property
    def linear(self) -> bool:
        return self.layer.size is None

    @property
    def native(self) -> bool:
        """Whether our C kernels take it."""
        return self.device == "cpu" and self.dtype == "fp32" and _native.LIB is not None


@dataclass(frozen=True)
class Form:
    """A weight made ready: bytes with every index, and how it is put to work on a batch [B, ...]."""

    bytes: int
    bind: Callable[[Tensor], Bound]
    takes: str = ""  # what `auto` chose


@dataclass(frozen=True)
class Rival:
    name: str
    kind: str  # "dense", "torch" (its sparse formats), "ours", "auto"
    fits: Callable[[Case], bool]
    make: Callable[[Case], Form]
    rows: bool = False  # takes and gives rows


def rivals() -> list[Rival]:
    """All that this installation has, dense ones first."""
    found = [
        Rival("dense eager", "dense", lambda c: True, _eager, rows=True),
        Rival("dense columns", "dense", lambda c: c.linear and c.device == "cpu", _columns),
        Rival("channels-last", "dense", lambda c: not c.linear, _channels_last),
        Rival("CSR", "torch", _has_csr, _csr),
        Rival("BSR", "torch", lambda c: c.linear and c.block is not None and _has_csr(c), _bsr),
        Rival("2:4 + residual", "torch", _has_two_four, _two_four),
        Rival("csr_linear", "ours", lambda c: c.linear and c.native, _csr_linear),
        Rival("csr_packed", "ours", lambda c: c.linear and c.native, _csr_packed),
        Rival("csr_infer", "ours", _has_csr_infer, _csr_infer),
        Rival("slot_linear", "ours", _has_slots, _slot_linear),
        Rival("block_linear", "ours", lambda c: c.linear and c.block is not None, _block_linear),
        Rival("block_conv2d", "ours", lambda c: not c.linear and c.block is not None, _block_conv2d),
        Rival("sparse_conv2d", "ours", _has_sparse_conv2d, _sparse_conv2d),
        Rival("sparse_conv2d_rows", "ours", _has_sparse_conv2d, _sparse_conv2d_rows, rows=True),
        Rival("compaction", "ours", lambda c: c.dead_inputs >= DEAD and _converts(c), _compaction),
        Rival("auto", "auto", _converts, _auto, rows=True),
    ]
    if can_compile():
        found.insert(1, Rival("dense compiled", "dense", lambda c: True, _compiled, rows=True))
    return found


def can_compile() -> bool:
    """torch.compile makes C++ on a CPU."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def quiet_compiler() -> None:
    """No warning of torch.compile's that this machine has no GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def product(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's own for this layer."""
    if case.linear:
        return F.linear
    layer = case.layer
    return partial(_conv2d, stride=layer.stride, padding=layer.padding)


def _conv2d(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, w, None, stride, padding)


def _bound(run: Callable[..., Tensor], *arguments: Any) -> Bound:
    return partial(run, *arguments), partial(run, *arguments)


def _eager(case: Case) -> Form:
    module = _module(case)  # as it is called in a network
    return Form(tensor_bytes([case.weight]), lambda x: _bound(module, x.clone()))


def _compiled(case: Case) -> Form:
    quiet_compiler()
    importlib.import_module("torch._dynamo").reset()  # else a limit of shapes, behind which it is eager
    run, w = torch.compile(product(case), dynamic=False), case.weight
    with torch.no_grad():
        run(case.x, w)  # compiles
    return Form(tensor_bytes([w]), lambda x: _bound(run, x.clone(), w))


def _channels_last(case: Case) -> Form:
    run, w = product(case), case.weight.contiguous(memory_format=torch.channels_last)
    return Form(tensor_bytes([w]), lambda x: _bound(run, x.clone(memory_format=torch.channels_last), w))


def _columns(case: Case) -> Form:
    w = case.weight

    def bind(x: Tensor) -> Bound:
        turned, y = _turned(case, x)
        return _filling(partial(torch.mm, w, turned, out=y), y)

    return Form(tensor_bytes([w]), bind)


def _turned(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """x features-major, and room for y."""
    n, k = case.layer.matrix
    turned = columns(k, len(x))[:, : len(x)] if x.is_cpu else x.new_empty(k, len(x))
    y = columns(n, len(x))[:, : len(x)] if x.is_cpu else x.new_empty(n, len(x))
    turned, y = turned.to(x.dtype), y.to(x.dtype)
    turned.copy_(x.t())
    return turned, y


def _filling(call: Call, y: Tensor) -> Bound:
    def result() -> Tensor:
        call()
        return y.t()

    return call, result


def _has_csr(case: Case) -> bool:
    return case.linear and (case.device == "cuda" or case.dtype == "fp32")


def _csr(case: Case) -> Form:
    w = _compressed(case.weight, None)

    def bind(x: Tensor) -> Bound:
        turned = x.t().contiguous()
        return partial(torch.mm, w, turned), lambda: (w @ turned).t()

    return Form(tensor_bytes([w.crow_indices(), w.col_indices(), w.values()]), bind)


def _compressed(weight: Tensor, block: int | None) -> Tensor:
    """torch CSR or BSR with 32-bit indices, as MKL and cuSPARSE take them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse ((CSR|BSR) tensor support|invariant checks)")
        if block is None:
            w = weight.to_sparse_csr()
            make = torch.sparse_csr_tensor
        else:
            n, k = (-(-size // block) * block for size in weight.shape)
            padded = F.pad(weight, (0, k - weight.shape[1], 0, n - weight.shape[0]))
            w, make = padded.to_sparse_bsr((block, block)), torch.sparse_bsr_tensor
        starts, places = w.crow_indices().int(), w.col_indices().int()
        return make(starts, places, w.values(), w.shape, check_invariants=False)


def _bsr(case: Case) -> Form:
    w = _compressed(case.weight, case.block)
    n, k = case.layer.matrix

    def bind(x: Tensor) -> Bound:
        turned = F.pad(x, (0, w.shape[1] - k)).t().contiguous()
        run = partial(_tuned_bsr(w, turned) if case.device == "cuda" else torch.mm, w, turned)
        return run, lambda: run()[:n].t()

    return Form(tensor_bytes([w.crow_indices(), w.col_indices(), w.values()]), bind)


def _tuned_bsr(w: Tensor, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's BSR product with the launch parameters that are fastest here."""
    product = importlib.import_module("torch.sparse._triton_ops").bsr_dense_addmm
    out = x.new_zeros(w.shape[0], x.shape[1])
    best, fastest = None, float("inf")
    for stages, warps, splits, group in itertools.product((1, 2, 4), (4, 8), (1, 2, 8), (1, 4)):
        if x.shape[1] % splits or x.shape[1] // splits < 16:
            continue
        meta = {"num_stages": stages, "num_warps": warps, "SPLIT_N": splits, "GROUP_SIZE_ROW": group}
        run = partial(product, out, beta=0, meta=meta)
        try:
            run(w, x)
            sample = clock.warm(partial(run, w, x))
            taken = min(sample() for _ in range(5))
        except Exception:  # a combination that this device has too little shared memory for
            continue
        if taken < fastest:
            best, fastest = run, taken
    return best or partial(product, out, beta=0)


def _has_two_four(case: Case) -> bool:
    n, k = case.layer.matrix
    return case.linear and case.device == "cuda" and case.dtype in ("bf16", "fp16") and n % 32 == k % 64 == 0


def _two_four(case: Case) -> Form:
    """The two largest of every four as semi-structured weights, the rest as CSR."""
    fours = case.weight.view(-1, 4)
    first = torch.zeros_like(fours).scatter(1, fours.abs().topk(2, 1).indices, 1).mul(fours)
    kept = first.view_as(case.weight)
    w = torch.sparse.to_sparse_semi_structured(kept)
    rest = _compressed(case.weight - kept, None)
    parts = [rest.crow_indices(), rest.col_indices(), rest.values()] if rest.values().numel() else []

    def run(x: Tensor) -> Tensor:
        y = F.linear(x, w)
        return y + (rest @ x.t()).t() if parts else y

    n, k = case.layer.matrix
    two_four = n * k // 2 * case.weight.element_size() + n * k // 8  # values, and 2 bits for each of them
    return Form(two_four + tensor_bytes(parts), lambda x: _bound(run, x.clone()))


def _csr_linear(case: Case) -> Form:
    index = CsrIndex.of(case.weight != 0, backward=False)
    values = index.gather(case.weight)

    def bind(x: Tensor) -> Bound:
        turned, y = _turned(case, x)
        return _filling(bind_csr_linear(index, values, turned, None, y), y)

    return Form(tensor_bytes([values]) + index.bytes(), bind)


def _csr_packed(case: Case) -> Form:
    packed = Packed.of(case.weight, len(case.x))

    def bind(x: Tensor) -> Bound:
        turned, y = _turned(case, x)
        return _filling(bind_csr_packed(packed, turned, None, y), y)

    return Form(packed.bytes(), bind)


def _on_triton(case: Case) -> bool:
    return case.linear and case.device == "cuda" and HAS_TRITON


def _has_csr_infer(case: Case) -> bool:
    return _on_triton(case) and len(case.x) <= INFER_BATCH


def _csr_infer(case: Case) -> Form:
    packed = PackedCsr.from_dense(case.weight, case.weight != 0)

    def bind(x: Tensor) -> Bound:
        turned = x.t().contiguous()
        return partial(csr_infer, packed, turned), lambda: csr_infer(packed, turned).t()

    return Form(tensor_bytes(packed.arrays()), bind)


def _has_slots(case: Case) -> bool:
    return _on_triton(case) and case.dtype in ("bf16", "fp16") and len(case.x) <= SLOT_BATCH


def _slot_linear(case: Case) -> Form:
    slots = Slots.from_dense(case.weight)
    return Form(slots.bytes(), lambda x: _bound(slot_linear, slots, x.clone()))


def _block_linear(case: Case) -> Form:
    assert case.block
    weight = BlockWeight.from_dense(case.weight, block=case.block)
    return Form(weight.bytes(), lambda x: _bound(block_linear, x.clone(), weight))


def _block_conv2d(case: Case) -> Form:
    assert case.block
    weight, layer = BlockFilters.from_dense(case.weight, block=case.block), case.layer
    where = weight, None, layer.stride, layer.padding
    return Form(
        weight.bytes(),
        lambda x: _bound(block_conv2d, x.clone(memory_format=torch.channels_last), *where),
    )


def _has_sparse_conv2d(case: Case) -> bool:
    return not case.linear and case.native and case.layer.shape[2] == case.layer.shape[3]


def _sparse_conv2d(case: Case) -> Form:
    layer = case.layer
    assert layer.size
    index = Conv2dIndex.of(case.weight != 0, layer.size, layer.stride, layer.padding, backward=False)
    values = index.gather(case.weight)

    def bind(x: Tensor) -> Bound:
        turned, y = (
            image(columns(shape[0] * shape[1] * shape[2], len(x)), shape, len(x))
            for shape in (layer.inputs, layer.outputs)
        )
        turned.copy_(x.permute(1, 2, 3, 0))
        call = bind_sparse_conv2d(index, values, turned, None, y)

        def result() -> Tensor:
            call()
            return y.permute(3, 0, 1, 2)

        return call, result

    return Form(tensor_bytes([values]) + index.bytes(), bind)


def _sparse_conv2d_rows(case: Case) -> Form:
    layer = case.layer
    assert layer.size
    packed = PackedConv2d.of(case.weight, layer.size, layer.stride, layer.padding, len(case.x))
    return Form(packed.bytes(), lambda x: _bound(sparse_conv2d_rows_call(packed), x.clone()))


def _module(case: Case) -> nn.Sequential:
    layer = case.layer
    module: nn.Module
    if case.linear:
        module = nn.Linear(layer.shape[1], layer.shape[0], bias=False, device="meta")
    else:
        n, c, down, across = layer.shape
        module = nn.Conv2d(c, n, (down, across), layer.stride, layer.padding, bias=False, device="meta")
    module.weight = nn.Parameter(case.weight, requires_grad=False)
    return nn.Sequential(module).eval()


def _converts(case: Case) -> bool:
    return case.device == "cuda" or case.dtype == "fp32"


def _compaction(case: Case) -> Form:
    model = sparse.compact(_module(case), None, case.x).model
    return Form(tensor_bytes([*model.parameters(), *model.buffers()]), lambda x: _bound(model, x.clone()))


def _auto(case: Case) -> Form:
    converted = sparse.convert(_module(case), None, case.x)
    takes = converted.report.layers[0].chosen
    return Form(sparse.weight_bytes(converted), lambda x: _bound(converted, x.clone()), takes)
