"""Frozen weights: the same bits on every path, for ever; and nothing that statistics can tell from chance."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import DEVICE, pick, poisoned, same_bits
from sparselth.kernels import _native
from sparselth.kernels import hash_weights as module
from sparselth.kernels.hash_weights import LAWS, Keys, floor, hash_weights, quantiles, words

PATHS = ["reference", "triton", *_native.levels()]
SHAPES = [(1,), (1, 1), (3, 31), (2, 32), (5, 33), (7, 13, 3, 3), (37, 101), (1, 2100), (130, 3)]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


def made(path: str, seed: int, layer: int, shape: tuple[int, ...], *args: object, **rest: object) -> Tensor:
    """By one path: a level of the C kernels, torch, or Triton on the tests' device."""
    if path in _native.levels():
        _native.choose(path)
        return hash_weights(seed, layer, shape, *args, **rest, kernels="native")  # type: ignore[arg-type]
    device = DEVICE if path == "triton" else "cpu"
    with poisoned():
        found = hash_weights(seed, layer, shape, *args, **rest, device=device, kernels=path)  # type: ignore[arg-type]
    return found.cpu()


def one(seed: int, layer: int, law: str, row: int, column: int, fan_in: int, g: int = 0) -> float:
    """A weight by the formulas of the head, in Python's integers."""

    def m(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0xD35A2D97 % 2**32
        return x ^ (x >> 15)

    def h(c: int, p: int, q: int) -> int:
        return m(m((c + p) % 2**32) ^ q)

    digest = hashlib.sha256(f"sparselth/frozen/{seed}/{layer}/{law}".encode()).digest()
    k = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12)]
    counter = column // 32 if law == "signed-constant" else column
    u = h(counter, h(row, k[0], k[1]), (h(row, k[2], k[3]) + g * 0x9E3779B9) % 2**32)
    s = float(torch.tensor(math.sqrt((6 if law == "uniform" else 2) / fan_in)))
    if law == "signed-constant":
        return -s if u >> column % 32 & 1 else s
    if law == "uniform":
        return float(torch.tensor((2 * (u >> 8) + 1 - 2**24) * 2.0**-24 * s))
    z = -NormalDist().inv_cdf((2 * (u >> 8 & 0x7FFFFF) + 1) * 2.0**-25)
    return (-z if u >> 31 else z) * s


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("law", LAWS)
def test_a_weight_is_the_formula_of_its_place(law: str, path: str) -> None:
    w = made(path, 2**64 - 1, 2**32 - 1, (40, 70), law, 3)
    for row, column in ((0, 0), (0, 31), (0, 32), (1, 69), (39, 0), (17, 64), (39, 69)):
        right = one(2**64 - 1, 2**32 - 1, law, row, column, 70, 3)
        assert w[row, column] == pytest.approx(right, rel=0, abs=2e-5 if law == "normal" else 0)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_same_bits(shape: tuple[int, ...], law: str, path: str) -> None:
    redrawn = torch.randint(0, 2**31 - 1, shape, generator=torch.Generator().manual_seed(0))
    redrawn[torch.rand(shape) < 0.5] = 0
    for generation in (0, 1, 2**31 - 1, redrawn):
        right = hash_weights(5, 2, shape, law, generation, kernels="reference")
        on = generation.to(DEVICE) if path == "triton" and isinstance(generation, Tensor) else generation
        assert same_bits(made(path, 5, 2, shape, law, on), right)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(LAWS), st.data())
def test_rows_alone_are_rows_of_all(path: str, n: int, k: int, law: str, data: st.DataObject) -> None:
    """Whatever else is computed with them; and generations of one weight leave all others as they are."""
    first = data.draw(st.integers(0, n), "first")
    end = data.draw(st.integers(first, n), "end")
    whole = hash_weights(1, 2, (n, k), law, kernels="reference")
    assert same_bits(made(path, 1, 2, (n, k), law, rows=(first, end)), whole[first:end])
    taller = made(path, 1, 2, (n + 5, k), law)
    assert same_bits(taller[:n], whole)
    redrawn = torch.zeros(n, k, dtype=torch.int16)
    redrawn[-1, k // 2] = 1
    some = made(path, 1, 2, (n, k), law, redrawn.to(DEVICE if path == "triton" else "cpu"))
    assert same_bits(some[redrawn == 0], whole[redrawn == 0])
    all_new = hash_weights(1, 2, (n, k), law, 1, kernels="reference")
    assert same_bits(some[redrawn == 1], all_new[redrawn == 1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("law", LAWS)
def test_places_beyond_two_to_the_32_do_not_wrap(law: str, path: str) -> None:
    """A layer of 2**64 weights: the last rows, of which each has a hash of its own."""
    first = 2**32 - 3
    w = made(path, 0, 0, (2**32, 40), law, rows=(first, 2**32))
    assert w[2, 39] == pytest.approx(one(0, 0, law, 2**32 - 1, 39, 40), abs=2e-5)
    assert not same_bits(w, made(path, 0, 0, (2**32, 40), law, rows=(2**31 - 3, 2**31)))
    assert not same_bits(w, made(path, 0, 0, (2**32, 40), law, rows=(0, 3)))
    for shape in ((2**32 + 1, 2), (2, 2**16, 2**16 + 1)):
        with pytest.raises(ValueError, match="expected 1 to 2"):
            hash_weights(0, 0, shape, law, rows=(0, 1))
    assert module.matrix((2**32, 2**32)) == (2**32, 2**32)
    keys, last = Keys.of(0, 0, law), torch.tensor([2**32 - 1])
    assert int(words(keys, last, last)) != int(words(keys, last, last - 2**31))


@pytest.mark.parametrize("path", PATHS)
def test_the_bits_of_old_tickets(path: str) -> None:
    """These never change: a file of a seed and a mask holds no weight."""
    assert Keys.of(7, 3, "normal") == GOLDEN_KEYS
    assert hashlib.sha256(quantiles().numpy().astype("<i4").tobytes()).hexdigest()[:16] == GOLDEN_TABLE
    redrawn = torch.arange(1, 201, dtype=torch.int32).view(4, 50) % 3
    for law in LAWS:
        w = made(path, 7, 3, (4, 50), law, redrawn.to(DEVICE if path == "triton" else "cpu"))
        assert hashlib.sha256(w.numpy().astype("<f4").tobytes()).hexdigest()[:16] == GOLDEN[law]


GOLDEN_KEYS = (75825844, 3006825518, 29604334, 3062714299)
GOLDEN_TABLE = "0ce4cbd899fe1aaa"
GOLDEN = {"signed-constant": "c147d779558d5a07", "normal": "0b77049b859f8664", "uniform": "0537b9f8ede952e0"}


# Chance: each bound is one that a fair draw stays within with these seeds, 4.5 standard errors wide


def drawn(seed: int, layer: int, law: str, generation: int = 0) -> Tensor:
    """A million weights of mean 0 and variance 1."""
    return hash_weights(seed, layer, (1024, 1024), law, generation).double() * math.sqrt(512)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors of independent draws."""
    return float((a * b).mean() * a.numel() ** 0.5)


def chi_square(counts: Tensor) -> float:
    """How far off in standard deviations."""
    expected, freedom = float(counts.sum()) / len(counts), len(counts) - 1
    found = float(((counts - expected) ** 2 / expected).sum())
    return (found - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (1, 0), (0, 1), (2**63, 7)])
def test_mean_variance_and_serial_correlation(seed: int, layer: int, law: str) -> None:
    w = drawn(seed, layer, law)
    root = w.numel() ** 0.5
    assert abs(float(w.mean())) * root < 4.5
    assert abs(float((w > 0).double().mean()) - 0.5) * 2 * root < 4.5
    fourth = {"signed-constant": 1.0, "normal": 3.0, "uniform": 1.8}[law]
    assert abs(float(w.square().mean()) - 1) * root <= 4.5 * math.sqrt(fourth - 1) + 1e-3
    assert abs(float((w**4).mean()) / fourth - 1) < 0.02
    flat = w.flatten()
    for lag in (1, 2, 3, 16, 31, 32, 33, 64, 1023, 1024, 1025, 32 * 1024):
        assert abs(correlation(flat[:-lag], flat[lag:])) < 4.5, lag
    assert abs(float(w.mean(0).square().mean() * 1024 - 1)) < 4.5 * math.sqrt(2 / 1024)
    assert abs(float(w.mean(1).square().mean() * 1024 - 1)) < 4.5 * math.sqrt(2 / 1024)


@pytest.mark.parametrize("law", LAWS)
def test_seeds_layers_and_generations_have_nothing_in_common(law: str) -> None:
    streams = [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 0),
        (2**32, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (0, 0, 1),
        (0, 0, 2),
        (0, 1, 1),
    ]
    all_of_them = [drawn(seed, layer, law, g) for seed, layer, g in streams]
    for i, a in enumerate(all_of_them):
        for b in all_of_them[:i]:
            assert abs(correlation(a, b)) < 4.5
            assert abs(correlation(a[:, 1:], b[:, :-1])) < 4.5
            assert abs(correlation(a[1:], b[:-1])) < 4.5
    for law_b in set(LAWS) - {law}:
        assert abs(correlation(all_of_them[0], drawn(0, 0, law_b))) < 4.5


def test_bytes_and_pairs_of_words_are_uniform() -> None:
    keys = Keys.of(0, 0, "signed-constant")
    found = words(keys, torch.arange(512)[:, None], torch.arange(1024))
    for shift in range(0, 32, 8):
        byte = found >> shift & 255
        assert abs(chi_square(byte.flatten().bincount(minlength=256))) < 4.5
        for other in (byte.roll(1, 0), byte.roll(1, 1), found.roll(1, 1) >> (24 - shift) & 255):
            assert abs(chi_square((256 * byte + other).flatten().bincount(minlength=65536))) < 4.5
    ones = torch.stack([(found >> i & 1).double().mean() for i in range(32)])
    assert float((ones - 0.5).abs().max()) * 2 * found.numel() ** 0.5 < 4.5
    again = words(keys, torch.arange(512)[:, None], torch.arange(1024), 1)
    turned = torch.stack([((found ^ again) >> i & 1).double().mean() for i in range(32)])
    assert float((turned - 0.5).abs().max()) * 2 * found.numel() ** 0.5 < 4.5
    assert len(found.unique()) > found.numel() - 4.5 * found.numel() ** 2 / 2**32  # as of a birthday's


def test_every_input_bit_turns_half_of_the_signs() -> None:
    """Avalanche: of the counter, the row and the generation."""
    keys = Keys.of(1, 2, "signed-constant")
    row, counter = torch.arange(64)[:, None], torch.arange(256)
    plain = words(keys, row, counter)
    for bit in range(31):
        turned = (
            words(keys, row, counter ^ (1 << bit)),
            words(keys, row ^ (1 << bit), counter),
            words(keys, row, counter, 1 << bit),
        )
        for other in turned:
            for i in range(32):
                share = float(((plain ^ other) >> i & 1).double().mean())
                assert abs(share - 0.5) * 2 * plain.numel() ** 0.5 < 5


def test_uniform_and_normal_are_what_they_are_called() -> None:
    u = drawn(3, 1, "uniform") / math.sqrt(3)
    assert abs(chi_square(((u + 1) * 512).long().flatten().bincount(minlength=1024))) < 4.5
    z = drawn(3, 1, "normal")
    p = torch.special.ndtr(z)
    assert abs(chi_square((p * 1024).long().flatten().bincount(minlength=1024))) < 4.5
    for tail in (3, 4):
        share = 2 * float(torch.special.ndtr(torch.tensor(-tail, dtype=torch.float64)))
        expected = share * z.numel()
        assert abs(int((z.abs() > tail).sum()) - expected) < 4.5 * math.sqrt(expected)


def test_the_normals_table_is_the_quantile() -> None:
    exact, table = NormalDist(), quantiles().double() * 2.0**-28
    assert bool((quantiles().diff() < 0).all())
    for i in range(0, 24 * 64, 7):
        p = (1 + i % 64 / 64) * 2.0 ** (i // 64 - 25)
        assert float(table[i]) == pytest.approx(-exact.inv_cdf(p), abs=2.0**-28)
        between = -exact.inv_cdf((1 + (i % 64 + 0.5) / 64) * 2.0 ** (i // 64 - 25))
        assert float(table[i] + table[i + 1]) / 2 == pytest.approx(between, abs=2e-5)


@pytest.mark.parametrize("path", pick(PATHS, ["triton"]))
def test_gain_is_rounded_once(path: str) -> None:
    for law in LAWS:
        w = made(path, 0, 0, (6, 50), law, gain=math.sqrt(1 / 0.3))
        s = torch.tensor(
            math.sqrt((6 if law == "uniform" else 2) / 50) * math.sqrt(1 / 0.3), dtype=torch.float32
        )
        plain = made(path, 0, 0, (6, 50), law)
        torch.testing.assert_close(w, plain * math.sqrt(1 / 0.3), rtol=2e-7, atol=0)
        if law == "signed-constant":
            assert bool((w.abs() == s).all())


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("level", _native.levels())
@pytest.mark.parametrize("law", LAWS)
def test_masks_and_products_of_the_c_kernel(law: str, level: str) -> None:
    _native.choose(level)
    g = torch.Generator().manual_seed(0)
    for n, k, threads in ((1, 1, 1), (5, 33, 2), (3, 2100, 1), (40, 100, 3)):
        torch.set_num_threads(threads)
        keep = torch.rand(n, k, generator=g) < 0.5
        padded = torch.nn.functional.pad(keep, (0, -k % 8)).view(n, -1, 8)
        bits = (padded.long() << torch.arange(8)).sum(-1).to(torch.uint8)
        w = hash_weights(4, 1, (n + 9, k), law, rows=(9, n + 9), kernels="reference")
        keys, s = Keys.of(4, 1, law), module.scale(law, k)
        found = torch.full((n, k), float("nan"))
        module.fill(found, keys, law, s, 9, bits=bits)
        assert same_bits(found, torch.where(keep, w, 0))
        factor = torch.randn(n, k, generator=g)
        found = factor.clone()
        module.fill(found, keys, law, s, 9, multiply=True)
        torch.testing.assert_close(found, factor * w, rtol=2e-7, atol=0)
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: expected 0 to 2\\*\\*64 - 1, got -1"),
        ({"layer": 2**32}, "layer: expected 0 to 2\\*\\*32 - 1"),
        ({"law": "kaiming"}, "law: expected one of signed-constant, normal, uniform, got 'kaiming'"),
        ({"shape": (0, 3)}, "shape: expected 1 to"),
        ({"shape": ()}, "shape: expected 1 to"),
        ({"rows": (3, 2)}, "rows: expected 0 <= first <= end <= 4"),
        ({"rows": (0, 5)}, "rows: expected"),
        ({"gain": float("inf")}, "gain: expected a finite number"),
        ({"generation": -1}, "generation: expected 0 to"),
        ({"generation": 2**31}, "generation: expected 0 to"),
        ({"generation": torch.full((4, 5), 2**31)}, "got 2147483648"),
        ({"generation": torch.zeros(4, 6).int()}, r"expected an integer, or integers \[4, 5\]"),
        ({"generation": torch.zeros(4, 5)}, "expected an integer"),
        ({"kernels": "fast"}, "kernels='fast'"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {"seed": 0, "layer": 0, "shape": (4, 5), "law": "normal"}
    with pytest.raises(ValueError, match=message):
        hash_weights(**(usual | change))  # type: ignore[arg-type]


def test_floor() -> None:
    assert floor(10) == {"bytes": 40, "flops": 10}
    assert floor(10, redrawn=True)["bytes"] == 80
