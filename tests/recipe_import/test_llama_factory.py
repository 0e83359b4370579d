"""LLaMA-Factory's keys, and its names of data sets looked up where they stand."""

import json
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe import Recipe
from lorakit.recipe_import.llama_factory import DEFAULTS, KEYS, LLAMA_FACTORY
from lorakit.recipe_import.translate import translate

BASE = {"model_name_or_path": "m", "stage": "sft", "dataset": "tides"}


@pytest.fixture
def imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def build(info=None, **keys):
        if info is not None:
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
        return translate({**BASE, **keys}, LLAMA_FACTORY, Path("a.yaml"))

    return build


def left(found):
    return {line.key for line in found.left}


def test_its_defaults_are_written_out(imported):
    values = imported().values
    expected = {"learning_rate": 5e-5, "micro_batch_size": 8, "lora_r": 8, "lora_alpha": 16,
                "lora_dropout": 0.0, "lr_scheduler": "linear", "warmup_steps": 0, "epochs": 3.0,
                "target_modules": "all-linear", "val_size": 0}  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert imported(lora_rank=32).values["lora_alpha"] == 64
    assert set(DEFAULTS) <= set(Recipe.model_fields)


def test_names_become_files_and_hub_ids(imported):
    info = {
        "tides": {"file_name": "t.json"},
        "letters": {"hf_hub_url": "a/letters", "split": "test"},
        "cards": {"hf_hub_url": "a/cards", "subset": "old"},
    }
    found = imported(info, dataset="tides,letters, cards")
    assert found.values["data"] == ["data/t.json", "a/letters:test", "a/cards:old:train"]
    assert left(found) == set()


def test_a_name_that_is_not_known_is_said(imported):
    assert left(imported()) == {"dataset_info.json"}
    assert left(imported({}, dataset="tides")) == {"dataset tides"}


def test_columns_where_they_are_unusual(imported):
    usual = {"tides": {"file_name": "t.json", "columns": {"prompt": "instruction"}}}
    assert "columns" not in imported(usual).values
    named = {"tides": {"file_name": "t.json", "columns": {"prompt": "q", "response": "a"}}}
    assert imported(named).values["columns"] == {"instruction": "q", "response": "a"}
    texts = {"tides": {"file_name": "t.json", "columns": {"prompt": "body"}}}
    assert imported(texts, stage="pt").values["columns"] == {"text": "body"}
    two = {**named, "letters": {"file_name": "l.json"}}
    assert left(imported(two, dataset=["tides", "letters"])) == {"columns"}


@pytest.mark.parametrize(
    "entry",
    [{"file_name": "x", "ranking": True}, {"file_name": "x", "columns": {"images": "images"}},
     {"file_name": "x", "num_samples": 5}, {"file_name": "x", "tags": {"role_tag": "who"}}],
)  # fmt: skip
def test_data_that_is_read_otherwise_is_said(imported, entry):
    assert any(key.startswith("dataset tides") for key in left(imported({"tides": entry})))


def test_a_broken_dataset_info_is_one_clear_error(imported, tmp_path):
    imported({})
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    with pytest.raises(RecipeError, match=r"dataset_info\.json: cannot be read"):
        imported()


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ({"quantization_bit": 4}, {"method": "qlora"}),
        ({"pissa_init": True, "pissa_iter": -1}, {"init_lora_weights": "pissa"}),
        ({"train_on_prompt": True}, {"train_on": "all"}),
        ({"mask_history": True}, {"train_on": "last"}),
        ({"stage": "pt"}, {"documents": "completion"}),
        ({"lora_target": "q_proj,v_proj"}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"additional_target": "lm_head"}, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_values(imported, keys, values):
    found = imported(**keys).values
    assert {key: found[key] for key in values} == values


@pytest.mark.parametrize(
    "keys",
    [{"quantization_bit": 8}, {"finetuning_type": "full"}, {"template": "alpaca"},
     {"max_samples": 100}, {"packing": True}, {"neat_packing": True},
     {"loraplus_lr_ratio": 16.0}, {"mix_strategy": "interleave_under"},
     {"double_quantization": False}, {"use_badam": True}],
)  # fmt: skip
def test_what_differs_is_left(imported, keys):
    assert set(keys) <= left(imported(**keys))


def test_other_stages_and_files_without_data_are_refused(imported):
    with pytest.raises(RecipeError, match="stage: dpo"):
        imported(stage="dpo")
    with pytest.raises(RecipeError, match="no `dataset`"):
        imported(dataset="")


def test_each_key_of_ours_that_the_table_names_exists():
    named = {part.strip("`") for rule in KEYS.values() for part in rule.here.split(", ") if part}
    assert named <= set(Recipe.model_fields)
