"""Seed defaults per method, strict types, bounds."""

import pytest
from pydantic import ValidationError

from lorakit.recipe.aliases import LORA_KEYS, SYNONYMS, TRAINING_KEYS
from lorakit.recipe.schema import METHOD_DEFAULTS, Recipe


@pytest.mark.parametrize(
    ("method", "r", "alpha", "dropout", "rate", "micro", "accumulation"),
    [("lora", 16, 32, 0.05, 1e-4, 1, 8), ("qlora", 64, 16, 0.1, 2e-4, 4, 4)],
)
def test_seed_defaults(method, r, alpha, dropout, rate, micro, accumulation):
    recipe = Recipe(model="m", data="d", method=method)
    assert (recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout) == (r, alpha, dropout)
    assert (recipe.learning_rate, recipe.cutoff_len) == (rate, 2048)
    assert (recipe.micro_batch_size, recipe.gradient_accumulation_steps) == (micro, accumulation)
    assert recipe.examples_per_step == micro * accumulation


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_r": 0},
        {"lora_r": "16"},
        {"lora_dropout": 1.0},
        {"learning_rate": -1e-4},
        {"method": "full"},
        {"unknown": 1},
        {"val_size": 1.5},
        {"val_data": "v.jsonl", "val_size": 0.1},
        {"use_dora": 1},
        {"report_to": ["comet"]},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        Recipe(**{"model": "m", "data": "d", **wrong})


def test_held_out_defaults_to_a_twentieth_unless_other_data_is_named():
    assert Recipe(model="m", data="d").held_out == 0.05
    assert Recipe(model="m", data="d", val_data="v").held_out == 0.0
    assert Recipe(model="m", data="d", val_size=20).held_out == 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        ("15GiB", 15 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("12GB", 12 * 10**9),
        ("512MiB", 512 * 2**20),
        ("500 MB", 500 * 10**6),
    ],
)
def test_a_memory_limit_is_read_with_its_unit(text, size):
    assert Recipe(model="m", data="d", memory_limit=text).memory_limit_bytes == size


@pytest.mark.parametrize(
    ("given", "minutes"), [(100, None), ("1min", 1), ("10min", 10), ("90 min", 90)]
)
def test_checkpoints_are_counted_in_steps_or_minutes(given, minutes):
    assert Recipe(model="m", data="d", save_every=given).save_minutes == minutes


def test_warm_up_is_a_share_of_the_steps_or_a_number_of_them():
    assert Recipe(model="m", data="d", warmup_ratio=0.1).warmup_of(256) == 26
    assert Recipe(model="m", data="d").warmup_of(10) == 0
    assert Recipe(model="m", data="d", warmup_steps=0, warmup_ratio=0.1).warmup_of(256) == 0
    assert Recipe(model="m", data="d", warmup_steps=7, warmup_ratio=0.1).warmup_of(256) == 7


def test_recipe_is_frozen():
    with pytest.raises(ValidationError):
        Recipe(model="m", data="d").lora_r = 3


def test_tables_name_real_keys():
    keys = {*SYNONYMS.values(), *LORA_KEYS.values(), *TRAINING_KEYS.values()}
    assert keys <= set(Recipe.model_fields)
    assert not set(SYNONYMS) & set(Recipe.model_fields)
    for values in METHOD_DEFAULTS.values():
        assert set(values) <= set(Recipe.model_fields)


def test_a_source_may_stand_alone_or_with_a_weight():
    plain = Recipe(model="demo", data="a.jsonl")
    assert (plain.sources, plain.weights) == (["a.jsonl"], [1.0])
    both = Recipe(model="demo", data=[{"source": "a.jsonl", "weight": 0.5}, "b.jsonl"])
    assert (both.sources, both.weights) == (["a.jsonl", "b.jsonl"], [0.5, 1.0])
    for wrong in (0, -1, 101, "2"):
        with pytest.raises(ValidationError):
            Recipe(model="demo", data=[{"source": "a.jsonl", "weight": wrong}])


@pytest.mark.parametrize("key", ["epochs", "lora_alpha", "learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_a_number_without_measure_is_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        Recipe(model="m", data="d", **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 10**400) for key in ("cutoff_len", "lora_r", "lora_alpha", "max_steps", "seed")),
        *((key, 10**400) for key in ("val_size", "document_overlap", "micro_batch_size")),
        ("epochs", 1e300), ("seed", 2**32), ("rank_pattern", {"a": 10**400}),
        ("memory_limit", "9" * 400 + "GiB"),
    ],
)  # fmt: skip
def test_numbers_beyond_all_use_are_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        Recipe(model="m", data="d", **{key: value})


@pytest.mark.parametrize(
    ("values", "examples", "steps"),
    [
        ({"epochs": 2.5}, 20, 8),  # half an epoch is a step and a half
        ({"epochs": 1.0}, 16, 2),
        ({"epochs": 1.0}, 17, 3),
        ({"epochs": 3.0}, 20, 9),  # 20 rows, 8 a step: 3 steps an epoch
        ({"epochs": 0.1}, 20, 1),
        ({"max_steps": 7}, 20, 7),
    ],
)
def test_steps_cover_the_epochs(values, examples, steps):
    assert Recipe(model="m", data="d", **values).total_steps(examples) == steps
