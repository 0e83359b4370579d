"""NF4 weights come back as bitsandbytes gives them, and the formula says the same."""

import pytest
import torch

from lorakit.ops.nf4 import dequantize_nf4, dequantize_nf4_plain

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (96, 320)])
def test_it_is_bitsandbytes_own_and_the_formula(shape, nested):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=nested
    )
    theirs = bnb.functional.dequantize_4bit(packed, state)
    ours = dequantize_nf4(packed, state, torch.empty(shape))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(dequantize_nf4_plain(packed, state), theirs, rtol=1e-6, atol=1e-7)
    # QLoRA's grid: an error near 9% of a normal weight's size.
    assert 0.05 < (ours - weight).norm() / weight.norm() < 0.15
