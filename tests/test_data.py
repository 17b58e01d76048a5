"""Data sets: what is read is exact, and whatever is wrong with a file is said in one line."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparselth import data
from sparselth.data import DATASETS, IdxFile, MissingData, data_dir, fetch, load, resolve
from sparselth.errors import SparselthError, UsageError

RAW = Path("MNIST", "raw")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{array.ndim + 1}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for part, n in (("train", 20), ("t10k", 10)):
        found[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)
        found[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    return found


@pytest.fixture
def tiny(arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of a tiny set that stands in for MNIST; every test starts without SPARSELTH_DATA."""
    files = {name: idx(array) for name, array in arrays.items()}
    specs = tuple(
        IdxFile(name, arrays[name].shape, hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    )
    spec = replace(DATASETS["mnist"], shape=(1, 4, 4), n_train=20, n_test=10, files=specs)
    monkeypatch.setitem(DATASETS, "mnist", spec)
    monkeypatch.delenv("SPARSELTH_DATA", raising=False)
    return files


@pytest.fixture
def folder(tiny: dict[str, bytes], tmp_path: Path) -> Path:
    """A data folder that holds the tiny set."""
    (tmp_path / RAW).mkdir(parents=True)
    for name, content in tiny.items():
        (tmp_path / RAW / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of a user who named none; it does not exist yet."""
    monkeypatch.delenv("SPARSELTH_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparselth" / "data"


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, download: Callable[[Path], None]) -> None:
    """Let `download` stand in for torchvision.datasets.MNIST; it gets the root folder."""

    def mnist(root: str, **flags: bool) -> None:
        assert flags == {"download": True}
        print("Downloading")
        assert socket.getdefaulttimeout() == data.TIMEOUT
        download(Path(root))

    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    datasets.MNIST = mnist  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def unreachable(root: Path) -> None:
    (root / RAW).mkdir(parents=True)
    (root / RAW / f"{IMAGES}.gz").write_bytes(b"half a downl")
    raise RuntimeError("Error downloading:\nTried https://mirror, got:\n<urlopen error timed out>\n")


def no_download(root: Path) -> None:
    pytest.fail("nothing may be downloaded here")


def failure(call: Callable[[], object], *parts: object, kind: type[SparselthError] = SparselthError) -> str:
    """The message of the error that `call` raises: one line, exactly of that kind, with these parts."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert caught.type is kind
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


# Reading


@pytest.mark.parametrize("form", ["raw", "gz", "both"])
def test_load(folder: Path, tiny: dict[str, bytes], arrays: dict[str, np.ndarray], form: str) -> None:
    for name, content in tiny.items():
        if form != "raw":
            (folder / RAW / f"{name}.gz").write_bytes(gzip.compress(content))
        if form == "gz":
            (folder / RAW / name).unlink()
    got = load("mnist", folder)
    np.testing.assert_array_equal(got.train_images, arrays[IMAGES].reshape(20, 16))
    np.testing.assert_array_equal(got.train_labels, arrays[LABELS])
    np.testing.assert_array_equal(got.test_images, arrays["t10k-images-idx3-ubyte"].reshape(10, 16))
    np.testing.assert_array_equal(got.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert got.train_images.dtype == np.uint8
    assert got.train_labels.dtype == np.int64
    assert got.train_images.flags.writeable  # torch.from_numpy warns otherwise
    assert got.source == str(folder / RAW)
    assert got.digest == DATASETS["mnist"].digest
    assert len(bytes.fromhex(got.digest)) == 8


def test_missing(folder: Path) -> None:
    path = folder / RAW / "t10k-labels-idx1-ubyte"
    path.unlink()
    failure(lambda: load("mnist", folder), path, "no such file", "--data-dir", kind=MissingData)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-5], "expected 336 bytes uncompressed, found 331"),
        (lambda b: b"", "expected 336 bytes uncompressed, found 0"),
        (lambda b: b + b"\0", "expected 336 bytes uncompressed, found more"),
        (lambda b: b"\0\0\x0d\3" + b[4:], "expected the magic number 0x00000803, found 0x00000d03"),
        (lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], "expected sha256"),
    ],
    ids=["truncated", "empty", "trailing byte", "magic", "flipped bit"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
def test_damaged(
    folder: Path, tiny: dict[str, bytes], damage: Callable[[bytes], bytes], said: str, packed: bool
) -> None:
    path, content = folder / RAW / IMAGES, damage(tiny[IMAGES])
    path.write_bytes(content)
    if packed:
        path.unlink()
        path = path.with_name(f"{IMAGES}.gz")
        path.write_bytes(gzip.compress(content))
    failure(lambda: load("mnist", folder), f"{path}: {said}", "delete it")


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-9], lambda b: b[:20] + b"\xff" * 20 + b[40:], lambda b: b"<html>", lambda b: b + b"tail"],
    ids=["truncated", "scrambled", "not gzip", "tail"],
)
def test_broken_gzip(folder: Path, tiny: dict[str, bytes], damage: Callable[[bytes], bytes]) -> None:
    (folder / RAW / IMAGES).unlink()
    path = folder / RAW / f"{IMAGES}.gz"
    path.write_bytes(damage(gzip.compress(tiny[IMAGES])))
    failure(lambda: load("mnist", folder), f"{path}: broken gzip file")


def test_folder_in_place_of_a_file(folder: Path) -> None:
    path = folder / RAW / LABELS
    path.unlink()
    path.mkdir()
    failure(lambda: load("mnist", folder), f"{path}: expected a file, found a folder")


def test_file_in_place_of_the_folder(tiny: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "MNIST").touch()
    failure(lambda: load("mnist", tmp_path), tmp_path / RAW / IMAGES, "Not a directory")


def test_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # not chmod, which does not bind root
    failure(lambda: load("mnist", folder), f"{folder / RAW / IMAGES}: Permission denied")


def test_unknown_name(tmp_path: Path) -> None:
    failure(lambda: load("mnist5", tmp_path), "did you mean 'mnist5k'?", kind=UsageError)
    failure(lambda: resolve("svhn", tmp_path, print), "unknown dataset 'svhn'", kind=UsageError)


# Where and how a set is found


def test_data_dir_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SPARSELTH_DATA", "~/env")
    assert data_dir(tmp_path / "flag") == tmp_path / "flag"
    assert data_dir(None) == tmp_path / "home" / "env"
    monkeypatch.delenv("SPARSELTH_DATA")
    assert data_dir(None) == tmp_path / "xdg" / "sparselth" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_dir(None) == tmp_path / "home" / ".cache" / "sparselth" / "data"
    assert data_dir(Path("here")).is_absolute()


def test_fetch_puts_the_files_in_place(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(root: Path) -> None:
        (root / RAW).mkdir(parents=True)
        for name, content in tiny.items():
            (root / RAW / name).write_bytes(content)

    fake_torchvision(monkeypatch, download)
    notes: list[str] = []
    before = socket.getdefaulttimeout()
    assert resolve(None, None, notes.append).spec.name == "mnist"
    assert not notes
    assert socket.getdefaulttimeout() == before
    assert {path.relative_to(cache / RAW) for path in cache.rglob("*idx*")} == set(map(Path, tiny))
    assert [path.name for path in cache.iterdir()] == ["MNIST"]
    assert capsys.readouterr().out == ""

    # What the user put there stays as it is, even when the set is downloaded again.
    (cache / RAW / LABELS).unlink()
    (cache / RAW / IMAGES).write_bytes(b"mine")
    fetch("mnist", cache)
    assert (cache / RAW / IMAGES).read_bytes() == b"mine"
    assert (cache / RAW / LABELS).read_bytes() == tiny[LABELS]


def test_failed_download_leaves_nothing(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torchvision(monkeypatch, unreachable)
    before = socket.getdefaulttimeout()
    message = failure(lambda: fetch("mnist", cache), cache / RAW, "timed out", *tiny, "--dataset mnist5k")
    assert "Traceback" not in message
    assert not cache.exists()
    assert not cache.parent.exists()
    assert socket.getdefaulttimeout() == before


def test_interrupted_download_leaves_nothing(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(root: Path) -> None:
        (root / "half").touch()
        raise KeyboardInterrupt

    fake_torchvision(monkeypatch, interrupt)
    cache.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        fetch("mnist", cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("fault", ["RuntimeError('operator torchvision::nms does not exist')", "OSError()"])
def test_torchvision_that_does_not_import(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {fault}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    said = "torchvision does not work with the torch that is installed"
    failure(lambda: fetch("mnist", cache), cache / RAW, said, "--data-dir")


def test_fall_back_is_loud_and_only_without_a_name(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torchvision(monkeypatch, unreachable)
    notes: list[str] = []
    failure(lambda: resolve("mnist", None, notes.append), cache / RAW, "timed out")
    assert not notes
    assert resolve(None, None, notes.append).spec.name == "mnist5k"
    (said,) = notes
    assert "\n" not in said
    for part in ("NOT using MNIST", "mnist5k", "4,000", str(cache), "timed out"):
        assert part in said


@pytest.mark.parametrize("name", [None, "mnist"])
def test_damaged_files_are_never_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    fake_torchvision(monkeypatch, no_download)
    (folder / RAW / IMAGES).write_bytes(b"x")
    failure(lambda: resolve(name, folder, pytest.fail), folder / RAW / IMAGES, "found 1")


@pytest.mark.parametrize("name", [None, "mnist"])
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_read_only_folder(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, by: str
) -> None:
    fake_torchvision(monkeypatch, no_download)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    there = tmp_path / "not" / "there"
    if by == "environment":
        monkeypatch.setenv("SPARSELTH_DATA", str(there))
    failure(lambda: resolve(name, there if by == "flag" else None, pytest.fail), there / RAW, "read-only")


# What is shipped, and the real files


def test_mnist5k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchvision(monkeypatch, no_download)
    got = resolve("mnist5k", tmp_path, pytest.fail)
    assert got.train_images.shape == (4000, 28 * 28)
    assert got.test_images.shape == (1000, 28 * 28)
    assert np.bincount(got.train_labels).tolist() == [400] * 10
    assert np.bincount(got.test_labels).tolist() == [100] * 10
    assert round(float((got.train_images / 255).mean()), 4) == got.spec.mean[0]
    assert round(float((got.train_images / 255).std()), 4) == got.spec.std[0]
    assert got.source == "inside the package"
    assert not list(tmp_path.iterdir())
    fetch("mnist5k", tmp_path)
    assert not list(tmp_path.iterdir())


def test_mnist5k_is_reproducible_and_names_its_licence() -> None:
    folder = data.ASSETS / "mnist5k"
    assert "CC BY-SA 3.0" in (folder / "LICENSE.txt").read_text()
    for packed in folder.glob("*.gz"):
        assert packed.read_bytes()[3:8] == bytes(5)  # neither file name nor time in the gzip header


def real(name: str) -> data.Images:
    """The real data set; skips the test where it is not at hand."""
    if not os.environ.get("SPARSELTH_DATA"):
        pytest.skip("SPARSELTH_DATA does not name a folder with the real data sets")
    try:
        return load(name, data_dir(None))
    except MissingData as error:
        pytest.skip(str(error))


def test_mnist5k_is_the_first_500_of_each_digit() -> None:
    mnist, small = real("mnist"), load("mnist5k", Path())
    for digit in range(10):
        ours = (
            small.train_images[small.train_labels == digit],
            small.test_images[small.test_labels == digit],
        )
        theirs = mnist.train_images[mnist.train_labels == digit][:500]
        np.testing.assert_array_equal(np.concatenate(ours), theirs)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_files(name: str) -> None:
    got = real(name)
    assert got.train_images.shape == (60_000, 784)
    assert got.test_images.shape == (10_000, 784)
    counts = np.bincount(got.train_images.reshape(-1), minlength=256) / got.train_images.size
    values = np.arange(256) / 255
    mean = counts @ values
    assert mean == pytest.approx(got.spec.mean[0], abs=5e-5)
    assert np.sqrt(counts @ (values - mean) ** 2) == pytest.approx(got.spec.std[0], abs=5e-5)


def test_import_is_light() -> None:
    code = "import sys, sparselth.data; print(sorted({'torch', 'torchvision'} & set(sys.modules)))"
    path = str(Path(data.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]"
