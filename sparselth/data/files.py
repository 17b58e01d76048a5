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
import re
import socket
import stat
import tempfile
import textwrap
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselth import lock, user_files
from sparselth.data import folders, own
from sparselth.data.sets import (
    DATASETS,
    DEFAULT,
    FALLBACK,
    CifarFile,
    DatasetSpec,
    IdxFile,
    Images,
    MissingData,
    Pixels,
    Read,
    get_dataset,
)
from sparselth.errors import SparselthError
from sparselth.files import cache_folder

ASSETS = Path(__file__).parents[1] / "assets"
NOWHERE = Path(os.devnull, "data")  # the data folder of a user without a home
TIMEOUT = 10.0  # seconds without a byte until a download is given up


def data_dir(flag: Path | None) -> Path:
    """The folder of all data sets: --data-dir, else SPARSELTH_DATA, else the user's cache folder.

    One that the user named and that is not there raises SparselthError.
    """
    chosen = flag or os.environ.get("SPARSELTH_DATA")
    try:
        folder = (Path(chosen).expanduser() if chosen else cache_folder() / "data").absolute()
    except RuntimeError:  # no home, as in some containers
        raise MissingData(
            f"{chosen or '~/.cache'}: there is no home folder; pass `data_dir` FOLDER"
        ) from None
    if chosen and not folder.is_dir():
        name = "`data_dir`" if flag else "SPARSELTH_DATA"
        raise SparselthError(
            f"{name} {chosen}: there is no such folder; into one that is there, what it lacks is downloaded"
        )
    return folder


def look(name: str, flag: Path | None) -> Images:
    """A data set where it lies, the package or `data_dir(flag)`; MissingData where it is not there."""
    spec = get_dataset(name)
    return load(name, ASSETS if spec.inside else data_dir(flag))


def where(name: str, flag: Path | None) -> str:
    """Where `look` finds a data set, with all that it checks; but images in files are not listed."""
    spec = get_dataset(name)
    return str(folders.place(spec, data_dir(flag))) if spec.pictures else look(name, flag).source


def load(name: str, folder: Path) -> Images:
    """Read a data set from `folder`, or from the package if it lies there.

    A file that is not there raises MissingData; one that is not exactly the file it should be raises
    SparselthError.
    """
    if user_files.is_file(name):
        return own.images(name)
    spec = get_dataset(name)
    if spec.pictures:
        return folders.images(spec, folder)
    if spec.read is not None:
        return _user_images(spec, spec.read, folder)
    if spec.torchvision is None:
        root, source, missing = ASSETS / spec.folder, "inside the package", "reinstall sparselth"
        damaged = missing
    else:
        root = folder.absolute() / spec.folder
        source, missing = str(root), _how_to_get(spec, folder)
        damaged = (
            "delete it to have it downloaded again, or pass `data_dir` with a folder that has a good one"
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
        assert spec.classes is not None
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


def when(spec: DatasetSpec, flag: Path | None, missing: MissingData) -> str:
    """When a data set will be there that is missing: once it is downloaded, or as the error says."""
    with contextlib.suppress(MissingData):
        if spec.read is None and not spec.pictures:
            return f"not in {data_dir(flag)}; downloaded when first used"
    return str(missing)


def _user_images(spec: DatasetSpec, read: Read, folder: Path) -> Images:
    """What a function reads, held against what the data set says of itself."""
    try:
        arrays = [np.asarray(array) for array in read(folder)]
    except SparselthError:
        raise
    except Exception as error:
        raise SparselthError(f"dataset {spec.name}: {type(error).__name__}: {error}") from error
    if len(arrays) != 4:
        raise SparselthError(f"dataset {spec.name}: expected images, labels, images, labels")
    train, train_labels, test, test_labels = arrays
    found = (
        *(_pixels(spec, train, spec.n_train), _labels(spec, train_labels, spec.n_train)),
        *(_pixels(spec, test, spec.n_test), _labels(spec, test_labels, spec.n_test)),
    )
    digest = hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest()[:16]
    source = Path(read.__code__.co_filename).name if hasattr(read, "__code__") else read.__module__
    return Images(spec, *found, digest, source)


def _pixels(spec: DatasetSpec, x: NDArray[Any], n: int) -> Pixels:
    is_float = x.dtype.kind == "f" and bool(np.isfinite(x).all())
    if not (x.dtype == np.uint8 or is_float) or x.shape not in ((n, *spec.shape), (n, prod(spec.shape))):
        raise SparselthError(
            f"dataset {spec.name}: expected bytes {[n, *spec.shape]}, got {x.dtype} {list(x.shape)}; "
            "floats do as well, if all are finite"
        )
    flat = x.reshape(n, -1)
    return flat.astype(np.float32, order="C") if is_float else flat.astype(np.uint8, order="C")


def _labels(spec: DatasetSpec, y: NDArray[Any], n: int) -> NDArray[np.int64]:
    if y.shape != (n,) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= (spec.classes or 0):
        raise SparselthError(
            f"dataset {spec.name}: expected {n:,} labels from 0 to {(spec.classes or 0) - 1} for its images, "
            f"got {y.dtype} {list(y.shape)}"
        )
    return y.astype(np.int64)


def fetch(name: str, folder: Path) -> None:
    """Download a data set into `folder` with torchvision; a file that is there already is left alone.

    Of processes of a host that want the same, as ranks do, one downloads and the others wait for it.
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
            lock.awaited(target),
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-", ignore_cleanup_errors=True) as temp,
            contextlib.redirect_stdout(io.StringIO()),  # stdout carries results; progress is on stderr
        ):
            if all((target / file.name).exists() for file in spec.files):
                return
            getattr(_torchvision_datasets(), spec.torchvision)(temp, download=True)
            for file in spec.files:
                if not (target / file.name).exists():
                    Path(temp, spec.folder, file.name).replace(target / file.name)
    except Exception as error:
        cause = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
        raise SparselthError(
            f"cannot download {spec.title} into {folder.absolute()}: {cause}; {_how_to_get(spec, folder)}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        for path in made:
            with contextlib.suppress(OSError):  # rmdir removes a folder only if it is empty
                path.rmdir()


def resolve(
    name: str | None, folder_flag: Path | None, note: Callable[[str], None], default: str = DEFAULT
) -> Images:
    """The data set a command works on: read, or downloaded and read.

    `name` and `folder_flag` are --dataset and --data-dir, None where the user gave none. Who named a set or
    a folder (also by SPARSELTH_DATA) gets it or an error. Where nobody did and the `default` is neither there
    nor to be downloaded, it is mnist5k if images of its shape are wanted, and `note` is called with two short
    lines that say so. Files that are there but damaged are an error in every case.
    """
    spec = get_dataset(default if name is None else name)
    if folder_flag:
        data_dir(folder_flag)  # is there, whether it is needed or not
    if spec.inside:
        return load(spec.name, ASSETS)
    if spec.pictures:
        return load(spec.name, data_dir(folder_flag))
    asked = folder_flag or os.environ.get("SPARSELTH_DATA")
    try:
        folder = data_dir(folder_flag)
    except MissingData as error:
        if asked:
            raise
        if spec.read is None:
            return _stand_in(spec, name is not None, note, error)
        folder = NOWHERE
    if spec.read is not None:
        return load(spec.name, folder)
    try:
        if asked or _reachable(folder / spec.folder):
            return load(spec.name, folder)
    except MissingData:
        if asked and not os.access(folder, os.W_OK | os.X_OK):
            raise SparselthError(
                f"{folder} does not hold {spec.title} and is read-only, so it cannot be downloaded there; "
                f"{_how_to_get(spec, folder)}"
            ) from None
    try:
        fetch(spec.name, folder)
    except SparselthError as error:
        return _stand_in(spec, name is not None or bool(asked), note, error)
    return load(spec.name, folder)


def _stand_in(spec: DatasetSpec, named: bool, note: Callable[[str], None], error: SparselthError) -> Images:
    """What is taken for a data set that cannot be had; the error where it was named, or nothing fits."""
    spare = DATASETS[FALLBACK]
    if named or spec.shape != spare.shape:
        raise error
    note(
        f"NOT using {spec.title}: it cannot be downloaded ({_briefly(error)})\n"
        f"but {FALLBACK}, {spare.n_train:,} + {spare.n_test:,} digits of it; `data_dir` FOLDER if you have it"
    )
    return load(FALLBACK, ASSETS)


def _briefly(error: SparselthError) -> str:
    """Why, in up to 36 characters: what torchvision got last, without the wrappings of urllib."""
    text = (str(error.__cause__ or error).strip().splitlines() or [type(error.__cause__).__name__])[-1]
    return textwrap.shorten(re.sub(r"urlopen error|\[Errno -?\d+\]|[<>]", "", text), 36, placeholder=" ...")


def _how_to_get(spec: DatasetSpec, folder: Path) -> str:
    names = ", ".join(file.name for file in spec.files)
    spare = f", or use `dataset` {FALLBACK}" if spec.shape == DATASETS[FALLBACK].shape else ""
    return (
        f"put {names} into {folder.absolute() / spec.folder}, "
        f"or pass `data_dir` with a folder that holds {spec.folder}{spare}"
    )


def _reachable(folder: Path) -> bool:
    """Whether the user's own cache can be looked into: a home may be a file, or another user's."""
    try:
        folder.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return True


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
