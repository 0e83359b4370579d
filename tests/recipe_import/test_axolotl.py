"""Axolotl's keys: what decides the training is taken with its defaults, the rest is said."""

from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe import Recipe
from lorakit.recipe_import.axolotl import AXOLOTL, DEFAULTS, KEYS
from lorakit.recipe_import.translate import translate

BASE = {"base_model": "m", "adapter": "lora", "datasets": [{"path": "d", "type": "chat_template"}]}


def imported(**keys):
    return translate({**BASE, **keys}, AXOLOTL, Path("a.yml"))


def fate(found, key):
    return next(line for line in found.lines if line.key == key)


def test_its_defaults_are_written_out():
    values = imported().values
    assert {k: values[k] for k in DEFAULTS if k != "method"} == {
        k: v for k, v in DEFAULTS.items() if k != "method"
    }
    assert values["cutoff_len"] == 512
    assert values["val_size"] == 0
    assert set(DEFAULTS) <= set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("keys", "method", "left"),
    [
        ({"adapter": "lora"}, "lora", []),
        ({"adapter": "qlora", "load_in_4bit": True}, "qlora", []),
        ({"adapter": "lora", "load_in_4bit": True}, "qlora", []),
        ({"adapter": "lora", "load_in_8bit": True}, "lora", ["load_in_8bit"]),
        ({"adapter": None}, "lora", ["adapter"]),
        ({"adapter": "llama-adapter"}, None, ["adapter"]),
    ],
)
def test_methods(keys, method, left):
    found = imported(**keys)
    assert found.values.get("method") == method
    assert [line.key for line in found.left] == left


def test_batch_size_is_divided():
    found = imported(batch_size=16, micro_batch_size=4)
    assert found.values["gradient_accumulation_steps"] == 4
    assert fate(imported(batch_size=15, micro_batch_size=4), "batch_size").status == "left"


def test_targets():
    assert imported(lora_target_linear=True).values["target_modules"] == "all-linear"
    both = imported(lora_target_linear=True, lora_target_modules=["q_proj"])
    assert both.values["target_modules"] == "all-linear"
    assert imported(lora_target_modules=["q_proj"]).values["target_modules"] == ["q_proj"]


def test_packed_rows_are_another_batch():
    found = imported(sample_packing=True, sequence_len=4096)
    assert "4096 tokens full of examples" in fate(found, "sample_packing").note
    assert fate(imported(sample_packing=False), "sample_packing").status == "own"


def test_tokens_that_end_an_answer_are_left():
    assert fate(imported(special_tokens={"pad_token": "x"}), "special_tokens").status == "own"
    assert fate(imported(special_tokens={"eos_token": "x"}), "special_tokens").status == "left"
    assert fate(imported(plugins=["a.liger.LigerPlugin"]), "plugins").status == "own"
    assert fate(imported(plugins=["a.spectrum.Plugin"]), "plugins").status == "left"


def test_what_lorakit_does_not_do_is_refused():
    with pytest.raises(RecipeError, match="rl: dpo"):
        imported(rl="dpo")
    with pytest.raises(RecipeError, match="no `datasets`"):
        imported(datasets=None)


def test_each_key_of_ours_that_the_table_names_exists():
    named = {part.strip("`") for rule in KEYS.values() for part in rule.here.split(", ") if part}
    assert named <= set(Recipe.model_fields)
