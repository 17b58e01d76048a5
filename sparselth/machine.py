"""What this machine is: versions, processor, GPU, commit. Asks without importing torch where it can."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from sparselth import __version__
from sparselth.errors import SparselthError, one_line

RESULTS = 1 << 28  # bytes of a file of results at most
PACKAGES = ("torch", "torchvision", "triton", "numpy", "safetensors", "matplotlib", "click", "rich")


def environment() -> dict[str, Any]:
    """What a run's environment.json holds."""
    return {
        "schema": "sparselth.environment/1",
        "sparselth": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "gpu": gpu_name(),
    }


class Neighbours:
    """Who else uses the cores of this process, from its making on."""

    def __init__(self) -> None:
        self.wall, self.own, self.all = time.monotonic(), time.process_time(), busy_seconds()

    def cores_taken(self) -> float:
        """How many cores other processes ask for, 0 where they do not matter or nothing can be known.

        What they used, by /proc/stat; and, where they left this process less than a core, what it lacked: of
        h others and this one, each gets cores / (h + 1).
        """
        wall, own = time.monotonic() - self.wall, time.process_time() - self.own
        now = busy_seconds()
        if self.all is None or now is None or wall <= 0 or own <= 0:
            return 0.0
        taken = max((now - self.all - own) / wall, cores() * wall / own - 1 if wall > 1.1 * own else 0.0)
        return taken if taken >= 0.2 else 0.0


def busy_seconds() -> float | None:
    """Processor time that the cores of this process have spent for anybody; None where it is not told."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    # user nice system idle iowait irq softirq steal: all but the fourth and the fifth are work
    times = [
        [int(field) for field in words[1:9]] for line in lines if (words := line.split()) and words[0] in ours
    ]
    if not times:
        return None
    return sum(sum(row[:3]) + sum(row[5:]) for row in times) / os.sysconf("SC_CLK_TCK")


def version(package: str) -> str | None:
    """Installed version of a package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name and the widest vectors it has."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    vectors = next(
        (label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None
    )
    return f"{name}, {vectors}" if vectors else name


def has_tiles() -> bool:
    """Whether this CPU multiplies bf16 in tiles (AMX), many times as many numbers a cycle as in fp32."""
    import torch  # the module itself is light

    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)  # since torch 2.5
    return bool(asked and asked())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or what `ulimit -v` allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return there if soft == resource.RLIM_INFINITY else min(there, soft)


def check_torch() -> None:
    """Raise SparselthError where a limit of the address space keeps torch out: loaded there it may crash."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or "torch" in sys.modules:
        return
    tried = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
        raise SparselthError(f"torch cannot be loaded ({said}): `ulimit -v` allows {limit / 1e9:.1f} GB")


def gpu_name() -> str | None:
    """Name and memory of the first CUDA device as the driver gives them, None without one."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return out.splitlines()[0].strip() if out.strip() else None


def ran_on_gpus(folder: Path | None = None) -> str:
    """In a line what has run on which GPU and what has not, from the results of `bench/gpu_check.py`.

    `folder` is bench/results of the checkout unless given; a wheel has none and says so. A file that cannot
    be read, or is of something else, counts as not there.
    """
    from sparselth.files import read_json  # numpy takes its time

    folder = folder or Path(__file__).resolve().parents[1] / "bench" / "results"
    if not folder.is_dir():
        return "not known here: bench/results of the checkout tells"
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            data = read_json(file, RESULTS)
            if not str(data.get("schema", "")).startswith("sparselth.gpu_check/"):
                continue
            ran = {str(check["op"]) for check in data["checks"] if "skipped" not in check}
            wrong = {str(check["op"]) for check in data["checks"] if not check["ok"]}
            lacks = [op for op in map(str, data["ops"]) if op not in ran]
            words = [f"{data['device']['name']}: {len(ran - wrong)} of {len(data['ops'])} ops right"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        words += [f"wrong: {', '.join(sorted(wrong))}"] if wrong else []
        words += [f"not run: {', '.join(lacks)}"] if lacks else []
        found.append(one_line("; ".join(words)))
    return ". ".join(found) or "no Triton kernel and no CUDA graph of this version has run on a GPU yet"


def commit() -> str | None:
    """The git commit of the checkout this package runs from, "+" behind it when files are changed."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # a wheel inside somebody else's checkout
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def choose_device(wanted: str) -> tuple[str, str]:
    """("cpu" or "cuda", why) for --device auto, cpu or cuda."""
    if wanted == "cpu":
        return "cpu", "asked for"
    # The driver is asked without opening the device, so that workers can still be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if torch.cuda.is_available():
        return "cuda", "asked for" if wanted == "cuda" else "a CUDA device was found"
    if wanted == "cuda":
        raise SparselthError(
            "`device` cuda: torch finds no CUDA device; `sparselth doctor` tells why, `device` cpu works"
        )
    return "cpu", "torch finds no CUDA device"
