"""A tensor enters; which implementation of the ops it gets leaves: Triton kernels or plain torch.

Plain torch is the definition of every op; the kernels are tested against it. On a T4 (compute
capability 7.5) Triton makes no use of the matrix units: there the adapters' products go through
cuBLAS, and kernels do what lies between. Older cards, Apple and CPUs take plain torch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lorakit.hardware import KERNELS_FROM, runs_kernels

# Triton 3.9 multiplies float16 for 7.5 with scalar instructions; FlashAttention-2 needs 8.0 too.
MATRIX_KERNELS_FROM = (8, 0)
_kept_to_definitions = False


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """(0, 0) where no kernel of ours runs."""
    found = torch.cuda.get_device_capability(index)
    return found if runs_kernels(found) else (0, 0)


def has_kernels(tensor: Tensor) -> bool:
    """True where `tensor` lies on a card that our Triton kernels run on."""
    return _runs(tensor, KERNELS_FROM)


def has_matrix_kernels(tensor: Tensor) -> bool:
    """True where those with matrix products do; so does torch's variable-length attention."""
    return _runs(tensor, MATRIX_KERNELS_FROM)


def _runs(tensor: Tensor, since: tuple[int, int]) -> bool:
    if not tensor.is_cuda or _kept_to_definitions:
        return False
    return _capability(tensor.get_device()) >= since


@contextlib.contextmanager
def definitions_only() -> Iterator[None]:
    """Everything in plain torch, to compare the kernels with."""
    global _kept_to_definitions
    _kept_to_definitions = True
    try:
        yield
    finally:
        _kept_to_definitions = False


def kernels_reason(device_kind: str) -> str:
    """What the ops run as on this machine, in a few words."""
    if device_kind != "cuda":
        return "plain torch (no CUDA card)"
    capability = torch.cuda.get_device_capability(torch.cuda.current_device())
    found, oldest = (".".join(map(str, c)) for c in (capability, KERNELS_FROM))
    if capability < KERNELS_FROM:
        return f"plain torch (compute capability {found}; our kernels need {oldest})"
    if not runs_kernels(capability):
        return "plain torch (the triton package is missing)"
    if capability < MATRIX_KERNELS_FROM:
        return f"Triton kernels, matrix products by cuBLAS (compute capability {found})"
    return "Triton kernels"
