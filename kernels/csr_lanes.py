r"""Inference with unstructured weights on CUDA devices, for batches up to 16:  y = act(W x + b)

| name   | shape       | dtype            |          Floor:
| packed | `LanedCsr` | fp32, fp16, bf16 |    bytes: values and their index, x and y once each
| x      | [K, B]      | as the values    |    FLOPs: 2 * kept * B, sums in fp32
| bias   | [N]         | as the values    |
| y      | [N, B]      | as the values    |

A pruned weight is not multiplied: NaN and infinity in x reach y through kept weights only.

8192 square, 90 % pruned, bf16, B = 1 and 8; instructions of sm_90 by Triton 3.6:
bytes      27.0 MB of values and columns, 16 bytes at a time; x and y 0.03 and 0.26
main loop  88 and 208 instructions a warp for 8 weights a thread, 7 times: 2.8 and 6.6 us of issue; of the 208
           64 multiply and 64 take x apart. A warp's gather meets 6 lines of x, or 32, at 4 a cycle at best
in flight  1,024 programs in one wave, 8 a multiprocessor, one step ahead: 32 KB, needed are 16 (H200: 23)
launches   1; starts, then weights, then x is a chain of three loads, once. Rows and bias of y come with the
           starts. Merging these arrays would shorten nothing: all their loads leave together
expected   H100: 9.0 us at 3.0 TB/s, start and end 2: 12 and 14 us, dense 47: 3.9x and 3.4x
           H200: 6.3 at 4.3 TB/s beside some 5 and 8 in the L1 cache: 9 and 13 us, dense 35: 3.8x and 2.7x
goals      3x and 2.5x of dense
If bytes bind: 16 bits of base for 8 lanes and 8 of offset a weight are 3.25 bytes instead of 4. They hold at
90 % (8 kept weights span 70 columns, sd 25), not at 95 % (140, sd 52) or beyond, where 16 bits must stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import choose, use_triton
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._triton import tl, triton
from sparselth.kernels.csr_linear import CsrIndex, csr_linear


@dataclass(frozen=True, eq=False)
class LanedCsr:
    """The kept weights of W [N, K] as `csr_lanes` reads them, on CUDA once and 16 bytes at a time.

    | name    | shape        | dtype                          | what
    | values  | [8 * groups] | fp32, fp16, bf16               | groups of 8 places, each row in whole groups
    | columns | [8 * groups] | uint16, int32 where K > 65,536 |
    | starts  | [N + 1]      | int32                          | groups in front of a row
    | rows    | [N]          | int32                          | 8 * row + how many of its places are empty

    Rows lie sorted, those with most kept weights first: rows that are computed together are equally long, and
    the kernel takes the longest of them from the first and the shortest from the last.
    `lanes` threads share a row, a step takes a group each. Within a step of g groups, place j of group l has
    kept weight j g + l: neighbouring threads then meet neighbouring columns, and share what they read of x.
    Empty places hold 0 and are told apart by their number, since 0 * infinity would be NaN.
    """

    shape: tuple[int, int]
    lanes: int
    values: Tensor
    columns: Tensor
    starts: Tensor
    rows: Tensor

    @staticmethod
    def from_dense(weight: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> LanedCsr:
        """The weights [N, K] where the bool mask [N, K] is True, as numbers of `dtype`, else of their own."""
        dtype = weight.dtype if dtype is None else dtype
        if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"expected weights [N, K] and a bool mask alike, got {weight.dtype} {list(weight.shape)} "
                f"and {mask.dtype} {list(mask.shape)}"
            )
        if dtype not in NAMES:
            raise ValueError(f"expected weights in {', '.join(map(str, NAMES))}, got {dtype}")
        n, k = weight.shape
        if n >= 2**28 or k > 2**27:
            raise ValueError(f"expected less than 2^28 rows and at most 2^27 columns, got {n} and {k}")
        counts, order = mask.sum(1).sort(descending=True, stable=True)
        groups = (counts + 7) // 8
        starts = groups.new_zeros(n + 1)
        torch.cumsum(groups, 0, out=starts[1:])
        total = int(starts[-1])
        if total > 2**30:
            raise ValueError(f"expected at most 2^33 kept weights, got {int(counts.sum())}")
        lanes = _lanes(n, total)
        row, place = _slots(counts, starts, lanes)
        column = mask[order].nonzero()[:, 1]
        values = weight.new_zeros(8 * total, dtype=dtype)
        values[place] = weight.detach()[order[row], column].to(dtype)
        columns = torch.zeros(8 * total, dtype=torch.int32, device=weight.device)
        columns[place] = column.int()
        if k <= 2**16:
            columns = columns.to(torch.uint16)
        rows = 8 * order + (8 * groups - counts)
        return LanedCsr((n, k), lanes, values, columns, starts.int(), rows.int())

    @property
    def kept(self) -> int:
        return self.values.numel() - int((self.rows & 7).sum())

    def arrays(self) -> tuple[Tensor, ...]:
        return self.values, self.columns, self.starts, self.rows

    def bytes(self) -> int:
        """Memory of values and index, and of what a CPU keeps beside them once it has computed with them."""
        beside = vars(self).get("native")
        return _bytes(*self.arrays()) + (beside[0].bytes() + _bytes(beside[1]) if beside else 0)

    def kept_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and value of every kept weight."""
        counts = 8 * self.starts.diff() - (self.rows & 7)
        row, place = _slots(counts.long(), self.starts.long(), self.lanes)
        return (self.rows >> 3).long()[row], self.columns.long()[place], self.values[place]

    def to_dense(self) -> Tensor:
        """[N, K], 0 where pruned."""
        row, column, value = self.kept_weights()
        dense = self.values.new_zeros(self.shape)
        dense[row, column] = value
        return dense

    @cached_property
    def native(self) -> tuple[CsrIndex, Tensor]:
        """The same weights as the CPU's kernels read them."""
        row, column, value = self.kept_weights()
        mask = torch.zeros(self.shape, dtype=torch.bool, device="cpu")
        mask[row, column] = True
        return CsrIndex.from_dense(mask, backward=False), value[(row * self.shape[1] + column).argsort()]


NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WARPS = 4  # of a program
# Threads that an H200 has room for at 64 registers. With fewer it waits for its memory; with more, a row has
# fewer steps to pay for its start and end, and rows that run one after the other share less of x in a cache.
THREADS = 1 << 17
COLUMNS = {torch.float32: 8, torch.float16: 16, torch.bfloat16: 16}  # of x for one program


def _lanes(rows: int, groups: int) -> int:
    """Threads for a row: as many as fill the device, not more than a row has groups; 8 read a cache line."""
    full = min(THREADS // max(1, rows), 32 * WARPS)
    mean = -(-groups // max(1, rows))
    return 1 << max(3, min(full.bit_length() - 1, (max(1, mean) - 1).bit_length()))


def _slots(counts: Tensor, starts: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    """Sorted row and place of every kept weight, row by row, columns ascending."""
    row = torch.repeat_interleave(counts)
    rank = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
    group = starts[row] + rank // (8 * lanes) * lanes  # the first of its step
    groups = (starts[row + 1] - group).clamp(max=lanes)
    rank %= 8 * lanes
    return row, 8 * (group + rank % groups) + rank // groups


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def floor(packed: LanedCsr, batch: int) -> dict[str, int]:
    """Bytes and FLOPs of `csr_lanes`."""
    moved = _bytes(*packed.arrays()) + packed.values.itemsize * batch * sum(packed.shape)
    return {"bytes": moved, "flops": 2 * packed.kept * batch}


def reference(packed: LanedCsr, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    row, column, value = packed.kept_weights()
    y = torch.zeros(packed.shape[0], x.shape[1], device=x.device, dtype=torch.float32)
    y.index_add_(0, row, value.float()[:, None] * x.float()[column])
    if bias is not None:
        y += bias.float()[:, None]
    return (y.relu_() if relu else y).to(x.dtype)


# Every tensor has one axis of threads, T = rows * lanes, and at most one that lies within a thread: so no
# version of Triton has a choice of layouts, and none moves anything between threads before the last sum.
# Numbers of 16 bits travel in pairs, as the halves of 32: taken apart by shifts they cost one instruction
# each, where the compiler packs and unpacks them several times over.


@triton.jit
def _number(bits, DTYPE: tl.constexpr):
    """What the lower 16 bits stand for, in fp32 all 32."""
    if DTYPE == "fp32":
        number = bits.to(tl.float32, bitcast=True)
    elif DTYPE == "fp16":
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = (bits << 16).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _load_group(ptr, group, inside, WORDS: tl.constexpr):
    """A group a thread, 8 numbers in WORDS of 32 bits: two tensors [T, 4], or twice the only one."""
    ptrs = ptr + group.to(tl.int64)[:, None] * WORDS + tl.arange(0, 4)[None, :]
    lower = tl.load(ptrs, mask=inside[:, None], other=0, eviction_policy="evict_first")
    upper = lower
    if WORDS == 8:
        upper = tl.load(ptrs + 4, mask=inside[:, None], other=0, eviction_policy="evict_first")
    return lower, upper


@triton.jit
def _four(words):
    """[T, 4] as four tensors [T]."""
    even, odd = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _places(lower, upper, WORDS: tl.constexpr):
    """The 8 places of a group, [T] each; of 16 bits only the lower ones count."""
    a, b, c, d = _four(lower)
    if WORDS == 4:
        places = a, a >> 16, b, b >> 16, c, c >> 16, d, d >> 16
    else:
        e, f, g, h = _four(upper)
        places = a, b, c, d, e, f, g, h
    return places


@triton.jit
def _accumulate(
    even,
    odd,
    even_2,
    odd_2,
    v_lower,
    v_upper,
    c_lower,
    c_upper,
    x_ptr,
    lane,
    groups,
    kept,
    ENDS: tl.constexpr,
    STRIDE: tl.constexpr,
    WORDS_V: tl.constexpr,
    WORDS_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One step: sums [T, W] += values * x.

    If ENDS, of so many groups and kept weights [T] of its row; else all places of all lanes hold weights.
    """
    WIDTH: tl.constexpr = even.shape[1]
    values = _places(v_lower, v_upper, WORDS_V)
    columns = _places(c_lower, c_upper, WORDS_C)
    for j in tl.static_range(8):
        v = _number(values[j], DTYPE)[:, None]
        c = columns[j] & 0xFFFF if WORDS_C == 4 else columns[j]
        x_ptrs = x_ptr + (c * STRIDE)[:, None] + tl.arange(0, WIDTH)[None, :]
        for part in tl.static_range(STRIDE // WIDTH):
            if ENDS:
                live = ((lane < groups) & (j * groups + lane < kept))[:, None]
                x = tl.load(x_ptrs + part * WIDTH, mask=live, other=0).to(tl.int32)
            else:
                x = tl.load(x_ptrs + part * WIDTH).to(tl.int32)
            if part == 0:
                even += v * _number(x, DTYPE)
                if PAIRS:
                    odd += v * _number(x >> 16, DTYPE)
            else:
                even_2 += v * _number(x, DTYPE)
                if PAIRS:
                    odd_2 += v * _number(x >> 16, DTYPE)
    return even, odd, even_2, odd_2


@triton.jit
def _store_sums(
    even,
    odd,
    bias,
    y_ptrs,
    in_r,
    first_column,
    B,
    RELU: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """act(sums over the lanes of a row + bias) to the rows of y that start at y_ptrs [ROWS]."""
    LANES: tl.constexpr = even.shape[0] // ROWS
    WIDTH: tl.constexpr = even.shape[1]
    y = tl.sum(tl.reshape(even, (ROWS, LANES, WIDTH)), axis=1)
    if PAIRS:
        y = tl.join(y, tl.sum(tl.reshape(odd, (ROWS, LANES, WIDTH)), axis=1))
        y = tl.reshape(y, (ROWS, 2 * WIDTH))
    y += bias[:, None]
    if RELU:
        y = tl.where(y <= 0, 0.0, y)  # NaN stays
    offs_b = first_column + tl.arange(0, y.shape[1])[None, :]
    y = y.to(y_ptrs.dtype.element_ty)
    tl.store(y_ptrs[:, None] + offs_b, y, mask=in_r[:, None] & (offs_b < B))


@triton.jit
def _lanes_kernel(
    values_ptr,
    columns_ptr,
    starts_ptr,
    rows_ptr,
    x_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    B,
    tiles,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DTYPE: tl.constexpr,
    WORDS_C: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows times COLUMNS columns: x is [tiles, K, COLUMNS] in 32-bit words, or single 16-bit numbers."""
    WORDS_V: tl.constexpr = 8 if DTYPE == "fp32" else 4
    PAIRS: tl.constexpr = DTYPE != "fp32" and COLUMNS > 1
    STRIDE: tl.constexpr = COLUMNS // 2 if PAIRS else COLUMNS
    WIDTH: tl.constexpr = STRIDE if STRIDE < 4 else 4  # words of a load, of which a column has one or two

    pid = tl.program_id(0)
    tile = pid % tiles
    first_row = pid // tiles * ROWS
    # the first row is the longest one, the last the shortest
    last_row = tl.minimum(first_row + ROWS, N) - 1
    most = tl.load(starts_ptr + first_row + 1) - tl.load(starts_ptr + first_row)
    least = 8 * (tl.load(starts_ptr + last_row + 1) - tl.load(starts_ptr + last_row))
    steps = (most + LANES - 1) // LANES
    full = (least - (tl.load(rows_ptr + last_row) & 7)) // (8 * LANES)  # steps without empty places

    offs_t = tl.arange(0, ROWS * LANES)
    lane = offs_t % LANES
    offs_r = first_row + offs_t // LANES
    in_r = offs_r < N
    start = tl.load(starts_ptr + offs_r, mask=in_r, other=0)
    places = 8 * (tl.load(starts_ptr + offs_r + 1, mask=in_r, other=0) - start)
    kept = places - (tl.load(rows_ptr + offs_r, mask=in_r, other=0) & 7)
    group = start + lane
    x_ptr += tile.to(tl.int64) * K * STRIDE
    # where the sums go, long before they are there
    offs_y = first_row + tl.arange(0, ROWS)
    in_y = offs_y < N
    row = tl.load(rows_ptr + offs_y, mask=in_y, other=0) >> 3
    bias = tl.zeros((ROWS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row, mask=in_y, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + row.to(tl.int64) * B
    even = tl.zeros((ROWS * LANES, WIDTH), tl.float32)
    odd, even_2, odd_2 = even, even, even

    # what the next step needs is on its way before this one is computed
    v_lower, v_upper = _load_group(values_ptr, group, 8 * lane < kept, WORDS_V)
    c_lower, c_upper = _load_group(columns_ptr, group, 8 * lane < kept, WORDS_C)
    s = 0
    while s < full:
        s += 1
        inside = 8 * (lane + s * LANES) < kept
        v_next, v_after = _load_group(values_ptr, group + s * LANES, inside, WORDS_V)
        c_next, c_after = _load_group(columns_ptr, group + s * LANES, inside, WORDS_C)
        even, odd, even_2, odd_2 = _accumulate(
            even, odd, even_2, odd_2, v_lower, v_upper, c_lower, c_upper, x_ptr, lane, lane, lane,
            False, STRIDE, WORDS_V, WORDS_C, DTYPE, PAIRS,
        )  # fmt: skip
        v_lower, v_upper, c_lower, c_upper = v_next, v_after, c_next, c_after
    while s < steps:
        kept_yet = kept - 8 * s * LANES
        groups = tl.minimum((kept_yet + 7) // 8, LANES)
        s += 1
        inside = 8 * (lane + s * LANES) < kept
        v_next, v_after = _load_group(values_ptr, group + s * LANES, inside, WORDS_V)
        c_next, c_after = _load_group(columns_ptr, group + s * LANES, inside, WORDS_C)
        even, odd, even_2, odd_2 = _accumulate(
            even, odd, even_2, odd_2, v_lower, v_upper, c_lower, c_upper, x_ptr, lane, groups, kept_yet,
            True, STRIDE, WORDS_V, WORDS_C, DTYPE, PAIRS,
        )  # fmt: skip
        v_lower, v_upper, c_lower, c_upper = v_next, v_after, c_next, c_after

    column = tile * COLUMNS
    _store_sums(even, odd, bias, y_ptrs, in_y, column, B, RELU, PAIRS, ROWS)
    if STRIDE > WIDTH:
        column += COLUMNS // 2
        _store_sums(even_2, odd_2, bias, y_ptrs, in_y, column, B, RELU, PAIRS, ROWS)


def _in_tiles(x: Tensor, columns: int) -> Tensor:
    """x [K, B] as [tiles, K, columns], itself where it is so already; what lies behind B is not defined."""
    k, b = x.shape
    if b == columns and x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x[None]
    whole, rest = divmod(b, columns)
    tiles = x.new_empty(whole + (rest > 0), k, columns)
    tiles[:whole] = x[:, : whole * columns].unflatten(1, (whole, columns)).permute(1, 0, 2)
    if rest:
        tiles[whole, :, :rest] = x[:, whole * columns :]
    return tiles


def launch(packed: LanedCsr, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    (n, k), b = packed.shape, x.shape[1]
    y = x.new_empty(n, b)
    if not y.numel():
        return y
    columns = min(triton.next_power_of_2(b), COLUMNS[x.dtype])
    x = _in_tiles(x, columns)
    single = columns == 1 and x.itemsize == 2
    rows = 32 * WARPS // packed.lanes
    with torch.cuda.device_of(x):
        _lanes_kernel[(triton.cdiv(n, rows) * len(x),)](
            packed.values.view(torch.int32),
            packed.columns.view(torch.int32),
            packed.starts,
            packed.rows,
            x.view(torch.int16 if single else torch.int32),
            None if bias is None else bias.contiguous(),
            y,
            n,
            k,
            b,
            len(x),
            HAS_BIAS=bias is not None,
            RELU=relu,
            DTYPE=NAMES[x.dtype],
            WORDS_C=2 * packed.columns.itemsize,
            ROWS=rows,
            LANES=packed.lanes,
            COLUMNS=columns,
            num_warps=WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return y


def csr_lanes(
    packed: LanedCsr, x: Tensor, bias: Tensor | None = None, relu: bool = False, kernels: str = "auto"
) -> Tensor:
    """act(W x + b) as [N, B]; `relu` makes act the rectifier. Not differentiable.

    x [K, B] is fastest contiguous, B a power of two up to 16; else it is copied first. Any B is right, but
    each 16 columns (fp32: 8) read the weights again. Sums are in fp32, in one order whatever the device does.
    `kernels`: "triton", "native" (fp32 on a CPU), "reference" (torch), or "auto", the first that is there.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, bias = x.to(packed.values.dtype), None if bias is None else bias.to(packed.values.dtype)
    n, k = packed.shape
    tensors = {"x": x, "values": packed.values} | ({} if bias is None else {"bias": bias})
    got = ", ".join(f"{name} {t.dtype}{list(t.shape)} on {t.device}" for name, t in tensors.items())
    if x.dim() != 2 or x.shape[0] != k or (bias is not None and bias.shape != (n,)):
        raise ValueError(f"expected x[{k}, B] and bias[{n}] for W[{n}, {k}]; got {got}")
    if any(t.dtype != x.dtype or t.device != x.device for t in tensors.values()):
        raise ValueError(f"expected all of one dtype and on one device; got {got}")
    wanted = torch.compiler.is_compiling() or _native.wants_gradient(x, packed.values, bias)  # the operator
    native = x.is_cpu and x.dtype == torch.float32 and not wanted
    has = ("triton", "native", "reference") if native else ("triton", "reference")
    if choose(kernels, has, x) == "native":
        bias = None if bias is None else bias.detach().contiguous()
        return csr_linear(*packed.native, x.detach().contiguous(), bias, relu, kernels="native")
    return _infer(*packed.arrays(), x, bias, packed.lanes, relu, kernels)  # type: ignore[no-any-return]


@operator("csr_lanes")
def _infer(
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    rows: Tensor,
    x: Tensor,
    bias: Tensor | None,
    lanes: int,
    relu: bool,
    kernels: str,
) -> Tensor:
    packed = LanedCsr((len(rows), len(x)), lanes, values, columns, starts, rows)
    compute = launch if use_triton(kernels, x) else reference
    return compute(packed, x, bias, relu)


@fake(_infer)
def _(values, columns, starts, rows, x, bias, lanes, relu, kernels):
    return x.new_empty(rows.shape[0], x.shape[1])
