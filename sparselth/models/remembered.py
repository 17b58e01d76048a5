"""A module as its run remembers it: enough to read the run, without the code that makes the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparselth.errors import UsageError
from sparselth.models.graph import Model
from sparselth.models.module import ModuleModel, Samples, Seen, standing_in
from sparselth.params import Params, TensorSpec

PARTS = ("weights", "trained", "statistics")


@dataclass(frozen=True)
class Remembered(ModuleModel):
    """What was seen of a network when its run began; it computes nothing."""

    def on(self, samples: Samples) -> Model:
        return self


def words(model: ModuleModel) -> dict[str, Any]:
    """What a run writes down of its network, as JSON."""
    params, seen = model.params, model.seen
    return {
        "input": [*model.input],
        "classes": model.classes,
        "output": [*seen.output],
        "convolves": seen.convolves,
    } | {part: [[s.name, [*s.shape], s.output] for s in getattr(params, part)] for part in PARTS}


def remembered(name: str, said: Mapping[str, Any]) -> Remembered:
    """The network that `words` were written of; UsageError where they are none."""
    try:
        offset, parts = 0, list[tuple[TensorSpec, ...]]()
        for part in PARTS:
            specs = list[TensorSpec]()
            for tensor, shape, output in said[part]:
                spec = TensorSpec(
                    str(tensor), _shape(shape), offset, 0, 0, bool(output), 0.5 if output else 1
                )
                specs.append(spec)
                offset = spec.end
            parts.append(tuple(specs))
        if not parts[0]:
            raise ValueError("it has no weights")
        shape = _shape(said["input"])
        weights, trained, statistics = parts
        params = Params(weights, trained, statistics, of_module=True)
        seen = Seen(params, (shape,), _shape(said["output"]), False, bool(said["convolves"]))
        found = Remembered(name, shape, (), {}, "as its run remembers it", int(said["classes"]), make=_refuse)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"`model` {name}: what its run says of it cannot be read ({error})") from error
    vars(found)["seen"] = seen  # in place of being shown samples
    return found


@contextmanager
def instead(name: str, said: Mapping[str, Any]) -> Iterator[None]:
    """Within, the network of that name is what `words` say, and no code is imported for it."""
    standing_in[name] = lambda: remembered(name, said)
    try:
        yield
    finally:
        del standing_in[name]


def of_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """As `words`, of a run whose tickets alone tell: the weights' shapes, the last of them the output's."""
    last = next(reversed([*shapes]), "")
    return {
        "input": [],
        "classes": shapes[last][0] if last else 0,
        "output": [],
        "convolves": False,
        "weights": [[name, [*shape], name == last] for name, shape in shapes.items()],
        "trained": [],
        "statistics": [],
    }


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"expected a shape, found {shape!s:.60}")
    return tuple(shape)


def _refuse(model: Model) -> Any:
    raise UsageError(f"`model` {model.name}: is known by what its run says of it, and computes nothing")
