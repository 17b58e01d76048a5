"""Dry launches: every grid is one that a device takes, at target, large and odd shapes; nothing is compiled.

`make gpu-dry` compiles them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OPS = sorted(
    file.stem for file in (HERE.parents[1] / "kernels").glob("[!_]*.py") if "@triton.jit" in file.read_text()
)
SOURCE = f"""
import json, sys
sys.path.insert(0, {str(HERE)!r})
import dry
"""
pytestmark = pytest.mark.host


@pytest.mark.parametrize("name", OPS)
def test_every_grid_is_one_that_a_device_takes(name: str, without_interpreter: Callable[[str], str]) -> None:
    source = f"""
found = dry.quick({name!r})
print(json.dumps([found.wrong, list(found.count), [k.__name__ for k in dry.kernels_of({name!r})]]))
"""
    wrong, launched, kernels = json.loads(without_interpreter(SOURCE + source))
    assert set(kernels) <= set(launched)
    assert not wrong


def test_what_no_device_takes_is_found(without_interpreter: Callable[[str], str]) -> None:
    source = """
from sparselth.kernels import bitmask
bits, out = dry.octets(8), dry.octets(8)
with dry.launches() as found:
    for grid in ((2**31, 1), (1, 65536), (1, 1, 65536), (0,), (1, 0), (2**31 - 1, 65535, 65535)):
        bitmask._unpack_kernel[grid](bits, out, 8, 8, BLOCK=16, RAGGED=False)
print(json.dumps([found.wrong, list(found.count.values()), len(found.kernels)]))
"""
    wrong, count, kernels = json.loads(without_interpreter(SOURCE + source))
    assert [fault.split(", ")[-1].split(" is")[0] for fault in wrong] == ["x", "y", "z", "x", "y"]
    assert (count, kernels) == ([6], 1)


def test_kernels_are_told_apart_as_on_a_device(without_interpreter: Callable[[str], str]) -> None:
    """By what is 1, what is a multiple of 16, which pointers are; not by other numbers."""
    source = """
from sparselth.kernels import bitmask
bits, out = dry.octets(64), dry.octets(64)
with dry.launches() as found:
    for n, place in ((8, 0), (9, 0), (32, 0), (48, 0), (1, 0), (8, 16), (8, 1)):
        bitmask._unpack_kernel[1,](bits[place:], out, n, 8, BLOCK=16, RAGGED=False)
print(json.dumps([len(found.kernels), [[str(a) for a in k.attributes] for k in found.kernels.values()]]))
"""
    distinct, _ = json.loads(without_interpreter(SOURCE + source))
    assert distinct == 4  # of bytes: any number, multiples of 16, 1; and bits off the grid


def test_compiling_says_what_does_not_fit(without_interpreter: Callable[[str], str]) -> None:
    source = """
import triton
from sparselth.kernels import bitmask, masked_linear
bits, out, x = dry.octets(64), dry.octets(64), dry.half(1, 512, 512)
with dry.launches() as found:
    bitmask._unpack_kernel[1,](bits, out, 8, 8, BLOCK=16, RAGGED=False)
    bitmask._unpack_kernel[1,](bits, out, 8, 8, BLOCK=17, RAGGED=False)
done = list(dry.compiled(list(found.kernels.values())))
print(json.dumps([one.wrong for one in done]))
"""
    good, bad = json.loads(without_interpreter(SOURCE + source))
    assert good == ""
    assert "power of 2" in bad
