"""Rows of a Python object become a file of JSON lines, or one message."""

import datetime
import json

import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

import lorakit
from lorakit.data.sources.python_rows import write_rows
from lorakit.errors import DataError

ROWS = [{"question": f"What color is box {i}?", "answer": "It is red."} for i in range(12)]


def test_all_kinds_of_rows_give_the_same_file(data_cache):
    kinds = [
        ROWS,
        Dataset.from_list(ROWS),
        IterableDataset.from_generator(lambda: iter(ROWS)),
        (row for row in ROWS),
    ]
    paths = {write_rows(rows, "train_dataset") for rows in kinds}
    assert len(paths) == 1
    (path,) = paths
    assert path.parent == data_cache
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    assert write_rows(ROWS[1:], "train_dataset") != path


def test_cells_of_other_libraries_are_plain_values(tmp_path, tiny_model_dir):
    rows = [
        {"question": np.str_(f"Box {i}?"), "answer": "Red.", "day": datetime.date(2026, 1, 2)}
        for i in range(4)
    ]
    found = lorakit.inspect(model=str(tiny_model_dir), train_dataset=rows, val_size=1)
    assert found.report.sources[0]["columns_not_used"] == ["day"]


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (DatasetDict({"train": Dataset.from_list(ROWS)}), "is a DatasetDict with the keys train"),
        ("rows.jsonl", "is a str, expected a dataset"),
        (7, "is a int, expected"),
        ([ROWS[0], "text"], "train_dataset:2: the row is a str, expected a dict"),
        ([{"question": "a", "answer": b"\x00"}], "train_dataset:1: column 'answer' has a bytes"),
        ([{"question": {(1, 2): 3}, "answer": "b"}], "train_dataset:1: column 'question': keys"),
    ],
)
def test_other_objects_than_rows_are_one_message(rows, fault, data_cache):
    before = set(data_cache.iterdir())
    with pytest.raises(DataError) as caught:
        write_rows(rows, "train_dataset")
    assert fault in caught.value.message
    assert set(data_cache.iterdir()) == before


def test_a_table_of_pandas_names_the_way():
    with pytest.raises(DataError) as caught:
        write_rows(pandas.DataFrame(ROWS), "train_dataset")
    assert caught.value.hint == "train_dataset=datasets.Dataset.from_pandas(table)"
