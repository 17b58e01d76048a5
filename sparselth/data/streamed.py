"""Images that stay in files: decoded when they are wanted, by processes of torch's DataLoader.

They come out channels-last, as torchvision's transforms make them: to train on RandomResizedCrop and a flip
(`augment` crop-flip), else the middle of the resized image. What a crop is drawn from comes from the stream
of its replica and step; the order of an epoch is that of images in memory. So a batch is a function of
(replica, step) alone: neither how many processes decode nor where training was resumed changes a bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparselth.cluster import torchrun
from sparselth.config import Cell
from sparselth.data.batches import Batches, Chunk, Resident
from sparselth.data.sets import Images, check_inputs
from sparselth.errors import SparselthError, one_line
from sparselth.machine import cores, memory_bytes
from sparselth.streams import stream

PIECE = 64  # images that a process decodes at a time
AHEAD = 2  # training batches that are decoded ahead
RESIZED = 256 / 224  # of a side, before its middle is cut out

Wanted = tuple[list[int], list[int] | None]  # places of images; what the crop of each is drawn from, if any
Decoded = tuple[Tensor, list[int]]  # bytes [n, H, W, C] of images at these places


def opened(images: Images, device: str, chunk: int, most: int = 0, inputs: str = "standard") -> Resident:
    """A data set for training on a device: in memory, or where its images are files from these."""
    kind = Resident if images.root is None else Streamed
    return kind(images, device, chunk, most, inputs)


def loaders(device: str) -> int:
    """Processes that decode for one that trains: on a GPU's machine its share of the cores.

    On a CPU none: who trains there has one core, and decodes on it.
    """
    if device == "cpu":
        return 0
    share, group = torchrun.share_of(cores()), torchrun.here()
    # a worker knows of its rank by the environment alone
    return max(1, share // group.local_size) if group and not torchrun.joined() else share


def most_held(shape: tuple[int, ...]) -> int:
    """Images that are decoded once where many networks look at them: an eighth of a core's memory."""
    return memory_bytes() // (8 * cores() * prod(shape))


class Decoder(Dataset[Decoded | str]):
    """Files by their places, as bytes; what is wrong with one is said in a line."""

    def __init__(self, root: Path, names: NDArray[np.bytes_], shape: tuple[int, ...]) -> None:
        from torchvision import transforms  # type: ignore[import-untyped]

        channels, *size = shape
        self.root, self.names, self.shape = root, names, (*size, channels)
        whole = transforms.Resize(round(max(size) * RESIZED)), transforms.CenterCrop(size)
        part = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
        self.whole, self.part = transforms.Compose(whole), transforms.Compose(part)

    def __getitem__(self, wanted: Wanted) -> Decoded | str:
        from PIL import Image

        places, numbers = wanted
        rows = np.empty((len(places), *self.shape), np.uint8)
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's own generator
            for i, place in enumerate(places):
                file = self.root / os.fsdecode(self.names[place])
                try:
                    with Image.open(file) as opened:
                        picture = opened.convert("RGB")
                except Exception as error:  # PIL has many
                    return f"{file}: cannot be decoded ({one_line(str(error))}); replace the file"
                if numbers is not None:
                    torch.default_generator.manual_seed(numbers[i])
                rows[i] = np.asarray((self.whole if numbers is None else self.part)(picture))
        return torch.from_numpy(rows), places


class Streamed(Resident):
    """A data set in files, for engines that take images first: `batches`, `shown`, `test_first`, ..."""

    def __init__(
        self,
        images: Images,
        device: str,
        chunk: int,
        most: int = 0,
        inputs: str = "standard",
        processes: int | None = None,
    ) -> None:
        """As of images in memory; `processes` decode, `loaders` of them unless given."""
        check_inputs(inputs, images)
        assert images.root is not None
        spec, self.root = images.spec, images.root
        self.name, self.shape, self.device, self.chunk, self.most = spec.name, spec.shape, device, chunk, most
        self.processes = loaders(device) if processes is None else processes
        self.labels = torch.from_numpy(images.train_labels).to(device)
        self.test_labels = torch.from_numpy(images.test_labels).to(device)
        self.names: dict[bool, Any] = {False: images.train_images, True: images.test_images}  # of the test?
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu") for values in (spec.mean, spec.std)
        )
        if inputs != "standard":
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        self.scale, self.shift = (1 / (255 * std)).to(device), (-mean / std).to(device)  # [C]
        self._cache()

    def __getattr__(self, name: str) -> Any:
        if name in ("images", "_test"):
            raise SparselthError(
                f"`dataset` {self.name}: its images stay in files, and this wants them in memory; choose "
                "another data set"
            )
        raise AttributeError(name)

    @property
    def held_bytes(self) -> int:
        return 0

    @property
    def n_test(self) -> int:
        return len(self.test_labels)

    def batches(
        self, replicas: Sequence[Cell], batch: int, augment: str = "none", share: slice | None = None
    ) -> Batches:
        return StreamedBatches(self, replicas, batch, augment, share)

    def shown(self, index: Tensor) -> Chunk:
        x, y = zip(*self._looked(index.cpu()), strict=True)
        return torch.cat(x), torch.cat(y)

    def _validation_first(self, seed: int) -> Sequence[Chunk]:
        return self._looked(self.split(seed)[1][: self.n_validated])

    def training_first(self, seed: int, most: int) -> Sequence[Chunk]:
        return self._looked(self.split(seed)[0][:most])

    def test_first(self) -> Sequence[Chunk]:
        return self._looked(self._tested_index(), test=True)

    def _looked(self, places: Tensor, test: bool = False) -> Looked:
        """Images in evaluation batches."""
        return Looked(self, [Lot(lot.tolist()) for lot in torch.split(places, self.chunk)], test)

    def held(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Chunks that many networks look at: each is decoded once, and held as bytes, where all may be."""
        assert isinstance(chunks, Looked)
        images = sum(len(lot.places) for lot in chunks.lots)
        return Looked(self, chunks.lots, chunks.test, images <= most_held(self.shape))

    def decoded(self, wanted: Iterable[Wanted], test: bool, ahead: int = 2) -> Iterator[Decoded]:
        """Bytes of images in the order they are wanted in; each process is up to `ahead` items ahead."""
        loader: DataLoader[Decoded | str] = DataLoader(
            Decoder(self.root, self.names[test], self.shape),
            batch_size=None,
            sampler=wanted,
            num_workers=self.processes,
            collate_fn=_as_it_is,
            pin_memory=self.device == "cuda",
            prefetch_factor=ahead if self.processes else None,
            generator=torch.Generator(),  # or it would draw from torch's own, where dropout draws, too
        )
        items = iter(loader)
        while True:
            try:
                found = next(items, None)
            except RuntimeError as error:  # a process was killed
                raise SparselthError(f"{self.root}: {one_line(str(error))}; `resume` goes on") from error
            if found is None:
                return
            if isinstance(found, str):
                raise SparselthError(found)
            rows, places = found
            yield rows.to(self.device, non_blocking=True), places

    def scaled(self, rows: Tensor) -> Tensor:
        """Bytes [n, H, W, C] as x [n, C, H, W] fp32, channels-last."""
        return torch.addcmul(self.shift, rows.float(), self.scale).permute(0, 3, 1, 2)


def _as_it_is(found: Any) -> Any:
    return found


@dataclass(eq=False)
class Lot:
    """Places of images that are looked at together, and these as bytes [n, H, W, C] while they are held."""

    places: list[int]
    rows: Tensor | None = None


class Looked(Sequence[Chunk]):
    """Images in lots, decoded anew each time they are gone through, or once and held; slices are lazy."""

    def __init__(self, data: Streamed, lots: list[Lot], test: bool, held: bool = False) -> None:
        self.data, self.lots, self.test, self.held = data, lots, test, held

    def __len__(self) -> int:
        return len(self.lots)

    def __iter__(self) -> Iterator[Chunk]:
        labels = self.data.test_labels if self.test else self.data.labels
        there = [lot.rows for lot in self.lots]
        wanted = [lot.places for lot, rows in zip(self.lots, there, strict=True) if rows is None]
        decoded = self.data.decoded(((places, None) for places in wanted), self.test)
        for lot, rows in zip(self.lots, there, strict=True):
            if rows is None:
                rows, _ = next(decoded)
                lot.rows = rows if self.held else None
            yield self.data.scaled(rows), labels[torch.tensor(lot.places, device="cpu").to(self.data.device)]

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Looked(self.data, self.lots[place], self.test, self.held)
        return next(iter(Looked(self.data, [self.lots[place]], self.test, self.held)))


class Places(Batches):
    """Where the images of training batches are, and what their crops are drawn from; knows no more than that.

    Processes are told of it ahead of training: if it held what holds them, they would not end with that.
    """

    def _of(self, step: int) -> Tensor:
        """Places of the images of whole batches of a step, [R, B], on the CPU."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.order, self.epoch = self.draw(epoch), epoch
        return self.order[:, place]

    def wanted(self, step: int, crops: bool) -> Iterator[Wanted]:
        """What the steps from one on want, piece by piece."""
        for now in count(step):
            places = self.index(now).tolist()
            numbers = self.numbers(now) if crops else None
            for i in range(0, len(places), PIECE):
                yield places[i : i + PIECE], numbers and numbers[i : i + PIECE]

    def numbers(self, step: int) -> list[int]:
        """What the crops of a step are drawn from, a number an image, [R * B]."""
        found = list[int]()
        for who in self.replicas:
            generator = stream(who.seed, who.arm, who.level, f"crops/{step}", who.draw)
            drawn = torch.randint(2**63 - 1, (self.batch,), generator=generator, device="cpu")
            found += drawn[self.share].tolist()
        return found


class StreamedBatches(Batches):
    """Training batches of R replicas from files, decoded ahead as long as steps follow each other."""

    data: Streamed

    def __init__(
        self,
        data: Streamed,
        replicas: Sequence[Cell],
        batch: int,
        augment: str = "none",
        share: slice | None = None,
    ) -> None:
        super().__init__(data, replicas, batch, share=share)
        self.places, self.crops = Places(data, replicas, batch, share=share), augment != "none"
        self.next, self.pieces = -1, iter(list[Decoded]())
        self.each = -(-len(replicas) * self.size // PIECE)  # pieces of a step

    def first(self, step: int) -> tuple[Tensor, Tensor]:
        """The batches of a step, x [R, B, C, H, W] with channels last in memory, and labels [R, B]."""
        if step != self.next:
            ahead = -(-AHEAD * self.each // max(1, self.data.processes))
            self.pieces = self.data.decoded(self.places.wanted(step, self.crops), False, ahead)
        self.next = -1
        found = [next(self.pieces) for _ in range(self.each)]
        self.next = step + 1
        places = torch.tensor([place for _, some in found for place in some], device="cpu")
        x = self.data.scaled(torch.cat([rows for rows, _ in found]))
        y, shape = self.data.labels[places.to(self.data.device)], (len(self.replicas), self.size)
        return x.view(*shape, *x.shape[1:]), y.view(shape)
