"""RMS norm and its gradient against autograd in float64."""

import pytest
import torch

from lorakit.ops.rms_norm import rms_norm, rms_norm_backward


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (7, 40)])
def test_value_and_gradient_are_those_of_autograd(rows, width, offset, eps):
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    w = torch.randn(width, dtype=torch.float64)
    dy, residual = torch.randn_like(x), torch.randn_like(x)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (w + offset)
    (dx,) = torch.autograd.grad(y, x, dy)

    ours, rstd = rms_norm(x.detach(), w, eps, offset)
    # The arithmetic is float32 on purpose.
    torch.testing.assert_close(ours, y.detach(), rtol=1e-5, atol=1e-5)
    plain = rms_norm_backward(dy, x.detach(), w, rstd, offset)
    torch.testing.assert_close(plain, dx, rtol=1e-5, atol=1e-5)
    both = rms_norm_backward(dy, x.detach(), w, rstd, offset, residual)
    torch.testing.assert_close(both, dx + residual, rtol=1e-5, atol=1e-5)
