"""Hostile and rotten input for everything that reads: what is wrong is one line, and nothing else happens.

    python tests/fuzz/fuzz.py [--cases 10000] [--seed 0] [--only KIND] [--case NUMBER]

Each case mutates a file that sparselth wrote, or a command line, and reads it in a child process. Lost is
what ends with an exception that is no SparselthError of one line, a crash or a hang, what takes more than
SPARE bytes of memory, runs code (pickles, processes), opens or writes a file outside of its folder. A case is
a function of seed, kind and number; --case shows one with its traceback.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import faulthandler
import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from select import select
from typing import Any
from unittest import mock

import numpy as np
import torch

import rot
from rot import ELSEWHERE
from sparselth import compare, data, diverged, machine, strong_tickets, tickets
from sparselth.cli import main as command_line
from sparselth.config import Cell, Recipe, config_from_json
from sparselth.data import DATASETS, DatasetSpec, own
from sparselth.data.batches import Batches, Resident
from sparselth.data.sets import CifarFile, IdxFile
from sparselth.engine import break_even
from sparselth.engine.state import Job
from sparselth.errors import SparselthError
from sparselth.exchange import export_ticket, import_ticket
from sparselth.experiments import jobs
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.plan import Watcher
from sparselth.experiments.price import recorded
from sparselth.experiments.run import run
from sparselth.files import array_bytes, load_arrays, sealed, sealed_line
from sparselth.frozen import METHODS, mask_of
from sparselth.machine import ran_on_gpus
from sparselth.models import MODELS, Linear, Model, ReLU, get_model
from sparselth.runs import cell_path, open_run, read, read_config, reporting
from sparselth.sparse import times

SECONDS = 5.0  # of a case
SPARE = 1 << 30  # bytes of address space beyond what the process has
CODE = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork")
Case = Callable[[Random, Path], None]


# ---- what is mutated


@cache
def base() -> Path:
    """A folder with what sparselth has written of a small network."""
    folder = Path(tempfile.mkdtemp(prefix="sparselth-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if "fuzz" not in MODELS:
        recipe = Recipe(steps=20, lr=0.01, batch_size=10, eval_every=10)
        layers = (Linear(6), ReLU(), Linear(3))
        MODELS.add(  # type: ignore[attr-defined]
            "fuzz", Model("fuzz", (1, 4, 4), layers, {"short": recipe}, "of the fuzzer", 3, "fuzz")
        )
        DATASETS.add("fuzz", _set())
    return folder


def _set() -> DatasetSpec:
    draw = np.random.default_rng(0)
    parts = [
        (draw.integers(256, size=(n, 1, 4, 4), dtype=np.uint8), draw.integers(3, size=n)) for n in (80, 30)
    ]
    shape = {"shape": (1, 4, 4), "classes": 3, "n_train": 80, "n_test": 30}
    return DatasetSpec(name="fuzz", title="noise", read=lambda folder: (*parts[0], *parts[1]), **shape)


def config() -> ImpConfig:
    base()
    return ImpConfig(
        eval_images=0,
        seeds=(0, 1),
        model="fuzz",
        dataset="fuzz",
        levels=2,
        rate=0.5,
        device="cpu",
        arms=("ticket", "reinit", "random-mask"),
    )


@cache
def ticket_files() -> list[Path]:
    """Tickets of levels 0 to 2."""
    folder, params, draw = base() / "tickets", get_model("fuzz").params, torch.Generator().manual_seed(0)
    folder.mkdir()
    found = []
    for level in range(3):
        mask = (torch.rand(params.mask_size, generator=draw) < 0.5**level) & params.full_mask()
        weights = torch.randn(params.size, generator=draw)
        weights[: params.mask_size] *= mask
        content = tickets.Content(mask.numpy(), weights.numpy(), None if level else weights.numpy())
        where = {"model": "fuzz", "dataset": "fuzz", "config": config().digest, "rewind_step": 0}
        found.append(folder / f"seed0-ticket-{level:02d}.safetensors")
        tickets.save(found[-1], params, content, **where, cell=f"seed0-ticket-{level:02d}")
    return found


@cache
def strong_files() -> list[Path]:
    """Strong tickets of methods whose files have all there can be."""
    folder, params, draw = base() / "strong", get_model("fuzz").params, torch.Generator().manual_seed(0)
    folder.mkdir()
    found = []
    for level, (name, law) in enumerate(
        (("iterand", "normal"), ("recycle", "uniform"), ("signed", "normal"))
    ):
        frozen = METHODS[name].frozen(level, law=law, keep=0.3)
        scores = METHODS[name].start(frozen, params, draw)
        redraws = torch.zeros(params.mask_size, dtype=torch.int32)
        for spec in params.weights:
            place = torch.randint(0, spec.numel, (spec.numel,), generator=draw)
            redraws[spec.span] = place - torch.arange(spec.numel) if name == "recycle" else place
        content = strong_tickets.Content.of(
            params, frozen, mask_of(frozen, params, scores), None if name == "signed" else redraws, scores
        )
        where = {"model": "fuzz", "dataset": "fuzz", "config": config().digest, "rewind_step": 0}
        found.append(folder / f"seed{level}-ticket-00.safetensors")
        strong_tickets.save(found[-1], params, content, **where, cell=found[-1].stem)
    return found


def _module() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Linear(5, 5)
    )


@cache
def module_files() -> list[Path]:
    """Tickets of a module: tied weights, bf16, a full mask, an empty one."""
    folder, found = base() / "modules", list[Path]()
    folder.mkdir()
    for seed, share in enumerate((0.3, 0.0, 1.0)):
        torch.manual_seed(seed)
        model = _module().to(torch.bfloat16 if seed else torch.float32)
        tied = torch.nn.Sequential(*model, model[3])
        masks = {n: torch.rand(p.shape) < share for n, p in tied.named_parameters() if p.dim() > 1}
        found.append(folder / f"{seed}.safetensors")
        tickets.save_ticket(found[-1], tied, masks, tied.state_dict(), {"accuracy": 0.5, "seed": seed})
    return found


@cache
def checkpoint_files() -> list[tuple[str, Path]]:
    """Masks of others, as each format that is imported has them, and one that pickles code."""
    folder, state, found = base() / "checkpoints of others", _module().state_dict(), list[tuple[str, Path]]()
    folder.mkdir()
    masks = {name: torch.ones(t.shape) for name, t in state.items() if t.dim() > 1}
    rest = {name: t for name, t in state.items() if name not in masks}
    pruned = {f"{n}_orig": state[n] for n in masks} | {f"{n}_mask": m for n, m in masks.items()}
    buffers = {f"mask_{n.replace('.', '___')}": m for n, m in masks.items()}
    scores = {n.replace("weight", "scores"): state[n].float() for n in masks}
    for name, of, content in (
        ("prune", "torch-prune", pruned | rest),
        (
            "checkpoint",
            "open_lth",
            {"model_state_dict": {f"model.{n}": t for n, t in state.items()} | buffers},
        ),
        ("mask", "open_lth", {n: m.int() for n, m in masks.items()}),
        ("best", "hidden-networks", {"state_dict": state | scores, "epoch": 3}),
        ("code", "torch-prune", {"state_dict": state, "model": _module()}),
    ):
        found.append((of, folder / f"{name}.pth"))
        torch.save(content, found[-1][1], _use_new_zipfile_serialization=name != "mask")
    return found


def rewritten(draw: Random, source: Path) -> bytes:
    """A file of arrays whose content is another, with every checksum right."""
    found, head = load_arrays(source)
    if draw.random() < 0.6:
        found = rot.arrays(draw, found)
    if draw.random() < 0.5:
        head = rot.mutated(draw, head)
    try:
        return array_bytes({name: np.ascontiguousarray(a) for name, a in found.items()}, head)
    except (ValueError, TypeError, UnicodeError, AttributeError):  # what cannot be written
        return rot.flipped(draw, source.read_bytes())


def array_file(draw: Random, source: Path, file: Path) -> None:
    """A file like `source`, mutated in one way or another."""
    content, how = source.read_bytes(), draw.random()
    if how < 0.1:
        shutil.copy(source, file)
        rot.entry(draw, file, ticket_files())
        return
    if how < 0.3:
        content = rot.flipped(draw, content)
    elif how < 0.5:
        content = rot.safetensors(draw, content)
    else:
        content = rewritten(draw, source)
    file.write_bytes(content)


def json_file(draw: Random, found: Any, file: Path) -> None:
    file.write_bytes(rot.text(draw, found))
    if draw.random() < 0.05:
        rot.entry(draw, file, ticket_files())


# ---- who reads


def all_of(*calls: Callable[[], object]) -> None:
    """Each call, whatever the one before raised; then the first error of those that are allowed."""
    errors = []
    for call in calls:
        try:
            call()
        except SparselthError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def tickets_(draw: Random, folder: Path) -> None:
    files = ticket_files()
    source = draw.choice(files)
    for other in files:
        if other != source and draw.random() < 0.7:
            (folder / other.name).hardlink_to(other)
    file = folder / source.name
    array_file(draw, source, file)
    params = get_model("fuzz").params

    def whole() -> None:
        ticket = tickets.load(file)
        assert 0 <= ticket.weights_remaining <= 1
        all_of(lambda: ticket.masks, ticket.trained, ticket.rewound)

    all_of(
        whole,
        lambda: tickets.read(file, params),
        *(lambda spec=spec: tickets.read_mask(file, spec) for spec in params.weights),
    )


def strong_(draw: Random, folder: Path) -> None:
    source = draw.choice(strong_files())
    file = folder / source.name
    array_file(draw, source, file)

    def whole() -> None:
        ticket = tickets.load(file)
        assert 0 <= ticket.weights_remaining <= 1
        all_of(lambda: ticket.masks, ticket.trained, ticket.rewound)

    all_of(whole, lambda: strong_tickets.read(file, get_model("fuzz").params))


def modules_(draw: Random, folder: Path) -> None:
    source = draw.choice(module_files())
    file, other = folder / source.name, draw.choice(module_files())
    array_file(draw, source, file)

    def whole() -> None:
        ticket = tickets.load_ticket(file)
        assert 0 <= ticket.weights_remaining <= 1
        model = torch.nn.Sequential(*(parts := _module()), parts[3])
        all_of(
            lambda: (ticket.snapshot, ticket.notes, ticket.dense_bytes),
            lambda: ticket.apply(model),
            lambda: compare.layers(ticket),
            lambda: compare.differences(ticket, tickets.load_ticket(other)),
            lambda: [export_ticket(ticket, to, folder / "x.pt") for to in ("torch", "csr", "torch-prune")],
            lambda: export_ticket(ticket, "compressed-tensors", folder / "x.safetensors"),
        )

    commands(["ticket", "inspect", "--no-times", str(file)], ["ticket", "verify", "--json", str(file)])
    whole()


def others_(draw: Random, folder: Path) -> None:
    of, source = draw.choice(checkpoint_files())
    file = folder / source.name
    file.write_bytes(source.read_bytes() if draw.random() < 0.05 else rot.flipped(draw, source.read_bytes()))
    if draw.random() < 0.1:
        of = draw.choice(["torch-prune", "open_lth", "hidden-networks"])
    import_ticket(file, of, folder / "t.safetensors", keep=0.5)
    tickets.load_ticket(folder / "t.safetensors")


def configurations(draw: Random, folder: Path) -> None:
    found = config().to_json()
    json_file(draw, found, folder / "config.json")
    if draw.random() < 0.3:
        json_file(draw, {"plugins": ["mine.py"]}, folder / "environment.json")
    read = read_config(folder)
    _ = read.digest, read.title, read.folder, read.to_json()
    assert config_from_json(read.to_json()) == read
    all_of(read.check, read.cells)


@cache
def base_run() -> Path:
    """A finished run of the small network, without figures."""
    path = base() / "run"
    with mock.patch.object(ImpConfig, "draw"), mock.patch.object(machine, "gpu_name", return_value=None):
        run(config(), out=path, workers=1, watcher=Watcher())
    return path


@cache
def diverged_run() -> Path:
    """The same, of which a cell has diverged."""
    path, cell = base() / "diverged", Cell(1, "random-mask", 2)
    shutil.copytree(base_run(), path)
    files = {other: text for other, text in read(path).files.items() if other != cell}
    cell_path(path, cell).unlink()
    diverged.write(path, config(), cell, "it was \x1b[2J too much", files)
    return path


def lines_file(draw: Random, file: Path) -> None:
    """Lines gone, doubled, in another order, torn, or with another content and a checksum that fits it."""
    lines = file.read_bytes().splitlines()
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(lines)) if lines else 0
        match draw.randrange(7):
            case 0:
                del lines[at:][:1]
            case 1:
                lines[at:at] = lines[at : at + 1]
            case 2:
                draw.shuffle(lines)
            case 3:
                lines[at : at + 1] = [rot.flipped(draw, line) for line in lines[at : at + 1]]
            case 4:
                lines.insert(at, rot.content(draw))
            case _ if lines:
                found = rot.mutated(draw, json.loads(lines[at]) if lines[at].startswith(b"{") else {})
                with suppress(ValueError, TypeError, AttributeError):
                    lines[at] = json.dumps(found).encode()
                    lines[at] = sealed_line({k: v for k, v in found.items() if k != "sha256"})
    file.write_bytes(b"\n".join(lines) + b"\n" * (draw.random() < 0.8))


def part_of_a_run(draw: Random, path: Path) -> None:
    """One file of a run, mutated as what it is; or a folder of it gone or something else."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size < 1 << 20]
    file = draw.choice(files)
    how = draw.random()
    if how < 0.05:
        folder = path / draw.choice(("cells", "checkpoints"))
        shutil.rmtree(folder, ignore_errors=True)
        if how < 0.03 and not folder.exists():
            folder.write_text("a file")
    elif how < 0.15:
        rot.entry(draw, file, files)
    elif file.suffix == ".safetensors":
        array_file(draw, base_run() / "cells" / file.name, file)
    elif file.suffix == ".jsonl":
        lines_file(draw, file)
    elif file.suffix == ".json" and how < 0.5:
        found = rot.mutated(draw, {k: v for k, v in json.loads(file.read_bytes()).items() if k != "sha256"})
        with suppress(ValueError, TypeError, AttributeError):
            file.write_bytes(json.dumps(sealed(found)).encode())
    elif file.suffix == ".json":
        json_file(draw, json.loads(file.read_bytes()), file)
    else:
        file.write_bytes(rot.content(draw))


def runs_(draw: Random, folder: Path) -> None:
    """A run whose files rot is read, listed and opened; what is well beside it is shown."""
    rotten = folder / "runs" / "rotten"
    environment = (base_run() / "environment.json").read_text()
    shutil.copytree(draw.choice((base_run(), diverged_run())), rotten)
    shutil.copytree(base_run(), folder / "runs" / "well", copy_function=os.link)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        with suppress(json.JSONDecodeError, AttributeError, UnicodeDecodeError, RecursionError, OSError):
            part_of_a_run(draw, rotten)
    show = ["show", "runs/rotten"]
    said = commands(["ls", "runs", "--out", "runs"], show, [*show, "--json"])
    assert "runs/well  fuzz on fuzz" in said[0]

    def opened() -> None:
        with open_run(rotten, config(), json.loads(environment), resume=True) as it:
            _ = it.begun_elsewhere(json.loads(environment)), it.break_even

    def shown() -> None:
        record = read(rotten)
        with reporting(record):
            record.config.table(record)
            json.dumps(record.config.summary(record))
        for cell in record.config.cells()[:9]:
            if cell.arm == "ticket" and record.config.model == "fuzz":
                all_of(lambda cell=cell: record.mask(cell.seed, cell.level, "fc1.weight"))

    all_of(shown, opened, shown)


def commands(*lines: list[str]) -> list[str]:
    """What commands print; none of them may find a fault in sparselth."""
    printed, errors = [], []
    for words in lines:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = command_line.run(words)
        said = err.getvalue()
        assert code in (0, 1, 2, 3), (words, code)
        assert "a fault of sparselth" not in said, (words, said)
        assert not code or said.splitlines()[-1].startswith("sparselth: "), (words, said)
        printed.append(out.getvalue())
        errors.append(code)
    assert lines[0][0] != "ls" or errors[0] == 0, printed
    return printed


CELL = Cell(0, "ticket", 0)


@cache
def base_checkpoint() -> Path:
    """Of a cell at its first step."""
    folder = base() / "stopped"
    trained(folder, Place(folder, images(), {}, should_stop=lambda: True))
    return folder / "checkpoints" / f"{CELL.key}.safetensors"


@cache
def images() -> Resident:
    return Resident(data.load("fuzz", base()), "cpu", 10)


def trained(folder: Path, place: Place) -> Job:
    """The cell as training leaves it."""
    for name in ("checkpoints", "cells"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    model, recipe = get_model("fuzz"), config().recipe
    start = model.params.full_mask(), torch.ones(model.params.size)
    job = jobs.job(CELL, place, recipe, start, 0, None)
    jobs.train(model, [job], recipe, "reference", place, {"config": "x", "cell": ""})
    return job


def checkpoints(draw: Random, folder: Path) -> None:
    """A checkpoint that is none is a cell that begins again."""
    (folder / "checkpoints").mkdir()
    array_file(draw, base_checkpoint(), folder / "checkpoints" / base_checkpoint().name)
    job = trained(folder, Place(folder, images(), {}))
    assert job.diverged or job.state.step == config().recipe.steps


KNOWN = {"a": 1e-3, "b": 2e-3}


def caches(draw: Random, folder: Path) -> None:
    """A cache never fails, whatever there is."""
    model, calls = get_model("fuzz"), dict.fromkeys(KNOWN, lambda: None)
    measured = break_even.Measured(0.25, 1.0)
    with (
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}),
        mock.patch.object(break_even, "_measure", return_value=measured),
        mock.patch.object(times, "seconds", side_effect=lambda *_: times.Times(KNOWN)),
    ):
        break_even.break_even(model, 10, "torch")
        raced = times.Cache(8, "cpu")
        raced.times("x", calls, lambda call: lambda: 0.0)
        raced.save()
        for name in ("break_even", "convert"):
            file = folder / "sparselth" / f"{name}.json"
            json_file(draw, json.loads(file.read_text()), file)
        if draw.random() < 0.02:
            shutil.rmtree(folder / "sparselth")
            (folder / "sparselth").write_text("a file")
        try:
            found = break_even.break_even(model, 10, "torch")
            assert set(found) == {spec.name for spec in model.weights}
            assert all(0 <= share <= break_even.ALWAYS for share in found.values())
            raced = times.Cache(8, "cpu")
            raced_times = raced.times("x", calls, lambda call: lambda: 0.0)
            assert set(raced_times) == set(KNOWN)
            assert all(0 < seconds < float("inf") for seconds in raced_times.values())
            raced.save()
        except SparselthError as error:
            raise AssertionError(f"a cache raised {error}") from error


@cache
def data_files() -> dict[str, tuple[DatasetSpec, dict[str, bytes]]]:
    """Sets in the forms of MNIST and of CIFAR-10, with the right checksums."""
    draw = np.random.default_rng(0)
    shapes = ((40, 4, 4), (40,), (10, 4, 4), (10,))
    idx = {}
    for i, shape in enumerate(shapes):
        array = draw.integers(3, size=shape, dtype=np.uint8)
        head = struct.pack(f">{len(shape) + 1}I", 0x0800 | len(shape), *shape)
        idx[f"file{i}"] = head + array.tobytes()
    files = tuple(
        IdxFile(name, shape, hashlib.sha256(content).hexdigest())
        for (name, content), shape in zip(idx.items(), shapes, strict=True)
    )
    measures = {"shape": (1, 4, 4), "classes": 3, "n_train": 40, "n_test": 10, "torchvision": "MNIST"}
    mnist = DatasetSpec(name="idx", title="", folder="raw", files=files, **measures)

    cifar = {}
    for i, n in enumerate((40, 10)):
        labels = b"".join(b"K" + bytes([draw.integers(3)]) for _ in range(n))
        cifar[f"batch{i}"] = b"\x80\x02" + bytes(8) + labels + bytes(4) + draw.bytes(16 * n)
    batches = tuple(
        CifarFile(name, (n, 16), len(content), (10, 14 + 2 * n), hashlib.sha256(content).hexdigest())
        for (name, content), n in zip(cifar.items(), (40, 10), strict=True)
    )
    return {
        "idx": (mnist, idx),
        "cifar": (DatasetSpec(name="cifar", title="", folder="raw", files=batches, **measures), cifar),
    }


def datasets(draw: Random, folder: Path) -> None:
    spec, contents = data_files()[draw.choice(("idx", "cifar"))]
    (folder / "raw").mkdir()
    victim = draw.choice(sorted(contents))
    for name, good in contents.items():
        content, packed = good, draw.random() < 0.3
        if name == victim and draw.random() < 0.9:
            content = draw.choice(
                (
                    lambda good=good: rot.flipped(draw, good),
                    lambda: rot.content(draw),
                    lambda: rot.BOMB,
                    lambda good=good: good[:4] + struct.pack(">I", 2**32 - 1) + good[8:],
                    lambda good=good: good + bytes(1 << 24),
                )
            )()
        file = folder / "raw" / (f"{name}.gz" if packed else name)
        if packed:
            content = gzip.compress(content, 1)
            if name == victim and draw.random() < 0.5:
                content = rot.flipped(draw, content)
        file.write_bytes(content)
        if name == victim and draw.random() < 0.1:
            rot.entry(draw, file, ticket_files())
    with mock.patch.dict(DATASETS.things, {spec.name: spec}):
        images = data.load(spec.name, folder)
    if spec.name == "idx":
        assert images.train_images.tobytes() == contents["file0"][16:]


def arrays_of_plugins(draw: Random, folder: Path) -> None:
    """What a data set's own function may give."""
    train, train_labels, test, test_labels = _set().read(folder)  # type: ignore[misc]
    found = rot.arrays(draw, {"a": train, "b": train_labels, "c": test, "d": test_labels})
    given: Any = tuple(found.values())
    if draw.random() < 0.2:
        given = draw.choice((None, (), 3, "four", given[:3], [given], [[1, [2]], 1, 2, 3], (given[0],) * 4))
    spec = mock.Mock(wraps=None)
    spec = DatasetSpec(**{**vars(_set()), "name": "given", "read": lambda folder: given})
    with mock.patch.dict(DATASETS.things, {"given": spec}):
        data.load("given", folder)


def data_of_users(draw: Random, folder: Path) -> None:
    """What a function of a user's own file may give: tensors, arrays, lists, Datasets, or nothing of use."""
    of = np.random.default_rng(draw.randrange(10**6))
    x = draw.choice(
        (
            of.integers(256, size=(30, 1, 4, 4), dtype=np.uint8),
            of.normal(size=(30, 5)).astype(np.float32),
            of.integers(9, size=(30, 4)),
        )
    )
    y = draw.choice((np.arange(30) % 3, of.integers(9, size=(30, 4)), of.normal(size=30)))
    found = rot.arrays(draw, {"a": x[:20], "b": y[:20], "c": x[20:], "d": y[20:]})
    parts = [*found.values()]
    with suppress(TypeError, RuntimeError):  # of kinds that torch has not
        parts = [torch.from_numpy(part) if draw.random() < 0.3 else part for part in parts]
    if draw.random() < 0.2:
        parts[draw.randrange(len(parts))] = draw.choice((None, "x", {}, [[1], [2, 3]], 3, float("nan"), b"x"))
    given: Any = tuple(parts)
    if len(parts) == 4 and draw.random() < 0.3:
        with suppress(TypeError):  # of numbers that are no row
            given = [list(zip(*pair, strict=False)) for pair in (parts[:2], parts[2:])]
    elif len(parts) == 4 and draw.random() < 0.3:
        given = (parts[0], parts[1]), (parts[2], parts[3])
    if draw.random() < 0.1:
        given = draw.choice((None, (), 3, "four", given[:3], [given], (None, None), ([], [])))
    with mock.patch("sparselth.user_files.function", return_value=lambda: given):
        images = own._Reader("mine.py:load").images()
    spec, held = images.spec, Resident(images, "cpu", 7)
    a, b = Batches(held, [Cell(0, "ticket", 0)], 3).first(1)
    assert a.shape == (1, 3, *spec.shape)
    assert torch.isfinite(a.double()).all()
    assert spec.classes is None or 0 <= int(b.min()) <= int(b.max()) < spec.classes


def results(draw: Random, folder: Path) -> None:
    """Files of bench/results: prices of another device, what has run on GPUs."""
    shared = {"op": "train_step", "ours": True, "model": "fuzz", "optimizer": "adam", "batch_size": 10}
    rows = [
        shared | {"kind": kind, "replicas": n, "ways": {"graph": {"median_s": 1e-4 * n}}}
        for kind in ("step", "evaluation")
        for n in (1, 100)
    ]
    checks = [{"op": "masked_linear", "ok": True}, {"op": "bitmask", "ok": False, "skipped": "no"}]
    schema = {"schema": "sparselth.gpu_check/1", "device": {"name": "A Device"}, "ops": ["masked_linear"]}
    file = folder / "device.json"
    json_file(draw, schema | {"checks": checks, "times": rows}, file)
    assert ran_on_gpus(folder).isprintable()

    def prices() -> None:
        name, price = recorded(str(file), config())
        assert isinstance(name, str)
        assert 0 < price.run_seconds(config(), (), 2, 100) < float("inf")
        price.run_bytes(config(), 2, 100)

    prices()


VALUES = (
    "0", "-1", "1", "2", "3", "1e400", "nan", "inf", "9" * 5000, "1000000000", "10000000000000000",
    "0.5", "-0.0", "", " ", ",", "0-", "-", "0-99999999999", "1,0", "0,0", "x", "ticket", "\udcff", "\x00",
    "64x64", "0x0", "1x1p99", "64x64x3x3@32x32/0", "99999x99999", "lenet-300-100", "fuzz", "adam", "sgd",
    "²", "٣", "../x", "magnitude", "true",
    "models", "arms", "experiments", "datasets", "runs", "nowhere.py:load", ".py:", "a:b", "crop-flip", "fc1",
)  # fmt: skip


def command_lines(draw: Random, folder: Path) -> None:
    """Words for commands, up to where something slow would begin."""
    name = draw.choice(("imp", "imp", "imp", "bench", "bench", "show", "ls"))
    command = command_line.cli.get_command(None, name)  # type: ignore[arg-type]
    words = [name]
    params = [
        p for p in command.params if p.name not in ("help", "plugin", "debug", "data_dir", "csv_file", "out")
    ]
    for param in draw.sample(params, min(len(params), draw.randrange(1, 5))):
        if param.param_type_name == "argument" or draw.random() < 0.05:
            words.append(draw.choice(VALUES))
        elif getattr(param, "is_flag", False):
            words.append(param.opts[0])
        else:
            words += [param.opts[0], draw.choice(VALUES)]

    def stop(*_: Any, **__: Any) -> Any:
        raise SparselthError("something slow would begin")

    places = (
        "sparselth.data.resolve", "sparselth.measure.race_layers.bench_layers",
        "sparselth.measure.race_networks.bench_model", "sparselth.measure.race_networks.bench_run",
        "sparselth.measure.training.bench_training", "sparselth.measure.race_modules.bench_module",
        "sparselth.measure.train_modules.bench_module_training",
    )  # fmt: skip
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch(place, stop))
        for asked in ("commit", "gpu_name", "cpu_name"):  # of other programs
            stack.enter_context(mock.patch(f"sparselth.machine.{asked}", return_value=None))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = command_line.run(words)
    torch.set_num_threads(threads)
    said = err.getvalue().splitlines()
    assert code in (0, 1, 2, 3), (words, code)
    assert "a fault of sparselth" not in err.getvalue(), (words, said)
    assert not code or (said and said[-1].startswith("sparselth: ")), (words, said)
    if code:
        raise SparselthError(said[-1])


KINDS: dict[str, Case] = {
    "tickets": tickets_,
    "strong": strong_,
    "tickets of modules": modules_,
    "masks of others": others_,
    "runs": runs_,
    "checkpoints": checkpoints,
    "configurations": configurations,
    "caches": caches,
    "datasets": datasets,
    "arrays of plugins": arrays_of_plugins,
    "data of users": data_of_users,
    "results": results,
    "command lines": command_lines,
}
FEW = dict.fromkeys(KINDS, 60) | {"runs": 20, "checkpoints": 30, "caches": 20}  # of `make test`
NEVER = {"checkpoints", "caches"}  # are refused: what is none is not there (numbers may diverge)


# ---- what must be noticed


def _raises(draw: Random, folder: Path) -> None:
    raise ValueError("planted")


def _two_lines(draw: Random, folder: Path) -> None:
    class Loud(SparselthError):
        def __str__(self) -> str:
            return "one\ntwo"

    raise Loud


def _crashes(draw: Random, folder: Path) -> None:
    os.abort()


def _hangs(draw: Random, folder: Path) -> None:
    time.sleep(1000)


def _fills(draw: Random, folder: Path) -> None:
    np.zeros(1 << 32, np.uint8)


def _runs_code(draw: Random, folder: Path) -> None:
    import pickle

    with suppress(Exception):
        pickle.loads(rot.BOMB)


def _leaves(draw: Random, folder: Path) -> None:
    with suppress(OSError):
        (folder / ".." / ELSEWHERE / "seed0-ticket-00.safetensors").read_bytes()


def _writes(draw: Random, folder: Path) -> None:
    (folder / ".." / "more").touch()


PLANTED = {
    "raises": "ValueError: planted",
    "two lines": "not one line",
    "crashes": "signal 6",
    "hangs": "hangs",
    "fills": "MemoryError",
    "runs code": "os.system",
    "leaves": ELSEWHERE,
    "writes": "writes",
}
_PLANTED: dict[str, Case] = {
    "raises": _raises,
    "two lines": _two_lines,
    "crashes": _crashes,
    "hangs": _hangs,
    "fills": _fills,
    "runs code": _runs_code,
    "leaves": _leaves,
    "writes": _writes,
}


# ---- a campaign


@dataclass
class Tried:
    """What cases of a kind came to."""

    cases: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)


class Hang(BaseException):
    pass


def campaign(kind: str, numbers: Iterable[int], seed: int, place: Path, seconds: float = SECONDS) -> Tried:
    """Cases of a kind in child processes, of which another goes on where one crashed."""
    case = KINDS.get(kind) or _PLANTED[kind]
    base(), ticket_files(), strong_files(), data_files(), diverged_run(), base_checkpoint()
    module_files(), checkpoint_files()
    place.mkdir(parents=True, exist_ok=True)
    elsewhere = place / ELSEWHERE
    if not elsewhere.exists():
        shutil.copytree(ticket_files()[0].parent, elsewhere)
        (elsewhere / "config.json").write_text("{}")
    tried, left = Tried(), list(numbers)
    while left:
        begun = -1
        for message in _messages(case, kind, list(left), seed, place, seconds):
            begun = message["number"]
            if "state" in message:
                tried.cases += 1
                left.remove(begun)
                tried.refused += message["state"] == "refused"
                if message["state"] == "lost":
                    tried.lost.append(f"{kind} {begun}: {message['why']}")
                begun = -1
            elif "ended" in message and begun in left:
                tried.cases += 1
                left.remove(begun)
                tried.lost.append(f"{kind} {begun}: {message['ended']}")
    return tried


def _messages(
    case: Case, kind: str, numbers: list[int], seed: int, place: Path, seconds: float
) -> Iterator[dict[str, Any]]:
    """What a child says: the number that begins, then how it ended; last how the child itself ended."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            _child(case, kind, numbers, seed, place, seconds, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    begun, why = -1, ""
    with os.fdopen(ours, "rb") as pipe:
        while True:
            if not select([pipe], [], [], seconds + 5)[0]:
                os.kill(child, signal.SIGKILL)
                why = "hangs where no signal is heard"
            line = pipe.readline()
            if not line:
                break
            message = json.loads(line)
            begun = message["number"]
            yield message
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or begun != numbers[-1]:
        yield {
            "number": begun,
            "ended": why or f"ended by signal {-code}" if code < 0 else f"ended with {code}",
        }


def _child(
    case: Case, kind: str, numbers: list[int], seed: int, place: Path, seconds: float, pipe: int
) -> None:
    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    os.fsync = lambda _: None  # nothing here has to outlive the machine
    faulthandler.disable()  # pytest's would print where a planted crash is
    _limit_memory()
    devnull = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(devnull, number)
    watch = _Watch(place)
    for number in numbers:
        os.write(pipe, (json.dumps({"number": number}) + "\n").encode())
        state, why = judged(case, kind, number, seed, place, seconds, watch)
        os.write(pipe, (json.dumps({"number": number, "state": state, "why": why[-1500:]}) + "\n").encode())


def judged(
    case: Case, kind: str, number: int, seed: int, place: Path, seconds: float, watch: _Watch
) -> tuple[str, str]:
    """How a case ends, "read", "refused" or "lost", and why."""
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    state, why = "read", ""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with watch.over(folder):
            case(Random(f"{seed}/{kind}/{number}"), folder)
    except SparselthError as error:
        state, why = "refused", str(error)
        if not (why.isprintable() and why and len(why) <= 1100):
            state, why = "lost", f"not one line: {why[:300]!r}"
    except Hang:
        state, why = "lost", f"hangs: {''.join(traceback.format_exc()[-600:])}"
    except BaseException as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        state, why = "lost", f"{type(error).__name__}: {str(error)[:300]}\n{where}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(place)
    seen = watch.seen()
    if seen:
        state, why = "lost", "; ".join(seen[:3])
    return state, why


def _limit_memory() -> None:
    """No more address space than there is now, and SPARE."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


class _Watch:
    """Sees, while it is over a case, code that is run and files that are not the case's."""

    def __init__(self, place: Path) -> None:
        self.elsewhere = f"{place.resolve() / ELSEWHERE}"
        self.folder, self.armed, self.found = "", False, list[str]()
        self.inotify = _inotify(self.elsewhere)  # what is opened by libraries that Python does not see
        sys.addaudithook(self._hook)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.folder, self.armed = f"{folder.resolve()}/", True
        try:
            yield
        finally:
            self.armed = False

    def seen(self) -> list[str]:
        found, self.found = self.found, []
        with suppress(BlockingIOError):
            while self.inotify >= 0:
                if _of_files(os.read(self.inotify, 4096)):
                    found.append(f"opened in {ELSEWHERE}")
        return found

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in CODE:
            self.found.append(f"ran code: {event} {args[:2]!r:.200}")
        elif event == "open" or event.startswith(("os.", "shutil.")):
            for path in args:
                if isinstance(path, (str, bytes, os.PathLike)):
                    place = os.path.abspath(os.fsdecode(path))
                    if place.startswith(self.elsewhere):
                        self.found.append(f"{event} {place}")
            if event == "open" and isinstance(args[0], (str, bytes)):
                _, mode, flags = args
                writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
                place = os.path.abspath(os.fsdecode(args[0]))
                if writes and not place.startswith((self.folder, "/dev/null", "/proc/")):
                    self.found.append(f"writes {place}")


def _of_files(events: bytes) -> bool:
    """Whether inotify tells of a file; the folder alone is opened by any `find` on this machine."""
    folder, at, found = 0x40000000, 0, False
    while at < len(events):
        _, mask, _, length = struct.unpack_from("iIII", events, at)
        at += 16 + length
        found |= not mask & folder
    return found


def _inotify(folder: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.inotify_init1(os.O_NONBLOCK))
    opened, modified, created, deleted = 0x20, 0x2, 0x100, 0x200
    if descriptor >= 0:
        libc.inotify_add_watch(descriptor, folder.encode(), opened | modified | created | deleted)
    return descriptor


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated input for everything that reads.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--case", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [asked.only] if asked.only else list(KINDS)
    with tempfile.TemporaryDirectory(prefix="sparselth-fuzz-") as temp:
        if asked.case is not None:
            base()
            folder = Path(temp, "case")
            folder.mkdir()
            os.chdir(folder)
            KINDS[kinds[0]](Random(f"{asked.seed}/{kinds[0]}/{asked.case}"), folder)
            return 0
        share, began, total, lost = -(-asked.cases // len(kinds)), time.perf_counter(), 0, 0
        print(f"{'kind':<20}{'cases':>8}{'refused':>9}{'read':>8}{'lost':>6}{'seconds':>9}")
        for kind in kinds:
            start = time.perf_counter()
            tried = campaign(kind, range(share), asked.seed, Path(temp, kind))
            total, lost = total + tried.cases, lost + len(tried.lost)
            read = tried.cases - tried.refused - len(tried.lost)
            spent = time.perf_counter() - start
            print(f"{kind:<20}{tried.cases:>8}{tried.refused:>9}{read:>8}{len(tried.lost):>6}{spent:>9.0f}")
            for line in tried.lost[:20]:
                print(f"  {line}")
        print(f"{total:,} cases in {time.perf_counter() - began:.0f} s, {lost} lost; seed {asked.seed}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
