"""Names become tasks; what is wrong is refused before a model is loaded."""

import pytest

from lorakit.errors import DataError, RecipeError
from lorakit.evaluation.task_list import TaskSpec, build_tasks, parse_specs, recipe_specs
from lorakit.recipe.schema import Recipe

RECIPE = Recipe(model="m", data="d")


pytestmark = pytest.mark.usefixtures("own_tasks_only")


def test_names_limits_and_files():
    found = parse_specs(["gsm8k, mmlu:200", "a/b.jsonl:5,c:d.csv"], ["numeric"], 9)
    assert [(spec.name, spec.limit) for spec in found] == [
        ("gsm8k", None),
        ("mmlu", 200),
        ("a/b.jsonl", 5),
        ("c:d.csv", None),
    ]
    assert {(spec.metrics, spec.max_new_tokens) for spec in found} == {(("numeric",), 9)}
    with pytest.raises(RecipeError, match="found 0 rows"):
        parse_specs(["mmlu:0"])
    with pytest.raises(RecipeError, match="gsm8k is given twice"):
        parse_specs(["gsm8k:5,gsm8k"])


def test_tasks_of_a_recipe():
    tasks = ["general:5", {"task": "a.jsonl", "limit": 3, "metrics": ["numeric"]}]
    recipe = Recipe(model="m", data="d", eval_tasks=tasks)
    assert recipe_specs(recipe) == [
        TaskSpec("general", 5),
        TaskSpec("a.jsonl", 3, ("numeric",), 256),
    ]


def test_each_kind_is_built(tiny_data, tmp_path):
    twin = tmp_path / tiny_data.name
    twin.write_text(tiny_data.read_text())
    specs = parse_specs([f"general:3,{tiny_data}:4,{twin},colors:2"])
    listed = build_tasks(specs, RECIPE)
    assert [task.name for task in listed.tasks] == [
        "general skills",
        "colors",
        "colors 2",
        "colors 3",
    ]
    assert len(listed.tasks[1].rows) == 4
    assert not listed.failed


def test_wrong_names_stop_and_missing_data_does_not(tiny_data):
    with pytest.raises(RecipeError, match=r"colrs: no such task.*did you mean colors\?"):
        build_tasks(parse_specs(["colrs"]), RECIPE)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        build_tasks(parse_specs(["none.jsonl"]), RECIPE)
    with pytest.raises(RecipeError, match="'exact' is unknown"):
        build_tasks(parse_specs([str(tiny_data)], ["exact"]), RECIPE)
    notes = []
    listed = build_tasks(parse_specs(["gone,general:2"]), RECIPE, note=notes.append)
    assert [task.name for task in listed.tasks] == ["general skills"]
    assert "its data (json) cannot be loaded" in listed.failed["gone"]
    assert notes[0].startswith("left out: task gone")
