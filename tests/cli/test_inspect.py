"""`lorakit inspect` needs no weights, says what is trained; its exit code is the verdict."""

import json
import re
import shutil
import sys

import pytest
from rich.console import Console

from lorakit.cli import inspect as before
from lorakit.cli import main


@pytest.fixture
def inspect(monkeypatch, capsys, tmp_path):
    """words -> (exit code, stdout, stderr) of `lorakit inspect`, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(before, "out", Console(highlight=False, width=100))
    for place in (main, before):
        monkeypatch.setattr(place, "log", Console(stderr=True, highlight=False, soft_wrap=True))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lorakit", "inspect", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def weightless(tiny_model_dir, tmp_path_factory):
    """The tiny model's folder without its weights."""
    folder = tmp_path_factory.mktemp("weightless") / "tiny"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_it_shows_tokens_lengths_and_verdict_without_weights(inspect, weightless, tiny_data):
    code, out, err = inspect(tiny_data, "--model", weightless)
    assert code == 0, err
    assert "⟦It is " in out
    assert "<|im_end|>⟧" in out
    assert "length of an example in tokens" in out
    assert out.rstrip().endswith("fit to train on")
    assert str(weightless.parent) not in out, "no path of this machine"


def test_json_is_one_object_with_what_train_would_report(
    inspect, weightless, tiny_data, tiny_recipe, tmp_path
):
    from rich.console import Console

    from lorakit.pipeline import prepare_run

    code, out, _ = inspect(tiny_data, "--model", weightless, "--json", "--set", "val_size=4")
    value = json.loads(out)
    assert code == 0
    resolved = tiny_recipe(weightless, tiny_data, tmp_path / "run", cutoff_len=2048)
    report = prepare_run(resolved, Console(quiet=True)).prepared.report
    assert value["report"] == json.loads(json.dumps(report.as_dict()))


def test_a_recipe_says_it_all_and_flags_come_on_top(inspect, weightless, tiny_data, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {weightless}\ndata: {tiny_data}\nsystem: Be terse.\n")
    _, out, _ = inspect(recipe, "--set", "cutoff_len=77", "--examples", 1)
    assert "Be terse." in out
    assert "cutoff_len 77" in out
    assert out.count("tokens trained\n") == 1


def test_html_is_written_too(inspect, weightless, tiny_data, tmp_path):
    code, out, err = inspect(tiny_data, "--model", weightless, "--html", "see/page.html", "--json")
    assert code == 0
    assert json.loads(out)["spoils"] is False
    page = (tmp_path / "see" / "page.html").read_text("utf-8")
    assert "It is " in re.sub("<[^>]*>", "", page)
    assert "see/page.html" in err


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_fault_that_would_spoil_a_run_is_exit_1_and_a_lesser_one_0(inspect, weightless, tmp_path):
    good = [{"question": f"{i}?", "answer": f"{i}"} for i in range(9)]
    data = write(tmp_path, *good, {"question": "x " * 90, "answer": "y"})
    words = ("--model", weightless, "--set", "cutoff_len=80")
    code, out, _ = inspect(data, *words)
    assert code == 0
    assert "fit to train on; 1 of 10 rows left out" in out
    code, out, _ = inspect(data, *words, "--set", "on_overlength=error")
    assert code == 1
    assert "a run would stop at this data: too long" in out
    assert "rows.jsonl:10" in out


def test_strict_makes_every_fault_one_that_stops_a_run(inspect, weightless, tmp_path):
    good = [{"question": f"{i}?", "answer": f"{i}"} for i in range(9)]
    data = write(tmp_path, *good, {"question": "x", "answer": None})
    code, out, _ = inspect(data, "--model", weightless, "--set", "strict=true")
    assert code == 1
    assert "a run would stop at this data: no answer (strict: true)" in out
    code, _, err = inspect(write(tmp_path, *good), "--model", weightless, "--set", "strict=true")
    assert code == 0, err


def test_when_every_row_would_spoil_a_run_it_is_exit_1_too(inspect, weightless, tmp_path):
    data = write(tmp_path, {"question": "x " * 90, "answer": "y"})
    words = ("--set", "cutoff_len=80", "--set", "on_overlength=error", "--set", "val_size=0")
    code, _, err = inspect(data, "--model", weightless, *words)
    assert code == 1
    assert "rows.jsonl:1: too long" in err
    assert "Traceback" not in err


def test_wrong_input_is_exit_2_and_one_clear_error(inspect, weightless, tiny_data, tmp_path):
    empty = write(tmp_path)
    cases = [
        (["none.jsonl", "--model", weightless], "none.jsonl"),
        ([empty, "--model", weightless], "empty"),
        ([tiny_data], "model: missing"),
        ([tiny_data, "--model", "./nowhere"], "no such folder"),
        (["none.yaml"], "no such recipe"),
        ([tiny_data, "--model", weightless, "--set", "cutof_len=3"], "did you mean cutoff_len"),
    ]
    for words, expected in cases:
        code, out, err = inspect(*words)
        assert (code, out) == (2, ""), words
        assert expected in err
        assert "Traceback" not in err


def test_a_broken_file_is_exit_2_and_one_error_with_all_its_lines(inspect, weightless, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question" 1}\n[]\n')
    code, out, err = inspect(path, "--model", weightless)
    assert (code, out, err.count("error:")) == (2, "", 1)
    assert "broken.jsonl:2: column 13: not valid JSON" in err
    assert "broken.jsonl:3: a list where an object {...} is expected" in err


def test_schema_is_json(lorakit):
    code, out, _ = lorakit("schema")
    assert code == 0
    assert json.loads(out)["title"] == "lorakit recipe"
