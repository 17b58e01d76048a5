"""Compiled kernels to carry to a device, which then starts without compiling: `make gpu-bundle`.

    python -m gpu.bundle [--seconds N] [--out FILE]     with the device's Python, torch and Triton

What a visit (bench/gpu_check.py) launches is launched dry (tests/kernels/dry.py) and compiled, in the order
of the stages of the visit, so that what a limit cuts off is worth least. With each kernel goes the
C module that launches it, which Triton would compile on the device.

Triton finds a kernel by what it is made from: source and line, types and what is known of numbers, options,
target, and Triton itself, to the byte. So the archive fits this commit, Triton 3.6.0 of PyPI and CPython
3.12; elsewhere kernels are compiled as if there were none. In an archive paths are relative; `unpack` makes
them absolute, as Triton wants them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
SMALLEST_CUT = 0.9  # of the kernels that are packed again where an archive is too large
MOST_BYTES = 40 * 2**20
STAGES = ("smoke", "targets", "checks", "benchmarks", "large")
CASE_SECONDS = 90  # of a case, on a CPU
MEMORY = 14 * 2**30  # bytes of addresses a process may have: larger cases end where they ask for more


# Archives


def pack(cache: Path, keys: list[str], archive: Path) -> int:
    """The entries `keys` of Triton's cache, machine code without what came before it; how many bytes."""
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:xz", preset=9) as tar:
        for key in keys:
            for file in sorted((cache / key).iterdir()):
                content = file.read_bytes()
                if file.name.startswith("__grp__"):
                    kept = [n for n in json.loads(content)["child_paths"] if n.endswith((".json", ".cubin"))]
                    content = json.dumps({"child_paths": {name: name for name in kept}}).encode()
                elif file.suffix not in (".json", ".cubin", ".so"):
                    continue
                member = tarfile.TarInfo(f"{key}/{file.name}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    part.replace(archive)
    return archive.stat().st_size


def unpack(archive: Path, cache: Path) -> None:
    """Into Triton's cache, which names the files of a kernel by their full paths."""
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None or Path(member.name).is_absolute() or ".." in Path(member.name).parts:
                continue
            content, place = file.read(), cache / member.name
            if place.name.startswith("__grp__"):
                paths = {name: str(place.parent / name) for name in json.loads(content)["child_paths"]}
                content = json.dumps({"child_paths": paths}).encode()
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_suffix(f".{os.getpid()}")
            part.write_bytes(content)
            part.replace(place)


# A stage of an op, dry


@contextmanager
def _as_on_a_device() -> Iterator[Any]:
    """Dry launches by what a device would launch; nothing is compared, no large product is computed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    import dry
    import oracle
    from sparselth.engine import paths as dispatch
    from sparselth.kernels import masked_conv2d

    aten = torch.ops.aten
    heavy = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward}
    in_place = {aten._fused_adam_, aten._fused_adamw_, aten._fused_sgd_}
    heavy |= {aten.kthvalue, aten.topk} | in_place
    empty = torch.empty_strided

    class Light(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            sizes = [t.numel() for t in args if isinstance(t, torch.Tensor)]
            if func.overloadpacket not in heavy or max(sizes, default=2**20) < 2**20:
                return func(*args, **kwargs)
            if "out" in kwargs or func.overloadpacket in in_place:
                return kwargs.get("out")

            def like(device: str, t: Any) -> Any:
                return empty(t.shape, t.stride(), dtype=t.dtype, device=device) if torch.is_tensor(t) else t

            found = func(*tree_map(lambda t: like("meta", t), args), **kwargs)
            return tree_map(lambda t: like("cpu", t), found)

    def measured(device: Any, runs: dict[str, Any], *_: Any) -> Any:
        for run in runs.values():
            run()
        return masked_conv2d.Choice("triton", dict.fromkeys(runs, 0.0))

    choose = dispatch.choose
    nothing = {"compare": dict, "must_repeat": None, "must_be_zero": None, "need_memory": None}
    nothing["same_bits"] = lambda: True  # what comes behind a comparison is launched too
    with ExitStack() as stack:
        for name, answer in nothing.items():
            stack.enter_context(mock.patch.object(oracle, name, lambda *_, a=answer, **__: a and a()))
        stack.enter_context(mock.patch.object(oracle, "pick", lambda interpreter, device: device))
        stack.enter_context(mock.patch.object(torch, "equal", return_value=True))
        stack.enter_context(mock.patch.object(torch.testing, "assert_close"))
        stack.enter_context(mock.patch.object(masked_conv2d, "_measure", measured))
        stack.enter_context(mock.patch.object(dispatch, "choose", lambda kernels, _: choose(kernels, "cuda")))
        found = stack.enter_context(dry.launches())
        stack.enter_context(Light())
        yield found


def _alarm(*_: Any) -> None:
    raise TimeoutError(f"takes more than {CASE_SECONDS} s on a CPU")


def launched(stage: str, op: str, until: float) -> tuple[list[Any], list[str]]:
    """The kernels of a stage of an op; what went wrong, which a device may do right."""
    import torch

    import gpu_check

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.config.disable = True
    signal.signal(signal.SIGALRM, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    failed: list[str] = []
    with _as_on_a_device() as found:
        if stage == "checks":
            import pytest

            files = [str(ROOT / "tests" / file) for file in gpu_check.OPS[op].tests]
            words = ["-q", "-p", "no:cacheprovider", "-m", "not host and not science", "--assert=plain"]
            words += ["--rootdir", str(ROOT), "-W", "ignore", "--no-header", "--tb=no", "-o", "addopts="]
            pytest.main([*words, "--import-mode=importlib", *files], plugins=[_Timer(failed, until)])
        else:
            _run(stage, op, failed, until)
    return list(found.kernels.values()), failed


def _run(stage: str, op: str, failed: list[str], until: float) -> None:
    import importlib

    import dry
    from gpu.common import Here
    from gpu.worker import planned

    module = importlib.import_module(f"gpu.{op}")
    if hasattr(module, "must_be_near"):
        module.must_be_near = lambda *_: 0.0
    runs = [(case.name, case.run) for case in planned(module, stage, Here("cpu", "full"))]
    if stage == "targets" and op in dry.OPS:  # what a case of zeros does not come to
        runs.append(("dry.py", dry.OPS[op]))
    for name, run in runs:
        if time.monotonic() > until:
            break
        signal.alarm(CASE_SECONDS)
        try:
            run()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        finally:
            signal.alarm(0)


class _Timer:
    """A plugin of pytest: ends tests that take too long, and all of them when the time is over."""

    def __init__(self, failed: list[str], until: float) -> None:
        self.failed, self.until = failed, until

    def pytest_runtest_setup(self, item: Any) -> None:
        if time.monotonic() > self.until:
            item.session.shouldstop = "the time is over"
        signal.alarm(CASE_SECONDS)

    def pytest_runtest_logreport(self, report: Any) -> None:
        signal.alarm(0)
        if report.failed:
            self.failed.append(f"{report.nodeid.split('::')[-1]}: {report.longreprtext.splitlines()[-1:]}")


def job(stage: str, op: str, until: float, used: Path) -> None:
    """Compile what a stage of an op launches; write the keys of the cache that hold it."""
    import gc

    import dry

    began = time.monotonic()
    kernels, failed = launched(stage, op, until)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    gc.collect()
    seen, done, wrong = time.monotonic(), 0, []
    with used.open("a") as file:
        for one in dry.compiled(kernels, launchers=True):
            done += 1
            wrong += [one.wrong] if one.wrong else []
            for key in one.keys:
                print(key, file=file, flush=True)
            if time.monotonic() > until:
                break
    cut = f", {len(kernels) - done} left out" if done < len(kernels) else ""
    print(
        f"{stage:<10} {op:<20} {done:>4} kernels{cut}; {len(failed)} cases ended early; "
        f"{seen - began:.0f} s + {time.monotonic() - seen:.0f} s to compile",
        *failed[:3] if "-v" in sys.argv else [],
        *wrong,
        sep="\n    ",
        flush=True,
    )
    os._exit(0)  # what is still being compiled goes with it


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600, help="default 3600")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle.tar.xz")
    parser.add_argument("--stage", action="append", choices=STAGES, help="this stage alone; repeatable")
    parser.add_argument("--only", action="append", help="this op alone; repeatable")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("-v", action="store_true", help="why cases ended early")
    args = parser.parse_args()
    if args.job:
        stage, op, until, used = json.loads(args.job)
        job(stage, op, until, Path(used))
        return 0
    import triton

    import gpu_check

    if (triton.__version__, sys.version_info[:2]) != ("3.6.0", (3, 12)):
        print(f"gpu-bundle: made for Triton 3.6.0 and Python 3.12, this is {triton.__version__} and "
              f"{sys.version_info[0]}.{sys.version_info[1]}", file=sys.stderr)  # fmt: skip
        return 1
    began, cache = time.monotonic(), ROOT / "build" / "gpu-bundle-cache"
    with tempfile.TemporaryDirectory() as name:
        used = Path(name) / "used"
        used.touch()
        environment = _environment(cache)
        for stage in args.stage or STAGES:
            for op in args.only or gpu_check.OPS:
                until = began + args.seconds
                if time.monotonic() > until - 5:
                    print(f"{stage:<10} {op:<20} left out: {args.seconds:.0f} s are over")
                    continue
                call = json.dumps([stage, op, until, str(used)])
                command = [sys.executable, "-O", "-m", "gpu.bundle", "--job", call]
                command += ["-v"] if args.v else []
                out = None if args.v else subprocess.DEVNULL
                done = subprocess.run(command, env=environment, stderr=out, check=False)
                if done.returncode:
                    print(f"{stage:<10} {op:<20} ended with {done.returncode}", flush=True)
        keys = list(dict.fromkeys(used.read_text().split()))
        if not keys:
            return 1
        args.out.parent.mkdir(exist_ok=True)
        size, least = pack(cache, keys, args.out), len(keys)
        while size > MOST_BYTES:
            least = int(least * min(SMALLEST_CUT, MOST_BYTES / size))
            size = pack(cache, keys[:least], args.out)
        kernels = sum(any(cache.joinpath(key).glob("*.cubin")) for key in keys[:least])
        print(
            f"{args.out}: {kernels} kernels and {least - kernels} launchers, {size / 2**20:.1f} MiB"
            f"{f', {len(keys) - least} left out for size' if least < len(keys) else ''}, "
            f"{time.monotonic() - began:.0f} s"
        )
        return _check(args.out, keys[:least], Path(name) / "elsewhere")


def _check(archive: Path, keys: list[str], cache: Path) -> int:
    """A fresh process that launches and compiles as on a device must find all in the unpacked cache."""
    import gpu_check

    unpack(archive, cache)
    used = cache / "used"
    call = json.dumps(["smoke", next(iter(gpu_check.OPS)), time.monotonic() + 600, str(used)])
    command = [sys.executable, "-O", "-m", "gpu.bundle", "--job", call]
    before = set(cache.iterdir())
    subprocess.run(command, env=_environment(cache), stdout=subprocess.DEVNULL, check=True)
    missed = {entry.name for entry in set(cache.iterdir()) - before} - {"used"}
    found = set(used.read_text().split()) - missed
    print(f"from another folder, in a fresh process: {len(found)} found, {len(missed)} compiled anew")
    return int(bool(missed) or not found)


def _environment(cache: Path) -> dict[str, str]:
    import gpu_check

    # fmt: off
    return os.environ | gpu_check.environment(cache, False) | {
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
    }
    # fmt: on


if __name__ == "__main__":
    sys.exit(main())
