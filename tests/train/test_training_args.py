"""TRL's arguments say what the recipe says; none of its own defaults gets in."""

import dataclasses
from typing import get_args

import pytest
import torch
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import SFTConfig

from lorakit.errors import DependencyError, RecipeError
from lorakit.hardware import detect_device
from lorakit.recipe.aliases import TRAINING_KEYS
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.training_args import (
    FORWARDED,
    OPTIMIZERS,
    check_training_settings,
    training_arguments,
)
from lorakit.types import OPTIMIZER_BYTES, Device

CPU = detect_device("float32", prefer="cpu")


def recipe(**values):
    return Recipe(model="m", data="d", target_modules=["q_proj", "v_proj"], **values)


def test_trl_defaults_never_leak(tmp_path):
    arguments = training_arguments(recipe(), CPU, RunDir(tmp_path), 100)
    assert arguments.max_length is None  # TRL would cut at 1024
    assert arguments.packing is False
    assert arguments.dataset_kwargs == {"skip_prepare_dataset": True}
    assert arguments.learning_rate == 1e-4  # TRL: 2e-5
    # One batch of the loader is one optimizer step: 1 x 8 of the recipe.
    assert arguments.per_device_train_batch_size == 8
    assert arguments.gradient_accumulation_steps == 1
    assert arguments.max_steps == 100
    assert arguments.logging_nan_inf_filter is False
    assert arguments.report_to == []
    assert arguments.warmup_steps == 3
    counted = recipe(warmup_steps=7)
    assert training_arguments(counted, CPU, RunDir(tmp_path), 100).warmup_steps == 7


def test_every_setting_of_training_reaches_the_trainer(tmp_path):
    """None of these is a default of the recipe, of transformers or of TRL."""
    asked = recipe(
        learning_rate=3e-4,
        lr_scheduler="linear",
        warmup_ratio=0.2,
        weight_decay=0.07,
        max_grad_norm=0.3,
        micro_batch_size=3,
        gradient_accumulation_steps=2,
        seed=5,
        log_every=4,
        save_every=7,
        eval_every=9,
    )
    arguments = training_arguments(asked, CPU, RunDir(tmp_path / "mine"), 50, held_out=True)
    expected = {
        "output_dir": str(tmp_path / "mine"),
        "run_name": "mine",
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "weight_decay": 0.07,
        "max_grad_norm": 0.3,
        "per_device_train_batch_size": 6,
        "max_steps": 50,
        "seed": 5,
        "data_seed": 5,
        "logging_steps": 4,
        "save_strategy": "steps",
        "save_steps": 7,
        "eval_strategy": "steps",
        "eval_steps": 9,
    }
    assert {name: getattr(arguments, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", "adamw_torch_fused"),
        ("adamw_8bit", "adamw_bnb_8bit"),
        ("paged_adamw_8bit", "paged_adamw_8bit"),
        ("adafactor", "adafactor"),
        ("sgd", "sgd"),
    ],
)
def test_the_optimizer_is_the_one_asked_for(tmp_path, name, kind):
    card = Device("cuda", "x", 2**30, "float32")
    assert training_arguments(recipe(optimizer=name), card, RunDir(tmp_path), 1).optim == kind


def test_nothing_is_scored_between_steps_without_held_out_rows_or_without_asking(tmp_path):
    for every, held_out in ((None, False), (None, True), (2, False)):
        asked = recipe(eval_every=every)
        arguments = training_arguments(asked, CPU, RunDir(tmp_path), 10, held_out)
        assert arguments.eval_strategy == "no"


def test_by_the_clock_only_the_last_step_is_saved_for_its_number(tmp_path):
    asked = recipe(save_every="10min")
    assert training_arguments(asked, CPU, RunDir(tmp_path), 123).save_steps == 123


def test_eight_bit_optimizers_need_cuda():
    with pytest.raises(RecipeError, match="needs a CUDA GPU"):
        check_training_settings(recipe(optimizer="paged_adamw_8bit"), CPU, 1)


def test_an_absent_tracker_names_its_install_line():
    with pytest.raises(DependencyError, match="report_to: trackio") as caught:
        check_training_settings(recipe(report_to=["trackio"]), CPU, 1)
    assert caught.value.hint.startswith("pip install trackio")


def test_precision_follows_the_device(tmp_path):
    t4 = Device("cuda", "Tesla T4", 16 * 2**30, "float16")
    arguments = training_arguments(recipe(), CPU, RunDir(tmp_path), 1)
    assert (arguments.bf16, arguments.fp16) == (False, False)
    if torch.cuda.is_available():
        assert training_arguments(recipe(), t4, RunDir(tmp_path), 1).fp16


def test_a_warm_up_that_outlasts_the_run_is_refused():
    message = r"warmup_steps: 100, but the run has 4 steps: .* 3% of 0.0001"
    with pytest.raises(RecipeError, match=message):
        check_training_settings(recipe(warmup_steps=100), CPU, 4)
    with pytest.raises(RecipeError, match="0% of"):
        check_training_settings(recipe(warmup_steps=1), CPU, 1)
    with pytest.raises(RecipeError, match="no effect with lr_scheduler: constant"):
        check_training_settings(recipe(warmup_steps=3, lr_scheduler="constant"), CPU, 10)
    for steps, values in ((5, {"warmup_steps": 4}), (1, {"warmup_steps": 0}), (1, {})):
        check_training_settings(recipe(**values), CPU, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_a_warm_up_by_ratio_leaves_a_step_at_the_full_rate(steps):
    assert recipe(warmup_ratio=0.999).warmup_of(steps) < steps


def test_scoring_without_held_out_rows_is_refused():
    check_training_settings(recipe(eval_every=2), CPU, 10, held_out=True)
    check_training_settings(recipe(), CPU, 10, held_out=False)
    with pytest.raises(RecipeError, match="eval_every: 2 has no effect"):
        check_training_settings(recipe(eval_every=2), CPU, 10, held_out=False)


def test_further_fields_reach_trl_as_they_are(tmp_path):
    values = {
        "adam_beta1": 0.5,
        "adam_beta2": 0.7,
        "adam_epsilon": 1e-5,
        "lr_scheduler_kwargs": {"num_cycles": 2.0},
        "optim_args": "a=1",
        "eval_delay": 3,
        "logging_first_step": True,
        "run_name": "mine",
        "project": "ours",
    }
    arguments = training_arguments(recipe(training_args=values), CPU, RunDir(tmp_path), 100)
    assert {name: getattr(arguments, name) for name in values} == values
    assert set(values) <= set(FORWARDED)


def test_fields_of_the_installed_sft_config(tmp_path):
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    assert set(TRAINING_KEYS) - {"warmup_ratio"} <= known
    for name in known - set(FORWARDED) - set(TRAINING_KEYS):
        with pytest.raises(RecipeError, match=f"{name} is not passed on"):
            check_training_settings(recipe(training_args={name: 1}), CPU, 10)


@pytest.mark.parametrize("name", get_args(Recipe.model_fields["optimizer"].annotation))
def test_each_optimizer_is_one_of_transformers(tmp_path, name):
    arguments = SFTConfig(str(tmp_path), optim=OPTIMIZERS.get(name, name), use_cpu=True)
    assert name in OPTIMIZER_BYTES
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError):  # its package is not installed
        with pytest.raises(DependencyError, match=f"optimizer: {name}: the package is not"):
            check_training_settings(recipe(optimizer=name), CPU, 10)


@pytest.mark.parametrize("name", get_args(Recipe.model_fields["lr_scheduler"].annotation))
def test_each_schedule_is_one_of_transformers(name):
    needs = {"min_lr": 1e-6} if name.endswith("min_lr") else {}
    needs |= {"num_decay_steps": 3} if name == "warmup_stable_decay" else {}
    given = recipe(lr_scheduler=name, training_args={"lr_scheduler_kwargs": needs})
    check_training_settings(given, CPU, 10)
    if needs:
        with pytest.raises(RecipeError, match=f"lr_scheduler: {name}: "):
            check_training_settings(recipe(lr_scheduler=name), CPU, 10)


def test_each_tracker_is_one_of_transformers():
    (names,) = get_args(Recipe.model_fields["report_to"].annotation)
    assert set(get_args(names)) <= set(INTEGRATION_TO_CALLBACK)
