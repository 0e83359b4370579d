"""Files of other tools: recognized, translated, loadable, or one clear error; and the tables."""

import dataclasses
import json
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from lorakit.errors import RecipeError
from lorakit.recipe.importers.convert import (
    TOOLS,
    as_dict,
    import_recipe,
    load_table,
    load_tool,
    recipe_text,
    translate,
)
from lorakit.recipe.importers.rules import FUNCTIONS, to_recipe_type
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.train.training_args import OPTIMIZERS

FILES = Path(__file__).parent / "files"
RECIPES = sorted(p for p in FILES.iterdir() if p.is_file())
AXOLOTL = "base_model: m\nadapter: lora\ndatasets: [{path: d, type: chat_template}]\n"
LEVELS = zip("abcd", "bcde", strict=True)
BOMB = AXOLOTL + "a: &a [1, 1, 1, 1, 1]\n"
BOMB += "".join(f"{b}: &{b} [{f'*{a}, ' * 10}]\n" for a, b in LEVELS)


def write(tmp_path, text):
    path = tmp_path / "x.yml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_each_loads_as_a_recipe_and_every_key_has_a_line(path, tmp_path):
    state = import_recipe(path)
    recipe = load_recipe(write(tmp_path, recipe_text(state))).recipe.model_dump()
    assert {key: recipe[key] for key in state.values} == state.values
    keys = [k.split(":")[0] for k in path.read_text().splitlines() if k[:1].isalpha()]
    assert set(keys) <= state.lines.keys()
    assert all(state.left.values())


def test_the_effective_batch_and_the_rate_are_theirs():
    recipe = import_recipe(FILES / "axolotl.yml").values
    assert recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] == 8
    assert (recipe["learning_rate"], recipe["warmup_steps"], recipe["epochs"]) == (2e-4, 10, 2.0)
    assert recipe["data"] == ["harbor/letters:train[:20%]", "more/tides.jsonl"]
    assert "warmup_ratio" not in recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found empty"),
        ("- a\n- b\n", "found list"),
        ("model: demo\ndata: demo\n", "a lorakit recipe already"),
        ("batch: 3\nepochs: 1\n", "no known tool's recipe"),
        ("base_model: !!python/object:os.system m\nadapter: lora\n", "line 1: tags"),
        ("base_model: m\nadapter: [\n", "not valid YAML"),
        ("base_model: m\nadapter: lora\n", "no `datasets`"),
        ("base_model: 7\nadapter: lora\ndatasets: [{path: d}]\n", "no `model` for the recipe: 7"),
        ("base_model: m\nadapter: lora\ndatasets: [{type: alpaca}]\n", "entry 1 has no `path`"),
        (AXOLOTL + "rl: grpo\n", "rl: grpo"),
        (AXOLOTL + "reward_model: true\n", "reward_model: "),
        ("model_name_or_path: m\nstage: ppo\ndataset: d\n", "stage: ppo"),
        ("model_name_or_path: m\nstage: sft\n", "no `dataset`"),
        ("model_name_or_path: m\nuse_peft: true\n", "no `dataset_name`"),
        ("model_name: m\nr: 8\n", "no `dataset`"),
        ("peft_type: IA3\nr: 8\n", "peft_type: IA3"),
        (BOMB, "once its aliases are unfolded"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, text, expected):
    with pytest.raises(RecipeError, match=r"x\.yml: ") as error:
        import_recipe(write(tmp_path, text))
    assert expected in str(error.value)
    assert error.value.hint


def test_a_missing_file_and_one_that_is_not_text(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        import_recipe(tmp_path / "none.yml")
    (tmp_path / "x.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        import_recipe(tmp_path / "x.yml")


def test_anchors_and_merged_keys_are_read(tmp_path):
    text = AXOLOTL + "other: &o {lora_r: 4}\nlora_r: &r 12\nlora_alpha: *r\n<<: {num_epochs: 2}\n"
    values = import_recipe(write(tmp_path, text)).values
    assert (values["lora_r"], values["lora_alpha"], values["epochs"]) == (12, 12, 2.0)


@pytest.mark.parametrize(
    "line",
    ["lora_dropout: 1.5", "seed: -1", "learning_rate: fast", "num_epochs: [1]", "lora_r: {a: 1}",
     "micro_batch_size: auto", "sequence_len: 1e400", "warmup_ratio: 7", "val_set_size: -3",
     "special_tokens: 3", "plugins: 3", "lora_target_modules: 3"],
)  # fmt: skip
def test_a_value_out_of_bounds_is_reported_and_the_recipe_still_loads(tmp_path, line):
    state = import_recipe(write(tmp_path, AXOLOTL + line + "\n"))
    load_recipe(write(tmp_path, recipe_text(state)))
    assert line.split(":")[0] in state.left


def test_an_unknown_key_names_the_nearest_known_one(tmp_path):
    state = import_recipe(write(tmp_path, AXOLOTL + "lora_ranks: 8\nsequence_lens: 8\nempty:\n"))
    assert "(like sequence_len?)" in state.left["sequence_lens"]
    assert "lorakit schema" in state.left["lora_ranks"]
    assert state.lines["empty"].status == "not_needed"


@pytest.mark.parametrize("name", TOOLS)
def test_values_of_any_type_under_any_key_are_no_traceback(name, tmp_path):
    tool = load_tool(name)
    for value in (None, True, -1, 0.5, "x", [], ["x"], {}, {"x": [1]}, [[1]], [{"path": 3}]):
        source = dict.fromkeys(tool.keys, value)
        try:
            state = translate(source, tool, tmp_path / "a.yml")
        except RecipeError:
            continue
        assert source.keys() <= state.lines.keys()


def test_the_text_names_the_origin_of_each_value_and_ends_with_what_is_left():
    text = recipe_text(import_recipe(FILES / "axolotl_old.yml"))
    assert text.startswith("# From axolotl_old.yml (Axolotl), by `lorakit import`.\n")
    assert 'model: "harbor/base-7b"  # base_model\n' in text
    assert "weight_decay: 0.0  # Axolotl's default\n" in text
    assert "\nlora_r: 8\n" in text
    assert "\n# lr_scheduler: rex: input should be" in text


def test_json_has_every_key_with_a_status():
    found = as_dict(import_recipe(FILES / "axolotl_old.yml"))
    assert {key["status"] for key in found["keys"]} == {"taken", "own", "left"}
    assert found["not_translated"] == sum(key["status"] == "left" for key in found["keys"]) == 6
    assert {"key": "lora_r", "status": "taken", "here": "lora_r: 8", "note": ""} in found["keys"]


def test_no_secret_of_the_source_is_copied():
    state = import_recipe(FILES / "llama_factory.yaml")
    everything = recipe_text(state) + json.dumps(as_dict(state))
    assert "CANARY" not in everything
    assert "hf_hub_token" in everything


def test_a_file_name_cannot_end_the_comment(tmp_path):
    path = tmp_path / "a\nmodel: evil.yml"
    path.write_text((FILES / "trl.yaml").read_text())
    assert recipe_text(import_recipe(path)).splitlines()[1].startswith("model: ")


# -- the tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOLS)
def test_rows_and_defaults_name_keys_and_values_of_a_recipe(name):
    tool = load_tool(name)
    for key, row in tool.keys.items():
        assert set(filter(None, row.to.split(", "))) <= Recipe.model_fields.keys(), key
        assert row.to or row.status != "translated", key
        assert row.note or row.status == "translated", key
        assert row.function in ("", *FUNCTIONS), key
        for value in [*row.values, *([row.on] if row.on and "{" not in str(row.on) else [])]:
            assert to_recipe_type(row.to, value) == value, key
    for key, value in tool.defaults.items():
        assert value == "2 x lora_r" or to_recipe_type(key, value) == value


@pytest.mark.parametrize("name", ["common", "training_arguments", *TOOLS])
def test_no_key_has_two_rows_and_no_row_is_without_a_key(name):
    for table in (load_table(name), load_table(name).get("entry", {})):
        groups = [
            group for s in ("untranslated", "not_needed") for group in table.get(s, {}).values()
        ]
        keys = [*table.get("same", ()), *table.get("renamed", ()), *table.get("translated", ())]
        keys += [key for group in groups for key in group]
        assert len(keys) == len(set(keys)), sorted(keys)
        assert table.get("as_here", {}).keys() <= set(keys)


def test_defaults_and_names_are_those_of_the_installed_packages():
    fields = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    keys, defaults = load_tool("llama_factory").keys, load_tool("llama_factory").defaults
    named = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
    for key in (*named, "learning_rate", "weight_decay", "max_grad_norm", "seed", "warmup_steps"):
        assert defaults[keys[key].to] == fields[key], key
    fields = {f.name: f.default for c in (SFTConfig, ModelConfig) for f in dataclasses.fields(c)}
    for theirs, ours in {"max_length": "cutoff_len", "learning_rate": "learning_rate"}.items():
        assert load_tool("trl").defaults[ours] == fields[theirs]
    for key in ("lora_r", "lora_alpha", "lora_dropout"):
        assert load_tool("trl").defaults[key] == fields[key]
    known = {f.name for c in (ModelConfig, ScriptArguments) for f in dataclasses.fields(c)}
    minor = {"bnb_4bit_quant_storage", "ignore_bias_buffers"}
    assert known - load_tool("trl").keys.keys() <= minor
    training = {"learning_rate", "max_length", "packing", "loss_type", "neftune_noise_alpha",
                "completion_only_loss", "assistant_only_loss", "padding_free", "optim"}  # fmt: skip
    assert training <= fields.keys() & load_tool("trl").keys.keys()


def test_each_of_our_optimizers_and_schedules_is_translated_to_itself():
    tool = load_tool("trl")
    base = {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True}
    for ours, theirs in OPTIMIZERS.items():
        assert translate({**base, "optim": theirs}, tool, Path("a")).values["optimizer"] == ours
    for name in ("linear", "cosine", "constant", "constant_with_warmup"):
        values = translate({**base, "lr_scheduler_type": name}, tool, Path("a")).values
        assert values["lr_scheduler"] == name


def test_a_config_that_peft_writes_is_read():
    config = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="m").to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain = {k: getattr(v, "value", v) for k, v in plain.items()}
    state = translate(plain, load_tool("peft"), Path("adapter_config.json"))
    assert state.values["lora_r"] == 4
    assert list(state.left) == ["data"]
