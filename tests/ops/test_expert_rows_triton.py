"""Sums of experts' rows in Triton are those of plain torch."""

import pytest
import torch

from lorakit.ops.expert_rows import sum_rows_reference, weighted_rows_reference

pytest.importorskip("triton")


def sorted_rows(device, tokens=5, choices=3, width=1100):
    torch.manual_seed(0)
    order = torch.randperm(tokens * choices, device=device)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=device)
    rows = torch.randn(len(order), width, device=device)
    return rows, torch.rand(tokens, choices, device=device), order, back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_the_definition(kernel_device, dtype):
    from lorakit.ops.expert_rows_triton import sum_rows_triton

    rows, weights, _, back = sorted_rows(kernel_device)
    rows = rows.to(dtype)
    for given in (None, weights, weights.to(dtype)):
        found = sum_rows_triton(rows, back, given, 3)
        assert found.dtype == dtype
        expected = sum_rows_reference(rows, back, given, 3)
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype != torch.float32 else 1e-6,
                                   atol=1e-5)  # fmt: skip


def test_gradients_of_the_sum_are_those_of_the_definition(kernel_device):
    from lorakit.ops.expert_rows_triton import weighted_rows_triton

    y, weights, order, _ = sorted_rows(kernel_device)
    grad = torch.randn(5, y.shape[1], device=kernel_device)
    expected = weighted_rows_reference(grad, y, weights, order)
    for own, definition in zip(
        weighted_rows_triton(grad, y, weights, order), expected, strict=True
    ):
        torch.testing.assert_close(own, definition, rtol=1e-5, atol=1e-5)
