"""A list is read item by item: the same items, places and complaints wherever pieces end."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.sources import files, json_stream
from lorakit.data.sources.json_stream import first_sign, items_of, parse
from lorakit.data.sources.locate import DataFile
from lorakit.errors import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def file_of(folder, data):
    path = folder / "a.json"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return DataFile(str(path), "a.json", ".json")


@given(st.lists(JSON, max_size=5), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_a_list_in_pieces_of_any_size_is_the_list(tmp_path_factory, items, size, indent, ascii):
    text = json.dumps(items, indent=indent, ensure_ascii=ascii)
    file = file_of(tmp_path_factory.getbasetemp(), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE", size)
        assert list(items_of(file)) == items


@pytest.mark.parametrize("size", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"a.json:2: column 7: .*Expecting ':'"),
        ('[{"a": 1},\n {"a": "x', r"a.json:2: .*the file ends inside item 2"),
        ('[{"a": 1},\n {"a": 2}', r"a.json:2: column 10: .*breaks off after item 2"),
        ('[{"a": 1}\n {"a": 2}]', r"a.json:2: column 2: .*no comma after item 1"),
        ('[{"a": 1}]\n[]', r"a.json:2: column 1: .*Extra data"),
        ('[{"a": 1},]', r"a.json:1: column 11: .*Expecting value"),
    ],
)
def test_a_fault_has_the_same_place_however_the_file_is_read(
    tmp_path, monkeypatch, size, text, message
):
    monkeypatch.setattr(files, "PIECE", size)
    with pytest.raises(DataError, match=message):
        list(items_of(file_of(tmp_path, text)))


def test_a_long_list_takes_the_memory_of_a_few_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 2**14)
    file = file_of(tmp_path, json.dumps([{"a": "x" * 1000}] * 8_000))
    tracemalloc.start()
    assert sum(1 for _ in items_of(file)) == 8_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < 8_000 * 1000


def test_a_line_longer_than_a_row_may_be_is_no_fault_of_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    monkeypatch.setattr(json_stream, "LONGEST_LINE", 1000)
    assert len(list(items_of(file_of(tmp_path, json.dumps([{"a": "x" * 90}] * 50))))) == 50
    with pytest.raises(DataError, match="Unterminated string"):
        list(items_of(file_of(tmp_path, '[{"a": "' + "x" * 2**22)))


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("<!DOCTYPE html><html>", "web page"),
        ("{'a': 1}", "json.dumps"),
        ('{"a": None}', "json.dumps"),
        ('{"a": 1,}', "comma before }"),
        ('{"a": 1}\r{"a": 2}\r', "tr '\\\\r'"),
        ('{\n"a": 1}\n{"a": 2}', "jq -c"),
        ('{"a" 1}', "sed -n 1p"),
    ],
)
def test_common_faults_come_with_what_to_do(tmp_path, text, advice):
    with pytest.raises(DataError) as caught:
        parse(text, file_of(tmp_path, text), 1, last=False)
    assert advice.replace("\\\\", "\\") in caught.value.hint


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        (" \n [1]", "["),
        ("\ufeff{}", "{"),
        (" \n", ""),
        (b'{"a": "\xe9"}', "{"),
        (b" \xe9", "\ufffd"),
    ],
)
def test_the_first_sign_is_no_blank(tmp_path, text, sign):
    assert first_sign(file_of(tmp_path, text)) == sign


def test_a_comma_after_the_last_item_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a.json:1: column 11: ") as caught:
        list(items_of(file_of(tmp_path, '[{"a": 1},]')))
    assert caught.value.hint == "remove the comma before ]"
