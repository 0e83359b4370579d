"""Add the adapters' part to a group's output, and compute its gradients.

In the notation of `ops/lora.py`, for the adapted modules j of a group whose outputs are
concatenated:

    y_j = start + S_j B_j^T         dS_j = dy_j B_j         dB_j = dy_j^T S_j

Both gradients read dy once: as two products per module they took 6.7 of a step's 119 ms at 2,048
tokens and rank 16, most of it reading dy (174 MB a layer) twice and launching 14 kernels.
Shapes: M tokens, N outputs, n adapted modules of rank R; s and dS [M, n*R], b [N, R], dB [N', R]
with the rows of adapted modules only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.ops.backend import has_matrix_kernels
from lorakit.ops.lora import Update, matmul_float32

# Above this rank partial sums are as large as their operands, and two products are as fast.
LARGEST_RANK = 32


def lora_add(start: Tensor, update: Update, out: Tensor | None = None) -> Tensor:
    """start [M, N] + S B^T of a single module, in `out` if given."""
    if has_matrix_kernels(start):
        from lorakit.ops.lora_output_triton import lora_add_triton

        return lora_add_triton(start, update, out)
    return torch.addmm(start, update.s, update.b.t(), out=out)


def lora_output_grads(
    dy: Tensor, update: Update, columns: Sequence[slice], into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dS [M, n*R] in dy's dtype, dB [N', R] float32, added to `into` if given).

    Args:
        columns: of dy, for each adapted module in the order of S.
    """
    if has_matrix_kernels(dy) and update.rank <= LARGEST_RANK:
        from lorakit.ops.lora_output_triton import lora_output_grads_triton

        return lora_output_grads_triton(dy, update, columns, into)
    return lora_output_grads_reference(dy, update, columns, into)


def lora_output_grads_reference(
    dy: Tensor, update: Update, columns: Sequence[slice], into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: two products per module."""
    rank = update.rank
    ds = torch.empty(dy.shape[0], len(columns) * rank, dtype=dy.dtype, device=dy.device)
    if into is None:
        into = torch.zeros(
            sum(c.stop - c.start for c in columns), rank, dtype=torch.float32, device=dy.device
        )
    start = 0
    for index, module_columns in enumerate(columns):
        ranks = slice(index * rank, (index + 1) * rank)
        torch.mm(dy[:, module_columns], update.b[module_columns], out=ds[:, ranks])
        rows = slice(start, start + module_columns.stop - module_columns.start)
        start = rows.stop
        matmul_float32(dy[:, module_columns].t(), update.s[:, ranks], into[rows])
    return ds, into
