"""A memory limit enters; torch's allocator leaves held to it, less what CUDA itself takes.

The CUDA context, kernels and libraries take memory outside torch's allocator: 612 MiB at start, 845
to 871 MiB after the first steps on an H200 (torch 2.11, driver 580). NVML counts it per process.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

from lorakit.records import Device

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
