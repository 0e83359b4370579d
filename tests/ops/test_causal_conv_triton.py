"""The kernels equal the definition: any length, documents, bias, all float types."""

import pytest
import torch
from tests.ops.test_causal_conv import made

from lorakit.ops.causal_conv import causal_conv_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(("lengths", "channels"), [((1,), 5), ((40,), 130), ((1, 2, 17, 3), 6)])
@pytest.mark.parametrize(("silu", "biased"), [(True, False), (False, True)])
def test_kernels_equal_the_definition(kernel_device, kind, lengths, channels, silu, biased):
    from lorakit.ops.causal_conv_triton import causal_conv_backward_triton, causal_conv_triton

    (x, weight, bias), documents = made(lengths, channels, kind=kind, device=kernel_device)
    given = (weight, bias if biased else None, silu, documents if len(lengths) > 1 else None)
    rows = x.transpose(1, 2).contiguous()
    x = x.float().requires_grad_()
    expected = causal_conv_reference(
        x, *(t.float() if t is given[1] and biased else t for t in given)
    )
    limits = {"rtol": TOLERANCE[kind], "atol": TOLERANCE[kind]}
    out = causal_conv_triton(rows, *given)
    torch.testing.assert_close(out.float(), expected.detach().transpose(1, 2), **limits)
    dy = torch.randn_like(rows)
    (wanted,) = torch.autograd.grad(expected, x, dy.float().transpose(1, 2))
    found = causal_conv_backward_triton(dy, rows, *given)
    limits = {"rtol": 4 * TOLERANCE[kind], "atol": 4 * TOLERANCE[kind]}
    torch.testing.assert_close(found.float(), wanted.transpose(1, 2), **limits)
