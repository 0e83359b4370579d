"""Training from the command line: one clear error and no traceback for bad input."""

import json

import pytest


def test_train_prints_one_json_object(lorakit, tiny_model_dir, tiny_data):
    words = ["train", "--model", tiny_model_dir, "--data", tiny_data, "--output", "r", "--json"]
    for pair in ("max_steps=2", "cutoff_len=64", "val_size=3"):
        words += ["--set", pair]
    code, out, err = lorakit(*words)
    assert code == 0, err
    value = json.loads(out)
    assert (value["run"], value["steps"]) == ("r", 2)


def _write(path, text):
    path.write_text(text, encoding="utf-8") if isinstance(text, str) else path.write_bytes(text)
    return path


BAD_DATA = {
    "missing": (None, "no such file"),
    "empty": ("", "empty"),
    "not UTF-8": (b'{"question": "a", "answer": "caf\xe9"}\n', "UTF-8"),
    "broken line": ('{"question": "a", "answer": "b"}\n{"question": "a", "ans\n', "x.jsonl:2"),
    "unknown columns": ('{"foo": "a", "bar": "b"}\n', "columns"),
    "empty answers": ('{"question": "a", "answer": ""}\n' * 3, "x.jsonl"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_clear_error(lorakit, tmp_path, tiny_model_dir, case):
    text, expected = BAD_DATA[case]
    path = tmp_path / "x.jsonl"
    if text is not None:
        _write(path, text)
    code, out, err = lorakit("train", "--model", tiny_model_dir, "--data", path, "--output", "r")
    assert code == 2
    assert out == ""
    assert expected in err
    assert "error: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


def test_bad_models_and_recipes_are_one_clear_error(lorakit, tmp_path, tiny_data):
    (tmp_path / "folder").mkdir()
    cases = [
        (["--model", "./none"], "no such folder"),
        (["--model", tmp_path / "folder"], "no config.json"),
        (["--model", "org/none", "--offline"], "hub"),
        (["--model", "demo", "--set", "lora_rank=3"], "did you mean lora_r?"),
        (["--model", "demo", "--set", "lora_r=0"], "greater than or equal to 1"),
        (["--model", "demo", "--method", "full"], "'lora' or 'qlora'"),
    ]
    for words, expected in cases:
        code, _, err = lorakit("train", *words, "--data", tiny_data, "--output", "r")
        assert code == 2, words
        assert expected in err, err
        assert "hint: " in err
        assert "Traceback" not in err


def test_a_run_is_never_overwritten(lorakit, finish, tiny_model_dir, tiny_data):
    run = finish().run.path
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    code, _, err = lorakit("train", "--model", tiny_model_dir, "--data", tiny_data, "--output", run)
    assert code == 2
    assert "--resume" in err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_run_that_cannot_fit_is_refused_unless_forced(lorakit, tiny_model_dir, tiny_data):
    words = ("train", "--model", tiny_model_dir, "--data", tiny_data, "--offline", "--output", "r")
    sets = ("--set", "memory_limit=200MiB", "--set", "max_steps=1", "--set", "val_size=0")
    code, _, err = lorakit(*words, *sets)
    assert code == 1
    assert "memory_limit is 200MiB: it does not fit" in err
    assert "--force" in err
    code, _, err = lorakit(*words, *sets, "--force")
    assert code == 0, err
    with open("r/plan.json") as file:
        plan = json.load(file)
    assert plan["tokens_per_second"] > 0
    assert not plan["fits"]
