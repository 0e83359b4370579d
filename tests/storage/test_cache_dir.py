"""Wanted members of a wheel come out under their names; a wheel without them is an error."""

import subprocess
import zipfile

import pytest

from lorakit.storage.cache_dir import unpack_wheel


@pytest.fixture
def index(monkeypatch):
    """A package index of one wheel."""

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/x-1-py3-none-any.whl", "w") as archive:
            archive.writestr("pkg/data.bin", "data")
            archive.writestr("pkg/code.py", "code")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)


def test_only_what_is_wanted_is_unpacked(index, tmp_path):
    folder = unpack_wheel("x==1", lambda name: name.endswith(".bin"), tmp_path)
    assert (folder / "pkg/data.bin").read_text() == "data"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["data.bin"]


def test_a_wheel_without_them_is_an_error(index, tmp_path):
    with pytest.raises(ValueError, match="does not contain the expected files"):
        unpack_wheel("x==1", lambda name: name == "other", tmp_path)
