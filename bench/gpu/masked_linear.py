"""masked_linear: the target beside cuBLAS; all gradients beyond 2^31; cuBLAS as the rival elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import Copies, Run, median, ratio, rows
from oracle import DTYPES, NAN, Wrong, compare, must_repeat, must_replay, need_memory, precision
from sparselth.kernels import masked_linear as module
from sparselth.kernels.bitmask import reference_pack
from sparselth.kernels.masked_linear import floor, masked_linear

Shape = tuple[int, int, int, int]  # R, B, N, K
TINY: list[Shape] = [(1, 1, 1, 1), (2, 33, 20, 47)]
GRADS = ("y", "dx", "dw", "db", "ds")
OPS = torch.ops.sparselth

TARGET: Shape = (1, 512, 4096, 4096)  # in bf16
WORKLOADS: dict[str, list[Shape]] = {
    "bf16": [TARGET, (1, 64, 4096, 4096), (20, 60, 300, 784)],
    "fp16": [TARGET],
    "tf32": [TARGET, (20, 60, 300, 784)],
    "ieee": [(20, 60, 300, 784), (1, 60, 300, 784), (100, 60, 300, 784), (1, 512, 1024, 1024)],
}


class Problem(NamedTuple):
    x: Tensor
    w: Tensor
    mask: Tensor
    bias: Tensor
    dy: Tensor
    keep: Tensor  # bool [R, N, K]


def problem(here: Here, part: str, shape: Shape, density: float = 0.5, seed: int = 0) -> Problem:
    """With an empty and a full row, where there are so many."""
    r, b, n, k = shape
    g = here.generator(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=here.device).to(DTYPES[part])

    keep = torch.rand(r, n, k, generator=g, device=here.device) < density
    if n > 2 and 0 < density < 1:
        keep[:, 0], keep[:, -1] = False, True
    x, w, bias, dy = normal(r, b, k), normal(r, n, k), normal(r, n), normal(r, b, n)
    return Problem(x, w, reference_pack(keep), bias, dy, keep)


def ours(p: Problem) -> dict[str, Tensor]:
    """y and all gradients, through autograd."""
    leaves = [t.detach().requires_grad_() for t in (p.x, p.w, p.bias, torch.zeros_like(p.w))]
    x, w, bias, scores = leaves
    y = masked_linear(x, w, p.mask, bias, scores, "triton")
    return dict(zip(GRADS, (y.detach(), *torch.autograd.grad(y, leaves, p.dy)), strict=True))


def formula(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    x, w, bias, dy = (t.to(dtype) for t in (p.x, p.w, p.bias, p.dy))
    kept, dense = torch.where(p.keep, w, 0), dy.mT @ x
    return {
        "y": torch.baddbmm(bias[:, None], x, kept.mT),
        "dx": dy @ kept,
        "dw": torch.where(p.keep, dense, 0),
        "db": dy.sum(1),
        "ds": dense * w,
    }


def said(shape: Shape) -> str:
    return "R{} B{} N{} K{}".format(*shape)


# Offsets beyond 2^31


def apart(here: Here, part: str) -> None:
    """Replicas that lie 2^31 elements apart, in x, w, dy and in the mask."""
    need_memory(12)
    gap = here.pick(2**12, 2**31) + 16
    small = problem(here, part, (2, 18, 24, 40))

    def spread(*tensors: Tensor) -> list[Tensor]:
        flat = torch.empty(gap + 4096, dtype=tensors[0].dtype, device=here.device)
        flat.fill_(255 if flat.dtype == torch.uint8 else NAN)
        views, start = [], 0
        for t in tensors:
            views.append(flat[start:].as_strided(t.shape, (gap, *t.stride()[1:])).copy_(t))
            start += -(-t[0].numel() // 16) * 16
        return views

    x, w, dy = spread(small.x, small.w, small.dy)
    (mask,) = spread(small.mask)
    must_repeat(ours(Problem(x, w, mask, small.bias, dy, small.keep)), ours(small), "distance")


def vast(here: Here, part: str, shape: Shape) -> None:
    """A tensor of more than 2^31 elements: the last rows and columns are those of the small problem there."""
    need_memory(24)
    r, b, n, k = shape
    g, dtype = here.generator(0), DTYPES[part]
    x, w, dy = (
        torch.empty(r, rows, columns, dtype=dtype, device=here.device).uniform_(-1, 1, generator=g)
        for rows, columns in ((b, k), (n, k), (b, n))
    )
    bits = torch.randint(0, 256, (r, n, -(-k // 8)), generator=g, device=here.device, dtype=torch.uint8)
    if k % 8:
        bits[..., -1] &= (1 << k % 8) - 1
    ends_b, ends_n, ends_k = (
        torch.tensor([0, size // 2, size - 1], device=here.device) for size in (b, n, k)
    )

    def keep(rows: Tensor | slice, columns: Tensor) -> Tensor:
        return (bits[:, rows][..., columns // 8] >> (columns % 8).to(torch.uint8) & 1).bool()

    def near(name: str, found: Tensor, right: Tensor, terms: int) -> None:
        error, size = float((found.double() - right).norm()), float(right.norm())
        if not error <= (3e-2 if size else 0) * max(size, terms**0.5 / 9):
            raise Wrong(f"{name}: error {error:.2e} of {size:.2e} at the ends")

    y = masked_linear(x, w, bits, kernels="triton")[:, ends_b][..., ends_n]
    kept = torch.where(keep(ends_n, torch.arange(k, device=here.device)), w[:, ends_n], 0).double()
    near("y", y, x[:, ends_b].double() @ kept.mT, k)
    dx = OPS.masked_linear_dx(dy, w, bits, "triton")[:, ends_b][..., ends_k]
    kept = torch.where(keep(slice(None), ends_k), w[..., ends_k], 0).double()
    near("dx", dx, dy[:, ends_b].double() @ kept, n)
    dense = dy[..., ends_n].double().mT @ x[..., ends_k].double()
    dw = OPS.masked_linear_dw(dy, x, bits, "triton")[:, ends_n][..., ends_k]
    near("dw", dw, torch.where(keep(ends_n, ends_k), dense, 0), b)
    ds = OPS.masked_linear_ds(dy, x, w, "triton")[:, ends_n][..., ends_k]
    near("ds", ds, dense * w[:, ends_n][..., ends_k].double(), b)


def far_rows(here: Here, part: str) -> None:
    """Rows as far apart as is taken: offsets within one tile of 128 rows come close to 2^31."""
    need_memory(8)
    small, stride = problem(here, part, (1, 18, 128, 40)), here.pick(2**8, 2**24 - 8)
    flat = torch.empty(127 * stride + 40, dtype=small.w.dtype, device=here.device)
    w = flat.as_strided((1, 128, 40), (0, stride, 1)).copy_(small.w)
    must_repeat(ours(small._replace(w=w)), ours(small), "distance")


def large(here: Here) -> Iterator[Case]:
    yield Case("rows of w 2^24 apart", "bf16", partial(far_rows, here, "bf16"), 5)
    yield Case("replicas 2^31 apart", "bf16", partial(apart, here, "bf16"), 5)
    for shape in here.pick(
        [(1, 8, 37, 44), (1, 37, 19, 16)], [(1, 16, 65537, 32780), (1, 131075, 16389, 16)]
    ):
        run = partial(vast, here, "bf16", shape)
        yield Case(f"{said(shape)}: beyond 2^31 within a tensor", "bf16", run, 10)


# At the sizes of the targets


def verify(here: Here, part: str, shape: Shape) -> dict[str, float]:
    """One of the benchmark's problems against float64, without the poison."""
    p, (_, b, n, k) = problem(here, part, shape), shape
    with precision(part):
        torchs, found = formula(p, DTYPES[part]), ours(p)
    return compare(
        found, formula(p, torch.double), torchs, part, {"y": k, "dx": n, "dw": b, "db": b, "ds": b}
    )


def smoke(here: Here) -> Iterator[Case]:
    shape = here.pick(TINY[1], TARGET)

    def graph() -> None:
        p = problem(here, "bf16", shape)
        must_replay(lambda: ours(p))

    yield Case(said(shape), "bf16", partial(verify, here, "bf16", shape), 4)
    if here.device == "cuda":
        yield Case(f"{said(shape)} in a CUDA graph", "bf16", graph, 2)


def linear(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """By cuBLAS, of one replica as one product."""
    return F.linear(x[0], w[0], bias[0])[None] if len(w) == 1 else torch.baddbmm(bias[:, None], x, w.mT)


def product(a: Tensor, b: Tensor) -> Tensor:
    return (a[0] @ b[0])[None] if len(a) == 1 else a @ b


def forward(p: Problem) -> dict[str, Run | Copies]:
    """Ours, and cuBLAS on weights that were masked before, each on copies of x, the weights and masks."""
    wm = p.w * p.keep

    def masked() -> Run:
        x, w, mask = p.x.clone(), p.w.clone(), p.mask.clone()
        return lambda: masked_linear(x, w, mask, p.bias, kernels="triton")

    def dense() -> Run:
        x, w = p.x.clone(), wm.clone()
        return lambda: linear(x, w, p.bias)

    return {
        "triton": Copies(masked, p.x.nbytes + p.w.nbytes + p.mask.nbytes),
        "w * m before": Copies(dense, p.x.nbytes + wm.nbytes),
    }


def targets(here: Here) -> Iterator[Case]:
    shape = here.pick(TINY[1], TARGET)

    def figure() -> dict[str, Any]:
        wrong = judged(verify, here, "bf16", shape)
        rivals = forward(problem(here, "bf16", shape))
        timed = rows(here, f"y {said(shape)}", floor(*shape, 2), "bf16", "triton", rivals)
        times = ratio(median(timed, "triton", "cold"), median(timed, "w * m before", "cold"))
        return {"times": timed, "figures": {"of cuBLAS on w * m": times}} | wrong

    yield Case(f"y {said(shape)}", "bf16", figure, 4)


# Other times


def halves(p: Problem) -> Run:
    """y of one replica by programs of 128 x 256, each over half of the sum: fewer bytes from L2."""
    (_, b, k), n = p.x.shape, p.w.shape[1]
    x, w, mask = (t.clone()[0].unflatten(1, (2, -1)).transpose(0, 1) for t in (p.x, p.w, p.mask))
    bias, tile = torch.cat([p.bias, torch.zeros_like(p.bias)]), module.Tile(128, 256, 64, 8, 3)

    def run() -> Tensor:
        sums, y = x.new_empty(2, b, n, dtype=torch.float32), x.new_empty(b, n)
        module._product_kernel[-(-n // tile.rows) * -(-b // tile.columns), 2](
            x,
            w,
            mask,
            bias,
            sums,
            b,
            n,
            k // 2,
            *x.stride(),
            *w.stride()[:2],
            *mask.stride()[:2],
            TRANSPOSED=False,
            HAS_BIAS=True,
            EVEN_M=n % tile.rows == 0,
            EVEN_C=k // 2 % tile.depth == 0,
            BLOCK_M=tile.rows,
            BLOCK_B=tile.columns,
            BLOCK_C=tile.depth,
            PRECISION="ieee",
            UPCAST=module.INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return torch.add(sums[0], sums[1], out=y)[None]

    return run


def tiles(here: Here) -> dict[str, Any]:
    """The tile that ships beside that of `halves`."""
    shape = here.pick((1, 9, 20, 128), TARGET)
    p = problem(here, "bf16", shape)
    right, own = ({"y": formula(p, dtype)["y"]} for dtype in (torch.double, torch.bfloat16))
    wrong = judged(compare, {"y": halves(p)()}, right, own, "bf16", {"y": shape[3]})
    rivals = forward(p)
    rivals["128 x 256, halves of the sum"] = Copies(
        lambda: halves(p), p.x.nbytes + p.w.nbytes + p.mask.nbytes
    )
    timed = rows(here, f"tiles of y {said(shape)}", floor(*shape, 2), "bf16", "triton", rivals)
    return {"times": timed} | wrong


def benchmark(here: Here, part: str, shape: Shape, which: str) -> dict[str, Any]:
    wrong = judged(verify, here, part, shape)
    p = problem(here, part, shape)
    x, w, mask, bias, dy, keep = p
    m, wm = keep.to(w.dtype), w * keep
    rivals: dict[str, Run | Copies] = {
        "y": forward(p) | {"w * m each time": lambda: linear(x, w * m, bias)},
        "dx": {
            "triton": lambda: OPS.masked_linear_dx(dy, w, mask, "triton"),
            "w * m before": lambda: product(dy, wm),
            "w * m each time": lambda: product(dy, w * m),
        },
        "dw": {
            "triton": lambda: OPS.masked_linear_dw(dy, x, mask, "triton"),
            "no mask": lambda: product(dy.mT, x),
            "mask after": lambda: product(dy.mT, x) * m,
        },
        "ds": {
            "triton": lambda: OPS.masked_linear_ds(dy, x, w, "triton"),
            "times w after": lambda: product(dy.mT, x) * w,
        },
    }[which]
    least = floor(*shape, w.element_size())
    if which == "ds":  # reads w instead of the mask
        least["bytes"] += w.numel() * w.element_size() - mask.numel()
    with precision(part):
        return {"times": rows(here, f"{which} {said(shape)}", least, part, "triton", rivals)} | wrong


def benchmarks(here: Here) -> Iterator[Case]:
    yield Case("tiles", "bf16", partial(tiles, here), 4)
    for part, shapes in WORKLOADS.items():
        for shape in here.pick(TINY, shapes):
            for which in ("y", "dx", "dw", "ds"):
                yield Case(f"{which} {said(shape)}", part, partial(benchmark, here, part, shape, which), 4)
