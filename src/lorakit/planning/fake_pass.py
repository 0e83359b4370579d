"""A model enters; what its fake forward and backward may run leaves: plain torch, and no kernel.

Fake tensors have shapes and no memory, and say that they are at address 0. Triton takes 0 for a
valid null pointer: a kernel that is launched on them on a GPU reads there, and after that illegal
access the process has no CUDA left. transformers binds functions of Qwen3.5, LFM2, Falcon-H1 and
others at import to flash-linear-attention, causal-conv1d or mamba-ssm, where these are installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lorakit.model.kernel_check import kernel_functions


@contextlib.contextmanager
def fake_pass(model: Any) -> Iterator[None]:
    """Tensors made inside are fake, and `model` computes without other packages' kernels.

    Raises:
        RuntimeError: inside, where code asks for the address of a fake tensor, as every launch
            does, or calls an operation that knows no shapes without numbers.
    """
    import torch._functorch.config as functorch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with functorch.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _plain_torch(model), mode:
        yield


@contextlib.contextmanager
def _plain_torch(model: Any) -> Iterator[None]:
    """The modules that define the model's layers call their own torch functions."""
    functions = kernel_functions(model)
    try:
        for function in functions:
            function.use_plain()
        yield
    finally:
        for function in functions:
            function.restore()
