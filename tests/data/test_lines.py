"""Lines arrive decoded and numbered, packed or not; traps are refused with the file's name."""

import gzip

import pytest

from lorakit.data import lines as module
from lorakit.data.lines import lines_of, opened, whole
from lorakit.data.locate import DataFile
from lorakit.errors import DataError


@pytest.fixture
def file(tmp_path):
    def write(data):
        (tmp_path / "a.jsonl").write_bytes(data)
        return DataFile(str(tmp_path / "a.jsonl"), "a.jsonl", ".jsonl")

    return write


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_are_numbered_and_lose_a_byte_order_mark(file, pack):
    made = file(pack("\ufeffone\ntw\u2028o\r\n".encode()))
    assert list(lines_of(made)) == [(1, "one\n"), (2, "tw\u2028o\r\n")]
    assert whole(made) == "one\ntw\u2028o\r\n"
    with opened(made) as handle:
        assert handle.read().endswith(b"o\r\n")


def test_a_zip_bomb_is_refused(file, monkeypatch):
    monkeypatch.setattr(module, "BOMB_BYTES", 2**20)
    bomb = gzip.compress(b'{"a": "b"}\n' * 2**20)
    with pytest.raises(DataError, match=r"a.jsonl:\d+: .* looks like a zip bomb"):
        list(lines_of(file(bomb)))


def test_repetitive_but_honest_data_is_read(file, monkeypatch):
    monkeypatch.setattr(module, "BOMB_BYTES", 2**16)
    rows = b"".join(b'{"question": "What is %d?", "answer": "%d"}\n' % (i, i) for i in range(5000))
    assert len(list(lines_of(file(gzip.compress(rows))))) == 5000


@pytest.mark.parametrize("data", [b"\xff\xfeo\0n\0e\0", b"caf\xe9\n"])
def test_other_encodings_are_named_with_a_conversion(file, data):
    with pytest.raises(DataError, match=r"a.jsonl:1: not UTF-8: byte 0x") as caught:
        list(lines_of(file(data)))
    assert "iconv" in caught.value.hint
