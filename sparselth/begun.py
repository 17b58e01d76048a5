"""What the beginning of a run wrote and nothing can compute again: config.json and environment.json.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparselth.config import config_from_json
from sparselth.errors import SparselthError, UsageError
from sparselth.files import load_header, read_json, unsealed
from sparselth.registry import plugins


def read_config(path: Path) -> Any:
    """The configuration of the run in `path`, of the class of its experiment.

    Where a name in it is not known and a plugin that the run was begun with is not loaded, the error says so.
    """
    return read_written(path)[0]


def read_written(path: Path) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the JSON object it was read from, with a checksum or, an older one, without."""
    file = path / "config.json"
    if not file.is_file():
        raise SparselthError(f"{path}: not a run folder (no config.json); `sparselth ls runs` lists runs")
    try:
        data = read_json(file)
        config = config_from_json(data)
        if _plugins_not_loaded(path):
            config.check()
        config.cells()
    except UsageError as error:
        if without := _plugins_not_loaded(path):
            needed = " ".join(f"`plugin` {name}" for name in without)
            raise SparselthError(f"{path}: was begun with {needed}; give it again ({error})") from error
        raise SparselthError(f"{file}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SparselthError(f"{file}: cannot be read as a configuration ({error})") from error
    try:
        unsealed(data)
    except ValueError:
        raise SparselthError(
            f"{file}: was altered after it was written; restore it, or choose another `out`"
        ) from None
    return config, data


def read_environment(path: Path, proven: bool = False) -> dict[str, Any]:
    """What environment.json holds; SparselthError where it cannot be believed."""
    file = path / "environment.json"
    try:
        data = read_json(file)
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
        if proven and "sha256" not in data:
            raise ValueError("it has no checksum")
        return unsealed(data)
    except (OSError, ValueError) as error:
        raise SparselthError(f"{file}: cannot be read ({error}); begin the run in another `out`") from error


@contextmanager
def recalled(path: Path) -> Iterator[None]:
    """Within, the network of the run in `path` is what the run says of it: no file of a user's is imported.

    A run of an older version says it by the tickets of its cells.
    """
    from sparselth.models.module import is_module
    from sparselth.models.remembered import instead, of_shapes

    try:
        name = read_json(path / "config.json")["model"]
    except (OSError, ValueError, LookupError, TypeError):
        name = None  # whoever reads the run says so
    if not isinstance(name, str) or not is_module(name):
        yield
        return
    try:
        said = read_environment(path).get("network")
    except SparselthError:
        said = None
    if not isinstance(said, dict):
        shapes = dict[str, Any]()
        for file in sorted((path / "cells").glob("*.safetensors")):
            with suppress(SparselthError):
                shapes = load_header(file).get("shapes") or {}
                break
        said = of_shapes(shapes)
    with instead(name, said):
        yield


def _plugins_not_loaded(path: Path) -> list[str]:
    """The plugins that a run was begun with and that are not there now."""
    try:
        theirs = read_environment(path).get("plugins")
    except SparselthError:
        return []
    names = theirs if isinstance(theirs, list) else []
    return [name for name in names if isinstance(name, str) and Path(name) not in plugins()]
