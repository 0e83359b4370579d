"""What would alter steps already taken is refused by name; what would not is let through."""

import json

import pytest
from rich.console import Console

from lorakit.data.prepare import prepare_data
from lorakit.errors import RunError
from lorakit.recipe.grpo_keys import GRPO_KEYS
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.resume import (
    check_resume_compatible,
    harmless_changes,
    remember_rows,
    run_fingerprint,
)

QUIET = Console(quiet=True, stderr=True)


@pytest.fixture
def past(tiny_recipe, tiny_model_dir, tiny_data, tokenizer, tmp_path):
    """`past(rows, **values)`: the record of a recipe, and the examples; rows are tiny_data's."""
    lines = tiny_data.read_text().splitlines()

    def build(rows=lines, **values):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(rows) + "\n")
        recipe = tiny_recipe(tiny_model_dir, path, tmp_path / "run", **values).recipe
        train = prepare_data(recipe, tokenizer).train
        return run_fingerprint(recipe, train, tokenizer), train

    build.lines = lines
    return build


@pytest.mark.parametrize(
    "values",
    [
        {"max_steps": 9},
        {"epochs": 7.0},
        {"save_every": "10min", "keep_checkpoints": 5, "log_every": 2, "eval_every": 3},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "memory_limit": "4GB", "offline": False},
    ],
    ids=lambda values: ",".join(values),
)
def test_harmless_settings_may_change(past, tmp_path, values):
    before, _ = past()
    check_resume_compatible(RunDir(tmp_path), before, *past(**values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: was 0.02, is now 0.001"),
        ({"seed": 7}, "seed: was 42, is now 7"),
        ({"lora_r": 4}, "lora_r: was 16, is now 4"),
        ({"lora_dropout": 0.5}, "lora_dropout: was 0.05, is now 0.5"),
        ({"cutoff_len": 64}, "cutoff_len: was 128, is now 64"),
        ({"lr_scheduler": "linear"}, "lr_scheduler: was 'cosine', is now 'linear'"),
        ({"micro_batch_size": 2}, "was 8 examples a step, is now 4"),
        ({"deterministic": True}, "deterministic: was False, is now True"),
    ],
)
def test_what_alters_the_past_is_refused_by_name(past, tmp_path, values, said):
    before, _ = past()
    with pytest.raises(RunError, match="would alter steps already taken") as caught:
        check_resume_compatible(RunDir(tmp_path), before, *past(**values))
    assert said in caught.value.message


# Every setting of a recipe, with another value than its default, and whether a run that is resumed
# may have it changed. A new setting has to be put into one of the two.
MAY_CHANGE = {
    "model": "other",
    "data": "other.jsonl",
    "val_data": "val.jsonl",
    "output_dir": "elsewhere",
    "strict": True,
    "epochs": 7.0,
    "max_steps": 900,
    "gradient_checkpointing": True,
    "memory_limit": "4GiB",
    "weight_offload": "off",
    "fsdp": {},
    "sharding": "off",
    "save_every": "10min",
    "keep_checkpoints": 5,
    "eval_every": 3,
    "eval_tasks": ["general:5"],
    "load_best_model_at_end": True,
    "early_stopping_patience": 2,
    "from_adapter": "elsewhere",
    "log_every": 2,
    "report_to": ["tensorboard"],
    "offline": True,
    "memory_probe": True,
    "trust_remote_code": True,
    "reward_funcs": ["numeric_answer"],  # compared by content
}
MAY_NOT_CHANGE = {
    "revision": "v2",
    "method": "qlora",
    "objective": "dpo",
    "beta": 0.3,
    "simpo_gamma": 1.0,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "num_generations": 4,
    "max_completion_length": 64,
    "max_prompt_length": 64,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "loss_type": "dr_grpo",
    "epsilon": 0.1,
    "epsilon_high": 0.28,
    "scale_rewards": "none",
    "num_iterations": 2,
    "mask_truncated_completions": True,
    "use_bias_correction_kl": False,
    "importance_sampling_mode": "token_truncate",
    "importance_sampling_clip_max": 2.0,
    "columns": {"instruction": "q"},
    "system": "Be kind.",
    "val_size": 3,
    "train_on": "last",
    "train_on_thoughts": False,
    "template_kwargs": {"enable_thinking": True},
    "template_date": "2026-01-31",
    "cutoff_len": 64,
    "on_overlength": "drop",
    "documents": "instruction",
    "document_overlap": 7,
    "lora_r": 4,
    "lora_alpha": 5,
    "lora_dropout": 0.5,
    "target_modules": ["q_proj"],
    "expert_adapters": "all",
    "router_aux_loss_coef": 0.01,
    "use_dora": True,
    "use_rslora": True,
    "init_lora_weights": "gaussian",
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_tokens": ["<gate>"],
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4.0},
    "exclude_modules": ["q_proj"],
    "layers_to_transform": [0],
    "learning_rate": 1e-3,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.5,
    "warmup_steps": 9,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "optimizer": "sgd",
    "packing": False,
    "fused_layers": "off",
    "dtype": "float32",
    "seed": 7,
    "deterministic": True,
    "lora": {"lora_bias": True},
    "loraplus_lr_ratio": 4.0,
    "training_args": {"adam_beta2": 0.9},
    "metric_for_best_model": "eval_general_skills_accuracy",
}
# Settings that belong to an objective.
BELONGS_TO = {
    "beta": "dpo",
    "simpo_gamma": "simpo",
    "desirable_weight": "kto",
    "undesirable_weight": "kto",
    **dict.fromkeys(GRPO_KEYS, "grpo"),
}
# What an objective needs besides.
NEEDS = {"grpo": {"reward_funcs": ["exact_answer"]}}
# Their product may not change.
TOGETHER = {"micro_batch_size", "gradient_accumulation_steps"}


def objective_of(key):
    """Settings of the objective that reads `key`."""
    name = BELONGS_TO.get(key)
    return {"objective": name, **NEEDS.get(name, {})} if name else {}


@pytest.fixture(scope="module")
def record(tiny_model_dir, tiny_data, tokenizer):
    """`record(**values)`: what a checkpoint of a run with these settings keeps; its examples."""
    places = {"model": str(tiny_model_dir), "data": str(tiny_data)}
    train = prepare_data(Recipe(**places), tokenizer).train
    return lambda **values: (
        run_fingerprint(Recipe(**{**places, **values}), train, tokenizer),
        train,
    )


def test_every_setting_is_known_to_be_harmless_or_not():
    assert MAY_CHANGE.keys() | MAY_NOT_CHANGE.keys() | TOGETHER == Recipe.model_fields.keys()
    assert not MAY_CHANGE.keys() & MAY_NOT_CHANGE.keys()


@pytest.mark.parametrize("key", MAY_NOT_CHANGE)
def test_any_setting_that_alters_a_step_is_refused_by_name(record, tmp_path, key):
    same = objective_of(key)
    before, _ = record(**same)
    now = record(**same, **{key: MAY_NOT_CHANGE[key]})
    with pytest.raises(RunError) as caught:
        check_resume_compatible(RunDir(tmp_path), before, *now)
    lines = caught.value.message.splitlines()[1:]
    assert f"  {key}: was " in caught.value.message
    # A method brings its own rank, rate and the like, an objective its rate and dropout.
    assert len(lines) == 1 or key in ("method", "objective")


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_any_setting_that_alters_no_step_may_change(record, tmp_path, key):
    same = objective_of(key)
    before, _ = record(**same)
    now = record(**{**same, key: MAY_CHANGE[key]})
    check_resume_compatible(RunDir(tmp_path), before, *now)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, '{"question": "New?", "answer": "Yes."}'], "1 row is new or changed"),
        (lambda rows: rows[:-1], "1 of its rows is missing"),
        (lambda rows: [rows[0].replace("red", "rot"), *rows[1:]], "the first rows.jsonl:1"),
        (lambda rows: rows[::-1], "the same rows, reordered"),
    ],
    ids=["appended", "cut", "edited", "reordered"],
)
def test_changed_data_is_refused_with_the_row(past, tmp_path, change, said):
    before, train = past(val_size=0)
    remember_rows(RunDir(tmp_path), train)
    with pytest.raises(RunError, match="the data is not what this run trained on") as caught:
        check_resume_compatible(RunDir(tmp_path), before, *past(change(past.lines), val_size=0))
    assert said in caught.value.message
    tokens = sum(len(example.input_ids) for example in train)
    then = f"then {len(train)} examples, {tokens:,} tokens, sha256 {train.digest()[:12]}; now "
    assert then in caught.value.message


def test_changed_data_is_refused_without_the_list_of_rows_too(past, tmp_path):
    before, _ = past()
    with pytest.raises(RunError, match=r"data_rows\.npy is missing"):
        check_resume_compatible(RunDir(tmp_path), before, *past(past.lines[2:]))


def test_another_template_is_refused(past, tmp_path, tokenizer, monkeypatch):
    before, _ = past()
    monkeypatch.setattr(tokenizer, "chat_template", "# " + tokenizer.chat_template)
    with pytest.raises(RunError, match="chat template is not the one"):
        check_resume_compatible(RunDir(tmp_path), before, *past())


def test_the_record_is_json_and_names_no_place(past, tiny_model_dir, tmp_path):
    record, _ = past()
    text = json.dumps(record)
    assert json.loads(text) == record
    assert str(tmp_path) not in text
    assert str(tiny_model_dir) not in text


def test_a_setting_that_an_older_version_did_not_know_had_its_default(past, tmp_path):
    before, train = past()
    del before["settings"]["deterministic"]
    check_resume_compatible(RunDir(tmp_path), before, past()[0], train)


def test_other_versions_and_another_spelling_of_the_tokenizer_are_said():
    now = {"versions": {"torch": "2", "peft": "1"}, "tokenizer": "a"}
    assert harmless_changes(now, now) == []
    before = {"versions": {"torch": "1", "peft": "1"}, "tokenizer": "b"}
    versions, tokenizer = harmless_changes(before, now)
    assert versions == "other versions than before: torch 1 -> 2"
    assert "the training rows are the same" in tokenizer


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"ranks": 1}, {"ranks": 2}, "1 rank before, 2 now: each step has the same examples"),
        ({"ranks": 4}, {"ranks": 1}, "4 ranks before, 1 now: each step has the same examples"),
        ({}, {"ranks": 2}, "1 rank before, 2 now: each step has the same examples"),
    ],
)
def test_another_number_of_ranks_is_said(before, now, said):
    alike = {"versions": {}, "tokenizer": "a"}
    (line,) = harmless_changes({**alike, **before}, {**alike, **now})
    assert line.startswith(said)
    assert harmless_changes({**alike, "ranks": 2}, {**alike, "ranks": 2}) == []
