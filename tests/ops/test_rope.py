"""The rotation is transformers' own, and its inverse is its gradient."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorakit.ops.rope import rope


def angles(batch, length, width):
    position = torch.arange(batch * length).view(batch, length)
    frequency = 1.0 / 10000 ** (torch.arange(0, width, 2) / width)
    found = position.unsqueeze(-1).double() * frequency
    both = torch.cat([found, found], -1)
    return both.cos(), both.sin()


def test_it_is_the_rotation_of_transformers():
    torch.manual_seed(0)
    cos, sin = angles(2, 5, 8)
    q, k = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 1, 8).double()
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, expected in zip((q, k), theirs, strict=True):
        found = rope(x, cos, sin, torch.empty_like(x)).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_inverse_is_the_gradient_and_undoes_it():
    torch.manual_seed(0)
    cos, sin = angles(1, 6, 4)
    x = torch.randn(1, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    y = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0].transpose(1, 2)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(
        rope(dy, cos, sin, torch.empty_like(dy), inverse=True), dx, rtol=1e-5, atol=1e-5
    )
    back = rope(y.detach(), cos, sin, torch.empty_like(dy), inverse=True)
    torch.testing.assert_close(back, x.detach(), rtol=1e-5, atol=1e-5)
