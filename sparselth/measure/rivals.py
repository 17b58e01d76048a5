"""Every way to compute one layer that is measured: dense, torch's sparse formats, our kernels, `convert`.

Most are the forms of `sparse.forms`; here are the rivals that a user would call instead of us. A rival makes
a weight ready, which takes `conversion_s`, and binds it to a batch: activations lie as it likes them best,
copied there beforehand. `auto` takes and gives rows as torch's layers do, so that its changes of layout
count; beside its speed-up over dense at its best, as every row has it, stands that over dense layers that do
the same.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth import clock, sparse
from sparselth.kernels import _native
from sparselth.kernels.seed_conv2d import seed_conv2d
from sparselth.kernels.seed_linear import LUT_BATCH, SeedWeight, bind_seed_linear, seed_linear
from sparselth.measure.layers import Layer
from sparselth.sparse.compaction import Part
from sparselth.sparse.device import Device
from sparselth.sparse.forms import FORMS, Form, Stage
from sparselth.sparse.forms.stage import tensor_bytes
from sparselth.sparse.network import bound

Call = Callable[[], object]
Bound = tuple[Call, Callable[[], Tensor]]  # a call, and a function that calls and gives [B, ...]
DEAD = 0.25  # share of dead inputs from which compaction cuts them out of a single layer
NAMES = {"two_four_linear": "2:4 + residual"}  # of forms, where rows have another name
OWN = "dense", "CSR"  # forms that a user calls in another way, as rivals of their own


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
    seeded: SeedWeight | None = None  # what `weight` is made of, where it need not be stored

    @property
    def linear(self) -> bool:
        return self.layer.size is None

    @cached_property
    def stage(self) -> Stage:
        """The layer as forms are made for it."""
        layer = self.layer
        return Stage(Part("0", _module(self)[0], layer.inputs, layer.outputs), blocks=self.block)

    @property
    def at(self) -> Device:
        return Device(self.x.device, self.x.dtype, "auto")


@dataclass(frozen=True)
class Ready:
    """A weight made ready: bytes with every index, and how it is put to work on a batch [B, ...]."""

    bytes: int
    bind: Callable[[Tensor], Bound]
    takes: str = ""  # what `auto` chose


@dataclass(frozen=True)
class Rival:
    name: str
    kind: str  # "dense", "torch" (its sparse formats), "ours", "auto"
    fits: Callable[[Case], bool]
    make: Callable[[Case], Ready]
    rows: bool = False  # takes and gives rows


def rivals() -> list[Rival]:
    """All that this installation has, dense ones first."""
    found = [
        Rival("dense eager", "dense", lambda c: True, _eager, rows=True),
        *([Rival("dense compiled", "dense", lambda c: True, _compiled, rows=True)] if can_compile() else []),
        Rival("CSR", "torch", _has_csr, _csr),
        Rival("BSR", "torch", lambda c: c.linear and c.block is not None and _has_csr(c), _bsr),
        *(_of_form(form) for name, form in FORMS.items() if name not in OWN),
        Rival("seed_linear", "ours", lambda c: c.linear and _is_seeded(c), _seed_linear, rows=True),
        Rival("seed_conv2d", "ours", lambda c: not c.linear and _is_seeded(c), _seed_conv2d, rows=True),
        Rival("compaction", "ours", lambda c: c.dead_inputs >= DEAD and _converts(c), _compaction),
        Rival("auto", "auto", _converts, _auto, rows=True),
    ]
    order = "dense", "torch", "ours", "auto"
    return sorted(found, key=lambda rival: order.index(rival.kind))


def _of_form(form: Form) -> Rival:
    """A form of the table on its own, in the layout that it likes."""

    def make(case: Case) -> Ready:
        formed = form.of(case.stage, case.at, len(case.x))
        own = form.layout == "rows"  # in others x is copied anyway
        return Ready(formed.bytes, lambda x: bound(formed, x.clone() if own else x))

    def fits(case: Case) -> bool:
        return form.fits(case.stage, case.at, len(case.x))

    name = NAMES.get(form.name, form.name)
    return Rival(name, form.kind, fits, make, rows=form.layout == "rows")


def _is_seeded(case: Case) -> bool:
    return case.seeded is not None and _converts(case)


def _seed_linear(case: Case) -> Ready:
    w = case.seeded
    assert w is not None

    def bind(x: Tensor) -> Bound:
        x = x.clone()
        if case.device == "cuda" or _native.LIB is None or len(x) > LUT_BATCH:
            return _bound(seed_linear, x, w)
        y = x.new_empty(len(x), w.shape[0])
        run = bind_seed_linear(w, x, None, y)
        return run, lambda: (run(), y)[1]

    return Ready(w.bytes(), bind)


def _seed_conv2d(case: Case) -> Ready:
    w, layer = case.seeded, case.layer
    assert w is not None
    run = partial(seed_conv2d, stride=layer.stride, padding=layer.padding)
    return Ready(w.bytes(), lambda x: _bound(run, x.clone(), w))


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


def _eager(case: Case) -> Ready:
    module = _module(case)  # as it is called in a network
    return Ready(tensor_bytes([case.weight]), lambda x: _bound(module, x.clone()))


def _compiled(case: Case) -> Ready:
    quiet_compiler()
    importlib.import_module("torch._dynamo").reset()  # else a limit of shapes, behind which it is eager
    run, w = torch.compile(product(case), dynamic=False), case.weight
    with torch.no_grad():
        run(case.x, w)  # compiles
    return Ready(tensor_bytes([w]), lambda x: _bound(run, x.clone(), w))


def _has_csr(case: Case) -> bool:
    return case.linear and (case.device == "cuda" or case.dtype == "fp32")


def _csr(case: Case) -> Ready:
    w = _compressed(case.weight, None)

    def bind(x: Tensor) -> Bound:
        turned = x.t().contiguous()
        return partial(torch.mm, w, turned), lambda: (w @ turned).t()

    return Ready(tensor_bytes([w.crow_indices(), w.col_indices(), w.values()]), bind)


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
        return make(starts, places, w.values(), w.shape, check_invariants=False, device=w.device)


def _bsr(case: Case) -> Ready:
    w = _compressed(case.weight, case.block)
    n, k = case.layer.matrix

    def bind(x: Tensor) -> Bound:
        turned = F.pad(x, (0, w.shape[1] - k)).t().contiguous()
        run = partial(_tuned_bsr(w, turned) if case.device == "cuda" else torch.mm, w, turned)
        return run, lambda: run()[:n].t()

    return Ready(tensor_bytes([w.crow_indices(), w.col_indices(), w.values()]), bind)


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


def _compaction(case: Case) -> Ready:
    model = sparse.compact(_module(case), None, case.x).model
    return Ready(tensor_bytes([*model.parameters(), *model.buffers()]), lambda x: _bound(model, x.clone()))


def _auto(case: Case) -> Ready:
    converted = sparse.convert(_module(case), None, case.x)
    takes = converted.report.layers[0].chosen
    return Ready(sparse.weight_bytes(converted), lambda x: _bound(converted, x.clone()), takes)
