"""The kernels equal the definition: values and all gradients, odd lengths, documents, dtypes."""

import pytest
import torch
from tests.ops.test_gated_delta_rule import NAMES, inputs, numbered

from lorakit.ops.gated_delta_rule import delta_rule_backward_reference, delta_rule_reference

# Norm of the difference by the norm. 16 bits: the states' rounding, as often as chunks. A GPU runs
# them in 16 bits alone; Triton's interpreter multiplies the raw bits of bfloat16.
if torch.cuda.is_available():
    LIMITS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
else:
    LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3}
FIRST = next(iter(LIMITS))


def apart(found, expected):
    difference = float((found.double() - expected.double()).norm())
    return difference and difference / float(expected.double().norm())


def both_ways(given, documents, normalize, device):
    """(outputs and gradients of the kernels, those of the definition in float64)."""
    from lorakit.ops.gated_delta_rule_triton import delta_rule_backward_triton, delta_rule_triton

    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(given[2].shape, generator=generator, dtype=torch.float64)
    dout = dout.to(device, given[2].dtype)
    out, saved = delta_rule_triton(*given, documents, normalize)
    found = delta_rule_backward_triton(dout, given[2], given[4], documents, normalize, saved)
    exact = [t.double() for t in given]
    want, kept = delta_rule_reference(*exact, documents, normalize)
    want_grads = delta_rule_backward_reference(
        dout.double(), exact[2], exact[4], documents, normalize, kept
    )
    return [out, *found], [want, *want_grads]


def check(given, documents, device, normalize=True, factor=1.0):
    found, expected = both_ways(given, documents, normalize, device)
    limit = factor * LIMITS[given[2].dtype]
    distances = {
        name: apart(ours, theirs)
        for name, ours, theirs in zip(("o", *NAMES), found, expected, strict=True)
    }
    assert max(distances.values()) <= limit, distances
    for ours, like in zip(found[1:], given, strict=True):
        assert ours.shape == like.shape
    assert [t.dtype for t in found[:4]] == [given[2].dtype] * 4


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize(("tokens", "lengths"), [(7, None), (150, None), (150, (30, 34, 3, 83))])
def test_kernels_equal_the_definition(kernel_device, kind, tokens, lengths):
    documents = lengths and numbered(lengths).to(kernel_device)
    given = inputs(tokens, (1, 2), batch=1, dtype=kind, device=kernel_device)
    check(given, documents, kernel_device)


def test_one_token(kernel_device):
    check(inputs(1, (1, 2), dtype=FIRST, device=kernel_device), None, kernel_device)


@pytest.mark.parametrize("heads", [(1, 1), (1, 3)])
def test_heads_that_share_a_key_or_do_not(kernel_device, heads):
    given = inputs(70, heads, batch=1, dtype=FIRST, device=kernel_device)
    check(given, None, kernel_device)


def test_without_normalization(kernel_device):
    given = inputs(70, (1, 1), dtype=FIRST, device=kernel_device)
    given[1] = torch.nn.functional.normalize(given[1], dim=-1)
    check(given, None, kernel_device, normalize=False)


def test_widths_that_take_several_programs(kernel_device):
    given = inputs(70, (1, 1), (128, 128), 1, FIRST, kernel_device)
    check(given, None, kernel_device)


def test_strided_inputs(kernel_device):
    """Slices of one tensor, as the layers cut q, k and v."""
    q, k, v, g, beta = inputs(70, (1, 2), dtype=FIRST, device=kernel_device)
    row = torch.cat([t.flatten(2) for t in (q, k, v)], 2)
    parts = row.split([16, 16, 64], 2)
    given = [part.unflatten(2, (-1, w)) for part, w in zip(parts, (16, 16, 32), strict=True)]
    assert not given[0].is_contiguous()
    check([*given, g, beta], None, kernel_device)


def test_strong_decay_and_equal_keys(kernel_device):
    given = inputs(140, (1, 1), batch=1, dtype=FIRST, device=kernel_device)
    given[3][:, 40:80] = -20.0
    given[1] = given[1][:, :1].expand_as(given[1]).contiguous()
    given[4].fill_(0.999)
    check(given, None, kernel_device, factor=20)


@pytest.mark.parametrize("kind", LIMITS)
def test_other_documents_have_exactly_no_part(kernel_device, kind):
    from lorakit.ops.gated_delta_rule_triton import delta_rule_backward_triton, delta_rule_triton

    lengths = (30, 50, 3, 70)
    documents = numbered(lengths).to(kernel_device)
    given = inputs(sum(lengths), (1, 1), batch=1, dtype=kind, device=kernel_device)
    dout = torch.zeros_like(given[2])
    dout[:, 30:80] = 1.0
    out, saved = delta_rule_triton(*given, documents, True)
    found = delta_rule_backward_triton(dout, given[2], given[4], documents, True, saved)
    for name, gradient in zip(NAMES, found, strict=True):
        assert gradient[:, 30:80].any(), name
        assert not gradient[:, :30].any(), name
        assert not gradient[:, 80:].any(), name
    changed = [t.clone() for t in given]
    for t in changed:
        t[:, :30] = -3.0
    same, _ = delta_rule_triton(*changed, documents, True)
    assert torch.equal(same[:, 30:], out[:, 30:])
