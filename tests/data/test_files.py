"""Data sets: what is read is exact, and whatever is wrong with a file is said in one line."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sparselth import data
from sparselth.cli.options import as_flags
from sparselth.data import DATASETS, MissingData, data_dir, fetch, load, resolve
from sparselth.data.sets import CifarFile, IdxFile
from sparselth.errors import SparselthError, UsageError

RAW, PICKLES = Path("MNIST", "raw"), Path("cifar-10-batches-py")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{array.ndim + 1}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for part, n in (("train", 20), ("t10k", 10)):
        found[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
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
    spec = replace(DATASETS["mnist"], n_train=20, n_test=10, files=specs)
    monkeypatch.setitem(DATASETS.things, "mnist", spec)
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
    """Let `download` stand in for the classes of torchvision.datasets; it gets the root folder."""

    def dataset(root: str, **flags: bool) -> None:
        assert flags == {"download": True}
        print("Downloading")
        assert socket.getdefaulttimeout() == data.files.TIMEOUT
        download(Path(root))

    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    datasets.MNIST = datasets.CIFAR10 = dataset  # type: ignore[attr-defined]
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
    np.testing.assert_array_equal(got.train_images, arrays[IMAGES].reshape(20, 784))
    np.testing.assert_array_equal(got.train_labels, arrays[LABELS])
    np.testing.assert_array_equal(got.test_images, arrays["t10k-images-idx3-ubyte"].reshape(10, 784))
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
    failure(lambda: load("mnist", folder), path, "no such file", "`data_dir`", kind=MissingData)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-5], "expected 15,696 bytes uncompressed, found 15,691"),
        (lambda b: b"", "expected 15,696 bytes uncompressed, found 0"),
        (lambda b: b + b"\0", "expected 15,696 bytes uncompressed, found more"),
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


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, np.ndarray, bytes]]:
    """Images, labels and file of each part of a tiny set that stands in for CIFAR-10."""
    rng = np.random.default_rng(0)
    head = b"\x80\x02cos\nabort\n)R]("  # unpickling this would end the process
    found, specs = {}, []
    for name, n in (("data_batch_1", 1003), ("data_batch_2", 7), ("test_batch", 5)):
        images = rng.integers(0, 256, (n, 12), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        opcodes = [b"".join(b"K" + bytes([y]) for y in labels[i : i + 1000]) for i in range(0, n, 1000)]
        before = head + b"e(".join(opcodes) + b"eU\x04dataT"
        content = before + images.tobytes() + b"u."
        offsets, digest = (len(head), len(before)), hashlib.sha256(content).hexdigest()
        specs.append(CifarFile(name, images.shape, len(content), offsets, digest))
        found[name] = images, labels, content
    monkeypatch.setitem(DATASETS.things, "cifar10", replace(DATASETS["cifar10"], files=tuple(specs)))
    monkeypatch.delenv("SPARSELTH_DATA", raising=False)
    return found


@pytest.fixture
def cifar_folder(cifar: dict[str, tuple[np.ndarray, np.ndarray, bytes]], tmp_path: Path) -> Path:
    (tmp_path / PICKLES).mkdir()
    for name, (_, _, content) in cifar.items():
        (tmp_path / PICKLES / name).write_bytes(content)
    return tmp_path


def test_pickles_are_cut_not_unpickled(
    cifar: dict[str, tuple[np.ndarray, np.ndarray, bytes]], cifar_folder: Path
) -> None:
    got = load("cifar10", cifar_folder)
    (images, labels, _), (more_images, more_labels, _), (test_images, test_labels, _) = cifar.values()
    np.testing.assert_array_equal(got.train_images, np.concatenate([images, more_images]))
    np.testing.assert_array_equal(got.train_labels, np.concatenate([labels, more_labels]))
    np.testing.assert_array_equal(got.test_images, test_images)
    np.testing.assert_array_equal(got.test_labels, test_labels)
    for array, kind in (
        (got.train_images, np.uint8),
        (got.train_labels, np.int64),
        (got.test_images, np.uint8),
        (got.test_labels, np.int64),
    ):
        assert array.dtype == kind
        assert array.flags.writeable
    assert got.source == str(cifar_folder / PICKLES)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-1], "bytes uncompressed, found "),
        (lambda b: b + b"\0", "bytes uncompressed, found more"),
        (lambda b: b"\x80\x04" + b[2:], "expected the magic number 0x8002, found 0x8004"),
        (lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], "expected sha256"),
    ],
    ids=["truncated", "trailing byte", "protocol", "flipped bit"],
)
def test_damaged_pickle(cifar_folder: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    path = cifar_folder / PICKLES / "data_batch_2"
    path.write_bytes(damage(path.read_bytes()))
    failure(lambda: load("cifar10", cifar_folder), f"{path}: expected", said, "delete it")


def test_missing_pickle(cifar_folder: Path) -> None:
    path = cifar_folder / PICKLES / "test_batch"
    path.unlink()
    message = failure(lambda: load("cifar10", cifar_folder), path, "no such file", kind=MissingData)
    assert "mnist5k" not in message  # its images have another shape


def test_unknown_name(tmp_path: Path) -> None:
    failure(lambda: load("mnist5", tmp_path), "did you mean 'mnist5k'?", kind=UsageError)
    failure(lambda: resolve("svhn", tmp_path, print), "unknown dataset 'svhn'", kind=UsageError)


# Where and how a set is found


def test_data_dir_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("flag", "here", "home/env"):
        (tmp_path / name).mkdir(parents=True)
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


def test_of_those_who_want_the_same_one_downloads(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ranks of a host do."""
    times: list[int] = []

    def download(root: Path) -> None:
        times.append(1)
        other.start()
        other.join(0.2)  # which waits
        (root / RAW).mkdir(parents=True)
        for name, content in tiny.items():
            (root / RAW / name).write_bytes(content)

    fake_torchvision(monkeypatch, download)
    other = threading.Thread(target=lambda: fetch("mnist", cache))
    fetch("mnist", cache)
    other.join()
    assert len(times) == 1


def test_failed_download_leaves_nothing(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torchvision(monkeypatch, unreachable)
    before = socket.getdefaulttimeout()
    parts = (cache / RAW, "timed out", *tiny, "`dataset` mnist5k")
    message = failure(lambda: fetch("mnist", cache), *parts)
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
    failure(lambda: fetch("mnist", cache), cache / RAW, said, "`data_dir`")


def test_fall_back_is_loud_and_only_without_a_name(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torchvision(monkeypatch, unreachable)
    notes: list[str] = []
    failure(lambda: resolve("mnist", None, notes.append), cache / RAW, "timed out")
    assert not notes
    assert resolve(None, None, notes.append).spec.name == "mnist5k"
    (said,) = notes
    first, second = said.splitlines()
    assert "NOT using MNIST" in first
    assert "timed out" in first
    assert "mnist5k, 4,000 + 1,000" in second


@pytest.mark.parametrize("fault", ["x" * 500, "one\ntwo " * 40])
def test_the_note_of_the_fall_back_is_two_lines_of_a_terminal(
    tiny: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def download(root: Path) -> None:
        raise OSError(fault)

    fake_torchvision(monkeypatch, download)
    notes: list[str] = []
    resolve(None, None, notes.append)
    lines = as_flags(notes[0]).splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_folder_that_was_named_is_used_or_an_error(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The set inside the package stands in only for those who named neither a set nor a folder."""
    there = tmp_path / "there"
    if by == "environment":
        monkeypatch.setenv("SPARSELTH_DATA", str(there))
    flag, name = (there, "`data_dir`") if by == "flag" else (None, "SPARSELTH_DATA")
    fake_torchvision(monkeypatch, no_download)
    failure(lambda: resolve(None, flag, pytest.fail), name, there, "no such folder")
    if flag:
        failure(lambda: resolve("mnist5k", flag, pytest.fail), name, there, "no such folder")
    else:
        assert resolve("mnist5k", flag, pytest.fail).spec.name == "mnist5k"  # which needs none
    fake_torchvision(monkeypatch, unreachable)
    there.mkdir()
    call = partial(resolve, None, flag, pytest.fail)
    failure(call, "cannot download MNIST", there, "timed out")


def test_without_a_home_the_set_inside_the_package_is_there(
    tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    notes: list[str] = []
    assert resolve(None, None, notes.append).spec.name == "mnist5k"
    assert "there is no home" in notes[0]


def test_cifar10_is_downloaded_and_nothing_stands_in_for_it(
    cifar: dict[str, tuple[np.ndarray, np.ndarray, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: Path) -> None:
        (root / PICKLES).mkdir()
        (root / "cifar-10-python.tar.gz").touch()
        for name, (_, _, content) in cifar.items():
            (root / PICKLES / name).write_bytes(content)

    fake_torchvision(monkeypatch, unreachable)
    for name in (None, "cifar10"):
        call = partial(resolve, name, None, pytest.fail, default="cifar10")
        failure(call, "cannot download CIFAR-10", cache / PICKLES, "timed out")
    fake_torchvision(monkeypatch, download)
    assert resolve(None, None, pytest.fail, default="cifar10").spec.name == "cifar10"
    assert [path.name for path in cache.iterdir()] == [str(PICKLES)]


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
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != there)
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


@pytest.fixture(scope="session")
def cifar10_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the real CIFAR-10; unpacked first where its files lie packed with xz, one by one."""
    if not os.environ.get("SPARSELTH_DATA"):
        pytest.skip("SPARSELTH_DATA does not name a folder with the real data sets")
    place = data_dir(None)
    if (place / PICKLES).exists():
        return place
    names = [file.name for file in DATASETS["cifar10"].files]
    for first in place.glob(f"*/{names[0]}.xz"):
        unpacked = tmp_path_factory.mktemp("data")
        (unpacked / PICKLES).mkdir()
        for name in names:
            with lzma.open(first.with_name(f"{name}.xz")) as packed:
                (unpacked / PICKLES / name).write_bytes(packed.read())
        return unpacked
    pytest.skip(f"{place} does not hold CIFAR-10")


def test_real_cifar10(cifar10_folder: Path) -> None:
    got = load("cifar10", cifar10_folder)
    assert got.train_images.shape == (50_000, 3072)
    assert got.test_images.shape == (10_000, 3072)
    assert np.bincount(got.train_labels).tolist() == [5000] * 10
    assert np.bincount(got.test_labels).tolist() == [1000] * 10
    values = np.arange(256) / 255
    planes = got.train_images.reshape(-1, 3, 1024)
    for channel in range(3):
        counts = np.bincount(planes[:, channel].reshape(-1), minlength=256) / (50_000 * 1024)
        mean = counts @ values
        assert mean == pytest.approx(got.spec.mean[channel], abs=5e-5)
        assert np.sqrt(counts @ (values - mean) ** 2) == pytest.approx(got.spec.std[channel], abs=5e-5)
    images = np.concatenate([got.train_images, got.test_images])
    labels = np.concatenate([got.train_labels, got.test_labels])
    for i, file in enumerate(
        got.spec.files
    ):  # as pickle reads them; load has found them to be the right ones
        theirs = pickle.loads((cifar10_folder / PICKLES / file.name).read_bytes(), encoding="latin1")
        np.testing.assert_array_equal(images[10_000 * i : 10_000 * (i + 1)], theirs["data"])
        assert labels[10_000 * i : 10_000 * (i + 1)].tolist() == theirs["labels"]


def test_import_is_light() -> None:
    code = "import sys, sparselth.data; print(sorted({'torch', 'torchvision'} & set(sys.modules)))"
    path = str(Path(data.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]"
