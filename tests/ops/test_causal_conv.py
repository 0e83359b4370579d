"""The shifted multiplies equal torch's convolution, one document at a time."""

import pytest
import torch
import torch.nn.functional as F

from lorakit.ops.causal_conv import causal_conv


def separate(x, weight, bias, silu, lengths):
    """torch's convolution of each document alone."""
    out = []
    for part in x.split(lengths, 2):
        c = F.conv1d(
            part, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=len(weight)
        )
        out.append(c[:, :, : part.shape[2]])
    joined = torch.cat(out, 2)
    return F.silu(joined) if silu else joined


def made(lengths, channels=6, taps=4, kind=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, sum(lengths), channels, generator=generator).transpose(1, 2)
    weight = torch.randn(channels, taps, generator=generator)
    bias = torch.randn(channels, generator=generator)
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    given = [t.to(device, kind) for t in (x, weight, bias)]
    return given, numbers.repeat(2, 1).to(device)


@pytest.mark.parametrize("lengths", [(1,), (3,), (20,), (1, 2, 5, 12), (2, 1, 1)])
@pytest.mark.parametrize(("silu", "biased"), [(True, False), (False, True), (True, True)])
def test_each_document_is_convolved_alone(lengths, silu, biased):
    (x, weight, bias), documents = made(lengths)
    if len(lengths) == 1:
        documents = None
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    found = causal_conv(x, weight, bias if biased else None, silu, documents)
    expected = separate(x, weight, bias if biased else None, silu, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    used = leaves[: 2 + biased]
    grads = torch.autograd.grad(found.square().sum(), used)
    wanted = torch.autograd.grad(expected.square().sum(), used)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_rounds_where_torch_does():
    (x, weight, _), _ = made((50,), kind=torch.bfloat16)
    expected = separate(x, weight, None, True, (50,))
    found = causal_conv(x, weight, None, True)
    different = (found != expected).float().mean()
    assert different < 0.02  # sums in another order round some values otherwise
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-7)


def test_the_layout_of_the_layers_is_kept():
    (x, weight, _), _ = made((10,))
    assert causal_conv(x, weight, None, True).transpose(1, 2).is_contiguous()
