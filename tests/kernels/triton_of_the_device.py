"""The device's Triton, 3.6.0, beside the installed one: a folder to put in front of PYTHONPATH."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

DEVICE = "3.6.0"  # what torch 2.11 brings
BUILD = Path(__file__).resolve().parents[2] / "build"


def folder() -> Path:
    """Where it lies, fetched from PyPI (200 MB) at the first call; OSError says why it cannot be."""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    place, part = BUILD / f"triton-{DEVICE}-{tag}", BUILD / f"triton-{DEVICE}-{tag}.part"
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "triton.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the two halves of `make test`
        if not place.exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--upgrade"]
            command += ["--target", str(part), f"triton=={DEVICE}"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired:
                raise OSError(f"fetching triton {DEVICE} took more than 300 s") from None
            if done.returncode:
                why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                raise OSError(
                    f"triton {DEVICE} for {tag} cannot be fetched: {why[-1] if why else 'pip failed'}"
                )
            part.rename(place)
    return place


if __name__ == "__main__":
    print(folder())
