"""The settings that a sweep varies: how they are written, combined, named and refused."""

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import GRPO_KEYS, Recipe
from lorakit.sweeps.variations import (
    CANNOT_VARY,
    MOST_RUNS,
    Range,
    check_different,
    check_vary,
    combinations,
    describe_settings,
    given_vary,
    read_vary,
    run_name,
    runs_of,
    with_settings,
)


@pytest.fixture
def recipe():
    return load_recipe(model="demo", data="demo", seed=7)


def test_values_are_read_as_in_a_recipe():
    pairs = ["learning_rate=5e-5, 1e-4", "target_modules=[q_proj, v_proj],all-linear", "bias=none"]
    assert read_vary(pairs) == {
        "learning_rate": [5e-5, 1e-4],
        "target_modules": [["q_proj", "v_proj"], "all-linear"],
        "bias": ["none"],
    }
    assert read_vary(["system='a, b',c"]) == {"system": ["a, b", "c"]}
    assert read_vary(["lr=1e-4", "r=8,16"]) == {"learning_rate": [1e-4], "lora_r": [8, 16]}


def test_ranges_over_orders_of_magnitude_are_logarithmic():
    vary = read_vary(["learning_rate=1e-5..1e-3", "lora_r=4..64", "lora_dropout=0.0..0.2"])
    assert vary == {
        "learning_rate": Range(1e-5, 1e-3, whole=False, log=True),
        "lora_r": Range(4, 64, whole=True, log=False),
        "lora_dropout": Range(0.0, 0.2, whole=False, log=False),
    }
    assert given_vary({"learning_rate": "1e-5..1e-3"})["learning_rate"] == vary["learning_rate"]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["learning_rate"], "expected key=value,value"),
        (["learning_rate="], "expected key=value,value"),
        (["lr=1e-4", "learning_rate=2e-4"], "is given twice"),
        (["learning_rate=1e-3..1e-5"], "1e-3 is not below 1e-5"),
        (["lora=!!python/object:os.system 1"], "tags"),
    ],
)
def test_what_is_no_list_of_values_is_refused(pairs, said):
    with pytest.raises(RecipeError) as caught:
        read_vary(pairs)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ({"lerning_rate": [1e-4]}, "lerning_rate: unknown key; did you mean learning_rate?"),
        ({"batch_size": [4]}, "did you mean micro_batch_size?"),
        ({"learning_rate": [1e-4, 2]}, "learning_rate=2: input should be less than 1"),
        ({"lora_r": [8, "big"]}, "lora_r=big: input should be a valid integer"),
        ({"learning_rate": Range(1e-4, 5, False, True)}, "learning_rate=5: "),
        ({"lora_r": [8, 16, 8]}, "lora_r: 8 is given twice"),
        ({"lora_r": []}, "lora_r: has no value"),
        ({"model": ["a", "b"]}, "model cannot vary: runs of a sweep share one base"),
        ({"method": ["lora", "qlora"]}, "start one sweep for each value"),
        ({"output_dir": ["a", "b"]}, "it does not change the adapter"),
        ({"seed": [1, 2]}, "seed: is varied, and --seeds gives seeds too"),
    ],
)
def test_a_fault_names_the_key_and_the_value(recipe, vary, said):
    with pytest.raises(RecipeError) as caught:
        check_vary(recipe, vary, seeds=2)
    assert said in caught.value.message


def test_all_faults_are_listed_at_once(recipe):
    with pytest.raises(RecipeError, match="3 faults") as caught:
        check_vary(recipe, {"lora_r": [0, 8], "model": ["x"], "nothing": [1]}, seeds=1)
    assert all(key in caught.value.message for key in ("lora_r=0", "model", "nothing"))


def test_good_values_pass(recipe):
    check_vary(recipe, {"learning_rate": [1e-4], "seed": [1, 2], "use_dora": [True, False]}, 1)
    check_vary(recipe, {"training_args.adam_beta2": [0.95, 0.999]}, 2)


# Settings that give another adapter on the same base. A new setting has to be put here or into
# CANNOT_VARY.
VARIES = {
    *("data", "columns", "system", "val_data", "val_size", "train_on", "train_on_thoughts"),
    *("template_kwargs", "template_date", "cutoff_len", "on_overlength", "documents"),
    *("document_overlap", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "use_dora"),
    *("use_rslora", "init_lora_weights", "bias", "modules_to_save", "trainable_tokens"),
    *("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "lora"),
    *("learning_rate", "loraplus_lr_ratio", "lr_scheduler", "warmup_ratio", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "optimizer", "epochs", "max_steps", "micro_batch_size"),
    *("gradient_accumulation_steps", "packing", "seed", "load_best_model_at_end"),
    *("early_stopping_patience", "training_args", "router_aux_loss_coef", "beta", "simpo_gamma"),
    *("desirable_weight", "undesirable_weight", *GRPO_KEYS),
}


def test_every_key_of_a_recipe_is_known_to_vary_or_not():
    assert CANNOT_VARY.keys() | VARIES == Recipe.model_fields.keys()
    assert not CANNOT_VARY.keys() & VARIES


def test_combinations_change_the_last_key_fastest():
    found = combinations({"lora_r": [8, 16], "learning_rate": [1e-4, 2e-4]})
    assert [tuple(row.values()) for row in found] == [(8, 1e-4), (8, 2e-4), (16, 1e-4), (16, 2e-4)]
    assert combinations({}) == [{}]
    with pytest.raises(RecipeError, match="a range is searched"):
        combinations({"learning_rate": Range(1e-5, 1e-3, False, True)})
    with pytest.raises(RecipeError, match="1,010 combinations"):
        combinations({"lora_r": list(range(101)), "seed": list(range(MOST_RUNS // 100))})


def test_each_seed_is_a_run_with_the_other_settings(recipe):
    runs = list(runs_of(recipe, {"lora_r": 4}, 2, seeds=2, digits=2))
    assert [run.name for run in runs] == ["03-lora_r_4-seed_7", "03-lora_r_4-seed_8"]
    assert [run.resolved.recipe.seed for run in runs] == [7, 8]
    assert {run.resolved.recipe.lora_r for run in runs} == {4}
    assert runs[0].resolved.origins["lora_r"] == "--vary"
    assert runs[0].resolved.origins["learning_rate"].startswith("default")
    (alone,) = runs_of(recipe, {"lora_r": 4}, 0, seeds=1, digits=1)
    assert "seed" not in alone.settings


def test_two_names_for_one_recipe_are_refused(recipe):
    runs = [
        run
        for number, size in enumerate((8, 8.0))
        for run in runs_of(recipe, {"lora_alpha": size}, number, 1, 1)
    ]
    check_different(runs[:1])
    with pytest.raises(RecipeError, match="have the same settings"):
        check_different([runs[0], runs[0]])


def test_keys_of_mappings_keep_the_others(recipe):
    given = with_settings(recipe, {"training_args.adam_beta1": 0.8})
    both = with_settings(given, {"training_args.adam_beta2": 0.9})
    assert both.recipe.training_args == {"adam_beta1": 0.8, "adam_beta2": 0.9}


def test_names_are_short_and_safe_for_a_shell():
    assert run_name(0, {"learning_rate": 5e-5}, 1) == "1-learning_rate_5e-05"
    name = run_name(11, {"system": "rm -rf / ; $(x)" * 20, "seed": 3}, 3)
    assert name.startswith("012-system_rm_-rf_")
    assert name.endswith("-seed_3")
    assert len(name) <= 81
    assert not set(name) & set(" ;$()/")
    assert run_name(0, {"target_modules": ["q_proj"]}, 1) == "1-target_modules"
    assert describe_settings({"learning_rate": 1e-4, "use_dora": True}) == (
        "learning_rate 0.0001, use_dora true"
    )
