"""Things that are asked for by name: models, data sets, scores, arms, experiments, forms.

The file that makes a thing registers it. Inside the package these are the files of one folder, imported when
the first of their kind is asked for; outside it a file that `load_plugin` is given (`--plugin FILE.py`), or a
module that an installed package names as an entry point of the group "sparselth".
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from sparselth.errors import SparselthError, UsageError, unknown

T = TypeVar("T")
GROUP = "sparselth"


class Registry(Mapping[str, T]):
    """What is known of one kind, by name, in the order it was registered.

    `folder` is the package whose files register things of this kind, all but those in `but`; an unknown name
    raises UsageError with the nearest one.
    """

    def __init__(self, kind: str, folder: str = "", but: tuple[str, ...] = ()) -> None:
        self.kind, self.folder, self.but = kind, folder, but
        self.things: dict[str, T] = {}
        self._searched = False

    def add(self, name: str, thing: T) -> T:
        """Register `thing`; a name that is taken raises UsageError."""
        if name in self.things:
            raise UsageError(f"{self.kind} {name!r}: there is one of that name already; choose another")
        self.things[name] = thing
        return thing

    def __getitem__(self, name: str) -> T:
        self._search()
        if name not in self.things:
            raise unknown(self.kind, name, self.things)
        return self.things[name]

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self.things

    def __iter__(self) -> Iterator[str]:
        self._search()
        return iter(self.things)

    def __len__(self) -> int:
        self._search()
        return len(self.things)

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True
        if self.folder:
            package = importlib.import_module(self.folder)
            for found in pkgutil.iter_modules(package.__path__):
                if found.name not in self.but:
                    importlib.import_module(f"{self.folder}.{found.name}")
        load_entry_points()


_plugins: dict[Path, str] = {}
_entered = False


def load_plugin(file: Path) -> None:
    """Import a file of a user's, which registers what it makes; once, however often it is asked for."""
    path = file.resolve()
    if path in _plugins:
        return
    name = f"sparselth_plugin_{path.stem}_{len(_plugins)}"
    spec = importlib.util.spec_from_file_location(name, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"`plugin` {file}: expected a Python file, such as my_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _plugins[path] = name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name], _plugins[path]
        if isinstance(error, SparselthError):
            raise UsageError(f"`plugin` {file}: {error}") from error
        raise SparselthError(f"`plugin` {file}: {type(error).__name__}: {error}") from error


def plugins() -> tuple[Path, ...]:
    """The files that were loaded, for other processes to load them too."""
    return tuple(_plugins)


def load_entry_points() -> None:
    """Import what installed packages name, once."""
    global _entered
    if _entered:
        return
    _entered = True
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise SparselthError(f"plugin {point.value}: {type(error).__name__}: {error}") from error
