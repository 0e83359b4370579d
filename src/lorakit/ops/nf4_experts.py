"""Expert weights in NF4 with double quantization: one tensor [E, N, K], quantized expert by expert.

Each expert is what bitsandbytes' `quantize_4bit(expert, compress_statistics=True)` gives: blocks of
64 values, their scales in 8 bits around the expert's mean scale, in blocks of 256 (QLoRA, arXiv
2305.14314, section 3). The parts of all experts are stacked, so that a group of experts is
dequantized in a few launches and streamed as a few tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Nf4Experts:
    """Packed values and scales of E experts [N, K], and the code books that they share."""

    packed: Tensor  # uint8 [E, N K / 2], the first value in the high half
    absmax: Tensor  # uint8 [E, B]: scale of each block, as an index into `code2`
    absmax2: Tensor  # float32 [E, B2]: scale of each block of scales
    offset: Tensor  # float32 [E]: mean scale
    code: Tensor  # float32 [16]
    code2: Tensor  # float32 [256]
    shape: tuple[int, int]
    blocks: tuple[int, int]  # values per scale, scales per nested scale

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field, in the order of the fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def quantize_experts(weights: Tensor) -> Nf4Experts:
    """Quantize [E, N, K], one expert at a time: beside the result one expert is in memory."""
    from bitsandbytes.functional import quantize_4bit

    parts: list[tuple[Tensor, Any]] = [
        quantize_4bit(expert.contiguous(), quant_type="nf4", compress_statistics=True)
        for expert in weights
    ]
    states = [state for _, state in parts]
    second = states[0].state2
    return Nf4Experts(
        torch.stack([packed.view(-1) for packed, _ in parts]),
        torch.stack([state.absmax for state in states]),
        torch.stack([state.state2.absmax for state in states]),
        torch.stack([state.offset for state in states]),
        states[0].code,
        second.code,
        (weights.shape[1], weights.shape[2]),
        (states[0].blocksize, second.blocksize),
    )


def dequantize_experts(weights: Nf4Experts, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Weights [G, N, K] of these experts, given in ascending order."""
    packed, absmax, absmax2, offset = (
        rows_of(t, experts)
        for t in (weights.packed, weights.absmax, weights.absmax2, weights.offset)
    )
    blocks = absmax.shape[1]
    scales = weights.code2[absmax.int()]
    scales *= absmax2.repeat_interleave(weights.blocks[1], dim=1)[:, :blocks]
    scales += offset[:, None]
    (rows, columns), count, size = weights.shape, len(experts), weights.blocks[0]
    if rows * columns % size == 0:  # no block spans two experts
        return _values(weights, packed, scales, (scales.numel(), size), dtype).view(
            -1, rows, columns
        )
    parts = zip(packed, scales, strict=True)
    flat = [_values(weights, p, s, (1, rows * columns), dtype) for p, s in parts]
    return torch.cat(flat).view(count, rows, columns)


def _values(
    weights: Nf4Experts, packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Dense values of whole blocks; bitsandbytes 0.50 misreads rows shorter than one on a CPU."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(
        scales.reshape(-1), torch.Size(shape), weights.code, weights.blocks[0], "nf4", dtype
    )
    dense: Tensor = dequantize_4bit(packed.reshape(-1, 1), state)
    return dense


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor, ascending: a view if they follow each other, else a copy."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return tensor[rows[0] : rows[-1] + 1]
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))
