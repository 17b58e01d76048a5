"""What a call of `bench` asks: what contradicts itself or has no effect, and a name for its folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sparselth.errors import UsageError

MODEL = "lenet-300-100"  # of --train alone
LONGEST = 100  # characters of a folder's name


@dataclass(frozen=True)
class Question:
    """The flags that decide what is measured; () and None are the defaults."""

    sparsities: tuple[float, ...]
    shapes: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    run: Path | None
    level: int | None
    seed: int | None
    model: str | None
    train: bool
    threads: int | None
    quick: bool
    strong: bool = False
    ticket: Path | None = None
    size: tuple[int, ...] | None = None

    @property
    def network(self) -> bool:
        """Whether it is a whole network, not layers."""
        return bool(self.model or self.train or self.ticket or (self.run and "magnitude" not in self.kinds))

    @property
    def module(self) -> bool:
        """Whether it is a network that is more than one built-in layer behind another."""
        from sparselth.measure.nets import is_plain_chain

        return bool(self.ticket or self.size or (self.model and not is_plain_chain(self.model)))

    @property
    def default_table(self) -> bool:
        """Whether the layers are the default ones, for which time is limited."""
        return not (self.network or self.shapes or self.run or self.strong)

    def check(self, given: Collection[str]) -> None:
        """UsageError where flags contradict each other, or one that was `given` would have no effect."""
        run, level, kinds = self.run, self.level, self.kinds
        if self.strong and (self.network or run or kinds):
            raise UsageError("--strong: layers of frozen weights, without --model, --train, --run or --mask")
        if "magnitude" in kinds and run is None:
            raise UsageError(
                "--mask magnitude: needs the tickets of a run, --run RUN; `sparselth imp` makes one"
            )
        if "magnitude" in kinds and (self.shapes or len(kinds) > 1):
            raise UsageError(
                "--mask magnitude: the layers are those of --run, without --shape or other masks"
            )
        if run is not None and (self.model or self.train or (self.shapes and "magnitude" not in kinds)):
            raise UsageError("--run: the network is the run's, without --model, --shape or --train")
        if (self.model or self.train) and (self.shapes or kinds):
            raise UsageError("--model and --train: a whole network, without --shape or --mask")
        if run is None and (level is not None or self.seed is not None):
            raise UsageError("--level and --seed: are those of a ticket, give its --run RUN")
        if run is None and "data_dir" in given:
            raise UsageError("--data-dir: only the tickets of --run are measured on a data set")
        if run is not None and "sparsity" in given and (self.network or level is not None):
            raise UsageError(
                "--sparsity: the mask is the ticket's; choose it by --level, or with --mask magnitude"
            )
        if self.network and self.dtypes not in ((), ("fp32",)):
            raise UsageError("--dtype: whole networks are measured in fp32")
        if self.network and len(self.sparsities) > 1:
            raise UsageError("--sparsity: a whole network is measured at one; call once for each")
        if self.train and len(self.batches) > 1:
            raise UsageError("--batch: a step of training is measured at one; call once for each")
        if self.ticket is not None and (run or "sparsity" in given):
            raise UsageError("--ticket: has a mask of its own, without --sparsity and --run")
        if self.size is not None and not (self.model or self.ticket):
            raise UsageError("--input: the samples of a network, give its --model")
        if self.model is not None:
            from sparselth.models import get_model

            get_model(self.model)

    def folder(self, device: str) -> str:
        """`bench-cpu-0.9`, or what else was asked: a name that no other question has."""
        words = ["bench", device] + ["strong"] * self.strong
        if self.run is not None:
            words.append(self.run.resolve().name)
        elif self.network:
            words += ["train"] * self.train
            words += [self.model or (MODEL if self.ticket is None else "ticket")]
            words += [] if self.ticket is None else [self.ticket.stem]
            words += ["x".join(map(str, self.size or ()))] * (self.size is not None)
        words += [
            f"{name}{value}" for name in ("level", "seed") if (value := getattr(self, name)) is not None
        ]
        words += sorted(self.shapes) + sorted(self.kinds)
        if not (self.network and (self.run or self.ticket)):
            words.append(_joined(sorted(self.sparsities)))
        if self.batches:
            words.append(f"batch{_joined(sorted(self.batches))}")
        words += sorted(self.dtypes)
        words += [f"threads{self.threads}"] * (self.threads is not None)
        words += ["quick"] * (self.quick and self.default_table)
        whole = "-".join(words)
        places = [place.resolve() for place in (self.run, self.ticket) if place is not None]
        exact = " ".join([whole, *map(str, places)])
        safe = re.sub(r"[^\w.,@-]", "_", whole)
        if safe == exact and len(safe) <= LONGEST:
            return safe
        return f"{safe[:LONGEST]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _joined(values: Collection[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
