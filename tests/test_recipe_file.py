"""A recipe file is read once, and every mistake in it is reported at once with its line."""

import json
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe import Recipe
from lorakit.recipe_file import load_recipe, recipe_schema, suggest

ROOT = Path(__file__).parents[1]


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_fault_comes_at_once_with_its_line(tmp_path):
    path = write(
        tmp_path,
        "model: demo\ndata: x\nlora_rank: 16\nlora_dropout: 1.5\nmethod: quora\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["lr=3", "nonsense"])
    text = str(caught.value)
    assert "5 faults" in text
    assert "line 3: lora_rank: unknown key (found: 16); did you mean lora_r?" in text
    assert "line 4: lora_dropout: input should be less than 1 (found: 1.5)" in text
    assert "line 5: method: input should be 'lora' or 'qlora' (found: \"quora\")" in text
    assert "--set: lr: unknown key (found: 3); did you mean learning_rate?" in text
    assert "--set nonsense: expected key=value" in text


def test_origins_and_precedence(tmp_path):
    path = write(tmp_path, "model: demo\ndata: x\nlora_r: 8\nseed: 1\nepochs: 2\n")
    resolved = load_recipe(path, ["seed=2", "epochs=1.0"], {"method": "qlora", "output_dir": None})
    assert (resolved.recipe.lora_r, resolved.recipe.seed, resolved.recipe.epochs) == (8, 2, 1.0)
    assert resolved.origins["lora_r"] == "r.yaml:3"
    assert resolved.origins["seed"] == "--set"
    assert resolved.origins["method"] == "flag --method"
    assert resolved.origins["lora_alpha"] == "default for qlora"
    assert resolved.origins["cutoff_len"] == "default"
    derived = resolved.derive("because", target_modules=["q_proj"])
    assert derived.origins["target_modules"] == "derived: because"
    assert derived.recipe.lora_r == 8


def test_resolved_yaml_reads_back_to_the_same_recipe(tmp_path):
    flags = {"model": "demo", "data": ["a", "b"], "method": "qlora", "system": 'say "hi"\n#x'}
    resolved = load_recipe(None, ["columns.instruction=q", "learning_rate=1e-3"], flags)
    assert resolved.recipe.learning_rate == 1e-3
    assert load_recipe(write(tmp_path, resolved.to_yaml())).recipe == resolved.recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found empty"),
        ("- a\n- b\n", "list of `key: value` lines"),
        ("model: [demo\n", "not valid YAML"),
        ("model: demo\nmodel: other\n", "line 2"),
        ("model: !!python/object/apply:os.system ['true']\ndata: x\n", "line 1: tags"),
        ("data: x\n", "model: missing"),
    ],
)
def test_broken_files_get_one_clear_error(tmp_path, text, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write(tmp_path, text))


def test_missing_recipe_file(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_suggestions_prefer_known_synonyms():
    assert suggest("lr", Recipe.model_fields) == "; did you mean learning_rate?"
    assert suggest("gradient_checkpoint", Recipe.model_fields) == (
        "; did you mean gradient_checkpointing?"
    )
    assert suggest("zzz", Recipe.model_fields) == ""


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_parse_and_point_editors_at_the_schema(path):
    assert "yaml-language-server: $schema=recipe.schema.json" in path.read_text()
    load_recipe(path)


@pytest.mark.parametrize("folder", ["configs", "src/lorakit/assets"])
def test_shipped_schema_is_current(folder):
    shipped = json.loads((ROOT / folder / "recipe.schema.json").read_text())
    assert shipped == recipe_schema(), "run: make schema"
    assert shipped["required"] == ["model", "data"]
    assert "lora 16, qlora 64" in shipped["properties"]["lora_r"]["description"]


def test_a_recipe_of_another_tool_is_told_how_it_comes_in(tmp_path):
    path = tmp_path / "axolotl.yml"
    path.write_text("base_model: m\nadapter: lora\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert error.value.hint == f"a recipe of another tool? lorakit import {path} -o recipe.yaml"
