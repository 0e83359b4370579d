"""Attention over packed documents and shared keys, against its formula in float64."""

import pytest
import torch

from lorakit.engine.attention import Segments, attend

from .engine_models import segments_of


def formula(q, k, v, scale):
    """softmax(q k^T scale, causal) v for one document [T, H, d]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v)


@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[7], [3, 1, 9]], ids=str)
def test_documents_see_themselves_and_what_came_before(keys, lengths):
    torch.manual_seed(0)
    total = sum(lengths)
    q = torch.randn(1, total, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(1, total, keys, 8, dtype=torch.float64) for _ in "kv")
    segments = segments_of(lengths, torch.device("cpu")) if len(lengths) > 1 else None
    found = attend(q, k, v, 0.3, segments)
    parts = zip(*(t[0].split(lengths) for t in (q, k, v)), strict=True)
    torch.testing.assert_close(found[0], torch.cat([formula(*p, 0.3) for p in parts]))


def test_the_longest_document_may_be_anywhere():
    """The window is compared with it, and the kernel is told of it."""
    borders = torch.tensor([0, 2, 9, 12], dtype=torch.int32)
    segments = Segments.of(borders, (2, 7, 3))
    assert (segments.longest, segments.lengths) == (7, (2, 7, 3))
    assert Segments.of(borders, (2, 7, 3), 8).longest == 8  # a bucket's
    assert Segments.of(None) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [[256], [100, 1, 57]], ids=str)
def test_kernels_of_a_gpu_compute_the_same(lengths):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, sum(lengths), h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2)
    )
    segments = segments_of(lengths, torch.device("cuda")) if len(lengths) > 1 else None
    found = attend(q, k, v, 0.125, segments)[0].cpu().double()
    parts = zip(*(t[0].cpu().double().split(lengths) for t in (q, k, v)), strict=True)
    expected = torch.cat([formula(*p, 0.125) for p in parts])
    assert (found - expected).norm() / expected.norm() < 1e-2
