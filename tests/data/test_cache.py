"""An entry is written once for a key, found again, made again when damaged, and bounded."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest

from lorakit.data import cache
from lorakit.data.cache import cached, key_of
from lorakit.errors import WorkError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_home", lambda: tmp_path / "data")
    return tmp_path / "data"


def writer(text, written):
    def write(path):
        written.append(text)
        table = pa.table({"text": [text]})
        with pa.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table)
        return {"about": text}

    return write


def names(home):
    return sorted(path.name for path in home.iterdir())


def test_the_same_key_is_written_once(home):
    written = []
    for text in ("one", "two"):
        entry = cached("key", writer(text, written))
        assert (entry.table["text"][:], entry.meta, entry.key) == (["one"], {"about": "one"}, "key")
    assert written == ["one"]
    assert names(home) == ["key.arrow", "key.json"]


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"one")] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".arrow", ".json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_text("[]")])
def test_a_damaged_entry_is_written_again(home, damage, suffix):
    cached("key", writer("one", []))
    damage((home / "key").with_suffix(suffix))
    written = []
    entry = cached("key", writer("again", written))
    assert (entry.table["text"][:], entry.meta) == (["again"], {"about": "again"})


def test_an_entry_that_another_process_writes_meanwhile_is_the_same(home):
    def write(path):
        cached("key", writer("one", []))
        return writer("one", [])(path)

    assert cached("key", write).table["text"][:] == ["one"]
    assert names(home) == ["key.arrow", "key.json"]


def test_an_entry_that_is_replaced_or_pruned_remains_readable(home):
    first = cached("key", writer("one", []))
    for path in home.iterdir():
        path.unlink()
    cached("key", writer("two", []))
    assert first.table["text"][:] == ["one"]


def test_an_entry_that_another_process_deletes_at_that_moment_is_no_matter(home, monkeypatch):
    cached("a", writer("a", []))
    scan = Path.iterdir

    def then_gone(path):
        found = list(scan(path))
        (home / "a.arrow").unlink(missing_ok=True)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", then_gone)
    assert cached("b", writer("b", [])).table["text"][:] == ["b"]


def test_without_a_key_the_content_is_the_key(home):
    written = []
    one, same, two = (cached(None, writer(text, written)) for text in ("one", "one", "two"))
    assert one.key == same.key != two.key
    assert written == ["one", "one", "two"]
    assert len(names(home)) == 4


def test_a_failure_leaves_nothing(home):
    with pytest.raises(ValueError, match="bad"):
        cached("key", lambda path: path.write_text("half") and int("bad"))
    assert names(home) == []


def test_a_killed_writer_leaves_no_entry(home):
    code = f"""
        import os, signal
        from pathlib import Path
        from lorakit.data import cache

        cache.cache_home = lambda: Path({str(home)!r})

        def write(path):
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        cache.cached("key", write)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -9
    (left,) = names(home)
    assert left.startswith(cache.MAKING)
    assert cached("key", writer("one", [])).table["text"][:] == ["one"]


def test_the_least_recently_used_go(home, monkeypatch):
    for number, key in enumerate("abc"):
        cached(key, writer(key, []))
        os.utime(home / f"{key}.arrow", (number, number))
    cached("a", writer("a", written := []))
    assert written == []
    monkeypatch.setattr(cache, "MOST_ENTRIES", 2)
    cached("d", writer("d", []))
    assert names(home) == ["a.arrow", "a.json", "d.arrow", "d.json"]
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    cached("e", writer("e", []))
    assert names(home) == ["e.arrow", "e.json"]


def test_folders_of_killed_processes_and_old_versions_go_after_a_day(home):
    for name in (".making-old", ".making-new", "0123456789abcdef"):
        (home / name).mkdir(parents=True)
    for name in (".making-old", "0123456789abcdef"):
        os.utime(home / name, (0, 0))
    cached("a", writer("a", []))
    assert names(home) == [".making-new", "a.arrow", "a.json"]


def test_without_a_cache_the_folder_is_made_elsewhere_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "cache_home", lambda: tmp_path / "file" / "data")
    written = []
    entries = [cached("key", writer("x", written)) for _ in range(2)]
    assert written == ["x"]
    assert [entry.table["text"][:] for entry in entries] == [["x"], ["x"]]
    assert [r.getMessage().partition(" (")[0] for r in caplog.records] == [
        f"note: no cache in {tmp_path}/file/data"
    ]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_home", lambda: tmp_path / "data")

    def full(_folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WorkError, match=r"cannot be kept .* No space left") as caught:
        cached("key", full)
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_keys_follow_their_parts():
    assert key_of("a", {"b": 1}) == key_of("a", {"b": 1}) != key_of("a", {"b": 2})
