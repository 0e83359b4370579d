"""Check every address that interpreted kernels read or write."""

import contextlib

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


def _addresses(tensor):
    """Address of each element, sorted."""
    at = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = at.unsqueeze(-1) + torch.arange(size) * stride
    return np.unique(tensor.data_ptr() + tensor.element_size() * at.numpy())


@contextlib.contextmanager
def only_own_elements():
    """Fail where a kernel accesses anything but elements of its tensors; yield the counts."""
    allowed = np.empty(0, dtype=np.int64)
    counts = {"read": 0, "written": 0}
    launch = interpreter.GridExecutor.__call__
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def launched(self, *arguments, **options):
        nonlocal allowed
        tensors = [a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)]
        allowed = np.unique(np.concatenate([_addresses(t) for t in tensors]))
        return launch(self, *arguments, **options)

    def check(word, pointers, mask):
        found = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        near = np.minimum(np.searchsorted(allowed, found), len(allowed) - 1)
        wrong = int((allowed[near] != found).sum())
        assert wrong == 0, f"{wrong} of {found.size} elements {word} outside the tensors"
        counts[word] += found.size

    def loaded(self, pointers, mask, *more):
        check("read", pointers, mask)
        return load(self, pointers, mask, *more)

    def stored(self, pointers, value, mask, *more):
        check("written", pointers, mask)
        return store(self, pointers, value, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", loaded)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", stored)
        yield counts


@contextlib.contextmanager
def empty_is_nan():
    """Fill uninitialized tensors with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
