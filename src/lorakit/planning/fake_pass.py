"""Context for fake forward and backward passes: plain torch, without other packages' kernels.

Fake tensors have shapes but no memory, and report address 0. Triton accepts 0 as a valid null
pointer: a kernel launched on them on a GPU reads there, and that illegal access makes CUDA unusable
for the process. At import, transformers binds functions of Qwen3.5, LFM2, Falcon-H1 and others to
flash-linear-attention, causal-conv1d or mamba-ssm if these are installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lorakit.model.kernel_functions import kernel_functions


@contextlib.contextmanager
def fake_pass(model: Any) -> Iterator[None]:
    """Make new tensors fake and run `model` without other packages' kernels.

    Raises:
        RuntimeError: inside, if code reads the address of a fake tensor, as every kernel launch
            does, or calls an operation whose output shape depends on values.
    """
    import torch._functorch.config as functorch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with functorch.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _plain_torch(model), mode:
        yield


@contextlib.contextmanager
def _plain_torch(model: Any) -> Iterator[None]:
    """Make the model's layers call their plain torch functions."""
    functions = kernel_functions(model)
    used = [function.use_kernel for function in functions]
    try:
        for function in functions:
            function.use_kernel = False
        yield
    finally:
        for function, use_kernel in zip(functions, used, strict=True):
            function.use_kernel = use_kernel
