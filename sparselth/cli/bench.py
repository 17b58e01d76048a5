"""`sparselth bench`: what sparsity is worth on this machine, layer by layer or for whole networks."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from sparselth.cli.answer import answered
from sparselth.cli.bench_files import leave_empty, writable, write
from sparselth.cli.options import PATH, Names, as_flags, data_dir, output
from sparselth.cli.question import MODEL, Question
from sparselth.config import MOST
from sparselth.errors import Interrupted, SparselthError, UsageError, check_number, unknown
from sparselth.machine import check_torch, cores
from sparselth.report.page import width

if TYPE_CHECKING:
    from sparselth.measure.case import Result, Say
    from sparselth.measure.race_layers import Outcome

DTYPES, MASKS = ("fp32", "tf32", "bf16", "fp16"), ("random", "block", "magnitude")
NETWORK_BATCHES, MOST_BATCH = (1, 8, 64, 256), 1 << 20
MODULE_BATCHES, MODULE_STEP = (1,), (64,)
STRONG = (0.5,)  # sparsities of --strong, where none is said
SECONDS, QUICK = 210.0, 45.0  # for the default table; 4 minutes with imports, figures and a last slow row
NOTHING = "interrupted before anything was measured; nothing is kept"
FEW = 60  # rows up to which every implementation is printed


@click.command()
@click.option(
    "--sparsity", type=Names(), default="0.9", show_default=True, help="Share of zeros: 0.9 or 0.5,0.9."
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    help="A layer instead of the default ones, outputs x inputs: 4096x4096, or 64x64x3x3@32x32 for a "
    "convolution on such images (behind it /2 for a stride, p0 for a padding). May be repeated.",
)
@click.option("--batch", type=Names(), help="Batch sizes: 64 or 1,64,4096.  [default: 1 to 4096]")
@click.option("--dtype", type=Names(), help="fp32, tf32 (CUDA), bf16, fp16.  [default: all]")
@click.option(
    "--mask",
    "masks",
    type=Names(),
    help="random, block (drawn in blocks of 64, 32 or 16), magnitude (of the tickets of --run).  "
    "[default: random and block]",
)
@click.option("--run", "run", type=PATH, help="A run of imp: its ticket, the whole network end to end.")
@click.option("--level", type=int, help="The ticket's level.  [default: the last; with --mask, the nearest]")
@click.option("--seed", type=int, help="The ticket's seed.  [default: the run's first]")
@click.option(
    "--model",
    help="A whole network with a random mask: of `sparselth ls models`, my_net.py:make, torchvision:NAME or "
    "timm:NAME.",
)
@click.option("--ticket", type=PATH, help="A ticket's file instead of a random mask, of --model or of a run.")
@click.option("--input", "size", help="Samples of a module: 3x224x224.  [default: its own]")
@click.option("--train", is_flag=True, help="A training step of --model instead of inference.")
@click.option(
    "--strong",
    is_flag=True,
    help="Layers of strong tickets, whose weights are a seed and a mask: of half the weights, unless "
    "--sparsity says otherwise.",
)
@click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="Where it is measured.",
)
@click.option("--threads", type=int, help="Threads of a CPU.  [default: torch's]")
@click.option("--quick", is_flag=True, help="A quarter of the default table's time.")
@click.option("--all", "every", is_flag=True, help="A line for every implementation, not only the best.")
@click.option("--csv", "csv_file", type=PATH, help="Write the rows to this file, too.")
@click.option(
    "--out",
    type=PATH,
    help="Folder for figures and bench.json.  [default: named after what is asked; none with --json]",
)
@data_dir
@output
@click.pass_context
def bench(
    ctx: click.Context,
    sparsity: tuple[str, ...],
    shapes: tuple[str, ...],
    batch: tuple[str, ...] | None,
    dtype: tuple[str, ...] | None,
    masks: tuple[str, ...] | None,
    run: Path | None,
    level: int | None,
    seed: int | None,
    model: str | None,
    ticket: Path | None,
    size: str | None,
    train: bool,
    strong: bool,
    device: str,
    threads: int | None,
    quick: bool,
    every: bool,
    csv_file: Path | None,
    out: Path | None,
    data_dir: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Measure what sparsity is worth on this machine, beside dense at its best and the floor.

    Without more, the layers of LeNet-300-100, LeNet-5, VGG-16, ResNet-18 and squares, within 4 minutes.
    Every time stands beside a check against float64. A speed-up that noise decides is measured again, and has
    a question mark where that does not help. Stopped, it prints and writes what was measured, as partial.

    Exit codes: 0 done, 1 failed, 2 usage, 3 a check failed, 130 interrupted.
    """
    began = time.perf_counter()
    command_line = click.core.ParameterSource.COMMANDLINE
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is command_line}
    sparsities = STRONG if strong and "sparsity" not in given else _sparsities(sparsity)
    batches = _batches(batch)
    kinds = _known("mask", masks or (), MASKS)
    dtypes = _known("dtype", dtype or (), DTYPES)
    _check_numbers(threads, level, seed)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for a few shapes

    check_torch()
    if shapes:
        from sparselth.measure.layers import parse

        shapes = tuple(dict.fromkeys(parse(shape).text for shape in shapes))
    question = Question(
        sparsities,
        shapes,
        batches,
        dtypes,
        kinds,
        run,
        level,
        seed,
        model,
        train,
        threads,
        quick,
        strong,
        ticket,
        _size(size),
    )
    question.check(given)
    if not question.module:
        _check_memory(shapes, model, train, batches or (1,))
    say = _nothing if quiet else _progress
    if quick and not question.default_table and not quiet:
        print("sparselth: --quick shortens the default table; what is named takes its time", file=sys.stderr)
    try:
        chosen = _prepared(device, dtypes, train, threads)
    except KeyboardInterrupt:
        raise Interrupted(NOTHING) from None
    if out is None and not as_json:
        out = Path(question.folder(chosen))
    writable(out, csv_file)
    show = partial(_show, _facts(chosen), as_json, every, out, csv_file, sys.stdout)
    found: list[Outcome | Result] = []  # the last is what there is so far
    try:
        with (
            answered(lambda: print(f"sparselth: {_stopped(found, show, out)}", file=sys.stderr)),
            redirect_stdout(sys.stderr),  # what a network prints is no result
        ):
            found.append(_measure(question, chosen, data_dir, say, found.append))
    except KeyboardInterrupt:
        raise Interrupted(_stopped(found, show, out)) from None
    except Exception:
        leave_empty(out)
        raise
    try:
        files = show(found[-1], whole=True)
    except KeyboardInterrupt:
        raise Interrupted("interrupted behind the last measurement, while it was written or drawn") from None
    if not as_json:
        from sparselth.report.bench_tables import fill

        names = [str(file) if file.parent != out else file.name for file in files]
        said = f"{time.perf_counter() - began:.0f} s in all; {out}: {', '.join(names)}"
        print(f"\n{fill(said, width())}")
    return 3 if found[-1].failed else 0


def _prepared(device: str, dtypes: Sequence[str], train: bool, threads: int | None) -> str:
    """Torch imported and set; "cpu" or "cuda"."""
    chosen = _device(device, dtypes)
    import torch

    from sparselth.measure.memory import keep_freed

    keep_freed()
    if threads is not None:
        torch.set_num_threads(threads)
    return "cpu" if train else chosen


def _measure(
    question: Question, device: str, data_dir: Path | None, say: Say, keep: Callable[[Any], None]
) -> Outcome | Result:
    """What was asked for; `keep` gets what there is in between."""
    from sparselth.measure.asked import Asked
    from sparselth.measure.race_layers import bench_layers
    from sparselth.measure.race_networks import bench_model, bench_run
    from sparselth.measure.training import bench_training

    q = question
    if not q.network:
        asked = Asked(
            device, q.sparsities, q.shapes, q.batches, q.dtypes, q.kinds, q.run, q.level, q.seed, q.strong
        )
        return bench_layers(asked, QUICK if q.quick else SECONDS, say, keep)
    if q.module:
        from sparselth.measure.nets import net
        from sparselth.measure.race_modules import bench_module

        say("the network and its mask")
        found = net(q.model or (None if q.ticket else MODEL), q.sparsities[0], q.ticket, q.size)
        if q.train:
            from sparselth.measure.train_modules import bench_module_training

            return bench_module_training(found, (q.batches or MODULE_STEP)[0], say)
        return bench_module(found, q.batches or MODULE_BATCHES, say, device, keep)
    batches, name = q.batches or NETWORK_BATCHES, q.model or MODEL
    if q.run is not None:
        return bench_run(q.run, q.level, q.seed, batches, data_dir, say, device, keep)
    if q.train:
        return bench_training(name, q.sparsities[0], (q.batches or (60,))[0], say)
    return bench_model(name, q.sparsities[0], batches, say, device, keep)


def _show(
    facts: dict[str, Any],
    as_json: bool,
    every: bool,
    out: Path | None,
    csv_file: Path | None,
    stdout: TextIO,
    found: Outcome | Result,
    whole: bool,
) -> list[Path]:
    """Print and write what was measured; returns the files."""
    from sparselth.measure.race_layers import Outcome

    rows, more = found.rows, dict[str, Any]()
    if isinstance(found, Outcome):
        from sparselth.report import bench_tables

        facts, more = facts | found.anchors, {"left_out": found.left_out, "notes": found.notes}
        every = every or len(rows) <= FEW
        text = bench_tables.report(rows, facts, found.left_out, found.notes, every, width(), whole)
        part = f"{found.cells - len(found.left_out):,} of {found.cells:,} cells were measured"
    else:
        from sparselth.measure.case import where
        from sparselth.report import bench_tables, network_tables

        place = "\n".join([where(facts["type"]), *bench_tables.busy(facts)])
        text = network_tables.report(found, place, width())
        part = f"batch {', '.join(str(b) for b in dict.fromkeys(row['batch'] for row in rows))} was measured"
        more = {"notes": found.notes}
        more |= {key: found.facts[key] for key in ("layers", "compression") if key in found.facts}
    document = {"schema": "sparselth.bench/1", "device": facts, "rows": rows, "partial": not whole, **more}
    _clear()
    if as_json:
        print(json.dumps(document, indent=2), file=stdout, flush=True)
    else:
        head = "" if whole else f"PARTIAL, since it was interrupted: {part}.\n\n"
        print(as_flags(head + text), file=stdout, flush=True)
    return write(document, out, csv_file)


def _stopped(found: list[Outcome | Result], show: Callable[..., list[Path]], out: Path | None) -> str:
    """Print and write what there is; says what became of it."""
    _clear()
    if found and found[-1].rows:
        files = ", ".join(map(str, show(found[-1], whole=False)))
        return "interrupted; what was measured is printed" + (
            f" and, as partial, in {files}" if files else ""
        )
    leave_empty(out)
    return NOTHING


def _sparsities(words: Sequence[str]) -> tuple[float, ...]:
    found = []
    for word in words:
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not 0 <= value < 1:
            raise UsageError(
                f"--sparsity {word}: expected a number from 0 to below 1, the share of weights that are zero"
            )
        found.append(value)
    if not found:
        raise UsageError("--sparsity: expected a number from 0 to below 1, such as 0.9")
    return tuple(dict.fromkeys(found))


def _batches(words: Sequence[str] | None) -> tuple[int, ...]:
    for word in words or ():
        if not word.isdecimal() or len(word) > 9 or not 1 <= int(word) <= MOST_BATCH:
            raise UsageError(
                f"--batch {word}: expected whole numbers from 1 on, such as 1,64,4096, at most {MOST_BATCH:,}"
            )
    return tuple(dict.fromkeys(int(word) for word in words or ()))


def _size(word: str | None) -> tuple[int, ...] | None:
    if word is None:
        return None
    parts = word.split("x")
    if not all(part.isdecimal() and len(part) < 6 and int(part) for part in parts) or len(parts) > 4:
        raise UsageError(f"--input {word:.40}: expected the shape of a sample, such as 3x224x224 or 784")
    return tuple(map(int, parts))


def _known(kind: str, words: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    for word in words:
        if word not in known:
            raise unknown(kind, word, known)
    return tuple(dict.fromkeys(words))


def _check_numbers(threads: int | None, level: int | None, seed: int | None) -> None:
    check_number("threads", threads, 1, cores(), "cores of this process")
    check_number("level", level, 0, MOST)
    check_number("seed", seed, 0, 2**53)


def _check_memory(shapes: Sequence[str], model: str | None, train: bool, batches: Sequence[int]) -> None:
    """What cannot be held is said before anything is measured."""
    if not (shapes or model or train):
        return
    from sparselth.data.sets import DATASETS, FALLBACK, n_validation
    from sparselth.measure.layers import check_memory, of_model, parse
    from sparselth.models import get_model

    for shape in shapes:
        check_memory([parse(shape)], batches, f"`shape` {shape}")
    if model is not None:
        check_memory(of_model(get_model(model)), batches, f"`model` {model}")
    if train:
        images = DATASETS[FALLBACK].n_train
        check_number("batch", max(batches), 1, images - n_validation(images), "training images")


def _device(wanted: str, dtypes: Sequence[str]) -> str:
    """ "cpu" or "cuda"; without a GPU one line says that the CPU is measured."""
    from sparselth import machine

    try:
        chosen, _ = machine.choose_device(wanted)
    except SparselthError:
        chosen = "cpu"
    if chosen == "cpu" and wanted != "cpu":
        print("sparselth: torch finds no CUDA device; the CPU is measured instead", file=sys.stderr)
    if chosen == "cpu":
        if "tf32" in dtypes:
            raise UsageError("--dtype tf32: a CPU has no TF32; use fp32")
        return chosen
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < (8, 0) and {"bf16", "tf32"} & {*dtypes}:
        missing = next(name for name in dtypes if name in ("bf16", "tf32"))
        raise UsageError(f"--dtype {missing}: this GPU has no {missing} units; use fp32 or fp16")
    return chosen


def _facts(device: str) -> dict[str, Any]:
    """What the rows were measured on."""
    import torch

    from sparselth import machine

    facts = machine.environment()
    cuda = device == "cuda"
    return {
        "type": device,
        "name": torch.cuda.get_device_name() if cuda else facts["cpu"],
        "cores": facts["cores"],
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        **{name: facts[name] for name in ("sparselth", "commit", "python", "system", "packages", "gpu")},
    }


def _progress(text: str) -> None:
    """One line on stderr that the next one replaces; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        room = width() - 1
        print(f"\r\x1b[K{as_flags(text)[:room]}", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    _progress("")


def _nothing(text: str) -> None:
    pass
