"""A memory limit binds the process, by the driver's count."""

import logging

import pytest
import torch

from lorakit import hardware
from lorakit.hardware import MIB, MemoryCap, cap_finished_run, measure_context, process_bytes
from lorakit.planning.known_models import shape_config
from lorakit.planning.memory import plan_memory
from lorakit.recipe.schema import Recipe
from lorakit.train.oom import run_catching_oom
from lorakit.types import Device

GIB = 2**30
GPU = Device("cuda", "NVIDIA H200", 139 * GIB, "bfloat16")
CPU = Device("cpu", "x", 8 * GIB, "float32")


@pytest.fixture
def allowed(monkeypatch):
    """What the allocator was capped at, in order; a driver whose count the test sets."""
    made, driver = [], {"outside": None}
    monkeypatch.setattr(hardware, "_set_allowed", made.append)
    monkeypatch.setattr(hardware, "outside_bytes", lambda: driver["outside"])
    return made, driver


def test_the_cap_leaves_room_for_what_cuda_takes_and_never_widens(allowed):
    made, driver = allowed
    cap = MemoryCap(4 * GIB, Device(**{**vars_of(GPU), "context_bytes": 870 * MIB}))
    for outside in (612 * MIB, 900 * MIB, 700 * MIB, None):
        driver["outside"] = outside
        cap.tighten()
    assert [4 * GIB - size for size in made] == [x * MIB for x in (870, 870, 900, 900, 900)]


def vars_of(device):
    return {name: getattr(device, name) for name in device.__slots__}


@pytest.mark.parametrize(("limit", "device"), [(None, GPU), (GIB, CPU)])
def test_without_a_limit_or_a_gpu_nothing_is_capped(allowed, limit, device):
    made, _ = allowed
    MemoryCap(limit, device).tighten()
    cap_finished_run(limit, device, 100 * GIB)
    assert made == []


def test_a_base_larger_than_the_limit_is_loaded_all_the_same_and_said(allowed, caplog):
    made, _ = allowed
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        cap_finished_run(4 * GIB, GPU, 13 * GIB)
        assert made == []
        assert "memory_limit 4.0 GiB is smaller than the base (13.0 GiB)" in caplog.text
        cap_finished_run(15 * GIB, GPU, 13 * GIB)
    assert len(made) == 1


def test_a_plan_counts_the_context_that_was_measured():
    config = shape_config("llama-2-7b")
    recipe = Recipe(model="m", data="d", target_modules=["q_proj"])
    measured = Device(**{**vars_of(GPU), "context_bytes": 333 * MIB})
    plans = [plan_memory(recipe, config, device) for device in (GPU, measured)]
    assert plans[1].parts["CUDA context"] == 333 * MIB
    assert plans[0].total_bytes - plans[1].total_bytes == (840 - 333) * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_allocator_stays_within_the_limit():
    from lorakit.hardware import detect_device

    device = measure_context(detect_device())
    assert device.context_bytes > 300 * MIB
    limit = process_bytes() + 2 * GIB
    try:
        MemoryCap(limit, device)
        kept = []

        def fill():
            while True:
                kept.append(torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"))

        result, trouble = run_catching_oom(fill)
        assert result is None
        assert "memory_limit allows" in trouble
        assert len(kept) >= 8
        assert process_bytes() <= limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
