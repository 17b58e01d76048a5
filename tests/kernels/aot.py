"""Compile a kernel file's AOT list for sm_80 and sm_90 without a GPU; print what the machine code is like.

    python tests/kernels/aot.py masked_linear

Runs in a process of its own, because kernels imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
import warnings
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def output(tool: str, *words: str, content: bytes) -> str:
    """What a tool says of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run(
            [BIN / tool, *words, file.name], capture_output=True, text=True, check=True
        ).stdout


def text(cubin: bytes) -> bytes:
    """The instructions: sections .text.* of an ELF file."""
    (at,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    named = cubin[sections[names][4] :]
    code = [s for s in sections if named[s[0] :].startswith(b".text.")]
    return b"".join(cubin[offset : offset + length] for *_, offset, length in code)


def build(aot: Any, capability: int) -> tuple[dict[str, Any], bytes]:
    """Registers and spills (bytes of local memory), and the instructions."""
    names = aot.kernel.arg_names
    unknown = (set(aot.signature) | set(aot.constants)) ^ set(names)
    if unknown:
        raise ValueError(f"{aot.kernel.__name__}: {sorted(unknown)} are not its arguments, or are missing")
    signature = {name: aot.signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aot.aligned}
    source = ASTSource(fn=aot.kernel, signature=signature, constexprs=aot.constants, attrs=attrs)
    options = {"num_warps": aot.num_warps, "num_stages": aot.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = output("cuobjdump", "--dump-resource-usage", content=compiled.asm["cubin"])
    facts = {
        "kernel": aot.kernel.__name__,
        "signature": aot.signature,
        "constants": {name: str(value) for name, value in aot.constants.items()},
        "capability": capability,
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spilled_bytes": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "shared_bytes": int(compiled.metadata.shared),
        "max_registers": aot.max_registers,
        "allowed_narrow": aot.narrow,
    }
    return facts, text(compiled.asm["cubin"])


def listings(codes: list[bytes], capability: int) -> list[str]:
    """Each code as assembly. The disassembler takes 0.3 s to start: all go through it as one."""
    found = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*;)",
        output("nvdisasm", "-ndf", "-b", f"SM{capability}", content=b"".join(codes)),
        re.MULTILINE,
    )
    ends = [end // 16 for end in accumulate(map(len, codes), initial=0)]  # 16 bytes an instruction
    if len(found) != ends[-1]:
        raise ValueError(f"nvdisasm names {len(found)} of {ends[-1]} instructions for sm_{capability}")
    return ["\n".join(found[begin:end]) for begin, end in pairwise(ends)]


def read(listing: str) -> dict[str, int]:
    """The widths of global accesses, in bits; how much there is of what."""
    accesses = re.findall(r"\b(?:LDGSTS|LDG|STG|RED|ATOMG)\b(?:\.[\w.]+)?", listing)
    return {
        "wide": sum(".128" in access for access in accesses),
        "narrow": sum(".128" not in access for access in accesses),
        "instructions": listing.count("\n") + 1,
        "mma": len(re.findall(r"\b(?:HMMA|HGMMA|IMMA|QGMMA)\b", listing)),
        "wgmma": len(re.findall(r"\b(?:HGMMA|QGMMA)\b", listing)),
    }


CASES: list[tuple[Any, int]] = []  # here for the pool's processes, which are forked and find it full


def build_case(i: int) -> tuple[dict[str, Any], bytes]:
    return build(*CASES[i])


def examine(name: str) -> list[dict[str, Any]]:
    """The facts of every configuration of a kernel file, for sm_80 and sm_90 in turn."""
    module = importlib.import_module(f"sparselth.kernels.{name}")
    CASES[:] = [(aot, capability) for aot in module.AOT for capability in (80, 90)]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        built = pool.map(build_case, range(len(CASES)), chunksize=1)
    for capability in (80, 90):
        some = [(facts, code) for facts, code in built if facts["capability"] == capability]
        for (facts, _), listing in zip(some, listings([code for _, code in some], capability), strict=True):
            facts |= read(listing)
    return [facts for facts, _ in built]


if __name__ == "__main__":
    print(json.dumps(examine(sys.argv[1]), indent=1))
