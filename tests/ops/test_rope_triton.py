"""The kernel equals the definition: odd head counts, views, in place, one angle row or many."""

import pytest
import torch

from lorakit.ops.lora import Update
from lorakit.ops.rope import rope_reference, rotate_qkv_reference_, unrotate_qkv_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("angle_rows", [1, 2])
def test_kernel_equals_the_definition_on_a_view(kernel_device, kind, angle_rows):
    from lorakit.ops.rope_triton import rope_triton

    torch.manual_seed(0)
    buffer = torch.randn(2, 7, 11, 24, dtype=kind, device=kernel_device)
    angle = torch.randn(angle_rows, 7, 12, device=kernel_device)
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    view = buffer[:, :, 2:]
    expected = rope_reference(view, cos, sin, torch.empty_like(view))
    before = buffer.clone()
    rope_triton(view, cos, sin, view)
    torch.testing.assert_close(view, expected, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])
    assert torch.equal(buffer[:, :, :2], before[:, :, :2])


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("slots", [None, (0, 1, 2), (0, -1, 1)], ids=str)
@pytest.mark.parametrize("angle_rows", [0, 1, 2])
def test_qkv_gets_its_update_and_its_angles(kernel_device, slots, angle_rows, kind):
    from lorakit.ops.rope_triton import rotate_qkv_triton_

    torch.manual_seed(0)
    heads, width, rank = (3, 1, 1), 24, 5
    qkv = torch.randn(2 * 35, sum(heads) * width, dtype=kind, device=kernel_device)
    angles = None
    if angle_rows:
        angle = torch.randn(angle_rows, 35, width // 2, device=kernel_device)
        angle = torch.cat([angle, angle], -1)
        angles = (angle.cos().to(kind), angle.sin().to(kind))
    update = None
    if slots:
        s = torch.randn(2 * 35, rank * (1 + max(slots)), dtype=kind, device=kernel_device)
        b = 0.3 * torch.randn(sum(heads) * width, rank, dtype=kind, device=kernel_device)
        update = Update(s, b, slots)
    expected = rotate_qkv_reference_(qkv.clone().float(), heads, width, angles, _float(update))
    found = rotate_qkv_triton_(qkv.clone(), heads, width, angles, update)
    limit = 1e-5 if kind == torch.float32 else 2**-8
    torch.testing.assert_close(found.float(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("angle_rows", [0, 1, 2])
def test_gradients_go_back_into_one_piece(kernel_device, kind, angle_rows):
    from lorakit.ops.rope_triton import unrotate_qkv_triton

    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=kind, device=kernel_device)  # noqa: E731
    dq, dk, dv = make(2, 4, 35, 24).transpose(1, 2), make(2, 35, 2, 24), make(2, 35, 2, 24)
    angles = None
    if angle_rows:
        angle = torch.randn(angle_rows, 35, 12, device=kernel_device)
        angle = torch.cat([angle, angle], -1)
        angles = (angle.cos().to(kind), angle.sin().to(kind))
    found = unrotate_qkv_triton(dq, dk, dv, angles)
    expected = unrotate_qkv_reference(dq, dk, dv, angles)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])


def _float(update):
    return update and Update(update.s.float(), update.b.float(), update.slots)
