"""NF4 of stacked experts is bitsandbytes' own, expert by expert."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from lorakit.ops.nf4 import dequantize_nf4_plain
from lorakit.ops.nf4_experts import dequantize_experts, quantize_experts, rows_of
from lorakit.planning.rank_workload import NF4_BYTES


def experts(number, rows, columns, dtype=torch.float32):
    torch.manual_seed(0)
    scale = torch.linspace(0.5, 2, number).view(-1, 1, 1)  # a mean scale of its own for each
    return (torch.randn(number, rows, columns) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 200), (33, 70), (512, 64)])
def test_values_are_those_of_bitsandbytes(shape, dtype):
    weights = experts(5, *shape, dtype)
    stored = quantize_experts(weights)
    found = dequantize_experts(stored, range(5), dtype)
    for own, weight in zip(found, weights, strict=True):
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(own, dequantize_4bit(packed, state))


def test_rows_shorter_than_a_block_are_right():
    """bitsandbytes 0.50 reads the scales of such rows wrongly on a CPU."""
    weights = experts(3, 64, 32)
    found = dequantize_experts(quantize_experts(weights), range(3), torch.float32)
    for own, weight in zip(found, weights, strict=True):
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(own, dequantize_nf4_plain(packed, state))


@pytest.mark.parametrize("chosen", [[0], [1, 2, 3], [0, 2, 4], [4]])
def test_only_the_experts_that_are_asked_for(chosen):
    stored = quantize_experts(experts(5, 64, 32))
    every = dequantize_experts(stored, range(5), torch.float32)
    assert torch.equal(dequantize_experts(stored, chosen, torch.float32), every[chosen])


def test_the_size_is_the_planned_one():
    stored = quantize_experts(experts(2, 512, 256))
    held = sum(t.nbytes for n, t in stored.tensors().items() if n not in ("code", "code2"))
    assert held - 2 * 4 == pytest.approx(2 * 512 * 256 * NF4_BYTES)  # and a mean scale each


def test_consecutive_rows_are_not_copied():
    tensor = torch.arange(12).view(6, 2)
    assert rows_of(tensor, [2, 3]).data_ptr() == tensor[2].data_ptr()
    assert rows_of(tensor, [1, 4]).tolist() == [[2, 3], [8, 9]]
