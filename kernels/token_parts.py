r"""What a transformer computes on a CPU between its products, features-major: norms, GELU, sums, products.

    layer_norm   y[k, b] = (x[k, b] - mean_b) / sqrt(var_b + eps) * weight[k] + bias[k], over the features k
    rms_norm     y[k, b] = x[k, b] / sqrt(mean_b of x^2 + eps) * weight[k]
    gelu         y = x P(X < x) of a normal X, or, `tanh`, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
    add          y = a + b
    multiply     y = a b

| name         | shape  | dtype |                    Floor in bytes, each read or written once:
| x, a, b, y   | [K, B] | fp32  |                    both norms   8 a number
| weight, bias | [K]    | fp32  |                    gelu         8
                                                     both others 12

Rows may lie apart; nothing between B and their stride is read or written. y of gelu may be x, that of a sum
or product a or b; that of a norm is other memory. Results do not depend on the number of threads, torch's.

GELU is max(x, 0) less what |x| loses, so that nothing cancels left of 0: its error is a few 1e-7 of |x| at
most, as torch's is, and less than that where x is negative. NaN stays; gelu(-inf) is 0 to 1e-36, its limit;
torch has NaN there.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native
from sparselth.kernels.step_parts import Call

# numbers from which on a second thread pays
MANY = {"layer_norm": 1 << 15, "rms_norm": 1 << 15, "gelu": 1 << 13, "add": 1 << 17, "multiply": 1 << 17}
COSTS = {"layer_norm": (8, 7), "rms_norm": (8, 4), "gelu": (8, 25), "add": (12, 1), "multiply": (12, 1)}


def floor(name: str, numel: int) -> dict[str, int]:
    """Bytes and FLOPs of an op on `numel` numbers."""
    size, flops = COSTS[name]
    return {"bytes": size * numel, "flops": flops * numel}


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, kernels: str = "auto"
) -> Tensor:
    """Each column of [K, B] with mean 0 and variance 1, then scaled and shifted."""
    y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    bind_layer_norm(x, weight, bias, y, eps, kernels)()
    return y


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, kernels: str = "auto") -> Tensor:
    """Each column of [K, B] with a mean square of 1, scaled (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    bind_rms_norm(x, weight, y, eps, kernels)()
    return y


def gelu(x: Tensor, tanh: bool = False, kernels: str = "auto") -> Tensor:
    """Of [K, B]; `tanh`: the approximation by it."""
    y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    bind_gelu(x, y, tanh, kernels)()
    return y


def add(a: Tensor, b: Tensor, kernels: str = "auto") -> Tensor:
    """Of [K, B] and [K, B]."""
    y = torch.empty(a.shape, dtype=torch.float32, device="cpu")
    bind_add(a, b, y, kernels)()
    return y


def multiply(a: Tensor, b: Tensor, kernels: str = "auto") -> Tensor:
    """Of [K, B] and [K, B], number by number."""
    y = torch.empty(a.shape, dtype=torch.float32, device="cpu")
    bind_multiply(a, b, y, kernels)()
    return y


def bind_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, eps: float = 1e-5, kernels: str = "auto"
) -> Call:
    """`layer_norm` on fixed tensors."""
    return _bind_norm("layer_norm", x, weight, bias, y, eps, kernels)


def bind_rms_norm(x: Tensor, weight: Tensor | None, y: Tensor, eps: float, kernels: str = "auto") -> Call:
    """`rms_norm` on fixed tensors."""
    return _bind_norm("rms_norm", x, weight, None, y, eps, kernels)


def _bind_norm(
    name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, eps: float, kernels: str
) -> Call:
    k, b = _matrices(x=x, y=y)
    _native.vector("weight", weight, k)
    _native.vector("bias", bias, k)
    if x.data_ptr() == y.data_ptr() and x.numel():
        raise ValueError("y: expected other memory than that of x")
    if use_native(kernels):
        arguments = _LayerNorm(
            x=x.data_ptr(),
            weight=_native.address(weight),
            bias=_native.address(bias),
            y=y.data_ptr(),
            features=k,
            columns=b,
            ldx=x.stride(0),
            ldy=y.stride(0),
            eps=eps,
            rms=name == "rms_norm",
            threads=_threads(name, x),
        )
        return _native.bind("layer_norm", arguments, x, weight, bias, y)

    def run() -> None:
        if name == "rms_norm":
            y.copy_(F.rms_norm(x.t(), (k,), weight, eps).t())
        else:
            y.copy_(F.layer_norm(x.t(), (k,), weight, bias, eps).t())

    return run


def bind_gelu(x: Tensor, y: Tensor, tanh: bool = False, kernels: str = "auto") -> Call:
    """`gelu` on fixed tensors."""
    _matrices(x=x, y=y)
    if use_native(kernels):
        rows, columns, ldx, ldy = _lines(x, y)
        arguments = _Gelu(
            x=x.data_ptr(),
            y=y.data_ptr(),
            rows=rows,
            columns=columns,
            ldx=ldx,
            ldy=ldy,
            tanh=tanh,
            threads=_threads("gelu", x),
        )
        return _native.bind("gelu", arguments, x, y)

    def run() -> None:
        y.copy_(F.gelu(x, approximate="tanh" if tanh else "none"))

    return run


def bind_add(a: Tensor, b: Tensor, y: Tensor, kernels: str = "auto") -> Call:
    """`add` on fixed tensors."""
    return _bind_pair("add", a, b, y, kernels)


def bind_multiply(a: Tensor, b: Tensor, y: Tensor, kernels: str = "auto") -> Call:
    """`multiply` on fixed tensors."""
    return _bind_pair("multiply", a, b, y, kernels)


def _bind_pair(name: str, a: Tensor, b: Tensor, y: Tensor, kernels: str) -> Call:
    _matrices(a=a, b=b, y=y)
    if use_native(kernels):
        rows, columns, lda, ldb, ldy = _lines(a, b, y)
        arguments = _Pair(
            a=a.data_ptr(),
            b=b.data_ptr(),
            y=y.data_ptr(),
            rows=rows,
            columns=columns,
            lda=lda,
            ldb=ldb,
            ldy=ldy,
            threads=_threads(name, y),
        )
        return _native.bind(name, arguments, a, b, y)

    def run() -> None:
        (torch.add if name == "add" else torch.mul)(a, b, out=y)

    return run


def _matrices(**tensors: Tensor) -> tuple[int, int]:
    """[K, B] of all of them."""
    first = next(iter(tensors.values()))
    if first.dim() != 2:
        raise ValueError(f"{next(iter(tensors))}: expected [K, B], got {list(first.shape)}")
    k, b = first.shape
    for name, t in tensors.items():
        _native.matrix(name, t, k, b)
    return k, b


def _lines(*tensors: Tensor) -> tuple[int, ...]:
    """Rows and columns, and the stride of the rows of each; what lies in one piece is one row."""
    rows, columns = tensors[0].shape
    if columns < LINE and all(t.is_contiguous() for t in tensors):
        many = rows * columns
        return 1, many, *[many] * len(tensors)
    return rows, columns, *[t.stride(0) for t in tensors]


LINE = 16  # columns: a vector


def _threads(name: str, t: Tensor) -> int:
    return _native.threads() if t.numel() >= MANY[name] else 1


class _LayerNorm(ctypes.Structure):  # struct layer_norm
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")],
        *[(name, ctypes.c_int64) for name in ("features", "columns", "ldx", "ldy")],
        ("eps", ctypes.c_float),
        *[(name, ctypes.c_int32) for name in ("rms", "threads")],
    ]


class _Gelu(ctypes.Structure):  # struct gelu
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "y")],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "ldx", "ldy")],
        *[(name, ctypes.c_int32) for name in ("tanh", "threads")],
    ]


class _Pair(ctypes.Structure):  # struct pair
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("a", "b", "y")],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "lda", "ldb", "ldy")],
        ("threads", ctypes.c_int32),
    ]
