"""`make mutants`: one small fault after another in rooms of pure Python, and which of them no test notices.

    make mutants                       every room of [tool.mutmut.rooms] in pyproject.toml
    make mutants ROOMS="config train"  these

mutmut writes all faults of a room into a copy of the tree and tries each in a fork of a process that has
imported everything, with those of the room's tests that reach the function and are not marked `whole`: most
take a fraction of a second. What was tried is kept in build/mutants/; tried again are survivors, and faults
in functions that changed. A room's score is the share of its faults that a test notices, without those of
equivalent_mutants.txt, which change nothing. The exit code is 1 where a score is below LEAST.

Other than by mutmut itself, functions with decorators are mutated, too; texts for people (strings with a
blank) and the arguments in LEFT are not. Class bodies and module constants lie in no function and stay as
they are: fields and their defaults are held by tests/test_config.py and tests/cli/test_flags.py.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import libcst as cst
import libcst.matchers as matchers
import mutmut.__main__ as tool
from mutmut.configuration import config
from mutmut.mutation import file_mutation, mutators
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import orig_function_and_class_names_from_key

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
LEAST = 0.95
# arguments by name: tests/test_defaults.py holds the first two, the last guards against ourselves; nor is the
# argument of .to(device), which on a CPU does nothing
LEFT = ("device", "dtype", "strict")
NOTICED = ("killed", "timeout", "segfault", "suspicious")
Fault = tuple[str, ...]  # the room and the function, then the lines that it takes away and adds


def extend_mutmut() -> None:
    """Mutate functions with decorators, under these; of strings only those that are names."""
    skips = file_mutation.MutationVisitor._skip_node_and_children
    arrange = file_mutation.function_trampoline_arrangement

    def bare(function: cst.FunctionDef) -> cst.FunctionDef:
        return function.with_changes(decorators=[])

    def left(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value in LEFT

    def skip(self: Any, node: cst.CSTNode) -> bool:
        return left(node) or skips(self, bare(node) if isinstance(node, cst.FunctionDef) else node)

    def arranged(function: cst.FunctionDef, mutants: Iterable[Any], class_name: str | None) -> Any:
        if any(matchers.matches(d.decorator, matchers.Name("classmethod")) for d in function.decorators):
            return arrange(function, mutants, class_name)
        before, (trampoline, *copies), behind, names = arrange(bare(function), mutants, class_name)
        own = [one for one in function.decorators if not matchers.matches(one, cache)]
        decorators = [*own, *trampoline.decorators]  # type: ignore[union-attr]
        return before, [trampoline.with_changes(decorators=decorators), *copies], behind, names

    # what tests of other faults left in a cache would be this fault's results
    cache = matchers.Decorator(matchers.Name("cache"))
    device = matchers.Name("device") | matchers.Attribute(attr=matchers.Name("device"))
    move = matchers.Call(matchers.Attribute(attr=matchers.Name("to")), [matchers.Arg(device)])

    def names(node: cst.BaseString) -> Iterable[cst.BaseString]:
        if isinstance(node, cst.SimpleString) and " " not in node.value:
            yield from [*mutators.operator_string(node)][:1]

    def arguments(node: cst.Call) -> Iterable[cst.Call]:
        if matchers.matches(node, move):
            return
        for found in mutators.operator_arg_removal(node):
            if [*filter(left, found.args)] == [*filter(left, node.args)]:
                yield found

    file_mutation.MutationVisitor._skip_node_and_children = skip  # type: ignore[method-assign]
    file_mutation.function_trampoline_arrangement = arranged
    ours: Any = {mutators.operator_string: names, mutators.operator_arg_removal: arguments}
    operators: Any = mutators.mutation_operators
    operators[:] = [(kind, ours.get(operator, operator)) for kind, operator in operators]


def rooms() -> dict[str, list[str]]:
    """A room's name, as experiments/arms, and its tests."""
    found: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"][
        "rooms"
    ]
    return found


def enter(room: str) -> Path:
    """Go into the room's folder, which looks like ROOT; the room's file."""
    folder, file = ROOT / "build" / "mutants" / room.replace("/", "-"), Path("sparselth", f"{room}.py")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for name in ("sparselth", "kernels", "tests", "bench", "pyproject.toml", "setup.cfg"):
        if not Path(name).exists():
            Path(name).symlink_to(ROOT / name)
    config().only_mutate = [str(file)]
    config().pytest_add_cli_args_test_selection = rooms()[room]
    return file


def try_all(room: str) -> None:
    """Try the faults of a room that are new, have changed or survived."""
    file = enter(room)
    made = Path("mutants") / file
    if made.exists() and made.stat().st_mtime < Path(__file__).stat().st_mtime:
        shutil.rmtree("mutants")  # this file says which faults there are
    data = SourceFileMutationData(path=file)
    data.load()
    for key, code in data.exit_code_by_key.items():
        if status_by_exit_code[code] not in NOTICED:
            data.exit_code_by_key[key] = None
    if data.exit_code_by_key:
        data.save()
    extend_mutmut()
    os.register_at_fork(before=gc.freeze)  # a fork would look through, and so copy, all that was imported
    tool._run([], None)


def equivalents() -> dict[Fault, str]:
    """Faults that change nothing, and why."""
    found = {}
    for block in EQUIVALENT.read_text().strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("# ")]
        why = " ".join(line[2:] for line in block.splitlines() if line.startswith("# "))
        if lines:
            assert why, f"{EQUIVALENT.name}: no reason above {lines[0]}"
            found[tuple(lines)] = why
    return found


def fault(room: str, key: str, file: Path) -> Fault:
    function, of = orig_function_and_class_names_from_key(key)
    lines = get_diff_for_mutant(key, path=file).splitlines()[2:]
    changes = [f"{line[0]} {line[1:].strip()}" for line in lines if line[:1] in ("-", "+")]
    return (f"{room} {of + '.' if of else ''}{function}", *changes)


def report(room: str) -> tuple[str, float]:
    """Print the survivors of a room; its line of the table, and its score."""
    file, known = enter(room), equivalents()
    data = SourceFileMutationData(path=file)
    data.load()
    said = {key: status_by_exit_code[code] for key, code in data.exit_code_by_key.items()}
    quiet = {key: fault(room, key, file) for key, word in said.items() if word not in NOTICED}
    missed = {key: found for key, found in quiet.items() if found not in known}
    for key, found in missed.items():
        print("\n".join([f"# {said[key]}", *found]), end="\n\n")
    for found in known:
        if found[0].split()[0] == room and found not in quiet.values():
            print(f"in {EQUIVALENT.name}, but noticed or gone:", *found, sep="\n", end="\n\n")
    noticed, equal = len(said) - len(quiet), len(quiet) - len(missed)
    score = noticed / max(1, noticed + len(missed))
    return f"{room:<22}{len(said):>7}{noticed:>9}{equal:>12}{len(missed):>8}{100 * score:>8.1f}%", score


def main(names: Sequence[str]) -> int:
    known = rooms()
    for room in (names := list(names) or list(known)):
        if room not in known:
            print(f"mutants: no room {room!r}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    for room in names:
        print(f"== {room}", flush=True)
        if not (pid := os.fork()):  # a process a room: mutmut imports its tree once
            try_all(room)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            return 2
    lines, scores = zip(*(report(room) for room in names), strict=True)
    print(
        f"{'room':<22}{'faults':>7}{'noticed':>9}{'equivalent':>12}{'missed':>8}{'score':>9}",
        *lines,
        sep="\n",
    )
    return 0 if min(scores) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
