"""Every flag of every command does something, and what it does is read back: a flag without a case fails."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from sparselth import machine, registry
from sparselth.cli.bench import FEW, QUICK
from sparselth.cli.bench import _nothing as says_nothing
from sparselth.cli.main import cli, run
from sparselth.config import EXPERIMENTS
from sparselth.errors import SparselthError, UsageError
from sparselth.experiments.imp import ImpConfig
from sparselth.measure.race_layers import Outcome
from sparselth.models import get_model
from sparselth.runs import RunRecord, read


@dataclass
class Seen:
    """A command that has ended: what it printed or raised, and what it asked the library for, by function."""

    code: int | None = None
    out: str = ""
    err: str = ""
    raised: Exception | None = None
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    threads: int = 0

    @property
    def is_json(self) -> bool:
        return self.out.startswith("{") and bool(json.loads(self.out))


@dataclass
class Case:
    """A command, words behind it (of the group: before it), and what is read only where they stand."""

    base: str
    words: str
    read: Callable[[Seen], Any]
    expected: Any = True


def of(function: str, argument: str) -> Callable[[Seen], Any]:
    """An argument of a function of the library."""
    return lambda seen: seen.asked.get(function, {}).get(argument)


def setting(name: str) -> Callable[[Seen], Any]:
    """A field of the configuration that is run, or of its recipe."""

    def read(seen: Seen) -> Any:
        config = seen.asked["run"]["config"]
        return getattr(config if hasattr(config, name) else config.recipe, name)

    return read


def what(seen: Seen) -> Any:
    return getattr(of("bench_module", "net")(seen), "what", None)


def sample(seen: Seen) -> Any:
    found = of("bench_module", "net")(seen)
    return found and tuple(found.given(1).tensors[0].shape)


def loaded(seen: Seen) -> bool:
    return [file.name for file in registry.plugins()] == ["mine.py"]


def looks_there(seen: Seen) -> bool:
    return "/there; downloaded when first used" in seen.out


# of imp: the word behind the flag, what the configuration then holds
FIELDS: dict[str, tuple[str, Any]] = {
    "model": ("lenet-300-100", "lenet-300-100"),
    "seeds": ("3,5", (3, 5)),
    "arms": ("ticket,random-mask", ("ticket", "random-mask")),
    "levels": ("3", 3),
    "rate": ("0.5", 0.5),
    "scope": ("global", "global"),
    "score": ("random", "random"),
    "one_shot": ("", True),
    "rewind": ("7", 7),
    "reinits": ("2", 2),
    "device": ("cpu", "cpu"),
    "kernels": ("torch", "torch"),
    "steps": ("123", 123),
    "lr": ("0.25", 0.25),
    "batch_size": ("13", 13),
    "optimizer": ("sgd", "sgd"),
    "weight_decay": ("0.01", 0.01),
    "warmup": ("9", 9),
    "lr_drops": ("10,20", (10, 20)),
    "eval_every": ("40", 40),
    "cosine": ("", True),
    "eval_images": ("200", 200),
    "augment": ("crop-flip", "crop-flip"),
    "inputs": ("unit", "unit"),
    "pattern": ("unit", "unit"),
    "exclude": ("fc1,conv*", ("conv*", "fc1")),
}
# of strong: its own, and those it shares with imp
SHARED = ("seeds", "device", "kernels", "steps", "lr", "batch_size", "weight_decay", "warmup", "lr_drops")
SHARED += ("eval_every", "eval_images", "augment", "inputs")
OF_STRONG: dict[str, tuple[str, Any]] = {name: FIELDS[name] for name in SHARED} | {
    "model": ("lenet5", "lenet5"),
    "arms": ("ticket,dense", ("ticket", "dense")),
    "keep": ("0.3,0.1", (0.1, 0.3)),
    "width": ("0.5", (0.5,)),
    "law": ("normal", "normal"),
    "scope": ("global", "global"),
    "spread": ("root", "root"),
    "every": ("7", 7),
    "redraw": ("0.5", 0.5),
    "optimizer": ("adam", "adam"),
}
CELL = "run/cells/seed0-ticket-01.safetensors"
STRONG = "strong iterand --dataset mnist5k"
IMP = "imp --dataset mnist5k"
SUMS = "subset-sum --dataset mnist5k"
OF_NEURONS = {name: OF_STRONG[name] for name in (*SHARED, "width", "optimizer")} | {
    "model": ("lenet-300-100@0.5", "lenet-300-100@0.5"),
    "arms": ("neurons", ("neurons",)),
    "keep": ("0.3", 0.3),
    "units": ("4,2", (2, 4)),
    "inputs": ("7", 7),
    "law": ("uniform", "uniform"),
}
NEURONS = "neurons --dataset mnist5k"


def of_run(name: str, base: str, wrong: str) -> dict[tuple[str, str], Case]:
    """The flags of how it runs, which all experiments have; `wrong`: what makes none of it."""
    return {
        (name, "data_dir"): Case(base, "--data-dir there", of("run", "data_dir"), Path("there")),
        (name, "workers"): Case(base, "--workers 3", of("run", "workers"), 3),
        (name, "out"): Case(base, "--out there", of("run", "out"), Path("there")),
        (name, "resume"): Case(base, "--resume", of("run", "resume")),
        (name, "dry_run"): Case(base, "--dry-run --json", lambda seen: "run" not in seen.asked),
        (name, "as_json"): Case(base, "--json", lambda seen: seen.is_json),
        (name, "quiet"): Case(base, "--quiet", lambda seen: seen.err, ""),
        (name, "debug"): Case(f"{base} {wrong}", "--debug", lambda seen: type(seen.raised), UsageError),
    }


def of_batches(name: str, base: str, wrong: str) -> dict[tuple[str, str], Case]:
    """These, and those of networks that train together."""
    return of_run(name, base, wrong) | {
        (name, "replicas"): Case(base, "--replicas 4", of("run", "replicas"), 4),
        (name, "deterministic"): Case(base, "--deterministic", of("run", "deterministic")),
        (name, "price_on"): Case(f"{base} --dry-run", "--price-on h200", of("recorded", "device"), "h200"),
    }


def of_scores(name: str, base: str, wrong: str = "--keep 0") -> dict[tuple[str, str], Case]:
    """The flags of an experiment that trains scores, but those of its own."""
    bare = base.removesuffix(" --dataset mnist5k")
    return {
        (name, "cosine"): Case(base, "--no-cosine", setting("cosine"), False),
        (name, "dataset"): Case(bare, "--dataset mnist5k", setting("dataset"), "mnist5k"),
        (name, "momentum"): Case(base, "--momentum 0.5", setting("momentum"), 0.5),
        (name, "recipe"): Case(base, "--recipe paper", setting("steps"), 100 * 3500 // 128),
    } | of_batches(name, base, wrong)


FROM = "transfer --from run --dataset mnist5k"


def of_training(name: str, base: str, wrong: str) -> dict[tuple[str, str], Case]:
    """The flags that all experiments have which train networks; `wrong`: what makes none of it."""
    fields = {one: FIELDS[one] for one in (*SHARED, "optimizer", "cosine") if one != "seeds"}
    return (
        {
            (name, one): Case(base, f"--{one.replace('_', '-')} {word}", setting(one), value)
            for one, (word, value) in fields.items()
        }
        | {
            (name, "momentum"): Case(f"{base} --optimizer sgd", "--momentum 0.5", setting("momentum"), 0.5),
        }
        | of_batches(name, base, wrong)
    )


OF_TRANSFER = of_training("transfer", FROM, "--levels 0") | {
    ("transfer", "source"): Case("transfer --to mnist", "--from run", lambda seen: "run" in seen.asked),
    ("transfer", "model"): Case(FROM, "--to-model lenet-300-100@0.5", setting("model"), "lenet-300-100@0.5"),
    ("transfer", "dataset"): Case(
        "transfer --from run", "--to fashion-mnist", setting("dataset"), "fashion-mnist"
    ),
    ("transfer", "seeds"): Case(FROM, "--seeds 3", lambda seen: "no finished seed 3 ticket" in seen.err),
    ("transfer", "levels"): Case(FROM, "--levels 2", lambda seen: "seed 0 ticket level 2" in seen.err),
    ("transfer", "arms"): Case(FROM, "--arms own,mask", setting("arms"), ("own", "mask")),
    ("transfer", "rewind"): Case(FROM, "--rewind 7", setting("rewind"), 7),
    ("transfer", "recipe"): Case(FROM, "--recipe paper", setting("steps"), 50_000),
}

AT_INIT = "at-init --dataset mnist5k"
OF_AT_INIT = of_training("at-init", AT_INIT, "--sparsity 1") | {
    ("at-init", name): Case(AT_INIT, f"--{name.replace('_', '-')} {word}", setting(name), value)
    for name, (word, value) in {
        "model": ("lenet5", "lenet5"),
        "seeds": FIELDS["seeds"],
        "arms": ("ticket,invert", ("ticket", "invert")),
        "score": ("synflow,imp", ("synflow", "imp")),
        "sparsity": ("0.5,0.98", (0.5, 0.98)),
        "exclude": ("fc1", ("fc1",)),
        "rate": ("0.5", 0.5),
        "collapse": ("", True),
    }.items()
}
OF_AT_INIT |= {
    ("at-init", "dataset"): Case("at-init", "--dataset mnist5k", setting("dataset"), "mnist5k"),
    ("at-init", "recipe"): Case(AT_INIT, "--recipe paper", setting("steps"), 50_000),
    ("at-init", "plugin"): Case(AT_INIT, "--plugin mine.py", loaded),
}


PREDICT = "predict run"
OF_PREDICT = {
    ("predict", "seeds"): Case(PREDICT, "--seeds 3", lambda seen: "no finished seed 3 ticket" in seen.err),
    ("predict", "levels"): Case(PREDICT, "--levels 2", lambda seen: "seed 0 ticket level 2" in seen.err),
    ("predict", "at"): Case(PREDICT, "--at 9,3", setting("at"), (3, 9)),
} | of_run("predict", PREDICT, "--at 0")


SCHEDULE = "schedule --dataset mnist5k --eval-every 10"
OF_SCHEDULE = of_training("schedule", SCHEDULE, "--keep 1") | {
    ("schedule", name): Case(SCHEDULE, f"--{name} {word}", setting(name), value)
    for name, (word, value) in {
        "model": ("lenet5", "lenet5"),
        "seeds": FIELDS["seeds"],
        "schedules": ("cubic,one-shot", ("one-shot", "cubic")),
        "rates": ("0.5,0.25", (0.25, 0.5)),
        "scopes": ("global", ("global",)),
        "keep": ("0.3", 0.3),
        "rewind": ("7", 7),
    }.items()
}
OF_SCHEDULE |= {
    ("schedule", "dataset"): Case("schedule", "--dataset mnist5k", setting("dataset"), "mnist5k"),
    ("schedule", "recipe"): Case(SCHEDULE, "--recipe paper", setting("steps"), 50_000),
}


CASES: dict[tuple[str, str], Case] = (
    OF_TRANSFER
    | OF_AT_INIT
    | OF_PREDICT
    | OF_SCHEDULE
    | of_batches("imp", IMP, "--levels 0")
    | of_run("subset-sum", SUMS, "--epsilon 0")
    | of_scores("strong", STRONG)
    | of_scores("neurons", NEURONS)
    | {
        ("neurons", name): Case(NEURONS, f"--{name.replace('_', '-')} {word}", setting(name), value)
        for name, (word, value) in OF_NEURONS.items()
    }
    | {
        ("imp", name): Case(IMP, f"--{name.replace('_', '-')} {word}", setting(name), value)
        for name, (word, value) in FIELDS.items()
    }
    | {
        ("strong", name): Case(STRONG, f"--{name.replace('_', '-')} {word}", setting(name), value)
        for name, (word, value) in OF_STRONG.items()
    }
    | {
        ("imp", "dataset"): Case("imp", "--dataset mnist5k", setting("dataset"), "mnist5k"),
        ("imp", "momentum"): Case(f"{IMP} --optimizer sgd", "--momentum 0.5", setting("momentum"), 0.5),
        ("imp", "recipe"): Case(
            IMP, "--recipe paper", setting("recipe"), get_model("lenet5").recipes["paper"]
        ),
        ("imp", "split"): Case(IMP, "--split 2", of("run", "split"), 2),
        ("subset-sum", "cases"): Case(SUMS, "--cases covering", setting("cases"), ("covering",)),
        ("subset-sum", "model"): Case(SUMS, "--model lenet-300-100", setting("model"), "lenet-300-100"),
        ("subset-sum", "narrow"): Case(SUMS, "--narrow lenet-300-100", setting("narrow"), "lenet-300-100"),
        ("subset-sum", "dataset"): Case(SUMS, "--dataset mnist", setting("dataset"), "mnist"),
        ("subset-sum", "seeds"): Case(SUMS, "--seeds 2,5", setting("seeds"), (2, 5)),
        ("subset-sum", "epsilon"): Case(SUMS, "--epsilon 0.02", setting("epsilon"), 0.02),
        ("subset-sum", "draws"): Case(SUMS, "--draws 70", setting("draws"), 70),
        ("subset-sum", "n"): Case(SUMS, "--n 12", setting("n"), 12),
        ("subset-sum", "few"): Case(SUMS, "--few 7", setting("few"), 7),
        ("subset-sum", "rounds"): Case(SUMS, "--rounds 9", setting("rounds"), 9),
        ("subset-sum", "wide"): Case(SUMS, "--wide 13", setting("wide"), 13),
        ("subset-sum", "size"): Case(SUMS, "--size 3", setting("size"), 3),
        ("subset-sum", "bits"): Case(SUMS, "--bits 3", setting("bits"), 3),
        ("subset-sum", "copies"): Case(SUMS, "--copies 9", setting("copies"), 9),
        ("bench", "sparsity"): Case("bench", "--sparsity 0.5,0.8", of("Asked", "sparsities"), (0.5, 0.8)),
        ("bench", "shapes"): Case("bench", "--shape 4x8 --shape 8x4", of("Asked", "shapes"), ("4x8", "8x4")),
        ("bench", "batch"): Case("bench", "--batch 2,3", of("Asked", "batches"), (2, 3)),
        ("bench", "dtype"): Case("bench", "--dtype bf16", of("Asked", "dtypes"), ("bf16",)),
        ("bench", "masks"): Case("bench", "--mask block", of("Asked", "kinds"), ("block",)),
        ("bench", "run"): Case("bench", "--run run", of("bench_run", "path"), Path("run")),
        ("bench", "level"): Case("bench --run run", "--level 1", of("bench_run", "level"), 1),
        ("bench", "seed"): Case("bench --run run", "--seed 0", of("bench_run", "seed"), 0),
        ("bench", "model"): Case("bench", "--model conv2", of("bench_model", "name"), "conv2"),
        ("bench", "ticket"): Case("bench", f"--ticket {CELL}", what, f"ticket of {CELL}"),
        ("bench", "size"): Case("bench --model resnet20", "--input 3x8x8", sample, (1, 3, 8, 8)),
        ("bench", "train"): Case("bench --model conv2", "--train", of("bench_training", "name"), "conv2"),
        ("bench", "device"): Case("bench", "--device cpu", lambda seen: seen.err, ""),  # no word about CUDA
        ("bench", "threads"): Case("bench", "--threads 2", lambda seen: seen.threads, 2),
        ("bench", "strong"): Case("bench", "--strong", lambda seen: seen.asked["Asked"]["strong"]),
        ("bench", "quick"): Case("bench", "--quick", of("bench_layers", "seconds"), QUICK),
        ("bench", "every"): Case("bench", "--all", lambda seen: seen.asked["report"]["every"]),
        ("bench", "csv_file"): Case("bench", "--csv rows.csv", lambda seen: Path("rows.csv").is_file()),
        ("bench", "out"): Case("bench", "--out there", lambda seen: Path("there/bench.json").is_file()),
        ("bench", "data_dir"): Case(
            "bench --run run", "--data-dir there", of("bench_run", "data_dir"), Path("there")
        ),
        ("bench", "as_json"): Case("bench", "--json", lambda seen: seen.is_json),
        ("bench", "quiet"): Case("bench", "--quiet", of("bench_layers", "say"), says_nothing),
        ("bench", "debug"): Case("bench --batch 0", "--debug", lambda seen: type(seen.raised), UsageError),
        ("show", "masks"): Case("show run", "--masks", lambda seen: seen.out.startswith("masks of ")),
        ("show", "savings"): Case(
            "show run", "--savings", lambda seen: seen.out.startswith("what pruning saves")
        ),
        ("show", "as_json"): Case("show run", "--json", lambda seen: seen.is_json),
        ("show", "debug"): Case("show no", "--debug", lambda seen: type(seen.raised), SparselthError),
        ("ls", "data_dir"): Case("ls datasets", "--data-dir there", looks_there),
        ("ls", "out"): Case("ls runs", "--out .", lambda seen: seen.out.startswith("run  ")),
        ("ls", "as_json"): Case("ls arms", "--json", lambda seen: seen.is_json),
        ("ls", "debug"): Case("ls armss", "--debug", lambda seen: type(seen.raised), UsageError),
        ("doctor", "data_dir"): Case("doctor", "--data-dir there", looks_there),
        ("doctor", "as_json"): Case("doctor", "--json", lambda seen: seen.is_json),
        ("doctor", "debug"): Case("doctor", "--debug", lambda seen: type(seen.raised), SparselthError),
        ("", "version"): Case("ls arms", "--version", lambda seen: "version" in seen.out),
        ("", "plugin"): Case("ls arms", "--plugin mine.py", loaded),
    }
    | {
        (base.partition(" ")[0], "plugin"): Case(base, "--plugin mine.py", loaded)
        for base in (
            IMP,
            STRONG,
            NEURONS,
            SUMS,
            FROM,
            SCHEDULE,
            PREDICT,
            "bench",
            "show run",
            "ls arms",
            "doctor",
        )
    }
)
CONNECTIVITY = "connectivity --dataset mnist5k"
OF_CONNECTIVITY = {name: OF_STRONG[name] for name in (*SHARED, "model", "scope")} | {
    "optimizer": ("sgd", "sgd"),
    "cosine": ("", True),
    "rewind": ("0,9", (0, 9)),
    "levels": ("0,2", (0, 2)),
    "rate": ("0.5", 0.5),
    "exclude": ("fc1", ("fc1",)),
    "points": ("5", 5),
    "line_images": ("70", 70),
}
CASES |= of_scores("connectivity", CONNECTIVITY, "--points 1") | {
    ("connectivity", name): Case(CONNECTIVITY, f"--{name.replace('_', '-')} {word}", setting(name), value)
    for name, (word, value) in OF_CONNECTIVITY.items()
}
CASES |= {
    ("connectivity", "momentum"): Case(
        f"{CONNECTIVITY} --optimizer sgd", "--momentum 0.5", setting("momentum"), 0.5
    ),
    ("connectivity", "recipe"): Case(CONNECTIVITY, "--recipe paper", setting("steps"), 50_000),
    ("connectivity", "plugin"): Case(CONNECTIVITY, "--plugin mine.py", loaded),
}
REWINDING = "rewinding --dataset mnist5k"
OF_REWINDING = {name: OF_CONNECTIVITY[name] for name in OF_CONNECTIVITY if "line" not in name} | {
    "levels": ("1,2", (1, 2)),
    "rewind": ("9,0", (0, 9)),
    "score": ("random", "random"),
    "one_shot": ("", True),
    "reinits": ("2", 2),
}
del OF_REWINDING["points"]
CASES |= of_scores("rewinding", REWINDING, "--levels 0") | {
    ("rewinding", name): Case(REWINDING, f"--{name.replace('_', '-')} {word}", setting(name), value)
    for name, (word, value) in OF_REWINDING.items()
}
CASES |= {
    ("rewinding", "momentum"): Case(
        f"{REWINDING} --optimizer sgd", "--momentum 0.5", setting("momentum"), 0.5
    ),
    ("rewinding", "recipe"): Case(REWINDING, "--recipe paper", setting("steps"), 50_000),
    ("rewinding", "plugin"): Case(REWINDING, "--plugin mine.py", loaded),
}
LANDSCAPE = "landscape run"
CASES |= of_run("landscape", LANDSCAPE, "--grid 4") | {
    ("landscape", "arms"): Case(LANDSCAPE, "--arms reinit", lambda seen: "seed 0 reinit level 1" in seen.err),
    ("landscape", "level"): Case(LANDSCAPE, "--level 0", setting("level"), (0,)),
    ("landscape", "seeds"): Case(LANDSCAPE, "--seeds 3", lambda seen: "no finished seed 3 " in seen.err),
    ("landscape", "grid"): Case(LANDSCAPE, "--grid 5", setting("grid"), 5),
    ("landscape", "radius"): Case(LANDSCAPE, "--radius 0.5", setting("radius"), 0.5),
    ("landscape", "images"): Case(LANDSCAPE, "--images 60", setting("images"), 60),
    ("landscape", "device"): Case(LANDSCAPE, "--device cuda", lambda seen: "finds no CUDA" in seen.err),
    ("landscape", "plugin"): Case(LANDSCAPE, "--plugin mine.py", loaded),
}
SILENT = ("show", "ls", "doctor")  # say nothing but what was asked for, so that --quiet changes nothing


def flags() -> set[tuple[str, str]]:
    """(command, parameter) of the package's own."""
    context = click.Context(cli)
    ours = [name for name in cli.list_commands(context) if name not in EXPERIMENTS or in_package(name)]
    commands = {"": cli} | {name: cli.get_command(context, name) for name in ours}
    return {
        (name, str(param.name))
        for name, command in commands.items()
        for param in (command.params if command else ())
        if isinstance(param, click.Option)
    }


def in_package(name: str) -> bool:
    return EXPERIMENTS[name].__module__.startswith("sparselth.experiments.")


def test_every_flag_has_a_case() -> None:
    silent = {(name, "quiet") for name in SILENT}
    assert flags() - silent - set(CASES) == set(), "give each a line in CASES that reads its effect back"
    assert (set(CASES) | silent) - flags() == set()
    shown = {f.name for f in fields(ImpConfig) if f.metadata.get("help")}
    assert shown <= {name for command, name in CASES if command == "imp"}


environment = cache(machine.environment)  # asks git and the driver


@pytest.fixture
def see(
    finished: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Seen]:
    """`see("ls", "arms")`: a command beside the folder `run`; nothing is trained and nothing measured."""
    finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    Path("mine.py").write_text("")
    Path("there").mkdir()
    outcome = Outcome([{"check": "passed"}] * (FEW + 1), [], {}, {})
    threads, seen = torch.get_num_threads(), Seen()
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.setattr(machine, "environment", environment)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sparselth.cli.bench.cores", lambda: 8)
    monkeypatch.setattr("sparselth.engine.break_even.break_even", lambda *a: {})
    monkeypatch.setattr("sparselth.experiments.run.priced", lambda plan: plan)
    monkeypatch.setattr(
        "sparselth.cli.doctor._training", lambda: {"name": "training", "ok": True, "detail": ""}
    )

    def catch(path: str, result: Callable[[], Any] | None = None) -> None:
        """Write down what a function is called with; with `result` it is not called."""
        module, _, name = path.rpartition(".")
        real = getattr(__import__(module, fromlist=[name]), name)

        def caught(*args: Any, **more: Any) -> Any:
            seen.threads = torch.get_num_threads()
            seen.asked[name] = inspect.signature(real).bind(*args, **more).arguments
            return result() if result else real(*args, **more)

        monkeypatch.setattr(path, caught)

    catch("sparselth.experiments.run.run", lambda: read(Path("run")))
    catch("sparselth.experiments.price.recorded")
    catch("sparselth.measure.asked.Asked")
    catch("sparselth.measure.race_layers.bench_layers", lambda: outcome)
    for function in (
        "race_networks.bench_run",
        "race_networks.bench_model",
        "race_modules.bench_module",
        "training.bench_training",
    ):
        catch(f"sparselth.measure.{function}", lambda: outcome)
    catch("sparselth.report.bench_tables.report", lambda: "")
    monkeypatch.setattr("sparselth.report.network_tables.report", lambda *a: "")
    monkeypatch.setattr("sparselth.report.bench_figures.draw", lambda *a: [])

    def call(*words: str) -> Seen:
        seen.asked, seen.raised = {}, None
        capsys.readouterr()
        try:
            seen.code = run(list(words))
        except Exception as error:
            seen.raised = error
        finally:
            torch.set_num_threads(threads)
        seen.out, seen.err = capsys.readouterr()
        return seen

    return call


WITHOUT: dict[tuple[str, bool], Seen] = {}  # commands without the flag, each tried once


@pytest.mark.parametrize(("command", "flag"), CASES)
def test_a_flag_has_its_effect(
    command: str, flag: str, see: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[command, flag]
    if (command, flag) == ("doctor", "debug"):

        def broken() -> dict[str, Any]:
            raise SparselthError("no machine")

        monkeypatch.setattr(machine, "environment", broken)
    words, plain = case.words.split(), (case.base, flag == "debug")
    if plain not in WITHOUT:
        WITHOUT[plain] = replace(see(*case.base.split()))
    assert case.read(WITHOUT[plain]) != case.expected
    found = see(*words, *case.base.split()) if command == "" else see(*case.base.split(), *words)
    assert case.read(found) == case.expected, found.err


@pytest.mark.parametrize("words", ["show run", "ls arms", "doctor"])
def test_where_nothing_is_said_quiet_changes_nothing(words: str, see: Callable[..., Seen]) -> None:
    spoken = see(*words.split())
    out, code = spoken.out, spoken.code
    quiet = see(*words.split(), "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (code, out, "")
