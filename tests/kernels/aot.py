"""Compile an op's list in shipped/ without a GPU; print what the machine code is like.

    python tests/kernels/aot.py masked_linear          sm_80 and sm_90, all that is known, JSON
    python tests/kernels/aot.py --account [NAME ...]   sm_90, a row of a Markdown table each

Runs in a process of its own, because kernels imported for the interpreter cannot be compiled. Which Triton
compiles is PYTHONPATH's affair: build/triton-3.6.0-cp311 in front of it holds the device's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore")

import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.cache import get_cache_manager  # noqa: E402

import sass  # noqa: E402
from covering import covering  # noqa: E402
from sass import Instruction  # noqa: E402

NAMES = sorted(file.stem for file in Path(__file__).with_name("shipped").glob("[!_]*.py"))
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


def kept(compiled: Any, name: str, tool: Callable[[], str]) -> str:
    """What a tool says of a kernel, asked once: it lies beside the kernel in Triton's cache."""
    cache = get_cache_manager(compiled.hash)
    return Path(cache.get_file(name) or cache.put(tool(), name, binary=False)).read_text()


def complaints(ptx: str, said: str, capability: int) -> str:
    """What ptxas says. `said` is empty of a cached kernel."""
    if said or "wgmma" not in ptx:
        return said
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        words = [BIN / "ptxas", "-v", f"--gpu-name=sm_{capability}a", file.name, "-o", os.devnull]
        return subprocess.run(words, capture_output=True, text=True, check=True).stderr


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
    options |= {"maxnreg": aot.maxnreg} if capability >= 90 else {}
    said = StringIO()
    with redirect_stdout(said):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = kept(compiled, "usage", lambda: output("cuobjdump", "--dump-resource-usage", content=cubin))
    warned = kept(compiled, "ptxas", lambda: complaints(ptx, said.getvalue(), capability))
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
        "allowed_waiting": aot.waiting,
        "threads": 32 * aot.num_warps,
        "warnings": sorted(set(re.findall(r"\bC7\d{3}\b", warned))),  # C7515 is a wgmma that waits
        "triton": triton.__version__,
    }
    return facts, text(cubin)


def listings(codes: list[bytes], capability: int) -> list[list[Instruction]]:
    """Each code as instructions. The disassembler takes 0.3 s to start: all go through it as one."""
    found = sass.parse(output("nvdisasm", "-ndf", "-b", f"SM{capability}", content=b"".join(codes)))
    ends = [end // 16 for end in accumulate(map(len, codes), initial=0)]  # 16 bytes an instruction
    if len(found) != ends[-1]:
        raise ValueError(f"nvdisasm names {len(found)} of {ends[-1]} instructions for sm_{capability}")
    return [sass.moved(found[begin:end], 16 * begin) for begin, end in pairwise(ends)]


CASES: list[tuple[Any, int]] = []  # here for the pool's processes, which are forked and find it full


def build_case(i: int) -> tuple[dict[str, Any], bytes]:
    return build(*CASES[i])


def parameters(aot: Any, capability: int) -> dict[str, str]:
    """By what configurations differ, in the name of their kernel."""
    found = aot.signature | aot.constants | {"warps": aot.num_warps, "stages": aot.num_stages}
    found |= {"aligned": aot.aligned, "capability": capability}
    return {f"{aot.kernel.__name__}.{name}": str(value) for name, value in found.items()}


def examine(name: str, capabilities: tuple[int, ...] = (80, 90), some: bool = False) -> list[dict[str, Any]]:
    """The facts of every configuration of a kernel file, for each capability in turn.

    Or of some, in which every value of every parameter of a kernel is met.
    """
    knobs.nvidia.dump_ptxas_log = True
    module = importlib.import_module(f"shipped.{name}")
    cases = [(aot, capability) for aot in module.AOT for capability in capabilities]
    kept = covering([parameters(*case) for case in cases]) if some else range(len(cases))
    CASES[:] = [cases[i] for i in kept]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        built = pool.map(build_case, range(len(CASES)), chunksize=1)
    for capability in capabilities:
        some = [(facts, code) for facts, code in built if facts["capability"] == capability]
        codes = listings([code for _, code in some], capability)
        for (facts, _), instructions in zip(some, codes, strict=True):
            facts |= sass.facts(instructions, facts["threads"])
    return [facts for facts, _ in built]


def account(names: list[str]) -> Iterator[str]:
    """A Markdown table: what each configuration is made of on sm_90; bytes are a program's, a turn."""
    yield f"Triton {triton.__version__}, sm_90"
    yield ""
    yield "| kernel | configuration | registers | shared KB | loop | HGMMA | HMMA | loads | bytes a turn |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in names:
        for facts in examine(name, (90,)):
            loop = facts["loop"] or dict.fromkeys(("instructions", "wgmma", "mma", "loads", "bytes"), 0)
            types = {t.strip("*") for key, t in facts["signature"].items() if key[:1] in "xwvm" and "*" in t}
            kept = {k: v for k, v in facts["constants"].items() if k.isupper() and v not in ("False", "None")}
            words = [*sorted(types), *(f"{k.lower()} {v}" for k, v in kept.items())]
            numbers = (
                *(facts["registers"], f"{facts['shared_bytes'] / 1024:.0f}", loop["instructions"]),
                *(loop["wgmma"], loop["mma"] - loop["wgmma"], loop["loads"], f"{loop['bytes']:,}"),
            )
            kernel = f"{name}: {facts['kernel'].strip('_')}"
            yield f"| {kernel} | {', '.join(words)} | {' | '.join(map(str, numbers))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--account", action="store_true", help="rows of a Markdown table")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every file of shipped/")
    args = parser.parse_args()
    names = args.names or NAMES
    if args.account:
        for line in account(names):
            print(line, flush=True)
    else:
        print(json.dumps([facts for name in names for facts in examine(name)], indent=1))


if __name__ == "__main__":
    main()
