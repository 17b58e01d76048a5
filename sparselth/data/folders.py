"""Data sets whose images are files in a folder for each class: which files there are, found by torchvision.

Nothing is decoded here, and importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselth.data.sets import DatasetSpec, Images, MissingData
from sparselth.errors import SparselthError

LEAST = 8  # training images; an eighth is held back for validation
PARTS = ("train", "val")


def images(spec: DatasetSpec, folder: Path) -> Images:
    """The names and classes of the files below `folder`; the spec of what is found has their numbers.

    The digest is that of the names. Raises what `place` does, and SparselthError where a class or all of the
    training has too few images.
    """
    root = place(spec, folder)
    train, test = (_listed(root / part) for part in PARTS)
    (names, labels), (test_names, test_labels) = (_arrays(part, root) for part in (train, test))
    if len(names) < LEAST:
        raise SparselthError(f"{root / PARTS[0]}: has {len(names)} images; expected {LEAST} at least")
    digest = hashlib.sha256(names.tobytes() + test_names.tobytes()).hexdigest()[:16]
    found = replace(spec, classes=len(train.classes), n_train=len(names), n_test=len(test_names))
    return Images(found, names, labels, test_names, test_labels, digest, str(root), root)


def place(spec: DatasetSpec, folder: Path) -> Path:
    """The folder of a data set below `folder`; its classes alone are looked at, for files may be a million.

    Raises MissingData where there is no such folder, SparselthError where the folders of training and test
    have other classes, and for a spec whose images are not of three colours.
    """
    if len(spec.shape) != 3 or spec.shape[0] != 3:
        raise SparselthError(
            f"`shape` {spec.shape} of {spec.name}: expected 3 x height x width, as files are decoded as red, "
            "green and blue"
        )
    root = folder.absolute() / spec.folder
    if missing := next((root / part for part in PARTS if not (root / part).is_dir()), None):
        raise MissingData(
            f"{missing}: no such folder; {spec.title} cannot be downloaded: put its images into "
            f"{root}/train/CLASS and {root}/val/CLASS, or pass `data_dir` with a folder that holds "
            f"{spec.folder}"
        )
    train, test = (_classes(root / part) for part in PARTS)
    if odd := sorted(train ^ test):
        has, lacks = PARTS if odd[0] in train else PARTS[::-1]
        raise SparselthError(f"{root}: {has} has the class {odd[0]}, {lacks} has not; expected the same ones")
    return root


def _classes(folder: Path) -> set[str]:
    """The names of its folders, as torchvision's ImageFolder takes them."""
    try:
        with os.scandir(folder) as entries:
            found = {entry.name for entry in entries if entry.is_dir()}
    except OSError as error:
        raise SparselthError(f"{folder}: cannot be read ({error.strerror})") from None
    if not found:
        raise SparselthError(f"{folder}: has no folder of a class; expected one for each")
    return found


def _listed(folder: Path) -> Any:
    """torchvision's ImageFolder; imported late because it imports torch."""
    try:
        return importlib.import_module("torchvision.datasets").ImageFolder(str(folder))
    except OSError as error:
        raise SparselthError(f"{folder}: {error}") from None
    except Exception as error:  # RuntimeError where the releases of torch and torchvision do not fit
        raise SparselthError(
            f"torchvision does not work with the torch that is installed ({error})"
        ) from None


def _arrays(part: Any, root: Path) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """Names below `root`, and the number of each one's class."""
    behind = len(str(root)) + 1
    names = [os.fsencode(name[behind:]) for name, _ in part.samples]
    return np.array(names, np.bytes_), np.array([label for _, label in part.samples], np.int64)
