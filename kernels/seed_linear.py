r"""Linear layer of a strong ticket: weights that nobody stores, under a mask of one bit each.

    Y = X W^T + b,    W[n, k] = M[n, k] v[n, k],    v[n, k] = s or -s by bit k % 32 of word(n, k / 32, 0)
    dX = dY W,        dS[n, k] = v[n, k] sum_b dY[b, n] X[b, k],        db = sum_b dY[b]

| name     | shape               | dtype                                    Floor of y or dx, t = itemsize:
| x, dx    | [B, K]              | fp32, fp16, bf16; any strides            bytes = NK / 8 + t B (N + K)
| bits     | [N, ceil(K / 8)]    | uint8: the mask M, packed                FLOPs = 2 B N K
| bias, db | [N]                 | as x, or None                            of dS:
| s, ds    | [N, K]              | fp32, or as x; scores                    bytes = t B (N + K) + |dS|
| y, dy    | [B, N]              | as x

v is that of `hash_weights` (signed-constant, generation 0) for the layer's seed and number, and s its
Kaiming constant. The score gradient is straight-through (edge-popup, Ramanujan et al. 2020): of W = M(S) v
the mask is a step function of the scores, and dL/dS is taken to be dL/dW v = (dL/dY)^T X v, pruned or not.

C on a CPU, fp32. A vector holds 16 rows of W (AVX2: 8), and 32 signs of each are hashed at once, in 19
operations. What four columns of x (AVX2: three) can add up to, 16 sums, is one register; four bits of the
mask are a place in it: those without the hash's bit are looked up and added, those with it looked up and
subtracted. Six operations make 64 products, and four each of further columns of the batch; tables serve all
rows. A pruned weight is no factor, so nothing reaches y through it. Beyond LUT_BATCH rows of x, and for
gradients, W is made a few rows at a time in the cache (0.13 ns a weight), for torch's products; there a zero
is a factor. Sums are in fp32 and do not depend on threads.

One thread of an AMD EPYC (Zen 4), batch 1, in ms at 2048 | 4096 | 8192 square: AVX-512 0.18 | 0.71 | 3.0,
AVX2 0.29 | 1.2 | 5, MKL's dense product 0.43 | 3.1 | 11.5. Memory is 1/32 of fp32's.

Triton, in tensor cores. A weight is 2, -2 or 0, in 16 bits its upper two: one of the mask, one of mask and
hash. Two words of such pairs of bits, of even and of odd columns, are shifted 8 times each and give two
weights every time: two instructions a pair, and 25 a word of 32. Columns come in the order in which a
thread's registers hold a tensor core's left operand, so that no weight changes threads; x is put in that
order on its way through shared memory; s / 2 is multiplied in at the end. Zeros are factors: what is not
finite in a row of x reaches all of its row of y. K is cut into parts to fill a device, and a second kernel
adds them up, in order.

8192 square, bf16, batch 1 to 16, sm_90 by Triton 3.6; not measured.
bytes      8.4 MB of mask, 1/16 of dense; 0.5 of x and y; 2 of sums, twice, stay in the L2 cache
main loop  668 instructions a warp for 256 weights a thread, 290 of them for the integer pipe, at half rate;
           two warps a scheduler, 8 turns a multiprocessor: 10,700 cycles, 6.1 us at 1.755 GHz, and this
           bounds (bytes: 2.8 us at 3.0 TB/s, 2.0 at 4.3)
in flight  two programs of 91 registers a multiprocessor, two stages of 8 KB of mask and 16 KB of x ahead
launches   2
expected   start 2.5 us, sums 3: 11.6 us; H100: dense 47, 4.1x; H200: dense 34 to 36, 3.0x
goal       3x of dense
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native, hash_weights
from sparselth.kernels._choose import choose
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._tiles import Tile, _sum_kernel, kind, precision
from sparselth.kernels._triton import INTERPRET, tl, triton
from sparselth.kernels.bitmask import pack, reference_unpack
from sparselth.kernels.hash_weights import Keys, row_keys, word

LAW = "signed-constant"
LUT_BATCH = 48  # rows of x: more are left to a dense product of rows that are made in the cache
MADE = 1 << 18  # weights that are made at a time, 1 MB


@dataclass(frozen=True, eq=False)
class SeedWeight:
    """The weights of a layer of a strong ticket: a mask, and where the rest comes from."""

    shape: tuple[int, ...]  # [N, K], or [N, C, kh, kw]
    bits: Tensor  # [N, ceil(K / 8)], K of a filter flattened
    seed: int
    layer: int
    gain: float = 1.0

    def __post_init__(self) -> None:
        n, k = hash_weights.matrix(self.shape)
        if self.bits.dtype != torch.uint8 or self.bits.shape != (n, -(-k // 8)):
            raise ValueError(
                f"bits: expected uint8 [{n}, {-(-k // 8)}] for weights {list(self.shape)}, "
                f"got {self.bits.dtype} {list(self.bits.shape)}"
            )
        _ = self.keys  # refuses what is no seed or layer

    @staticmethod
    def of(mask: Tensor, seed: int, layer: int, gain: float = 1.0) -> SeedWeight:
        """From a mask of the weights' shape, 0 where pruned."""
        return SeedWeight(tuple(mask.shape), pack(mask.flatten(1)), seed, layer, gain)

    @cached_property
    def keys(self) -> Keys:
        return Keys.of(self.seed, self.layer, LAW)

    @cached_property
    def scale(self) -> float:
        """The size of every weight."""
        return hash_weights.scale(LAW, hash_weights.matrix(self.shape)[1], self.gain)

    def bytes(self) -> int:
        """Memory of the weights."""
        return self.bits.numel()

    def frozen(self) -> Tensor:
        """All weights, pruned or not, in fp32."""
        return hash_weights.hash_weights(
            self.seed, self.layer, self.shape, LAW, gain=self.gain, device=self.bits.device
        )

    def to_dense(self) -> Tensor:
        """The weights in fp32, 0 where pruned."""
        k = hash_weights.matrix(self.shape)[1]
        return torch.where(reference_unpack(self.bits, k).view(self.shape), self.frozen(), 0)


def dense(keys: list[int], s: float, bits: Tensor | None, n: int, k: int, like: Tensor) -> Tensor:
    """W [N, K] by torch, or v where `bits` is None, in fp32 or in the wider dtype of `like`."""
    v = hash_weights.reference(Keys(*keys), LAW, s, 0, n, k, 0).to(like.device, wide(like).dtype)
    return v if bits is None else torch.where(reference_unpack(bits, k), v, 0)


def wide(t: Tensor) -> Tensor:
    """s is rounded to fp32 and to nothing less."""
    return t if t.itemsize > 2 else t.float()


def reference(x: Tensor, bits: Tensor, bias: Tensor | None, keys: list[int], s: float) -> Tensor:
    w = dense(keys, s, bits, len(bits), x.shape[1], x)
    return F.linear(wide(x), w, None if bias is None else wide(bias)).to(x.dtype)


def reference_dx(dy: Tensor, bits: Tensor, k: int, keys: list[int], s: float) -> Tensor:
    return (wide(dy) @ dense(keys, s, bits, len(bits), k, dy)).to(dy.dtype)


def reference_ds(dy: Tensor, x: Tensor, keys: list[int], s: float, dtype: torch.dtype) -> Tensor:
    v = dense(keys, s, None, dy.shape[1], x.shape[1], x)
    return ((wide(dy).t() @ wide(x)) * v).to(dtype)


def floor(n: int, k: int, batch: int, itemsize: int) -> dict[str, int]:
    """Bytes and FLOPs of y or dx."""
    return {"bytes": n * -(-k // 8) + itemsize * batch * (n + k), "flops": 2 * batch * n * k}


# C


def bind_seed_linear(w: SeedWeight, x: Tensor, bias: Tensor | None, y: Tensor) -> Callable[[], None]:
    """A function that computes y by the C kernel: one foreign call on fixed tensors, fp32 on a CPU."""
    return _bind(w.bits, x, bias, y, w.keys, w.scale)


def _bind(
    bits: Tensor, x: Tensor, bias: Tensor | None, y: Tensor, keys: Keys, s: float
) -> Callable[[], None]:
    (batch, k), n = x.shape, len(bits)
    _native.check("bits", bits, (n, -(-k // 8)), torch.uint8, contiguous=True)
    _native.check("x", x, (batch, k))
    _native.check("y", y, (batch, n))
    for name, t in (("x", x), ("y", y)):
        if t.shape[1] > 1 and t.stride(1) != 1:
            raise ValueError(f"{name}: expected the numbers of a row side by side, got strides {t.stride()}")
    _native.vector("bias", bias, n)
    arguments = _Linear(
        x=x.data_ptr(),
        bits=bits.data_ptr(),
        bias=_native.address(bias),
        y=y.data_ptr(),
        rows=n,
        columns=k,
        batch=batch,
        ldx=x.stride(0),
        ldy=y.stride(0),
        key=keys,
        generation=0,
        scale=s,
        threads=min(_native.threads(), 1 + n * k // WORK),
    )
    return _native.bind("seed_linear", arguments, bits, x, bias, y)


WORK = 1 << 19  # weights that are worth a thread


class _Linear(ctypes.Structure):  # struct seed_linear
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "bits", "bias", "y")],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "batch", "ldx", "ldy")],
        ("key", ctypes.c_uint32 * 4),
        ("generation", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def tiles(n: int, k: int) -> list[tuple[int, int]]:
    """Rows that are made at a time."""
    step = max(1, MADE // k)
    return [(first, min(first + step, n)) for first in range(0, n, step)]


def native_linear(x: Tensor, bits: Tensor, bias: Tensor | None, keys: list[int], s: float) -> Tensor:
    (batch, k), n, bits = x.shape, len(bits), bits.contiguous()
    y = torch.empty(batch, n, dtype=torch.float32, device="cpu")
    x, bias = x.detach().contiguous(), None if bias is None else bias.detach().contiguous()
    if batch <= LUT_BATCH:
        _bind(bits, x, bias, y, Keys(*keys), s)()
        return y
    some = torch.empty(min(n, max(1, MADE // k)), k, dtype=torch.float32, device="cpu")
    for first, end in tiles(n, k):
        w = some[: end - first]
        hash_weights.fill(w, Keys(*keys), LAW, s, first, bits=bits[first:end])
        y[:, first:end] = F.linear(x, w, None if bias is None else bias[first:end])
    return y


def native_dx(dy: Tensor, bits: Tensor, k: int, keys: list[int], s: float) -> Tensor:
    n, bits, dy = len(bits), bits.contiguous(), dy.detach()
    dx = torch.zeros(len(dy), k, dtype=torch.float32, device="cpu")
    some = torch.empty(min(n, max(1, MADE // k)), k, dtype=torch.float32, device="cpu")
    for first, end in tiles(n, k):
        w = some[: end - first]
        hash_weights.fill(w, Keys(*keys), LAW, s, first, bits=bits[first:end])
        dx.addmm_(dy[:, first:end], w)
    return dx


def native_ds(dy: Tensor, x: Tensor, keys: list[int], s: float) -> Tensor:
    n, k = dy.shape[1], x.shape[1]
    ds = torch.empty(n, k, dtype=torch.float32, device="cpu")
    for first, end in tiles(n, k):
        torch.mm(dy.detach()[:, first:end].t(), x.detach(), out=ds[first:end])
        hash_weights.fill(ds[first:end], Keys(*keys), LAW, s, first, multiply=True)
    return ds


# Triton

ROWS, DEPTH, WARPS = 128, 512, 8  # of W that a program of the fast kernel has, all at once and at a time
FILLED, PARTS = 264, 16  # programs: two on each multiprocessor of an H200; most parts of K


# Of the general kernels: rows of the result's matrix, columns, and steps along the sum
TILES = {
    "half": Tile(64, 64, 64, 4, 3),
    "tf32": Tile(64, 64, 32, 4, 3),
    "ieee": Tile(32, 64, 32, 4, 2),
}
COLUMNS = {16: 3, 64: 2}  # of the fast kernel, and its stages


@triton.jit
def _fields(mask, signs):
    """Words of 16 pairs of bits, of even columns and of odd ones: mask, and above it mask and sign."""
    minus = mask & signs
    even = (mask & 0x55555555) | ((minus << 1) & 0xAAAAAAAA)
    return even, ((mask >> 1) & 0x55555555) | (minus & 0xAAAAAAAA)


@triton.jit
def _two(pairs, PLACE: tl.constexpr, INTERPRET: tl.constexpr):
    """The numbers of pairs PLACE and PLACE + 8, as bits: [..., 2]."""
    both = (pairs << (14 - 2 * PLACE)) & 0xC000C000
    if INTERPRET:
        low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
    else:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [both], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    return tl.join(low, high)


@triton.jit
def _four(even, odd, PLACE: tl.constexpr, INTERPRET: tl.constexpr):
    return tl.join(_two(even, PLACE, INTERPRET), _two(odd, PLACE, INTERPRET))


@triton.jit
def _left(even, odd, dtype, INTERPRET: tl.constexpr):
    """[128, 4] words as [128, 128] numbers, none of which changes threads on its way to a tensor core.

    Column 16 s + 8 h + 2 t + u is bit 2 s + h + 16 u of word t; row 16 w + 8 r + g comes as 64 r + 8 w + g.
    """
    a = tl.join(_four(even, odd, 0, INTERPRET), _four(even, odd, 1, INTERPRET))
    b = tl.join(_four(even, odd, 2, INTERPRET), _four(even, odd, 3, INTERPRET))
    c = tl.join(_four(even, odd, 4, INTERPRET), _four(even, odd, 5, INTERPRET))
    d = tl.join(_four(even, odd, 6, INTERPRET), _four(even, odd, 7, INTERPRET))
    w = tl.join(tl.join(a, b), tl.join(c, d))  # [128, t, u, h, s, s, s]
    w = tl.reshape(w, (2, 8, 8, 4, 2, 2, 2, 2, 2))
    w = tl.permute(w, (1, 0, 2, 8, 7, 6, 5, 3, 4))
    return tl.reshape(w, (128, 128)).to(dtype, bitcast=True)


@triton.jit
def _right(x_ptrs, in_x, INTERPRET: tl.constexpr):
    """[BB, 4, 32] of x as [128, BB], its columns in the order of `_left`."""
    x = tl.load(x_ptrs, mask=in_x, other=0.0)
    x = tl.reshape(x, (x.shape[0], 4, 2, 8, 2))
    x = tl.reshape(tl.permute(x, (3, 4, 1, 2, 0)), (128, x.shape[0]))
    return x.to(tl.float32) if INTERPRET else x


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3"])
def _half_kernel(
    x_ptr,
    words_ptr,
    bias_ptr,
    out_ptr,
    B,
    N,
    K,
    words,
    parts,
    turns,
    stride_xb,
    k0,
    k1,
    k2,
    k3,
    scale,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[part, b, n] = scale sum over the part's columns of x[b, k] W[n, k] / s + bias[n]; 16-bit x."""
    blocks = (N + 127) // 128
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    part, first_b = rest % parts, rest // parts * BLOCK_B
    begin = part * turns
    end = tl.minimum(begin + turns, (words + 15) // 16)

    offs_l = tl.arange(0, 128)  # rows in the order of `_left`
    offs_m = offs_l // 8 % 8 * 16 + offs_l // 64 * 8 + offs_l % 8
    offs_w = tl.arange(0, 16)
    offs_t = tl.arange(0, 4)
    offs_c = tl.arange(0, 32)
    offs_b = tl.arange(0, BLOCK_B)
    row = block * 128 + offs_m
    p, q = row_keys(row.to(tl.uint32), k0, k1, k2, k3)
    in_m = row < N
    words_ptrs = words_ptr + row.to(tl.int64)[:, None] * words + offs_w[None, :] + begin * 16
    place = offs_t[None, :, None] * 128 + offs_c[None, None, :]
    in_b = (offs_b < B - first_b)[:, None, None]
    b = (first_b + offs_b).to(tl.int64)[:, None, None]
    x_ptrs = x_ptr + b * stride_xb + begin * 512 + place

    acc = tl.zeros((128, BLOCK_B), tl.float32)
    for turn in range(begin, end):
        counter = turn * 16 + offs_w
        mask = tl.load(words_ptrs, mask=in_m[:, None] & ((counter < words) | EVEN_K)[None, :], other=0)
        signs = word(counter.to(tl.uint32)[None, :], p[:, None], q[:, None])
        even, odd = _fields(mask.to(tl.uint32, bitcast=True), signs)
        even_0, even_1 = tl.split(tl.reshape(even, (128, 4, 2, 2)))
        odd_0, odd_1 = tl.split(tl.reshape(odd, (128, 4, 2, 2)))
        even_0, even_2 = tl.split(even_0)
        even_1, even_3 = tl.split(even_1)
        odd_0, odd_2 = tl.split(odd_0)
        odd_1, odd_3 = tl.split(odd_1)
        left = K - turn * 512
        for j in tl.static_range(4):
            x = _right(x_ptrs + 32 * j, in_b & ((place < left - 32 * j) | EVEN_K), INTERPRET)
            if j == 0:
                w = _left(even_0, odd_0, x_ptr.dtype.element_ty, INTERPRET)
            elif j == 1:
                w = _left(even_1, odd_1, x_ptr.dtype.element_ty, INTERPRET)
            elif j == 2:
                w = _left(even_2, odd_2, x_ptr.dtype.element_ty, INTERPRET)
            else:
                w = _left(even_3, odd_3, x_ptr.dtype.element_ty, INTERPRET)
            if INTERPRET:
                w = w.to(tl.float32)
            acc = tl.dot(w, x, acc)
        words_ptrs += 16
        x_ptrs += 512
    acc *= scale * 0.5  # a weight was 2
    offs_n = block * 128 + tl.arange(0, 128)
    in_n = offs_n < N
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_ptr += (part.to(tl.int64) * B + first_b) * N
    out_ptrs = out_ptr + offs_b.to(tl.int64)[:, None] * N + offs_n[None, :]
    out = tl.trans(acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=(offs_b < B - first_b)[:, None] & in_n[None, :])


@triton.jit
def _numbers(mask, signs, dtype):
    """[R, W] words as [R, 32 W] numbers: 2, -2, or 0 where the mask is."""
    place = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    kept, minus = (mask[:, :, None] >> place) & 1, ((mask & signs)[:, :, None] >> place) & 1
    if dtype == tl.float32:
        found = ((kept << 30) | (minus << 31)).to(tl.float32, bitcast=True)
    else:
        found = ((kept << 14) | (minus << 15)).to(tl.uint16).to(dtype, bitcast=True)
    return tl.reshape(found, (mask.shape[0], 32 * mask.shape[1]))


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3"])
def _product_kernel(
    v_ptr,
    words_ptr,
    bias_ptr,
    out_ptr,
    B,
    M,
    C,
    words,
    stride_vb,
    k0,
    k1,
    k2,
    k3,
    scale,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[b, m] = sum_c W[m, c] v[b, c] + bias[m], or if TRANSPOSED sum_c v[b, c] W[c, m]."""
    tiles_b = tl.cdiv(B, BLOCK_B)
    first_m = (tl.program_id(0) // tiles_b).to(tl.int64) * BLOCK_M
    first_b = (tl.program_id(0) % tiles_b).to(tl.int64) * BLOCK_B
    offs_m, offs_b, offs_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_C)
    in_m = offs_m < (M - first_m).to(tl.int32)
    in_b = offs_b < (B - first_b).to(tl.int32)
    v_ptr += first_b * stride_vb
    if TRANSPOSED:
        v_ptrs = v_ptr + offs_b.to(tl.int64)[:, None] * stride_vb + offs_c[None, :]
        acc = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    else:
        v_ptrs = v_ptr + offs_b.to(tl.int64)[None, :] * stride_vb + offs_c[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
        p, q = row_keys((first_m + offs_m).to(tl.uint32), k0, k1, k2, k3)
    tl.assume(C > 0)  # else ptxas waits for each product before the next
    for c in range(0, C, BLOCK_C):
        in_c = offs_c < C - c
        if TRANSPOSED:
            v = tl.load(v_ptrs + c, mask=in_b[:, None] & in_c[None, :], other=0.0)
            row, in_row = c + offs_c, in_c
            counter = first_m // 32 + tl.arange(0, BLOCK_M // 32)
            p, q = row_keys(row.to(tl.uint32), k0, k1, k2, k3)
        else:
            v = tl.load(v_ptrs + c, mask=in_c[:, None] & in_b[None, :], other=0.0)
            row, in_row = first_m + offs_m, in_m
            counter = c // 32 + tl.arange(0, BLOCK_C // 32)
        places = words_ptr + row.to(tl.int64)[:, None] * words + counter[None, :]
        mask = tl.load(places, mask=in_row[:, None] & (counter < words)[None, :], other=0)
        signs = word(counter.to(tl.uint32)[None, :], p[:, None], q[:, None])
        w = _numbers(mask.to(tl.uint32, bitcast=True), signs, v_ptr.dtype.element_ty)
        if INTERPRET:
            w = w.to(tl.float32)
            v = v.to(tl.float32)
        if TRANSPOSED:
            acc = tl.dot(v, w, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(w, v, acc, input_precision=PRECISION)
    acc *= scale * 0.5
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_m + offs_m, mask=in_m, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + (first_b + offs_b)[:, None] * M + (first_m + offs_m)[None, :]
    out = (acc if TRANSPOSED else tl.trans(acc)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_b[:, None] & in_m[None, :])


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3"])
def _score_grad_kernel(
    dy_ptr,
    x_ptr,
    out_ptr,
    B,
    N,
    K,
    stride_dyb,
    stride_xb,
    k0,
    k1,
    k2,
    k3,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[n, k] = v[n, k] sum_b dy[b, n] x[b, k]"""
    tiles_k = tl.cdiv(K, BLOCK_K)
    first_n = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_N
    first_k = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K
    offs_n, offs_k, offs_b = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_B)
    in_n = offs_n < (N - first_n).to(tl.int32)
    in_k = offs_k < (K - first_k).to(tl.int32)
    dy_ptrs = dy_ptr + (first_n + offs_n)[:, None] + offs_b.to(tl.int64)[None, :] * stride_dyb
    x_ptrs = x_ptr + offs_b.to(tl.int64)[:, None] * stride_xb + (first_k + offs_k)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for b in range(0, B, BLOCK_B):
        in_b = offs_b < B - b
        dy = tl.load(dy_ptrs, mask=in_n[:, None] & in_b[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=in_b[:, None] & in_k[None, :], other=0.0)
        if INTERPRET:
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
        dy_ptrs += BLOCK_B * stride_dyb
        x_ptrs += BLOCK_B * stride_xb
    p, q = row_keys((first_n + offs_n).to(tl.uint32), k0, k1, k2, k3)
    counter = (first_k // 32 + tl.arange(0, BLOCK_K // 32)).to(tl.uint32)
    signs = word(counter[None, :], p[:, None], q[:, None])[:, :, None] >> tl.arange(0, 32).to(tl.uint32)
    minus = tl.reshape((signs & 1).to(tl.int32), (BLOCK_N, BLOCK_K))
    acc = tl.where(minus != 0, -scale, scale) * acc
    out_ptrs = out_ptr + (first_n + offs_n)[:, None] * K + (first_k + offs_k)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_k[None, :])


def _words(bits: Tensor) -> Tensor:
    """The mask in words of 32 columns, [N, words] int32: itself, or a copy where its rows are no words."""
    if (ragged := -bits.shape[1] % 4) or bits.stride(1) != 1 or bits.stride(0) % 4 or bits.data_ptr() % 16:
        bits = F.pad(bits, (0, ragged)).contiguous()
    return bits.contiguous().view(torch.int32)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def cut(n: int, k: int, batch: int) -> tuple[int, int, int]:
    """Columns of a tile, parts of K and turns of each, for the fast kernel."""
    columns = next((c for c in COLUMNS if c >= batch), 64)
    programs, all_turns = -(-n // ROWS) * -(-batch // columns), -(-k // DEPTH)
    turns = -(-all_turns // max(1, min(PARTS, all_turns, FILLED // programs)))
    return columns, -(-all_turns // turns), turns


def launch(x: Tensor, bits: Tensor, bias: Tensor | None, keys: list[int], s: float) -> Tensor:
    if x.itemsize == 4:
        return launch_product(x, bits, bias, len(bits), keys, s, transposed=False)
    x, (batch, k), n = _rows(x), x.shape, len(bits)
    words, bias = _words(bits), None if bias is None else bias.contiguous()
    y = x.new_empty(batch, n)
    columns, parts, turns = cut(n, k, batch)
    out = y if parts == 1 else x.new_empty(parts, batch, n, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _half_kernel[(-(-n // ROWS) * parts * -(-batch // columns),)](
            x,
            words,
            bias if parts == 1 else None,
            out,
            batch,
            n,
            k,
            words.shape[1],
            parts,
            turns,
            x.stride(0),
            *Keys(*keys).signed(),
            s,
            HAS_BIAS=parts == 1 and bias is not None,
            EVEN_K=k % DEPTH == 0,
            BLOCK_B=columns,
            INTERPRET=INTERPRET,
            num_warps=WARPS,
            num_stages=COLUMNS[columns],
        )
        if parts > 1:
            _sum_kernel[(-(-y.numel() // 1024),)](
                out, bias, y, y.numel(), n, parts, HAS_BIAS=bias is not None, RELU=False, SIZE=1024
            )
    return y


def launch_product(
    v: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    m: int,
    keys: list[int],
    s: float,
    transposed: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """v W^T + bias, or v W if transposed: [B, m] in `dtype`, by default that of v."""
    v, (batch, c) = _rows(v), v.shape
    words, bias = _words(bits), None if bias is None else bias.contiguous()
    out, name = v.new_empty(batch, m, dtype=dtype or v.dtype), kind(v.dtype)
    tile = TILES[name]
    with torch.cuda.device_of(v):
        _product_kernel[(-(-m // tile.rows) * -(-batch // tile.columns),)](
            v,
            words,
            bias,
            out,
            batch,
            m,
            c,
            words.shape[1],
            v.stride(0),
            *Keys(*keys).signed(),
            s,
            TRANSPOSED=transposed,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.rows,
            BLOCK_B=tile.columns,
            BLOCK_C=tile.depth,
            PRECISION=precision(name),
            INTERPRET=INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def launch_ds(dy: Tensor, x: Tensor, keys: list[int], s: float, dtype: torch.dtype) -> Tensor:
    dy, x, n, k = _rows(dy), _rows(x), dy.shape[1], x.shape[1]
    out, name = x.new_empty(n, k, dtype=dtype), kind(x.dtype)
    tile = TILES[name]
    with torch.cuda.device_of(x):
        _score_grad_kernel[(-(-n // tile.rows) * -(-k // tile.columns),)](
            dy,
            x,
            out,
            len(x),
            n,
            k,
            dy.stride(0),
            x.stride(0),
            *Keys(*keys).signed(),
            s,
            BLOCK_N=tile.rows,
            BLOCK_K=tile.columns,
            BLOCK_B=tile.depth,
            PRECISION=precision(name),
            INTERPRET=INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


# The op


def seed_linear(
    x: Tensor,
    w: SeedWeight,
    bias: Tensor | None = None,
    scores: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """x W^T + bias as [B, N], of frozen weights under their mask.

    x is [B, K]. Differentiable in x, bias and scores [N, K], whose values do not matter: they are what the
    mask was drawn from, and receive dL/dW v, pruned or not (straight through the mask). `kernels`: "triton",
    "native" (C, fp32 on a CPU), "reference" (torch), or "auto", the first that is there.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    n, k = hash_weights.matrix(w.shape)
    tensors = {"x": x, "bits": w.bits, "bias": bias, "scores": scores}
    present = {name: t for name, t in tensors.items() if t is not None}
    got = ", ".join(f"{name} {t.dtype}{list(t.shape)} on {t.device}" for name, t in present.items())
    shapes = {"bias": (n,), "scores": (n, k)}
    if (
        x.ndim != 2
        or x.shape[1] != k
        or not len(x)
        or any(present[i].shape != shapes[i] for i in shapes & present.keys())
    ):
        raise ValueError(f"expected x[B, {k}], B at least 1, bias[{n}] and scores[{n}, {k}]; got {got}")
    if not x.is_floating_point() or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"expected x and bias of one floating-point dtype; got {got}")
    if any(t.device != x.device for t in present.values()):
        raise ValueError(f"expected all on one device; got {got}")
    return _forward(x, w.bits, bias, scores, list(w.keys), w.scale, kernels)  # type: ignore[no-any-return]


def _backend(kernels: str, t: Tensor) -> str:
    own = (
        ("triton", "native", "reference")
        if t.is_cpu and t.dtype == torch.float32
        else ("triton", "reference")
    )
    return choose(kernels, own, t)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bits, _, scores, ctx.keys, ctx.s, ctx.kernels = inputs
    ctx.save_for_backward(x, bits)
    ctx.dtype = None if scores is None else scores.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x, bits), needs = ctx.saved_tensors, ctx.needs_input_grad
    return (
        _dx(dy, bits, x.shape[1], ctx.keys, ctx.s, ctx.kernels) if needs[0] else None,
        None,
        dy.sum(0) if needs[2] else None,
        _ds(dy, x, ctx.keys, ctx.s, ctx.dtype, ctx.kernels) if needs[3] else None,
        *(None, None, None),
    )


@operator("seed_linear", _backward, _save)
def _forward(
    x: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    keys: list[int],
    s: float,
    kernels: str,
) -> Tensor:
    return {"triton": launch, "native": native_linear, "reference": reference}[_backend(kernels, x)](
        x, bits, bias, keys, s
    )


@operator("seed_linear_dx")
def _dx(dy: Tensor, bits: Tensor, k: int, keys: list[int], s: float, kernels: str) -> Tensor:
    backend = _backend(kernels, dy)
    if backend == "triton":
        return launch_product(dy, bits, None, k, keys, s, transposed=True)
    return (native_dx if backend == "native" else reference_dx)(dy, bits, k, keys, s)


@operator("seed_linear_ds")
def _ds(dy: Tensor, x: Tensor, keys: list[int], s: float, dtype: torch.dtype, kernels: str) -> Tensor:
    backend = _backend(kernels, dy)
    if backend == "native":
        return native_ds(dy, x, keys, s).to(dtype)
    return (launch_ds if backend == "triton" else reference_ds)(dy, x, keys, s, dtype)


@fake(_forward)
def _(x, bits, bias, scores, keys, s, kernels):
    return x.new_empty(x.shape[0], bits.shape[0])


@fake(_dx)
def _(dy, bits, k, keys, s, kernels):
    return dy.new_empty(dy.shape[0], k)


@fake(_ds)
def _(dy, x, keys, s, dtype, kernels):
    return x.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
