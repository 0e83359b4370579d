"""The kernels equal the definition: odd widths, all float types, both activations."""

import pytest
import torch

from lorakit.ops.dropout_mask import draw_keys
from lorakit.ops.glu import ACTIVATIONS, gated_backward_reference, gated_reference
from lorakit.ops.lora import InputGrad, Update, lora_input_grad_

# One unit in the last place: the interpreter cuts off where the card rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (70, 150)])
@pytest.mark.parametrize("slots", [None, (0, 1), (-1, 0)], ids=str)
def test_kernels_equal_the_definition(kernel_device, rows, width, slots, activation, kind):
    from lorakit.ops.glu_triton import gated_backward_triton, gated_triton

    torch.manual_seed(0)
    if slots and kind == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16")
    gu = 3 * torch.randn(rows, 2 * width, dtype=kind, device=kernel_device)
    dh = torch.randn(rows, width, dtype=kind, device=kernel_device)
    update = None
    if slots:
        s = torch.randn(rows, 5 * (1 + max(slots)), dtype=kind, device=kernel_device)
        b = 0.3 * torch.randn(2 * width, 5, dtype=kind, device=kernel_device)
        update = Update(s, b, slots)
    limits = {"rtol": TOLERANCE[kind], "atol": TOLERANCE[kind]}
    torch.testing.assert_close(
        gated_triton(gu, activation, update), gated_reference(gu, activation, update), **limits
    )
    for ours, definition in zip(
        gated_backward_triton(dh, gu, activation, update),
        gated_backward_reference(dh, gu, activation, update),
        strict=True,
    ):
        torch.testing.assert_close(ours, definition, **limits)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_the_next_adapters_part_is_added_on_the_way(kernel_device, kind, p):
    from lorakit.ops.glu_triton import gated_backward_triton

    torch.manual_seed(0)
    rows, width, rank = 70, 150, 7
    make = lambda *shape: torch.randn(*shape, dtype=kind, device=kernel_device)  # noqa: E731
    gu, dh = make(rows, 2 * width), make(rows, width)
    update = Update(make(rows, 5), 0.3 * make(2 * width, 5), (-1, 0))
    keys = draw_keys(1, kernel_device) if p else None
    down = InputGrad(make(rows, rank), 0.3 * make(rank, width), keys, p)
    start = dh.clone()
    found = gated_backward_triton(dh, gu, "silu", update, down)
    assert torch.equal(dh, start)
    parts = [lora_input_grad_(dh.float(), down.ds.float(), down.a.float(), keys, p), gu.float()]
    wide = Update(update.s.float(), update.b.float(), update.slots)
    expected = gated_backward_reference(*parts, "silu", wide)
    for ours, definition in zip(found, expected, strict=True):
        limit = TOLERANCE[kind] * definition.abs().max().item()
        torch.testing.assert_close(ours.float(), definition, rtol=TOLERANCE[kind], atol=limit)
