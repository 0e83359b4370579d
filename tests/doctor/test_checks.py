"""Each fault made on purpose in the facts is found, named, and given a line to type."""

from dataclasses import replace

import pytest

from lorakit.doctor.checks import GIB, examine
from lorakit.doctor.system_info import Driver, SystemInfo

T4 = Driver("580.65", "13.0", (("Tesla T4", 15360, 3),))
WELL = SystemInfo(
    python=(3, 12, 3),
    system="linux",
    driver=T4,
    torch={
        "version": "2.13.0+cu130",
        "cuda": "13.0",
        "available": True,
        "gpu": "Tesla T4",
        "capability": [7, 5],
        "architectures": ["sm_75", "sm_80", "sm_90", "compute_120"],
    },
    bitsandbytes={"version": "0.50.2", "works_on": ["cpu", "cuda"]},
    triton={"version": "3.7.0"},
    packages={"torch": "2.13.0+cu130", "transformers": "5.23.0", "jinja2": "3.1.6"},
    needs=("transformers>=5.17,<5.24", "triton>=3.6; extra == 'dev'"),
    ram_bytes=32 * GIB,
    free_ram_bytes=24 * GIB,
    free_disk={"here": 90 * GIB, "model cache": 90 * GIB},
)
CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "available": False}
BLIND = {"version": "2.13.0+cu130", "cuda": "13.0", "available": False}

FAULTS = {
    "python": {"python": (3, 10, 1)},
    "driver": {"driver": Driver(error="NVIDIA-SMI has failed"), "torch": CPU_TORCH},
    "torch": {"torch": {"error": "ModuleNotFoundError: No module named 'torch'"}},
    "cpu_torch": {"torch": CPU_TORCH},
    "old_driver": {"driver": replace(T4, cuda="12.4"), "torch": BLIND},
    "hidden_gpu": {"torch": BLIND, "visible": ""},
    "no_cuda": {"torch": BLIND},
    "capability": {"torch": {**WELL.torch, "architectures": ["sm_80", "sm_90", "compute_90"]}},
    "bitsandbytes": {"bitsandbytes": {"error": "RuntimeError: no CUDA library"}},
    "triton": {"triton": {"error": "ImportError: libcuda"}},
    "disk": {"free_disk": {"here": GIB // 2, "model cache": 90 * GIB}},
    "cache": {"cache_writable": False, "cache": "/root/.cache"},
    "too_old": {"packages": {"jinja2": "3.1.4"}},
    "out_of_range": {"packages": {"transformers": "5.30.0"}},
    "torchvision": {"packages": {"torch": "2.13.0", "torchvision": "0.25.0"}},
    "login": {"model": "meta-llama/Llama-2-7b-chat-hf", "hub": "no token"},
    "gated": {"model": "meta-llama/Llama-2-7b-chat-hf", "hub": "gated"},
    "no_model": {"model": "someone/nothing", "hub": "missing"},
    "hub": {"model": "someone/model", "hub": "ConnectError: no route"},
}
NOTES = {
    "no_bf16": {},
    "gpu_in_use": {"driver": replace(T4, gpus=(("Tesla T4", 15360, 9000),))},
    "ram": {"free_ram_bytes": 2 * GIB},
    "home": {"home_writable": False, "home": "/home/me"},
    "colab_cpu": {"colab": True, "driver": None, "torch": CPU_TORCH},
    "colab_drive": {"colab": True},
}


def test_a_well_machine_has_nothing_broken():
    found = examine(WELL)
    assert {f.state for f in found} <= {"ok", "note"}
    assert [f.trouble for f in found if f.trouble] == ["no_bf16"]
    on_cpu = examine(replace(WELL, driver=None, torch=CPU_TORCH))
    assert not [f for f in on_cpu if f.trouble]


@pytest.mark.parametrize("trouble", FAULTS)
def test_a_fault_is_found_alone(trouble):
    broken = [f for f in examine(replace(WELL, **FAULTS[trouble])) if f.state == "broken"]
    assert [f.trouble for f in broken] == [trouble]
    assert broken[0].command
    assert "{" not in broken[0].command + broken[0].found


@pytest.mark.parametrize("trouble", NOTES)
def test_what_breaks_nothing_is_a_note(trouble):
    found = examine(replace(WELL, **NOTES[trouble]))
    assert trouble in [f.trouble for f in found if f.state == "note"]
    assert not [f for f in found if f.state == "broken"]


def test_messages_carry_the_facts():
    told = {f.trouble: f for f in examine(replace(WELL, torch=CPU_TORCH))}
    assert "2.13.0+cpu is a CPU build, and this machine has Tesla T4" in told["cpu_torch"].found
    assert "CUDA 13.0" in told["cpu_torch"].command


def test_a_model_too_large_for_the_cache_is_told_before_the_download():
    small = replace(WELL, free_disk={"model cache": 10 * GIB}, hub="ok")
    found = examine(replace(small, model="meta-llama/Llama-2-7b-chat-hf"))
    assert [f.trouble for f in found if f.state == "broken"] == ["disk"]
    assert "takes 13.0" in next(f.found for f in found if f.trouble == "disk")
    tiny = replace(small, model="Qwen/Qwen3-0.6B")
    assert not [f for f in examine(tiny) if f.state == "broken"]


@pytest.mark.parametrize(
    ("capability", "built", "fine"),
    [
        ([9, 0], ["sm_90a"], True),
        ([8, 9], ["sm_80"], True),
        ([8, 0], ["sm_86"], False),
        ([12, 0], ["sm_90", "compute_90"], True),
        ([7, 0], ["sm_75", "compute_90"], False),
    ],
)
def test_kernels_run_on_their_own_major_number_or_are_compiled(capability, built, fine):
    facts = replace(WELL, torch={**WELL.torch, "capability": capability, "architectures": built})
    assert ("capability" not in {f.trouble for f in examine(facts)}) == fine
