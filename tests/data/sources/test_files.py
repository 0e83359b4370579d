"""Lines arrive decoded and numbered, packed or not; traps are refused with the file's name."""

import gzip

import pytest

from lorakit.data.sources import files
from lorakit.data.sources.files import LineErrors, lines_of, open_file, pieces_of, read_text
from lorakit.data.sources.locate import DataFile
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
    assert read_text(made) == "one\ntw\u2028o\r\n"
    with open_file(made) as handle:
        assert handle.read().endswith(b"o\r\n")


def test_a_zip_bomb_is_refused(file, monkeypatch):
    monkeypatch.setattr(files, "BOMB_BYTES", 2**20)
    bomb = gzip.compress(b'{"a": "b"}\n' * 2**20)
    with pytest.raises(DataError, match=r"a.jsonl:\d+: .* looks like a zip bomb"):
        list(lines_of(file(bomb)))


def test_repetitive_but_honest_data_is_read(file, monkeypatch):
    monkeypatch.setattr(files, "BOMB_BYTES", 2**16)
    rows = b"".join(b'{"question": "What is %d?", "answer": "%d"}\n' % (i, i) for i in range(5000))
    assert len(list(lines_of(file(gzip.compress(rows))))) == 5000


def test_other_encodings_are_named_with_a_conversion(file):
    for read in (lines_of, pieces_of):
        with pytest.raises(DataError, match=r"a.jsonl:2: not UTF-8: byte 0xe9 at off") as caught:
            list(read(file(b"one\ncaf\xe9\n")))
        assert "iconv" in caught.value.hint


def test_every_line_that_is_not_utf8_is_named_where_faults_are_collected(file):
    made = file(b"one\ncaf\xe9\ntwo\n\xff\n")
    broken, read = LineErrors("a.jsonl"), []
    with pytest.raises(DataError) as caught, broken:
        read += lines_of(made, broken)
    assert read == [(1, "one\n"), (2, "caf\ufffd\n"), (3, "two\n"), (4, "\ufffd\n")]
    assert caught.value.message.splitlines() == [
        "a.jsonl: 2 faults:",
        "  a.jsonl:2: not UTF-8: byte 0xe9 at offset 7 of the file",
        "  a.jsonl:4: not UTF-8: byte 0xff at offset 13 of the file",
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_lines_and_pieces_are_the_text_whatever_the_byte_order_mark_says(
    file, encoding, monkeypatch
):
    text = "öne\nz\U0001f600\n" * 9
    made = file(text.encode(encoding))
    monkeypatch.setattr(files, "PIECE", 5)
    assert "".join(pieces_of(made)) == "".join(line for _, line in lines_of(made)) == text
