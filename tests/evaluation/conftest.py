"""Tasks of lm-eval with local data: one that generates, one of choices, and their group."""

import json

import pytest
from tests.made_runs import answer

from lorakit.evaluation import task_list
from lorakit.evaluation.harness_tasks import check_name

BOXES = """\
task: boxes
dataset_path: json
dataset_kwargs: {data_files: {test: %(boxes)s, train: %(boxes)s}}
output_type: generate_until
fewshot_split: train
test_split: test
num_fewshot: %(shots)d
doc_to_text: "Box {{digit}}?"
doc_to_target: "{{words}}"
generation_kwargs: {until: ["grape"], do_sample: false, max_gen_toks: 4}
filter_list:
  - name: first-word
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
  - name: all-words
    filter: [{function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
COLORS = """\
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: %(boxes)s}}
output_type: multiple_choice
test_split: test
doc_to_text: "Box {{digit}}?"
doc_to_choice: [apple, lemon, red]
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GROUP = """\
group: both
task: [colors, colors_again]
"""


@pytest.fixture(scope="session")
def harness_folder(tmp_path_factory):
    """Folder for --include-path."""
    folder = tmp_path_factory.mktemp("tasks")
    boxes = folder / "boxes.jsonl"
    rows = [{"digit": str(i), "words": answer("fruit", i, 1)} for i in (1, 3, 5, 7, 8)]
    boxes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"boxes": boxes, "shots": 0}
    (folder / "boxes.yaml").write_text(BOXES % names)
    shots = (BOXES % {**names, "shots": 2}).replace("task: boxes", "task: boxes_shots")
    (folder / "boxes_shots.yaml").write_text(shots)
    (folder / "colors.yaml").write_text(COLORS % names)
    again = (COLORS % names).replace("task: colors", "task: colors_again")
    (folder / "colors_again.yaml").write_text(again.replace("Box", "What is in box"))
    (folder / "both.yaml").write_text(GROUP)
    gone = (COLORS % {"boxes": folder / "gone.jsonl"}).replace("task: colors", "task: gone")
    (folder / "gone.yaml").write_text(gone)
    return folder


@pytest.fixture(scope="session")
def manager(harness_folder):
    """lm-eval's index of that folder alone: reading its own 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(harness_folder), include_defaults=False)


@pytest.fixture
def own_tasks_only(monkeypatch, manager):
    """The tasks of this file are the only ones that lm-eval has."""

    def found(names, include):
        for name in names:
            check_name(name, manager.all_tasks)
        return manager

    monkeypatch.setattr(task_list, "task_manager", found)
