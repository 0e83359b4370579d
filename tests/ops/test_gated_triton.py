"""The kernels equal the definition: odd widths, all float types, both activations."""

import pytest
import torch

from lorakit.ops.gated import ACTIVATIONS, gated_backward_reference, gated_reference

# One unit in the last place: the interpreter cuts off where the card rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (5, 1030)])
def test_kernels_equal_the_definition(kernel_device, rows, width, activation, kind):
    from lorakit.ops.gated_triton import gated_backward_triton, gated_triton

    torch.manual_seed(0)
    gu = 3 * torch.randn(rows, 2 * width, dtype=kind, device=kernel_device)
    dh = torch.randn(rows, width, dtype=kind, device=kernel_device)
    limits = {"rtol": TOLERANCE[kind], "atol": TOLERANCE[kind]}
    torch.testing.assert_close(
        gated_triton(gu, activation), gated_reference(gu, activation), **limits
    )
    for ours, definition in zip(
        gated_backward_triton(dh, gu, activation),
        gated_backward_reference(dh, gu, activation),
        strict=True,
    ):
        torch.testing.assert_close(ours, definition, **limits)
