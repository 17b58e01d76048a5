r"""What a training step on a CPU is besides its products: gather, bias, ReLU, cross-entropy and pooling.

    gather           x[k, b] = images[index[b], k] * scale[k] + shift[k],  y[b] = labels[index[b]]
    bias_relu        y = max(y + bias, 0), in place
    relu_backward    dy = y > 0 ? dy : 0, in place;  dbias[n] = sum of dy[n]
    cross_entropy    sum_b -log softmax(logits)[labels[b], b], and how often logits are greatest at the label
    cross_entropy_grad                 (softmax(logits) - onehot(labels)) / B;  dbias as above
    max_pool         y = maximum of 2 x 2 pixels, then ReLU where asked for
    max_pool_backward                  dx = dy at the first maximum of each window in row order, 0 elsewhere
    transpose        y[k, b] = x[b, k]: from batch first to features-major, and back

| name          | shape                    | dtype  |          Floor in bytes, each read or written once:
| images        | [n, K]                   | uint8  |          gather          B K + 4 B K
| labels, index | [n], [B]                 | int64  |          bias_relu       8 a number
| scale, shift  | [K]                      | fp32   |          relu_backward   12 a number
| rows          | [live], ascending        | int32  |          cross_entropy_grad  8 a logit
| x             | [K, B], with rows [live, B] | fp32 |         max_pool        4 + 1 a pixel of x
| y, dy         | [N, B] or [C, H, W, B]   | fp32   |          max_pool_backward   4 + 1 + 1 + 4
| logits        | [classes, B]             | fp32   |
| bias, dbias   | [N] or [C]               | fp32   |

Activations are features-major. Axes but the last may have any stride; multiples of 16 at 64-byte alignment
are fast. What lies between B and the stride is neither read nor written, but `bind_gather` zeroes it once in
x, over what else may lie there.

To the bit as torch, at the level torch itself works at: gather (torch rounds its product and sum once where
the machine has fused multiply-adds, and so does every level but "plain"), bias_relu, relu_backward but for
dbias, pooling (as sparselth/engine/layers.py). Softmax is within 4 ulp. NaN and infinity go where they go in
torch; a label that no class has makes NaN in its column, and in the loss.

At these sizes the call is what costs: `bind_NAME` checks once and gives a function that is one foreign call
on the same memory, and `sequence` makes one foreign call of many. A gather checks its indices at each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native

Call = Callable[[], object]
MANY = 1 << 17  # numbers from which on a second thread pays


def floor(name: str, numel: int) -> dict[str, int]:
    """Bytes and FLOPs of an op on `numel` floats: those of x for gather and pooling, of y else."""
    quarters, flops = {
        "gather": (20, 2),
        "bias_relu": (32, 2),
        "relu_backward": (48, 2),
        "cross_entropy_grad": (32, 20),
        "cross_entropy": (16, 20),
        "max_pool": (20, 1),
        "max_pool_backward": (40, 2),
        "transpose": (32, 0),
    }[name]
    return {"bytes": quarters * numel // 4, "flops": flops * numel}


def gather(
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The batch (x, y) of images `index`; with `rows` only these pixels, one after the other."""
    x = torch.empty(
        images.shape[1] if rows is None else len(rows), len(index), dtype=torch.float32, device="cpu"
    )
    y = torch.empty(len(index), dtype=torch.int64, device="cpu")
    bind_gather(images, labels, scale, shift, x, y, rows, kernels)(index)
    return x, y


def bias_relu(y: Tensor, bias: Tensor | None = None, kernels: str = "auto") -> Tensor:
    """max(y + bias, 0), in place."""
    bind_bias_relu(y, bias, kernels)()
    return y


def relu_backward(dy: Tensor, y: Tensor | None, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """(dy, dbias): dy with 0 where y is not above 0, in place, and its sums; without y the sums alone."""
    dbias = torch.empty(len(dy), dtype=torch.float32, device="cpu")
    bind_relu_backward(dy, y, dbias, kernels)()
    return dy, dbias


def cross_entropy_grad(logits: Tensor, labels: Tensor, kernels: str = "auto") -> Tensor:
    """Gradient of the mean cross-entropy, [classes, B]."""
    dlogits = torch.empty(logits.shape, dtype=torch.float32, device="cpu")
    bind_cross_entropy_grad(logits, labels, dlogits, None, kernels)()
    return dlogits


def cross_entropy(logits: Tensor, labels: Tensor, kernels: str = "auto") -> tuple[float, int]:
    """Summed cross-entropy and number of right answers; of equal logits the first is the answer."""
    return bind_cross_entropy(logits, labels, kernels)()


def max_pool(x: Tensor, relu: bool = False, kernels: str = "auto") -> Tensor:
    """Maxima of 2 x 2 pixels of [C, H, W, B]; with an odd H or W the last row or column is left out."""
    c, h, w, b = x.shape
    y = torch.empty(c, h // 2, w // 2, b, dtype=torch.float32, device="cpu")
    bind_max_pool(x, y, relu, kernels)()
    return y


def max_pool_backward(dy: Tensor, x: Tensor, y: Tensor, relu: bool = False, kernels: str = "auto") -> Tensor:
    """Gradient of x; with `relu` dy is first cut to 0 where y is not above 0."""
    dx = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    bind_max_pool_backward(dy, x, y, dx, relu, None, kernels)()
    return dx


def transpose(x: Tensor, kernels: str = "auto") -> Tensor:
    """x [M, N] as [N, M] in memory of its own."""
    _native.refuse_gradient(x=x)
    y = x.new_empty(x.shape[1], x.shape[0])
    bind_columns(y, kernels)(x.contiguous())
    return y


def bind_gather(
    images: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    y: Tensor,
    rows: Tensor | None = None,
    kernels: str = "auto",
) -> Callable[[Tensor], None]:
    """A function of int64 indices [B] that fills x and y; IndexError where one is outside of the images."""
    count, pixels = images.shape
    live = pixels if rows is None else len(rows)
    _native.check("images", images, (count, pixels), torch.uint8, contiguous=True)
    _native.check("labels", labels, (count,), torch.int64, contiguous=True)
    _native.check("scale", scale, (pixels,), torch.float32, contiguous=True)
    _native.check("shift", shift, (pixels,), torch.float32, contiguous=True)
    _native.check("y", y, (x.shape[-1],), torch.int64, contiguous=True)
    _lines({"x": x}, (live, x.shape[-1]))
    if rows is not None:
        _native.check("rows", rows, (live,), torch.int32, contiguous=True)
        if live and not (rows[0] >= 0 and rows[-1] < pixels and bool((rows.diff() > 0).all())):
            raise ValueError(f"rows: expected ascending numbers of pixels from 0 to {pixels - 1}")
    batch = len(y)
    if x.stride(0) > batch and live:  # finite numbers for kernels that read whole vectors
        room = min(
            x.stride(0), x.untyped_storage().nbytes() // 4 - x.storage_offset() - (live - 1) * x.stride(0)
        )
        x.as_strided((live, room - batch), (x.stride(0), 1), x.storage_offset() + batch).zero_()

    def check(index: Tensor) -> None:
        if index.dtype != torch.int64 or index.shape != y.shape or not index.is_contiguous():
            raise ValueError(f"index: expected int64 [{batch}], got {index.dtype} {list(index.shape)}")

    outside = f"index: expected images from 0 to {count - 1}"
    if use_native(kernels):
        a = _Gather(
            images=images.data_ptr(),
            labels=labels.data_ptr(),
            scale=scale.data_ptr(),
            shift=shift.data_ptr(),
            rows=_native.address(rows),
            x=x.data_ptr(),
            y=y.data_ptr(),
            count=count,
            pixels=pixels,
            live=live,
            batch=batch,
            ldx=x.stride(0),
        )
        call = _native.bind("gather", a, images, labels, scale, shift, rows, x, y)

        def run(index: Tensor) -> None:
            check(index)
            a.index = index.data_ptr()
            call()
            if a.bad:
                raise IndexError(outside)

        return run

    def run_torch(index: Tensor) -> None:
        check(index)
        if batch and not (index.min() >= 0 and index.max() < count):
            raise IndexError(outside)
        kept = images[index] if rows is None else images[index][:, rows]
        scaled = (t if rows is None else t[rows] for t in (shift, scale))
        x.copy_(_affine(kept, *scaled))
        torch.index_select(labels, 0, index, out=y)

    return run_torch


def _affine(images: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None], images.T.float(), scale[:, None])


def bind_bias_relu(y: Tensor, bias: Tensor | None = None, kernels: str = "auto") -> Call:
    """`bias_relu` on fixed tensors."""
    lines, (strides,) = _lines({"y": y})
    _native.vector("bias", bias, len(y))
    if use_native(kernels):
        a = _BiasReLU(y=y.data_ptr(), bias=_native.address(bias), at=(*lines, strides), threads=_threads(y))
        return _native.bind("bias_relu", a, y, bias)
    column = None if bias is None else bias.view(-1, *[1] * (y.dim() - 1))

    def run() -> None:
        if column is not None:
            y.add_(column)
        y.relu_()

    return run


def bind_relu_backward(
    dy: Tensor, y: Tensor | None, dbias: Tensor | None = None, kernels: str = "auto", add: bool = False
) -> Call:
    """`relu_backward` on fixed tensors; `y` or `dbias` may be missing. `add`: dbias += its sums."""
    given = {"dy": dy} if y is None else {"dy": dy, "y": y}
    lines, strides = _lines(given)
    _native.vector("dbias", dbias, len(dy))
    if use_native(kernels):
        a = _ReLUBackward(
            dy=dy.data_ptr(),
            y=_native.address(y),
            dbias=_native.address(dbias),
            at=(*lines, strides[0]),
            strides_y=strides[-1],
            threads=_threads(dy),
        )
        return _native.bind("relu_backward" + "_add" * add, a, dy, y, dbias)

    def run() -> None:
        if y is not None:
            dy.copy_(_cut(dy, y))
        if dbias is not None:
            sums = dy.flatten(1).sum(1)
            dbias.add_(sums) if add else dbias.copy_(sums)

    return run


def _cut(dy: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(dy, y, 0)  # type: ignore[no-any-return]


def bind_cross_entropy_grad(
    logits: Tensor, labels: Tensor, dlogits: Tensor, dbias: Tensor | None = None, kernels: str = "auto"
) -> Call:
    """`cross_entropy_grad` on fixed tensors, and the gradient of the last layer's bias."""
    classes, batch = logits.shape
    _lines({"logits": logits, "dlogits": dlogits})
    _native.check("labels", labels, (batch,), torch.int64, contiguous=True)
    _native.vector("dbias", dbias, classes)
    if logits.data_ptr() == dlogits.data_ptr() and batch:
        raise ValueError("expected dlogits in other memory than logits")
    if use_native(kernels):
        a = _CrossEntropy(
            logits=logits.data_ptr(),
            labels=labels.data_ptr(),
            dlogits=dlogits.data_ptr(),
            dbias=_native.address(dbias),
            classes=classes,
            batch=batch,
            ld=logits.stride(0),
            ldd=dlogits.stride(0),
        )
        return _native.bind("cross_entropy_grad", a, logits, labels, dlogits, dbias)

    def run() -> None:
        dlogits.copy_(torch.softmax(logits, 0))
        dlogits.scatter_add_(0, labels[None], dlogits.new_full((1,), -1.0).expand(1, batch))
        dlogits.div_(batch)
        if dbias is not None:
            torch.sum(dlogits, 1, out=dbias)

    return run


def bind_cross_entropy(
    logits: Tensor, labels: Tensor, kernels: str = "auto"
) -> Callable[[], tuple[float, int]]:
    """`cross_entropy` on fixed tensors."""
    classes, batch = logits.shape
    _lines({"logits": logits})
    _native.check("labels", labels, (batch,), torch.int64, contiguous=True)
    if use_native(kernels):
        a = _CrossEntropy(
            logits=logits.data_ptr(),
            labels=labels.data_ptr(),
            classes=classes,
            batch=batch,
            ld=logits.stride(0),
        )
        call = _native.bind("cross_entropy", a, logits, labels)

        def run() -> tuple[float, int]:
            call()
            return a.loss, a.right

        return run

    def run_torch() -> tuple[float, int]:
        loss = -torch.log_softmax(logits, 0).gather(0, labels[None]).double().sum()
        return float(loss), int((logits.argmax(0) == labels).sum())

    return run_torch


def bind_max_pool(x: Tensor, y: Tensor, relu: bool = False, kernels: str = "auto") -> Call:
    """`max_pool` on fixed tensors."""
    c, h, w, b = x.shape
    strides = [_strides("x", x, x.shape), _strides("y", y, (c, h // 2, w // 2, b))]
    if use_native(kernels):
        a = _MaxPool(
            x=x.data_ptr(),
            y=y.data_ptr(),
            out=(*y.shape, strides[1]),
            strides_x=strides[0],
            relu=relu,
            threads=_threads(x),
        )
        return _native.bind("max_pool", a, x, y)
    first, *others = _windows(x, y)

    def run() -> None:
        y.copy_(first)
        for other in others:
            torch.maximum(y, other, out=y)
        if relu:
            y.relu_()

    return run


def bind_max_pool_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    dx: Tensor,
    relu: bool = False,
    dbias: Tensor | None = None,
    kernels: str = "auto",
) -> Call:
    """`max_pool_backward` on fixed tensors, and the gradient of a bias that was added to x.

    All of dx is written, also what no window holds, and it must be other memory than dy, x and y.
    """
    c, h, w, b = x.shape
    small = (c, h // 2, w // 2, b)
    strides = [_strides("x", x, x.shape), _strides("dx", dx, x.shape)]
    strides += [_strides("y", y, small), _strides("dy", dy, small)]
    _native.vector("dbias", dbias, c)
    if use_native(kernels):
        a = _MaxPool(
            x=x.data_ptr(),
            y=y.data_ptr(),
            dx=dx.data_ptr(),
            dy=dy.data_ptr(),
            dbias=_native.address(dbias),
            out=(*small, strides[2]),
            strides_x=strides[0],
            strides_dx=strides[1],
            strides_dy=strides[3],
            rest_high=h % 2,
            rest_wide=w % 2,
            relu=relu,
            threads=_threads(x),
        )
        return _native.bind("max_pool_backward", a, dy, x, y, dx, dbias)

    def run() -> None:
        rest = _cut(dy, y) if relu else dy.clone()
        if dbias is not None:
            torch.sum(rest.flatten(1), 1, out=dbias)
        dx.zero_()
        *windows, (_, dlast) = zip(_windows(x, y), _windows(dx, y), strict=True)
        for window, dwindow in windows:
            torch.mul(rest, window == y, out=dwindow)
            rest.sub_(dwindow)
        dlast.copy_(rest)

    return run


def _windows(x: Tensor, y: Tensor) -> list[Tensor]:
    h, w = 2 * y.shape[1], 2 * y.shape[2]
    return [x[:, i:h:2, j:w:2] for i in range(2) for j in range(2)]


def bind_columns(y: Tensor, kernels: str = "auto") -> Callable[[Tensor], None]:
    """A function of x [B, ...], contiguous, that fills y [K, B] with its transpose."""
    return _bind_transpose(y, True, kernels)


def bind_rows(x: Tensor, kernels: str = "auto") -> Callable[[Tensor], None]:
    """A function of y [B, ...], contiguous, that fills it with the transpose of x [K, B]."""
    return _bind_transpose(x, False, kernels)


def bind_transpose(fixed: Tensor, fill: bool) -> Call:
    """A native call that fills `fixed` [K, B] from rows [B, K], or else rows from it.

    Where the rows are is `x`, or else `y`, of its `_native.arguments`, to be set before it is called.
    """
    k, b = fixed.shape
    ld, here, threads = _strides("columns", fixed, (k, b))[0], fixed.data_ptr(), _threads(fixed)
    a = (
        _Transpose(y=here, rows=b, columns=k, ldx=k, ldy=ld, threads=threads)
        if fill
        else _Transpose(x=here, rows=k, columns=b, ldx=ld, ldy=k, threads=threads)
    )
    return _native.bind("transpose", a, fixed)


def _bind_transpose(fixed: Tensor, fill: bool, kernels: str) -> Callable[[Tensor], None]:
    k, b = fixed.shape
    _strides("columns", fixed, (k, b))  # refuses others

    def check(t: Tensor) -> None:
        if t.dtype != torch.float32 or not t.is_cpu or not t.is_contiguous() or len(t) != b:
            raise ValueError(
                f"expected contiguous fp32 of {b} rows on a CPU, got {t.dtype} {list(t.shape)}, "
                f"strides {list(t.stride())}, on {t.device}"
            )
        if t.numel() != k * b:
            raise ValueError(f"expected {k} numbers a row, got {list(t.shape)}")

    if use_native(kernels):
        call = bind_transpose(fixed, fill)
        a = _native.arguments(call)

        def run(t: Tensor) -> None:
            check(t)
            if fill:
                a.x = t.data_ptr()
            else:
                a.y = t.data_ptr()
            call()

        return run

    def run_torch(t: Tensor) -> None:
        check(t)
        if fill:
            fixed.copy_(t.view(b, k).t())
        else:
            t.view(b, k).copy_(fixed.t())

    return run_torch


def sequence(calls: Sequence[Call]) -> Call:
    """All these calls, in turn, as one; a single foreign call of all native ones that follow each other."""
    parts: list[Call] = []
    for native, group in groupby(calls, is_native):
        some = list(group)
        parts += [_joined(some)] if native else some
    if len(parts) == 1:
        return parts[0]

    def run() -> None:
        for part in parts:
            part()

    return run


def is_native(call: Call) -> bool:
    """Whether `_native.bind` has made it."""
    return isinstance(call, partial) and hasattr(call.func, "argtypes")


def _joined(calls: list[Any]) -> Call:
    table = (_Call * len(calls))()
    for place, call in zip(table, calls, strict=True):
        place.function = ctypes.cast(call.func, ctypes.c_void_p)
        place.args = ctypes.addressof(call.args[0]._obj)
    a = _Sequence(calls=ctypes.addressof(table), count=len(calls))
    return _native.bind("sequence", a, table, *calls)


_Strides = ctypes.c_int64 * 3


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type]]:
    return _fields(ctypes.c_void_p, names)


def _integers(names: str) -> list[tuple[str, type]]:
    return _fields(ctypes.c_int64, names)


class _Gather(ctypes.Structure):  # struct gather
    _fields_ = [
        *_pointers("images labels index scale shift rows x y"),
        *_integers("count pixels live batch ldx"),
        ("bad", ctypes.c_int32),
    ]


class _Lines(ctypes.Structure):  # struct lines
    _fields_ = [*_integers("channels high wide length"), ("strides", _Strides)]


class _BiasReLU(ctypes.Structure):  # struct bias_relu
    _fields_ = [*_pointers("y bias"), ("at", _Lines), ("threads", ctypes.c_int32)]


class _ReLUBackward(ctypes.Structure):  # struct relu_backward
    _fields_ = [
        *_pointers("dy y dbias"),
        ("at", _Lines),
        ("strides_y", _Strides),
        ("threads", ctypes.c_int32),
    ]


class _CrossEntropy(ctypes.Structure):  # struct cross_entropy
    _fields_ = [
        *_pointers("logits labels dlogits dbias"),
        *_integers("classes batch ld ldd"),
        ("loss", ctypes.c_double),
        ("right", ctypes.c_int64),
    ]


class _MaxPool(ctypes.Structure):  # struct max_pool
    _fields_ = [
        *_pointers("x y dx dy dbias"),
        ("out", _Lines),
        *_fields(_Strides, "strides_x strides_dx strides_dy"),
        *_integers("rest_high rest_wide"),
        *_fields(ctypes.c_int32, "relu threads"),
    ]


class _Transpose(ctypes.Structure):  # struct transpose
    _fields_ = [*_pointers("x y"), *_integers("rows columns ldx ldy"), ("threads", ctypes.c_int32)]


class _Call(ctypes.Structure):  # struct call
    _fields_ = _pointers("function args")


class _Sequence(ctypes.Structure):  # struct sequence
    _fields_ = [*_pointers("calls"), *_integers("count")]


def _threads(t: Tensor) -> int:
    return _native.threads() if t.numel() >= MANY else 1


def _lines(
    tensors: dict[str, Tensor], shape: tuple[int, ...] | None = None
) -> tuple[tuple[int, int, int, int], list[tuple[int, ...]]]:
    """Channels, rows, columns and length of lines that lie in one piece in all tensors; their strides."""
    expected = next(iter(tensors.values())).shape if shape is None else shape
    if len(expected) not in (2, 4):
        raise ValueError(f"expected [N, B] or [C, H, W, B], got {list(expected)}")
    strides = [_strides(name, t, expected) for name, t in tensors.items()]
    c, *middle, length = expected
    h, w = middle or (1, 1)
    if w == 1 or all(s[2] == length for s in strides):
        w, length = 1, w * length
        if h == 1 or all(s[1] == length for s in strides):
            h, length = 1, h * length
    return (c, h, w, length), strides


def _strides(name: str, t: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of channels, rows and columns of a checked tensor [N, B] or [C, H, W, B]."""
    _native.check(name, t, shape)
    used = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    side_by_side = t.shape[-1] <= 1 or t.stride(-1) == 1
    if t.numel() and not (side_by_side and all(stride > 0 for _, stride in used)):
        raise ValueError(f"{name}: expected the batch side by side, got strides {list(t.stride())}")
    return (t.stride(0), 0, 0) if t.dim() == 2 else t.stride()[:3]
