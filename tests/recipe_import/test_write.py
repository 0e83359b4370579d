"""The written recipe and the account on the screen."""

import json
from pathlib import Path

from rich.console import Console

from lorakit.recipe_import.translate import import_recipe
from lorakit.recipe_import.write import as_dict, recipe_text, show_import

FILES = Path(__file__).parent / "files"


def test_each_value_names_its_key_and_what_was_left_stands_below():
    text = recipe_text(import_recipe(FILES / "axolotl_old.yml"))
    assert text.startswith("# From axolotl_old.yml (Axolotl), by `lorakit import`.\n")
    assert 'model: "harbor/base-7b"  # base_model\n' in text
    assert "weight_decay: 0.0  # Axolotl's default\n" in text
    assert "\nlora_r: 8\n" in text
    assert "#   lr_scheduler: rex: no such schedule here; lr_scheduler stays cosine\n" in text


def test_the_screen_tells_the_three_fates(capsys):
    found = import_recipe(FILES / "axolotl_old.yml")
    show_import(found, Console(width=200), "r.yaml")
    shown = capsys.readouterr().out
    assert "base_model -> model: harbor/base-7b" in shown
    assert "base_model_config, model_type: the model's own configuration says it" in shown
    assert "NOT translated" in shown
    assert "7 keys not translated; written to r.yaml" in shown
    for line in found.lines:
        assert line.key in shown


def test_nothing_left_is_said(capsys):
    show_import(import_recipe(FILES / "trl.yaml"), Console(width=200), None)
    shown = capsys.readouterr().out
    assert "NOT" not in shown
    assert shown.endswith("all translated\n")


def test_no_secret_of_the_source_comes_along(capsys):
    found = import_recipe(FILES / "llama_factory.yaml")
    show_import(found, Console(width=200), None)
    everything = capsys.readouterr().out + recipe_text(found) + json.dumps(as_dict(found))
    assert "CANARY" not in everything
    assert "hf_hub_token" in everything


def test_a_file_name_cannot_end_the_comment(tmp_path):
    path = tmp_path / "a\nmodel: evil.yml"
    path.write_text((FILES / "trl.yaml").read_text())
    assert recipe_text(import_recipe(path)).splitlines()[1].startswith("model: ")
