"""The house itself: packages, import arrows, a quick --help."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# kernels and plain data first; what stands to the right may import what stands to the left
ORDER = [
    "errors",
    "signals",
    "streams",
    "files",
    "lock",
    "registry",
    "user_files",
    "check",
    "kernels",
    "clock",
    "machine",
    "cluster.torchrun",
    "masks",
    "entropy",
    "params",
    "config",
    "models",
    "spread",
    "frozen",
    "data",
    "scores",
    "pruning",
    "chance",
    "patterns",
    "elastic",
    "calls",
    "masked",
    "optim",
    "theory",
    "engine",
    "train",
    "seeded",
    "strong_tickets",
    "module_tickets",
    "tickets",
    "exchange",
    "compare",
    "ledger",
    "diverged",
    "begun",
    "runs",
    "verify",
    "report.diverged",
    "report.page",
    "report.stats",
    "report.tables",
    "report.drawing",
    "report.mask_figures",
    "report.masks",
    "report.mask_laws",
    "report.figures",
    "report.strong",
    "report.strong_figures",
    "report.neurons",
    "report.at_init",
    "report.at_init_figures",
    "report.connectivity",
    "report.connectivity_figures",
    "report.landscape",
    "report.landscape_figures",
    "report.theory_tables",
    "report.theory_figures",
    "report.lines",
    "report.rewinding",
    "report.transfer",
    "report.predict",
    "report.schedule",
    "sparse",
    "experiments.base",
    "experiments.jobs",
    "experiments.training",
    "experiments.widths",
    "experiments.arms",
    "experiments.imp",
    "experiments.at_init_jobs",
    "experiments.at_init",
    "experiments.source",
    "experiments.transfer",
    "experiments.predict_jobs",
    "experiments.predict",
    "experiments.schedule_jobs",
    "experiments.schedule",
    "experiments.strong_jobs",
    "experiments.strong",
    "experiments.single_relu",
    "experiments.neuron_scores",
    "experiments.neurons_jobs",
    "experiments.neurons",
    "experiments.subset_sum",
    "experiments.landscape_jobs",
    "experiments.landscape",
    "experiments.rewound",
    "experiments.connectivity_jobs",
    "experiments.connectivity",
    "experiments.rewinding",
    "experiments.agenda",
    "experiments.price",
    "experiments.cost",
    "experiments.plan",
    "experiments.flag",
    "experiments.worker",
    "experiments.processes",
    "experiments.ranks",
    "experiments.pool",
    "experiments.run",
    "cluster",
    "report.sweep",
    "own_results",
    "own",
    "measure",
    "report.bench_words",
    "report.bench_tables",
    "report.layer_words",
    "report.network_tables",
    "report.bench_figures",
    "report.ticket_tables",
    "report.savings",
    "cli",
    "__main__",
]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT / "sparselth").with_suffix("").parts
    if parts[0] in ("cli", "kernels"):
        return parts[0]
    return ".".join(part for part in parts if part != "__init__")


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sparselth"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sparselth.")}
    return {name.removeprefix("sparselth.") for name in found}


def place(name: str) -> int:
    fits = [i for i, room in enumerate(ORDER) if name == room or name.startswith(room + ".")]
    assert fits, f"{name} is in no room of ORDER"
    return fits[0]


def sources() -> list[Path]:
    return [file for file in sorted((ROOT / "sparselth").rglob("*.py")) if "assets" not in file.parts]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    name = module_name(file)
    if name in ("", "engine", "experiments", "report"):
        assert not imported(file)
        return
    for other in imported(file):
        if other not in ("sparselth.__version__", "__version__"):
            assert place(other) <= place(name), f"{name} imports {other}"


def test_kernels_import_nothing_of_the_package() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert not {name for name in imported(file) if not name.startswith("kernels")}


def test_package_list_is_complete() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {file.parent for file in (ROOT / "sparselth").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == found | {"sparselth.kernels"}


def requirements() -> dict[str, str]:
    """{package: its lower bound} of everything in pyproject.toml, in development too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return dict(re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+(?:post[0-9]+)?)", line).groups() for line in listed)  # type: ignore[union-attr]


def numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.split("+")[0])]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_make_installs_is_stated_in_full(python: str) -> None:
    lines = (ROOT / "constraints" / f"{python}.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    for package, least in requirements().items():
        assert numbers(pinned[package]) >= numbers(least), package
    for under in ("triton", "sympy", "pluggy", "pillow"):  # what those need in turn
        assert under in pinned


def test_the_oldest_set_is_every_lower_bound() -> None:
    rule = re.search(r"sed -nE '(s/.*/p)' pyproject.toml", (ROOT / "Makefile").read_text())
    assert rule
    command = ["sed", "-nE", rule[1], str(ROOT / "pyproject.toml")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert dict(line.split("==") for line in found) == requirements()


def test_kernels_folder_is_reached_by_the_link_and_shadows_nobody() -> None:
    link = ROOT / "sparselth" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["imp", "--help"],
        ["bench", "--help"],
        ["show", "--help"],
        ["ls", "--help"],
        ["ticket", "--help"],
        ["ticket", "inspect", "--help"],
        ["doctor", "--help"],
        ["ls", "models"],
    ],
    ids=" ".join,
)
def test_help_imports_no_torch(words: list[str], environment: dict[str, str]) -> None:
    code = (
        "import sys; from sparselth.cli.main import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
