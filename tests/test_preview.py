"""The dry run shows origins, plan and marked examples; the end shows where everything lies."""

import io
import json
import sys
from dataclasses import replace

from rich.console import Console

from lorakit.pipeline import TrainResult, prepare_run
from lorakit.results import program, show_outcome, show_prologue
from lorakit.storage.run_dir import RunDir


def test_dry_run_shows_recipe_plan_and_examples(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    start = prepare_run(tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "r"), Console(quiet=True))
    console = Console(record=True, width=140, file=io.StringIO())
    show_prologue(start, console, as_json=False)
    text = console.export_text()
    assert "flag --model" in text
    assert "derived: model family llama" in text
    assert "frozen weights" in text
    assert text.count("⟦It is ") == 3
    assert "<|im_end|>⟧" in text
    stream = io.StringIO()
    show_prologue(start, Console(file=stream), as_json=True)
    value = json.loads(stream.getvalue())
    assert value["recipe"]["lora_r"] == 16
    assert value["plan"]["total_bytes"] > 0


def test_outcome_names_the_next_commands(finish):
    console = Console(record=True, width=100, file=io.StringIO())
    outcome = finish()
    show_outcome(outcome, console, next_steps=True)
    text = console.export_text()
    for command in ("chat", "eval", "export"):
        assert f"lorakit {command} {outcome.run.path}" in text


def test_an_adapter_that_engines_cannot_use_is_not_recommended_for_them(finish):
    console = Console(record=True, width=200, file=io.StringIO())
    assert finish().unfit is None
    unfit = replace(finish(), unfit="the base's config.json names Other")
    show_outcome(unfit, console, next_steps=True)
    text = console.export_text()
    assert "only for AutoModelForCausalLM and lorakit: the base's config.json names Other" in text
    assert "--to gguf" in text
    assert "--to merged" not in text


def test_a_stopped_run_says_how_to_go_on(tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    show_outcome(TrainResult(RunDir(tmp_path), 7, 1.0, 1.0, None, 130), console, next_steps=True)
    assert f"lorakit train {tmp_path}/recipe.yaml --resume\n" in console.export_text()
    of_two = TrainResult(RunDir(tmp_path), 7, 1.0, 1.0, None, 130, ranks=2)
    show_outcome(of_two, console, next_steps=True)
    assert f"lorakit train {tmp_path}/recipe.yaml --resume --gpus 2\n" in console.export_text()


def test_commands_are_shown_as_they_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "lorakit")])
    monkeypatch.setenv("PATH", "")
    assert program() == ".venv/bin/lorakit"
    monkeypatch.setattr(sys, "argv", ["/x/pytest"])
    assert program() == "lorakit"
