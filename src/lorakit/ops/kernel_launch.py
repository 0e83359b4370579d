"""Launch a kernel with the first settings that fit the GPU's shared memory.

A program's shared memory is 99 KiB at most on an RTX 3090, 4090, A10 or L4, 163 on an A100, 227 on
an H100, where the settings were chosen. They need up to 88 KiB at rank 64, 152 at rank 128 and 280
at rank 256: settings that a GPU rejects are reduced until they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from triton.runtime.errors import OutOfResources

Settings = dict[str, int]

SMALLEST_BLOCK = 16  # of a matrix product
_fitting: dict[Hashable, Settings] = {}


def launch_kernel(
    kernel: Any,
    settings: Settings,
    grid: Callable[[Settings], tuple[int, ...]],
    *arguments: Any,
    fixed: tuple[str, ...] = (),
    **constants: Any,
) -> None:
    """Run `kernel` on `grid(settings)`; the same GPU always gets the same settings.

    Args:
        fixed: settings that must not change, because other tensors depend on them.

    Raises:
        OutOfResources: even the smallest blocks do not fit.
    """
    first: Tensor = arguments[0]
    key = (kernel.fn, first.device, first.dtype, *settings.items(), *constants.items())
    chosen = _fitting.get(key, settings)
    while True:
        try:
            kernel[grid(chosen)](*arguments, **chosen, **constants)
        except OutOfResources:
            smaller = smaller_config(chosen, fixed)
            if smaller is None:
                raise
            chosen = smaller
        else:
            _fitting[key] = chosen
            return


def smaller_config(settings: Settings, fixed: tuple[str, ...] = ()) -> Settings | None:
    """The next settings that need less shared memory, cheapest first; None after the last."""
    if settings.get("num_stages", 1) > 1:
        return {**settings, "num_stages": settings["num_stages"] - 1}
    for block in ("BLOCK_N", "BLOCK_K", "BLOCK_M"):
        if block not in fixed and settings.get(block, 0) > SMALLEST_BLOCK:
            return {**settings, block: settings[block] // 2}
    return None
