"""Detect the device with its memory and dtype, and limit torch's allocator on it.

Detection measures no times, so the same machine always gives the same device, also on resume.

The CUDA context, kernels and libraries take memory outside torch's allocator: 612 MiB at start, 845
to 871 MiB after the first steps on an H200 (torch 2.11, driver 580). A memory limit includes it;
NVML counts it per process.
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
from lorakit.storage.units import MIB
from lorakit.types import Device

# Instruction sets that multiply bf16 natively. Without them bf16 on a CPU is emulated and slower
# than float32; with AVX512_BF16 a SmolLM2 step took 1.4 s against 2.8 s in float32.
_CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}

# Lowest compute capability for our Triton kernels: a T4's (ops/backend.py).
KERNELS_FROM = (7, 5)


def detect_device(dtype: str = "auto", prefer: Literal["auto", "cpu"] = "auto") -> Device:
    """Choose the device and the base model's dtype for this machine.

    Args:
        dtype: "auto", or the recipe's dtype; a CUDA GPU without bf16 gets float16 instead of it.
        prefer: "cpu" ignores any accelerator.
    """
    import torch

    if prefer == "auto" and torch.cuda.is_available():
        return _cuda(dtype)
    if prefer == "auto" and torch.backends.mps.is_available():
        chosen, why = _from_recipe(dtype) or ("float16", "Apple GPUs have no fast bfloat16 matmul")
        memory = psutil.virtual_memory().total
        reasons = {"kind": "Apple GPU", "dtype": why}
        return Device("mps", platform.processor(), memory, chosen, reasons)
    return _cpu(dtype)


def _cuda(dtype: str) -> Device:
    import torch

    _use_expandable_segments()
    index = torch.cuda.current_device()
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    memory = torch.cuda.get_device_properties(index).total_memory
    reasons = {"kind": f"CUDA device {index}, compute capability {major}.{minor}"}
    native_bf16 = major >= 8
    if dtype == "bfloat16" and not native_bf16:
        chosen = "float16"
        reasons["dtype"] = f"the recipe sets bfloat16, which {name} lacks (needs capability 8.0)"
    else:
        automatic = (
            ("bfloat16", "the GPU multiplies bfloat16 natively")
            if native_bf16
            else ("float16", f"{name} lacks bfloat16 (needs capability 8.0); with loss scaling")
        )
        chosen, reasons["dtype"] = _from_recipe(dtype) or automatic
    return Device("cuda", name, memory, chosen, reasons, kernels=runs_kernels((major, minor)))


def runs_kernels(capability: tuple[int, int]) -> bool:
    """Return True if our Triton kernels run here on a GPU of this compute capability.

    AMD's architectures (HIP) are 9.0 and higher where Triton supports them.
    """
    return importlib.util.find_spec("triton") is not None and capability >= KERNELS_FROM


def _use_expandable_segments() -> None:
    """Enable expandable segments, unless the user has set allocator options.

    Fixed segments fragmented 3 of 17 GiB. Torch reads its environment variable at import, which a
    notebook has already done; `torch.cuda.memory._set_allocator_settings` still works then.
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
    chosen, why = _from_recipe(dtype) or automatic
    reasons = {"kind": "no CUDA device found", "dtype": why}
    return Device("cpu", _cpu_name(), host_memory(), chosen, reasons)


def host_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """RAM of this machine in bytes, or the smaller memory limit of its container."""
    total = int(psutil.virtual_memory().total)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (groups / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def _from_recipe(dtype: str) -> tuple[str, str] | None:
    return None if dtype == "auto" else (dtype, "the recipe asks for it")


def _cpu_flags() -> set[str]:
    """CPU feature flags listed by Linux; empty on other systems, which means float32."""
    return set(_cpu_info("flags", "Features").split())


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(*names: str) -> str:
    """First value of one of these names in /proc/cpuinfo; "" on other systems than Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(names)), "")


# Context, kernels and library handles of an H100, used if they cannot be measured.
CUDA_CONTEXT_BYTES = 840 * MIB
# Kernels and library handles are loaded at first use: 233 to 259 MiB on an H200.
LOADED_LATER_BYTES = 260 * MIB


def process_bytes() -> int | None:
    """Read this process's memory on the current GPU from NVML; None if NVML does not report it.

    It does not in some containers (another process namespace) and under Windows' display driver.
    """
    import torch

    try:
        # nvidia-ml-py asks the driver per process; torch reports only the complete device.
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except (
        Exception
    ):  # NVML or permission is missing, or a MIG slice: the limit then uses an estimate
        return None
    sizes = [process.usedGpuMemory for process in running if process.pid == os.getpid()]
    return int(sizes[0]) if sizes and sizes[0] else None


def outside_bytes() -> int | None:
    """Bytes that the driver counts for this process outside torch's allocator, or None."""
    import torch

    used = process_bytes()
    return None if used is None else max(0, used - torch.cuda.memory_reserved())


def measure_context(device: Device) -> Device:
    """Return `device` with the measured memory of its CUDA context and all kernels.

    Creates the context, so only processes that will train should call it.
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
    """Limit this process to `limit` bytes of the GPU, as the driver counts them.

    Args:
        limit: bytes, or None for no limit.
        device: its `context_bytes` are reserved outside torch's allocator.
    """

    def __init__(self, limit: int | None, device: Device) -> None:
        self.limit = limit if device.kind == "cuda" else None
        self.outside = device.context_bytes or CUDA_CONTEXT_BYTES
        self.tighten()

    def tighten(self) -> None:
        """Cap the allocator at the limit minus CUDA's share, which never shrinks."""
        if self.limit is None:
            return
        self.outside = max(self.outside, outside_bytes() or 0)
        _set_allowed(self.limit - self.outside)


def cap_finished_run(limit: int | None, device: Device, base_bytes: int) -> None:
    """Apply the `memory_limit` of a finished run, unless its base alone is larger.

    A base that was offloaded in training is loaded completely for evaluation and chat.

    Args:
        base_bytes: size of the loaded base.
    """
    if limit is None or device.kind != "cuda":
        return
    if base_bytes + (device.context_bytes or CUDA_CONTEXT_BYTES) > limit:
        logging.getLogger("lorakit").warning(
            "note: memory_limit %.1f GiB is smaller than the base (%.1f GiB), which training "
            "offloaded to host memory; the limit is not applied",
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
