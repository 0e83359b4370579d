"""The kernel gives the bits that bitsandbytes gives (on a card), or the formula's (interpreted)."""

import pytest
import torch

from lorakit.ops.nf4 import dequantize_nf4_plain

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (96, 320), (130, 192)])
def test_bits_are_equal(kernel_device, shape, kind):
    from lorakit.ops.nf4_triton import dequantize_nf4_triton

    if kind == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter cuts bfloat16 off where a card rounds")
    torch.manual_seed(0)
    weight = torch.randn(shape, device=kernel_device, dtype=kind)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found = dequantize_nf4_triton(
        packed, state, torch.full(shape, float("nan"), dtype=kind, device=kernel_device)
    )
    assert torch.equal(found, dequantize_nf4_plain(packed, state).to(kind))
    if kernel_device.type == "cuda":
        assert torch.equal(found, bnb.functional.dequantize_4bit(packed, state))
