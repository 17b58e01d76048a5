"""`sparselth bench`: what sparsity is worth on this machine, layer by layer or for whole networks."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparselth.cli.options import PATH, Names, as_flags, data_dir, output
from sparselth.config import MOST
from sparselth.errors import SparselthError, UsageError, check_number, unknown
from sparselth.machine import cores

if TYPE_CHECKING:
    from sparselth.measure.case import Result

DTYPES, MASKS = ("fp32", "tf32", "bf16", "fp16"), ("random", "block", "magnitude")
NETWORK_BATCHES, MOST_BATCH = (1, 8, 64, 256), 1 << 20
SECONDS, QUICK = 210.0, 45.0  # for the default table; 4 minutes with imports, figures and a last slow row
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
@click.option("--model", help="A whole network with a random mask; see `sparselth ls models`.")
@click.option("--train", is_flag=True, help="A training step of --model instead of inference.")
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
    help="Folder for figures and bench.json.  [default: bench-DEVICE-SPARSITY; none with --json]",
)
@data_dir
@output
def bench(
    sparsity: tuple[str, ...],
    shapes: tuple[str, ...],
    batch: tuple[str, ...] | None,
    dtype: tuple[str, ...] | None,
    masks: tuple[str, ...] | None,
    run: Path | None,
    level: int | None,
    seed: int | None,
    model: str | None,
    train: bool,
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
    Every time stands beside a check against float64. Exit code 3 when a check fails.
    """
    began = time.perf_counter()
    sparsities = _sparsities(sparsity)
    batches = _batches(batch)
    kinds = _known("mask", masks or (), MASKS)
    dtypes = _known("dtype", dtype or (), DTYPES)
    _fitting(shapes, run, model, train, kinds, level, seed)
    _check_numbers(threads, level, seed)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for a few shapes

    if shapes:
        from sparselth.measure.layers import parse

        for shape in shapes:
            parse(shape)
    _check_memory(shapes, model, train, batches or (1,))
    say = _nothing if quiet else _progress
    chosen = _device(device, dtypes)
    if train:
        chosen = "cpu"
    import torch

    from sparselth.measure.memory import keep_freed
    from sparselth.report import bench_tables

    keep_freed()
    if threads is not None:
        torch.set_num_threads(threads)
    if out is None and not as_json:
        out = Path(f"bench-{chosen}-{','.join(f'{s:g}' for s in sparsities)}")
    _writable(out, csv_file)
    facts, more = _facts(chosen), {}
    if model or train or (run and "magnitude" not in kinds):
        from sparselth.measure.case import where
        from sparselth.report import network_tables

        result = _network(run, level, seed, model, train, sparsities[0], batches, data_dir, chosen, say)
        rows, failed, text = result.rows, result.failed, network_tables.report(result, where(chosen))
    else:
        from sparselth.measure.asked import Asked
        from sparselth.measure.race_layers import bench_layers

        asked = Asked(chosen, sparsities, shapes, batches, dtypes, kinds, run, level, seed)
        outcome = bench_layers(asked, QUICK if quick else SECONDS, say)
        rows, failed, facts = outcome.rows, outcome.failed, facts | outcome.anchors
        more = {"left_out": outcome.left_out, "notes": outcome.notes}
        text = bench_tables.report(rows, facts, outcome.left_out, outcome.notes, every or len(rows) <= FEW)
    document = {"schema": "sparselth.bench/1", "device": facts, "rows": rows, **more}
    if not quiet:
        _clear()
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        print(as_flags(text))
    files = _write(document, out, csv_file)
    if not as_json:
        print(f"\n{time.perf_counter() - began:.0f} s in all. {', '.join(map(str, files))}")
    return 3 if failed else 0


def _network(
    run: Path | None,
    level: int | None,
    seed: int | None,
    model: str | None,
    train: bool,
    sparsity: float,
    batches: tuple[int, ...],
    data_dir: Path | None,
    device: str,
    say: Callable[[str], None],
) -> Result:
    from sparselth.measure.race_networks import bench_model, bench_run
    from sparselth.measure.training import bench_training

    if run is not None:
        return bench_run(run, level, seed, batches or NETWORK_BATCHES, data_dir, say, device)
    name = model or "lenet-300-100"
    if train:
        return bench_training(name, sparsity, (batches or (60,))[0], say)
    return bench_model(name, sparsity, batches or NETWORK_BATCHES, say, device)


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


def _known(kind: str, words: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    for word in words:
        if word not in known:
            raise unknown(kind, word, known)
    return tuple(dict.fromkeys(words))


def _fitting(
    shapes: Sequence[str],
    run: Path | None,
    model: str | None,
    train: bool,
    kinds: Sequence[str],
    level: int | None,
    seed: int | None,
) -> None:
    """Flags that contradict each other."""
    if "magnitude" in kinds and run is None:
        raise UsageError("--mask magnitude: needs the tickets of a run, --run RUN; `sparselth imp` makes one")
    if "magnitude" in kinds and (shapes or len(kinds) > 1):
        raise UsageError("--mask magnitude: the layers are those of --run, without --shape or other masks")
    if run is not None and (model or train or (shapes and "magnitude" not in kinds)):
        raise UsageError("--run: the network is the run's, without --model, --shape or --train")
    if (model or train) and (shapes or kinds):
        raise UsageError("--model and --train: a whole network, without --shape or --mask")
    if run is None and (level is not None or seed is not None):
        raise UsageError("--level and --seed: are those of a ticket, give its --run RUN")
    if model is not None:
        from sparselth.models import get_model

        get_model(model)


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


def _writable(out: Path | None, csv_file: Path | None) -> None:
    """Say it before minutes of measuring."""
    for flag, folder in (("--out", out), ("--csv", csv_file and csv_file.parent)):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trial = folder / f".{os.getpid()}.tmp"
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise SparselthError(
                f"{flag}: cannot write to {folder}: {error.strerror}; choose another"
            ) from error
    if csv_file is not None and csv_file.is_dir():
        raise SparselthError(f"--csv: {csv_file} is a folder; give a file")


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


def _write(document: dict[str, Any], out: Path | None, csv_file: Path | None) -> list[Path]:
    """The document and the figures into `out`, the rows as CSV."""
    from sparselth.files import write_atomically

    files = []
    rows = document["rows"]
    if out is not None:
        files.append(out / "bench.json")
        write_atomically(files[-1], (json.dumps(document, indent=1) + "\n").encode())
        if "left_out" in document:
            from sparselth.report.bench_figures import draw

            files += [file for file in draw(rows, document["device"], out) if file.suffix == ".png"]
    if csv_file is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(csv_file, text.getvalue().encode())
        files.append(csv_file)
    return files


def _progress(text: str) -> None:
    """One line on stderr that the next one replaces; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{as_flags(text)[:100]}", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    _progress("")


def _nothing(text: str) -> None:
    pass
