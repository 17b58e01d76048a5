"""What is read from machine code, on loops whose answer is known."""

from __future__ import annotations

import pytest

import sass

pytestmark = pytest.mark.host

HEAD = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R9, desc[UR4][R6.64] ;
        /*0020*/                   LDG.E R8, desc[UR4][R8.64] ;
"""
TAIL = """
        /*0100*/              @!P0 BRA 0x30 ;
        /*0110*/                   STG.E.128 desc[UR4][R2.64], R12 ;
        /*0120*/                   EXIT ;
        /*0130*/                   BRA 0x130;
"""


def code(*body: str) -> list[sass.Instruction]:
    lines = [f"        /*{0x30 + 16 * i:04x}*/ {line} ;" for i, line in enumerate(body)]
    return sass.parse(HEAD + "\n".join(lines) + TAIL)


def waiting(*body: str) -> list[str]:
    (loop,) = sass.loops(code(*body))
    return [i.text for i in sass.waiting(loop)]


LOAD = "LDG.E R20, desc[UR4][R2.64]"
STAGED = "LDGSTS.E.BYPASS.128 [R40], desc[UR4][R2.64]"
USE = "LDG.E.128 R24, desc[UR4][R22.64]"


@pytest.mark.parametrize(
    "between",
    [
        ("IMAD.WIDE R22, R20, 0x4, R10",),
        ("IADD3 R22, P1, R10, R20, RZ", "IADD3.X R23, R11, RZ, RZ, P1, !PT"),
        ("IADD3 R30, P1, R10, R20, RZ", "IADD3.X R23, R11, RZ, RZ, P1, !PT"),  # by the carry
        ("STS [R40], R20", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDS R41, [R42]", "IMAD.WIDE R22, R41, 0x4, R10"),
        ("R2UR UR8, R20", "IMAD.WIDE R22, R11, UR8, R12"),
        ("SHFL.IDX PT, R22, R20, R41, 0x1f",),
        ("@P2 MOV R20, RZ", "IMAD.WIDE R22, R20, 0x4, R10"),  # the old one, where P2 is not set
        ("MOV R23, R20",),
    ],
)
def test_a_load_that_waits_is_found(between: tuple[str, ...]) -> None:
    assert waiting(LOAD, *between, USE) == [USE]


def test_a_guard_that_waits_is_found() -> None:
    assert waiting(LOAD, "ISETP.NE.AND P1, PT, R20, RZ, PT", "@P1 " + USE) == [USE]
    assert waiting(LOAD, "ISETP.NE.AND P1, PT, R21, RZ, PT", "@P1 " + USE) == []


@pytest.mark.parametrize(
    "body",
    [
        (USE, "IMAD.WIDE R22, R20, 0x4, R10", LOAD),  # loaded a turn earlier
        (LOAD, "MOV R20, R50", "IMAD.WIDE R22, R20, 0x4, R10", USE),  # overwritten
        (LOAD, "@!P1 MOV R22, R50", "@!P1 MOV R23, R51", "@!P1 " + USE),
        ("@!P1 LDG.E.64 R22, desc[UR4][R2.64]", "@!P1 MOV R22, R50", "@!P1 MOV R23, R51", "@!P1 " + USE),
        (LOAD, "FADD R23, R20, R21", "IMAD.WIDE R22, R50, 0x4, R10", USE),
        (
            "LDGSTS.E.BYPASS.128 [R40], desc[UR4][R2.64]",
            "LDS R41, [R42]",
            "IMAD.WIDE R22, R41, 0x4, R10",
            USE,
        ),
        (LOAD, "STG.E desc[UR4][R22.64], R20", USE),
    ],
)
def test_a_load_that_does_not_wait_is_not(body: tuple[str, ...]) -> None:
    assert waiting(*body) == []


def test_a_guard_with_a_new_value_is_another_one() -> None:
    body = ("@!P1 LDG.E.64 R22, desc[UR4][R2.64]", "@!P1 MOV R22, R50", "@!P1 MOV R23, R51")
    other = "ISETP.NE.AND P1, PT, R50, RZ, PT"
    assert waiting(*body, other, "@!P1 " + USE) == [USE]


def test_the_main_loop() -> None:
    first = [STAGED, "@P1 LDG.E.U16 R5, desc[UR4][R2.64]"]
    body = [*first, "HGMMA.64x64x16.F32.BF16 R24, R84, gdesc[UR16].tnspB, R24, gsb0"]
    found = sass.facts(code(*body), 128)
    assert found["loop"] == {
        "instructions": len(body) + 1,
        "mma": 1,
        "wgmma": 1,
        "loads": 2,
        "bytes": 128 * (16 + 2),
        "waiting": [],
    }
    assert (found["wide"], found["narrow"], found["instructions"]) == (2, 3, 10)


def test_the_innermost_loop_counts_and_one_behind_the_end_does_not() -> None:
    body = "LDG.E R4, desc[UR4][R2.64]", "FADD R5, R5, R4", "@P0 BRA 0x40", "@P1 BRA 0x30", "EXIT", "BRA 0x80"
    lines = [f"        /*{0x30 + 16 * i:04x}*/ {line} ;" for i, line in enumerate(body)]
    found = sass.parse(HEAD + "\n".join(lines))
    (loop,) = sass.loops(found)
    assert [i.address for i in loop] == [0x40, 0x50]
    (moved,) = sass.loops(sass.moved(found, 0x10))
    assert [i.address for i in moved] == [0x30, 0x40]
