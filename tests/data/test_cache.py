"""A folder is made once for a key, found again whole, made anew when damaged, and bounded."""

import errno
import os

import pytest

from lorakit.data import cache
from lorakit.data.cache import folder_for, folder_key, key_of
from lorakit.errors import WorkError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_home", lambda: tmp_path / "data")
    return tmp_path / "data"


def maker(text, made):
    def make(folder):
        made.append(text)
        (folder / "x.txt").write_text(text)

    return make


def test_the_same_key_is_made_once(home):
    made = []
    for text in ("one", "two"):
        assert (folder_for("key", maker(text, made)) / "x.txt").read_text() == "one"
    assert made == ["one"]
    assert [p.name for p in home.iterdir()] == ["key"]


def test_a_damaged_folder_is_made_anew(home):
    made = []
    (folder_for("key", maker("whole", made)) / "x.txt").write_text("cut")
    assert (folder_for("key", maker("again", made)) / "x.txt").read_text() == "again"


def test_a_folder_that_another_process_ends_at_that_moment_is_no_matter(home, monkeypatch):
    folder_for("a", maker("a", []))
    (home / ".making-theirs").mkdir()
    scan = os.scandir

    def then_gone(path):
        with scan(path) as entries:
            found = list(entries)
        (home / ".making-theirs").rmdir()
        return iter(found)

    monkeypatch.setattr(cache.os, "scandir", then_gone)
    assert (folder_for("b", maker("b", [])) / "x.txt").read_text() == "b"


def test_without_a_key_nothing_is_found_again(home):
    made = []
    one, two = (folder_for(None, maker(text, made)) for text in ("one", "two"))
    assert one != two
    assert made == ["one", "two"]


def test_a_failure_leaves_nothing(home):
    with pytest.raises(ValueError, match="bad"):
        folder_for("key", lambda folder: int("bad"))
    assert list(home.iterdir()) == []


def test_the_least_recently_used_go(home, monkeypatch):
    monkeypatch.setattr(cache, "MOST_FOLDERS", 2)
    for number, key in enumerate("abc"):
        os.utime(folder_for(key, maker(key, [])), (number, number))
    folder_for("d", maker("d", []))
    assert sorted(p.name for p in home.iterdir()) == ["c", "d"]
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    folder_for("e", maker("e", []))
    assert [p.name for p in home.iterdir()] == ["e"]


def test_what_a_killed_process_left_is_swept_after_a_day(home):
    for name in (".making-old", ".making-new"):
        (home / name).mkdir(parents=True)
    os.utime(home / ".making-old", (0, 0))
    folder_for("a", maker("a", []))
    assert sorted(p.name for p in home.iterdir()) == [".making-new", "a"]


def test_without_a_cache_the_folder_is_made_elsewhere_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "cache_home", lambda: tmp_path / "file" / "data")
    calls = []
    folders = {folder_for("key", maker("x", calls)) for _ in range(2)}
    assert len(folders) == len(calls) == 1
    assert [r.getMessage().partition(" (")[0] for r in caplog.records] == [
        f"note: no cache in {tmp_path}/file/data"
    ]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_home", lambda: tmp_path / "data")

    def full(_folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WorkError, match=r"cannot be kept .* No space left") as caught:
        folder_for("key", full)
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_keys_follow_their_parts():
    assert key_of("a", {"b": 1}) == key_of("a", {"b": 1}) != key_of("a", {"b": 2})


def test_folders_of_the_same_files_have_the_same_key(home):
    one, two, three = (folder_for(None, maker(text, [])) for text in ("a", "a", "b"))
    assert folder_key(one) == folder_key(two) != folder_key(three)
