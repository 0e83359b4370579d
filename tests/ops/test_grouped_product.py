"""Products of sorted rows equal a loop over experts, with their gradients."""

import itertools

import pytest
import torch

from lorakit.ops import grouped_product
from lorakit.ops.dropout_mask import keep_mask
from lorakit.ops.grouped_product import (
    FrozenProduct,
    LowRankUpdate,
    grouped_mm,
    grouped_outer,
    groups_of,
)

COUNTS = [3, 0, 5, 1, 0, 4]


def rows(width, seed=0):
    torch.manual_seed(seed)
    return torch.randn(sum(COUNTS), width)


def test_groups_hold_only_experts_with_rows_and_cover_all_rows():
    found = list(groups_of(COUNTS, 3))
    assert [g.experts for g in found] == [[0, 2, 3], [5]]
    assert [g.counts for g in found] == [[3, 5, 1], [4]]
    assert [(g.rows.start, g.rows.stop) for g in found] == [(0, 9), (9, 13)]


@pytest.mark.parametrize("most", [1, 2, 6])
def test_the_frozen_product_equals_a_loop(most):
    weights, made = torch.randn(6, 7, 5), []

    def dense(experts):
        made.append(list(experts))
        return weights[list(experts)]

    x, target = rows(5).requires_grad_(), rows(7, 1)
    y = FrozenProduct.apply(x, dense, COUNTS, 7, most)
    (y * target).sum().backward()
    reference = rows(5).requires_grad_()
    pieces = reference.split(COUNTS)
    expected = torch.cat([piece @ weights[e].t() for e, piece in enumerate(pieces)])
    (expected * target).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, reference.grad)
    assert sorted(itertools.chain(*made)) == sorted(
        [0, 2, 3, 5] * 2
    )  # in forward, and again in backward
    assert max(map(len, made)) == min(most, 4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_low_rank_update_equals_a_loop(p, monkeypatch):
    monkeypatch.setattr(grouped_product, "MASKED_AT_ONCE", 20)  # four rows at a time
    a, b = torch.randn(6, 2, 5), torch.randn(6, 7, 2)
    key = torch.tensor([12345, 678], dtype=torch.int32) if p else None
    mask = keep_mask(key, sum(COUNTS), 5, p).float() if p else torch.ones(sum(COUNTS), 5)
    inputs = [t.requires_grad_() for t in (rows(5), a.clone(), b.clone())]
    own = LowRankUpdate.apply(*inputs, key, p, 0.7, COUNTS)
    reference = [t.requires_grad_() for t in (rows(5), a.clone(), b.clone())]
    masked = (reference[0] * mask).split(COUNTS)
    expected = torch.cat(
        [0.7 * piece @ reference[1][e].t() @ reference[2][e].t() for e, piece in enumerate(masked)]
    )
    target = rows(7, 1)
    (own * target).sum().backward()
    (expected * target).sum().backward()
    torch.testing.assert_close(own, expected)
    for mine, theirs in zip(inputs, reference, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    unused = [e for e, count in enumerate(COUNTS) if not count]
    assert inputs[1].grad[unused].abs().max() == inputs[2].grad[unused].abs().max() == 0
    assert (inputs[2].grad.abs().amax((1, 2)) > 0).tolist() == [bool(c) for c in COUNTS]


@pytest.mark.parametrize("counts", [[4, 4, 4], [12, 0, 0], [5, 0, 7]])
def test_an_update_may_be_added_in_place(counts):
    weights = torch.randn(3, 7, 5)
    x = rows(5)[:12].clone().requires_grad_()
    y = FrozenProduct.apply(x, lambda experts: weights[list(experts)], counts, 7, 8)
    y += x.sum(dim=1, keepdim=True)
    y.sum().backward()
    pieces = torch.cat([w.sum(0).expand(n, 5) for w, n in zip(weights, counts, strict=True)])
    torch.testing.assert_close(x.grad, pieces + 7)


def test_evenly_spread_rows_are_one_product():
    x, y, weights = rows(16)[:12], rows(8, 1)[:12], torch.randn(3, 16, 8)
    parts = zip(x.split(4), y.split(4), weights, strict=True)
    each = [(a @ w, a.t() @ b) for a, b, w in parts]
    torch.testing.assert_close(grouped_mm(x, weights, [4] * 3), torch.cat([m for m, _ in each]))
    torch.testing.assert_close(grouped_outer(x, y, [4] * 3), torch.stack([o for _, o in each]))


def test_torch_computes_the_same_grouped_products(monkeypatch):
    """On a GPU torch's kernel runs; its arguments are checked here with the one for CPUs."""
    used = [count for count in COUNTS if count]
    x, y = rows(16).bfloat16(), rows(8, 1).bfloat16()
    weights = torch.randn(len(used), 16, 8).bfloat16()
    plain = grouped_mm(x, weights, used), grouped_outer(x, y, used)
    monkeypatch.setattr(grouped_product, "has_matrix_kernels", lambda _: True)
    theirs = grouped_mm(x, weights, used), grouped_outer(x, y, used)
    for own, their in zip(plain, theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=2e-2, atol=2e-2)
        assert own.dtype == their.dtype


@pytest.mark.parametrize("rank", [2, 8])
def test_with_the_rows_ends_on_the_gpu_the_products_are_the_same(monkeypatch, rank):
    """Without a count on the host, except for ranks that torch's kernel cannot align."""
    monkeypatch.setattr(grouped_product, "has_matrix_kernels", lambda _: True)
    weights, key = torch.randn(6, 8, 16).bfloat16(), torch.tensor([12345, 678], dtype=torch.int32)
    a, b = torch.randn(6, rank, 16), torch.randn(6, 8, rank)
    ends = torch.tensor(list(itertools.accumulate(COUNTS)), dtype=torch.int32)
    results = []
    for counts in (COUNTS, ends):
        inputs = [t.clone().requires_grad_() for t in (rows(16).bfloat16(), a, b)]
        dense = lambda experts: weights[list(experts)]  # noqa: E731
        y = FrozenProduct.apply(inputs[0], dense, counts, 8, 6)
        y += LowRankUpdate.apply(*inputs, key, 0.3, 0.7, counts)
        (y * rows(8, 1)).sum().backward()
        results.append((y.detach(), *(t.grad for t in inputs)))
    for host, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, host, rtol=2e-2, atol=2e-2)
