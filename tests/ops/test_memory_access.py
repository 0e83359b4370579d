"""The delta rule's and the convolution's kernels read and write elements of their tensors alone.

Inputs have every kind of stride and lie between NaN; results equal those of contiguous inputs.
"""

import pytest
import torch
from tests.ops.test_gated_delta_rule import inputs, numbered

pytest.importorskip("triton", reason="the triton package is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is needed")


def between_nan(shape, strides, offset=3):
    """A view with these strides in a tensor of NaN."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.full((span + 2 * offset,), float("nan")).as_strided(shape, strides, offset)


def contiguous_strides(shape, last=1):
    strides = [last]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def gaps(x):
    """Distance between elements of the last dimension."""
    return between_nan(x.shape, contiguous_strides(x.shape, 2)).copy_(x)


def split(x):
    """A slice of wider rows, as the layers cut q, k and v."""
    rows = x.flatten(2)
    wide = between_nan((*rows.shape[:2], rows.shape[2]), (rows.shape[1] * 1000, 1000, 1))
    return wide.copy_(rows).unflatten(2, x.shape[2:])


def turned(x):
    """Tokens innermost, as [B, D, T]."""
    order = (0, *range(2, x.dim()), 1)
    back = (0, x.dim() - 1, *range(1, x.dim() - 1))
    shape = [x.shape[i] for i in order]
    return between_nan(shape, contiguous_strides(shape)).permute(back).copy_(x)


LAYOUTS = {"gaps": gaps, "split": split, "turned": turned}


def delta_rule(given, documents, dout):
    from lorakit.ops.gated_delta_rule_triton import delta_rule_backward_triton, delta_rule_triton

    out, saved = delta_rule_triton(*given, documents, True)
    return out, *delta_rule_backward_triton(dout, given[2], given[4], documents, True, saved)


@pytest.mark.parametrize("tokens", [1, 12, 64, 65, 130])
@pytest.mark.parametrize("packed", [False, True])
def test_delta_rule_at_any_length(tokens, packed):
    from tests.ops.memory_access import empty_is_nan, only_own_elements

    given = inputs(tokens, (1, 1), (16, 16), batch=1, dtype=torch.float32)
    documents = numbered((tokens // 3, tokens - tokens // 3)) if packed else None
    with only_own_elements() as counts, empty_is_nan():
        results = delta_rule(given, documents, torch.randn_like(given[2]))
    assert all(t.isfinite().all() for t in results)
    assert counts["read"] > counts["written"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_delta_rule_with_any_strides(layout):
    from tests.ops.memory_access import empty_is_nan, only_own_elements

    move = LAYOUTS[layout]
    given = inputs(12, (1, 2), (16, 32), batch=2, dtype=torch.float32)
    documents, dout = numbered((5, 7)), torch.randn_like(given[2])
    expected = delta_rule(given, documents.repeat(2, 1), dout)
    strided = torch.stack([documents] * 3, -1)[..., 1].expand(2, -1)
    with only_own_elements(), empty_is_nan():
        results = delta_rule([move(t) for t in given], strided, move(dout))
    assert all(map(torch.equal, results, expected))


def test_delta_rule_with_the_gradient_of_a_sum():
    from tests.ops.memory_access import only_own_elements

    given = inputs(12, (1, 1), (16, 16), batch=2, dtype=torch.float32)
    one = torch.ones(())
    expected = delta_rule(given, None, one.repeat(given[2].shape))
    with only_own_elements():
        results = delta_rule(given, None, one.expand(given[2].shape))
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution(tokens, layout):
    from tests.ops.memory_access import empty_is_nan, only_own_elements

    from lorakit.ops.causal_conv_triton import causal_conv_backward_triton, causal_conv_triton

    move = LAYOUTS[layout]
    rows, dy = torch.randn(2, 2, tokens, 130)
    weight, bias = torch.randn(130, 4), torch.randn(130)
    documents = numbered((tokens // 3, tokens - tokens // 3))

    def both(rows, dy, weight, bias, documents):
        given = (rows, weight, bias, True, documents)
        return causal_conv_triton(*given), causal_conv_backward_triton(dy, *given)

    expected = both(rows, dy, weight, bias, documents.repeat(2, 1))
    with only_own_elements(), empty_is_nan():
        results = both(
            move(rows), move(dy), between_nan((130, 4), (1, 131)).copy_(weight),
            between_nan((130,), (2,)).copy_(bias), documents.expand(2, -1),
        )  # fmt: skip
    assert all(map(torch.equal, results, expected))


def test_an_access_outside_is_noticed():
    import triton
    import triton.language as tl
    from tests.ops.memory_access import only_own_elements

    @triton.jit
    def copy(x, y, count, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at, mask=at < count))

    x, y = torch.zeros(9), torch.zeros(8)
    with only_own_elements():
        copy[(1,)](x[:8], y, 8, BLOCK=8)
        with pytest.raises(Exception, match="1 of 9 elements read outside"):
            copy[(1,)](x[:8], y, 9, BLOCK=16)
        with pytest.raises(Exception, match="8 of 16 elements written outside"):
            copy[(1,)](x[:8], y, 8, BLOCK=16)
