"""A training state goes through its files to the bit; what does not fit is refused."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import SGD, Adafactor, AdamW
from transformers import get_scheduler

from lorakit.errors import RunError
from lorakit.hardware import detect_device
from lorakit.model.load import load_base
from lorakit.model.lora_config import add_adapter
from lorakit.recipe.schema import Recipe
from lorakit.train.checkpoint import (
    load_adapter,
    load_state,
    random_state,
    restore_random,
    restore_schedule,
    save_adapter_files,
    save_state,
)


def make(kind, steps=10, name="cosine"):
    torch.manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    groups = [
        {"params": [weights[0]], "weight_decay": 0.1},
        {"params": [weights[1]], "lr": 3e-3},
    ]
    more = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(groups, lr=1e-2, **more)
    return weights, optimizer, get_scheduler(name, optimizer, 2, steps)


def step(weights, optimizer, schedule):
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    schedule.step()


@pytest.mark.parametrize("kind", [AdamW, SGD, Adafactor])
def test_an_optimizer_goes_on_to_the_bit(tmp_path, kind):
    weights, optimizer, schedule = make(kind)
    for _ in range(3):
        step(weights, optimizer, schedule)
    save_state(tmp_path, optimizer, schedule, torch.amp.GradScaler("cpu"), [random_state()])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    kept = [w.detach().clone() for w in weights]
    for _ in range(3):
        step(weights, optimizer, schedule)

    others, second, plan = make(kind)
    for other, value in zip(others, kept, strict=True):
        other.data = value
    values = load_state(tmp_path)
    second.load_state_dict(values["optimizer"])
    restore_schedule(plan, second, values["scheduler"])
    restore_random(values["random"][0])
    assert values["scaler"]["scale"] == 65536.0
    for _ in range(3):
        step(others, second, plan)
    for other, weight in zip(others, weights, strict=True):
        assert torch.equal(other, weight)
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_all_generators_come_back():
    # Both keep the second number of a pair that they drew.
    random.gauss(0, 1), np.random.randn()
    kept = random_state()
    first = random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()
    restore_random(kept)
    assert (random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()) == first


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_finished_schedule_that_is_extended_takes_the_longer_ones_rates(tmp_path, name):
    """As if it had been that long all the time; never a step at rate 0."""
    long = make(AdamW, 10, name)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in long[1].param_groups])
        step(*long)
    weights, optimizer, schedule = make(AdamW, 6, name)
    for _ in range(6):
        step(weights, optimizer, schedule)
    assert optimizer.param_groups[0]["lr"] == 0.0
    save_state(tmp_path, optimizer, schedule, None, [])

    weights, optimizer, schedule = make(AdamW, 10, name)
    values = load_state(tmp_path)
    optimizer.load_state_dict(values["optimizer"])
    restore_schedule(schedule, optimizer, values["scheduler"])
    for wanted in rates[6:]:
        assert [group["lr"] for group in optimizer.param_groups] == wanted
        assert schedule.get_last_lr() == wanted
        assert min(wanted) > 0
        step(weights, optimizer, schedule)


def adapter(folder, **values):
    torch.manual_seed(3)
    recipe = Recipe(model="m", data="d", target_modules=["q_proj", "v_proj"], **values)
    return add_adapter(load_base(recipe, str(folder), detect_device("float32", "cpu")), recipe)


@pytest.mark.parametrize(
    "values", [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=repr
)
def test_every_trained_tensor_comes_back(tiny_model_dir, tmp_path, values):
    model = adapter(tiny_model_dir, **values)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_()
    save_adapter_files(model, tmp_path, False)
    fresh = adapter(tiny_model_dir, **values)
    load_adapter(fresh, tmp_path)
    for name, parameter in fresh.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name]), name


@pytest.mark.parametrize("fault", ["missing", "foreign", "renamed", "other rank"])
def test_an_adapter_that_does_not_fit_is_refused(tiny_model_dir, tmp_path, fault):
    save_adapter_files(adapter(tiny_model_dir), tmp_path, False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if fault == "missing":
        tensors.pop(first)
    elif fault == "foreign":
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(1)
    elif fault == "renamed":
        tensors = {f"_orig_mod.{name}": value for name, value in tensors.items()}
    else:
        tensors[first] = torch.zeros(3, 64)
    save_file(tensors, path)
    with pytest.raises(RunError, match="does not fit this recipe's model"):
        load_adapter(adapter(tiny_model_dir), tmp_path)


def test_what_is_neither_number_nor_tensor_is_no_state(tmp_path):
    _, optimizer, schedule = make(AdamW)
    with pytest.raises(TypeError, match="object cannot be kept"):
        save_state(tmp_path, optimizer, schedule, None, [object()])
