"""A cache that cannot be written is replaced by a temporary folder, with one note."""

import errno
import os

import pytest

from lorakit.storage import user_cache as module
from lorakit.storage.user_cache import user_cache, writable_cache


def test_the_variable_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "lorakit"
    assert writable_cache(user_cache()) == tmp_path / "lorakit"
    assert (tmp_path / "lorakit").is_dir()


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nobody", None])
def test_homes_that_cannot_be_written(monkeypatch, tmp_path, caplog, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is None:  # a user id that no account has: expanduser leaves the ~
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("HOME", home)
    module._temporary.cache_clear()
    first, second = writable_cache(user_cache()), writable_cache(user_cache())
    assert first == second
    (first / "file").write_text("kept")
    assert not list(tmp_path.iterdir())  # no folder named ~
    (record,) = caplog.records
    assert "XDG_CACHE_HOME" in record.getMessage()


def test_a_full_disk_is_no_reason_to_go_on(monkeypatch, tmp_path):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        writable_cache(tmp_path / "cache")
