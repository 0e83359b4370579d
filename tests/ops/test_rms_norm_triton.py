"""The kernels equal the definition: odd widths, all float types, with and without residual."""

import pytest
import torch

from lorakit.ops.rms_norm import rms_norm_backward_reference, rms_norm_reference

# One unit in the last place: the interpreter cuts off where the card rounds. float32: summation.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (9, 128), (33, 300)])
@pytest.mark.parametrize(("offset", "eps"), [(0.0, 1e-5), (1.0, 0.5)])
def test_kernels_equal_the_definition(kernel_device, rows, width, offset, eps, kind):
    from lorakit.ops.rms_norm_triton import rms_norm_backward_triton, rms_norm_triton

    torch.manual_seed(0)
    x, dy, residual = (torch.randn(rows, width, dtype=kind, device=kernel_device) for _ in "123")
    w = torch.randn(width, dtype=kind, device=kernel_device)
    limits = {"rtol": TOLERANCE[kind], "atol": TOLERANCE[kind]}
    y, rstd = rms_norm_triton(x, w, eps, offset)
    expected, expected_rstd = rms_norm_reference(x, w, eps, offset)
    torch.testing.assert_close(rstd, expected_rstd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, expected, **limits)
    for past in (None, residual):
        ours = rms_norm_backward_triton(dy, x, w, rstd, offset, past)
        definition = rms_norm_backward_reference(dy, x, w, rstd, offset, past)
        torch.testing.assert_close(
            ours, definition, rtol=4 * TOLERANCE[kind], atol=4 * TOLERANCE[kind]
        )
