"""Archives of compiled kernels: found again from any folder; nothing in them that a device does not read."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from gpu import bundle

pytestmark = pytest.mark.host

NAMES = ("_k.source", "_k.ttir", "_k.ttgir", "_k.llir", "_k.ptx", "_k.cubin", "_k.json")


def entry(cache: Path, key: str) -> None:
    """As Triton writes it: files, and a group that names them by full paths."""
    (cache / key).mkdir(parents=True)
    for name in NAMES:
        (cache / key / name).write_text(f"{key} {name}")
    paths = {name: str(cache / key / name) for name in NAMES}
    (cache / key / "__grp___k.json").write_text(json.dumps({"child_paths": paths}))


def test_an_archive_is_found_again_from_another_folder(tmp_path: Path) -> None:
    cache, other = tmp_path / "here", tmp_path / "there"
    for key in ("A", "B", "C"):
        entry(cache, key)
    (cache / "L").mkdir()
    (cache / "L" / "launcher.so").write_bytes(b"code")
    size = bundle.pack(cache, ["C", "A", "L"], tmp_path / "b.tar.xz")
    assert size == (tmp_path / "b.tar.xz").stat().st_size
    with tarfile.open(tmp_path / "b.tar.xz") as archive:
        assert archive.getnames()[0].startswith("C/")  # in order of worth
    bundle.unpack(tmp_path / "b.tar.xz", other)
    assert sorted(folder.name for folder in other.iterdir()) == ["A", "C", "L"]
    assert (other / "L" / "launcher.so").read_bytes() == b"code"
    group = json.loads((other / "A" / "__grp___k.json").read_text())["child_paths"]
    assert group == {name: str(other / "A" / name) for name in ("_k.cubin", "_k.json")}
    assert all(Path(path).read_text() == f"A {name}" for name, path in group.items())
    assert len(list((other / "A").iterdir())) == 3


def test_what_leads_elsewhere_is_left(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tar.xz", "w:xz") as archive:
        for name in ("../out", "/tmp/out", "A/../../out", "A/in"):
            archive.addfile(tarfile.TarInfo(name))
    bundle.unpack(tmp_path / "b.tar.xz", tmp_path / "cache")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [
        "b.tar.xz",
        "cache/A/in",
    ]
