"""The kernel equals the definition: odd head counts, strided views, in place, one angle row or many."""

import pytest
import torch

from lorakit.ops.rope import rope_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("angle_rows", [1, 2])
def test_kernel_equals_the_definition_on_a_view(kernel_device, kind, inverse, angle_rows):
    from lorakit.ops.rope_triton import rope_triton

    torch.manual_seed(0)
    buffer = torch.randn(2, 7, 11, 24, dtype=kind, device=kernel_device)
    angle = torch.randn(angle_rows, 7, 12, device=kernel_device)
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    view = buffer[:, :, 2:]
    expected = rope_reference(view, cos, sin, torch.empty_like(view), inverse)
    before = buffer.clone()
    rope_triton(view, cos, sin, view, inverse)
    torch.testing.assert_close(view, expected, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])
    assert torch.equal(buffer[:, :, :2], before[:, :, :2])
