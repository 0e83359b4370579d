"""A tensor enters; which implementation of the ops it gets leaves: Triton kernels or plain torch.

Plain torch is the definition of every op; the kernels are tested against it. They need a CUDA card
with bf16 matrix units (compute capability 8.0); older cards, Apple and CPUs take plain torch.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)


@functools.cache
def _card_has_kernels(index: int) -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(index) >= OLDEST_CAPABILITY


def has_kernels(tensor: Tensor) -> bool:
    """True where `tensor` lies on a card that our Triton kernels run on."""
    return tensor.is_cuda and _card_has_kernels(tensor.get_device())


def kernels_reason(device_kind: str) -> str:
    """What the ops run as on this machine, in a few words."""
    if device_kind != "cuda":
        return "plain torch (no CUDA card)"
    if importlib.util.find_spec("triton") is None:
        return "plain torch (the triton package is missing)"
    if not _card_has_kernels(torch.cuda.current_device()):
        major, minor = torch.cuda.get_device_capability()
        return f"plain torch (compute capability {major}.{minor}; our kernels need 8.0)"
    return "Triton kernels"
