"""What adapters add to an output, and take from its gradient, against autograd in float64."""

import pytest
import torch

from lorakit.ops.lora import Update
from lorakit.ops.lora_output import lora_add, lora_output_grads

WIDTHS = (6, 4, 5)


@pytest.mark.parametrize("slots", [(0, 1, 2), (0, -1, 1), (-1, -1, 0)], ids=str)
def test_gradients_are_those_of_autograd(slots):
    torch.manual_seed(0)
    rows, rank, count = 9, 3, 1 + max(slots)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    s, b = make(rows, count * rank), make(sum(WIDTHS), rank)
    dy = torch.randn(rows, sum(WIDTHS), dtype=torch.float64)
    update, start, columns = Update(s, b, slots), 0, []
    outputs = torch.zeros_like(dy)
    for module, width in enumerate(WIDTHS):
        own = slice(start, start + width)
        start += width
        part = update.of(module, own)
        if part is not None:
            columns.append(own)
            outputs[:, own] = part[0] @ part[1].t()
    ds, db = torch.autograd.grad(outputs, (s, b), dy)
    with torch.no_grad():
        found_s, found_b = lora_output_grads(dy, update, columns)
        torch.testing.assert_close(found_s, ds)
        expected = torch.cat([db[c] for c in columns]).float()
        # dB is float32 on purpose: it goes to float32 masters.
        torch.testing.assert_close(found_b, expected, rtol=1e-5, atol=1e-5)
        into = torch.ones_like(found_b)
        assert lora_output_grads(dy, update, columns, into)[1] is into
        torch.testing.assert_close(into, 1 + expected, rtol=1e-5, atol=1e-5)


def test_the_update_is_added_where_asked():
    update = Update(torch.randn(4, 2), torch.randn(5, 2), (0,))
    start, out = torch.randn(4, 5), torch.empty(4, 5)
    assert lora_add(start, update, out) is out
    torch.testing.assert_close(out, start + update.s @ update.b.t())
