"""Answers are kept batch by batch and found again; a torn line costs its row alone."""

import json

import pytest

from lorakit.errors import WorkError
from lorakit.evaluation.answer_store import AnswerStore, file_name, request_keys


def test_answers_are_found_again(tmp_path):
    path = tmp_path / "new" / "task.jsonl"
    store = AnswerStore(path)
    store.add(["a", "b"], ["one", [1.5, True]])
    store.add(["c"], ["drei ü"])
    assert AnswerStore(path).answers == {"a": "one", "b": [1.5, True], "c": "drei ü"}


def test_a_torn_last_line_is_asked_again_and_spoils_no_other(tmp_path):
    path = tmp_path / "task.jsonl"
    AnswerStore(path).add(["a", "b"], ["one", "two"])
    path.write_bytes(path.read_bytes()[:-4])
    store = AnswerStore(path)
    assert store.answers == {"a": "one"}
    store.add(["b"], ["two"])
    assert AnswerStore(path).answers == {"a": "one", "b": "two"}


def test_keys_depend_on_all_that_is_asked_and_equal_requests_are_numbered():
    keys = request_keys("generate", [[1, 2], [3], [1, 2]], {"tokens": 5})
    assert len(set(keys)) == 3
    assert keys == request_keys("generate", [[1, 2], [3], [1, 2]], {"tokens": 5})
    assert not set(keys) & set(request_keys("generate", [[1, 2], [3]], {"tokens": 6}))
    assert not set(keys) & set(request_keys("loglikelihood", [[1, 2], [3]], {"tokens": 5}))


def test_names_of_files_are_plain_and_different():
    assert file_name("gsm8k") == "gsm8k.jsonl"
    odd = [file_name(name) for name in ("../a b", "a/b", "...", "a:b")]
    assert len(set(odd)) == 4
    assert all("/" not in name and not name.startswith(".") for name in odd)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match=r"file"):
        AnswerStore(tmp_path / "file" / "task.jsonl").add(["a"], ["b"])


def test_no_secret_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abc123-secret-key")
    path = tmp_path / "task.jsonl"
    AnswerStore(path).add(["a"], ["it is abc123-secret-key"])
    assert json.loads(path.read_text())["answer"] == "it is ***"
