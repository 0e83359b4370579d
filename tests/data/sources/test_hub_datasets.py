"""Hub data sets: config, split and slice reach the library; what does not fit is streamed."""

import types

import pytest

from lorakit.data.sources.hub_datasets import read_hub
from lorakit.data.sources.locate import HubData
from lorakit.errors import DataError

ROWS = [{"q": "x"}, {"q": "y"}]


@pytest.fixture
def library(monkeypatch):
    """Calls of `load_dataset`, answered with rows; `size` is what the data set needs on disk."""
    import datasets

    made = types.SimpleNamespace(calls=[], size=10, answer=ROWS)

    def load(repo, config, split, streaming):
        made.calls.append((repo, config, split, streaming))
        return made.answer

    def builder(repo, config):
        info = types.SimpleNamespace(download_size=made.size, dataset_size=None)
        return types.SimpleNamespace(info=info)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return made


def test_rows_are_numbered_from_one(library):
    rows = list(read_hub(HubData("u/n", "main", "train[:10%]"), "u/n:main:train[:10%]", False))
    assert [(r.values, r.origin.row) for r in rows] == [({"q": "x"}, 1), ({"q": "y"}, 2)]
    assert library.calls == [("u/n", "main", "train[:10%]", False)]


def test_what_would_fill_the_disk_is_streamed(library):
    library.size = 10**18
    list(read_hub(HubData("u/n", None, "test"), "u/n:test", False))
    assert library.calls == [("u/n", None, "test", True)]


def test_without_a_split_train_is_taken_and_a_choice_is_asked_for(library):
    library.answer = {"train": ROWS, "test": []}
    assert len(list(read_hub(HubData("u/n"), "u/n", False))) == 2
    library.answer = {"a": ROWS, "b": []}
    with pytest.raises(DataError, match="several splits"):
        list(read_hub(HubData("u/n"), "u/n", False))
