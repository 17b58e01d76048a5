r"""Weights that are never trained need no memory: each is a hash of its place.

    word(row, c, g) = H(c; H(row; k0, k1), H(row; k2, k3) + g 0x9E3779B9)      32 bits, all modulo 2^32
    H(c; p, q)      = M(M(c + p) ^ q)
    M(x):             x ^= x >> 16; x *= 0x21F0AAAD; x ^= x >> 15; x *= 0xD35A2D97; x ^= x >> 15

    signed-constant   w = -s where bit column % 32 of word(row, column / 32, g) is 1, else s
    uniform           w = (2 (u >> 8) + 1 - 2^24) 2^-24 s                      u = word(row, column, g)
    normal            w = +-Q((2 (u >> 8 & 0x7FFFFF) + 1) 2^-25) s             minus where bit 31 of u is 1
    s                 = gain sqrt(2 / fan_in), of the uniform gain sqrt(6 / fan_in), rounded to fp32

k0 to k3 are the first 16 bytes of SHA-256 of "sparselth/frozen/SEED/LAYER/LAW", little-endian. A layer is a
matrix: row is a place along its first axis, column one in all others, flattened; fan_in is the number of
columns. So a weight depends on (seed, layer, law, row, column, generation) and on nothing else: not on who
computes it, nor on which others, nor, but for s, on the layer's size. Rows and columns are counted in 32
bits each, the weights of a layer in 64. A redraw (IteRand, Chijiwa et al. 2021) is the next generation of a
weight: what is kept is a count.

The same bits everywhere: integers of 32 bits (of 64 for a product in Q), one conversion to fp32 and one
product with s, each rounded once. Q, the normal's quantile, is a table of 24 octaves x 64 steps in units of
2^-28, linear in between: the bits of an odd integer as fp32 are the place in the table. It is off by 2e-5 at
most, and the largest |w| is 5.4 s. The table is made by arithmetic that rounds correctly on every machine;
the logarithm of libm has no part in it.

Why this hash: M was found by search (hash-prospector; bias 0.11 where murmur3's finalizer has 0.26), and its
32-bit products are what AVX2 and GPUs multiply in hardware, unlike the 64-bit ones of Philox and Squares. One
round alone has nothing but a counter in it; two, with keys of the row's own before and between, leave no
trace of it. A word makes 32 signs: 0.6 operations a sign.

Floor: 4 bytes a weight written, 4 more read where generations are a tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import choose
from sparselth.kernels._triton import tl, triton

LAWS = ("signed-constant", "normal", "uniform")
GOLDEN = 0x9E3779B9
WORD = 0xFFFFFFFF
OCTAVES, STEPS = 24, 64
TILE = 2048  # weights of a program
CHUNK = 1 << 20  # weights that the reference makes at a time, in int64
WORK = 1 << 17  # weights that are worth a thread


class Keys(NamedTuple):
    """The four words that a layer's weights come from."""

    k0: int
    k1: int
    k2: int
    k3: int

    @staticmethod
    def of(seed: int, layer: int, law: str) -> Keys:
        for name, value, bits in (("seed", seed, 64), ("layer", layer, 32)):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name}: expected 0 to 2**{bits} - 1, got {value}")
        if law not in LAWS:
            raise ValueError(f"law: expected one of {', '.join(LAWS)}, got {law!r}")
        digest = hashlib.sha256(f"sparselth/frozen/{seed}/{layer}/{law}".encode()).digest()
        return Keys(*(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)))

    def signed(self) -> tuple[int, ...]:
        """As int32, which is what every value of a kernel's argument then is."""
        return tuple(k - (k >> 31 << 32) for k in self)


def scale(law: str, fan_in: int, gain: float = 1.0) -> float:
    """The s of a law, rounded to fp32."""
    s = gain * math.sqrt((6 if law == "uniform" else 2) / fan_in)
    return float(torch.tensor(s, dtype=torch.float32, device="cpu"))


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a layer's weights; raises ValueError where 32 bits do not count them."""
    rows, columns = (shape[0] if shape else 0), math.prod(shape[1:])
    if not shape or min(shape) < 1 or max(rows, columns) > 1 << 32:
        raise ValueError(
            f"shape: expected 1 to 2**32 rows and as many weights in each, got {list(shape)}; "
            "a layer without weights has nothing to draw"
        )
    return rows, columns


def mix(x: Tensor) -> Tensor:
    """M of int64 numbers below 2^32."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD & WORD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97 & WORD
    return x ^ (x >> 15)


def hashed(counter: Tensor, p: Tensor | int, q: Tensor | int) -> Tensor:
    """H of int64 numbers below 2^32."""
    return mix(mix(counter + p & WORD) ^ q)


def words(keys: Keys, rows: Tensor, counters: Tensor, generation: Tensor | int = 0) -> Tensor:
    """word(row, c, g) as int64; the three broadcast."""
    p, q = hashed(rows, keys.k0, keys.k1), hashed(rows, keys.k2, keys.k3)
    return hashed(counters, p, q + generation * GOLDEN & WORD)


@cache
def quantiles(device: torch.device | str = "cpu") -> Tensor:
    """Q at (1 + j / 64) 2^(i - 25), [64 i + j], and 0 at the end: int32 in units of 2^-28."""
    if torch.device(device).type != "cpu":
        return quantiles().to(device)
    places = (((STEPS + j) * 2.0 ** (i - 25 - 6)) for i in range(OCTAVES) for j in range(STEPS))
    found = [round(upper_quantile(p) * 2**28) for p in places]
    return torch.tensor([*found, 0], dtype=torch.int32, device="cpu")


def upper_quantile(p: float) -> float:
    """z with P(Z > z) = p, 0 < p <= 1/2, within 1e-15 (Wichura 1988, AS 241)."""
    q = 0.5 - p
    if q <= 0.425:
        r = 0.180625 - q * q
        return q * _ratio(CENTRE, r)
    with localcontext() as context:
        context.prec = 30
        r = float((-Decimal(p).ln()).sqrt())  # the logarithm of libm differs between machines
    return _ratio(MIDDLE, r - 1.6) if r <= 5.0 else _ratio(TAIL, r - 5.0)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: float) -> float:
    above, below = 0.0, 0.0
    for a, b in zip(*coefficients, strict=True):
        above, below = above * r + a, below * r + b
    return above / below


CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457)
    + (13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867)
    + (5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)
MIDDLE = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258)
    + (3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459)
    + (0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)
TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093)
    + (0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4)
    + (0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)


def reference(
    keys: Keys, law: str, s: float, first: int, rows: int, columns: int, generation: Tensor | int
) -> Tensor:
    device = generation.device if isinstance(generation, Tensor) else torch.device("cpu")
    out = torch.empty(rows, columns, dtype=torch.float32, device=device)
    column = torch.arange(columns, device=device)
    for some in torch.arange(rows, device=device).split(max(1, CHUNK // columns)):
        row = (some + first)[:, None]
        g = generation[some].long() if isinstance(generation, Tensor) else generation
        if law == "signed-constant":
            counter = column >> 5
            if not isinstance(generation, Tensor):  # a hash for 32 weights
                counter = torch.arange(-(-columns // 32), device=device)
            u = words(keys, row, counter, g)
            u = u if isinstance(generation, Tensor) else u[:, column >> 5]
            out[some] = (1 - 2 * (u >> (column & 31) & 1)).float() * s
            continue
        u = words(keys, row, column, g)
        if law == "uniform":
            out[some] = (2 * (u >> 8) + 1 - (1 << 24)).float() * (s * 2.0**-24)
        else:
            bits = (2 * (u >> 8 & 0x7FFFFF) + 1).float().view(torch.int32).long() - (127 << 23)
            at, table = bits >> 17, quantiles(device).long()
            z = table[at] - ((table[at] - table[at + 1]) * (bits & 0x1FFFF) >> 17)
            out[some] = torch.where((u >> 31).bool(), -z, z).float() * (s * 2.0**-28)
    return out


def floor(weights: int, redrawn: bool = False) -> dict[str, int]:
    """Bytes and FLOPs; `redrawn`: generations are a tensor."""
    return {"bytes": (8 if redrawn else 4) * weights, "flops": weights}


@triton.jit
def mixed(x):
    """M of uint32."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def row_keys(row, k0, k1, k2, k3):
    """The two words that a row's weights come from; `row` is uint32."""
    p = mixed(mixed(row + k0.to(tl.uint32)) ^ k1.to(tl.uint32))
    return p, mixed(mixed(row + k2.to(tl.uint32)) ^ k3.to(tl.uint32))


@triton.jit
def word(counter, p, q):
    """H of uint32, where q has its generation."""
    return mixed(mixed(counter + p) ^ q)


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3", "generation", "first"])
def _weights_kernel(
    generations_ptr,
    quantiles_ptr,
    out_ptr,
    rows,
    columns,
    k0,
    k1,
    k2,
    k3,
    generation,
    first,
    scale,
    LAW: tl.constexpr,
    GENERATIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, k] = weight of row first + n, column k; `first` modulo 2^32."""
    tiles = tl.cdiv(columns, BLOCK_K)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_K
    column = first_k + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offs = row[:, None] * columns + column[None, :]
    p, q = row_keys(row.to(tl.uint32) + first.to(tl.uint32), k0, k1, k2, k3)
    if GENERATIONS:
        g = tl.load(generations_ptr + offs, mask=inside, other=0).to(tl.uint32)
        q = q[:, None] + g * 0x9E3779B9
    else:
        q = q[:, None] + generation.to(tl.uint32) * 0x9E3779B9
    if LAW == "signed-constant":
        shift = (tl.arange(0, BLOCK_K) % 32).to(tl.uint32)[None, :]
        if GENERATIONS:
            u = word((column >> 5).to(tl.uint32)[None, :], p[:, None], q)
        else:  # a hash for 32 weights
            WORDS: tl.constexpr = BLOCK_K // 32
            counter = (first_k // 32).to(tl.uint32) + tl.arange(0, WORDS).to(tl.uint32)
            u = word(counter[None, :], p[:, None], q)
            u = tl.reshape(tl.broadcast_to(u[:, :, None], (BLOCK_N, WORDS, 32)), (BLOCK_N, BLOCK_K))
        w = tl.where(((u >> shift) & 1) != 0, -scale, scale)
    else:
        u = word(column.to(tl.uint32)[None, :], p[:, None], q)
        if LAW == "uniform":
            w = (2 * (u >> 8).to(tl.int32) + 1 - (1 << 24)).to(tl.float32) * scale
        else:
            odd = (2 * ((u >> 8) & 0x7FFFFF).to(tl.int32) + 1).to(tl.float32)
            bits = odd.to(tl.int32, bitcast=True) - (127 << 23)
            at = quantiles_ptr + (bits >> 17)
            z = tl.load(at, mask=inside, other=0)
            down = (z - tl.load(at + 1, mask=inside, other=0)).to(tl.int64) * (bits & 0x1FFFF)
            z -= (down >> 17).to(tl.int32)
            w = tl.where((u >> 31) != 0, -z, z).to(tl.float32) * scale
    tl.store(out_ptr + offs, w, mask=inside)


def launch(
    keys: Keys,
    law: str,
    s: float,
    first: int,
    rows: int,
    columns: int,
    generation: Tensor | int,
    device: torch.device,
) -> Tensor:
    out = torch.empty(rows, columns, dtype=torch.float32, device=device)
    many = isinstance(generation, Tensor)
    block_k = min(max(32, triton.next_power_of_2(columns)), TILE)
    block_n = TILE // block_k
    grid = triton.cdiv(rows, block_n) * triton.cdiv(columns, block_k)
    with torch.cuda.device_of(out):
        _weights_kernel[(grid,)](
            generation if many else None,
            quantiles(device) if law == "normal" else None,
            out,
            rows,
            columns,
            *keys.signed(),
            0 if many else generation,
            first - (first >> 31 << 32),
            s * UNIT[law],
            LAW=law,
            GENERATIONS=many,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
        )
    return out


UNIT = {"signed-constant": 1.0, "uniform": 2.0**-24, "normal": 2.0**-28}


def fill(
    out: Tensor,
    keys: Keys,
    law: str,
    s: float,
    first: int = 0,
    generation: Tensor | int = 0,
    bits: Tensor | None = None,
    multiply: bool = False,
) -> None:
    """By the C kernels: out [rows, columns] = weights of the rows from `first` on, 0 where `bits` are.

    bits [rows, ceil(columns / 8)] uint8 or None. `multiply`: times what `out` holds.
    """
    (rows, columns), many = out.shape, isinstance(generation, Tensor)
    _native.check("out", out, (rows, columns), contiguous=True)
    if isinstance(generation, Tensor):
        _native.check("generation", generation, (rows, columns), torch.int32, contiguous=True)
    if bits is not None:
        _native.check("bits", bits, (rows, -(-columns // 8)), torch.uint8, contiguous=True)
    table = quantiles() if law == "normal" else None
    arguments = _Weights(
        generations=_native.address(generation if isinstance(generation, Tensor) else None),
        bits=_native.address(bits),
        quantiles=_native.address(table),
        out=out.data_ptr(),
        first=first,
        rows=rows,
        columns=columns,
        key=keys,
        generation=0 if many else generation,
        scale=s * UNIT[law],
        law=LAWS.index(law),
        multiply=multiply,
        threads=min(_native.threads(), 1 + out.numel() // WORK),
    )
    _native.bind("hash_weights", arguments, out, generation, bits, table)()


class _Weights(ctypes.Structure):  # struct hash_weights
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("generations", "bits", "quantiles", "out")],
        *[(name, ctypes.c_int64) for name in ("first", "rows", "columns")],
        ("key", ctypes.c_uint32 * 4),
        ("generation", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        *[(name, ctypes.c_int32) for name in ("law", "multiply", "threads")],
    ]


def hash_weights(
    seed: int,
    layer: int,
    shape: Sequence[int],
    law: str = "signed-constant",
    generation: Tensor | int = 0,
    *,
    gain: float = 1.0,
    rows: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    kernels: str = "auto",
) -> Tensor:
    """The frozen weights of a layer, fp32: `shape`, or its rows first to end - 1 for rows = (first, end).

    `law` is one of LAWS, `gain` a factor of its scale. `generation`: how often weights were redrawn, one
    number or an integer tensor of the result's shape, on `device`, each from 0 to 2**31 - 1. `kernels`:
    "triton", "native" (C, on a CPU), "reference" (torch), or "auto", the first that is there. All give the
    same bits.
    Raises ValueError for what is no seed, layer, law, shape, range of rows or generation.
    """
    device = torch.device(device)
    keys, (n, columns) = Keys.of(seed, layer, law), matrix(shape)
    first, end = (0, n) if rows is None else rows
    if not 0 <= first <= end <= n:
        raise ValueError(f"rows: expected 0 <= first <= end <= {n}, got {rows}")
    if not math.isfinite(gain):
        raise ValueError(f"gain: expected a finite number, got {gain}")
    size = end - first
    out = (size, *shape[1:])
    if isinstance(generation, Tensor):
        if generation.shape != out or generation.is_floating_point() or generation.device.type != device.type:
            raise ValueError(
                f"generation: expected an integer, or integers {list(out)} on {device}, "
                f"got {generation.dtype} {list(generation.shape)} on {generation.device}"
            )
        ends = [int(g) for g in generation.detach().aminmax()] if size else []
        generation = generation.detach().reshape(size, columns).to(torch.int32).contiguous()
    else:
        ends = [generation]
    if wrong := [g for g in ends if not 0 <= g < 1 << 31]:
        raise ValueError(f"generation: expected 0 to 2**31 - 1, got {wrong[0]}")
    s = scale(law, columns, gain)
    like = torch.empty(0, dtype=torch.float32, device=device)
    has = ("triton", "native", "reference") if device.type == "cpu" else ("triton", "reference")
    backend = choose(kernels, has, like)
    if not size:
        return torch.empty(out, dtype=torch.float32, device=device)
    if backend == "triton":
        found = launch(keys, law, s, first, size, columns, generation, device)
    elif backend == "native":
        found = torch.empty(size, columns, dtype=torch.float32, device=device)
        fill(found, keys, law, s, first, generation)
    else:
        found = reference(keys, law, s, first, size, columns, generation)
        found = found.to(device)
    return found.view(out)
