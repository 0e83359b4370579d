"""Rows of tokens are sorted and summed as by indexing, with their gradients."""

import torch

from lorakit.ops import expert_rows
from lorakit.ops.expert_rows import Combine, Dispatch, sum_rows_reference, weighted_rows_reference


def test_rows_are_sorted_and_summed_as_by_indexing():
    torch.manual_seed(0)
    index = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]])
    _, order = torch.sort(index.flatten(), stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(8)
    results = []
    for own in (True, False):
        torch.manual_seed(1)
        tokens, scores = torch.randn(4, 5).requires_grad_(), torch.rand(4, 2).requires_grad_()
        if own:
            x = Dispatch.apply(tokens, order, back, 2)
            out = Combine.apply(x.sin(), scores, order, back)
        else:
            x = tokens[order // 2]
            out = (x.sin() * scores.flatten()[order, None])[back].view(4, 2, 5).sum(1)
        (out * torch.randn(4, 5)).sum().backward()
        results.append((x.detach(), out.detach(), tokens.grad, scores.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_sums_are_in_float32_and_in_pieces_the_same(monkeypatch):
    torch.manual_seed(0)
    rows, order = torch.full((512, 4), 0.5).bfloat16(), torch.randperm(512)
    rows[0] = 256.0  # in bfloat16 256 + 0.5 is 256
    total = sum_rows_reference(rows, torch.arange(512), None, 512)
    assert total.dtype == torch.bfloat16
    assert total.tolist() == [[512.0] * 4]  # 511.5 rounded once
    grad, weights = torch.randn(256, 4), torch.rand(256, 2)
    expected = weighted_rows_reference(grad, rows.float(), weights, order)
    monkeypatch.setattr(expert_rows, "REFERENCE_ROWS", 7)
    for own, once in zip(
        weighted_rows_reference(grad, rows.float(), weights, order), expected, strict=True
    ):
        assert torch.equal(own, once)
