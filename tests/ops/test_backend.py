"""Which implementation a tensor gets, and the words for it."""

import torch

from lorakit.ops.backend import has_kernels, kernels_reason


def test_a_tensor_on_the_cpu_takes_plain_torch():
    assert not has_kernels(torch.zeros(2))
    assert "no CUDA card" in kernels_reason("cpu")
