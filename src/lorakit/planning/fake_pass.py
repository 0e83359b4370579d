"""A model enters; what its fake forward and backward may run leaves: plain torch, and no kernel.

Fake tensors have shapes and no memory, and say that they are at address 0. Triton takes 0 for a
valid null pointer: a kernel that is launched on them on a GPU reads there, and after that illegal
access the process has no CUDA left. transformers binds functions of Qwen3.5, LFM2, Falcon-H1 and
others at import to flash-linear-attention, causal-conv1d or mamba-ssm, where these are installed.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any


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
    before: list[tuple[dict[str, Any], str, Any]] = []
    for source in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[source]) if source in sys.modules else {}
        before += [(names, n, bound) for n, bound in names.items() if _definition(bound)]
    try:
        for names, name, bound in before:
            names[name] = _definition(bound)
        yield
    finally:
        for names, name, bound in before:
            names[name] = bound


def _definition(bound: Any) -> Any:
    """The torch function behind one that transformers may bind to a kernel; None for any other."""
    from torch import nn
    from transformers.integrations import hub_kernels

    if isinstance(bound, nn.Module):  # with the package `kernels` each is made a module
        bound = inspect.getclosurevars(type(bound).forward).nonlocals.get("func")
    code = getattr(bound, "__code__", None)
    if code is None or code.co_filename != hub_kernels.__file__:
        return None
    return getattr(bound, "__wrapped__", None)
