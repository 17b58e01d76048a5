"""The data set on the device, and batches from it without per-sample work.

Images stay what they are, bytes or floats; a batch is one gather, one cast to floats and one scaling. Every
replica has its own order, new each epoch, drawn from its own stream: the batch of a step is a function
of (replica, step) alone, so a resumed run continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from sparselth.config import Cell
from sparselth.data import Images
from sparselth.data.augment import moves, sources
from sparselth.data.sets import check_batch, check_inputs, n_validation
from sparselth.streams import stream

Chunk = tuple[Tensor, Tensor]  # images [1, K, B] fp32, labels [1, 1, B] int64; or both with B first


class Resident:
    """A data set as tensors on one device, with its split into training and validation images."""

    def __init__(
        self, images: Images, device: str, chunk: int, most: int = 0, inputs: str = "standard"
    ) -> None:
        """`chunk`: images of one evaluation batch; `most`: of an evaluation, at most, 0 is all.

        `inputs` as a recipe has it; images of norm 1 are held as floats, and moved as such.
        """
        check_inputs(inputs, images)
        train, test = (torch.from_numpy(each) for each in (images.train_images, images.test_images))
        if inputs == "norm":
            train, test = _of_norm_1(train), _of_norm_1(test)
        self.images = train.to(device)
        self.labels = torch.from_numpy(images.train_labels).to(device)
        self._test = test, torch.from_numpy(images.test_labels)
        self.device, self.chunk, self.most, self.shape = device, chunk, most, images.spec.shape
        pixels = self.images.shape[1] // len(images.spec.mean)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").repeat_interleave(pixels)[:, None]
            for values in (images.spec.mean, images.spec.std)
        )
        if inputs != "standard":
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        self.holds_bytes, self.holds_tokens = (
            self.images.dtype == kind for kind in (torch.uint8, torch.int64)
        )
        self.scale = (1 / ((255 if self.holds_bytes else 1) * std)).to(device)  # [K, 1]
        self.shift = (-mean / std).to(device)
        self._cache()

    @cached_property
    def sources(self) -> Tensor:
        """Where the pixels of moved images come from (`augment.sources`)."""
        return sources(self.shape).to(self.device)

    def _cache(self) -> None:
        """Keep the validation images of four seeds."""
        self.validation = lru_cache(maxsize=4)(self._validation)
        self.validation_first = lru_cache(maxsize=4)(self._validation_first)

    @property
    def n_validation(self) -> int:
        return n_validation(len(self.labels))

    @property
    def n_train(self) -> int:
        return len(self.labels) - self.n_validation

    @property
    def n_test(self) -> int:
        return len(self._test[0])

    @property
    def n_validated(self) -> int:
        """Validation images that an evaluation looks at."""
        return min(self.most or self.n_validation, self.n_validation)

    @property
    def n_tested(self) -> int:
        """Test images that are looked at."""
        return min(self.most or self.n_test, self.n_test)

    def sample(self, most: int) -> Resident:
        """The same images, of which an evaluation looks at so many at most."""
        other = copy(self)
        other.look_at(most)
        return other

    def look_at(self, most: int) -> None:
        """From now on an evaluation looks at so many images at most."""
        self.most = most
        self._cache()

    @property
    def held_bytes(self) -> int:
        """Memory that the images take, on their device."""
        return self.images.nbytes

    def batches(
        self, replicas: Sequence[Cell], batch: int, augment: str = "none", share: slice | None = None
    ) -> Batches:
        """Training batches of these replicas, or that share of each."""
        return Batches(self, replicas, batch, augment, share)

    def shown(self, index: Tensor) -> Chunk:
        """Training images by their indices as they are looked at, x [B, *shape], and labels [B, ...]."""
        index = index.to(self.device)
        return self._first(self.images[index], self.labels[index])

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Indices of the training and of the validation images; the same for every arm and level."""
        order = torch.randperm(len(self.labels), generator=stream(seed, "data", 0, "split"), device="cpu")
        return order[self.n_validation :], order[: self.n_validation]

    def _validation(self, seed: int) -> list[Chunk]:
        """The validation images of a seed that are looked at, in evaluation batches."""
        return [self._last(x, y) for x, y in self._chunks(*self._validated(seed))]

    def _validation_first(self, seed: int) -> Sequence[Chunk]:
        """The same as x [B, *shape] and labels [B, ...]."""
        return [self._first(x, y) for x, y in self._chunks(*self._validated(seed))]

    def test(self) -> list[Chunk]:
        """The test images that are looked at, evenly spread, in evaluation batches."""
        return [self._last(x, y) for x, y in self._chunks(*self._tested())]

    def test_first(self) -> Sequence[Chunk]:
        """The same as x [B, *shape] and labels [B, ...]."""
        return [self._first(x, y) for x, y in self._chunks(*self._tested())]

    def training(self, seed: int, most: int) -> list[Chunk]:
        """So many training images of a seed at most, in evaluation batches."""
        return [self._last(x, y) for x, y in self._chunks(*self._trained(seed, most))]

    def training_first(self, seed: int, most: int) -> Sequence[Chunk]:
        """The same as x [B, *shape] and labels [B, ...]."""
        return [self._first(x, y) for x, y in self._chunks(*self._trained(seed, most))]

    def held(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Chunks that many networks look at: in memory they are."""
        return chunks

    def _trained(self, seed: int, most: int) -> Chunk:
        index = self.split(seed)[0][:most].to(self.device)
        return self.images[index], self.labels[index]

    def _validated(self, seed: int) -> Chunk:
        index = self.split(seed)[1][: self.n_validated].to(self.device)
        return self.images[index], self.labels[index]

    def _tested(self) -> Chunk:
        index = self._tested_index()
        images, labels = (t[index].to(self.device) for t in self._test)
        return images, labels

    def _tested_index(self) -> Tensor:
        return torch.arange(self.n_tested, device="cpu") * self.n_test // self.n_tested

    def _chunks(self, images: Tensor, labels: Tensor) -> zip[Chunk]:
        return zip(torch.split(images, self.chunk), torch.split(labels, self.chunk), strict=True)

    def _last(self, images: Tensor, labels: Tensor) -> Chunk:
        return torch.addcmul(self.shift, images.T.float(), self.scale)[None], labels[None, None]

    def _first(self, images: Tensor, labels: Tensor) -> Chunk:
        if self.holds_tokens:
            return images.view(-1, *self.shape), labels
        x = torch.addcmul(self.shift.mT, images.float(), self.scale.mT)
        return x.view(-1, *self.shape), labels


def _of_norm_1(images: Tensor) -> Tensor:
    """Rows divided by their Euclidean norm, fp32; a black one stays black."""
    found = images.float()
    norm = torch.linalg.vector_norm(found, dim=1, keepdim=True, dtype=torch.float64)
    return found.div_(norm.where(norm > 0, 1.0).float())


class Gather:
    """Images and labels by their indices [R * B], as x [R, K, B] and labels [R, 1, B].

    `first` gives them as x [R, B, *shape] and labels [R, B, ...]; tokens stay int64. All are buffers that the
    next call overwrites. Images that `augment` moves come by move * images + index.
    """

    def __init__(self, data: Resident, replicas: int, batch: int, augment: str = "none") -> None:
        k, labels = data.images.shape[1], data.labels
        self.data, self.moved = data, augment != "none"
        self.raw = torch.empty(replicas * batch, k, dtype=data.images.dtype, device=data.device)
        self.x = torch.empty(replicas, batch, k, device=data.device, dtype=torch.float32)
        self.y = torch.empty(replicas * batch, *labels.shape[1:], dtype=labels.dtype, device=data.device)

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        self._fill(index)
        r, b, _ = self.x.shape
        return self._scaled().mT, self.y.view(r, 1, b)

    def first(self, index: Tensor) -> tuple[Tensor, Tensor]:
        self._fill(index)
        r, b, _ = self.x.shape
        x = self.raw if self.data.holds_tokens else self._scaled()
        return x.view(r, b, *self.data.shape), self.y.view(r, b, *self.y.shape[1:])

    def _fill(self, index: Tensor) -> None:
        images = self.data.images
        if self.moved:
            move, index = index.div(len(images), rounding_mode="floor"), index % len(images)
        torch.index_select(images, 0, index, out=self.raw)
        torch.index_select(self.data.labels, 0, index, out=self.y)
        if self.moved:
            black = torch.nn.functional.pad(self.raw, (0, 1))
            torch.gather(black, 1, self.data.sources.index_select(0, move), out=self.raw)

    def _scaled(self) -> Tensor:
        self.x.copy_(self.raw.view(self.x.shape))
        return torch.addcmul(self.data.shift.mT, self.x, self.data.scale.mT, out=self.x)


class Batches:
    """Training batches of R replicas: `at(step)` and `first(step)` give what `gather` makes of its images.

    The images behind the last full batch of an epoch are left out of that epoch. With `augment` an index
    tells how its image is moved, too (`Gather`). With `share` only that part of each batch is given.
    """

    def __init__(
        self,
        data: Resident,
        replicas: Sequence[Cell],
        batch: int,
        augment: str = "none",
        share: slice | None = None,
    ) -> None:
        check_batch(batch, len(data.labels))
        self.data, self.replicas, self.batch, self.augment = data, replicas, batch, augment
        self.share = share or slice(0, batch)
        self.size = self.share.stop - self.share.start  # of what is given
        self.steps_per_epoch = data.n_train // batch
        self.split = [data.split(replica.seed)[0] for replica in replicas]
        self.epoch = -1
        self.order = torch.empty(0, dtype=torch.float32, device="cpu")

    @cached_property
    def gather(self) -> Gather:
        return Gather(self.data, len(self.replicas), self.size, self.augment)

    def index(self, step: int) -> Tensor:
        """Image indices of the batches of a step, or of their share, [R * B]."""
        return self._of(step)[:, self.share].flatten()

    def labels(self, step: int) -> Tensor:
        """Labels of the whole batches of a step, [R, B, ...]."""
        return self.data.labels[self._of(step) % len(self.data.labels)]

    def _of(self, step: int) -> Tensor:
        """Image indices of the whole batches of a step, [R, B]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.order, self.epoch = self.draw(epoch).to(self.data.device), epoch
        return self.order[:, place]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        return self.gather(self.index(step))

    def first(self, step: int) -> tuple[Tensor, Tensor]:
        """The same batch as x [R, B, *shape] and labels [R, B, ...]."""
        return self.gather.first(self.index(step))

    def draw(self, epoch: int) -> Tensor:
        """Image indices of one epoch, [R, steps, B], on the CPU."""
        orders = []
        for split, who in zip(self.split, self.replicas, strict=True):
            generator = stream(who.seed, who.arm, who.level, f"order/{epoch}", who.draw)
            order = split[torch.randperm(len(split), generator=generator, device="cpu")]
            order = order[: self.steps_per_epoch * self.batch].view(-1, self.batch)
            if self.augment != "none":
                order = order + len(self.data.images) * moves(who, epoch, *order.shape)
            orders.append(order)
        return torch.stack(orders)


class Event(Protocol):
    """A place in the queue of a device, as torch.cuda.Event: `synchronize` waits until it is there."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Done:
    """The event of a device that does everything at once."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Orders:
    """The image indices of one epoch after another on the device, `order` [R, steps, B], without a wait.

    While an epoch runs the next one is drawn, by a thread, into the other of two host buffers. The copy out
    of a buffer may still be pending when its next turn comes: it is filled only behind the copy's `event`.
    """

    def __init__(self, batches: Batches, epochs: int, event: Callable[[], Event]) -> None:
        shape = len(batches.replicas), batches.steps_per_epoch, batches.batch
        cuda = batches.data.device != "cpu"
        self.batches, self.epochs, self.epoch = batches, epochs, -1
        self.order = torch.zeros(shape, dtype=torch.int64, device=batches.data.device)
        self.host = [torch.zeros(shape, dtype=torch.int64, pin_memory=cuda, device="cpu") for _ in range(2)]
        self.copied = [event() for _ in range(2)]
        self.thread = ThreadPoolExecutor(1)
        self.next: tuple[int, Future[int]] = -1, Future()

    def enter(self, epoch: int) -> None:
        """Put an epoch's order on the device, behind what is queued there."""
        if epoch == self.epoch:
            return
        if epoch != self.next[0]:
            self.next = epoch, self.thread.submit(self._draw, epoch)
        drawn = self.next[1].result()
        self.order.copy_(self.host[drawn], non_blocking=True)
        self.copied[drawn].record()
        self.epoch = epoch
        if epoch + 1 < self.epochs:
            self.next = epoch + 1, self.thread.submit(self._draw, epoch + 1)

    def _draw(self, epoch: int) -> int:
        """The buffer that holds the epoch's order now."""
        place, order = epoch % 2, self.batches.draw(epoch)
        self.copied[place].synchronize()
        self.host[place].copy_(order)
        return place
