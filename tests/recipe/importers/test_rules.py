"""Rows of the import tables, one value at a time, and the data sets of a file."""

import json
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.importers.convert import load_tool, translate
from lorakit.recipe.importers.rules import (
    Imported,
    TableRow,
    Unmapped,
    apply_row,
    holds,
    matches,
    to_recipe_type,
)

FILES = {
    "axolotl": {
        "base_model": "m",
        "adapter": "lora",
        "datasets": [{"path": "d", "type": "chat_template"}],
    },
    "llama_factory": {"model_name_or_path": "m", "stage": "sft", "dataset": "tides"},
    "trl": {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "use_peft": True,
        "assistant_only_loss": True,
    },
    "unsloth": {"model_name": "m", "dataset": "d"},
    "peft": {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "m"},
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def imported(tool, **keys):
    return translate({**FILES[tool], **keys}, load_tool(tool), Path("a.yaml"))


def left(state):
    return list(state.left)


# Tool, keys of its file, and the recipe keys that become of them.
TRANSLATED = [
    ("axolotl", {}, {"method": "lora", "cutoff_len": 512, "val_size": 0, "warmup_ratio": 0.03}),
    ("axolotl", {"adapter": "qlora", "load_in_4bit": True}, {"method": "qlora"}),
    ("axolotl", {"load_in_4bit": True}, {"method": "qlora"}),
    ("llama_factory", {"enable_thinking": False}, {"template_kwargs": {"enable_thinking": False}}),
    (
        "llama_factory",
        {"chat_template_kwargs": {"reasoning_effort": "low"}, "enable_thinking": True},
        {"template_kwargs": {"reasoning_effort": "low", "enable_thinking": True}},
    ),
    (
        "axolotl",
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"template_kwargs": {"enable_thinking": True}},
    ),
    ("axolotl", {"batch_size": 16, "micro_batch_size": 4}, {"gradient_accumulation_steps": 4}),
    (
        "axolotl",
        {"lora_target_linear": True, "lora_target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
    ),
    (
        "axolotl",
        {"lora_target_modules": "q_proj, v_proj"},
        {"target_modules": ["q_proj", "v_proj"]},
    ),
    ("axolotl", {"train_on_inputs": True}, {"train_on": "all"}),
    ("axolotl", {"use_mlflow": True, "wandb_project": "p"}, {"report_to": ["mlflow", "wandb"]}),
    (
        "axolotl",
        {"test_datasets": [{"path": "h.jsonl", "split": "train"}]},
        {"val_data": "h.jsonl"},
    ),
    ("axolotl", {"peft_layers_to_transform": [1.0, 2]}, {"layers_to_transform": [1, 2]}),
    (
        "llama_factory",
        {},
        {
            "learning_rate": 5e-5,
            "micro_batch_size": 8,
            "lora_r": 8,
            "lora_alpha": 16,
            "epochs": 3.0,
            "lr_scheduler": "linear",
            "warmup_steps": 0,
            "target_modules": "all-linear",
        },
    ),
    ("llama_factory", {"lora_rank": "32"}, {"lora_r": 32, "lora_alpha": 64}),
    ("llama_factory", {"quantization_bit": 4}, {"method": "qlora"}),
    ("llama_factory", {"pissa_init": True, "pissa_iter": -1}, {"init_lora_weights": "pissa"}),
    (
        "llama_factory",
        {"pissa_init": True, "pissa_iter": 4},
        {"init_lora_weights": "pissa_niter_4"},
    ),
    ("llama_factory", {"pissa_init": True}, {"init_lora_weights": "pissa_niter_16"}),
    ("llama_factory", {"mask_history": True}, {"train_on": "last"}),
    ("llama_factory", {"adapter_name_or_path": "saves/a"}, {"from_adapter": "saves/a"}),
    (
        "axolotl",
        {"lora_model_dir": "out/a", "early_stopping_patience": 3, "load_best_model_at_end": True},
        {"from_adapter": "out/a", "early_stopping_patience": 3, "load_best_model_at_end": True},
    ),
    (
        "trl",
        {"metric_for_best_model": "loss", "load_best_model_at_end": True},
        {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True},
    ),
    ("llama_factory", {"stage": "pt", "packing": False}, {"documents": "completion"}),
    ("llama_factory", {"lora_target": "q_proj"}, {"target_modules": ["q_proj"]}),
    ("llama_factory", {"additional_target": "lm_head"}, {"modules_to_save": ["lm_head"]}),
    ("trl", {}, {"target_modules": ["q_proj", "v_proj"], "lora_r": 16, "cutoff_len": 1024}),
    (
        "trl",
        {"dataset_config": "old", "load_in_4bit": True},
        {"data": "d:old:train", "method": "qlora"},
    ),
    (
        "trl",
        {"dataset_train_split": "test", "torch_dtype": "torch.bfloat16"},
        {"data": "d:test", "dtype": "bfloat16"},
    ),
    (
        "trl",
        {"dataset_name": None, "datasets": [{"path": "a"}, {"path": "b", "split": "test"}]},
        {"data": ["a", "b:test"]},
    ),
    (
        "trl",
        {
            "dataset_name": None,
            "dataset_mixture": {
                "test_split_size": 100,
                "datasets": [
                    {"id": "a", "weight": 1.0},
                    {"id": "b", "split": "test", "weight": 0.5},
                ],
            },
        },
        {"data": ["a", {"source": "b:test", "weight": 0.5}], "val_size": 100},
    ),
    ("trl", {"dataset_text_field": "body"}, {"columns": {"text": "body"}}),
    ("trl", {"full_determinism": True}, {"deterministic": True}),
    ("trl", {"max_steps": -1}, {"epochs": 3.0}),
    ("trl", {"max_steps": 60}, {"max_steps": 60}),
    ("trl", {"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
    ("trl", {"warmup_steps": 0, "warmup_ratio": 0.1}, {"warmup_ratio": 0.1}),
    ("trl", {"warmup_steps": 5, "warmup_ratio": 0.1}, {"warmup_steps": 5}),
    ("trl", {"max_grad_norm": 0.0}, {"max_grad_norm": 1e9}),
    ("trl", {"bf16": True, "fp16": True}, {"dtype": "bfloat16"}),
    ("trl", {"bf16": "auto"}, {"dtype": "auto"}),
    ("trl", {"report_to": "none"}, {"report_to": []}),
    ("trl", {"report_to": ["wandb", "TensorBoard"]}, {"report_to": ["wandb", "tensorboard"]}),
    (
        "trl",
        {"learning_rate": "1e-4", "num_train_epochs": "2"},
        {"learning_rate": 1e-4, "epochs": 2.0},
    ),
    (
        "unsloth",
        {"r": 32, "load_in_4bit": True},
        {"lora_r": 32, "method": "qlora", "lora_alpha": 16, "optimizer": "adamw_8bit"},
    ),
    ("peft", {"target_modules": r".*\.(q|v)_proj"}, {"target_modules": r".*\.(q|v)_proj"}),
    (
        "peft",
        {"init_lora_weights": "pissa", "rank_pattern": {"q": 4}},
        {"init_lora_weights": "pissa", "rank_pattern": {"q": 4}},
    ),
]


@pytest.mark.parametrize(("tool", "keys", "expected"), TRANSLATED)
def test_values(tool, keys, expected):
    values = imported(tool, **keys).values
    assert {key: values.get(key) for key in expected} == expected


# Tool and one key with a value that means something else here.
UNTRANSLATED = [
    ("axolotl", "chat_template_kwargs", {"documents": ["a", "b"]}),
    ("axolotl", "load_in_8bit", True),
    ("axolotl", "adapter", "llama-adapter"),
    ("axolotl", "batch_size", 15.5),
    ("axolotl", "special_tokens", {"eos_token": "x"}),
    ("axolotl", "plugins", ["a.spectrum.Plugin"]),
    ("axolotl", "chat_template", "llama3"),
    ("axolotl", "shuffle_merged_datasets", False),
    ("axolotl", "adam_beta2", 0.95),
    ("axolotl", "test_datasets", [{"path": "a"}, {"path": "b"}]),
    ("axolotl", "optimizer", "muon"),
    ("llama_factory", "quantization_bit", 8),
    ("llama_factory", "finetuning_type", "full"),
    ("llama_factory", "template", "alpaca"),
    ("llama_factory", "max_samples", 100),
    ("llama_factory", "neat_packing", True),
    ("llama_factory", "use_galore", True),
    ("llama_factory", "mix_strategy", "interleave_under"),
    ("llama_factory", "double_quantization", False),
    ("llama_factory", "use_badam", True),
    ("trl", "use_peft", False),
    ("trl", "assistant_only_loss", False),
    ("trl", "packing", True),
    ("trl", "loss_type", "dft"),
    ("trl", "load_in_8bit", True),
    ("trl", "chat_template_path", "x.jinja"),
    ("trl", "report_to", "kubeflow"),
    ("peft", "task_type", "SEQ_2_SEQ_LM"),
    ("peft", "lora_bias", True),
]


@pytest.mark.parametrize(("tool", "key", "value"), UNTRANSLATED)
def test_a_value_without_a_match_is_reported(tool, key, value):
    state = imported(tool, **{key: value})
    assert [each for each in left(state) if each not in imported(tool).left] == [key]
    assert state.left[key]


# Tool and one key with a value that needs nothing.
NOT_NEEDED = [
    ("axolotl", "special_tokens", {"pad_token": "x"}),
    ("axolotl", "plugins", ["a.liger.LigerPlugin"]),
    ("axolotl", "chat_template", "tokenizer_default"),
    ("axolotl", "sample_packing", "off"),
    ("axolotl", "liger_rope", True),
    ("axolotl", "adam_epsilon", "1e-8"),
    ("axolotl", "load_in_8bit", False),
    ("axolotl", "base_model_config", ""),
    ("llama_factory", "finetuning_type", "lora"),
    ("llama_factory", "template", "qwen3"),
    ("trl", "save_steps", 0.25),
    ("trl", "loss_type", "nll"),
    ("trl", "hub_token", "hf_secret"),
    ("trl", "label_smoothing_factor", 0),
    ("peft", "task_type", "CAUSAL_LM"),
]


@pytest.mark.parametrize(("tool", "key", "value"), NOT_NEEDED)
def test_a_value_that_needs_nothing_sets_nothing(tool, key, value):
    line = imported(tool, **{key: value}).lines[key]
    assert line.status == "not_needed"
    assert line.values == {}
    assert line.note


def test_a_packed_row_names_the_tokens_of_the_file_or_the_default():
    assert (
        "4096 tokens"
        in imported("axolotl", sample_packing=True, sequence_len=4096).left["sample_packing"]
    )
    assert "about 1024 /" in imported("trl", packing=True).left["packing"]
    texts = imported("llama_factory", stage="pt").left
    assert "2048 tokens" in texts["packing (not written)"]


@pytest.mark.parametrize(
    ("tool", "given", "expected"),
    [
        ("axolotl", {"rl": "dpo", "rl_beta": 0.3}, {"objective": "dpo", "beta": 0.3}),
        ("axolotl", {"rl": "simpo", "simpo_gamma": 1.2},
         {"objective": "simpo", "simpo_gamma": 1.2}),
        ("llama_factory", {"stage": "dpo", "pref_beta": 0.2}, {"objective": "dpo", "beta": 0.2}),
        ("llama_factory", {"pref_loss": "orpo", "stage": "dpo"}, {"objective": "orpo"}),
        ("llama_factory", {"stage": "kto", "kto_chosen_weight": 1.5},
         {"objective": "kto", "desirable_weight": 1.5}),
    ],
)  # fmt: skip
def test_objectives_are_translated(tool, given, expected):
    values = imported(tool, **given).values
    assert expected.items() <= values.items()


def test_a_loss_that_lorakit_lacks_is_not_taken_for_dpo():
    state = imported("llama_factory", stage="dpo", pref_loss="hinge")
    assert "objective" not in state.values
    assert "pref_loss hinge" in state.left["stage"]


def test_a_refused_value_names_what_stays_and_no_default_takes_its_place():
    state = imported("axolotl", lr_scheduler="rex", lora_dropout=1.5)
    assert state.left["lr_scheduler"].startswith("rex: input should be 'linear'")
    assert state.left["lr_scheduler"].endswith("lr_scheduler stays cosine")
    assert not {"lr_scheduler", "lora_dropout"} & state.values.keys()


@pytest.mark.parametrize(
    ("condition", "met"),
    [("a", True), ("b", False), ("b|a", True), ("not b", True), ("a=yes", True), ("a=no|yes", True),
     ("a & not b", True), ("a & b", False), ("c=none", True), ("not c=none", False), ("", True)],
)  # fmt: skip
def test_conditions(condition, met):
    assert holds(condition, {"a": "Yes", "b": "off"}) is met


@pytest.mark.parametrize("value", [None, False, "", 0, 0.0, [], {}, "no", "Off", "none"])
def test_values_that_are_off(value):
    state = Imported(load_tool("trl"), Path(), {})
    with pytest.raises(Unmapped, match="not_needed"):
        apply_row("key", value, TableRow("untranslated", note="reason"), state)


def test_patterns_and_numbers_match_in_any_spelling():
    assert matches("Tokenizer_Default_x", ["tokenizer_default*"])
    assert matches("1e-4", [0.0001])
    assert matches(True, ["true"])
    assert not matches("llama", ["tokenizer*"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_r", True), ("lora_r", 1.5), ("epochs", "fast"), ("cutoff_len", "1e400"), ("seed", -1),
     ("val_size", 3.7), ("target_modules", {"q_proj": 1}), ("use_dora", "maybe")],
)  # fmt: skip
def test_a_value_of_another_type_or_out_of_bounds_is_no_value(key, value):
    with pytest.raises(Unmapped):
        to_recipe_type(key, value)


# -- data sets ------------------------------------------------------------------------------------


def of_axolotl(*entries):
    state = imported("axolotl", datasets=list(entries))
    return state.values, {key: line.status for key, line in state.lines.items()}


def test_paths_files_configurations_and_splits():
    values, _ = of_axolotl(
        {"path": "a/b", "type": "chat_template"},
        {"path": "a/c", "name": "old", "split": "test", "type": "chat_template"},
        {"path": "json", "data_files": ["x.jsonl", "y.jsonl"], "type": "chat_template"},
    )
    assert values["data"] == ["a/b", "a/c:old:test", "x.jsonl", "y.jsonl"]
    values, lines = of_axolotl({"path": "a/b", "data_files": "x.json", "type": "chat_template"})
    assert values["data"] == "a/b"
    assert lines["datasets[0].data_files"] == "untranslated"


@pytest.mark.parametrize(
    ("kind", "status"),
    [("chat_template", "not_needed"), ("sharegpt", "not_needed"), ("completion", "translated"),
     ("alpaca", "untranslated"), ("input_output", "untranslated"), (None, "untranslated"),
     ({"field_output": "back"}, "not_needed"), ({"format": "x"}, "untranslated")],
)  # fmt: skip
def test_types(kind, status):
    values, lines = of_axolotl({"path": "d", "type": kind})
    assert lines["datasets[0].type"] == status
    assert values["data"] == "d"
    assert ("documents" in values) == (kind == "completion")


def test_columns_are_named_where_they_are_unusual():
    own = {"field_instruction": "front", "field_output": "back", "field_input": ""}
    values, _ = of_axolotl({"path": "d", "type": own})
    assert values["columns"] == {"instruction": "front", "response": "back"}
    values, _ = of_axolotl({"path": "d", "type": "chat_template", "field_messages": "talk"})
    assert values["columns"] == {"messages": "talk"}
    values, _ = of_axolotl({"path": "d", "type": "completion", "field": "body"})
    assert (values["columns"], values["documents"]) == ({"text": "body"}, "completion")
    values, lines = of_axolotl({"path": "d", "type": own}, {"path": "e", "type": "chat_template"})
    assert "columns" not in values
    assert lines["columns"] == "untranslated"


@pytest.mark.parametrize(
    "extra",
    [{"message_property_mappings": {"role": "who", "content": "says"}}, {"train_on_eos": "last"},
     {"roles_to_train": ["assistant", "user"]}, {"message_field_training": "learn"},
     {"message_field_role": "who"}, {"chat_template": "chatml"}, {"shards": 4}],
)  # fmt: skip
def test_a_key_of_a_data_set_that_changes_the_mask_or_the_rows_is_reported(extra):
    _, lines = of_axolotl({"path": "d", "type": "chat_template", **extra})
    assert "untranslated" in lines.values()


def test_texts():
    entry = {"path": "d", "text_column": "body", "split": "test"}
    values = imported("axolotl", datasets=None, pretraining_dataset=[entry]).values
    found = {key: values[key] for key in ("data", "documents", "columns")}
    assert found == {"data": "d:test", "documents": "completion", "columns": {"text": "body"}}


def of_llama_factory(tmp_path, info, **keys):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return imported("llama_factory", **keys)


def test_names_become_files_and_hub_ids(tmp_path):
    info = {
        "tides": {"file_name": "t.json"},
        "letters": {"hf_hub_url": "a/letters", "split": "test"},
        "cards": {"hf_hub_url": "a/cards", "subset": "old"},
    }
    state = of_llama_factory(tmp_path, info, dataset="tides,letters, cards", eval_dataset="tides")
    assert state.values["data"] == ["data/t.json", "a/letters:test", "a/cards:old:train"]
    assert state.values["val_data"] == "data/t.json"
    assert "val_size" not in state.values
    assert left(state) == []


def test_a_name_that_is_not_known_is_reported(tmp_path):
    assert left(imported("llama_factory")) == ["dataset_info.json"]
    assert left(of_llama_factory(tmp_path, {})) == ["dataset tides"]
    assert left(of_llama_factory(tmp_path, [])) == ["dataset tides"]


@pytest.mark.parametrize(
    ("columns", "stage", "expected"),
    [
        ({"prompt": "instruction", "response": "output"}, "sft", None),
        ({"messages": "conversations"}, "sft", None),
        (
            {"prompt": "input", "response": "output"},
            "sft",
            {"instruction": "input", "response": "output"},
        ),
        ({"prompt": "q", "response": "a"}, "sft", {"instruction": "q", "response": "a"}),
        ({"prompt": "text"}, "pt", None),
        ({"prompt": "body"}, "pt", {"text": "body"}),
    ],
)
def test_columns_of_dataset_info(tmp_path, columns, stage, expected):
    info = {"tides": {"file_name": "t.json", "columns": columns}}
    values = of_llama_factory(tmp_path, info, stage=stage).values
    assert values.get("columns") == expected


@pytest.mark.parametrize(
    "entry",
    [
        {"columns": {"images": "images"}},
        {"num_samples": 5},
        {"tags": {"role_tag": "who"}},
    ],
)
def test_data_that_is_read_otherwise_is_reported(tmp_path, entry):
    state = of_llama_factory(tmp_path, {"tides": {"file_name": "x", **entry}})
    assert any(key.startswith("dataset tides.") for key in left(state))


def test_a_broken_dataset_info_is_one_clear_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    with pytest.raises(RecipeError, match=r"dataset_info\.json: cannot be read"):
        imported("llama_factory")
