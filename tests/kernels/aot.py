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
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def examine(aot: Any, capability: int) -> dict[str, Any]:
    """Registers, spills (bytes of local memory) and the widths of global accesses, in bits."""
    names = aot.kernel.arg_names
    unknown = (set(aot.signature) | set(aot.constants)) ^ set(names)
    if unknown:
        raise ValueError(f"{aot.kernel.__name__}: {sorted(unknown)} are not its arguments, or are missing")
    signature = {name: aot.signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aot.aligned}
    source = ASTSource(fn=aot.kernel, signature=signature, constexprs=aot.constants, attrs=attrs)
    options = {"num_warps": aot.num_warps, "num_stages": aot.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [BIN / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    accesses = re.findall(r"\b(?:LDGSTS|LDG|STG|RED|ATOMG)\b(?:\.[\w.]+)?", code)
    return {
        "kernel": aot.kernel.__name__,
        "constants": {name: str(value) for name, value in aot.constants.items()},
        "capability": capability,
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spilled_bytes": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "shared_bytes": int(compiled.metadata.shared),
        "wide": sum(".128" in access for access in accesses),
        "narrow": sum(".128" not in access for access in accesses),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "mma": len(re.findall(r"\b(?:HMMA|HGMMA|IMMA|QGMMA)\b", code)),
        "max_registers": aot.max_registers,
        "allowed_narrow": aot.narrow,
    }


if __name__ == "__main__":
    module = importlib.import_module(f"sparselth.kernels.{sys.argv[1]}")
    cases = [(aot, capability) for aot in module.AOT for capability in (80, 90)]

    def one(i: int) -> dict[str, Any]:
        return examine(*cases[i])

    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        print(json.dumps(pool.map(one, range(len(cases)), chunksize=1), indent=1))
