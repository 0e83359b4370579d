"""The gated activation and its gradient against autograd in float64."""

import sys
import types

import pytest
import torch
from torch.nn import functional

from lorakit.ops import glu
from lorakit.ops.glu import (
    ACTIVATIONS,
    GatedActivation,
    gated,
    gated_backward,
    gated_backward_reference,
    gated_reference,
)
from lorakit.ops.lora import InputGrad, Update


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


@pytest.fixture
def older_gpu(monkeypatch):
    """The path of GPUs before Ampere: kernels without matrix products, by their references."""
    stand_in = types.SimpleNamespace(
        gated_triton=gated_reference,
        gated_backward_triton=lambda dh, gu, activation, update, down: gated_backward_reference(
            dh, gu, activation, update
        ),
    )
    monkeypatch.setitem(sys.modules, "lorakit.ops.glu_triton", stand_in)
    monkeypatch.setattr(glu, "has_kernels", lambda x: True)
    monkeypatch.setattr(glu, "has_matrix_kernels", lambda x: False)


@pytest.mark.parametrize("slots", [(0, 1), (-1, 0), (0, -1), (-1, -1)])
def test_without_matrix_kernels_adapters_are_added_by_separate_products(older_gpu, slots):
    torch.manual_seed(0)
    rows, width, rank = 5, 4, 2
    gu, dh = torch.randn(rows, 2 * width), torch.randn(rows, width)
    update = Update(torch.randn(rows, 2 * rank), torch.randn(2 * width, rank), slots)
    down = InputGrad(torch.randn(rows, rank), torch.randn(rank, width), None, 0.0)
    expected = gated_reference(gu, "silu", update)
    before = gu.clone()
    torch.testing.assert_close(gated(gu, "silu", update), expected)
    assert torch.equal(gu, before)
    dgu, h = gated_backward_reference(dh + down.ds @ down.a, gu, "silu", update)
    found = gated_backward(dh.clone(), gu.clone(), "silu", update, down)
    torch.testing.assert_close(found, (dgu, h))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autograd_keeps_gate_and_up_only(activation):
    torch.manual_seed(0)
    gu = torch.randn(5, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: GatedActivation.apply(x.float(), activation).double(),
        gu.requires_grad_(), eps=1e-3, atol=1e-3,
    )  # fmt: skip
