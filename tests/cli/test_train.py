"""Training from the command line: one clear error and no traceback for bad input."""

import io
import json
import shlex

import pytest
from rich.console import Console

from lorakit.api import finetune


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
        (["--model", "demo", "--set", "rank=3"], "did you mean lora_r?"),
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


STRANGE = "my run [x] :key: [/bold] it's $(touch pwned)"


def test_every_path_and_command_works_when_pasted(lorakit, tmp_path, tiny_model_dir, tiny_data):
    words = ["train", "--model", tiny_model_dir, "--data", tiny_data, "--output", STRANGE]
    for pair in ("max_steps=1", "cutoff_len=64", "val_size=2"):
        words += ["--set", pair]
    code, out, err = lorakit(*words)
    assert code == 0, err
    lines = out.splitlines()
    assert f"adapter  {STRANGE}/adapter  (PEFT format)" in lines
    assert f"metrics  {STRANGE}/metrics.jsonl" in lines
    commands = [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]
    assert [words[1:3] for words in commands] == [
        [verb, STRANGE] for verb in ("chat", "eval", "export")
    ]
    code, out, err = lorakit("report", STRANGE)
    assert code == 0, err
    assert out == f"{STRANGE}/report.html\n"
    code, out, err = lorakit("train", f"{STRANGE}/recipe.yaml", "--resume")
    assert code == 0, err
    assert f"resuming {STRANGE} from step 1" in err
    code, _, err = lorakit("export", STRANGE, "--to", "vllm")
    assert code == 0, err
    line = next(line for line in err.splitlines() if line.startswith("vLLM: "))
    words = shlex.split(line.removeprefix("vLLM: "))
    assert words[:2] == ["vllm", "serve"]
    assert f"{STRANGE}/export/vllm/chat_template.jinja" in words
    code, _, err = lorakit("chat", "[x]")
    assert "error: [x]: no such run directory" in err
    assert not (tmp_path / "pwned").exists()


def test_a_path_is_printed_literally_on_the_callers_console(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    recipe = tiny_recipe(tiny_model_dir, tiny_data, "[x] :key:", max_steps=1).recipe
    finetune(recipe, console=console)
    text = console.file.getvalue()
    assert "adapter  [x] :key:/adapter" in text
    console.print("[bold]again[/bold]")
    assert console.file.getvalue().endswith("again\n")


def test_keys_may_be_words_and_options(lorakit, tmp_path, tiny_model_dir, tiny_data):
    (tmp_path / "my.yaml").write_text(f"model: {tiny_model_dir}\ndata: {tiny_data}\nlora_r: 2\n")
    forms = [
        ["my.yaml", "lr=3e-4", "--lora-alpha", "8", "--lora.lora_bias", "--dry-run"],
        ["--learning-rate=3e-4", "my.yaml", "lora_alpha=8", "--lora.lora_bias=true", "--dry-run"],
        ["my.yaml", "--set", "lr=3e-4", "alpha=8", "lora.lora_bias=true", "--dry-run"],
        ["--dry-run", "lr=3e-4", "alpha=8", "lora.lora_bias=true", "my.yaml"],
    ]
    for words in forms:
        code, out, err = lorakit("train", *words, "--json", "--offline")
        assert code == 0, err
        recipe = json.loads(out)["recipe"]
        found = [recipe[key] for key in ("lora_r", "learning_rate", "lora_alpha", "lora")]
        assert found == [2, 3e-4, 8, {"lora_bias": True}], words
    code, out, _ = lorakit("plan", "my.yaml", "lora_r=4", "--gpu", "t4", "--json")
    assert code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resme"], "No such option: --resme Did you mean --resume?"),
        (["--lorar", "3"], "No such option: --lorar"),
        (["a.yaml", "b.yaml"], "Got unexpected argument b.yaml, expected key=value"),
        (["--model", "demo", "--data", "demo", "--lora-r", "x"], "lora_r: input should be a valid"),
        (["none.yaml", "lora_r=3"], "none.yaml: no such recipe"),
    ],
)
def test_a_word_that_is_no_key_is_one_message(lorakit, words, said):
    code, _, err = lorakit("train", *words)
    assert code == 2
    assert said in err


def test_other_names_of_commands(lorakit, tiny_model_dir, tiny_data):
    words = ["--model", tiny_model_dir, "--data", tiny_data, "--dry-run", "--json"]
    code, out, _ = lorakit("sft", *words)
    assert (code, json.loads(out)["recipe"]["model"]) == (0, str(tiny_model_dir))
    code, _, err = lorakit("merge", "none")
    assert (code, "no such run" in err) == (2, True)
    _, out, _ = lorakit("--help")
    assert "sft" not in out
