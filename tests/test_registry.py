"""Registries: one of a name, the nearest name for a wrong one, files of a folder found when asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparselth import registry
from sparselth.errors import SparselthError, UsageError
from sparselth.registry import Registry, load_plugin, plugins


def test_a_name_is_taken_once_and_a_wrong_one_gets_the_nearest() -> None:
    known: Registry[int] = Registry("number")
    assert known.add("one", 1) == 1
    known.add("two", 2)
    with pytest.raises(UsageError, match="number 'one': there is one of that name already; choose another"):
        known.add("one", 3)
    assert dict(known) == {"one": 1, "two": 2}
    assert "three" not in known
    with pytest.raises(UsageError, match="unknown number 'onee': did you mean 'one'"):
        known["onee"]


def test_files_of_a_folder_are_imported_when_the_first_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "numbers_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from sparselth.registry import Registry\nKNOWN = Registry('number', __name__, but=('none',))\n"
    )
    (folder / "one.py").write_text("from numbers_of_a_test import KNOWN\nKNOWN.add('one', 1)\n")
    (folder / "none.py").write_text("raise RuntimeError('is not one')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import numbers_of_a_test  # type: ignore[import-not-found]

    assert "numbers_of_a_test.one" not in sys.modules
    assert list(numbers_of_a_test.KNOWN) == ["one"]
    for name in [name for name in sys.modules if name.startswith("numbers_of_a_test")]:
        del sys.modules[name]


def test_a_plugin_is_loaded_once_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", {})
    file = tmp_path / "mine.py"
    file.write_text(
        "import sys\nsys.loads = getattr(sys, 'loads', 0) + 1\n"
        "assert vars(sys.modules[__name__]) is globals()\n"
    )
    monkeypatch.setattr(sys, "loads", 0, raising=False)
    monkeypatch.chdir(tmp_path)
    load_plugin(file)
    load_plugin(Path("mine.py"))
    load_plugin(tmp_path / ".." / tmp_path.name / "mine.py")
    assert sys.loads == 1  # type: ignore[attr-defined]
    assert plugins() == (file.resolve(),)


def test_a_plugin_that_fails_is_named_and_may_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_plugins", {})
    known: Registry[int] = Registry("number")
    monkeypatch.setattr(registry, "known_of_a_test", known, raising=False)
    file = tmp_path / "mine.py"
    file.write_text("from sparselth import registry\nregistry.known_of_a_test.add('one', 1)\n1 / 0\n")
    with pytest.raises(SparselthError, match=r"`plugin` .*mine.py: ZeroDivisionError: division by zero"):
        load_plugin(file)
    assert plugins() == ()
    file.write_text("from sparselth.errors import SparselthError\nraise SparselthError('no wings')\n")
    with pytest.raises(UsageError, match=r"^`plugin` .*mine.py: no wings$"):
        load_plugin(file)
    assert plugins() == ()
    file.write_text("from sparselth import registry\nregistry.known_of_a_test.add('two', 2)\n")
    load_plugin(file)
    assert "two" in known
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / "mine.pyc").write_bytes(b"")
    for wrong in (tmp_path / "gone.py", tmp_path, tmp_path / "mine.txt", tmp_path / "mine.pyc"):
        with pytest.raises(UsageError, match=r"`plugin` .*: expected a Python file"):
            load_plugin(wrong)


def test_what_installed_packages_name_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    known: Registry[int] = Registry("number")
    points = [SimpleNamespace(value="one", load=lambda: known.add("one", 1))]

    def found(group: str) -> list[SimpleNamespace]:
        asked.append(group)
        return points

    monkeypatch.setattr(registry, "entry_points", found)
    monkeypatch.setattr(registry, "_entered", False)
    assert dict(known) == {"one": 1}
    assert len(Registry("another")) == 0
    assert asked == ["sparselth"]
    points[0].load = lambda: known.add("one", 2)
    monkeypatch.setattr(registry, "_entered", False)
    with pytest.raises(SparselthError, match=r"^plugin one: UsageError: number 'one': there is one"):
        registry.load_entry_points()


@pytest.mark.parametrize("ask", [len, list, lambda known: "x" in known, lambda known: known.get("x")])
def test_whoever_asks_first_has_the_folder_read(
    ask: Callable[[Registry[int]], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letters_of_a_test").mkdir()
    (tmp_path / "letters_of_a_test" / "__init__.py").write_text("")
    (tmp_path / "letters_of_a_test" / "x.py").write_text("import sys\nsys.letters.add('x', 24)\n")
    monkeypatch.syspath_prepend(tmp_path)
    known: Registry[int] = Registry("letter", "letters_of_a_test")
    monkeypatch.setattr(sys, "letters", known, raising=False)
    assert known.things == {}
    ask(known)
    assert known.things == {"x": 24}
    assert (known.kind, len(known), list(known), "x" in known, known["x"]) == ("letter", 1, ["x"], True, 24)
    known.folder = "searched_once"
    assert "y" not in known
    for name in [name for name in sys.modules if name.startswith("letters_of_a_test")]:
        del sys.modules[name]
