"""This machine enters; a Device leaves: kind, memory, dtype, attention, and the reason for each.

Nothing is timed: the same machine always gets the same answer, so a resumed run does too.

A memory limit enters; torch's allocator leaves held to it, less what CUDA itself takes.

The CUDA context, kernels and libraries take memory outside torch's allocator: 612 MiB at start, 845
to 871 MiB after the first steps on an H200 (torch 2.11, driver 580). NVML counts it per process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil

from lorakit.errors import RecipeError
from lorakit.types import Device

# Instruction sets that multiply bf16 natively. Without them bf16 on a CPU is emulated and slower
# than float32; with AVX512_BF16 a SmolLM2 step took 1.4 s against 2.8 s in float32.
_CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}

# Oldest compute capability that our Triton kernels run on: a T4's (ops/backend.py).
KERNELS_FROM = (7, 5)


def detect_device(dtype: str = "auto", prefer: Literal["auto", "cpu"] = "auto") -> Device:
    """Choose the device and the base model's dtype for this machine.

    Args:
        dtype: "auto", or the type the recipe asks for; a CUDA card without bf16 gets float16.
        prefer: "cpu" ignores any accelerator.
    """
    import torch

    if prefer == "auto" and torch.cuda.is_available():
        return _cuda(dtype)
    if prefer == "auto" and torch.backends.mps.is_available():
        chosen, why = _asked(dtype) or ("float16", "Apple GPUs have no fast bfloat16 matmul")
        memory = psutil.virtual_memory().total
        reasons = {"kind": "Apple GPU", "dtype": why}
        return Device("mps", platform.processor(), memory, chosen, "sdpa", reasons)
    return _cpu(dtype)


def cards() -> int:
    """CUDA cards that this process sees."""
    import torch

    return torch.cuda.device_count()


def _cuda(dtype: str) -> Device:
    import torch

    _let_segments_grow()
    index = torch.cuda.current_device()
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    memory = torch.cuda.get_device_properties(index).total_memory
    reasons = {"kind": f"CUDA device {index}, compute capability {major}.{minor}"}
    native_bf16 = major >= 8
    if dtype == "bfloat16" and not native_bf16:
        chosen = "float16"
        reasons["dtype"] = f"bfloat16 was asked for, {name} has none (needs capability 8.0)"
    else:
        automatic = (
            ("bfloat16", "the card multiplies bfloat16 natively")
            if native_bf16
            else ("float16", f"{name} has no bfloat16 (needs capability 8.0); with loss scaling")
        )
        chosen, reasons["dtype"] = _asked(dtype) or automatic
    return Device(
        "cuda", name, memory, chosen, "sdpa", reasons, kernels=runs_kernels((major, minor))
    )


def runs_kernels(capability: tuple[int, int]) -> bool:
    """Whether our Triton kernels run here on a card of this compute capability."""
    import torch

    found = importlib.util.find_spec("triton") is not None and not torch.version.hip
    return found and capability >= KERNELS_FROM


def _let_segments_grow() -> None:
    """With fixed segments 3 of 17 GiB were holes between tensors; a user's own settings win.

    Torch reads its variable when it is imported, which a notebook has long done: only the call
    that `torch.cuda.memory._set_allocator_settings` stands for still works then.
    """
    import torch

    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        return
    settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (settings or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def _cpu(dtype: str) -> Device:
    flags = _cpu_flags() & _CPU_BF16_FLAGS
    automatic = (
        ("bfloat16", f"this CPU multiplies bfloat16 natively ({', '.join(sorted(flags))})")
        if flags
        else ("float32", "this CPU has no native bfloat16")
    )
    if dtype == "float16":
        raise RecipeError(
            "dtype: float16 cannot be trained on a CPU", hint="set dtype: auto, or use a GPU"
        )
    chosen, why = _asked(dtype) or automatic
    reasons = {"kind": "no CUDA device found", "dtype": why}
    return Device("cpu", _cpu_name(), host_memory(), chosen, "sdpa", reasons)


def host_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """RAM of this machine in bytes, or of the container where that is held to less."""
    total = int(psutil.virtual_memory().total)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (groups / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def _asked(dtype: str) -> tuple[str, str] | None:
    return None if dtype == "auto" else (dtype, "the recipe asks for it")


def _cpu_flags() -> set[str]:
    """Feature flags as Linux lists them; empty elsewhere, which means float32."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    for line in info.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


MIB = 2**20
# Context, kernels and library handles where they cannot be measured: an H100's.
CUDA_CONTEXT_BYTES = 840 * MIB
# Kernels and library handles are loaded when they are first used: 233 to 259 MiB on an H200.
LOADED_LATER_BYTES = 260 * MIB


def process_bytes() -> int | None:
    """This process's memory on the current GPU by NVML; None where NVML does not say.

    It does not in some containers (another process namespace) and under Windows' display driver.
    """
    import torch

    try:
        # nvidia-ml-py asks the driver itself; torch's own reader knows whole devices only.
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception:  # no NVML, no permission, a MIG slice: the limit is then kept by an estimate
        return None
    sizes = [process.usedGpuMemory for process in running if process.pid == os.getpid()]
    return int(sizes[0]) if sizes and sizes[0] else None


def outside_bytes() -> int | None:
    """What the driver counts for this process beyond torch's allocator."""
    import torch

    used = process_bytes()
    return None if used is None else max(0, used - torch.cuda.memory_reserved())


def measure_context(device: Device) -> Device:
    """`device` with the memory that its CUDA context takes here once all kernels are loaded.

    Makes the context, so it is for processes that go on to train.
    """
    import torch

    if device.kind != "cuda":
        return device
    torch.zeros(1, device="cuda")
    outside = outside_bytes()
    if outside is None:
        return device
    return replace(device, context_bytes=outside + LOADED_LATER_BYTES)


class MemoryCap:
    """Keeps this process within `limit` bytes of the GPU, by the driver's count.

    Args:
        limit: None leaves the allocator free.
        device: the one it runs on; `context_bytes` is expected outside torch's allocator.
    """

    def __init__(self, limit: int | None, device: Device) -> None:
        self.limit = limit if device.kind == "cuda" else None
        self.outside = device.context_bytes or CUDA_CONTEXT_BYTES
        self.tighten()

    def tighten(self) -> None:
        """Cap the allocator at what the limit leaves; CUDA's own share only ever grows."""
        if self.limit is None:
            return
        self.outside = max(self.outside, outside_bytes() or 0)
        _set_allowed(self.limit - self.outside)


def cap_finished_run(limit: int | None, device: Device, base_bytes: int) -> None:
    """Hold a finished run to its `memory_limit`, unless its base alone is larger.

    A base that was streamed in training is loaded as a unit for evaluation and chat.

    Args:
        base_bytes: of the base, loaded already.
    """
    if limit is None or device.kind != "cuda":
        return
    if base_bytes + (device.context_bytes or CUDA_CONTEXT_BYTES) > limit:
        logging.getLogger("lorakit").warning(
            "note: memory_limit %.1f GiB does not hold the base (%.1f GiB), which training "
            "streamed from host memory; the limit is not kept here",
            limit / 2**30,
            base_bytes / 2**30,
        )
        return
    MemoryCap(limit, device)


def _set_allowed(size: int) -> None:
    import torch

    index: Any = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, size) / total), index)
