"""`sparselth doctor`: what this machine has, what will be used, and what is wrong."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import click

from sparselth.cli.options import as_flags, data_dir, output
from sparselth.errors import SparselthError


@click.command()
@data_dir
@output
def doctor(data_dir: Path | None, as_json: bool, quiet: bool, debug: bool) -> int:
    """Say what this machine has and what will be used; exit code 3 when a check fails."""
    from sparselth import machine

    facts = machine.environment()
    torch = _torch()  # where it fails, to import it again may crash
    checks = [torch, *((_torchvision(), _native(), _training()) if torch["ok"] else ())]
    checks += [*_data(data_dir), _writable(Path("runs"))]
    good = all(check["ok"] for check in checks)
    kernels = _kernels() if torch["ok"] else []
    if as_json:
        print(
            json.dumps(
                {
                    "schema": "sparselth.doctor/1",
                    "ok": good,
                    "environment": facts,
                    "checks": checks,
                    "kernels": kernels,
                    "ran_on_gpus": machine.ran_on_gpus(),
                },
                indent=2,
            )
        )
        return 0 if good else 3
    packages = ", ".join(f"{name} {v or 'missing'}" for name, v in facts["packages"].items())
    print(f"sparselth      {facts['sparselth']}, commit {(facts['commit'] or 'unknown')[:12]}")
    print(f"python         {facts['python']} on {facts['system']}")
    print(f"packages       {packages}")
    print(f"processor      {facts['cpu']}, {facts['cores']} cores for this process")
    print(f"gpu            {facts['gpu'] or 'none that nvidia-smi knows'}")
    print(f"ran on gpus    {machine.ran_on_gpus()}")
    for check in checks:
        print(f"{check['name']:<15}{'ok' if check['ok'] else 'FAILED'}: {check['detail']}")
    if kernels:
        print("\nWhat the ops of a training step take here (--kernels auto):")
    for row in kernels:
        print(f"  {row['op']:<21}{row['takes']:<8}{row['why']}")
    return 0 if good else 3


def _check(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": as_flags(" ".join(detail.split()))}


def _torch() -> dict[str, Any]:
    from sparselth import machine

    try:
        machine.check_torch()
        device, why = machine.choose_device("auto")
    except SparselthError as error:
        return _check("torch", False, str(error))
    except (ImportError, OSError, RuntimeError) as error:
        return _check(
            "torch", False, f"cannot be imported ({error}); reinstall torch and torchvision together"
        )
    return _check("torch", True, f"--device auto is {device}, because {why}")


def _kernels() -> list[dict[str, str]]:
    """The path of every op under --kernels auto; empty where torch does not work."""
    try:
        from sparselth import machine
        from sparselth.engine.paths import choose

        paths = choose("auto", machine.choose_device("auto")[0])
    except (ImportError, OSError, RuntimeError):
        return []
    return [{"op": op, "takes": path.takes, "why": path.why} for op, path in vars(paths).items()]


def _native() -> dict[str, Any]:
    """The C kernels are optional: without them sparse training works, slower."""
    try:
        from sparselth.kernels import _native as native
    except (ImportError, OSError, RuntimeError) as error:
        return _check("native", False, f"needs torch ({error})")
    if native.LIB is None:
        return _check("native", True, f"{native.WHY}; sparse products are torch's (MKL), which is slower")
    return _check("native", True, f"C kernels for sparse training, {native.WHY}")


def _torchvision() -> dict[str, Any]:
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        return _check(
            "torchvision",
            False,
            f"does not fit this torch ({error}); install torch and torchvision of one release from PyPI. "
            "Only downloads need it",
        )
    return _check("torchvision", True, "imports")


def _training() -> dict[str, Any]:
    """Fifty steps of a small network on the digits inside the package."""
    try:
        import torch

        from sparselth.config import Cell
        from sparselth.data import load
        from sparselth.data.batches import Resident
        from sparselth.engine.dense import init_weights
        from sparselth.engine.state import Job, State
        from sparselth.models import get_model
        from sparselth.streams import stream
        from sparselth.train import fit

        torch.set_num_threads(1)
        model, who = get_model("lenet-300-100"), Cell(0, "ticket", 0)
        recipe = model.recipes["short"].__class__(steps=50, lr=1.2e-3)
        data = Resident(load("mnist5k", Path()), "cpu", 500)
        state = State.start(init_weights(model, stream(0, "ticket", 0, "init"))[None], recipe)
        fit(model, data, [Job(who, state, model.params.full_mask())], recipe)
        accuracy = state.evaluations[-1]["validation_accuracy"]
    except (SparselthError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        return _check("training", False, f"{type(error).__name__}: {error}")
    detail = f"50 steps on mnist5k reach {100 * accuracy:.0f} % in {state.seconds:.2f} s on one thread"
    return _check("training", accuracy > 0.5, detail)


def _data(folder: Path | None) -> list[dict[str, Any]]:
    from sparselth import data

    found = []
    for name, spec in data.DATASETS.items():
        try:
            unseen = "; its images are counted when first used" * spec.pictures
            found.append(_check(name, True, data.where(name, folder) + unseen))
        except data.MissingData as error:
            found.append(_check(name, True, data.when(spec, folder, error)))
        except SparselthError as error:
            found.append(_check(name, False, str(error)))
    return found


def _writable(folder: Path) -> dict[str, Any]:
    place = folder if folder.exists() else Path()
    ok = os.access(place, os.W_OK)
    return _check("runs", ok, f"{place.resolve()} {'can' if ok else 'cannot'} be written to")
