"""The kernels equal the definition: odd shapes, all float types, modules left out."""

import pytest
import torch

from lorakit.ops.lora import Update
from lorakit.ops.lora_output import lora_output_grads_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
COLUMNS = [slice(0, 150), slice(150, 183), slice(183, 316)]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("own", [(0, 1, 2), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize(("rows", "rank", "chunk"), [(1, 3, 512), (300, 16, 64), (70, 24, 128)])
def test_both_gradients_equal_the_definition(
    kernel_device, monkeypatch, rows, rank, chunk, own, kind
):
    from lorakit.ops.lora_output_triton import GRADS, lora_output_grads_triton

    # A layer's modules are several chunks of 512 wide; these are, of smaller ones.
    monkeypatch.setitem(GRADS, "CHUNK", chunk)
    if kind == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16")
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=kind, device=kernel_device)  # noqa: E731
    dy, s, b = make(rows, 320)[:, :316], make(rows, len(own) * rank), make(316, rank)
    columns = [COLUMNS[i] for i in own]
    update = Update(s, b, tuple(own.index(i) if i in own else -1 for i in range(3)))
    ds, db = lora_output_grads_triton(dy, update, columns)
    wide = Update(s.double(), b.double(), update.slots)
    exact_s, exact_b = lora_output_grads_reference(dy.double(), wide, columns)
    assert ds.dtype == kind
    assert db.dtype == torch.float32
    assert (ds.double() - exact_s).norm() / exact_s.norm() < TOLERANCE[kind]
    assert (db - exact_b).norm() / exact_b.norm() < 1e-5
    into = torch.ones_like(db)
    assert lora_output_grads_triton(dy, update, columns, into)[1] is into
    torch.testing.assert_close(into, 1 + db)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_the_update_is_added(kernel_device, kind):
    from lorakit.ops.lora_output_triton import lora_add_triton

    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=kind, device=kernel_device)  # noqa: E731
    start, update = make(70, 200)[:, :150], Update(make(70, 5), make(150, 5), (0,))
    expected = start.float() + update.s.float() @ update.b.float().t()
    found = lora_add_triton(start, update)
    limit = {"rtol": TOLERANCE[kind], "atol": TOLERANCE[kind]}
    torch.testing.assert_close(found.float(), expected, **limit)
