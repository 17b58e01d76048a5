"""The user's own data, by a name such as "my_data.py:load": what the function gives, checked and in memory.

`load()` gives (train_x, train_y, test_x, test_y), ((train_x, train_y), (test_x, test_y)) or two torch
Datasets, which are read once. x is images [N, C, H, W], bytes or floats, vectors [N, K] or other floats
[N, ...], or tokens [N, T], whole numbers; y a class [N], a token a place [N, T], or floats for a loss of
one's own. Bytes are scaled to [0, 1], floats are taken as they are. Everything is said in a line that does
not fit.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselth import user_files
from sparselth.data.sets import DatasetSpec, Images, Labels, Pixels
from sparselth.errors import SparselthError, UsageError
from sparselth.machine import memory_bytes

LEAST = 8  # training samples; an eighth is held back for validation
IGNORED = -100  # the target that torch's cross-entropy leaves out
TWICE = 8  # samples of a Dataset that are read twice; a coin that mirrors them is noticed but once in 256
TELLS = 2.0  # seconds between two words of progress
EXPECTED = "expected (train_x, train_y, test_x, test_y), ((x, y), (x, y)) or two torch Datasets"


def unheard(name: str, done: int, samples: int) -> None:
    """Nobody wants to know how many samples of a Dataset were read of how many."""


progress: Callable[[str, int, int], None] = unheard  # the command line puts its own here

# with the file that read them as it was imported; None: another process read them
_loaded: dict[tuple[Path, str], tuple[ModuleType | None, Images]] = {}


def images(name: str) -> Images:
    """The data of that name, computed once until the file is refreshed; UsageError where they are none."""
    place = _place(name)
    if place in _loaded and _loaded[place][0] is None:
        return _loaded[place][1]
    imported = user_files.module("dataset", name)
    if place not in _loaded or _loaded[place][0] is not imported:
        _loaded[place] = imported, _Reader(name).images()
    return _loaded[place][1]


def remember(images: Images) -> None:
    """Take data that another process has read as those of their name."""
    if user_files.is_file(images.spec.name):
        _loaded[_place(images.spec.name)] = None, images


def _place(name: str) -> tuple[Path, str]:
    file, _, function = name.rpartition(":")
    return Path(file).expanduser().resolve(), function


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name

    def wrong(self, text: str) -> UsageError:
        return UsageError(f"`dataset` {self.name}: {text}")

    def images(self) -> Images:
        load = user_files.function("dataset", self.name)
        try:
            found = load()
        except Exception as error:
            raise SparselthError(f"`dataset` {self.name}: {user_files.said(error)}") from error
        (train, train_y), (test, test_y) = self.parts(found)
        parts = ("training", train, train_y), ("test", test, test_y)
        pixels = [self.samples(part, x) for part, x, _ in parts]
        shapes, kinds = ([getattr(x, what) for x in pixels] for what in ("shape", "dtype"))
        if shapes[0][1:] != shapes[1][1:] or kinds[0] != kinds[1]:
            one, other = (f"{kind} {[*shape[1:]]}" for kind, shape in zip(kinds, shapes, strict=True))
            raise self.wrong(f"training samples are {one}, those of the test {other}; expected the same")
        labels = [
            self.labels(part, y, len(x), x.dtype == np.int64)
            for (part, _, y), x in zip(parts, pixels, strict=True)
        ]
        if labels[0].dtype != labels[1].dtype or labels[0].shape[1:] != labels[1].shape[1:]:
            one, other = map(_said, labels)
            raise self.wrong(f"training labels are {one}, those of the test {other}; expected the same")
        if len(pixels[0]) < LEAST:
            raise self.wrong(f"has {len(pixels[0])} training samples; expected {LEAST} at least")
        shape = shapes[0][1:]
        spec = DatasetSpec(
            name=self.name,
            title=self.name,
            shape=shape,
            classes=self.classes(*labels),
            n_train=len(pixels[0]),
            n_test=len(pixels[1]),
            licence="the user's",
            tokens=kinds[0] == np.int64,
        )
        flat = [x.reshape(len(x), prod(shape)) for x in pixels]
        digest = hashlib.sha256()
        for array in (flat[0], labels[0], flat[1], labels[1]):
            digest.update(np.ascontiguousarray(array).data)
        source = str(Path(self.name.rpartition(":")[0]).name)
        return Images(spec, flat[0], labels[0], flat[1], labels[1], digest.hexdigest()[:16], source)

    def parts(self, found: Any) -> list[tuple[Any, Any]]:
        """(x, y) of the training samples and of the test's."""
        if isinstance(found, tuple | list) and len(found) == 4:
            return [(found[0], found[1]), (found[2], found[3])]
        if isinstance(found, tuple | list) and len(found) == 2:
            if all(isinstance(part, tuple | list) and len(part) == 2 for part in found):
                return [(x, y) for x, y in found]
            if all(_is_dataset(part) for part in found):
                with redirect_stdout(sys.stderr):
                    return [self.read(part) for part in found]
            if any(hasattr(part, "__iter__") and not hasattr(part, "__len__") for part in found):
                raise self.wrong("gives a Dataset without a length; expected one that is indexed")
        many = f" of {len(found)}" if isinstance(found, tuple | list) else ""
        raise self.wrong(f"gives a {type(found).__name__}{many}; {EXPECTED}")

    def read(self, dataset: Any) -> tuple[Any, Any]:
        """All samples of a torch Dataset; the first are asked for twice, for they must stay as they are."""
        n = len(dataset)
        if not n:
            raise self.wrong("gives an empty Dataset")
        first, _ = self.sample(dataset, 0)
        if (needed := n * first.nbytes) > (there := memory_bytes()):
            raise self.wrong(
                f"its {n:,} samples take {needed / 1e9:,.0f} GB in memory, there are {there / 1e9:.0f}"
            )
        xs, ys, told = np.empty((n, *first.shape), first.dtype), [], time.monotonic()
        for i in range(n):
            x, y = self.sample(dataset, i)
            again = self.sample(dataset, i)[0] if i < TWICE else x
            if (x.shape, x.dtype) != (first.shape, first.dtype):
                raise self.wrong(f"sample {i} is {_said(x)}, sample 0 is {_said(first)}; expected the same")
            if again.shape != x.shape or not np.array_equal(x, again, equal_nan=x.dtype.kind == "f"):
                raise self.wrong(
                    f"its Dataset gives another sample {i} each time; leave out random transforms, the "
                    "samples are read once (`augment` crop-flip shifts and flips images in training)"
                )
            xs[i] = x
            ys.append(y)
            if time.monotonic() - told > TELLS:
                progress(self.name, i, n)
                told = time.monotonic()
        return xs, ys

    def sample(self, dataset: Any, i: int) -> tuple[NDArray[Any], Any]:
        try:
            found = dataset[i]
        except Exception as error:
            raise SparselthError(f"`dataset` {self.name}: sample {i}: {user_files.said(error)}") from error
        if not isinstance(found, tuple | list) or len(found) < 2:
            raise self.wrong(f"sample {i} of its Dataset is a {type(found).__name__}; expected (x, y)")
        x, y = found[:2]
        array = _array(x)
        if hasattr(x, "getbands"):  # a picture, as torchvision gives it without a transform
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return array, _array(y)

    def samples(self, part: str, x: Any) -> Pixels:
        """[N, ...] as bytes, floats or tokens."""
        array = self.numbers(f"{part} x", x)
        if array.ndim < 2 or not prod(array.shape[1:]):
            raise self.wrong(f"{part} x is {_said(array)}; expected [N, C, H, W], [N, K] or [N, T]")
        if not len(array):
            raise self.wrong(f"has no {part} samples")
        if array.dtype == np.uint8:
            return np.ascontiguousarray(array)
        if array.dtype.kind == "f" or array.dtype == bool:
            floats = np.ascontiguousarray(array, dtype=np.float32)
            self.finite(f"{part} x", floats)
            return floats
        if array.ndim != 2:
            raise self.wrong(
                f"{part} x is {_said(array)}; expected floats or bytes (uint8), or tokens [N, T]"
            )
        if array.min() < 0:
            raise self.wrong(f"{part} x has the token {array.min()}; expected tokens from 0 on, or floats")
        return np.ascontiguousarray(array, dtype=np.int64)

    def labels(self, part: str, y: Any, samples: int, tokens: bool) -> Labels:
        """[N], or [N, ...] where they are no classes."""
        array = self.numbers(f"{part} y", y)
        if not array.ndim or len(array) != samples:
            has = len(array) if array.ndim else "one"
            raise self.wrong(f"{part} x has {samples:,} samples, {part} y {has}; expected as many")
        if array.dtype.kind == "f":
            floats = np.ascontiguousarray(array, dtype=np.float32)
            self.finite(f"{part} y", floats)
            return floats
        if array.ndim == 2 and array.shape[1] == 1 and not tokens:
            array = array[:, 0]
        least = IGNORED if array.ndim > 1 else 0
        if array.size and array.min() < least:
            raise self.wrong(f"{part} y has the label {array.min()}; expected labels from 0 on")
        return np.ascontiguousarray(array, dtype=np.int64)

    def classes(self, train: Labels, test: Labels) -> int | None:
        """How many there are; None where labels are none."""
        if train.dtype != np.int64 or train.ndim > 1:
            return None
        if least := int(train.min()):
            raise self.wrong(f"has labels from {least} to {train.max()}; expected them from 0 on")
        most = int(max(train.max(), test.max()))
        if most >= len(train):
            raise self.wrong(
                f"has a label {most} and {len(train)} training samples; expected classes from 0 on"
            )
        return most + 1

    def numbers(self, what: str, values: Any) -> NDArray[Any]:
        try:
            array = _array(values)
        except (ValueError, TypeError, RuntimeError) as error:
            raise self.wrong(f"{what} is a {type(values).__name__} ({user_files.said(error)})") from error
        if array.dtype.kind not in "fiub":
            raise self.wrong(f"{what} is {_said(array)}; expected numbers")
        return array

    def finite(self, what: str, floats: NDArray[np.float32]) -> None:
        lost = ~np.isfinite(floats)
        if lost.any():
            first = np.flatnonzero(lost.reshape(len(floats), -1).any(1))[0]
            raise self.wrong(
                f"{what} has {int(lost.sum()):,} numbers that are not finite, the first in sample {first}"
            )


def _is_dataset(part: Any) -> bool:
    """Whether it is a map of numbers to samples, as torch's Dataset, and no array."""
    return hasattr(part, "__getitem__") and hasattr(part, "__len__") and not hasattr(part, "shape")


def _array(values: Any) -> NDArray[Any]:
    """A tensor, array, picture or list of these as an array."""
    if isinstance(values, list) and values and hasattr(values[0], "shape"):
        return np.stack([_array(value) for value in values])
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()  # numpy knows no bfloat16
        return np.asarray(tensor.numpy())
    return np.asarray(values)


def _said(array: NDArray[Any]) -> str:
    return f"{array.dtype} {[*array.shape]}"
