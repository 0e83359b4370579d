"""Tasks of lm-eval by name: paired by document, groups pooled, what is missing is named."""

import sys
from types import SimpleNamespace

import pytest

from lorakit.errors import DataError, DependencyError, RecipeError
from lorakit.evaluation import harness_tasks
from lorakit.evaluation.harness_tasks import HarnessTask, check_name, task_manager
from lorakit.evaluation.model_side import ModelSide
from lorakit.evaluation.task_rows import paired_scores
from lorakit.inference.generate import base_answers
from lorakit.model.load import load_run


@pytest.fixture(scope="module")
def loaded(speaker):
    return load_run(speaker("fruit"))


def both(task, loaded, notes=print):
    tuned = task.run(ModelSide(loaded.model, loaded.tokenizer))
    with base_answers(loaded.model):
        base = task.run(ModelSide(loaded.model, loaded.tokenizer))
    return {score.metric: score for score in paired_scores(base, tuned, notes)}


def test_before_and_after_by_document(loaded, manager):
    task = HarnessTask("boxes", manager, limit=4)
    found = both(task, loaded)
    assert set(found) == set(task.metric_directions())
    # The tuned talker's first word is the right one; base says a color.
    first = found["exact_match (first-word)"]
    assert (first.task, first.rows, first.base, first.tuned) == ("boxes", 4, 0.0, 1.0)
    assert (first.low, first.high) == (1.0, 1.0)
    assert found["exact_match (all-words)"].tuned == 0.0


def test_a_second_run_of_the_task_asks_the_same(loaded, manager):
    """The few-shot examples are drawn anew from the same seed for each model."""
    task = HarnessTask("boxes_shots", manager)
    prompts = []

    class Watch(ModelSide):
        def generate(self, given, *more):
            prompts.append(given)
            return ["apple"] * len(given)

    for _ in range(2):
        task.run(Watch(loaded.model, loaded.tokenizer))
    assert prompts[0] == prompts[1]
    assert len({len(prompt) for prompt in prompts[0]}) >= 1


def test_a_group_is_one_score_over_all_its_documents(loaded, manager):
    found = both(HarnessTask("both", manager), loaded)
    assert {score.task for score in found.values()} == {"both"}
    assert found["acc"].rows == 10


def test_a_metric_that_raises_on_a_document_costs_that_document_alone(loaded, manager):
    task = HarnessTask("colors", manager)
    inner = task.loaded["tasks"]["colors"]
    original = inner.process_results.__wrapped__

    def broken(doc, results):
        if doc["digit"] == "3":
            raise KeyError("odd")
        return original(doc, results)

    inner.process_results = broken
    inner.process_results = harness_tasks._guarded(inner)
    notes = []
    found = both(task, loaded, notes.append)
    assert (found["acc"].rows, found["acc"].failed) == (4, 1)
    assert "acc failed on 1 of 5 rows" in notes[0]
    assert "colors document 1: KeyError: 'odd'" in notes[0]
    inner.process_results = lambda doc, results: {}["all"]
    inner.process_results = harness_tasks._guarded(inner)
    assert both(task, loaded, notes.append) == {}
    assert "failed on 5 of 5 rows" in notes[-1]


def test_unknown_names_are_suggested(manager, tmp_path):
    with pytest.raises(RecipeError, match=r"colrs: no such task .*did you mean colors\?"):
        check_name("colrs", manager.all_tasks)
    check_name("both", manager.all_tasks)
    path = tmp_path / "one.yaml"
    path.write_text("task: one")
    check_name(str(path), manager.all_tasks)


def test_data_that_is_not_available_is_named_with_a_way_out(manager, monkeypatch):
    with pytest.raises(DataError, match=r"task gone: its data \(json\) cannot be loaded") as caught:
        HarnessTask("gone", manager)
    assert "--include-path" in caught.value.hint

    def offline(names):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (offline)")

    entry = SimpleNamespace(cfg={"dataset_path": "openai/gsm8k", "dataset_name": "main"})
    fake = SimpleNamespace(load=offline, task_index={"gsm8k": entry})
    with pytest.raises(DataError, match=r"task gsm8k: its data \(openai/gsm8k main\) cannot"):
        HarnessTask("gsm8k", fake)


def test_a_refused_task_is_named(loaded, manager):
    task = HarnessTask("colors", manager)
    task.loaded["tasks"]["colors"].UNSAFE_CODE = True
    with pytest.raises(DataError, match="task colors: lm-eval cannot run it: Attempted to run"):
        task.run(ModelSide(loaded.model, loaded.tokenizer))


def test_lm_eval_that_is_not_installed_and_a_folder_that_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match=r"none: no such folder"):
        task_manager([], [tmp_path / "none"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DependencyError, match="need the package lm-eval") as caught:
        task_manager([])
    assert "lorakit[eval]" in caught.value.hint


def test_the_real_index_has_the_named_tasks_alone(harness_folder):
    with pytest.raises(RecipeError, match=r"gsm8kk: no such task .*did you mean gsm8k\?"):
        task_manager(["gsm8kk"])
    found = task_manager(["gsm8k", "colors"], [harness_folder])
    assert {"gsm8k", "colors", "boxes"} <= set(found.all_tasks)
    assert len(found.all_tasks) < 100


def test_a_package_that_a_task_needs_is_named():
    def missing(names):
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    with pytest.raises(DependencyError, match="No module named 'langdetect'") as caught:
        HarnessTask("ifeval", SimpleNamespace(load=missing))
    assert "pip install langdetect" in caught.value.hint
