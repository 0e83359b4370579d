"""The gated activation and its gradient against autograd in float64."""

import pytest
import torch
from torch.nn import functional

from lorakit.ops.glu import ACTIVATIONS, gated, gated_backward


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (6, 13)])
def test_value_and_gradient_are_those_of_autograd(rows, width, activation):
    torch.manual_seed(0)
    gu = (3 * torch.randn(rows, 2 * width, dtype=torch.float64)).requires_grad_()
    g, u = gu.chunk(2, -1)
    act = functional.silu(g) if activation == "silu" else functional.gelu(g, approximate="tanh")
    h = act * u
    dh = torch.randn_like(h)
    (dgu,) = torch.autograd.grad(h, gu, dh)
    found, again = gated_backward(dh, gu.detach(), activation)
    for ours, definition in ((gated(gu.detach(), activation), h), (found, dgu), (again, h)):
        torch.testing.assert_close(ours, definition.detach(), rtol=1e-5, atol=1e-5)
