"""The row kernel equals the definition: odd vocabularies, with and without gradient."""

import pytest
import torch

from lorakit.ops.cross_entropy import cross_entropy_reference_


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (9, 1000), (3, 9001)])
@pytest.mark.parametrize("gradient", [False, True])
def test_kernel_equals_the_definition(kernel_device, rows, width, gradient, kind):
    from lorakit.ops.cross_entropy_triton import cross_entropy_triton_

    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, width, device=kernel_device)).to(kind)
    targets = torch.randint(0, width, (rows,), device=kernel_device)
    targets[rows // 2 :] = torch.arange(rows - rows // 2)  # the first ids: 0 too
    targets[0] = -100  # padding to a fixed size
    ours, definition = logits.clone(), logits.clone()
    found = cross_entropy_triton_(ours, targets, gradient)
    expected = cross_entropy_reference_(definition, targets, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    limit = 1e-6 if kind == torch.float32 else 2**-7
    torch.testing.assert_close(ours, definition, rtol=limit, atol=limit)
    assert gradient or torch.equal(ours, logits)
