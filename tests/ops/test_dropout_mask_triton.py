"""The hash in a kernel makes the decisions of the one in torch, element by element."""

import pytest
import torch

from lorakit.ops.dropout_mask import draw_keys, keep_mask, threshold

triton = pytest.importorskip("triton")
tl = triton.language


@pytest.mark.parametrize("p", [0.05, 0.7])
def test_decisions_are_those_of_the_definition(kernel_device, p):
    from lorakit.ops.lora_triton import lora_input_grad_triton_

    torch.manual_seed(3)
    keys = draw_keys(1, kernel_device)
    rows, width = 37, 150
    # dS A is 1 everywhere, so what is added is the mask itself.
    ds = torch.ones(rows, 16, device=kernel_device)
    a = torch.full((16, width), 1 / 16, device=kernel_device)
    found = lora_input_grad_triton_(torch.zeros(rows, width, device=kernel_device), ds, a, keys, p)
    assert torch.equal(found.cpu() == 1.0, keep_mask(keys[0].cpu(), rows, width, p))
    assert threshold(p) > 0
