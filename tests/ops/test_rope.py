"""The rotation is transformers' own, and its inverse is its gradient."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorakit.ops.rope import rope, unrotate_qkv


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


def test_the_way_back_is_the_gradient():
    torch.manual_seed(0)
    cos, sin = angles(1, 6, 4)
    q, k, v = (torch.randn(1, 6, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 1, 1))
    turned = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    out = [t.transpose(1, 2) for t in turned] + [v * 1]
    given = [torch.randn_like(t) for t in out]
    expected = torch.autograd.grad(out, (q, k, v), given)
    found = unrotate_qkv(*given, (cos, sin)).view(1, 6, 5, 4).split([3, 1, 1], dim=2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
