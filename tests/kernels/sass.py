"""What a kernel's machine code says of its loops: how long, how many products and loads, which loads wait.

A load waits if its address or its guard comes from another load of the same turn of its loop: then every turn
takes two trips to memory, one after the other. A pipeline that loads the first a turn earlier has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ACCESS = re.compile(r"(?:LDGSTS|LDG|STG|RED|ATOMG)\b")
MMA, WGMMA = re.compile(r"(?:HMMA|HGMMA|IMMA|QGMMA)\b"), re.compile(r"(?:HGMMA|QGMMA)\b")
# writes nothing that a later instruction could read from a register
SILENT = re.compile(
    r"(?:STG|STS|STL|RED|BRA|BAR|BSYNC|BSSY|EXIT|NOP|MEMBAR|DEPBAR|LDGDEPBAR|WARPSYNC|ERRBAR|CCTL|RET|CALL|YIELD"
    r"|WARPGROUP|FENCE|LDGSTS|UTMA\w+|SYNCS|STSM|STAS|UCGABAR\w*)\b"
)
TWO_PREDICATES = re.compile(r"\w*(?:SETP\d?|PLOP3)\b")
ONE_RESULT = re.compile(r"(?:FCHK|VOTE|VOTEU|ELECT|R2P)\b")
PREDICATE = re.compile(r"!?U?P[T\d]|PR")
REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)\b(\.64)?")
WIDTH = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Instruction:
    """`guard` is the predicate in front, `@!P3`, or empty; addresses count from the kernel's begin."""

    address: int
    guard: str
    text: str

    @property
    def name(self) -> str:
        return self.text.split(None, 1)[0]

    @property
    def operands(self) -> list[str]:
        """Split at commas outside of brackets."""
        parts = self.text.split(None, 1)
        return re.split(r",\s*(?![^\[]*\])", parts[1]) if len(parts) > 1 else []

    @property
    def bits(self) -> int:
        """The width of an access of memory, of one thread."""
        return next((WIDTH[part] for part in self.name.split(".")[1:] if part in WIDTH), 32)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.match(r"BRA(?:\.\w+)*\s.*?0x([0-9a-f]+)$", self.text)
        return int(found[1], 16) if found else None


def parse(listing: str) -> list[Instruction]:
    """nvdisasm's lines, `/*0120*/  @P0 LDG.E R2, desc[UR4][R2.64] ;`."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", listing, re.MULTILINE)
    return [Instruction(int(address, 16), guard.strip(), text) for address, guard, text in found]


def moved(code: Iterable[Instruction], by: int) -> list[Instruction]:
    """The same with all addresses lower by `by`."""
    return [
        Instruction(
            i.address - by,
            i.guard,
            i.text if i.target is None else re.sub(r"0x[0-9a-f]+$", hex(i.target - by), i.text),
        )
        for i in code
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost ones: from where a branch goes back to, to the branch."""
    spans = sorted(
        (i.target, i.address) for i in code if i.target is not None and i.target < i.address
    )  # a branch to itself is what stands behind the end
    inner = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    return [[i for i in code if begin <= i.address <= end] for begin, end in inner]


def _results(i: Instruction) -> int:
    """How many of the first operands are written."""
    if SILENT.match(i.name):
        return 0
    if TWO_PREDICATES.match(i.name):
        return 2
    if ONE_RESULT.match(i.name):
        return 1
    kinds = [PREDICATE.fullmatch(word) is not None for word in i.operands]
    before = kinds.index(False) if False in kinds else len(kinds) - 1
    behind = next((n for n, kind in enumerate(kinds[before + 1 :]) if not kind), 0)  # carries
    return before + 1 + behind


def _width(i: Instruction) -> int:
    """Registers of a result."""
    if i.name.startswith("LDSM") or (MMA.match(i.name) and not WGMMA.match(i.name)):
        return 4
    if re.match(r"LD|ATOM", i.name):
        return max(1, i.bits // 32)
    shape = WGMMA.match(i.name) and re.search(r"\d+x(\d+)x\d+", i.name)
    if shape:
        return int(shape[1]) // 2  # 64 rows for 128 threads
    return 2 if re.match(r"D[A-Z]+\b|CS2R$|.*\.(?:WIDE|64|F64)\b", i.name) else 1


def _registers(words: list[str], width: int) -> set[str]:
    found = {f"P{n}" for word in words if word == "PR" for n in range(7)}
    for word in words:
        for bank, number, pair in REGISTER.findall(word):
            wide = 1 if "P" in bank else 2 if pair else width
            found |= {f"{bank}{int(number) + n}" for n in range(wide)}
    return found


def _written_and_read(i: Instruction) -> tuple[set[str], set[str]]:
    results, width = _results(i), _width(i)
    written = _registers(i.operands[:results], width)
    read = _registers([i.guard, *i.operands[results:]], 1)
    if ".WIDE" in i.name:  # the summand is a pair that names its first register alone
        read |= _registers(i.operands[-1:], 2)
    return written, read


def waiting(loop: list[Instruction]) -> list[Instruction]:
    """The loads whose address or guard comes from a load of the same turn, by registers or shared memory."""
    late: dict[str, set[str]] = {}  # what comes from a load, and the guards under which it was overwritten
    shared = False  # something loaded was stored there in this turn
    found = []
    for i in loop:
        written, read = _written_and_read(i)
        is_late = any(register in late and i.guard not in late[register] for register in read)
        if re.match(r"(?:LDGSTS|LDG)\b", i.name):
            if is_late:
                found.append(i)
            is_late = not i.name.startswith("LDGSTS")
        elif i.name.startswith("ATOMG"):
            is_late = True
        elif re.match(r"ST[SA]\b|STSM", i.name):
            shared |= is_late
        elif re.match(r"LDS", i.name):
            is_late |= shared
        for register in written:
            for guards in late.values():  # a guard with a new value is another one
                guards -= {f"@{register}", f"@!{register}"}
            if is_late:
                late[register] = set()
            elif not i.guard:
                late.pop(register, None)
            elif register in late:
                late[register].add(i.guard)
    return found


def facts(code: list[Instruction], threads: int) -> dict[str, Any]:
    """Of the whole code, and of its main loop: the innermost one with the most products, then loads."""
    accesses = [i.name for i in code if ACCESS.match(i.name)]
    inner = [_loop(loop, threads) for loop in loops(code)]
    return {
        "wide": sum(".128" in name for name in accesses),
        "narrow": sum(".128" not in name for name in accesses),
        "instructions": len(code),
        "mma": sum(bool(MMA.match(i.name)) for i in code),
        "wgmma": sum(bool(WGMMA.match(i.name)) for i in code),
        "waiting": [text for loop in inner for text in loop["waiting"]],
        "loop": max(inner, key=lambda loop: (loop["mma"], loop["bytes"]), default=None),
    }


def _loop(loop: list[Instruction], threads: int) -> dict[str, Any]:
    loads = [i for i in loop if re.match(r"(?:LDGSTS|LDG)\b", i.name)]
    return {
        "instructions": len(loop),
        "mma": sum(bool(MMA.match(i.name)) for i in loop),
        "wgmma": sum(bool(WGMMA.match(i.name)) for i in loop),
        "loads": len(loads),
        "bytes": sum(i.bits for i in loads) // 8 * threads,  # of a program, if no guard holds any back
        "waiting": [f"{i.address:#06x} {i.text}" for i in waiting(loop)],
    }
