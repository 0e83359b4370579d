"""A recipe file is read once, and every mistake in it is reported at once with its line."""

import json
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.loader import load_recipe, read_resolved, recipe_schema, suggest
from lorakit.recipe.schema import RENAMED, Recipe

ROOT = Path(__file__).parents[2]


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_fault_comes_at_once_with_its_line(tmp_path):
    path = write(
        tmp_path,
        "model: demo\ndata: x\nbatch_size: 16\nlora_dropout: 1.5\nmethod: quora\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["rank=3", "nonsense"])
    text = str(caught.value)
    assert "5 faults" in text
    assert "line 3: batch_size: unknown key (found: 16); did you mean micro_batch_size?" in text
    assert "line 4: lora_dropout: input should be less than 1 (found: 1.5)" in text
    assert "line 5: method: input should be 'lora' or 'qlora' (found: \"quora\")" in text
    assert "--set: rank: unknown key (found: 3); did you mean lora_r?" in text
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


GIVEN = {"model": "demo", "data": "x"}


def test_what_is_said_later_wins():
    """Recipe, --set, flags, settings; each against the one before it."""
    places = [
        lambda: load_recipe({**GIVEN, "seed": 1}),
        lambda: load_recipe({**GIVEN, "seed": 1}, ["seed=2"]),
        lambda: load_recipe({**GIVEN, "seed": 1}, ["seed=2"], {"seed": 3}),
        lambda: load_recipe({**GIVEN, "seed": 1}, ["seed=2"], {"seed": 3}, seed=4),
    ]
    assert [place().recipe.seed for place in places] == [1, 2, 3, 4]
    origins = [place().origins["seed"] for place in places]
    assert origins == ["argument", "--set", "flag --seed", "argument"]
    assert load_recipe(GIVEN, ["seed=2", "seed=3"]).recipe.seed == 3


def test_zero_and_false_are_values_and_none_is_not_given():
    start = {**GIVEN, "seed": 1, "val_size": 5, "offline": True}
    flags = {"seed": 0, "val_size": 0, "offline": False}
    made = load_recipe(start, (), flags).recipe
    assert (made.seed, made.val_size, made.offline) == (0, 0, False)
    assert load_recipe(start, (), dict.fromkeys(flags)).recipe == load_recipe(start).recipe


@pytest.mark.parametrize(
    ("given", "overrides", "expected"),
    [
        ({"instruction": "q"}, ["columns.response=a"], {"instruction": "q", "response": "a"}),
        ({"instruction": "q", "response": "a"}, ["columns.response=b"],
         {"instruction": "q", "response": "b"}),
        ({}, ["columns.instruction=q", "columns.response=a"],
         {"instruction": "q", "response": "a"}),
        ({"instruction": "q"}, ["columns={response: a}"], {"response": "a"}),
    ],
)  # fmt: skip
def test_one_key_of_a_mapping_is_set_and_the_others_stay(given, overrides, expected):
    start = {**GIVEN, "columns": given}
    before = dict(given)
    assert dict(load_recipe(start, overrides).recipe.columns) == expected
    assert given == before


@pytest.mark.parametrize(
    ("given", "overrides", "flags", "said"),
    [
        ({"rank": 16}, [], {}, "rank: unknown key (found: 16); did you mean lora_r?"),
        ({}, ["rank=16"], {}, "--set: rank: unknown key"),
        ({}, [], {"rank": 16}, "flag --rank: rank: unknown key"),
        ({}, ["lora_r"], {}, "--set lora_r: expected key=value"),
        ({"system": "a\0b"}, [], {}, "system: holds a NUL"),
    ],
)
def test_one_fault_in_an_otherwise_valid_recipe_is_refused(given, overrides, flags, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe({**GIVEN, **given}, overrides, flags)
    assert "1 fault\n" in caught.value.message
    assert said in caught.value.message


def test_what_is_derived_wins_and_the_rest_stays():
    before = load_recipe({**GIVEN, "output_dir": "a", "seed": 7})
    after = before.derive("why", output_dir="b")
    assert (after.recipe.output_dir, after.recipe.seed) == ("b", 7)
    assert (before.recipe.output_dir, before.origins["output_dir"]) == ("a", "argument")
    assert (after.origins["output_dir"], after.origins["seed"]) == ("derived: why", "argument")


@pytest.mark.parametrize("kind", ["resolved", "plain", "file"])
def test_defaults_follow_another_method_and_what_was_set_stays(tmp_path, kind):
    one = load_recipe({**GIVEN, "lora_alpha": 99})
    given = {"resolved": one, "plain": one.recipe}.get(kind)
    if given is None:
        given = write(tmp_path, "model: demo\ndata: x\nlora_alpha: 99\n")
    made = load_recipe(given, method="qlora")
    fresh = load_recipe({**GIVEN, "method": "qlora", "lora_alpha": 99})
    assert made.recipe == fresh.recipe
    assert made.origins["lora_r"] == "default for qlora"


def test_a_value_that_was_set_to_the_default_stays_too():
    one = load_recipe({**GIVEN, "lora_r": 16})
    assert load_recipe(one, method="qlora").recipe.lora_r == 16


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
    assert error.value.hint == f"for a recipe of another tool: lorakit import {path} -o recipe.yaml"


@pytest.mark.parametrize(
    ("old", "value"),
    [("streaming", "on"), ("probe", "true"), ("engine", "off"), ("too_long", "split")],
)
def test_a_key_by_its_former_name_is_refused_with_the_new_one(old, value, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: demo\ndata: x.jsonl\n{old}: {value}\n")
    with pytest.raises(RecipeError, match=f"line 3: {old}: .* {RENAMED[old]}"):
        load_recipe(path)


def test_the_recipe_of_a_run_is_read_by_the_names_of_its_time(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    path = tmp_path / "recipe.yaml"
    path.write_text("model: demo\ndata: x.jsonl\nstreaming: 'off'\ntoo_long: split\n")
    recipe = load_recipe(path).recipe
    assert (recipe.weight_offload, recipe.on_overlength) == ("off", "split")


def test_the_recipe_of_a_run_is_read_with_the_origins_in_its_comments(tmp_path):
    path = tmp_path / "recipe.yaml"
    written = load_recipe({"model": "m", "data": "d", "system": "a  # b: c", "lora_r": 4})
    written = written.derive("a CPU", dtype="float32")
    path.write_text(written.to_yaml())
    found = read_resolved(path)
    assert (found.recipe, found.origins) == (written.recipe, written.origins)
    assert found.given() == {"model": "m", "data": "d", "system": "a  # b: c", "lora_r": 4}


def test_the_recipe_of_a_run_that_was_edited_is_read_as_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# by hand\nmodel: demo\ndata:\n  - demo\n")
    assert read_resolved(path).recipe.data == ["demo"]
    for text in ("model: [", 'model: "m"  # argument\nsurprise: 1  # argument\n', "\0"):
        path.write_text(text)
        with pytest.raises(RecipeError):
            read_resolved(path)
    with pytest.raises(RecipeError):
        read_resolved(tmp_path / "none.yaml")
