"""Whether two revisions compute the same bits, the same rows of `bench`, and their steps as fast:

    python bench/same_bits.py BEFORE [AFTER] [--data-dir FOLDER] [--only bits|bench|steps]

Both are installed beside each other, each with its own C kernels; torch is this interpreter's. Only the
command line and the files of a run are touched, so that the revisions may differ in everything else. Exit
code 1 when something differs or is slower.

bits   A small set of runs of `imp`: metrics, masks and weights bit by bit. Which layers are compressed
       follows from measured times, so a run of AFTER is begun with config.json and environment.json of
       BEFORE's and goes on with --resume: runs of the older version are read and resumed, too. One is begun
       afresh.
bench  The rows of `bench`, what `auto` takes, and times beside those of torch's own rows: the same code in
       both, so how far these are apart is noise. A form that was only renamed is the same form.
steps  Steps of training, BEFORE and AFTER at the same time, each on a core of its own, the cores swapped from
       round to round: what slows the machine slows both. The median of the ratios and an interval of it;
       where that is wider than 3 % nothing can be concluded, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
WHO = ("seed", "arm", "level", "draw")  # what names a line of a run
ROW = ("implementation", "network", "shape", "batch", "dtype", "sparsity", "mask")  # and one of bench
SLOWER = 1.03  # a step may be so much slower
ROW_SLOWER = 1.10  # a row of bench, where torch's own rows are steadier than that
MANY = 8  # differences that are printed of a line of the last table
SURE = 0.9  # of an interval of the median
FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}

# Images are cut where a network takes milliseconds for each: the classes of data sets are found by name,
# wherever a revision keeps them.
CUT = """
import importlib, pkgutil, sys
import sparselth.data as data
rooms = [data, *(importlib.import_module(f"sparselth.data.{m.name}")
                 for m in pkgutil.iter_modules(getattr(data, "__path__", [])))]
kinds = {room.Images for room in rooms if hasattr(room, "Images")}
for kind in kinds:
    def cut(self, *args, begin=kind.__init__, **named):
        begin(self, *args, **named)
        for name, size in (("train", 640), ("test", 200)):
            for what in ("images", "labels"):
                object.__setattr__(self, f"{name}_{what}", getattr(self, f"{name}_{what}")[:size])
    kind.__init__ = cut
assert kinds
from sparselth.cli.main import main
main(sys.argv[1:])
"""


# ---- the set


@dataclass(frozen=True)
class Run:
    """A run of `imp` that both revisions make, and how AFTER comes to it."""

    name: str
    flags: str
    data: str = "mnist5k"
    how: str = "begun by BEFORE"  # or "afresh", "killed", "taken over"

    @property
    def cut(self) -> bool:
        return self.data == "cifar10"


SMALL = "--model lenet-300-100 --steps 200 --rate 0.5 --levels 3"
ALL_ARMS = "--arms ticket,reinit,random-mask,random-reinit"
SGD = "--optimizer sgd --lr 0.05 --weight-decay 1e-4 --warmup 20 --lr-drops 150"
RUNS = (
    Run("all arms, two draws", f"{SMALL} {ALL_ARMS} --reinits 2 --levels 2"),
    Run("rewinding", f"{SMALL} {ALL_ARMS} --seeds 3 --rewind 50"),
    Run("sgd, weight decay", f"{SMALL} {SGD} --seeds 0 --rewind 30"),
    Run("one-shot", f"{SMALL} --seeds 0 --one-shot"),
    Run("scope global", f"{SMALL} --seeds 0 --scope global --arms ticket,random-mask"),
    Run("kernels native", f"{SMALL} --seeds 0 --kernels native --arms ticket,reinit"),
    Run("kernels torch, batches", f"{SMALL} --seeds 0 --kernels torch --replicas 4 --rewind 20"),
    Run("kernels reference", f"{SMALL} --seeds 0 --kernels reference --replicas 4", how="afresh"),
    Run("killed and resumed", f"{SMALL} --steps 400 --seeds 0 --rewind 50", how="killed"),
    Run("taken over half way", f"{SMALL} --steps 400 --seeds 0 --rewind 50", how="taken over"),
    Run("lenet5", f"--model lenet5 --steps 120 --rate 0.5 --levels 3 --seeds 0 --rewind 20 {ALL_ARMS}"),
    Run("lenet5, sgd", f"--model lenet5 --steps 120 --rate 0.6 --levels 2 --seeds 0 {SGD} --lr-drops 90"),
    Run("lenet5, torch", "--model lenet5 --steps 60 --rate 0.7 --levels 2 --seeds 0 --kernels torch"),
    Run("lenet5, reference", "--model lenet5 --steps 60 --rate 0.7 --levels 2 --seeds 0 --kernels reference"),
    Run("all of mnist", "--model lenet-300-100 --steps 300 --levels 1 --seeds 0 --arms ticket", "mnist"),
    Run("all of fashion", "--model lenet5 --steps 100 --levels 1 --seeds 0 --arms ticket", "fashion-mnist"),
    Run(
        "conv2",
        "--model conv2 --steps 8 --batch-size 16 --rate 0.97 --levels 3 --seeds 0 --arms ticket,random-mask",
        "cifar10",
    ),
    Run(
        "vgg19, batch norms",
        "--model vgg19 --steps 5 --batch-size 8 --scope global --rate 0.5 --levels 1 --seeds 0 --rewind 2 "
        "--arms ticket,reinit",
        "cifar10",
    ),
)


# ---- two revisions


@dataclass(frozen=True)
class Revision:
    """An installed revision; commands run in a folder of their own, away from any checkout."""

    name: str
    package: Path
    work: Path

    def start(
        self, words: Iterable[str], cut: bool = False, core: int | None = None
    ) -> subprocess.Popen[str]:
        program = ["-c", CUT] if cut else ["-m", "sparselth"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SPARSELTH_")}
        # one cache for both: of what was measured once, the same choices follow
        kept |= {"PYTHONPATH": str(self.package), "XDG_CACHE_HOME": str(self.work / "cache")}
        pinned = [] if core is None else ["taskset", "--cpu-list", str(core)]
        return subprocess.Popen(
            [*pinned, sys.executable, *program, *words],
            cwd=self.work,
            env=kept | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(
        self,
        words: Iterable[str],
        cut: bool = False,
        codes: tuple[int, ...] = (0,),
        core: int | None = None,
    ) -> str:
        """stdout of a command; RuntimeError when it fails."""
        words = list(words)
        process = self.start(words, cut, core)
        out, err = process.communicate()
        if process.returncode not in codes:
            last = (err.strip().splitlines() or ["nothing on stderr"])[-1]
            raise RuntimeError(
                f"{self.name}: exit code {process.returncode} of {' '.join(map(str, words))}: {last}"
            )
        return out


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"same_bits: git {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def install(revision: str, label: str, work: Path) -> Revision:
    """A revision of this checkout, built from its own files."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    source, package = work / f"source-{label}", work / f"package-{label}"
    source.mkdir()
    archive = subprocess.Popen(["git", "-C", str(ROOT), "archive", commit], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(source)], stdin=archive.stdout, check=True)
    archive.wait()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-build-isolation", "--target", str(package), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"same_bits: {revision} cannot be installed:\n{done.stderr[-2000:]}")
    found = Revision(f"{label} {commit[:9]}", package, work)
    environment = os.environ | {"PYTHONPATH": str(package)}
    ask = [sys.executable, "-c", "import sparselth; print(sparselth.__file__)"]
    place = subprocess.run(ask, cwd=work, env=environment, capture_output=True, text=True).stdout.strip()
    if not Path(place).is_relative_to(package):
        raise SystemExit(f"same_bits: {found.name} was installed, but Python imports {place or 'nothing'}")
    return found


def both(before: str, after: str, work: Path) -> tuple[Revision, Revision]:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda pair: install(*pair, work), [(before, "before"), (after, "after")])
    compiled = [any((r.package / "sparselth/kernels").glob("_native_lib*.so")) for r in (one, two)]
    if compiled[0] != compiled[1]:
        raise SystemExit(f"same_bits: C kernels were compiled for {(one, two)[compiled[1]].name} alone")
    say(f"{one.name} and {two.name}, {'with' if all(compiled) else 'without'} C kernels")
    return one, two


# ---- what differs between two runs


@dataclass
class Compared:
    """What two runs have in common; `notes` are no difference in what was computed."""

    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cells: int = 0
    compressed: int = 0  # cells whose state was smaller than dense
    arrays: int = 0
    numbers: int = 0  # in arrays


def compare(before: Path, after: Path) -> Compared:
    """Compare two run folders: every line, every array; of the configuration fields may be new."""
    found = Compared()
    _compare_configs(before, after, found)
    for name, key in (("cells.jsonl", WHO), ("evaluations.jsonl", (*WHO, "step"))):
        _compare_lines(name, key, _lines(before / name), _lines(after / name), found)
    files = [{file.name for file in (run / "cells").iterdir()} for run in (before, after)]
    found.differences += [f"cells/{name}: missing in AFTER" for name in sorted(files[0] - files[1])]
    found.differences += [f"cells/{name}: in AFTER alone" for name in sorted(files[1] - files[0])]
    for name in sorted(files[0] & files[1]):
        _compare_arrays(before, after, f"cells/{name}", found)
    if not found.cells or not found.arrays:
        found.differences.append("nothing was computed")
    return found


def _compare_configs(before: Path, after: Path, found: Compared) -> None:
    a, b = (_flat(_read(json.loads((run / "config.json").read_text()))) for run in (before, after))
    for name in a:
        if name not in b:
            found.differences.append(f"config.json: {name} is gone")
        elif _text(a[name]) != _text(b[name]):
            found.differences.append(f"config.json: {name} was {_text(a[name])}, is {_text(b[name])}")
    if added := [f"{name} {_text(b[name])}" for name in b if name not in a]:
        found.notes.append(f"config.json has new fields: {', '.join(added)}")


def _compare_lines(
    file: str, key: tuple[str, ...], a: list[dict[str, Any]], b: list[dict[str, Any]], found: Compared
) -> None:
    sides = [{tuple(line.get(k) for k in key): line for line in lines} for lines in (a, b)]
    for label, side, lines in (("BEFORE", sides[0], a), ("AFTER", sides[1], b)):
        if len(side) < len(lines):
            found.differences.append(f"{file}: double lines in {label}")
    for who, line in sides[0].items():
        where = f"{file}, {_who(key, who)}"
        other = sides[1].get(who)
        if other is None:
            found.differences.append(f"{where}: missing in AFTER")
            continue
        for name, value in line.items():
            if name not in other:
                found.differences.append(f"{where}: {name} is gone")
            elif _text(value) != _text(other[name]):
                found.differences.append(f"{where}: {name} was {_text(value)}, is {_text(other[name])}")
        if added := sorted(set(other) - set(line)):
            found.notes.append(f"{file} has new keys: {', '.join(added)}")
    alone = [who for who in sides[1] if who not in sides[0]]
    found.differences += [f"{file}, {_who(key, who)}: in AFTER alone" for who in alone]
    if file == "cells.jsonl":
        found.cells = len(sides[0])
        found.compressed = sum(line.get("state_bytes", 1) < line.get("dense_state_bytes", 0) for line in a)


def _compare_arrays(before: Path, after: Path, file: str, found: Compared) -> None:
    (a, head), (b, other) = (_arrays(run / file) for run in (before, after))
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            side = "missing in AFTER" if name in a else "in AFTER alone"
            found.differences.append(f"{file}: {name} is {side}")
            continue
        x, y = a[name], b[name]
        found.arrays, found.numbers = found.arrays + 1, found.numbers + x.size
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            kinds = f"was {x.dtype} {list(x.shape)}, is {y.dtype} {list(y.shape)}"
            found.differences.append(f"{file}: {name} {kinds}")
        elif x.tobytes() != y.tobytes():
            wide = [np.ascontiguousarray(v).reshape(-1).view(np.uint8).reshape(v.size, -1) for v in (x, y)]
            off = np.flatnonzero((wide[0] != wide[1]).any(1))
            first = f"the first, number {off[0]}, was {x.flat[off[0]]!r}, is {y.flat[off[0]]!r}"
            found.differences.append(f"{file}: {name}: {len(off):,} of {x.size:,} numbers differ; {first}")
    changed = sorted(k for k in head.keys() | other.keys() if _text(head.get(k)) != _text(other.get(k)))
    if changed:
        found.notes.append(f"headers of cells differ in {', '.join(changed)}")


def _read(data: dict[str, Any]) -> dict[str, Any]:
    """Without checksums: what they are of is compared itself, and what is new in a header changes them."""
    return {name: value for name, value in data.items() if name not in ("proof", "sha256")}


def _lines(file: Path) -> list[dict[str, Any]]:
    return [_read(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def _arrays(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    with safe_open(file, framework="numpy") as opened:
        header = json.loads((opened.metadata() or {}).get("sparselth", "{}"))
        return {name: opened.get_tensor(name) for name in opened.keys()}, _read(header)  # noqa: SIM118


def _flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _text(value: Any) -> str:
    """JSON in which equal floats, and no others, are equal: NaN is NaN, -0.0 is not 0.0."""
    return json.dumps(value, sort_keys=True)


def _who(key: tuple[str, ...], values: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(key, values, strict=True))


# ---- bits


@dataclass
class Result:
    """A line of the last table."""

    part: str
    name: str
    found: str
    verdict: str  # "equal", "differs", "left out", ...
    bad: bool = False
    details: list[str] = field(default_factory=list)


def bits(before: Revision, after: Revision, data: Path | None, lanes: int) -> list[Result]:
    """Every run by both, `lanes` at a time, one worker each."""
    there = {"mnist5k"} | {name for name, folder in FOLDERS.items() if data and (data / folder).is_dir()}
    lacks = sorted({run.data for run in RUNS} - there)
    if lacks:
        say(f"left out: runs on {', '.join(lacks)}; --data-dir FOLDER names where these lie")
    with ThreadPoolExecutor(lanes) as pool:
        return list(
            pool.map(lambda run: _bits(run, before, after, data), [r for r in RUNS if r.data in there])
        )


def _bits(run: Run, before: Revision, after: Revision, data: Path | None) -> Result:
    began = time.perf_counter()
    try:
        compared, note = _run_both(run, before, after, data)
    except (RuntimeError, OSError, ValueError) as error:
        say(f"bits: {run.name}: {error}")
        return Result("bits", run.name, "", "failed", True, [str(error)])
    verdict = "differs" if compared.differences else "equal"
    say(f"bits: {run.name}: {verdict}, {time.perf_counter() - began:.0f} s")
    for line in compared.differences[:3]:
        say(f"  {line}")
    shown = f"{compared.cells} cells, {compared.compressed} compressed; {compared.numbers:,} numbers"
    notes = [f"note: {line}" for line in dict.fromkeys(compared.notes)] + [note] * bool(note)
    off = compared.differences
    return Result("bits", run.name, shown, verdict, bool(off), _first(off) + notes)


def _run_both(run: Run, before: Revision, after: Revision, data: Path | None) -> tuple[Compared, str]:
    folder = before.work / "runs" / run.name.replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True)
    theirs, ours = folder / "before", folder / "after"
    common = ["--quiet", "--workers", "1", "--device", "cpu", "--resume"]
    common += ["--data-dir", str(data)] if run.data != "mnist5k" else []
    words = ["imp", "--dataset", run.data, *run.flags.split(), *common, "--out"]
    before.call([*words, str(theirs)], run.cut)
    note = ""
    if run.how == "afresh":
        after.call([*words, str(ours)], run.cut)
        return compare(theirs, ours), note
    if run.how == "taken over":
        note = _interrupted(before, [*words, str(ours)], run, theirs, ours, signal.SIGTERM)
    else:
        _begin(theirs, ours)
    words = ["imp", *common, "--out", str(ours)]  # the rest stands in config.json
    if run.how == "killed":
        note = _interrupted(after, words, run, theirs, ours, signal.SIGKILL)
    after.call(words, run.cut)
    return compare(theirs, ours), note


def _begin(theirs: Path, ours: Path) -> None:
    """A run that is begun, not more."""
    ours.mkdir()
    for name in ("environment.json", "config.json"):
        shutil.copy(theirs / name, ours / name)


def _interrupted(
    revision: Revision, words: list[str], run: Run, theirs: Path, ours: Path, number: signal.Signals
) -> str:
    """End a run in the middle of a cell; where and how it stood."""
    total = len(_lines(theirs / "cells.jsonl"))
    for pause in (0.2, 0.1, 0.05, 0.02, 0.0):
        shutil.rmtree(ours, ignore_errors=True)
        _begin(theirs, ours)
        process = revision.start(words, run.cut)
        file = ours / "cells.jsonl"
        while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < total // 2):
            time.sleep(0.01)
        time.sleep(pause)
        if number == signal.SIGKILL:  # workers, too
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.communicate()
        done = file.read_bytes().count(b"\n") if file.exists() else 0
        steps = [_arrays(part)[1]["step"] for part in (ours / "checkpoints").glob("*.safetensors")]
        if done < total and (number == signal.SIGKILL or any(steps)):
            at = f", one at step {max(steps)}" if steps else ""
            return f"ended by {number.name} with {done} of {total} cells finished{at}"
    raise RuntimeError(f"{revision.name}: could not be ended by {number.name} in the middle of a cell")


# ---- bench


NAMED = (
    "--shape 300x784 --shape 64x32x3x3@14x14 --batch 64 --mask random,block --dtype fp32",
    "--shape 512x512 --batch 64 --dtype fp32,bf16 --sparsity 0.8,0.95",
    "--model lenet5 --batch 64",
)
DEFAULT = "--quick"
ROUNDS_OF_ROWS = 3
RENAMED = {"csr_packed": "csr_tiled", "csr_infer": "csr_lanes"}


def bench(before: Revision, after: Revision) -> list[Result]:
    """The default table once for its rows, named layers in turn for times, too."""
    revisions = before, after
    seconds: list[dict[Any, list[float]]] = [defaultdict(list), defaultdict(list)]
    takes: list[dict[Any, set[str]]] = [defaultdict(set), defaultdict(set)]
    rows: list[list[dict[str, Any]]] = [[], []]
    for number in range(ROUNDS_OF_ROWS):
        for flags in NAMED:
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                for row in _bench(revisions[side], flags)["rows"]:
                    rows[side].append(row)
                    key = _key(row)
                    if row["median_s"] is not None:
                        seconds[side][key].append(row["median_s"])
                    if row.get("takes"):
                        takes[side][key].add(row["takes"])
        say(f"bench: named layers, round {number + 1} of {ROUNDS_OF_ROWS}")
    documents = [_bench(revision, DEFAULT) for revision in revisions]
    say("bench: default table")
    return [
        _same_rows(*({_key(row): row for row in side} for side in rows)),
        _same_table(*documents),
        _same_choices(*takes, *seconds),
        _row_times(*seconds, {_key(row): row.get("kind", row["implementation"]) for row in rows[0]}),
    ]


def _bench(revision: Revision, flags: str, core: int | None = None) -> dict[str, Any]:
    """What `bench --json` prints, on one thread; pinned to `core` where one is given."""
    out = revision.call(
        ["bench", "--json", "-q", "--device", "cpu", "--threads", "1", *flags.split()],
        codes=(0, 3),
        core=core,
    )
    document: dict[str, Any] = json.loads(out)
    for row in document["rows"]:
        for name in ("implementation", "takes"):
            if name in row:
                row[name] = RENAMED.get(row[name], row[name])
    return document


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ROW)


def _same_rows(a: dict[Any, dict[str, Any]], b: dict[Any, dict[str, Any]]) -> Result:
    """The same implementations of the same layers, with the same columns and passed checks."""
    off = [f"{_shown(key)}: missing in AFTER" for key in a if key not in b]
    off += [f"{_shown(key)}: in AFTER alone" for key in b if key not in a]
    for key in a.keys() & b.keys():
        if gone := sorted(set(a[key]) - set(b[key])):
            off.append(f"{_shown(key)}: without {', '.join(gone)}")
        if (a[key]["check"], b[key]["check"]) != ("passed", "passed"):
            off.append(f"{_shown(key)}: check was {a[key]['check']}, is {b[key]['check']}")
    added = sorted({name for key in a.keys() & b.keys() for name in set(b[key]) - set(a[key])})
    notes = [f"note: rows have new columns: {', '.join(added)}"] if added else []
    return Result("bench", "rows of named layers", f"{len(a)} rows", *_verdict(off), _first(off) + notes)


def _same_table(a: dict[str, Any], b: dict[str, Any]) -> Result:
    """Time decides what the default table measures; with what it left out it is the same set of cells."""
    off, rows = [], [defaultdict(set), defaultdict(set)]
    wanted = [set(document["left_out"]) for document in (a, b)]
    for side, document in enumerate((a, b)):
        for row in document["rows"]:
            text = f"{row['shape']}, batch {row['batch']:,}, {row['dtype']}, {row['mask']}"
            text += f" {100 * row['sparsity']:g} %"
            wanted[side].add(text)
            rows[side][text] |= {row["implementation"]} - {"dense compiled"}  # that one while there is time
    off += [f"{text}: missing in AFTER" for text in sorted(wanted[0] - wanted[1])]
    off += [f"{text}: in AFTER alone" for text in sorted(wanted[1] - wanted[0])]
    for text in rows[0].keys() & rows[1].keys():
        if others := sorted(rows[0][text] ^ rows[1][text]):
            off.append(f"{text}: {', '.join(others)} in one alone")
    shown = f"{len(wanted[0])} cells, {len(rows[0].keys() & rows[1].keys())} measured by both"
    return Result("bench", "default table", shown, *_verdict(off), _first(off))


def _same_choices(
    a: dict[Any, set[str]],
    b: dict[Any, set[str]],
    before: dict[Any, list[float]],
    after: dict[Any, list[float]],
) -> Result:
    """What `auto` takes; it differs where no round of one took what a round of the other took.

    Unless the times of these forms overlap in both.
    """
    shared = a.keys() & b.keys()
    apart = [key for key in shared if not a[key] & b[key]]
    off = [
        f"{_shown(key)}: took {_list(a[key])}, takes {_list(b[key])}"
        for key in apart
        if not all(_close(key, a[key] | b[key], times) for times in (before, after))
    ]
    near = [
        f"note: {_shown(key)}: {_list(a[key] | b[key])} are close"
        for key in shared
        if len(a[key] | b[key]) > 1
    ]
    if not shared:
        off.append("no row says what auto takes")
    return Result("bench", "what auto takes", f"{len(shared)} choices", *_verdict(off), _first(off) + near)


def _close(key: tuple[Any, ...], names: set[str], times: dict[Any, list[float]]) -> bool:
    """Whether the times of these implementations in the place of `key` overlap."""
    rounds = [times.get((name, *key[1:]), []) for name in names]
    return all(rounds) and max(map(min, rounds)) <= min(map(max, rounds))


def _row_times(a: dict[Any, list[float]], b: dict[Any, list[float]], kinds: dict[Any, str]) -> Result:
    """Ratios of medians; ours are held against torch's own, which are the same code in both."""
    ratios = {k: statistics.median(b[k]) / statistics.median(a[k]) for k in a.keys() & b.keys()}
    ours = {k: ratio for k, ratio in ratios.items() if kinds[k] in ("ours", "auto", "sparselth")}
    noise = sorted(ratio for k, ratio in ratios.items() if k not in ours)
    if not ours or not noise:
        return Result("bench", "times of rows", "", "nothing timed", True)
    limit = max(ROW_SLOWER, noise[-1])
    slow = {k: r for k, r in ours.items() if r > limit and min(b[k]) > max(a[k])}
    details = [
        f"torch's own rows, the same code in both: x{noise[0]:.2f} to x{noise[-1]:.2f}, "
        f"median x{statistics.median(noise):.3f}",
        f"ours: x{min(ours.values()):.2f} to x{max(ours.values()):.2f}",
        *(f"slower: {_shown(k)} x{r:.2f}, every round" for k, r in sorted(slow.items(), key=lambda p: -p[1])),
    ]
    shown = f"{len(ours)} of ours, median x{statistics.median(ours.values()):.3f}"
    return Result("bench", "times of rows", shown, "slower" if slow else "within noise", bool(slow), details)


def _shown(key: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(ROW, key, strict=True) if value is not None)


def _list(words: Iterable[str]) -> str:
    return " or ".join(sorted(words))


def _first(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MANY else [*lines[:MANY], f"and {len(lines) - MANY:,} more"]


def _verdict(off: list[str]) -> tuple[str, bool]:
    return ("differs", True) if off else ("equal", False)


# ---- steps


STEPS = ("lenet-300-100", "lenet5", "conv2")


def steps(before: Revision, after: Revision, rounds: int) -> list[Result]:
    """Steps of training side by side; a model that seems slower is timed as often again."""
    found = []
    for model in STEPS:
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        time_steps(before, after, model, rounds, seconds)
        if any(judge(pairs)[1] for pairs in seconds.values()):
            say(f"steps: {model} seems slower, {rounds} rounds more")
            time_steps(before, after, model, rounds, seconds)
        for label, pairs in seconds.items():
            text, bad = judge(pairs)
            was, now = (1e6 * statistics.median(side) for side in zip(*pairs, strict=True))
            found.append(Result("steps", f"{model}, {label}", f"{was:,.0f} us, now {now:,.0f} us", text, bad))
    return found


def time_steps(
    before: Revision, after: Revision, model: str, rounds: int, seconds: dict[str, list[tuple[float, float]]]
) -> None:
    """Append (BEFORE, AFTER) of each round, which run beside each other where there are two cores."""
    cores: list[int | None] = [*sorted(os.sched_getaffinity(0))][:2]
    if len(cores) < 2 or not shutil.which("taskset"):
        cores = [None, None]
    for number in range(rounds):
        if number:
            cores.reverse()
        with ThreadPoolExecutor(1 if cores[0] is None else 2) as pool:
            pair = pool.map(
                lambda r, core: _bench(r, f"--model {model} --train", core), (before, after), cores
            )
            sides = [{row["implementation"]: row["median_s"] for row in one["rows"]} for one in pair]
        for label in sides[0]:
            if label.startswith("sparselth"):
                seconds[label].append((sides[0][label], sides[1][label]))
        say(f"steps: {model}, round {number + 1} of {rounds}")


def judge(pairs: list[tuple[float, float]]) -> tuple[str, bool]:
    """What ratios of AFTER to BEFORE tell, and whether steps are slower by more than 3 %."""
    ratios = sorted(after / before for before, after in pairs)
    low, high = interval(ratios)
    text = f"x{statistics.median(ratios):.3f} (x{low:.3f} to x{high:.3f})"
    if low > SLOWER:
        return f"{text}: slower", True
    if high <= SLOWER:
        return f"{text}: not slower", False
    return f"{text}: spread beyond 3 %, nothing concluded", False


def interval(ordered: list[float]) -> tuple[float, float]:
    """The narrowest interval of order statistics that holds the median with a probability of SURE."""
    n, cut = len(ordered), 0
    while 2 * (cut + 1) < n and 1 - 2 * sum(comb(n, i) for i in range(cut + 2)) / 2**n >= SURE:
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


# ---- the command


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(results: list[Result]) -> str:
    """Every result in a line, details of what is not equal below."""
    lines = []
    for result in results:
        lines.append(f"{result.part:<6}{result.name:<27}{result.found:<47}{result.verdict}")
    for result in results:
        lines += [f"  {result.name}: {line}" for line in result.details]
    return "\n".join(lines)


def unpacked(data: Path | None, work: Path) -> Path | None:
    """The data folder, as one of links where CIFAR-10 lies in it packed."""
    if data is None or not data.is_dir():
        return None
    script = data / "unpack_cifar10.py"
    if (data / FOLDERS["cifar10"]).is_dir() or not script.is_file():
        return data
    links = work / "data"
    links.mkdir()
    for entry in data.iterdir():
        (links / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, str(script), str(links)], check=True, capture_output=True)
    return links


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a revision, as git knows it")
    parser.add_argument("after", nargs="?", default="HEAD", help="another; HEAD")
    parser.add_argument("--data-dir", type=Path, help="where MNIST, Fashion-MNIST and CIFAR-10 lie")
    parser.add_argument("--only", choices=("bits", "bench", "steps"), help="a part; all")
    parser.add_argument("--rounds", type=int, default=12, help="of steps; 12")
    parser.add_argument("--keep", type=Path, help="a new folder for packages and runs; a temporary one")
    args = parser.parse_args(words)
    began = time.perf_counter()
    data = args.data_dir or (Path(d) if (d := os.environ.get("SPARSELTH_DATA")) else None)
    with tempfile.TemporaryDirectory(prefix="same_bits-") as temporary:
        work = (args.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        before, after = both(args.before, args.after, work)
        parts: dict[str, Callable[[], list[Result]]] = {
            "bits": lambda: bits(
                before, after, unpacked(data and data.resolve(), work), len(os.sched_getaffinity(0))
            ),
            "bench": lambda: bench(before, after),
            "steps": lambda: steps(before, after, args.rounds),
        }
        results = [result for part, run in parts.items() if args.only in (None, part) for result in run()]
    bad = sum(result.bad for result in results)
    print(table(results))
    verdict = f"{bad} of {len(results)} lines differ" if bad else f"nothing of {len(results)} lines differs"
    print(f"\n{before.name}, {after.name}: {verdict}; {time.perf_counter() - began:.0f} s in all")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
