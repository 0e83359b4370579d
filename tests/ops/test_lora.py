"""The masked low-rank products against PEFT's formula by autograd, in float64."""

import pytest
import torch

from lorakit.ops.dropout_mask import draw_keys, keep_mask
from lorakit.ops.lora import lora_a_grad, lora_down, lora_input_grad_, matmul_float32


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(("rows", "width", "rank", "modules"), [(5, 7, 3, 1), (33, 18, 4, 3)])
def test_values_and_gradients_are_those_of_autograd(rows, width, rank, modules, p):
    torch.manual_seed(0)
    kind = torch.float64
    keys = draw_keys(modules, torch.device("cpu")) if p else None
    x = torch.randn(rows, width, dtype=kind, requires_grad=True)
    a = torch.randn(modules * rank, width, dtype=kind, requires_grad=True)
    masks = [
        keep_mask(keys[i], rows, width, p) if p else torch.ones(rows, width) for i in range(modules)
    ]
    parts = [(x * m.to(kind)) @ own.t() for m, own in zip(masks, a.chunk(modules), strict=True)]
    s = torch.cat(parts, 1)
    ds = torch.randn_like(s)
    dx, da = torch.autograd.grad(s, (x, a), ds)

    with torch.no_grad():
        torch.testing.assert_close(lora_down(x, a, keys, p), s)
        start = torch.randn_like(x)
        torch.testing.assert_close(lora_input_grad_(start.clone(), ds, a, keys, p), start + dx)
        # dA is float32 on purpose: it goes to float32 masters.
        found = lora_a_grad(ds, x, keys, p, 1.0)
        torch.testing.assert_close(found, da.float(), rtol=1e-5, atol=1e-5)


def test_gradients_are_added_where_they_shall_end():
    ds, x, into = torch.randn(6, 4), torch.randn(6, 5), torch.randn(4, 5)
    expected = into + 3.0 * (ds.t() @ x)
    assert lora_a_grad(ds, x, None, 0.0, 3.0, into) is into
    torch.testing.assert_close(into, expected)
    product = torch.zeros(4, 5)
    assert matmul_float32(ds.t(), x, product) is product
    torch.testing.assert_close(product, ds.t() @ x)
