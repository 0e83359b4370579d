"""The command line: quick help, JSON on stdout, one clear error and no traceback for bad input."""

import json
import subprocess
import sys

import pytest

from lorakit import cli


def run_cli(monkeypatch, capsys, *words):
    """(exit code, stdout, stderr) of one command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def lorakit(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "log", cli.Console(stderr=True, highlight=False, soft_wrap=True))
    return lambda *words: run_cli(monkeypatch, capsys, *words)


def test_help_imports_no_heavy_library():
    code = (
        "import sys; sys.argv = ['lorakit', '--help']\n"
        "from lorakit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch','transformers','datasets','peft','trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")
    for command in (
        "demo",
        "train",
        "eval",
        "chat",
        "export",
        "serve",
        "inspect",
        "bench",
        "schema",
    ):
        assert f"  {command}" in done.stdout


def test_schema_is_json(lorakit):
    code, out, _ = lorakit("schema")
    assert code == 0
    assert json.loads(out)["title"] == "lorakit recipe"


def test_eval_and_export_print_one_json_object(lorakit, finish):
    run = finish(seed=3).run.path
    code, out, _ = lorakit("eval", run, "--json", "--samples", 1)
    value = json.loads(out)
    assert code == 0
    assert set(value) >= {"base", "tuned"}
    assert set(value["tuned"]) == {"loss", "perplexity", "tokens"}
    code, out, _ = lorakit("export", run, "--to", "merged", "--json")
    assert code == 0
    assert json.loads(out)["kl_per_token"] < 1e-3


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


def test_commands_on_a_folder_that_is_no_run(lorakit, tmp_path):
    for command in ("eval", "chat", "export", "serve"):
        code, _, err = lorakit(command, tmp_path)
        assert code == 2
        assert "not a lorakit run" in err
        code, _, err = lorakit(command, tmp_path / "none")
        assert "no such run directory" in err


def test_a_run_is_never_overwritten(lorakit, finish, tiny_model_dir, tiny_data):
    run = finish().run.path
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    code, _, err = lorakit("train", "--model", tiny_model_dir, "--data", tiny_data, "--output", run)
    assert code == 2
    assert "--resume" in err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_unknown_command_and_flag_are_usage_errors(lorakit):
    assert lorakit("tarin")[0] == 2
    assert lorakit("train", "--nope")[0] == 2
