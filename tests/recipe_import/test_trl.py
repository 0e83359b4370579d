"""TRL's, Unsloth's and PEFT's keys, held against the installed TRL and PEFT."""

import dataclasses
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import ModelConfig, ScriptArguments, SFTConfig

from lorakit.errors import RecipeError
from lorakit.recipe import Recipe
from lorakit.recipe_import.translate import translate
from lorakit.recipe_import.trl import (
    PEFT,
    PEFT_KEYS,
    TRL,
    TRL_DEFAULTS,
    TRL_KEYS,
    UNSLOTH,
    UNSLOTH_DEFAULTS,
    UNSLOTH_KEYS,
)

BASE = {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True,
        "assistant_only_loss": True}  # fmt: skip


def imported(tool=TRL, base=BASE, **keys):
    return translate({**base, **keys}, tool, Path("a.yaml"))


def test_trl_defaults_are_those_of_the_installed_trl():
    fields = {f.name: f.default for c in (SFTConfig, ModelConfig) for f in dataclasses.fields(c)}
    assert TRL_DEFAULTS["learning_rate"] == fields["learning_rate"]
    assert TRL_DEFAULTS["cutoff_len"] == fields["max_length"]
    for key in ("lora_r", "lora_alpha", "lora_dropout"):
        assert TRL_DEFAULTS[key] == fields[key]
    assert imported().values["lr_scheduler"] == "linear"


def test_every_field_of_trl_and_peft_that_changes_training_is_in_the_table():
    known = {f.name for c in (ModelConfig, ScriptArguments) for f in dataclasses.fields(c)}
    minor = {"bnb_4bit_quant_storage", "ignore_bias_buffers"}
    assert known - set(TRL_KEYS) <= minor
    fields = {f.name for f in dataclasses.fields(SFTConfig)}
    training = {"learning_rate", "max_length", "packing", "loss_type", "neftune_noise_alpha",
                "completion_only_loss", "assistant_only_loss", "padding_free", "optim"}  # fmt: skip
    assert training <= fields & set(TRL_KEYS)
    lora = {f.name for f in dataclasses.fields(LoraConfig)}
    assert {"r", "lora_alpha", "rank_pattern", "use_dora", "init_lora_weights"} <= lora & set(
        PEFT_KEYS
    )


def test_data_targets_and_method():
    found = imported(dataset_config="old", load_in_4bit=True, lora_target_modules="all-linear")
    assert found.values["data"] == "d:old:train"
    assert found.values["method"] == "qlora"
    assert found.values["target_modules"] == "all-linear"
    assert found.left == ()
    assert imported().values["target_modules"] == ["q_proj", "v_proj"]
    mixed = {"model_name_or_path": "m", "use_peft": True, "assistant_only_loss": True}
    two = imported(base=mixed, datasets=[{"path": "a"}, {"path": "b", "split": "test"}])
    assert two.values["data"] == ["a", "b:test"]
    shares = [{"id": "a", "weight": 1.0}, {"id": "b", "split": "test", "weight": 0.5}]
    three = imported(base=mixed, dataset_mixture={"datasets": shares, "test_split_size": 100})
    assert three.values["data"] == ["a", {"source": "b:test", "weight": 0.5}]
    assert three.values["val_size"] == 100


@pytest.mark.parametrize(
    "keys",
    [{"use_peft": False}, {"assistant_only_loss": False}, {"packing": True}, {"loss_type": "dft"},
     {"load_in_8bit": True}, {"chat_template_path": "x.jinja"}],
)  # fmt: skip
def test_what_differs_is_left(keys):
    assert [line.key for line in imported(**keys).left] == list(keys)


def test_unsloth_arguments():
    base = {"model_name": "m", "dataset": "d.jsonl"}
    found = imported(UNSLOTH, base, r=32, max_seq_length=4096, load_in_4bit=True, seed=1)
    expected = {"lora_r": 32, "cutoff_len": 4096, "method": "qlora", "seed": 1, "lora_alpha": 16}
    assert {key: found.values[key] for key in expected} == expected
    assert found.values["optimizer"] == "adamw_8bit"
    assert set(UNSLOTH_DEFAULTS) <= set(Recipe.model_fields)
    with pytest.raises(RecipeError, match="no `dataset`"):
        imported(UNSLOTH, {"model_name": "m"})


def test_an_adapter_of_another_kind_is_refused():
    with pytest.raises(RecipeError, match="peft_type: IA3"):
        imported(PEFT, {"peft_type": "IA3", "r": 8})
    config = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="m").to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain = {k: getattr(v, "value", v) for k, v in plain.items()}
    found = translate(plain, PEFT, Path("adapter_config.json"))
    assert found.values["lora_r"] == 4
    assert [line.key for line in found.left] == ["data"]


@pytest.mark.parametrize("keys", [TRL_KEYS, UNSLOTH_KEYS, PEFT_KEYS])
def test_each_key_of_ours_that_a_table_names_exists(keys):
    named = {part.strip("`") for rule in keys.values() for part in rule.here.split(", ") if part}
    assert named <= set(Recipe.model_fields)
