"""Run folders that were damaged: what is there is right or not believed, `resume` ends with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save
from simulated import STEPS, Simulated, compute

from sparselth import files, ledger
from sparselth.config import EXPERIMENTS
from sparselth.errors import SparselthError
from sparselth.files import checksum, joined, load_arrays, plain, save_arrays, sealed, sealed_line
from sparselth.runs import RunRecord, checkpoint_path, open_run, read

Cli = Callable[..., tuple[int, str, str]]
Change = Callable[[bytes], bytes | None]
CONFIG = Simulated()  # two chains of four
CELL, LAST = "cells/seed0-number-01.safetensors", "cells/seed1-number-03.safetensors"
LINES = "cells.jsonl", "evaluations.jsonl", "timings.jsonl"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment is known to these tests alone."""
    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"simulated": Simulated})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run"
    assert compute(path, CONFIG, resume=False) == (8, "")
    return path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def bits(path: Path) -> dict[str, bytes]:
    """Every file of a run but what was measured, and figures."""
    files = [file for file in path.rglob("*") if file.is_file() and file.parent.name != "figures"]
    names = {str(file.relative_to(path)): file for file in files}
    return {name: file.read_bytes() for name, file in names.items() if name not in (".lock", "timings.jsonl")}


def flipped(share: float) -> Change:
    def change(content: bytes) -> bytes:
        at = int(share * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return change


def line(number: int, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Another line in place of one, without and with a checksum that is right."""

    def call(content: bytes) -> bytes:
        lines = content.splitlines()
        lines[number] = json.dumps(change(json.loads(lines[number]))).encode()
        return b"\n".join(lines) + b"\n"

    return call


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    return lambda content: b"".join(change(content.splitlines(keepends=True)))


def renamed(data: dict[str, Any]) -> dict[str, Any]:
    (name, value), *rest = reversed(data.items())
    return dict(reversed(rest)) | {f"{name}s": value}


WHOLE: dict[str, Change] = {
    "gone": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "more": lambda content: content + b"more",
    "null": lambda content: b"null\n",
    "no object": lambda content: b"[]\n",
    "an object": lambda content: b"{}\n",
    "deep": lambda content: b"[" * 10**5 + b"\n",
    "no text": lambda content: b"\xff\xfe" + content,
    "zeros": lambda content: bytes(len(content)),
} | {f"a bit at {share}": flipped(share) for share in (0, 0.3, 0.6, 1)}
BY_LINE: dict[str, Change] = {
    "a line gone": lines(lambda some: some[:2] + some[3:]),
    "a line twice": lines(lambda some: [*some, some[1]]),
    "other order": lines(lambda some: some[::-1]),
    "a line of another run": line(1, lambda data: data | {"seed": 7}),
    "another's": line(2, lambda data: data | {"level": 0}),
    "seed is a word": line(2, lambda data: data | {"seed": "0"}),
    "level is huge": line(2, lambda data: data | {"level": 10**30}),
    "a line is null": line(2, lambda data: None),
    "a line is empty": line(2, lambda data: {}),
    "a key renamed": line(2, renamed),
    "without a checksum": line(2, plain),
    "not a number": line(
        2, lambda data: {k: float("nan") if type(v) is float else v for k, v in data.items()}
    ),
    "no proof": line(2, lambda data: {k: v for k, v in data.items() if k not in ("proof", "sha256")}),
    "odd proof": line(2, lambda data: sealed(data | {"proof": 3})),
    "odd needs": line(2, lambda data: sealed(data | {"proof": dict(data.get("proof", {})) | {"needs": [1]}})),
}
DAMAGES = [
    *((file, kind) for file in ("config.json", "environment.json", *LINES, CELL) for kind in WHOLE),
    *((file, kind) for file in LINES for kind in BY_LINE),
]


def damage(path: Path, kind: str) -> None:
    content = (WHOLE | BY_LINE)[kind](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def right(record: RunRecord, whole: RunRecord) -> bool:
    """Whether all that a record holds is what was computed; times may be unknown."""
    timed = ("train_seconds", "step_seconds")
    for one in record.points:
        same = next(p for p in whole.points if (p["seed"], p["level"]) == (one["seed"], one["level"]))
        if any(one[name] not in (same[name], None if name in timed else same[name]) for name in same):
            return False
    return all(one in whole.evaluations for one in record.evaluations)


@pytest.mark.whole
@pytest.mark.parametrize(("file", "kind"), DAMAGES, ids=[f"{file}, {kind}" for file, kind in DAMAGES])
def test_damage_is_not_believed_and_resume_ends_with_the_same_bits(
    file: str, kind: str, made: Path, run: Path
) -> None:
    damage(run / file, kind)
    harmless = (run / file).is_file() and (run / file).read_bytes() == (made / file).read_bytes()
    harmless |= kind == "all but a byte" and file.endswith(".json")  # white space
    if file == "config.json" and not harmless:  # what cannot be computed again
        before = bits(run)
        with pytest.raises(SparselthError, match=str(run)) as raised:
            read(run)
        with pytest.raises(SparselthError) as again:
            compute(run, CONFIG)
        assert str(again.value) == str(raised.value)
        assert "\n" not in str(again.value)
        assert bits(run) == before
        return
    record = read(run)
    assert right(record, read(made))
    assert harmless or record.damage or len(record.points) < 8 or file not in LINES or kind == "other order"
    count, named = compute(run, CONFIG)
    assert "\n" not in named
    if kind == "other order" or harmless:
        assert (count, named) == (0, "")
        return
    if (file, kind) not in [("cells.jsonl", kind) for kind in ("gone", "empty", "a line gone")]:
        assert Path(file).name in named  # but a cell without a line may not have happened yet
    assert {**bits(run), "environment.json": b""} == {**bits(made), "environment.json": b""}
    assert len(read(run).points) == 8
    assert compute(run, CONFIG)[0] == 0


@pytest.mark.parametrize("file", ["environment.json", *LINES, CELL, "config.json"])
def test_a_folder_in_the_place_of_a_file_is_named(file: str, run: Path) -> None:
    (run / file).unlink()
    (run / file / "inside").mkdir(parents=True)
    try:
        said = compute(run, CONFIG)[1]
    except SparselthError as error:
        said = str(error)
    assert Path(file).name in said
    assert "\n" not in said


def test_what_came_out_otherwise_takes_what_was_computed_from_it_along(made: Path, run: Path) -> None:
    damage(run / CELL, "a bit at 0.6")
    assert compute(run, CONFIG)[0] == 1  # the same bits: what was computed from them stays
    assert bits(run) == bits(made)
    (run / CELL).unlink()
    other = Simulated()
    object.__setattr__(other, "machine", 1)
    (run / CELL.replace("01", "00")).unlink()
    assert compute(run, other)[0] == 4  # the chain, and not the other chain
    assert not read(run).damage
    whole = run.parent / "whole"
    compute(whole, other)
    chain = {name: content for name, content in bits(whole).items() if "seed0" in name}
    assert chain.items() <= bits(run).items()
    assert (run / LAST).read_bytes() == (made / LAST).read_bytes()
    assert compute(run, other) == (0, "")


def test_a_kill_before_what_came_from_other_bits_is_dropped(run: Path) -> None:
    """The new line is there, and so are those of what was computed from the file before."""
    arrays, header = load_arrays(run / CELL.replace("01", "02"))
    save_arrays(run / CELL, arrays, header | {"cell": "seed0-number-01"})
    rows = [plain(json.loads(text)) for text in (run / "cells.jsonl").read_bytes().splitlines()]
    rows[1]["proof"]["file"] = checksum((run / CELL).read_bytes())
    (run / "cells.jsonl").write_bytes(joined(sealed_line(row) for row in rows))
    record = read(run)
    assert "seed 0 number level 2 was computed from another file of seed 0 number level 1" in record.damage
    assert [point["level"] for point in record.points if point["seed"] == 0] == [0, 1, 3]


def cut(run: Path, cells: int) -> None:
    """As if a run had been killed with so many finished cells."""
    for name, per_cell in (("cells.jsonl", 1), ("timings.jsonl", 1), ("evaluations.jsonl", STEPS)):
        some = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(b"".join(some[: cells * per_cell]))


@pytest.mark.parametrize(
    "kind", ["a cell file", "another's", "of another run", "damaged", "empty", "finished"]
)
def test_a_checkpoint_that_is_none_is_not_gone_on_from(kind: str, made: Path, run: Path) -> None:
    cut(run, 5)
    cell = CONFIG.cells()[2 if kind == "finished" else 6]
    file = checkpoint_path(run, cell)
    header = {"schema": "sparselth.checkpoint/1", "cell": cell.key, "config": CONFIG.digest}
    save_arrays(file, {}, header)
    match kind:
        case "a cell file":
            shutil.copy(made / "cells" / file.name, file)
        case "another's":
            save_arrays(file, {}, header | {"cell": CONFIG.cells()[5].key})
        case "of another run":
            save_arrays(file, {}, header | {"config": "01234567"})
        case "damaged" | "empty":
            damage(file, "a bit at 0.6" if kind == "damaged" else "empty")
    with open_run(run, CONFIG, {}, resume=True) as folder:
        assert not file.exists()
        assert file.name in folder.damage or kind == "finished"
    save_arrays(checkpoint_path(run, CONFIG.cells()[6]), {}, header | {"cell": CONFIG.cells()[6].key})
    with open_run(run, CONFIG, {}, resume=True) as folder:
        assert checkpoint_path(run, CONFIG.cells()[6]).exists()
        assert not folder.damage


def older(run: Path) -> None:
    """Make a folder that of the version before: no checksums, and headers with the digest of all fields."""
    for name in LINES:
        rows = [plain(json.loads(text)) for text in (run / name).read_bytes().splitlines()]
        for row in rows:
            row.pop("proof", None)
        (run / name).write_bytes(joined(map(files.line, rows)))
    for name in ("config.json", "environment.json"):
        (run / name).write_bytes(files.dump(plain(json.loads((run / name).read_bytes()))))
    for file in (run / "cells").iterdir():
        arrays, header = load_arrays(file)
        text = json.dumps(header | {"config": CONFIG.digest_before()})
        file.write_bytes(save(arrays, metadata={"sparselth": text}))


@pytest.mark.whole
@pytest.mark.parametrize(("file", "kind"), DAMAGES, ids=[f"{file}, {kind}" for file, kind in DAMAGES])
def test_damage_of_an_older_run_is_one_line(file: str, kind: str, run: Path, cli: Cli) -> None:
    """Without checksums it cannot always be told; but what cannot be read is named, nothing else fails."""
    older(run)
    try:
        damage(run / file, kind)
    except TypeError:  # it has no proof to be odd
        return
    for words in (["show", str(run)], ["ls", "runs", "--out", str(run.parent)]):
        code, out, err = cli(*words)
        assert (out + err).count("\n") <= 12
        assert "a fault of sparselth" not in out + err
        assert code == 0 or (words[0] == "show" and err.count("\n") == 1)
    with suppress(SparselthError):
        compute(run, CONFIG)
        assert read(run).complete
        assert compute(run, CONFIG)[0] == 0


def test_an_older_run_is_read_and_proven_when_it_goes_on(made: Path, run: Path) -> None:
    older(run)
    assert read(run).points == read(made).points
    assert not read(run).proven
    before = bits(run)
    assert compute(run, CONFIG) == (0, "")
    assert bits(run) == before  # a finished one stays as it is
    damage(run / LAST, "a bit at 0.6")
    shutil.copy(run / CELL, run / CELL.replace("01", "03"))
    count, named = compute(run, CONFIG)
    assert count == 2
    assert "cells/seed0-number-03.safetensors is the file of seed0-number-01" in named
    assert read(run).proven
    assert read(run).points == read(made).points
    assert compute(run, CONFIG) == (0, "")


def test_an_older_run_whose_config_was_altered_is_refused(run: Path) -> None:
    older(run)
    file = run / "config.json"
    file.write_text(file.read_text().replace('"rate": 0.5', '"rate": 0.25'))
    before = bits(run)
    with pytest.raises(SparselthError, match="of another configuration, so it was altered"):
        compute(run, replace(CONFIG, rate=0.25))
    assert bits(run) == before


def test_a_time_too_large_to_be_one_is_not_what_was_written() -> None:
    assert ledger._finite({"seed": 0, "train_seconds": 1})
    for value in (10**400, float("nan"), float("inf"), -(10**400)):
        assert not ledger._finite({"seed": 0, "train_seconds": value})


# ---- by hand: which words for which damage, and what is left

WHO = [f"seed {cell.seed} number level {cell.level}" for cell in CONFIG.cells()]
PAST = {"seed": 0, "arm": "number", "level": 0, "draw": 0}  # the first cell


def rewrite(run: Path, name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Lines of a file as `change` has them, with their checksums where the file has any."""
    rows = [plain(json.loads(text)) for text in (run / name).read_bytes().splitlines()]
    seal = files.line if name == "evaluations.jsonl" else sealed_line
    (run / name).write_bytes(joined(map(seal, change(rows))))


def with_(number: int, **changes: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [row | changes if i == number else row for i, row in enumerate(rows)]


def proof(number: int, **changes: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [
        row | {"proof": row["proof"] | changes} if i == number else row for i, row in enumerate(rows)
    ]


NOT = "is not what was written"
EIGHTH = f"cells.jsonl, line 8, {NOT}"
LACKS, UNKNOWN = (
    "evaluations.jsonl lacks lines of %s, or has others",
    "timings.jsonl lacks %s, whose times stay unknown",
)
FOUND: dict[str, tuple[str, Any, list[str], set[int]]] = {
    "nothing": ("cells.jsonl", lambda rows: rows, [], set()),
    "a cell's line gone": ("cells.jsonl", lambda rows: rows[:-1], [], {7}),
    "a second line": (
        "cells.jsonl",
        lambda rows: [*rows, rows[1]],
        [f"cells.jsonl, line 9, is a second one of {WHO[1]}"],
        set(),
    ),
    "another seed": (
        "cells.jsonl",
        with_(7, seed=9),
        ["cells.jsonl, line 8, is of another run (seed 9 number level 3)"],
        {7},
    ),
    "another configuration": (
        "cells.jsonl",
        proof(7, config="0"),
        [f"cells.jsonl, line 8, is of another run ({WHO[7]})"],
        {7},
    ),
    "a level that is none": ("cells.jsonl", with_(7, level="3"), [EIGHTH], {7}),
    "a draw that is none": ("cells.jsonl", with_(7, draw=None), [EIGHTH], {7}),
    "an arm that is none": ("cells.jsonl", with_(7, arm=3), [EIGHTH], {7}),
    "no proof": ("cells.jsonl", with_(7, proof=None), [EIGHTH], {7}),
    "an empty proof": ("cells.jsonl", with_(7, proof={}), [EIGHTH], {7}),
    "a proof without a file": ("cells.jsonl", proof(7, file=None), [EIGHTH], {7}),
    "a proof without needs": ("cells.jsonl", proof(7, needs=[]), [EIGHTH], {7}),
    "a proof of no evaluations": ("cells.jsonl", proof(7, evaluations=1), [EIGHTH], {7}),
    "a proof of no configuration": ("cells.jsonl", proof(7, config=1), [EIGHTH], {7}),
    "a proof of other evaluations": ("cells.jsonl", proof(7, evaluations="0"), [LACKS % WHO[7]], {7}),
    "a proof of another file": ("cells.jsonl", proof(7, file="0"), [f"{LAST} {NOT}"], {7}),
    "computed from another file": (
        "cells.jsonl",
        proof(7, needs={CONFIG.cells()[6].key: "0"}),
        [f"{WHO[7]} was computed from another file of {WHO[6]}"],
        {7},
    ),
    "an evaluation gone": ("evaluations.jsonl", lambda rows: rows[1:], [LACKS % WHO[0]], {0}),
    "another evaluation": ("evaluations.jsonl", with_(1, partial=0.5), [LACKS % WHO[0]], {0}),
    "an evaluation twice": (
        "evaluations.jsonl",
        lambda rows: [*rows, rows[0]],
        [f"evaluations.jsonl, line 25, is a second one of {WHO[0]}"],
        set(),
    ),
    "an evaluation of another run": (
        "evaluations.jsonl",
        with_(0, seed=9),
        ["evaluations.jsonl, line 1, is of another run (seed 9 number level 0)", LACKS % WHO[0]],
        {0},
    ),
    "an evaluation of nobody": (
        "evaluations.jsonl",
        with_(0, seed=0.0),
        [f"evaluations.jsonl, line 1, {NOT}", LACKS % WHO[0]],
        {0},
    ),
    "evaluations in another order": ("evaluations.jsonl", lambda rows: rows[::-1], [], set()),
    "a time gone": ("timings.jsonl", lambda rows: rows[1:], [UNKNOWN % WHO[0]], set()),
    "two times gone": ("timings.jsonl", lambda rows: rows[2:], [UNKNOWN % "2 cells"], set()),
    "a time that is none": (
        "timings.jsonl",
        with_(7, train_seconds=[]),
        [f"timings.jsonl, line 8, {NOT}", UNKNOWN % WHO[7]],
        set(),
    ),
    "an endless time": (
        "timings.jsonl",
        with_(7, step_seconds=1e300),
        [f"timings.jsonl, line 8, {NOT}", UNKNOWN % WHO[7]],
        set(),
    ),
    "a time and a word": ("timings.jsonl", with_(7, clock="wall"), [], set()),
    "a second time": (
        "timings.jsonl",
        lambda rows: [*rows, rows[0] | {"train_seconds": 2.0}],
        [f"timings.jsonl, line 9, is a second one of {WHO[0]}"],
        set(),
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_damage_is_named_in_these_words(kind: str, run: Path) -> None:
    name, change, problems, gone = FOUND[kind]
    rewrite(run, name, change)
    found = ledger.examine(run, CONFIG, proven=True, files=True)
    assert found.problems == problems
    cells = CONFIG.cells()
    assert {*found.entries} == {cell for i, cell in enumerate(cells) if i not in gone}
    for cell, entry in found.entries.items():
        steps = [one.data["step"] for one in entry.evaluations]
        assert steps == ([0, 1, 2] if kind != "evaluations in another order" else sorted(steps))
        assert entry.point.items() >= {"seed": cell.seed, "level": cell.level}.items()
        assert "proof" not in entry.point
    untimed = {WHO[cells.index(cell)] for cell, entry in found.entries.items() if entry.timing is None}
    lacks = [text for text in problems if "unknown" in text]
    assert UNKNOWN % ("2 cells" if len(untimed) > 1 else "".join(untimed)) in lacks or not untimed | {*lacks}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gone", "is missing"), ("damaged", NOT), ("torn", "is damaged"), ("a folder", "cannot be read"),
        ("another's", "is the file of seed0-number-00"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("proven", [True, False])
def test_files_of_cells_are_held_against_their_proofs(kind: str, says: str, proven: bool, run: Path) -> None:
    if not proven:
        older(run)
    file = run / CELL
    arrays, header = load_arrays(file)
    match kind:
        case "gone":
            file.unlink()
        case "damaged":
            save_arrays(file, {"numbers": arrays["numbers"] + 1}, header)
        case "torn":
            file.write_bytes(file.read_bytes()[:-9])
        case "a folder":
            file.unlink()
            file.mkdir()
        case _:
            shutil.copy(run / CELL.replace("01", "00"), file)
    before = CONFIG.digest_before()
    found = ledger.examine(run, CONFIG, proven, files=True, before=before)
    if not proven and kind == "damaged":
        assert found.problems == []  # nobody can tell
        return
    says = "is damaged" if kind == "a folder" and not proven else says
    assert found.problems == [f"{CELL} {says}"]
    assert {*found.entries} == {*CONFIG.cells()} - {CONFIG.cells()[1]}
    assert ledger.examine(run, CONFIG, proven, files=False).problems == []


def test_files_of_another_configuration_are_none_of_it(run: Path) -> None:
    older(run)
    other, cells = replace(CONFIG, rate=0.25), CONFIG.cells()
    says = f"^{run}/config.json: its cells are of another configuration, so it was altered; restore it"
    with pytest.raises(SparselthError, match=says):
        ledger.examine(run, other, proven=False, files=True, before="0")
    file = run / CELL
    arrays, header = load_arrays(file)
    save_arrays(file, arrays, header | {"config": "0"})
    found = ledger.examine(run, CONFIG, proven=False, files=True, before=CONFIG.digest_before())
    assert found.problems == [f"{CELL} is of another configuration"]
    assert {*found.entries} == {*cells} - {cells[1]}
    save_arrays(file, arrays, {"schema": header["schema"]})  # as the first version wrote them
    assert not ledger.examine(run, CONFIG, False, files=True, before=CONFIG.digest_before()).problems


def test_lines_without_proofs_are_believed_by_step_and_whom_they_name(run: Path) -> None:
    older(run)
    evaluations = [json.loads(text) for text in (run / "evaluations.jsonl").read_bytes().splitlines()]
    swapped = [evaluations[1], evaluations[0], *evaluations[2:], PAST | {"step": None}, PAST | {"step": 3.0}]
    (run / "evaluations.jsonl").write_bytes(joined(map(files.line, swapped)))
    found = ledger.examine(run, CONFIG, proven=False, files=False)
    assert found.problems == [f"evaluations.jsonl, line {number}, {NOT}" for number in (25, 26)]
    first = found.entries[CONFIG.cells()[0]]
    assert [one.data["step"] for one in first.evaluations] == [0, 1, 2]
    assert first.proof is None
    assert first.line == files.line(first.point)
    assert not ledger.examine(run, CONFIG, proven=True, files=False).entries


def test_a_ledger_is_written_back_in_the_order_of_cells(run: Path) -> None:
    whole = {name: (run / name).read_bytes() for name in LINES}
    rewrite(run, "cells.jsonl", lambda rows: rows[::-1])
    found = ledger.examine(run, CONFIG, proven=True, files=True)
    assert [*found.entries] == CONFIG.cells()[::-1]
    assert found.content(CONFIG.cells()) == whole
    some = found.content(CONFIG.cells()[:2])
    assert {name: len(text.splitlines()) for name, text in some.items()} == {
        "cells.jsonl": 2, "timings.jsonl": 2, "evaluations.jsonl": 2 * STEPS,
    }  # fmt: skip
    del found.entries[CONFIG.cells()[0]]
    found.entries[CONFIG.cells()[1]] = replace(found.entries[CONFIG.cells()[1]], timing=None)
    rest = found.content(CONFIG.cells())
    assert {name: len(text.splitlines()) for name, text in rest.items()} == {
        "cells.jsonl": 7, "timings.jsonl": 6, "evaluations.jsonl": 7 * STEPS,
    }  # fmt: skip


def test_a_summary_has_three_problems_and_counts_the_rest() -> None:
    problems = ["a", "b", "c", "d", "e"]
    says = ["", "a", "a; b", "a; b; c", "a; b; c; and 1 more", "a; b; c; and 2 more"]
    assert [ledger.Ledger(problems=problems[:n]).summary() for n in range(6)] == says


def test_whom_a_line_is_about_is_read_once_for_all_lines_of_a_cell() -> None:
    known: dict[bytes, Any] = {}

    def whom(text: bytes) -> Any:
        return ledger._whom(files.Line(1, text, False, True), known)

    cell = CONFIG.cells()[0]
    assert whom(b'{"seed": 0, "arm": "number", "level": 0, "draw": 0, "x": 1}') == cell
    assert known == {b'{"seed": 0, "arm": "number", "level": 0, "draw": 0': cell}
    known[b'{"seed": 0, "arm": "number", "level": 0, "draw": 0'] = "told"
    assert whom(b'{"seed": 0, "arm": "number", "level": 0, "draw": 0, "y": 2}') == "told"
    assert whom(b'{"draw": 0, "seed": 0, "arm": "number", "level": 0, "x": 1}') == cell
    assert whom(b'{"x": 3, "seed": 0, "arm": "number", "level": 0, "draw": 0, "z": 1}') == cell
    assert len(known) == 1
    assert whom(b'{"seed": 0, "arm": "number", "level": 0, "draw": 0}') == "told"
    for none in (b"", b"[]", b'{"draw": ', b'{"seed": true, "arm": "a", "level": 0, "draw": 0, "x": 1}'):
        assert whom(none) is None


def test_the_files_of_a_cell() -> None:
    cell = CONFIG.cells()[6]
    assert ledger.cell_path(Path("run"), cell) == Path("run/cells/seed1-number-02.safetensors")
    assert ledger.checkpoint_path(Path("run"), cell) == Path("run/checkpoints/seed1-number-02.safetensors")
    expected = {"seed": 1, "arm": "number", "level": 2, "draw": 0, "x": 3}
    assert [*ledger.point(cell, x=3).items()] == [*expected.items()]
