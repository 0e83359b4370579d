"""Every row arrives unchanged and numbered; a damaged file is named with its line."""

import gzip
import json
import re
import shutil
import subprocess
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.data.sources.locate import SUFFIXES
from lorakit.data.sources.readers import read_rows
from lorakit.errors import DataError, LorakitError
from lorakit.types import Row


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def rows_or_message(source):
    """What a user gets: rows, or the message of a LorakitError; anything else is a bug."""
    try:
        return list(read_rows(source)), ""
    except LorakitError as error:
        return [], error.message


def values(source):
    return [row.values for row in read_rows(source)]


def test_jsonl_rows_keep_their_text_and_line_numbers(tmp_path):
    text = '{"q": "when?", "a": "2021-05-03"}\n\n{"q": "line\u2028sep", "a": "NA"}\r\n'
    rows = list(read_rows(write(tmp_path, "a.jsonl", text)))
    assert [r.values["a"] for r in rows] == ["2021-05-03", "NA"]
    assert rows[1].values["q"] == "line\u2028sep"
    assert [str(r.origin) for r in rows] == ["a.jsonl:1", "a.jsonl:3"]


def test_csv_cells_stay_text(tmp_path):
    text = 'q,a\nx,NA\ny,None\n"two\nlines","say ""hi"""\nd,2021-05-03\n'
    rows = list(read_rows(write(tmp_path, "a.csv", text)))
    assert [r.values["a"] for r in rows] == ["NA", "None", 'say "hi"', "2021-05-03"]
    assert [r.origin.row for r in rows] == [2, 3, 4, 6]


def test_the_nameless_index_column_of_pandas_is_no_fault(tmp_path):
    assert values(write(tmp_path, "a.csv", ",q,a\n0,x,y\n"))[0]["a"] == "y"


@pytest.mark.parametrize(("name", "sep"), [("a.tsv", "\t"), ("a.csv", ";")])
def test_the_separator_of_a_table_is_found(tmp_path, name, sep):
    assert values(write(tmp_path, name, f"q{sep}a\nx, y{sep}1\n")) == [{"q": "x, y", "a": "1"}]


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": "1"}, {"a": "2"}]',
        '[\n  {"a": "1"},\n  {"a": "2"}\n]\n',
        '{"data": [{"a": "1"}, {"a": "2"}]}',
        '{"version": "3",\n "data": [\n{"a": "1"}, {"a": "2"}]}',
        '{"a": "1"}\n{"a": "2"}\n',
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_arrays_wrappers_and_lines_are_told_apart_by_content(tmp_path, name, text):
    if name == "a.jsonl" and "data" in text:
        pytest.skip("a wrapper in .jsonl is one row, or a broken line")
    rows = list(read_rows(write(tmp_path, name, text)))
    assert [r.values for r in rows] == [{"a": "1"}, {"a": "2"}]
    assert [r.origin.row for r in rows] == [1, 2]


def test_a_lone_chat_object_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert values(write(tmp_path, "a.json", json.dumps(row, indent=1))) == [row]


def test_bom_and_gzip_are_accepted(tmp_path):
    line = b'\xef\xbb\xbf{"a": "1"}\n'
    assert values(write(tmp_path, "a.jsonl", line)) == [{"a": "1"}]
    assert values(write(tmp_path, "a.jsonl.gz", gzip.compress(line, mtime=0))) == [{"a": "1"}]


def test_a_text_file_is_one_row(tmp_path):
    assert values(write(tmp_path, "a.md", "# Title\n\nText")) == [{"text": "# Title\n\nText"}]


def test_parquet_goes_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"q": ["x", "y"], "a": ["NA", None]}).to_parquet(str(path))
    rows = list(read_rows(str(path)))
    assert [r.values for r in rows] == [{"q": "x", "a": "NA"}, {"q": "y", "a": None}]
    assert [str(r.origin) for r in rows] == ["a.parquet:1", "a.parquet:2"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl:2: column \d+: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n{"a": "cut', r"a.jsonl:2: .*the last line is cut off"),
        ("a.jsonl", '{"a": 1}\n{"a": 2', r"a.jsonl:2: .*the last line is cut off"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a.jsonl:2: a list where an object"),
        ("a.jsonl", '"x"\n{"a": 1}\n', r"a.jsonl:1: a text where an object"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", "the file is empty"),
        ("a.jsonl", "\n \n", "only blank lines"),
        ("a.jsonl", b'{"a": "\xe9"}\n', r"a.jsonl:1: not UTF-8: byte 0xe9 at offset 7"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a.jsonl:2: not UTF-8: byte 0xe9 at offset 16"),
        ("a.jsonl", '{"a": "1"}\n'.encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.txt", b"\xff\xfe\x00\xd8a\x00", "damaged UTF-16 text"),
        ("a.jsonl", '[{"a": 1}]\n[{"a": 2}]', r"a.jsonl:2: column 1: .*Extra data"),
        ("a.jsonl", '{"a":' * 100_000, "nested too deeply"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}\n", "a.jsonl:1: not valid JSON"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a.json:2: column 7"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', 'a.jsonl:2: the key "a" has two values'),
        ("a.json", '[{"a": 1},\n {"b": {"a": 1, "a": 2}}]', 'item 2: the key "a" has two values'),
        ("a.json", '{"rows": [\n{"a": 1, "a": 2}]}', '^a.json: the key "a" has two values: 1 and'),
        ("a.json", "[]", "an empty list"),
        ("a.json", '[{"a": 1}, 3]', "item 2 is a number"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of rows"),
        ("a.csv", "q,a\n1,2\n1,2,3\n", r"a.csv:3: 3 cells where the header has 2"),
        ("a.csv", 'q,a\n1,"x"y\n', r"a.csv:2: not valid CSV"),
        ("a.csv", 'q,a\n1,2\n"x,\n3,4\n', r"a.csv:3: not valid CSV"),
        ("a.csv", "q,q\n1,2\n", "the column 'q' twice"),
        ("a.csv", "q,a\n", r"a header \(q, a\) and no rows"),
        ("a.csv.gz", gzip.compress(b"q,a\n1,2\n" * 99, mtime=0)[:-9], "gzip file is damaged"),
        ("a.parquet", b"PAR1 and no more", "not a readable Parquet file"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(write(tmp_path, name, data)))


GOOD = b'{"a": "1"}\n'


def test_every_broken_line_of_a_file_is_named_at_once(tmp_path):
    lines = [
        GOOD,
        b'{"a" 1}\n',
        GOOD,
        b"[1]\n",
        b'{"a": "\xe9"}\n',
        b"\n",
        b"{'a': 1}\n",
        b'{"a": "c',
    ]
    source, read = write(tmp_path, "a.jsonl", b"".join(lines)), []
    with pytest.raises(DataError) as caught:
        read.extend(row.origin.row for row in read_rows(source))
    assert read == [1], "no row follows a broken line"
    head, *faults = caught.value.message.splitlines()
    assert head == "a.jsonl: 5 faults:"
    expected = ["2: column 6: not", "4: a list", "5: not UTF-8", "7: column 2: not", "8: column 7"]
    for told, begin in zip(faults, expected, strict=True):
        assert told.startswith(f"  a.jsonl:{begin}")
    assert "the last line is cut off" in faults[-1]
    assert f"sed -n 2p {tmp_path}/a.jsonl" in caught.value.hint
    assert "iconv" in caught.value.hint


def test_ten_faults_are_shown_and_the_others_counted_without_keeping_them(tmp_path):
    line = b"x" * 10_000 + b"\n"
    source = write(tmp_path, "a.jsonl", GOOD * 3 + line * 2_000 + GOOD)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        values(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    faults = caught.value.message.splitlines()[1:]
    assert [f.split(":")[1] for f in faults[:10]] == [str(n) for n in range(4, 14)]
    assert faults[10:] == ["  and 1,990 more"]
    # The file is 20 MB; a piece of it, 1 MiB, is read for the first sign.
    assert peak < 5 * 2**20


def test_the_lines_that_were_broken_are_not_lost_where_the_file_breaks_off(tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.data.sources.files.LONGEST_LINE", 100)
    lines = b"x\n" * 12 + GOOD + b"y" * 200 + b"\n" + b"x\n"
    with pytest.raises(DataError) as caught:
        values(write(tmp_path, "a.jsonl", lines))
    head, *faults = caught.value.message.splitlines()
    assert head == "a.jsonl: 13 faults:"
    assert faults[10] == "  and 2 more"
    assert faults[11].startswith("  a.jsonl:14: a line of more than")


def test_every_item_of_a_list_that_is_no_object_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        values(write(tmp_path, "a.json", '[{"a": 1}, 3, {"a": 2}, "x", null]'))
    assert [line.split(",")[0] for line in caught.value.message.splitlines()] == [
        "a.json: 3 faults:",
        "  a.json: item 2 is a number",
        "  a.json: item 4 is a text",
        "  a.json: item 5 is null",
    ]


def test_every_ragged_row_of_a_table_is_named_up_to_a_broken_quote(tmp_path):
    text = b'q,a\n1,2\n1,2,3\n\xe9,2\n"a\nb",2\n1\n1,"x"y\n1\n'
    with pytest.raises(DataError) as caught:
        values(write(tmp_path, "a.csv", text))
    head, *faults = caught.value.message.splitlines()
    assert head == "a.csv: 4 faults:"
    expected = ["3: 3 cells where", "4: not UTF-8", "7: 1 cells where", "8: not valid CSV"]
    for told, begin in zip(faults, expected, strict=True):
        assert told.startswith(f"  a.csv:{begin}")


@pytest.mark.parametrize("tail", [b"", b'\n {"a": "2"}]}'])
def test_one_object_that_is_not_utf8_has_one_fault(tmp_path, tail):
    with pytest.raises(DataError) as caught:
        values(write(tmp_path, "a.json", b'{"data": [{"a": "\xe9"},' + tail))
    assert caught.value.message == "a.json:1: not UTF-8: byte 0xe9 at offset 17 of the file"


@pytest.mark.parametrize(
    ("encoding", "data"),
    [("UTF-16BE", "more".encode("utf-16-be")), ("WINDOWS-1252", "a © b".encode("latin-1"))],
)
def test_not_utf8_says_how_to_convert(tmp_path, encoding, data):
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, "a.txt", data)))
    assert caught.value.hint == (
        f"convert it: iconv -f {encoding} -t UTF-8 {tmp_path}/a.txt > utf8-a.txt"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding, name):
    text = {"a.jsonl": '{"a": "é\U0001f600"}\n', "a.json": '[{"a": "é\U0001f600"}]',
            "a.csv": "a\né\U0001f600\n", "a.txt": "é\U0001f600"}[name]  # fmt: skip
    (row,) = values(write(tmp_path, name, text.encode(encoding)))
    assert row == {("text" if name == "a.txt" else "a"): "é\U0001f600"}


def test_a_zip_bomb_stops_at_the_longest_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.data.sources.files.LONGEST_LINE", 2**20)
    bomb = gzip.compress(b"a" * 2**24, mtime=0)
    assert len(bomb) < 20_000
    with pytest.raises(DataError, match=r"a.jsonl.gz:1: a line of more than 1 MiB"):
        list(read_rows(write(tmp_path, "a.jsonl.gz", bomb)))


def test_a_row_of_ten_megabytes_is_read(tmp_path):
    long = "word " * 2_000_000
    assert values(write(tmp_path, "a.jsonl", json.dumps({"a": long}) + "\n")) == [{"a": long}]
    assert values(write(tmp_path, "a.csv", f"a,b\n{long},1\n"))[0]["a"] == long


def test_an_unreachable_hub_is_a_data_error():
    with pytest.raises(
        DataError, match=r"nobody/nothing: no such file or folder here, and the hub"
    ):
        list(read_rows("nobody/nothing"))


def test_offline_fetches_no_address():
    with pytest.raises(DataError, match="cannot be fetched offline"):
        list(read_rows("https://example.org/a.jsonl", offline=True))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    suffix=st.sampled_from([s for s in SUFFIXES if s != ".parquet"]),
    data=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.lists(
            st.sampled_from(['{"a": ', '"x"', "}", "[", "]", ",", "\n", '"', "é", "\r", "NA", "1"])
        ).map(lambda parts: "".join(parts).encode()),
        st.binary(max_size=100).map(gzip.compress),
    ),
)
def test_random_bytes_give_rows_or_one_clear_error(tmp_path_factory, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data)
    rows, message = rows_or_message(str(path))
    assert rows or "fuzz" in message
    assert all(isinstance(row, Row) for row in rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), min_size=1))
def test_what_is_written_as_jsonl_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    assert values(str(path)) == rows


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "sep=|\r\nq|a\r\n1, x|2\r\n"),
        ("a.csv", "q;a;;;\r\n1, x;2;;;\r\n;;;;\r\n"),
        ("a.csv", 'q,a\r"1, x",2\r'),
        ("a.csv", 'q, a\n"1, x", "2"\n'),
        ("a.tsv", "q|a\n1, x|2\n"),
        ("a.txt", '{"q": "1, x", "a": "2"}\n'),
        ("a.csv", '[{"q": "1, x", "a": "2"}]'),
    ],
)
def test_a_table_is_read_as_its_program_wrote_it(tmp_path, name, text):
    assert [row.values for row in read_rows(write(tmp_path, name, text))] == [
        {"q": "1, x", "a": "2"}
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"Boats 2024,\nq,a\n1,2\n", "a title .Boats 2024. above the names"),
        (b"PK\x03\x04\x14\x00\x06\x00", "a ZIP archive or an Excel workbook, not .csv"),
        (b"SQLite format 3\x00", "an SQLite database"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(write(tmp_path, "a.csv", data)))


@pytest.mark.parametrize(
    ("codec", "text"),
    [("gb18030", "船在港口"), ("euc_kr", "항구에서"), ("cp1251", "Где спят"), ("cp932", "港です")],
)
def test_the_right_reading_of_another_encoding_is_shown(tmp_path, codec, text):
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, "a.txt", text.encode(codec))))
    assert f": {text}" in caught.value.hint


def test_several_lists_of_rows_are_named(tmp_path):
    data = json.dumps({"authors": [{"text": "Ada"}], "rows": [{"q": "1"}, {"q": "2"}], "v": 1})
    with pytest.raises(DataError, match=r"several lists of rows .*authors \(1\), rows \(2\)"):
        list(read_rows(write(tmp_path, "a.json", data)))


JSON_FORMS = {
    "a comma after each line": ('{"q": 1},\n{"q": 2},\n', "sed 's/, *$//' "),
    "comments": ('// mine\n[\n{"q": 1} // first\n]\n', "begins with // or #"),
    "comments of Python": ('# mine\n{"q": 1}\n', "begins with // or #"),
    "rows over several lines": ('{\n"q": 1\n}\n{\n"q": 2\n}\n', "jq -c . "),
    "one row over several lines": ('{\n"q": 1\n}\n', "jq -c . "),
    "JSON in a text": ('"{\\"q\\": 1}"\n"{\\"q\\": 2}"\n', "jq -c fromjson "),
    "lists of turns": ('[{"role": "user"}]\n[{"role": "user"}]\n', "jq -c '{messages: .}' "),
    "a list of them": ('[[{"role": "user"}], [{"role": "user"}]]', "jq -c '.[] | {messages: .}' "),
    "pandas by column": ('{"q": {"0": "a", "1": "b"}, "a": {"0": "c", "1": "d"}}', "'records'"),
    "pandas by index": ('{"0": {"q": "a"}, "1": {"q": "b"}}', "jq -c '.[]' "),
    "quotes of a word processor": ("{“q”: “a”}\n{“q”: “b”}\n", "sed 's/[“”„]/\"/g' "),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_as_hands_and_editors_make_it_is_named_with_a_command_that_works(tmp_path, form):
    text, advice = JSON_FORMS[form]
    path = tmp_path / ("rows.json" if "pandas" in form else "rows.jsonl")
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path)))
    assert advice in caught.value.hint
    command = re.search(r"(sed|jq) .*", caught.value.hint)
    if command and shutil.which(command[1]):
        done = subprocess.run(command[0], shell=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
        rows = list(read_rows(str(tmp_path / "rows_fixed.jsonl")))
        assert len(rows) == (1 if form.startswith("one") else 2)
    assert path.read_text() == text
