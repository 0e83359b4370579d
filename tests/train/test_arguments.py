"""TRL's arguments say what the recipe says; none of its own defaults gets in."""

import pytest
import torch

from lorakit.errors import DependencyError, RecipeError
from lorakit.hardware import detect_device
from lorakit.recipe import Recipe
from lorakit.records import Device
from lorakit.run_dir import RunDir
from lorakit.train.arguments import total_steps, training_arguments

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


def test_steps_cover_the_epochs():
    assert total_steps(recipe(epochs=3.0), 20) == 9  # 20 rows, 8 a step: 3 steps an epoch
    assert total_steps(recipe(epochs=0.1), 20) == 1
    assert total_steps(recipe(max_steps=7), 20) == 7


def test_eight_bit_optimizers_need_cuda(tmp_path):
    with pytest.raises(RecipeError, match="needs a CUDA card"):
        training_arguments(recipe(optimizer="paged_adamw_8bit"), CPU, RunDir(tmp_path), 1)


def test_an_absent_tracker_names_its_install_line(tmp_path):
    with pytest.raises(DependencyError, match="report_to: trackio") as caught:
        training_arguments(recipe(report_to=["trackio"]), CPU, RunDir(tmp_path), 1)
    assert caught.value.hint.startswith("pip install trackio")


def test_precision_follows_the_device(tmp_path):
    t4 = Device("cuda", "Tesla T4", 16 * 2**30, "float16", "sdpa")
    arguments = training_arguments(recipe(), CPU, RunDir(tmp_path), 1)
    assert (arguments.bf16, arguments.fp16) == (False, False)
    if torch.cuda.is_available():
        assert training_arguments(recipe(), t4, RunDir(tmp_path), 1).fp16
