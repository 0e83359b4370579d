"""`lorakit import` from the command line."""

import json
from pathlib import Path

from lorakit.recipe.loader import load_recipe

FILES = Path(__file__).parents[1] / "recipe" / "importers" / "files"


def test_the_recipe_goes_to_stdout_and_the_account_to_stderr(lorakit, tmp_path):
    code, out, err = lorakit("import", FILES / "trl.yaml")
    assert code == 0
    assert err.endswith("all translated\n")
    assert "NOT" not in err
    Path("r.yaml").write_text(out)
    assert load_recipe("r.yaml").recipe.lora_r == 32


def test_what_is_left_is_exit_1_and_the_recipe_is_written_all_the_same(lorakit):
    code, out, err = lorakit("import", FILES / "axolotl.yml", "-o", "r.yaml")
    assert (code, out) == (1, "")
    assert "1 key not translated; written to r.yaml" in err
    assert load_recipe("r.yaml").recipe.method == "qlora"


def test_the_report_has_every_key_by_its_result(lorakit):
    _, _, err = lorakit("import", FILES / "axolotl_old.yml")
    assert "base_model -> model: harbor/base-7b" in err
    assert "base_model_config, model_type: the model's own configuration decides" in err
    assert err.index("\ntranslated") < err.index("\nnot needed") < err.index("\nNOT translated")
    assert err.endswith("6 keys not translated\n")
    keys = [k.split(":")[0] for k in (FILES / "axolotl_old.yml").read_text().splitlines()]
    assert all(key in err for key in keys if key[:1].isalpha())


def test_a_recipe_is_never_overwritten(lorakit):
    Path("r.yaml").write_text("mine")
    code, _, err = lorakit("import", FILES / "trl.yaml", "-o", "r.yaml")
    assert code == 2
    assert "r.yaml: already exists" in err
    assert Path("r.yaml").read_text() == "mine"
    code, _, err = lorakit("import", FILES / "trl.yaml", "-o", "none/r.yaml")
    assert code == 2
    assert "cannot be written" in err


def test_json(lorakit):
    code, out, _ = lorakit("import", FILES / "axolotl.yml", "--json")
    value = json.loads(out)
    assert (code, value["tool"], value["not_translated"]) == (1, "Axolotl", 1)
    assert value["recipe"]["model"] == "Qwen/Qwen3-8B"
    assert {key["status"] for key in value["keys"]} == {"taken", "own", "left"}


def test_bad_input_is_one_message(lorakit, tmp_path):
    code, out, err = lorakit("import", "none.yml")
    assert (code, out) == (2, "")
    assert "none.yml: no such recipe" in err
    assert "hint: " in err
