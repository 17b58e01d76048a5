"""Functions in a user's own file: found once, refused in a line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparselth import user_files
from sparselth.errors import SparselthError, UsageError


def test_a_file_is_loaded_once_and_known_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("count = []\n\ndef load():\n    count.append(1)\n    return len(count)\n")
    name = f"{file}:load"
    assert user_files.is_file(name)
    assert not user_files.is_file("cifar10")
    assert not user_files.is_file("torchvision:resnet18")
    assert not user_files.is_file(str(file))
    assert (user_files.short(name), user_files.short("mnist")) == ("mine", "mnist")
    assert [user_files.function("dataset", name)(), user_files.function("dataset", name)()] == [1, 2]
    before = user_files.code("dataset", name)
    assert len(before) == 16
    user_files.refresh("dataset", name)
    assert user_files.function("dataset", name)() == 3  # nothing has changed
    file.write_text(file.read_text() + "\n")
    assert user_files.code("dataset", name) != before
    assert user_files.function("dataset", name)() == 4  # who is amidst something goes on with it
    user_files.refresh("dataset", name)
    assert user_files.function("dataset", name)() == 1


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (None, UsageError, r"`model` .*mine.py:make: .*mine.py cannot be read \(No such file or directory\)"),
        ("", UsageError, "has no function 'make'; it has none"),
        ("from math import exp\nmake = 3\ndef build(): ...", UsageError, "no function 'make'; it has build"),
        ("import torc", SparselthError, "mine.py:make: ModuleNotFoundError: No module named 'torc'"),
        ("def make(:", SparselthError, "SyntaxError: invalid syntax"),
        ("raise KeyError", SparselthError, "mine.py:make: KeyError"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    text: str | None, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(kind, match=said) as found:
        user_files.function("model", f"{file}:make")
    assert type(found.value) is kind
    assert "\n" not in str(found.value)
