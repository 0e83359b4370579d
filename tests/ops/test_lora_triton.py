"""Each kernel equals its definition: odd shapes, all float types, masks included."""

import pytest
import torch

from lorakit.ops.dropout_mask import draw_keys
from lorakit.ops.lora import lora_a_grad_reference, lora_down_reference, lora_input_grad_reference_

SHAPES = [(5, 20, 3, 1), (70, 130, 16, 3), (129, 257, 24, 2)]
# A product of n terms in the inputs' type, summed in float32: the last rounding of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def close(found, definition):
    error = (found.double() - definition.double()).norm() / definition.double().norm()
    assert error < TOLERANCE[found.dtype if found.dtype != torch.float32 else definition.dtype]


def made(rows, width, rank, modules, kind, device):
    torch.manual_seed(0)
    x, ds, a = (
        torch.randn(shape, dtype=kind, device=device)
        for shape in ((rows, width), (rows, modules * rank), (modules * rank, width))
    )
    return x, ds, a, draw_keys(modules, device)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_definition(kernel_device, shape, kind):
    from lorakit.ops import lora_triton

    if kind == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16")
    x, ds, a, keys = made(*shape, kind, kernel_device)
    p = 0.25
    close(lora_triton.lora_down_triton(x, a, keys, p), lora_down_reference(x, a, keys, p))
    ours = lora_triton.lora_input_grad_triton_(x.clone(), ds, a, keys, p)
    close(ours, lora_input_grad_reference_(x.clone(), ds, a, keys, p))
    found = lora_triton.lora_a_grad_triton(ds, x, keys, p)
    assert found.dtype == torch.float32
    into = torch.ones_like(found)
    assert lora_triton.lora_a_grad_triton(ds, x, keys, p, 2.0, into) is into
    torch.testing.assert_close(into, 1 + 2 * found)
    exact = lora_a_grad_reference(ds.float(), x.float(), keys, p)
    assert (found - exact).norm() / exact.norm() < 1e-5


def test_rows_of_a_wider_buffer_are_read_where_they_are(kernel_device):
    from lorakit.ops import lora_triton

    x, _, a, keys = made(40, 64, 8, 2, torch.float32, kernel_device)
    wide = torch.randn(40, 100, device=kernel_device)
    wide[:, :64] = x
    close(
        lora_triton.lora_down_triton(wide[:, :64], a, keys, 0.1),
        lora_down_reference(x, a, keys, 0.1),
    )
