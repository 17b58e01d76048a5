r"""What a step of R replicas is besides its products and updates, one launch each on CUDA.

    begin_step           lr[r] = rates[clock], count[r] = clock + 1 - starts[r], place = clock % steps;
                         then clock += 1
    gather               x[r, b, k] = images[i, k] * scale[k] + shift[k],  y[r, b] = labels[i]
                         with i = order[r, place, b]
    bias_relu            y[r, n, ..., b] = max(y[r, n, ..., b] + bias[r, n], 0), in place
    max_pool             y[r, c, p, q, b] = maximum of size x size pixels
    max_pool_backward    dx = dy at the first maximum of each window in row order, 0 elsewhere; with `cuts`
                         nothing where y <= 0, which is the gradient of a ReLU before the pool
    cross_entropy_grad   dlogits[r, :, b] = (softmax(logits[r, :, b] + bias[r]) - onehot(labels[r, b])) / B

| name            | shape                      | dtype |       Floor in bytes, each read or written once:
| clock, place    | [1]                        | int64 |       gather              B K + 4 B K a replica
| rates           | [steps of the training]    | fp64  |       bias_relu           8 a number
| lr              | [R]                        | fp64  |       cross_entropy_grad  8 a logit
| count, starts   | [R]                        | fp32  |       max_pool            4 and 4 / size^2 a pixel
| images          | [n, K]                     | uint8 |       max_pool_backward   8 and 8 / size^2 a pixel
| labels          | [n], of a batch [R, B]     | int64 |
| order           | [R, steps, B]              | int64 |
| x               | [R, B, K]                  | fp32  |
| y               | [R, N, B], [R, C, H, W, B] | fp32  |       channels-last, [R, B, (H, W,) N] in memory
| logits          | [R, classes, B]            | fp32  |
| bias            | [R, N], any way apart      | fp32  |

For one replica on a CPU the same maths is in step_parts. What a replica computes does not depend on the
others: its programs know R only to find their own. Rounding: product and sum of a gather round once; exp and
the quotients are Triton's, within 4 ulp of torch's. NaN and infinity go where they go in torch. A label that
no class has takes nothing off; behind the last rate there is NaN.

Account for R = 100 of LeNet-300-100, batch 60, on an H100 (3.0 TB/s copied; an H200 4.3), all from DRAM:
gather 4.7 + 18.8 MB, expected 8 us (H200: 6); bias_relu of 300 and 100 columns 14.4 and 4.8 MB, which the 50
MB of L2 hold, expected 4 and 2 us; begin_step and cross_entropy_grad (0.5 MB) expected 2 us each, which is
what a launch takes. A program of gather is a row: 64 threads with 16 bytes of the image each, 54 registers
(Triton 3.6), so 18 programs an SM and 14 KB of images in flight; its three loads in turn (place, order,
image) hide behind other rows. No long loops. Goal: together at most a tenth of the step. Of 30 Conv-2 a layer
of 64 channels of 32 x 32 has 118 M numbers: bias_relu 944 MB, expected 315 us (H200: 220); max_pool 590 MB,
200 us (140), and max_pool_backward 1.2 GB, 400 us (275): torch's own operators move 1.1 and, with ReLU's, 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselth.kernels._choose import use_triton
from sparselth.kernels._triton import tl, triton

LANES = 128  # replicas of a round of begin_step
PIXELS = 1024  # of a program of gather; 16 to a thread
BLOCK = 1024  # numbers of a program of bias_relu
ROWS = 64  # images of a program of cross_entropy_grad


def floor(name: str, numel: int) -> dict[str, int]:
    """Bytes and FLOPs of an op on `numel` floats: of x for gather and pools of 2 x 2, of y or logits else."""
    bytes_, flops = {
        "gather": (5, 2),
        "bias_relu": (8, 2),
        "max_pool": (5, 1),
        "max_pool_backward": (10, 2),
        "cross_entropy_grad": (8, 20),
    }[name]
    return {"bytes": bytes_ * numel, "flops": flops * numel}


def reference_begin_step(
    clock: Tensor, rates: Tensor, starts: Tensor, lr: Tensor, count: Tensor, place: Tensor, steps: int
) -> None:
    torch.index_select(rates, 0, clock.expand(len(lr)), out=lr)
    torch.sub(clock + 1, starts, out=count)
    torch.remainder(clock, steps, out=place)
    clock += 1


def reference_gather(
    images: Tensor, labels: Tensor, scale: Tensor, shift: Tensor, order: Tensor, place: Tensor
) -> tuple[Tensor, Tensor]:
    """(x, y) of any floating dtype that scale and shift have."""
    index = order.index_select(1, place).squeeze(1)
    return torch.addcmul(shift, images[index].to(scale.dtype), scale), labels[index]


def reference_bias_relu(y: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(y + bias.view(*bias.shape, *[1] * (y.dim() - 2)))


def reference_max_pool(x: Tensor, size: int) -> Tensor:
    first, *others = _windows(x, size)
    for other in others:
        first = torch.maximum(first, other)
    return first


def reference_max_pool_backward(dy: Tensor, x: Tensor, size: int, cuts: bool) -> Tensor:
    y, dx = reference_max_pool(x, size), torch.zeros_like(x)
    rest = torch.where(y <= 0, 0, dy) if cuts else dy
    *windows, (_, last) = zip(_windows(x, size), _windows(dx, size), strict=True)
    for pixels, found in windows:
        hit = pixels == y
        found.copy_(torch.where(hit, rest, 0))
        rest = torch.where(hit, 0, rest)
    last.copy_(rest)
    return dx


def _windows(x: Tensor, size: int) -> list[Tensor]:
    """The pixels of all windows, place by place in row order."""
    p, q = (n // size for n in x.shape[2:4])
    return [x[:, :, i : p * size : size, j : q * size : size] for i in range(size) for j in range(size)]


def reference_cross_entropy_grad(logits: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """Gradient of the mean cross-entropy of every replica."""
    grad = torch.softmax(logits if bias is None else logits + bias[:, :, None], 1)
    grad.scatter_add_(1, labels[:, None], grad.new_full((1,), -1.0).expand(labels[:, None].shape))
    return grad.div_(logits.shape[2])


@triton.jit
def _begin_kernel(
    clock_ptr,
    rates_ptr,
    starts_ptr,
    lr_ptr,
    count_ptr,
    place_ptr,
    R,
    last,
    steps,
    LANES: tl.constexpr,
):
    """One program of one warp: nobody reads the clock when it moves on."""
    clock = tl.load(clock_ptr)
    rate = tl.load(rates_ptr + clock, mask=clock <= last, other=float("nan"))
    done = (clock + 1).to(tl.float32)
    i = 0
    while i < R:
        offs = i + tl.arange(0, LANES)
        inside = offs < R
        tl.store(lr_ptr + offs, tl.zeros((LANES,), tl.float64) + rate, mask=inside)
        tl.store(count_ptr + offs, done - tl.load(starts_ptr + offs, mask=inside, other=0.0), mask=inside)
        i += LANES
    tl.store(place_ptr, clock % steps)
    tl.store(clock_ptr, clock + 1)


@triton.jit
def _gather_kernel(
    images_ptr,
    labels_ptr,
    scale_ptr,
    shift_ptr,
    order_ptr,
    place_ptr,
    x_ptr,
    y_ptr,
    B,
    K,
    steps,
    PIXELS: tl.constexpr,
):
    """Some pixels of one image of one replica."""
    row = tl.program_id(0).to(tl.int64)  # r * B + b
    first = tl.program_id(1) * PIXELS
    place = tl.load(place_ptr)
    image = tl.load(order_ptr + ((row // B) * steps + place) * B + row % B)
    if first == 0:
        tl.store(y_ptr + row, tl.load(labels_ptr + image))
    offs = first + tl.arange(0, PIXELS)
    inside = offs < K
    pixels = tl.load(images_ptr + image * K + offs, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + offs, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + offs, mask=inside, other=0.0)
    tl.store(x_ptr + row * K + offs, tl.fma(pixels, scale, shift), mask=inside)


@triton.jit
def _bias_relu_kernel(
    y_ptr,
    bias_ptr,
    N,
    size,
    stride_bias,
    BLOCK: tl.constexpr,
):
    """Some of the `size` numbers of one replica, N in a row."""
    chunks = tl.cdiv(size, BLOCK)
    r = (tl.program_id(0) // chunks).to(tl.int64)
    offs = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    y_ptr += r * size
    y = tl.load(y_ptr + offs, mask=inside, other=0.0)
    y += tl.load(bias_ptr + r * stride_bias + offs % N, mask=inside, other=0.0)
    tl.store(y_ptr + offs, tl.where(y <= 0.0, 0.0, y), mask=inside)  # NaN stays


@triton.jit
def _max_pool_kernel(
    x_ptr,
    y_ptr,
    C,
    H,
    W,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some outputs of one image of one replica."""
    P, Q = H // SIZE, W // SIZE
    chunks = tl.cdiv(P * Q * C, BLOCK)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    offs = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < P * Q * C
    x_ptr += image * H * W * C + ((offs // (Q * C)) * W + (offs // C) % Q) * SIZE * C + offs % C
    y = tl.load(x_ptr, mask=inside, other=0.0)
    for k in tl.static_range(1, SIZE * SIZE):
        x = tl.load(x_ptr + (k // SIZE * W + k % SIZE) * C, mask=inside, other=0.0)
        y = tl.maximum(y, x, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + image * P * Q * C + offs, y, mask=inside)


@triton.jit
def _max_pool_backward_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,
    dx_ptr,
    B,
    C,
    H,
    W,
    stride_r,
    stride_c,
    stride_p,
    stride_q,
    stride_b,
    CUTS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The windows of some outputs of one image of one replica; dy has strides, the rest is channels-last."""
    P, Q = H // SIZE, W // SIZE
    chunks = tl.cdiv(P * Q * C, BLOCK)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    offs = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < P * Q * C
    p, q, c = offs // (Q * C), (offs // C) % Q, offs % C
    dy_ptr += image // B * stride_r + image % B * stride_b
    dy_at = p.to(tl.int64) * stride_p + q.to(tl.int64) * stride_q + c.to(tl.int64) * stride_c
    rest = tl.load(dy_ptr + dy_at, mask=inside, other=0.0)
    y = tl.load(y_ptr + image * P * Q * C + offs, mask=inside, other=0.0)
    if CUTS:
        rest = tl.where(y <= 0.0, 0.0, rest)
    at = image * H * W * C + (p * W + q) * SIZE * C + c
    for k in tl.static_range(SIZE * SIZE - 1):
        pixel = at + (k // SIZE * W + k % SIZE) * C
        hit = tl.load(x_ptr + pixel, mask=inside, other=0.0) == y
        tl.store(dx_ptr + pixel, tl.where(hit, rest, 0.0), mask=inside)
        rest = tl.where(hit, 0.0, rest)
    tl.store(dx_ptr + at + ((SIZE - 1) * W + SIZE - 1) * C, rest, mask=inside)


@triton.jit
def _cross_entropy_grad_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    dlogits_ptr,
    B,
    C,
    stride_r,
    stride_c,
    stride_b,
    stride_dr,
    stride_dc,
    stride_db,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Some images of one replica, all classes."""
    chunks = tl.cdiv(B, ROWS)
    r = (tl.program_id(0) // chunks).to(tl.int64)
    offs_b = (tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, CLASSES)
    in_b, in_c = offs_b < B, offs_c < C
    inside = in_b[:, None] & in_c[None, :]
    offs = offs_b.to(tl.int64)[:, None] * stride_b + offs_c.to(tl.int64)[None, :] * stride_c
    logits = tl.load(logits_ptr + r * stride_r + offs, mask=inside, other=float("-inf"))
    if HAS_BIAS:
        logits += tl.load(bias_ptr + r * stride_bias + offs_c, mask=in_c, other=0.0)[None, :]
    most = tl.max(logits, axis=1)
    powers = tl.exp(logits - tl.where(in_b, most, 0.0)[:, None])
    total = tl.where(in_b, tl.sum(powers, axis=1), 1.0)
    labels = tl.load(labels_ptr + r * B + offs_b, mask=in_b, other=-1)
    hit = tl.where(labels[:, None] == offs_c[None, :], 1.0, 0.0)
    grad = tl.div_rn(powers, total[:, None] + tl.zeros_like(powers)) - hit
    offs = offs_b.to(tl.int64)[:, None] * stride_db + offs_c.to(tl.int64)[None, :] * stride_dc
    tl.store(dlogits_ptr + r * stride_dr + offs, grad / B, mask=inside)


@torch.no_grad()
def begin_step(
    clock: Tensor,
    rates: Tensor,
    starts: Tensor,
    lr: Tensor,
    count: Tensor,
    place: Tensor,
    steps: int,
    kernels: str = "auto",
) -> None:
    """Write what changes from step to step for `clock`, whose epochs have `steps` steps, and move it on."""
    r = len(lr)
    _check("clock", clock, torch.int64, (1,))
    _check("place", place, torch.int64, (1,))
    _check("rates", rates, torch.float64, (rates.numel(),))
    _check("starts", starts, torch.float32, (r,))
    _check("lr", lr, torch.float64, (r,))
    _check("count", count, torch.float32, (r,))
    if not use_triton(kernels, clock):
        reference_begin_step(clock, rates, starts, lr, count, place, steps)
        return
    with torch.cuda.device_of(clock):
        _begin_kernel[(1,)](
            *(clock, rates, starts, lr, count, place, r, len(rates) - 1, steps),
            LANES=LANES,
            num_warps=1,
            num_stages=1,
        )


@torch.no_grad()
def gather(
    images: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    order: Tensor,
    place: Tensor,
    x: Tensor,
    y: Tensor,
    kernels: str = "auto",
) -> None:
    """Fill x [R, B, K] and y [R, B] with the images order[:, place]. Numbers in `order` are not checked."""
    (r, steps, b), k = order.shape, images.shape[1]
    _check("images", images, torch.uint8, (len(images), k))
    _check("labels", labels, torch.int64, (len(images),))
    _check("scale", scale, torch.float32, (k,))
    _check("shift", shift, torch.float32, (k,))
    _check("order", order, torch.int64, (r, steps, b))
    _check("place", place, torch.int64, (1,))
    _check("x", x, torch.float32, (r, b, k))
    _check("y", y, torch.int64, (r, b))
    if not use_triton(kernels, images):
        found = reference_gather(images, labels, scale, shift, order, place)
        x.copy_(found[0])
        y.copy_(found[1])
        return
    with torch.cuda.device_of(images):
        _gather_kernel[r * b, triton.cdiv(k, PIXELS)](
            *(images, labels, scale, shift, order, place, x, y, b, k, steps),
            PIXELS=PIXELS,
            num_warps=PIXELS // 512,
            num_stages=1,
        )


def is_channels_last(t: Tensor) -> bool:
    """Whether t [R, N, ..., B] lies in memory as [R, B, ..., N]."""
    return t.dim() > 2 and t.movedim(1, -1).movedim(-2, 1).is_contiguous()


@torch.no_grad()
def bias_relu(y: Tensor, bias: Tensor, kernels: str = "auto") -> None:
    """max(y + bias, 0) in place, for y [R, N, ..., B] that lies channels-last: [R, B, ..., N] in memory."""
    r, n, *_ = y.shape
    size = y[:1].numel()
    if y.dtype != torch.float32 or not is_channels_last(y):
        raise ValueError(
            f"expected y channels-last in fp32, got {y.dtype} {list(y.shape)}, strides {list(y.stride())}"
        )
    if size >= 2**31:
        raise ValueError(f"expected less than 2^31 numbers a replica, got {list(y.shape)}")
    _check_bias(bias, r, n)
    if not use_triton(kernels, y):
        y.copy_(reference_bias_relu(y, bias))
        return
    with torch.cuda.device_of(y):
        _bias_relu_kernel[(r * triton.cdiv(size, BLOCK),)](
            *(y, bias, n, size, bias.stride(0)), BLOCK=BLOCK, num_warps=4, num_stages=1
        )


@torch.no_grad()
def max_pool(x: Tensor, y: Tensor, size: int, kernels: str = "auto") -> None:
    """Fill y [R, C, H // size, W // size, B] with the maxima of x [R, C, H, W, B], both channels-last."""
    r, c, h, w, b = x.shape
    _check_images({"x": x, "y": y}, size)
    if not use_triton(kernels, x):
        y.copy_(reference_max_pool(x, size))
        return
    with torch.cuda.device_of(x):
        _max_pool_kernel[(r * b * triton.cdiv(y[0, ..., 0].numel(), BLOCK),)](
            *(x, y, c, h, w), SIZE=size, BLOCK=BLOCK, num_warps=4, num_stages=1
        )


@torch.no_grad()
def max_pool_backward(
    dy: Tensor, x: Tensor, y: Tensor, dx: Tensor, size: int, cuts: bool = False, kernels: str = "auto"
) -> None:
    """Fill the windows of dx from dy, laid out in any way; what lies behind the last window stays."""
    r, c, h, w, b = x.shape
    _check_images({"x": x, "y": y}, size)
    _check_images({"dx": dx, "y": y}, size)
    if dy.shape != y.shape or dy.dtype != torch.float32:
        raise ValueError(f"expected dy as fp32 {list(y.shape)}, got {dy.dtype} {list(dy.shape)}")
    if not use_triton(kernels, x):
        for to, of in zip(
            _windows(dx, size), _windows(reference_max_pool_backward(dy, x, size, cuts), size), strict=True
        ):
            to.copy_(of)
        return
    with torch.cuda.device_of(x):
        _max_pool_backward_kernel[(r * b * triton.cdiv(y[0, ..., 0].numel(), BLOCK),)](
            *(dy, x, y, dx, b, c, h, w, *dy.stride()),
            CUTS=cuts,
            SIZE=size,
            BLOCK=BLOCK,
            num_warps=4,
            num_stages=1,
        )


def _check_images(images: dict[str, Tensor], size: int) -> None:
    """Of a pool's input and output."""
    x, y = images.values()
    r, c, h, w, b = x.shape
    for t, shape in ((x, (r, c, h, w, b)), (y, (r, c, h // size, w // size, b))):
        if t.dtype != torch.float32 or t.shape != shape or not is_channels_last(t) or not t.numel():
            raise ValueError(
                f"expected {' and '.join(images)} channels-last in fp32, windows of {size}, got {t.dtype} "
                f"{list(t.shape)}, strides {list(t.stride())}"
            )
    if x[0, ..., 0].numel() >= 2**31:
        raise ValueError(f"expected images of less than 2^31 numbers, got {list(x.shape)}")


@torch.no_grad()
def cross_entropy_grad(
    logits: Tensor, labels: Tensor, bias: Tensor | None = None, kernels: str = "auto"
) -> Tensor:
    """Gradient of the mean cross-entropy of `logits` [R, classes, B], or of logits + bias, laid out alike."""
    r, c, b = logits.shape
    _check("labels", labels, torch.int64, (r, b))
    if logits.dtype != torch.float32:
        raise ValueError(f"expected logits as fp32, got {logits.dtype}")
    if bias is not None:
        _check_bias(bias, r, c)
    if not use_triton(kernels, logits):
        return reference_cross_entropy_grad(logits, labels, bias)
    dlogits = torch.empty_like(logits)
    with torch.cuda.device_of(logits):
        _cross_entropy_grad_kernel[(r * triton.cdiv(b, ROWS),)](
            *(logits, bias, labels, dlogits, b, c, *logits.stride(), *dlogits.stride()),
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            ROWS=ROWS,
            CLASSES=triton.next_power_of_2(c),
            num_warps=4,
            num_stages=1,
        )
    return dlogits


def _check(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t.dtype != dtype or t.shape != shape or not t.is_contiguous():
        raise ValueError(
            f"expected {name} as contiguous {dtype} {list(shape)}, got {t.dtype} {list(t.shape)}, "
            f"strides {list(t.stride())}"
        )


def _check_bias(bias: Tensor, r: int, n: int) -> None:
    if bias.dtype != torch.float32 or bias.shape != (r, n) or (n > 1 and bias.stride(1) != 1):
        raise ValueError(
            f"expected the bias as fp32 [{r}, {n}], a replica's in a row, got {bias.dtype} "
            f"{list(bias.shape)}, strides {list(bias.stride())}"
        )
