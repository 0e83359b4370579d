"""Tasks are scored during training, and the best step follows their metric."""

import json

import pytest
from rich.console import Console

from lorakit.errors import LorakitError, RecipeError
from lorakit.evaluation.file_task import FileTask
from lorakit.evaluation.training_scores import TrainingScorer, metric_key
from lorakit.model.load import load_run
from lorakit.pipeline import fit, prepare_run
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.storage.best_record import best_step
from lorakit.storage.run_dir import read_metrics

QUIET = Console(quiet=True, stderr=True)


pytestmark = pytest.mark.usefixtures("own_tasks_only")


@pytest.fixture
def resolved(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    def make(name="run", **values):
        task = {"task": str(tiny_data), "limit": 3, "metrics": ["contains"], "max_new_tokens": 4}
        values = {"eval_tasks": [task, "general:4"], "eval_every": 2, **values}
        return tiny_recipe(tiny_model_dir, tiny_data, tmp_path / name, **values)

    return make


def test_scores_are_logged_and_the_end_has_before_and_after(resolved):
    outcome = fit(resolved(), QUIET)
    rows = read_metrics(outcome.run, held_out=True)
    assert [row["step"] for row in rows] == [2, 4, 6]
    keys = {
        "eval_colors_contains",
        "eval_general_skills_accuracy",
        "eval_general_skills_probability",
    }
    assert all(keys <= set(row) for row in rows)
    value = json.loads(outcome.run.eval.read_text())
    assert {(s["task"], s["metric"]) for s in value["tasks"]} == {
        ("colors", "contains"),
        ("general skills", "accuracy"),
        ("general skills", "probability"),
    }
    last = next(s for s in value["tasks"] if s["metric"] == "probability")
    assert last["tuned"] == pytest.approx(rows[-1]["eval_general_skills_probability"], abs=1e-4)
    # The run's own recipe finds the file from the run's folder.
    saved = load_recipe(outcome.run.recipe).recipe.eval_tasks[0]
    assert (outcome.run.path / saved.task).exists()


def test_scoring_changes_no_step(resolved):
    scored = fit(resolved("scored", lora_dropout=0.1), QUIET)
    plain = fit(resolved("plain", lora_dropout=0.1, eval_tasks=[], eval_every=None), QUIET)
    losses = [[row["loss"] for row in read_metrics(each.run)] for each in (scored, plain)]
    assert losses[0] == losses[1]
    files = [each.run.adapter / "adapter_model.safetensors" for each in (scored, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_best_step_follows_any_metric(resolved):
    key = "eval_general_skills_probability"
    outcome = fit(resolved(metric_for_best_model=key, load_best_model_at_end=True), QUIET)
    values = {row["step"]: row[key] for row in read_metrics(outcome.run, held_out=True)}
    best = max(values, key=values.get)
    found = best_step(outcome.run)
    assert (found.step, found.metric) == (best, key)
    assert found.value == pytest.approx(values[best])
    assert key in found.describe()
    assert f"best {key}" in outcome.run.report.read_text()


def test_a_metric_that_no_task_gives_is_refused_before_the_base_is_loaded(resolved):
    values = {"metric_for_best_model": "eval_color_contains", "load_best_model_at_end": True}
    with pytest.raises(RecipeError, match=r"did you mean eval_colors_contains\?"):
        prepare_run(resolved(**values), QUIET)
    with pytest.raises(RecipeError, match="eval_tasks: needs eval_every"):
        prepare_run(resolved(eval_every=None), QUIET)
    with pytest.raises(RecipeError, match="nonsense: no such task"):
        prepare_run(resolved(eval_tasks=["nonsense"]), QUIET)
    with pytest.raises(LorakitError, match="eval_tasks: gone: task gone: its data"):
        prepare_run(resolved(eval_tasks=["gone"]), QUIET)


def test_a_task_that_fails_in_training_is_noted_and_is_no_improvement(
    finish, tiny_data, monkeypatch
):
    loaded = load_run(finish().run)
    notes = []
    recipe = Recipe(model="m", data="d", eval_tasks=[f"{tiny_data}:2", "general:2"])
    scorer = TrainingScorer(recipe, loaded.tokenizer, [], notes.append)

    def fails(self, side):
        raise LorakitError("out of memory")

    monkeypatch.setattr(FileTask, "run", fails)
    found = scorer.score(loaded.model)
    assert set(found) == set(scorer.directions)
    assert found["eval_colors_contains"] == float("-inf")
    assert found["eval_general_skills_accuracy"] >= 0
    assert notes == ["eval_tasks: colors was not scored: out of memory"]


def test_names_of_metrics():
    assert (
        metric_key("gsm8k", "exact_match (strict-match)") == "eval_gsm8k_exact_match_strict_match"
    )
