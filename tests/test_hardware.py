"""The same machine gets the same device, with a reason for each choice."""

import pytest

from lorakit import hardware
from lorakit.errors import RecipeError


def test_a_cpu_gets_bf16_only_where_it_is_native(monkeypatch):
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: {"avx2", "avx512_bf16"})
    device = hardware.detect_device(prefer="cpu")
    assert (device.kind, device.dtype) == ("cpu", "bfloat16")
    assert "avx512_bf16" in device.reasons["dtype"]
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: {"avx2"})
    assert hardware.detect_device(prefer="cpu").dtype == "float32"


def test_what_the_recipe_asks_for_wins():
    device = hardware.detect_device("float32", prefer="cpu")
    assert device.dtype == "float32"
    assert device.reasons["dtype"] == "the recipe asks for it"
    assert device.memory_bytes > 0


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(RecipeError, match="float16"):
        hardware.detect_device("float16", prefer="cpu")


@pytest.mark.parametrize(
    ("capability", "asked", "dtype"),
    [
        ((9, 0), "auto", "bfloat16"),
        ((8, 0), "float16", "float16"),
        ((7, 5), "auto", "float16"),
        ((7, 5), "bfloat16", "float16"),
    ],
)
def test_cards_without_bf16_get_float16(monkeypatch, capability, asked, dtype):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    properties = type("P", (), {"total_memory": 16 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = hardware.detect_device(asked)
    assert (device.kind, device.dtype) == ("cuda", dtype)
    assert device.reasons["dtype"]


@pytest.mark.parametrize(("capability", "fast"), [((7, 0), False), ((7, 5), True), ((9, 0), True)])
def test_kernels_run_from_a_t4_on(monkeypatch, capability, fast):
    import importlib.util

    there = importlib.util.find_spec("triton") is not None
    assert hardware.runs_kernels(capability) is (fast and there)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not hardware.runs_kernels(capability)


def test_a_container_is_held_to_its_limit(tmp_path):
    free = hardware.host_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.host_memory(tmp_path) == free
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert hardware.host_memory(tmp_path) == 2**30
