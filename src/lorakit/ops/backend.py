"""Select Triton kernels or plain torch for each operation.

Plain torch is the definition of every op; the kernels are tested against it. On a T4 (compute
capability 7.5) Triton does not use the matrix units: there cuBLAS computes the adapters' products,
and kernels compute the rest, and so on AMD GPUs (HIP), where no kernel's tiles were tuned. Older
GPUs, Apple devices and CPUs use plain torch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lorakit.hardware import KERNELS_FROM, runs_kernels

# For 7.5 Triton 3.9 multiplies float16 with scalar instructions; FlashAttention-2 also needs 8.0.
MATRIX_KERNELS_FROM = (8, 0)
_kept_to_definitions = False


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) if our kernels do not run on it, a T4's under HIP."""
    capability = torch.cuda.get_device_capability(index)
    if not runs_kernels(capability):
        return (0, 0)
    return KERNELS_FROM if torch.version.hip else capability


def has_kernels(tensor: Tensor) -> bool:
    """True if `tensor` is on a GPU that runs our Triton kernels."""
    return _runs(tensor, KERNELS_FROM)


def has_matrix_kernels(tensor: Tensor) -> bool:
    """True if the GPU also runs kernels with matrix products, and varlen attention."""
    return _runs(tensor, MATRIX_KERNELS_FROM)


def _runs(tensor: Tensor, since: tuple[int, int]) -> bool:
    if not tensor.is_cuda or _kept_to_definitions:
        return False
    return _capability(tensor.get_device()) >= since


@contextlib.contextmanager
def definitions_only() -> Iterator[None]:
    """Run all operations in plain torch, to compare the kernels with it."""
    global _kept_to_definitions
    _kept_to_definitions = True
    try:
        yield
    finally:
        _kept_to_definitions = False


def kernels_reason(device_kind: str) -> str:
    """Describe the implementation of the operations on this machine."""
    if device_kind != "cuda":
        return "plain torch (no CUDA GPU)"
    capability = torch.cuda.get_device_capability(torch.cuda.current_device())
    present, oldest = (".".join(map(str, c)) for c in (capability, KERNELS_FROM))
    if capability < KERNELS_FROM:
        return f"plain torch (compute capability {present}; our kernels need {oldest})"
    if not runs_kernels(capability):
        return "plain torch (the triton package is missing)"
    if torch.version.hip:
        return "Triton kernels, matrix products by hipBLAS (not tried on an AMD GPU)"
    if capability < MATRIX_KERNELS_FROM:
        return f"Triton kernels, matrix products by cuBLAS (compute capability {present})"
    return "Triton kernels"
